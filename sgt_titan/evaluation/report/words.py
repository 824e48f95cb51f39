"""Numbers and sentences that the terminal and the page share."""

# ruff: noqa: E501  (sentences, style sheets)

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Results = Mapping[str, Any]

# Key of an attack's result, and its column.
ATTACK_COLUMNS = {
    "top1": "top-1",
    "top10": "top-10",
    "content_top1": "content",
    "marked_top1": "private",
    "span_exact": "values",
    "unneeded_span_exact": "unneeded",
    "similarity": "text",
}
PRIVACY_ROWS = {
    "nn_fr": "nearest neighbour fails (NN-FR = TTR-1)",
    "mrp_fr": "most probable rank fails (MRP-FR)",
    "ttr_10": "not among the 10 nearest (TTR-10)",
    "ttr_50": "not among the 50 nearest (TTR-50)",
    "ttr_100": "not among the 100 nearest (TTR-100)",
    "sym_ttr_10": "nor among the 10 farthest (SymTTR-10)",
    "sym_ttr_100": "nor among the 100 farthest (SymTTR-100)",
    "rank_entropy": "entropy of the rank histogram / ln V",
}
UTILITY_ROWS = {
    "kept": "prompt's benefit kept",
    "perplexity": "perplexity of the response",
    "kl": "KL to the clean prompt, nats per token",
    "agreement": "same top-1 token, response given",
    "greedy_agreement": "same token in greedy answers",
}
CAUTION = (
    "Top-1 is the share of the hidden tokens that an attack reads right. The attacks are ours and finite: what they do not "
    "recover, a better one may. What they do recover is lost for certain."
)
# Kind of an attack (``threat.KINDS``), and its heading.
THREATS = {
    "single": "one observation of each prompt",
    "repeats": "K fresh observations of each prompt (only where noise is not held)",
    "noisy": "what is sent, before the denoiser",
    "answer": "the clean answer alone, which every transform that keeps it gives away",
    "guess": "nothing: guessing from template and language",
}
BOUNDS = {
    "prior": "from the best guess without looking",
    "fano": "Fano's inequality",
    "distortion": "rate and distortion",
}
CERTIFIED = (
    "The nats bound every attacker and everything computed from what was sent, on average over prompts; the shares hold "
    "as far as text is as the trunk says. K fresh observations: K times the nats."
)
KEPT = (
    "kept: share of what the prompt is worth to its answer that is left, in nats of the response; 0 is the best prompt that "
    "says nothing (docs/EVALUATION.md)."
)
CLASSES = ("frequent", "word", "piece", "number", "punctuation", "marked")


def value(estimate: Mapping[str, Any] | float | None) -> float:
    """The number, NaN where there is none."""
    found = estimate.get("value") if isinstance(estimate, Mapping) else estimate
    return math.inf if found == "inf" else math.nan if found is None else float(found)


def percent(estimate: Mapping[str, Any] | float | None, *, interval: bool = False) -> str:
    number = value(estimate)
    if math.isnan(number):
        return "-"
    return f"{100 * number:.1f}%" + (_bounds(estimate, 100, ".1f") if interval else "")


def number(estimate: Mapping[str, Any] | float | None, *, interval: bool = False) -> str:
    found = value(estimate)
    if math.isnan(found):
        return "-"
    if math.isinf(found):
        return "unbounded"
    return f"{found:.4g}" + (_bounds(estimate, 1, ".3g") if interval else "")


NUMBERS = {"perplexity": number, "kl": number}  # of ``UTILITY_ROWS``; the others are shares


def metric_rows(privacy: Mapping[str, Any], about: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, figure with its interval, and remark of what is measured without an attacker."""
    lme = number(privacy.get("mi_log_mean_exp_ceiling"))
    entropy = f"at most {percent(privacy.get('rank_entropy_ceiling'))} at this N"
    found = lambda key, show=percent: show(privacy.get(key), interval=True)  # noqa: E731
    return [
        *((label, found(key), entropy if key == "rank_entropy" else "") for key, label in PRIVACY_ROWS.items()),
        (
            "mutual information, Algorithm 1, nats/feature",
            found("mi", number),
            f"an upper bound; ln V = {number(about.get('ln_vocab'))}",
        ),
        ("log-mean-exp, nats/token", found("mi_log_mean_exp", number), f"a lower bound, at most {lme} at this N"),
        ("PAC-Adv of a feature, prior 1/V", percent(privacy.get("pac_adv_uniform")), ""),
        (
            "PAC-Adv of a feature, prior LM top-1",
            percent(privacy.get("pac_adv_lm")),
            f"LM top-1 {percent(privacy.get('lm_top1'), interval=True)}",
        ),
    ]


def baseline(mechanism: Mapping[str, Any], *, interval: bool) -> dict[str, str]:
    """Cells of one way to hide a prompt, beside the others', by column; ``interval``: of what is read and kept."""
    facts, privacy, use = (mechanism.get(key) or {} for key in ("facts", "privacy", "utility"))
    best = best_attack(mechanism)
    return {
        "std": number(facts.get("std")),
        "epsilon": number(facts.get("epsilon")),
        "epsilon, classical": number(facts.get("epsilon_classical")),
        "NN-FR": percent(privacy.get("nn_fr")),
        "best attack": percent(best[1].get("top1"), interval=interval) if best else "-",
        "kept": percent(use.get("kept"), interval=interval),
        "KL": number(use.get("kl")),
        "MI": number(privacy.get("mi")),
        "PAC-Adv": percent(privacy.get("pac_adv_uniform")),
    }


def bound_text(bound: float | None) -> str:
    return "no bound" if bound is None else f"at most {percent(bound)}"


def _bounds(estimate: Any, factor: float, form: str) -> str:
    """The interval behind a number; nothing where it has none."""
    if not isinstance(estimate, Mapping) or not isinstance(estimate.get("low"), float | int):
        return ""
    return f" [{factor * estimate['low']:{form}}, {factor * estimate['high']:{form}}]"


def best_attack(mechanism: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The attack with the highest top-1 recovery; None at a glance, which has met the weakest alone."""
    attacks = mechanism.get("attacks") or {}
    if glanced(mechanism):
        return None
    name = mechanism.get("best") or max(attacks, key=lambda key: value(attacks[key].get("top1")), default=None)
    return (name, attacks[name]) if name and name in attacks else None


def not_run(mechanism: Mapping[str, Any]) -> list[str]:
    """Titles of the suite's attacks that were left out (``--attacks``)."""
    return list(mechanism.get("not_run") or ())


def strongest(mechanism: Mapping[str, Any]) -> str:
    """What the attack that read most may be called: the best attacker only where all of a suite were there."""
    if not not_run(mechanism):
        return "best attacker"
    run = sum(attack.get("kind") != "guess" for attack in (mechanism.get("attacks") or {}).values())
    return f"best of the {run} attacks that were run" if run > 1 else "only attack that was run"


def glanced(mechanism: Mapping[str, Any]) -> bool:
    """Whether the evaluation was a glance: no best attacker is named."""
    return "best" in mechanism and mechanism["best"] is None


def sees(attack: Mapping[str, Any]) -> str:
    return ", ".join(attack.get("sees") or ()) or "?"


def at_least(attack: Mapping[str, Any]) -> str:
    """In front of what an attack reads that was still learning when its budget ended."""
    return "at least " if any(_warnings(attack)) else ""


GLANCE = (
    "Nearest neighbour is the weakest attacker, and no other was run. Whoever has the transform can make pairs of tokens and "
    "obfuscated embeddings without limit and train a model to invert it; such an attacker can read most of a prompt that a "
    "nearest neighbour cannot read at all. These numbers are no security statement: `sgt-titan evaluate` attacks."
)
LEARNING = (
    "He was still learning when his budget ended and reads more with more of it: on the demo trunk the quick suite's read "
    "45%, the standard suite's 72% of the same kind of transform (docs/RESULTS.md)."
)


def conclusions(results: Results) -> list[str]:
    """What the numbers say in words; never kinder than they are."""
    sgt = (results.get("mechanisms") or {}).get("sgt") or {}
    found, best = [GLANCE] if glanced(sgt) else [], best_attack(sgt)
    if best is not None:
        _, attack = best
        share = value(attack.get("top1"))
        say = (
            "The prompt must be taken for readable by anybody with what this attack needs: "
            if share > 0.5
            else "A good part of the prompt can be read by anybody with what this attack needs: "
            if share > 0.15
            else "The best of our attacks reads little of the prompt; that is no proof that none can. It needs: "
        )
        found.append(
            f"{attack.get('title')} reads {at_least(attack)}{percent(attack.get('top1'))} of the hidden tokens. {say}{sees(attack)}."
        )
        if attack.get("difference"):
            found.append(
                f"{percent((attack.get('guesses') or {}).get('top1'))} are guessed by the same attacker without what was "
                f"sent; looking added {percent(attack['difference'].get('top1'), interval=True)}."
            )
        if attack.get("beyond_answer"):
            found.append(
                f"{percent((attack.get('answer_tells') or {}).get('top1'))} follow from the clean answer alone, so every "
                f"transform that keeps the answer gives them away; of these tokens and what else was sent he reads "
                f"{percent(attack['beyond_answer'].get('top1'), interval=True)} more."
            )
        nearest = value((sgt.get("attacks") or {}).get("nearest_l2", {}).get("top1"))
        if nearest < 0.2 < share:
            found.append(
                f"The nearest neighbour reads {100 * nearest:.1f}%: by that metric alone this would look "
                f"{share / max(nearest, 1e-3):.0f} times safer than it is."
            )
        if value(attack.get("span_exact")) > 0:
            unneeded = attack.get("unneeded_span_exact")
            also = f", {percent(unneeded)} of those that the answer does not hold" if unneeded else ""
            found.append(f"{percent(attack['span_exact'])} of the marked private values are read whole{also}.")
    if best is not None and (left_out := not_run(sgt)):
        found.append(
            f"Of the suite's attacks these were not run, and any of them may read more: {', '.join(left_out)}."
        )
    without_secret = [
        (key, a)
        for key, a in (sgt.get("attacks") or {}).items()
        if "the SGT and its weights" not in (a.get("sees") or ()) and a.get("kind", "single") == "single"
    ]
    if without_secret and best is not None:
        key, attack = max(without_secret, key=lambda pair: value(pair[1].get("top1")))
        if key != best[0]:
            found.append(
                f"Without the SGT's weights the best is {attack.get('title')}: {percent(attack.get('top1'))} (it sees "
                f"{sees(attack)}). Whoever can run the client has the weights."
            )
    kept = value((sgt.get("utility") or {}).get("kept"))
    if not math.isnan(kept):
        found.append(f"Of what the prompt is worth to the answer, {100 * kept:.0f}% is kept.")
    privacy, about = sgt.get("privacy") or {}, results.get("about") or {}
    mi, limit = value(privacy.get("mi")), about.get("ln_vocab")
    if not math.isnan(mi) and limit and about.get("width"):
        scale = limit / about["width"]
        if mi > scale:
            found.append(
                f"Mutual information is {number(privacy.get('mi'))} nats per feature by Algorithm 1; token identity is safe "
                f"from a maximum-likelihood decoder only well below ln V / D = {scale:.2g}."
            )
    found += [f"{a.get('title')}: {note}." for a in (sgt.get("attacks") or {}).values() for note in _warnings(a)]
    return found + [f"{note[:1].upper()}{note[1:]}." for note in about.get("notes") or ()]


def _warnings(attack: Mapping[str, Any]) -> Iterable[str]:
    return (note for note in attack.get("notes") or () if "not converged" in note)

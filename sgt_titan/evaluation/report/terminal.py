"""The report as plain text, at most 112 columns wide."""

# ruff: noqa: E501  (sentences, style sheets)

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from sgt_titan.evaluation.report.words import (
    ATTACK_COLUMNS,
    CAUTION,
    LEARNING,
    NUMBERS,
    PRIVACY_ROWS,
    UTILITY_ROWS,
    Results,
    at_least,
    baseline,
    best_attack,
    bound_text,
    conclusions,
    glanced,
    metric_rows,
    number,
    percent,
    sees,
    strongest,
    value,
)
from sgt_titan.terminal import printable

WIDTH = 112


def render(results: Results) -> str:
    """Headline, attacks, utility, metrics, baselines, an example, and where the numbers come from."""
    about, mechanisms = results.get("about") or {}, results.get("mechanisms") or {}
    sgt = mechanisms.get("sgt") or {}
    lines = [
        f"{about.get('export', '?')} on {about.get('trunk', '?')}, {about.get('data', '?')}",
        f"{about.get('rows', '?')} prompts, N = {about.get('hidden_tokens', 0):,} hidden tokens, "
        f"{about.get('marked_spans', 0):,} private values; V = {about.get('vocab', 0):,}, D = {about.get('width', 0):,}; "
        f"suite {about.get('suite', '?')}, seed {about.get('seed', '?')}",
        "",
    ]
    if (best := best_attack(sgt)) is not None:
        attack = best[1]
        lines.append(
            f"{strongest(sgt).upper()}: {attack.get('title')} reads {at_least(attack)}"
            f"{percent(attack.get('top1'), interval=True)} of the hidden tokens"
        )
        if at_least(attack):
            lines += textwrap.wrap(LEARNING, WIDTH, initial_indent="  ", subsequent_indent="  ")
        if attack.get("difference"):
            lines.append(
                f"  guesses {percent((attack.get('guesses') or {}).get('top1'))} without looking; looking added "
                f"{percent(attack['difference'].get('top1'), interval=True)}"
            )
        if attack.get("beyond_answer"):
            lines.append(
                f"  the clean answer alone tells {percent((attack.get('answer_tells') or {}).get('top1'))}; he reads "
                f"{percent(attack['beyond_answer'].get('top1'), interval=True)} beyond it"
            )
        if certificate := sgt.get("certificate"):
            lines.append(
                f"  one observation tells {number(certificate.get('nats_per_token'), interval=True)} nats a token at most; "
                f"of the tokens anybody can read: {bound_text(certificate.get('smallest'))}"
            )
        lines += [f"  sees {sees(attack)}", ""]
    for sentence in conclusions(results):
        lines += textwrap.wrap(printable(sentence), WIDTH, initial_indent="* ", subsequent_indent="  ")
    if glanced(sgt):
        lines += ["", *_side_by_side(results), ""]
    else:
        lines += ["", *_attacks(sgt), "", *_utility(results), "", *_metrics(sgt, about)]
        lines += ["", *_mechanisms(mechanisms), ""]
    for shown in (sgt.get("examples") or [])[:1]:
        lines += _example(shown, best[0] if best else "")
    if not glanced(sgt):  # whose own is above
        lines += textwrap.wrap(CAUTION, WIDTH)
    return "\n".join(line.rstrip() for line in lines)


COLUMNS = {
    "none": "no obfuscation",
    "noise": "constant noise",
    "sgt": "this SGT",
    "no_prompt": "no prompt",
}


def _side_by_side(results: Results) -> list[str]:
    """Before and after: cost and nearest neighbour of the transform, of what it has to beat and of no prompt at all."""
    columns = {**(results.get("mechanisms") or {}), "no_prompt": results.get("no_prompt") or {}}
    shown = {name: column for name, column in columns.items() if name in COLUMNS}
    shown = {name: shown[name] for name in COLUMNS if name in shown}
    lines = [f"{'':<40}" + "".join(f"{COLUMNS[name]:>{_COLUMN}}" for name in shown)]
    privacy = (columns.get("sgt") or {}).get("privacy") or {}

    def block(title: str, part: str, rows: Mapping[str, str], show: Mapping[str, Any]) -> None:
        lines.append(title)
        for key, label in rows.items():
            values = [(column.get(part) or {}).get(key) for column in shown.values()]
            if any(found is not None for found in values):
                cells = "".join(f"{show.get(key, percent)(found):>{_COLUMN}}" for found in values)
                lines.append(f"  {label:<38}{cells}")

    tokens = ((columns.get("sgt") or {}).get("utility") or {}).get("perplexity") or {}
    block(f"Utility (N = {tokens.get('n', 0):,} response tokens)", "utility", UTILITY_ROWS, NUMBERS)
    hidden = (privacy.get("nn_fr") or {}).get("n", 0)
    block(f"Nearest neighbour in L2 (N = {hidden:,} hidden tokens)", "privacy", PRIVACY_ROWS, NUMBERS)
    lines.append(f"  {'':<38}the entropy is at most {percent(privacy.get('rank_entropy_ceiling'))} at this N")
    pairs = (privacy.get("mi") or {}).get("n", 0)
    limit = number((results.get("about") or {}).get("ln_vocab"))
    title = f"Mutual information, Algorithm 1 (N = {pairs:,} pairs of rows; ln V = {limit})"
    block(title, "privacy", {"mi": "nats per feature, an upper bound"}, {"mi": number})
    lines += _removed(results)
    return lines


_COLUMN = 16


def _removed(results: Results) -> list[str]:
    """What the response costs with and without the prompt."""
    clean = (((results.get("mechanisms") or {}).get("none") or {}).get("utility") or {}).get("perplexity")
    ways = (results.get("no_prompt") or {}).get("ways") or {}
    removed = ", ".join(f"{number(found)} {way}" for way, found in ways.items())
    said = f"perplexity with the clean prompt {number(clean)}; without its tokens: {removed or '-'}"
    if zero := ((results.get("no_prompt") or {}).get("zero") or {}).get("note"):
        said += f"; {zero}"
    return textwrap.wrap(said, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _attacks(sgt: Mapping[str, Any]) -> list[str]:
    attacks = sgt.get("attacks") or {}
    has_pii = any("pii" in attack for attack in attacks.values())
    beyond = any(attack.get("difference") for attack in attacks.values())
    titles = [*ATTACK_COLUMNS.values(), *(["beyond"] if beyond else []), *(["PII"] if has_pii else [])]
    lines = [f"{'Attacks, share recovered':<40}" + "".join(f"{title:>9}" for title in titles)]
    for attack in sorted(attacks.values(), key=lambda a: value(a.get("top1"))):
        cells = [percent(attack.get(key)) for key in ATTACK_COLUMNS]
        cells += [percent((attack.get("difference") or {}).get("top1"))] if beyond else []
        cells += [percent((attack.get("pii") or {}).get("fuzzy_micro"))] if has_pii else []
        lines.append(f"  {attack.get('title', '?')[:38]:<38}" + "".join(f"{cell:>9}" for cell in cells))
    lines.append(
        "content: letters or digits and not frequent; private: tokens of marked values; values: read whole; text: edit "
    )
    lines.append("similarity" + ("; PII: share of private values leaked, fuzzy" if has_pii else ""))
    return lines


def _utility(results: Results) -> list[str]:
    sgt = ((results.get("mechanisms") or {}).get("sgt") or {}).get("utility") or {}
    n = (sgt.get("perplexity") or {}).get("n", 0)
    lines = [f"Utility (N = {n:,} response tokens)"]
    for key, label in UTILITY_ROWS.items():
        lines.append(f"  {label:<44}{NUMBERS.get(key, percent)(sgt.get(key), interval=True):>26}")
    return lines + _removed(results)


def _metrics(sgt: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    privacy = sgt.get("privacy") or {}
    n = (privacy.get("nn_fr") or {}).get("n", 0)
    lines = [f"Metrics without an attacker (N = {n:,} hidden tokens)"]
    lines += [f"  {label:<46}{figure:>24}  {remark}" for label, figure, remark in metric_rows(privacy, about)]
    if privacy.get("tied_tokens") or about.get("near_duplicate_rows"):
        lines.append(
            f"  {about.get('near_duplicate_rows', 0)} rows of the table are near-duplicates ({about.get('untrained_rows', 0)} "
            f"untrained); {privacy.get('tied_tokens', 0)} tokens tied"
        )
    return lines


def _mechanisms(mechanisms: Mapping[str, Any]) -> list[str]:
    lines = [f"{'Against the baselines':<40}" + "".join(f"{title:>{width}}" for title, width in _WIDTHS.items())]
    for mechanism in mechanisms.values():
        cells = baseline(mechanism, interval=False)
        row = "".join(f"{cells[title]:>{width}}" for title, width in _WIDTHS.items())
        lines.append(f"  {mechanism.get('title', '?'):<38}{row}")
    lines.append(
        "std: of the noise, in table stds; epsilon: local DP of one token at delta 1e-5 (a prompt of T: T times)"
    )
    return lines


_WIDTHS = {"std": 7, "epsilon": 10, "NN-FR": 8, "best attack": 12, "kept": 8, "KL": 9, "MI": 10, "PAC-Adv": 8}


def _example(shown: Mapping[str, Any], best: str) -> list[str]:
    lines = []
    guesses = shown.get("guesses") or {}
    texts = {
        "prompt": shown.get("prompt", ""),
        "nearest neighbour reads": guesses.get("nearest_l2", ""),
        **({f"best attacker reads ({best})": guesses.get(best, "")} if best else {}),
        "answer to the prompt": shown.get("answer_clean", ""),
        "answer to the obfuscated prompt": shown.get("answer_obfuscated", ""),
    }
    for title, text in texts.items():
        lines.append(f"{title}:")
        flat = " ".join(printable(text).split())
        lines += textwrap.wrap(flat, WIDTH - 4, initial_indent="    ", subsequent_indent="    ")[:6]
    return [*lines, ""]

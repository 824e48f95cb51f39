"""The report as one HTML file: no script, no font, no image from anywhere else."""

# ruff: noqa: E501  (sentences, style sheets)

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from sgt_titan.evaluation.report import plots
from sgt_titan.evaluation.report.words import (
    ATTACK_COLUMNS,
    BOUNDS,
    CAUTION,
    CERTIFIED,
    KEPT,
    LEARNING,
    NUMBERS,
    THREATS,
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
from sgt_titan.transform import glow

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #f3f3f1; --line: #d5d5d0; --warn: #b3380e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e3; --paper: #151515; --soft: #222; --line: #3d3d3d; --warn: #ff9166; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.head { border-left: .4rem solid var(--warn); background: var(--soft); padding: 1rem 1.25rem; }
.head strong { font-size: 1.9rem; color: var(--warn); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; } thead th { vertical-align: bottom; }
.more { } summary { cursor: pointer; } details p { margin: .2rem 0 .4rem; max-width: 42rem; white-space: normal; }
td.group, th.group { text-align: left; font-weight: 600; padding-top: .8rem; }
.attacks th:first-child { min-width: 13rem; } .attacks details { font-weight: 400; }
@media (max-width: 44rem) { .more { display: none; } body { margin: 1rem auto; } table { font-size: .8rem; }
  th, td { padding: .25rem .35rem; } .attacks th:first-child { min-width: 8rem; } .head strong { font-size: 1.5rem; } }
.sees { color: gray; font-size: .8rem; display: block; } figure { margin: 1rem 0; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; } figcaption { font-size: .85rem; color: gray; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem .8rem; font-size: .85rem; }
dt { font-weight: 600; } .small { font-size: .85rem; color: gray; }
"""


def page(results: Results) -> str:
    """The whole page."""
    about, mechanisms = results.get("about") or {}, results.get("mechanisms") or {}
    sgt = mechanisms.get("sgt") or {}
    return document(
        f"Evaluation of {about.get('export', 'an export')}",
        [
            _headline(results, sgt),
            _section("Kept and read", _plane(results)),
            _section("What this means", _list(conclusions(results)) + f"<p class='small'>{esc(CAUTION)}</p>"),
            _section("What is revealed of a prompt", _glow(sgt, about)),
            _section(
                "Attacks", _attack_table(sgt) + figure(plots.bars(sgt), "bars", "Recovery by attack, 95% intervals.")
            ),
            _section("What nobody can exceed", _certificate(sgt)),
            _section("Curves", _curves(sgt)),
            _section(
                "Which tokens", figure(plots.by_class(sgt), "kinds", "Top-1 recovery in percent, by kind of token.")
            ),
            _section("What the answer keeps", _utility(results)),
            _section("Against the baselines", _mechanism_table(mechanisms)),
            _section("Metrics without an attacker", _metrics(sgt, about) + _histogram(sgt)),
            _section("Before and after", _examples(sgt)),
            _section("Where the numbers come from", _provenance(about)),
        ],
    )


def document(title: str, sections: Sequence[str]) -> str:
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{esc(title)}</title><style>{STYLE}{glow.STYLE}</style></head><body>\n<h1>{esc(title)}</h1>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def esc(text: object) -> str:
    return html.escape(printable(str(text)), quote=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Cells are HTML already; the first of a row is its header."""
    top = "".join(f"<th scope='col'>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope='row'>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    said = f"<caption class='small'>{esc(caption)}</caption>" if caption else ""
    return f"<div class='wide'><table>{said}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{content}</section>" if content else ""


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{esc(sentence)}</li>" for sentence in sentences) + "</ul>" if sentences else ""


def figure(svg: str | None, name: str, caption: str) -> str:
    """A figure with its caption; nothing for None. ``name`` keeps its ids apart from other figures' on the page."""
    if svg is None:
        return ""
    svg = plots.unique(svg, name).replace("<svg ", f"<svg role='img' aria-label='{esc(caption)}' ", 1)
    return f"<figure>{svg}<figcaption>{esc(caption)}</figcaption></figure>"


def _headline(results: Results, sgt: Mapping[str, Any]) -> str:
    best, about = best_attack(sgt), results.get("about") or {}
    if glanced(sgt):
        read = ((sgt.get("attacks") or {}).get("nearest_l2") or {}).get("top1")
        return f"<div class='head'><strong>{percent(read)}</strong> of the hidden tokens are read by the nearest neighbour, the weakest attacker; no other was run.</div>"
    if best is None:
        return ""
    attack, least = best[1], ""
    if attack.get("difference"):
        least = (
            f" Without looking he guesses {percent((attack.get('guesses') or {}).get('top1'))}: seeing it added "
            f"<b>{percent(attack['difference'].get('top1'), interval=True)}</b>."
        )
    bound = (sgt.get("certificate") or {}).get("smallest")
    least += f" {LEARNING}" if at_least(attack) else ""
    least += f" Nobody can read more than {percent(bound)} (below)." if bound is not None else ""
    tokens = f"{about.get('hidden_tokens', 0):,} tokens of {about.get('rows', '?')} prompts"
    kept = (sgt.get("utility") or {}).get("kept")
    return (
        f"<div class='head'>{at_least(attack)}<strong>{percent(attack.get('top1'))}</strong> of the hidden tokens are read by the "
        f"{strongest(sgt)}, {esc(attack.get('title'))} (95% interval {percent(attack.get('top1'), interval=True).partition(' ')[2]}, "
        f"N = {esc(tokens)}).{least}<br>"
        f"{percent(kept, interval=True)} of what the prompt is worth to its answer is kept."
        f"<details><summary>What he sees</summary><p>{esc(sees(attack))}.</p></details></div>"
    )


def _attack_table(sgt: Mapping[str, Any]) -> str:
    """One line an attack, by threat model; what it sees, costs and is worth opens under its name."""
    attacks = sgt.get("attacks") or {}
    if not attacks:
        return ""
    pii = {"exact_micro": "PII exact", "fuzzy_micro": "PII fuzzy"}
    if any("judge_micro" in (a.get("pii") or {}) for a in attacks.values()):
        pii |= {"judge_micro": "PII judged"}
    pii = pii if any(a.get("pii") for a in attacks.values()) else {}
    head = {
        "top1": "read",
        "beyond": "beyond guessing",
        "beyond_answer": "beyond the answer",
        **{k: t for k, t in ATTACK_COLUMNS.items() if k != "top1"},
        **pii,
    }
    shown = {"top1", "beyond", "content_top1", "marked_top1"}  # on a phone
    mark = lambda key: "" if key in shown else " class='more'"  # noqa: E731
    lines = [
        "<th scope='col'>attack</th>" + "".join(f"<th scope='col'{mark(k)}>{esc(t)}</th>" for k, t in head.items())
    ]
    for kind, title in THREATS.items():
        among = [a for a in attacks.values() if a.get("kind", "single") == kind]
        if not among:
            continue
        lines.append(f"<th scope='rowgroup' class='group' colspan='{1 + len(head)}'>{esc(title)}</th>")
        for a in sorted(among, key=lambda a: -value(a.get("top1"))):
            cells = {key: percent(a.get(key), interval=key == "top1") for key in ATTACK_COLUMNS}
            cells |= {key: percent((a.get("pii") or {}).get(key)) for key in pii}
            cells["beyond"] = percent((a.get("difference") or {}).get("top1"), interval=True)
            cells["beyond_answer"] = percent((a.get("beyond_answer") or {}).get("top1"), interval=True)
            facts = [f"Sees {sees(a)}.", *(f"{note[:1].upper()}{note[1:]}." for note in a.get("notes") or ())]
            facts += [f"{a['flops']:.1e} FLOP."] if a.get("flops") else []
            facts += [f"Source: {a['source']}."] if a.get("source") else []
            flag = " \u26a0" if any("not converged" in note for note in a.get("notes") or ()) else ""
            first = f"<details><summary>{esc(a.get('title'))}{flag}</summary><p>{esc(' '.join(facts))}</p></details>"
            lines.append(
                f"<th scope='row'>{first}</th>" + "".join(f"<td{mark(key)}>{cells.get(key, '-')}</td>" for key in head)
            )
    body = "".join(f"<tr>{line}</tr>" for line in lines[1:])
    legend = (
        "Touch an attack's name for what it sees; \u26a0: more training would read more. beyond guessing: what the same "
        "attacker does not get right without what was sent; beyond the answer: nor with the clean answer instead. content: tokens with letters or digits that are not frequent. "
        "private: tokens of marked values. values: marked values read whole; unneeded: of those that the answer does not hold. text: edit similarity. PII: share of the "
        "values in the prompt that still occur in what was read."
    )
    return (
        f"<div class='wide attacks'><table><thead><tr>{lines[0]}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<p class='small'>{esc(legend)}</p>"
    )


def _certificate(sgt: Mapping[str, Any]) -> str:
    """Bounds on any attacker, the smallest first; "no bound" where they say nothing."""
    found = sgt.get("certificate") or {}
    if not found:
        return ""
    bounds = sorted((found.get("bounds") or {}).items(), key=lambda item: 2.0 if item[1] is None else item[1])
    rows = [
        ["nats a hidden token that one observation can tell", number(found.get("nats_per_token"), interval=True)],
        ["nats a prompt", number(found.get("nats_per_prompt"), interval=True)],
    ]
    if found.get("worth_per_prompt"):
        rows.append(
            [
                "nats a prompt that the answer is worth: the least that keeps all of it",
                number(found["worth_per_prompt"], interval=True),
            ]
        )
    rows += [
        [f"tokens that anybody can read: {esc(BOUNDS.get(name, name))}", bound_text(bound)] for name, bound in bounds
    ]
    return table(["", "95% interval"], rows) + f"<p class='small'>{esc(CERTIFIED)}</p>"


def _glow(sgt: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The example prompts, by nats that one observation can tell of each token."""
    shown = [one for one in sgt.get("examples") or [] if one.get("nats")]
    pages = [glow.page(one["pieces"], one["nats"], about.get("ln_vocab") or 0.0) for one in shown]
    said = "Bright: can be told from one observation, up to naming the token; dark: nothing is told; underlined: sent in clear."
    return "".join(pages) + f"<p class='small'>{esc(said)} A token's nats show when pointed at.</p>" if pages else ""


def _curves(sgt: Mapping[str, Any]) -> str:
    found = []
    for name, attack in (sgt.get("attacks") or {}).items():
        axis = (attack.get("curve") or {}).get("axis", "")
        found.append(figure(plots.curve(attack), f"curve-{name}", f"{attack.get('title')}: recovery over {axis}."))
    return "".join(found)


def _plane(results: Results) -> str:
    caption = (
        "Utility against privacy: full marks, the best attack; open marks, the nearest neighbour. Better: lower right."
    )
    return figure(plots.plane(results), "plane", caption)


def _histogram(sgt: Mapping[str, Any]) -> str:
    return figure(plots.histogram(sgt), "ranks", "Ranks of the true token among all rows of the table.")


def _utility(results: Results) -> str:
    mechanisms = results.get("mechanisms") or {}
    use = (mechanisms.get("sgt") or {}).get("utility") or {}
    if not use:
        return ""
    rows = [[esc(label), NUMBERS.get(key, percent)(use.get(key), interval=True)] for key, label in UTILITY_ROWS.items()]
    clean = ((mechanisms.get("none") or {}).get("utility") or {}).get("perplexity")
    rows.append(["perplexity with the clean prompt", number(clean, interval=True)])
    for way, found in ((results.get("no_prompt") or {}).get("ways") or {}).items():
        rows.append([esc(f"perplexity with the prompt's tokens {way}"), number(found)])
    benchmarks = {n: m.get("benchmarks") for n, m in mechanisms.items() if m.get("benchmarks")}
    zero = ((results.get("no_prompt") or {}).get("zero") or {}).get("note")
    said = f"<p class='small'>{esc(KEPT)} {esc(f'{zero[:1].upper()}{zero[1:]}.' if zero else '')}</p>"
    return table(["utility", "95% interval"], rows) + said + _benchmarks(benchmarks)


def _benchmarks(benchmarks: Mapping[str, Mapping[str, Any]]) -> str:
    if not benchmarks:
        return ""
    names = list(dict.fromkeys(name for found in benchmarks.values() for name in found))
    rows = []
    for name in names:
        one = next(found[name] for found in benchmarks.values() if name in found)
        n, note = (one.get("accuracy") or {}).get("n", "?"), one.get("note")
        label = f"{name}, {one.get('shots', 0)}-shot, N = {n}, chance {percent(one.get('chance'))}"
        label += f" ({note})" if note else ""
        rows.append(
            [esc(label), *(percent((f.get(name) or {}).get("accuracy"), interval=True) for f in benchmarks.values())]
        )
    return table(["benchmark", *map(esc, benchmarks)], rows)


def _metrics(sgt: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    privacy = sgt.get("privacy") or {}
    if not privacy:
        return ""
    rows = [[esc(label), figure, esc(remark)] for label, figure, remark in metric_rows(privacy, about)]
    return table(["metric", "95% interval", ""], rows)


def _mechanism_table(mechanisms: Mapping[str, Any]) -> str:
    rows, head = [], []
    for mechanism in mechanisms.values():
        cells, best = baseline(mechanism, interval=True), best_attack(mechanism)
        cells["best attack"] += f"<span class='sees'>{esc(best[1].get('title'))}</span>" if best else ""
        rows.append([esc(mechanism.get("title", "?")), *cells.values()])
        head = ["mechanism", *(title.replace("epsilon", "&epsilon;") for title in cells)]
    legend = (
        "std in table stds; epsilon: local differential privacy of one token at delta 1e-5, T times that for T tokens."
    )
    return table(head, rows) + f"<p class='small'>{esc(legend)}</p>" if rows else ""


def _examples(sgt: Mapping[str, Any]) -> str:
    parts, attacks = [], sgt.get("attacks") or {}
    for i, shown in enumerate(sgt.get("examples") or [], start=1):
        texts = [("Prompt", shown.get("prompt", ""))]
        ranked = sorted(shown.get("guesses") or {}, key=lambda key: -value((attacks.get(key) or {}).get("top1")))
        texts += [(f"{(attacks.get(k) or {}).get('title', k)} reads", shown["guesses"][k]) for k in ranked]
        texts += [
            ("Answer to the prompt", shown.get("answer_clean", "")),
            ("Answer to the obfuscated prompt", shown.get("answer_obfuscated", "")),
        ]
        items = "".join(f"<dt>{esc(title)}</dt><dd><pre>{esc(text)}</pre></dd>" for title, text in texts)
        parts.append(f"<h3>Example {i}</h3><dl>{items}</dl>")
    return "".join(parts)


def _provenance(about: Mapping[str, Any]) -> str:
    rows = []
    for key, found in about.items():
        if isinstance(found, Mapping):
            found = ", ".join(f"{k} {v}" for k, v in found.items())
        if isinstance(found, list):
            found = "; ".join(map(str, found))
        rows.append([esc(key.replace("_", " ")), f"<code>{esc(found)}</code>"])
    return table(["", ""], rows) if rows else ""

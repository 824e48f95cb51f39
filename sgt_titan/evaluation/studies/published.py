"""The paper's tables beside ours: Table I, Table III, Figures 3 and 4 of arXiv 2506.09452.

The published rows are Llama 3.2 1B Instruct trained on 15% of OpenOrca and evaluated on Alpaca and PUPA; ours are
whatever was trained here. Another trunk, other data, weights that the paper does not state: the pattern can be compared,
the numbers cannot.
"""

# ruff: noqa: E501  (tables)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sgt_titan.evaluation.report import html, plots, words
from sgt_titan.evaluation.report.words import best_attack, number, percent, value
from sgt_titan.evaluation.scores.benchmarks import at_chance, utility_pp

Rows = Mapping[str, Mapping[str, Any]]  # objective -> results.json of its evaluation

# Percent, except MI in nats per feature and utility in percentage points. None: unreadable in every copy (an exponent is
# lost; that of AbsCos exceeds 3e19).
TABLE_1 = {
    "comp_entr": (-13.84, 88.41, 88.41, 75.99, 49.75, 58.60, 22.19, 100.0),
    "cos_sim": (-5.49, 99.98, 3.21, 1.43, 1.07, 2.47, None, 100.0),
    "abs_cos": (-0.01, 94.90, 94.90, 93.36, 92.86, 87.62, None, 100.0),
    "mi": (-0.72, 34.43, 34.43, 18.96, 17.39, 23.96, 1.48, 16.39),
    "mi_abs_cos": (-2.44, 81.23, 81.23, 71.36, 66.88, 75.72, 1.91, 20.56),
    "mi_abs_cos_norm": (-1.97, 93.00, 93.00, 90.42, 88.15, 91.90, 1.11, 12.69),
}
COLUMNS_1 = ("utility, pp", "NN-FR", "MRP-FR", "SymTTR-10", "SymTTR-100", "hist. entropy", "MI", "PAC-Adv")
PRIVACY_1 = ("nn_fr", "mrp_fr", "sym_ttr_10", "sym_ttr_100", "rank_entropy")

# Failure rates and PII-Ratios, percent.
TABLE_3 = {
    "mi": (23.38, 22.17, 97.57, 97.66),
    "abs_cos": (97.67, 97.64, 1.60, 1.61),
    "mi_abs_cos": (75.17, 75.16, 65.04, 65.03),
    "mi_abs_cos_norm": (86.77, 86.66, 46.98, 47.04),
}
COLUMNS_3 = ("FR, NN", "FR, BeamClean", "PII-Ratio, NN", "PII-Ratio, BeamClean")
BEAMCLEAN = "beamclean_gaussian"  # as published
FIGURE_3 = "cos_sim"

Table = tuple[Sequence[str], list[list[str]]]


def table_1(rows: Rows, clean: Mapping[str, Any] | None) -> Table:
    """Head and cells; published and ours alternate. ``clean``: benchmarks without obfuscation, where they were run."""
    head = ["objective", "", *COLUMNS_1, "kept", "KL", "best attacker reads", "by"]
    body = []
    for name in dict.fromkeys([*TABLE_1, *rows]):  # after the paper's rows, those it does not have
        if name in TABLE_1:
            body.append([name, "paper", *map(_published, TABLE_1[name]), "-", "-", "not measured", ""])
        if name not in rows:
            continue
        sgt = rows[name]["mechanisms"]["sgt"]
        privacy, use, best = sgt.get("privacy") or {}, sgt.get("utility") or {}, best_attack(sgt)
        body.append(
            [
                "" if name in TABLE_1 else name,
                "here",
                _utility(clean, sgt.get("benchmarks")),
                *(percent(privacy.get(key)) for key in PRIVACY_1),
                number(privacy.get("mi")),
                percent(privacy.get("pac_adv_uniform")),
                percent(use.get("kept")),
                number(use.get("kl")),
                percent(best[1].get("top1"), interval=True) if best else "-",
                best[1].get("title", "") if best else "",
            ]
        )
    return head, body


def table_3(rows: Rows) -> Table:
    """Failure rates and PII-Ratios (exact, micro) on text with marked private values."""
    head = ["objective", "", *COLUMNS_3, "PII-Ratio, best attacker", "values read whole", "by"]
    body = []
    for name, published in TABLE_3.items():
        body.append([name, "paper", *(_published(x) for x in published), "not measured", "", ""])
        if name not in rows:
            continue
        sgt = rows[name]["mechanisms"]["sgt"]
        attacks, best = sgt.get("attacks") or {}, best_attack(sgt)
        pair = [attacks.get("nearest_l2") or {}, attacks.get(BEAMCLEAN) or {}]
        fails = [percent(1 - value(attack.get("top1"))) for attack in pair]
        leaks = [percent((attack.get("pii") or {}).get("exact_micro")) for attack in pair]
        strongest = best[1] if best else {}
        body.append(
            [
                "",
                "here",
                *fails,
                *leaks,
                percent((strongest.get("pii") or {}).get("exact_micro"), interval=True),
                percent(strongest.get("span_exact")),
                strongest.get("title", ""),
            ]
        )
    return head, body


def figure_4_rows(rows: Rows) -> Table:
    """Constant noise: what is kept and what is read, by epsilon."""
    head = ["std, table stds", "epsilon", "NN-FR", "kept", "best attacker reads"]
    found = {}
    for results in rows.values():
        for name, mechanism in results["mechanisms"].items():
            if name.startswith("noise-"):
                found[name] = mechanism
    body = []
    for mechanism in sorted(found.values(), key=lambda m: m["facts"]["std"]):
        facts, best = mechanism["facts"], best_attack(mechanism)
        body.append(
            [
                number(facts["std"]),
                number(facts["epsilon"]),
                percent((mechanism.get("privacy") or {}).get("nn_fr")),
                percent((mechanism.get("utility") or {}).get("kept")),
                percent(best[1].get("top1")) if best else "-",
            ]
        )
    return head, body


def notes(rows: Rows, clean: Mapping[str, Any] | None) -> list[str]:
    """What a reader must know of our rows."""
    found = [
        "paper: Llama 3.2 1B Instruct, OpenOrca, arXiv 2506.09452; its weights are not published. here: "
        + "; ".join(dict.fromkeys(_origin(results) for results in rows.values())),
        f"{words.KEPT} MI: Algorithm 1, nats per feature, an "
        "upper bound. PAC-Adv: of one feature with prior 1/V. best attacker: the highest top-1 recovery of the battery, "
        "95% interval; the paper has no such column.",
    ]
    if clean:
        guessing = [name for name, one in clean.items() if at_chance(one)]
        found.append(
            f"utility, pp: mean accuracy difference over {len(clean)} benchmarks. "
            + (
                f"At chance without any obfuscation, so unable to show a loss: {', '.join(guessing)}."
                if guessing
                else "None at chance."
            )
        )
    else:
        found.append("utility, pp: no benchmark was run here; kept and KL say what obfuscation costs.")
    ceilings = [value((r["mechanisms"]["sgt"].get("privacy") or {}).get("rank_entropy_ceiling")) for r in rows.values()]
    if ceilings:
        found.append(f"hist. entropy can reach {100 * max(ceilings):.1f}% at this number of tokens.")
    return found


def _origin(results: Mapping[str, Any]) -> str:
    about = results.get("about") or {}
    return f"{about.get('trunk')}, {about.get('data')}, N = {about.get('hidden_tokens', 0):,} tokens of {about.get('rows')} prompts"


def _published(x: float | None) -> str:
    return "unreadable" if x is None else f"{x:.2f}"


def _utility(clean: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> str:
    if not clean or not own:
        return "-"
    if all(at_chance(one) for one in clean.values()):
        return "chance"
    found = utility_pp(clean, own)
    return f"{found.value:+.2f} [{found.low:.1f}, {found.high:.1f}]"


def _clean(rows: Rows) -> Mapping[str, Any] | None:
    """Benchmarks without obfuscation, from the row that carries the baselines."""
    found = [((r["mechanisms"].get("none") or {}).get("benchmarks")) for r in rows.values()]
    return next(filter(None, found), None)


def _all(rows: Rows, pii: Rows) -> list[tuple[str, Table]]:
    tables = [("Table I", table_1(rows, _clean(rows)))]
    if pii:
        tables.append(("Table III", table_3(pii)))
    if (noise := figure_4_rows(rows))[1]:
        tables.append(("Figure 4, constant noise", noise))
    return tables


def tables(rows: Rows, pii: Rows) -> list[dict[str, Any]]:
    """All tables as they are shown, for a file that a page's tables come from."""
    return [
        {"title": title, "columns": dict.fromkeys(head, ""), "cells": body} for title, (head, body) in _all(rows, pii)
    ]


def markdown(rows: Rows, pii: Rows, about: Mapping[str, str]) -> str:
    """All tables as Markdown."""
    lines = ["# The paper's tables, here", "", f"    {about.get('command', '')}", ""]
    for title, (head, body) in _all(rows, pii):
        lines += [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in body] + [""]
    lines += [f"- {note}" for note in notes(rows, _clean(rows))]
    return "\n".join(lines) + "\n"


def terminal(rows: Rows, pii: Rows) -> str:
    """All tables as plain text, as wide as they are."""
    lines = []
    for title, (head, body) in _all(rows, pii):
        widths = [max(len(row[i]) for row in [list(head), *body]) for i in range(len(head))]
        lines += [
            title,
            *("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in [head, *body]),
            "",
        ]
    return "\n".join(line.rstrip() for line in [*lines, *notes(rows, _clean(rows))])


def figure_4(rows: Rows) -> str | None:
    """Utility and NN-FR of constant noise over epsilon."""
    points = []
    for results in rows.values():
        for name, mechanism in results["mechanisms"].items():
            if name.startswith("noise-"):
                kept = value((mechanism.get("utility") or {}).get("kept"))
                fails = value((mechanism.get("privacy") or {}).get("nn_fr"))
                points.append((mechanism["facts"]["epsilon"], kept, fails))
    if not points:
        return None
    points.sort()

    def draw(axes: Any) -> None:
        axes.plot(
            [p[0] for p in points], [max(p[1], -1) for p in points], marker="o", color=plots.COLOURS[0], label="kept"
        )
        axes.plot([p[0] for p in points], [p[2] for p in points], marker="s", color=plots.COLOURS[1], label="NN-FR")
        axes.set_xscale("log")
        axes.set_xlabel("local-DP epsilon of one token (delta 1e-5)")
        axes.set_ylim(-1.05, 1.05)
        axes.legend(frameon=False)

    return plots.figure(draw)


def plane(rows: Rows) -> str | None:
    """What each row keeps against what is read of it, with the baselines of the row that carries them."""
    points: dict[str, Any] = {}
    for row, results in rows.items():
        for name, mechanism in results["mechanisms"].items():
            if name == "sgt":
                points[row] = {**mechanism, "title": row}
            elif name != "redaction":
                points[name] = mechanism
    return plots.plane({"mechanisms": points})


def page(rows: Rows, pii: Rows, about: Mapping[str, str]) -> str:
    """All tables and figures as one HTML page."""
    sections = [f"<pre>{html.esc(about.get('command', ''))}</pre>"]
    for title, (head, body) in _all(rows, pii):
        cells: Callable[[Sequence[str]], list[str]] = lambda row: [html.esc(cell) for cell in row]  # noqa: E731
        sections.append(f"<h2>{html.esc(title)}</h2>" + html.table(cells(head), [cells(row) for row in body]))
    if svg := plane(rows):
        sections.append("<h2>Kept and read</h2>" + html.figure(svg, "plane", "Right and low is better."))
    if FIGURE_3 in rows and (svg := plots.histogram(rows[FIGURE_3]["mechanisms"]["sgt"])):
        sections.append(
            "<h2>Figure 3, rank histogram of CosSim</h2>" + html.figure(svg, "figure3", "Published: two modes.")
        )
    if svg := figure_4(rows):
        sections.append(
            "<h2>Figure 4</h2>" + html.figure(svg, "figure4", "Constant noise: kept and NN-FR over epsilon.")
        )
    sections.append(
        "<h2>Notes</h2><ul>" + "".join(f"<li>{html.esc(n)}</li>" for n in notes(rows, _clean(rows))) + "</ul>"
    )
    return html.document("The paper's tables, here", sections)

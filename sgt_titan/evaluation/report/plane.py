"""What is kept against what is read, of many runs: the figure, the table and the page of ``sgt-titan frontier``.

Reads the dict of its results.json and measures nothing; every key may be missing.
"""

# ruff: noqa: E501  (tables)

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from sgt_titan.evaluation.report import html, plots
from sgt_titan.evaluation.report.words import KEPT, number, percent, value
from sgt_titan.terminal import printable

Found = Mapping[str, Any]
LEFT = -0.25  # of the picture: what keeps less stands at its edge


def by_row(found: Found) -> dict[str, list[Found]]:
    """Runs of each row, in the order of the grid."""
    rows: dict[str, list[Found]] = {}
    for run in found.get("runs") or ():
        rows.setdefault(run["row"], []).append(run)
    return rows


def read(run: Found, key: str = "top1", best: str = "best", part: str = "") -> Any:
    """An estimate of the best attacker: what he reads; ``part``: ``guesses`` or ``difference`` instead."""
    attack = run.get(best) or {}
    return ((attack.get(part) or {}) if part else attack).get(key)


def over_seeds(runs: Sequence[Found], pick: Any) -> dict[str, Any] | None:
    """One seed: its estimate. More: their mean, and the lowest and highest of them as its interval."""
    found = [estimate for estimate in map(pick, runs) if not math.isnan(value(estimate))]
    if len(found) == 1:
        return dict(found[0]) if isinstance(found[0], Mapping) else {"value": found[0]}
    if not found:
        return None
    values = [value(estimate) for estimate in found]
    return {"value": mean(values), "low": min(values), "high": max(values)}


def nats(run: Found) -> Any:
    """Nats a hidden token that one observation can tell at most, where the run has a certificate."""
    certificate = run.get("certificate") or {}
    return certificate.get("nats_per_token")


def stake_per_token(found: Found) -> float:
    """What the prompt is worth to its answer, nats a hidden token: NaN where it was not measured."""
    limits = found.get("limits") or {}
    tokens, prompts = limits.get("hidden_tokens") or 0, limits.get("prompts") or 0
    return value(limits.get("stake")) * prompts / tokens if tokens and prompts else math.nan


def floors(found: Found) -> dict[str, float]:
    """What is read without a look at what was sent, by its name in the figure."""
    runs = found.get("runs") or ()
    return {
        text: value(over_seeds(runs, lambda run, key=key: (run.get(key) or {}).get("top1")))
        for key, text in plots.FLOORS.items()
    }


# -- the figure --------------------------------------------------------------------------------------------------------


def figure(found: Found) -> str | None:
    """kept against the best attacker's reading; where there are certificates, against nats a token beside it."""
    rows = by_row(found)
    if not any(_drawable(run) for runs in rows.values() for run in runs):
        return None
    bounded = any(not math.isnan(value(nats(run))) for runs in rows.values() for run in runs)

    def draw(axes: Any) -> None:
        first, *others = axes if bounded else [axes]
        _plane(first, rows, found)
        for other in others:
            _information(other, rows, found)
        first.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=2)

    return plots.figure(draw, width=10.0 if bounded else 7.2, height=5.6, columns=2 if bounded else 1)


def _drawable(run: Found) -> bool:
    return not math.isnan(value(run.get("kept"))) and not math.isnan(value(read(run)))


def _plane(axes: Any, rows: Mapping[str, Sequence[Found]], found: Found) -> None:
    plots.floor(axes, floors(found), left=LEFT)
    noise = []
    for name, entry in (found.get("baselines") or {}).items():
        if not _drawable(entry):
            continue
        x, y = max(value(entry["kept"]), LEFT), value(read(entry))
        noise += [(x, y)] if name.startswith("noise") else []
        axes.scatter(x, y, s=26, color=plots.GREY, marker="x", zorder=2)
        if not name.startswith("noise-"):
            label = "constant noise" if name == "noise" else entry.get("title", name)
            axes.annotate(label, (x, y), fontsize=6.5, color=plots.GREY, xytext=(4, 4), textcoords="offset points")
    axes.plot(*zip(*sorted(noise), strict=True), color=plots.GREY, linewidth=0.8, zorder=1) if noise else None
    priced = []
    for i, (name, runs) in enumerate(rows.items()):
        colour, marker = (
            plots.COLOURS[i % len(plots.COLOURS)],
            plots.MARKERS[i // len(plots.COLOURS) % len(plots.MARKERS)],
        )
        runs = [run for run in runs if _drawable(run)]
        for run in runs:
            kept, top1 = run["kept"], read(run)
            axes.errorbar(
                max(value(kept), LEFT), value(top1), xerr=_error(kept), yerr=_error(top1),
                color=colour, marker=marker, markersize=3, linewidth=0.7, alpha=0.6, zorder=3,
            )  # fmt: skip
        if runs:
            x, y = (mean(map(value, part)) for part in ([r["kept"] for r in runs], [read(r) for r in runs]))
            axes.scatter(max(x, LEFT), y, s=60, color=colour, marker=marker, zorder=4, label=printable(name))
            priced += [(x, y)] if "rate" in name else []
    if len(priced) > 1:
        axes.plot(*zip(*sorted(priced), strict=True), color=plots.COLOURS[0], linewidth=0.9, alpha=0.6, zorder=2)
    axes.set_xlim(LEFT - 0.03, 1.05)
    axes.set_ylim(-0.03, 1.04)
    axes.set_xlabel("kept of what the prompt is worth to its answer")
    axes.set_ylabel("hidden tokens that the best attacker reads\n(one observation of each prompt)")


def _information(axes: Any, rows: Mapping[str, Sequence[Found]], found: Found) -> None:
    highest = 0.0
    for i, runs in enumerate(rows.values()):
        colour, marker = (
            plots.COLOURS[i % len(plots.COLOURS)],
            plots.MARKERS[i // len(plots.COLOURS) % len(plots.MARKERS)],
        )
        for run in runs:
            if math.isnan(value(nats(run))) or math.isnan(value(run.get("kept"))):
                continue
            highest = max(highest, value(nats(run)))
            axes.scatter(max(value(run["kept"]), LEFT), value(nats(run)), s=30, color=colour, marker=marker, zorder=3)
    if not math.isnan(stake := stake_per_token(found)):
        axes.plot((0, 1), (0, stake), color=plots.GREY, linestyle="--", linewidth=1)
        axes.annotate("least, k \u0394", (0.5, 0.5 * stake), fontsize=7, color=plots.GREY, va="top")
    axes.set_xlim(LEFT - 0.03, 1.05)
    axes.set_ylim(0, 1.1 * max(highest, 1e-3))
    axes.set_xlabel("kept")
    axes.set_ylabel("nats a hidden token that one observation can tell")


def _error(estimate: Any) -> list[list[float]] | None:
    """matplotlib's, of an interval; None where there is none."""
    if not isinstance(estimate, Mapping) or not isinstance(estimate.get("low"), float | int):
        return None
    at = value(estimate)
    return [[max(at - estimate["low"], 0)], [max(estimate["high"] - at, 0)]]


# -- the table ---------------------------------------------------------------------------------------------------------

HEAD = (
    "",
    "seeds",
    "kept",
    "read",
    "guessed",
    "difference",
    "beyond the answer",
    "of content",
    "of private values",
    "K repeats read",
    "nats a token",
    "KL",
    "best attacker",
)


def table(found: Found) -> list[list[str]]:
    """A line a row of the grid, then the baselines."""
    rows = [_line(name, runs) for name, runs in by_row(found).items()]
    for entry in (found.get("baselines") or {}).values():
        rows.append(_line(entry.get("title") or "?", [entry], seeds=""))
    return rows


def _line(name: str, runs: Sequence[Found], seeds: str | None = None) -> list[str]:
    def cell(pick: Any, show: Any = percent) -> str:
        return show(over_seeds(runs, pick), interval=True)

    titles = dict.fromkeys((run.get("best") or {}).get("title") or "" for run in runs)
    return [
        name,
        str(len(runs)) if seeds is None else seeds,
        cell(lambda run: run.get("kept")),
        cell(read),
        percent(over_seeds(runs, lambda run: read(run, part="guesses"))),
        cell(lambda run: read(run, part="difference")),
        cell(lambda run: read(run, part="beyond_answer")),
        cell(lambda run: read(run, "content_top1", part="difference")),
        cell(lambda run: read(run, "marked_top1", part="difference")),
        percent(over_seeds(runs, lambda run: read(run, best="best_repeats"))),
        cell(nats, number),
        number(over_seeds(runs, lambda run: run.get("kl"))),
        "; ".join(filter(None, titles)),
    ]


def notes(found: Found) -> list[str]:
    """What a reader must know."""
    limits = found.get("limits") or {}
    said = [
        KEPT,
        "read: top-1 of the strongest attack that sees one observation of each prompt; guessed: the same attacker without "
        "it; difference: what looking added, over all hidden tokens, those of content and those of marked private values; "
        "beyond the answer: what it added to what the clean answer tells, which no transform hides that keeps the answer. "
        "One seed: 95% interval over prompts; several: their mean, lowest and highest.",
    ]
    if not math.isnan(stake := stake_per_token(found)):
        said.append(
            f"The limit: whatever keeps a share k tells at least k \u0394, \u0394 = {value(limits['stake']):.1f} nats a prompt "
            f"({stake:.2f} a hidden token), as far as the trunk behind the best constant is a model of answers without "
            "prompts; a better one makes it smaller."
        )
    if note := (limits.get("zero") or {}).get("note"):
        said.append(f"{note[0].upper()}{note[1:]}.")
    warned = dict.fromkeys(
        f"{run['row']} seed {run['seed']}: {(run.get('best') or {}).get('title')}: {text}."
        for run in found.get("runs") or ()
        for text in (run.get("best") or {}).get("notes") or ()
        if "not converged" in text
    )
    return [*said, *warned]


def markdown(found: Found) -> str:
    about = found.get("about") or {}
    lines = [f"    {about.get('command', '')}", "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(cells) + " |" for cells in table(found)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(found))]) + "\n"


def page(found: Found) -> str:
    about = found.get("about") or {}
    caption = (
        "Lower right is better. Small marks: runs, with 95% intervals over prompts; large ones: means over seeds; crosses: "
        "baselines."
    )
    cells = [[html.esc(cell) for cell in row] for row in table(found)]
    return html.document(
        "Kept and read",
        [
            html.figure(figure(found), "plane", caption),
            html.table([html.esc(cell) for cell in HEAD], cells),
            "<ul>" + "".join(f"<li>{html.esc(note)}</li>" for note in notes(found)) + "</ul>",
            f"<pre>{html.esc(about.get('command', ''))}</pre><p class='small'>{html.esc(about.get('date', ''))}, "
            f"sgt_titan {html.esc(about.get('version', ''))}</p>",
            f"<details><summary>config</summary><pre>{html.esc(about.get('config', ''))}</pre></details>",
        ],
    )

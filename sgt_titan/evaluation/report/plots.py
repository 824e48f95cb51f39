"""Figures as SVG strings. Deterministic, legible on a light and on a dark page, colours that colour-blind eyes tell apart."""

# ruff: noqa: E501  (sentences, style sheets)

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from sgt_titan.errors import UserError
from sgt_titan.evaluation.report.words import CLASSES, Results, best_attack, value

# Okabe and Ito's palette, without black and yellow, which vanish on one of the two backgrounds.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#888888"
MARKERS = ("o", "s", "^", "D", "v", "P")


def figure(draw: Callable[[Any], None], *, width: float = 7.2, height: float = 3.4, columns: int = 1) -> str:
    """The SVG that ``draw(axes)`` makes (a list of axes where ``columns`` > 1)."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'sgt-titan[eval]'") from None
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": "sgt_titan",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.edgecolor": GREY,
        "axes.labelcolor": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "text.color": GREY,
        "axes.grid": True,
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        sheet = Figure(figsize=(width, height), layout="constrained")
        sheet.patch.set_alpha(0)
        axes = [sheet.add_subplot(1, columns, i + 1) for i in range(columns)]
        for one in axes:
            one.patch.set_alpha(0)
        draw(axes[0] if columns == 1 else axes)
        out = io.StringIO()
        FigureCanvasSVG(sheet).print_svg(out, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


def unique(svg: str, prefix: str) -> str:
    """The SVG with its ids prefixed, so that several can stand on one page."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    return re.sub(r'(url\(#|xlink:href="#|href="#)(?!' + prefix + r"-)", rf"\1{prefix}-", svg)


def histogram(mechanism: Mapping[str, Any]) -> str | None:
    """Ranks of the true token on a logarithmic axis: two peaks, at either end, are a giveaway."""
    found = mechanism.get("histogram")
    if not found:
        return None
    edges, counts = found["edges"], found["counts"]
    total = max(sum(counts), 1)

    def draw(axes: Any) -> None:
        axes.bar(edges[:-1], [c / total for c in counts], [b - a for a, b in pairwise(edges)],
                 align="edge", color=COLOURS[0])  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(1, edges[-1])
        axes.set_xlabel("rank of the true token (1: nearest)")
        axes.set_ylabel("share of hidden tokens")

    return figure(draw)


FLOORS = {"guess": " guessed without looking", "answer": " told by the answer alone"}


def floor(axes: Any, shares: Mapping[str, float], *, left: float) -> None:
    """A dashed line a share that has a name: what is read without a look at what was sent. The lowest of several has its
    name below, since two may lie together."""
    lines = sorted((share, text) for text, share in shares.items() if not math.isnan(share))
    for place, (share, text) in enumerate(lines):
        axes.axhline(share, color=GREY, linestyle="--", linewidth=1)
        axes.text(left, share, text, fontsize=7, va="bottom" if place or len(lines) == 1 else "top", color=GREY)


def plane(results: Results) -> str | None:
    """What is kept against what is read, by mechanism; below and to the right is better."""
    points = {}
    for name, mechanism in (results.get("mechanisms") or {}).items():
        best = best_attack(mechanism)
        kept = value((mechanism.get("utility") or {}).get("kept"))
        if best is not None and kept == kept:
            nearest = 1 - value((mechanism.get("privacy") or {}).get("nn_fr"))
            points[name] = mechanism.get("title", name), kept, value(best[1].get("top1")), nearest
    if not points:
        return None
    attacks = ((results.get("mechanisms") or {}).get("sgt") or {}).get("attacks") or {}
    floors = {text: value((attacks.get(key) or {}).get("top1")) for key, text in FLOORS.items()}

    def draw(axes: Any) -> None:
        floor(axes, floors, left=-0.55)
        noise = sorted(p[1:] for name, p in points.items() if name.startswith("noise"))
        axes.plot([max(p[0], -0.5) for p in noise], [p[1] for p in noise], color=GREY, linewidth=1, zorder=1)
        for i, (title, kept, read, nearest) in enumerate(points.values()):
            colour = COLOURS[i % len(COLOURS)]
            axes.scatter(max(kept, -0.5), read, s=48, color=colour, zorder=3, label=title)
            axes.scatter(max(kept, -0.5), nearest, s=36, facecolors="none", edgecolors=colour, zorder=2)
        axes.set_xlim(-0.55, 1.08)
        axes.set_ylim(-0.04, 1.06)
        axes.set_xlabel("prompt's benefit kept (at the left edge: -50% or less)")
        axes.set_ylabel("tokens read: full, best attack;\nopen, nearest neighbour")
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return figure(draw, width=8.4)


def bars(mechanism: Mapping[str, Any]) -> str | None:
    """Recovery by attack with intervals, coloured by whether it needs the SGT."""
    attacks = sorted((mechanism.get("attacks") or {}).values(), key=lambda a: value(a.get("top1")))
    if not attacks:
        return None

    def draw(axes: Any) -> None:
        for i, attack in enumerate(attacks):
            top1 = attack.get("top1") or {}
            read, needs = value(top1), "the SGT and its weights" in (attack.get("sees") or ())
            low, high = top1.get("low") or 0.0, top1.get("high") or 0.0
            axes.barh(i, read, color=COLOURS[1] if needs else COLOURS[0], height=0.66)
            axes.errorbar(
                read, i, xerr=[[max(read - low, 0)], [max(high - read, 0)]], color=GREY, capsize=2, linewidth=1
            )
        axes.set_yticks(range(len(attacks)), [a.get("title", "?") for a in attacks])
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("hidden tokens read (orange: by who has the SGT)")

    return figure(draw, height=0.8 + 0.28 * len(attacks))


def curve(attack: Mapping[str, Any]) -> str | None:
    """Recovery along known pairs, repeats or training steps; the attacker's own loss beside it where there is one."""
    found = attack.get("curve")
    if not found or not found.get("at"):
        return None
    extra = found.get("extra") or []

    def draw(axes: Any) -> None:
        first = axes[0] if extra else axes
        low, high = ([e.get(k) or 0.0 for e in found["top1"]] for k in ("low", "high"))
        first.plot(found["at"], [value(e) for e in found["top1"]], marker="o", color=COLOURS[0])
        first.fill_between(found["at"], low, high, color=COLOURS[0], alpha=0.2)
        first.set_ylim(-0.02, 1.04)
        first.set_xlabel(found.get("axis", ""))
        first.set_ylabel("hidden tokens read")
        if found.get("axis") != "training steps":
            first.set_xscale("log", base=2)
        if extra:
            axes[1].plot(found["at"], extra, marker="o", color=COLOURS[1])
            axes[1].set_xlabel(found.get("axis", ""))
            axes[1].set_ylabel(found.get("extra_label", "").replace(", ", ",\n"))
            axes[1].set_ylim(bottom=0)

    return figure(draw, columns=2 if extra else 1, height=2.8)


def by_class(mechanism: Mapping[str, Any]) -> str | None:
    """Attack against kind of token."""
    attacks = [a for a in (mechanism.get("attacks") or {}).values() if a.get("classes")]
    attacks.sort(key=lambda a: value(a.get("top1")))
    kinds = [k for k in CLASSES if any(value(a["classes"].get(k)) == value(a["classes"].get(k)) for a in attacks)]
    if not attacks or not kinds:
        return None

    def draw(axes: Any) -> None:
        shares = [[value(a["classes"].get(k)) for k in kinds] for a in attacks]
        axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                if share == share:
                    axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
                              color="black" if share > 0.55 else "white")  # fmt: skip
        axes.set_xticks(range(len(kinds)), ["private" if k == "marked" else k for k in kinds])
        axes.set_yticks(range(len(attacks)), [a.get("title", "?") for a in attacks])
        axes.grid(False)

    return figure(draw, height=0.9 + 0.26 * len(attacks))

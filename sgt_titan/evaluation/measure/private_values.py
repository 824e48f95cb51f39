"""``sgt-titan private``: how well private values are found, what is left of them, and what an attacker reads.

Without --trunk: finding alone (scores/finding.py), on text. With it: mechanisms on a trunk, each attacked, its best
attacker's PII-Ratio beside p*, the same attacker's where the values were taken out: a guess from the context alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgt_titan import disk
from sgt_titan.arguments import Parser, number, seed_argument
from sgt_titan.config.origin import KEYS, export_of, of_run
from sgt_titan.config.schema import Config
from sgt_titan.errors import UserError
from sgt_titan.evaluation.options import suite_argument, zero_argument
from sgt_titan.terminal import say

if TYPE_CHECKING:  # torch is only for --trunk
    from sgt_titan.evaluation.measure.parts import Parts
    from sgt_titan.evaluation.measure.setting import Setting
    from sgt_titan.evaluation.world.mechanisms import Mechanism

ATTACKS = ("nearest_l2", "known_plaintext", "sequence")
GENERATED = 64  # tokens of an answer


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write ``private.json``, ``private.md`` and ``private.svg``.

    Raises:
        UserError: as ``Private.of``, ``load_setting``; a source that marks no values; an unknown attack.
    """
    parser = Parser(
        prog="sgt-titan private",
        description="Measure surrogates for private values: what is found, what is left, what an attacker reads.",
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="as data.source, or a config's name (default: the run's of --export); must mark private values",
    )
    parser.add_argument("--finders", metavar="A,B", default="patterns,names", help="default patterns,names")
    parser.add_argument("--own", metavar="FILE", help="YAML of words, patterns, surrogates (docs/PRIVATE_VALUES.md)")
    parser.add_argument(
        "--trunk",
        metavar="PATH",
        help="also mechanisms, on this trunk, or a config's (default: the run's of --export)",
    )
    parser.add_argument(
        "--export",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="a transform, or a run's, to compare and combine; repeat",
    )
    parser.add_argument("--attacks", metavar="A,B", default=",".join(ATTACKS), help=f"default {','.join(ATTACKS)}")
    parser.add_argument(
        "--mechanisms", metavar="A,B", default="", help="only these of private.json, and redaction for p*"
    )
    suite_argument(parser, "effort of the attacks")
    parser.add_argument("--rows", type=number(int, 2), help="prompts to measure on (finding: all; mechanisms: 32)")
    parser.add_argument("--corpus", type=int, default=2000, help="public rows that attackers train on (default 2000)")
    zero_argument(parser)
    seed_argument(parser, "the noise, the attacks and the surrogates")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    arguments, overrides = parser.parse_known_args(argv)
    exports, run = _named(arguments.export)
    for name, key in KEYS.items():
        setattr(arguments, name, of_run(getattr(arguments, name), key, run))
    if not arguments.data:
        raise UserError("--data: is needed, since no --export is a run's")
    if exports and not arguments.trunk:
        raise UserError("--trunk: is needed, since no --export is a run's")
    if arguments.trunk and not exports:
        raise UserError("--trunk needs an --export NAME=DIR, whose template and data the rows follow")
    if overrides and not arguments.trunk:
        raise UserError(f"{overrides[0]}: options of the data go with --trunk")
    from sgt_titan.private import Private

    key = arguments.seed.to_bytes(32, "little")  # numbers that can be measured again; a client's key is a secret
    private = Private.of(arguments.finders, own=arguments.own, key=key)
    nobody = Private.of("", own=arguments.own, key=key)
    began = time.monotonic()
    results: dict[str, Any] = {
        "about": {
            "command": shlex.join(["sgt-titan", "private", *(sys.argv[2:] if argv is None else argv)]),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
    }
    results["finding"] = _finding(arguments, private, nobody)
    if arguments.trunk:
        results["mechanisms"] = {}
        _mechanisms(arguments, overrides, exports, private, nobody, results)
    results["about"]["seconds"] = time.monotonic() - began
    _write(arguments.out, results)
    print(table(results))
    return 0


def _named(listed: Sequence[str]) -> tuple[dict[str, str], Config | None]:
    """Exports by their names, and the config of the first that a run has made."""
    found, run = {}, None
    for item in listed:
        name, _, directory = item.partition("=")
        if not name or not directory or name in found:
            raise UserError(f"--export {item}: give NAME=DIR, each name once")
        found[name], its = export_of(directory)
        run = run or its
    return found, run


# -- finding -----------------------------------------------------------------------------------------------------------


def _finding(arguments: Any, private: Any, nobody: Any) -> dict[str, Any]:
    from sgt_titan.data.sources import load_rows
    from sgt_titan.evaluation.scores import finding

    config = Config()
    config.data.source = arguments.data
    source = load_rows(config.data)
    count = min(len(source), arguments.rows or (len(source) if arguments.data != "demo" else 1000))
    rows = []
    for i in range(count):
        group = source[i].get("predicted_category", "")
        conversation = source.conversation(i)
        rows.append(finding.to_row(conversation.messages, conversation.private, group))
    if not any(row.units for row in rows):
        raise UserError(f"{arguments.data}: none of its first {count} rows marks a private value")
    say(f"finding in {count} rows")
    return {
        "found": finding.measure(rows, private),
        "told": finding.measure(rows, nobody, marks=True),
    }


# -- mechanisms --------------------------------------------------------------------------------------------------------


def _mechanisms(
    arguments: Any,
    overrides: Sequence[str],
    exports: dict[str, str],
    private: Any,
    nobody: Any,
    results: dict[str, Any],
) -> None:
    """One after the other into ``results``, written as they come: a mechanism takes minutes. Run again, it goes on."""
    from transformers.utils.logging import disable_progress_bar

    from sgt_titan.evaluation.attacks import ATTACKS as KNOWN
    from sgt_titan.evaluation.measure import runner
    from sgt_titan.evaluation.measure.parts import open_parts
    from sgt_titan.evaluation.measure.setting import fingerprint_export, load_setting
    from sgt_titan.evaluation.world.mechanisms import constant_noise, learned, nothing, redaction
    from sgt_titan.evaluation.world.samples import check_fit, data_config, embedding_table
    from sgt_titan.evaluation.world.surrogates import Substitution, surrogates
    from sgt_titan.private.tables import VERSION
    from sgt_titan.transform import load_export

    chosen = [name for name in arguments.attacks.split(",") if name]
    if unknown := [name for name in chosen if name not in KNOWN or KNOWN[name].arguments(arguments.suite) is None]:
        raise UserError(f"--attacks: {unknown[0]!r} is no attack of suite {arguments.suite}")
    disable_progress_bar()
    first = next(iter(exports.values()))
    config = data_config(first, arguments.trunk, arguments.data, list(overrides))
    setting = load_setting(
        first, config, rows=arguments.rows or 32, corpus=arguments.corpus, zero_steps=arguments.zero_steps
    )
    transforms = {}
    for name, directory in exports.items():
        transforms[name] = load_export(directory).to(setting.device).eval()  # type: ignore[arg-type]
        check_fit(transforms[name], config.trunk.path, directory)
    identity = {
        "trunk": setting.trunk_fingerprint,
        "data": setting.data_fingerprint,
        "finders": arguments.finders,
        "surrogates": VERSION,
        "own": hashlib.sha256(Path(arguments.own).read_bytes()).hexdigest() if arguments.own else "",
        "rows": len(setting.rows),
        "corpus": len(setting.corpus),
        "suite": arguments.suite,
        "zero_steps": arguments.zero_steps,
        "seed": arguments.seed,
    }
    parts = open_parts(arguments.out, identity)
    table_VD = embedding_table(setting.trunk).float()
    mark = runner.placeholder(setting.tokenizer)
    scale = setting.transform.config.scale

    def found(**kwargs: Any) -> Substitution:
        return Substitution(setting.tokenizer, private, **kwargs)

    def known(**kwargs: Any) -> Substitution:
        return Substitution(setting.tokenizer, nobody, told=[*setting.rows, *setting.corpus], **kwargs)

    def behind(sgt: Mechanism, name: str, title: str, substitution: Substitution) -> Mechanism:
        return surrogates(substitution, table_VD, sgt, name, title)

    clear = nothing()
    listed = [
        clear,
        redaction(table_VD[mark]),
        behind(clear, "redaction_found", "redaction of what is found", found(placeholder=mark)),
        behind(clear, "placeholders", "placeholders for what is found", found(labels=True)),
        behind(clear, "placeholders_marked", "placeholders for what is marked", known(labels=True)),
        constant_noise(scale, "noise", "constant noise, 1 table std"),
        behind(clear, "surrogates", "surrogates for what is found", found()),
        behind(clear, "marked", "surrogates for what is marked", known()),
    ]
    made_of = dict.fromkeys((mechanism.name for mechanism in listed), "")  # an export may be added, or be another one
    for name, transform in transforms.items():
        sgt = dataclasses.replace(learned(transform), name=name, title=name)
        three = [
            sgt,
            behind(sgt, f"surrogates+{name}", f"surrogates (found), then {name}", found()),
            behind(sgt, f"marked+{name}", f"surrogates (marked), then {name}", known()),
        ]
        listed += three
        made_of |= dict.fromkeys((one.name for one in three), f"@{fingerprint_export(exports[name])[:12]}")
    wanted = {name for name in arguments.mechanisms.split(",") if name}
    if others := wanted - {mechanism.name for mechanism in listed}:
        raise UserError(f"--mechanisms: {min(others)!r} is none; known: {', '.join(one.name for one in listed)}")
    for mechanism in listed:
        if wanted and mechanism.name not in wanted | {"redaction"}:
            continue
        key = mechanism.name + made_of[mechanism.name]
        results["mechanisms"][mechanism.name] = _measured(setting, mechanism, key, chosen, arguments, parts)
        if "redaction" in results["mechanisms"]:  # where p* comes from
            _write(arguments.out, results)


def _measured(
    setting: Setting, mechanism: Mechanism, key: str, attacks: Sequence[str], arguments: Any, parts: Parts
) -> dict[str, Any]:
    """What a mechanism costs and what each attack reads: the parts that are there already, and the others now. One that
    was asked for at another time counts as well."""
    import torch

    from sgt_titan.evaluation.attacks import ATTACKS as KNOWN
    from sgt_titan.evaluation.scores import utility
    from sgt_titan.evaluation.world.surrogates import Substitution

    random = torch.Generator(device=setting.device)
    before = (name for name in KNOWN if name not in attacks and parts.get(f"{key}/attacks/{name}") is not None)
    attacks = [*attacks, *before]

    def spent() -> dict[str, Any]:
        random.manual_seed(arguments.seed)
        return utility.measure_utility(
            setting.trunk, setting.full_batches, setting.rows, mechanism, random, reference=setting.reference
        )

    def attacked(name: str) -> Callable[[], dict[str, Any]]:
        return lambda: _attack(setting, mechanism, KNOWN[name], arguments)

    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "utility": spent,
        "answers": lambda: _answers(setting, mechanism, random.manual_seed(arguments.seed)),
        **{f"attacks/{name}": attacked(name) for name in attacks},
    }
    found = {}
    for name, job in jobs.items():
        started = time.monotonic()
        if (part := parts.get(f"{key}/{name}")) is None:
            part = job()
            parts.put(f"{key}/{name}", part)
            say(f"{mechanism.title}: {name}, {time.monotonic() - started:.0f} s")
        found[name] = part
    if isinstance(used := mechanism.rewrite, Substitution) and used.unfit:
        say(f"{mechanism.title}: {used.unfit} of {used.replaced} surrogates cut or lengthened to their values")
    return {
        "title": mechanism.title,
        "utility": found["utility"],
        "answers": found["answers"],
        "attacks": {name: found[f"attacks/{name}"] for name in attacks},
    }


def _attack(setting: Setting, mechanism: Mechanism, attack: Any, arguments: Any) -> dict[str, Any]:
    """What an attacker reads of the values: PII-Ratio of his text, and top-1 on their tokens."""
    from sgt_titan.evaluation.scores import pii, recovery
    from sgt_titan.evaluation.world.granted import World

    world = World(setting.prompts, setting.corpus, mechanism, setting.trunk, arguments.seed)
    guess = attack.run(**world.granted(attack.run), **(attack.arguments(arguments.suite) or {}))
    originals = recovery.texts(world.truth_N, world, setting.tokenizer)
    reads = recovery.texts(guess.top_NK[:, 0], world, setting.tokenizer)
    units = [sorted({span.text for span in row.spans}) for row in setting.prompts]
    kinds = sorted({span.kind for row in setting.prompts for span in row.spans})
    scores = recovery.score(guess.top_NK, world, setting.tokenizer, frequent=recovery.frequent_tokens(setting.corpus))
    by_kind = {}
    for kind in kinds if len(kinds) > 1 else []:
        of_kind = [sorted({span.text for span in row.spans if span.kind == kind}) for row in setting.prompts]
        by_kind[kind] = pii.pii_ratio(originals, reads, of_kind)["exact_micro"]
    return {
        "title": attack.title,
        "pii": pii.pii_ratio(originals, reads, units),
        "pii_by_kind": by_kind,
        "top1": scores["top1"],
        "marked": scores.get("marked_top1"),
    }


def _answers(setting: Setting, mechanism: Mechanism, random: Any) -> dict[str, Any]:
    """Greedy answers, judged by the prompt's values that the true response repeats: how many stand in them."""
    import numpy as np

    from sgt_titan.evaluation.scores import utility
    from sgt_titan.evaluation.scores.pii import is_in
    from sgt_titan.metrics.interval import ratio

    present, asked = [], []
    for row in setting.rows:
        prompt = row.prompt()
        response = setting.tokenizer.decode(row.ids[len(prompt.ids) :], skip_special_tokens=True)
        values = sorted({span.text for span in prompt.spans if is_in(span.text, response)})
        if not values:
            continue
        ids = utility.greedy(setting.trunk, prompt, mechanism, random, GENERATED)
        said = setting.tokenizer.decode(ids, skip_special_tokens=True)
        present.append(sum(is_in(value, said) for value in values))
        asked.append(len(values))
    return ratio(np.array(present), np.array(asked), share=True).as_dict()


# -- telling -----------------------------------------------------------------------------------------------------------


def best(entry: dict[str, Any], measure: str = "exact_micro") -> tuple[str, dict[str, Any]]:
    """The attack that reads most values, and its PII-Ratio."""
    name = max(entry["attacks"], key=lambda key: entry["attacks"][key]["pii"][measure]["value"] or 0.0)
    return name, entry["attacks"][name]["pii"][measure]


def p_star(results: dict[str, Any]) -> float:
    """What the best attacker reads where every marked value was taken out: a guess from the context."""
    return best(results["mechanisms"]["redaction"])[1]["value"] or 0.0


def table(results: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    lines = [
        "| values | recall | precision | PII-Ratio left, exact | fuzzy | answers back whole | values back |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results["finding"].items():
        pii = found["pii"]
        cells = [found["recall"], found["precision"], pii["exact_micro"], pii["fuzzy_micro"]]
        cells += [found["answers_back"], found["values_back"]]
        lines.append(f"| {name} | {' | '.join(map(_share, cells))} |")
    for key, title in (("recall_by_kind", "recall"), ("precision_by_kind", "precision"), ("recall_by_group", "recall")):
        found = results["finding"]["found"][key]
        if len(found) > 1:
            listed = (f"{kind or 'other'} {_share(share)} of {share['n']}" for kind, share in found.items())
            lines += ["", f"{title} ({key.rpartition('_')[2]}): " + ", ".join(listed)]
    if "mechanisms" in results:
        lines += [
            "",
            f"p* (guessed from the context): {100 * p_star(results):.1f}%",
            "",
            "| mechanism | best attacker | PII-Ratio, exact | fuzzy | private tokens | KL | agreed | kept | answered |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for entry in results["mechanisms"].values():
            name, exact = best(entry)
            attack, use = entry["attacks"][name], entry["utility"]
            fuzzy = best(entry, "fuzzy_micro")[1]
            tokens = max((a["marked"]["value"] or 0.0) for a in entry["attacks"].values())
            cost = " | ".join(map(_share, (use["agreement"], use["kept"], entry["answers"])))
            lines.append(
                f"| {entry['title']} | {attack['title']} | {_share(exact)} | {_share(fuzzy)} | {100 * tokens:.1f}% | "
                f"{use['kl']['value']:.3f} | {cost} |"
            )
    return "\n".join(lines)


def drawing(results: dict[str, Any]) -> str:
    """SVG. PII-Ratio of the best attacker over KL, p* as a line; without mechanisms: precision by kind."""
    from sgt_titan.evaluation.report.plots import figure

    def mechanisms(axes: Any) -> None:
        rows, done = results["mechanisms"], set()

        def at(name: str) -> tuple[float, float]:
            return max(rows[name]["utility"]["kl"]["value"], 1e-3), 100 * (best(rows[name])[1]["value"] or 0.0)

        # A line from each transform alone to it behind surrogates for what is found, and for what is marked.
        for name in ["none", *(name for name in rows if f"surrogates+{name}" in rows)]:
            way = [name, f"surrogates+{name}", f"marked+{name}"] if name != "none" else ["none", "surrogates", "marked"]
            way = [one for one in way if one in rows]
            if not way:  # not asked for
                continue
            (line,) = axes.plot(*zip(*map(at, way), strict=True), "-", lw=1, label=rows[way[0]]["title"])
            for one, marker in zip(way, "osD", strict=False):
                axes.plot(*at(one), marker, color=line.get_color(), markersize=5)
            done |= set(way)
        for name in sorted(rows.keys() - done):
            axes.plot(*at(name), "x", color="grey")
            axes.annotate(
                rows[name]["title"], at(name), fontsize=6, xytext=(0, 5), textcoords="offset points", rotation=40
            )
        for marker, title in zip("osD", ("alone", "surrogates for what is found", "... is marked"), strict=True):
            axes.plot([], [], marker, color="grey", label=title)
        axes.axhline(100 * p_star(results), ls=":", color="grey", label="p*: guessed from the context")
        axes.set_xscale("log")
        axes.set(xlabel="KL after restoring, nats a token", ylabel="PII-Ratio of the best attacker, %")
        axes.legend(fontsize=7)

    def kinds(axes: Any) -> None:
        found = results["finding"]["found"]["precision_by_kind"]
        axes.barh(list(found), [100 * (share["value"] or 0) for share in found.values()])
        axes.set(xlabel="of what is replaced, marked private, %")

    return figure(mechanisms if "mechanisms" in results else kinds, width=7.5, height=4.5)


def _share(share: dict[str, Any]) -> str:
    value = share["value"]
    return "-" if value is None else f"{100 * value:.1f}%"


def _write(out: Path, results: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        disk.write(out / "private.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        disk.write(out / "private.md", table(results) + "\n")
        disk.write(out / "private.svg", drawing(results))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None

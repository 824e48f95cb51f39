"""Runs a suite job by job, each saved as it finishes, and merges the parts into ``results.json``.

A job is a name, a cost and a function that returns a JSON value. Costs are summed before anything starts: what would
not fit the memory or the time given is refused with what to reduce.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sgt_titan.data.cache import cache_dir
from sgt_titan.errors import UserError
from sgt_titan.evaluation.attacks import ATTACKS, BEFORE, ROTATION, Attack, beam, beamclean, map_search
from sgt_titan.evaluation.measure.parts import Parts
from sgt_titan.evaluation.measure.setting import Setting
from sgt_titan.evaluation.measure.suite import SUITES, battery
from sgt_titan.evaluation.options import GLANCE, UNSENT
from sgt_titan.evaluation.scores import certificates, dropping, guessing, pii, privacy, reading, recovery, utility
from sgt_titan.evaluation.world.checkpoints import in_files, in_memory
from sgt_titan.evaluation.world.granted import KNOWN_TOKENS, World
from sgt_titan.evaluation.world.mechanisms import Mechanism, learned, noise_grid, nothing, redaction
from sgt_titan.evaluation.world.rotated import load_rotation
from sgt_titan.evaluation.world.samples import MAX_ROWS, Padded, Sample, embedding_table, generator
from sgt_titan.evaluation.world.threat import UNKNOWN, Cost, KnownPairs, Seed, grants, kind_of
from sgt_titan.metrics.interval import Estimate
from sgt_titan.terminal import clock, say
from sgt_titan.transform import glow
from sgt_titan.transform.chat_template import look

CHOOSING = "choosing"  # token dropping by a choice that is learned
CHOICE_ROWS = 256  # public rows that it is learned on
TRAINED = ("sequence", "autoregressive", "sequence_repeats", "sequence_at_z", "inverter", *UNSENT)  # by steps
MEAN = "sequence_repeats"
UNITS = (12, 2, 12)  # steps of it that are timed; the first finds memory and code cold, as no whole training does


@dataclass(frozen=True)
class Job:
    """``run()`` measures; ``name`` is where the result belongs, as in ``sgt/attacks/nearest_l2``. after: the job whose
    network it goes on from, and which it would do itself before that is there."""

    name: str
    run: Callable[[], dict[str, Any]] = field(repr=False)
    cost: Cost
    seconds: float = 0.0  # estimated
    after: str = ""


def effort_of(suite: str) -> str:
    """A digest of every attack's effort in a suite."""
    return _digest({name: attack.arguments(suite) for name, attack in {**ATTACKS, **ROTATION}.items()})


def _digest(effort: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(effort, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Evaluation:
    """Everything that decides the numbers beside the setting. only: attacks to run; empty: all of the suite."""

    setting: Setting
    suite: str
    seed: int = 0
    examples: int = 2
    only: tuple[str, ...] = ()
    baselines: bool = True
    benchmarks: tuple[str, ...] = ()
    benchmark_dir: str | None = None
    judge: tuple[str, str] | None = None  # base URL, model
    rotation: tuple[str, str, str, str] | None = None  # server, client, secret, public checkpoint
    begun: Mapping[str, Any] | None = field(default=None, repr=False)  # ``no_prompt``, where it is there already
    networks: Path | None = None  # where the networks are kept that attacks go on from; None: in memory

    @cached_property
    def mechanisms(self) -> dict[str, Mechanism]:
        """By name, in the order to show."""
        setting, config = self.setting, self.setting.transform.config
        std, norm = privacy.statistics(setting.transform, setting.trunk, setting.full_batches)
        sgt = learned(setting.transform)
        sgt.facts.update(std=std / config.scale, mean_norm=norm / config.median_norm)
        rotated = [load_rotation(before, *self.rotation) for before in (nothing(), sgt)] if self.rotation else []
        if not self.baselines:
            return {mechanism.name: mechanism for mechanism in (sgt, *rotated)}
        table_VD = embedding_table(setting.trunk).float()
        noise = noise_grid(table_VD, config.scale, (std / config.scale, *SUITES[self.suite].sigmas))
        found = [sgt, nothing()]
        if any(row.spans for row in setting.rows) and self.suite != GLANCE:
            found.append(redaction(table_VD[placeholder(setting.tokenizer)]))
        found += [*rotated, *noise, *self._dropping()]
        return {mechanism.name: mechanism for mechanism in found}

    def _dropping(self) -> list[Mechanism]:
        """Token dropping at the suite's shares; what it needs to be fitted is, when the first prompt is sent."""
        setting, fitted = self.setting, dict[str, dropping.Choose]()

        def place(batch: Padded, x_BTD: torch.Tensor) -> torch.Tensor:
            return setting.zero.place(batch, x_BTD)

        def learned(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator) -> torch.Tensor:
            if not fitted:
                rows = setting.batches(setting.training[:CHOICE_ROWS])
                fitted["choice"] = dropping.learned_choice(setting.trunk, rows, place)
            return fitted["choice"](batch, x_BTD, random)

        ways = {"dropping": (dropping.at_random, "any"), CHOOSING: (learned, "the best by a look at the prompt")}
        return [
            dropping.dropping(
                share, place, way, name=f"{name}-{100 * share:g}", title=f"{share:.0%} of the tokens, {how}"
            )
            for share in SUITES[self.suite].drops
            for name, (way, how) in ways.items()
        ]

    def world(self, mechanism: Mechanism) -> World:
        """The last one is kept: a mechanism's attacks share what it sent and the pairs that are known of it."""
        setting, last = self.setting, self._last
        if not last or last[0].mechanism is not mechanism:
            kept = in_memory()
            if self.networks is not None:
                folder = self.networks / mechanism.name
                kept = in_files(lambda name, effort: folder / f"{name}-{_digest(effort)}.safetensors", "--out")
            last[:] = [World(setting.prompts, setting.corpus, mechanism, setting.trunk, self.seed, kept)]
        return last[0]

    @cached_property
    def _last(self) -> list[World]:
        return []

    @cached_property
    def clean_answers(self) -> list[list[int]]:
        """Greedy, to the clean prompts whose answers are compared with a mechanism's."""
        setting = self.setting
        prompts = utility.compared(setting.rows, SUITES[self.suite].greedy)
        return utility.greedy_answers(setting.trunk, prompts, nothing(), generator(self.seed, setting.device))

    @cached_property
    def frequent(self) -> set[int]:
        return recovery.frequent_tokens(self.setting.corpus)

    @cached_property
    def units(self) -> list[list[str]]:
        """Private values of each prompt, without repetition."""
        return [sorted({span.text for span in row.spans}) for row in self.setting.prompts]

    @cached_property
    def reference(self) -> utility.Reference:
        """Of an interrupted evaluation the one that its finished parts were measured against."""
        if self.begun is not None:
            return utility.Reference.from_dict(self.begun)
        return self.setting.reference

    @cached_property
    def lm_top1(self) -> Estimate:
        """How often a language model names the hidden token unseen: the prior of PAC-Adv that is not optimistic."""
        return privacy.language_model_top1(self.setting.trunk, self.setting.full_batches)

    def jobs(self) -> Iterator[Job]:
        """All of them, cheap ones first within a mechanism."""
        setting, width = self.setting, self.setting.transform.config.hidden_size
        tokens = sum(len(row.ids) for row in setting.rows)
        tokens_hidden = self.world(nothing()).size.tokens
        one = 2.0 * self.world(nothing()).size.trunk * tokens + 2.0 * tokens * self._table_size
        logits = 8.0 * max((b.tokens_BT.numel() for b in setting.full_batches), default=0) * self._vocab
        pass_cost = Cost(one, 4 * logits)
        # A step of the zero's fit: two forward passes of a batch, and one back to its embeddings, which takes two more.
        steps = 0 if self.begun or setting.zero_is_there else setting.zero_steps
        fitting = 4 * one * steps * MAX_ROWS / len(setting.rows)
        yield Job("no_prompt", self._no_prompt, Cost(5 * one + fitting, 8 * logits))
        yield Job("lm_top1", self._lm_top1, pass_cost)
        # The choice is fitted when it is first asked for: a pass for what it sees, one for what it is to say, and back.
        choice = 4 * one * min(CHOICE_ROWS, len(setting.training)) / len(setting.rows)
        for name, mechanism in self.mechanisms.items():
            world = self.world(mechanism)
            ranked = Cost(3 * one, 4 * logits, numbers=40.0 * world.size.tokens * self._vocab)
            if name.startswith(CHOOSING):
                ranked, choice = replace(ranked, flops=ranked.flops + choice), 0.0
            yield Job(f"{name}/privacy", partial(self._privacy, mechanism), ranked)
            said = utility.GREEDY_TOKENS * math.ceil(SUITES[self.suite].greedy / MAX_ROWS)
            said *= 1 + (name == "sgt")  # the first answers the clean prompts as well
            yield Job(f"{name}/utility", partial(self._utility, mechanism), Cost(6 * one, 4 * logits, steps=said))
            rotated, asked = mechanism.rotation is not None, False
            given = {"rotated": rotated, "denoises": mechanism.denoises}
            attacks = battery(self.suite, name, self.only, **given)
            for key, attack in attacks.items():
                effort, after = attack.arguments(self.suite) or {}, ""
                if mechanism.drops and "candidates" in effort:
                    effort["candidates"] = 1  # nothing is computed of any
                cost = attack.cost(world.size, **effort)
                if key == MEAN and mechanism.transform is None and world.repeats_itself:
                    cost = replace(cost, flops=0.0, steps=0.0)  # what ``sequence`` read
                if begun := effort.get("after"):
                    if BEFORE in attacks:
                        after = f"{name}/attacks/{BEFORE}"
                    else:
                        cost = replace(cost, flops=cost.flops + ATTACKS[BEFORE].cost(world.size, **begun).flops)
                if KnownPairs in grants(attack.run).values():  # the first that asks makes them, and they stay
                    flops = 0.0 if asked else 8.0 * KNOWN_TOKENS * (world.size.transform + world.size.width)
                    asked = True
                    cost = replace(cost, flops=cost.flops + flops, bytes=cost.bytes + 8.0 * KNOWN_TOKENS * width)
                run = partial(self._attack, mechanism, key, attack)
                yield Job(f"{name}/attacks/{key}", run, cost, after=after)
        limits = Cost(3 * one, 8 * logits, numbers=200.0 * tokens_hidden * self._vocab)
        yield Job("sgt/certificate", self._certificate, limits)
        yield Job("sgt/answers", self._answers, pass_cost)
        source = "local" if self.benchmark_dir else "hub"
        flops = 2.0 * self.world(nothing()).size.trunk * 600 * (SUITES[self.suite].questions or 2_000)
        for name in [n for n in ("none", "sgt", "noise") if n in self.mechanisms]:
            for benchmark in self.benchmarks:
                asked_of = partial(self._benchmark, self.mechanisms[name], benchmark)
                yield Job(f"{name}/benchmarks/{source}/{benchmark}", asked_of, Cost(flops, 4 * logits))

    # -- the jobs --

    def _no_prompt(self) -> dict[str, Any]:
        zero, lost = self.setting.zero, utility.kindest(self.setting.removed)
        return self.reference.as_dict() | {
            "utility": utility.described(lost, self.setting.full_batches, self.reference),
            "zero": {"steps": zero.steps, "settled": zero.settled, "nats": list(zero.aside), "note": zero.note()},
        }

    def _lm_top1(self) -> dict[str, Any]:
        return self.lm_top1.as_dict()

    def _certificate(self) -> dict[str, Any]:
        """What nobody can exceed, of one observation, and what the answers are worth; nothing without a table to price
        with."""
        setting = self.setting
        if setting.transform.embed_tokens is None:
            return {}
        batches, random = setting.batches(setting.prompts), generator(self.seed, setting.device)
        rates, tokens = certificates.measure_rates(setting.transform, batches, random)
        source = certificates.measure_source(setting.trunk, batches)
        worth_B = self.reference.without_B - self.reference.clean_B
        return certificates.certificate(rates, tokens, source, seed=self.seed).as_dict() | {
            "worth_per_prompt": certificates.least_nats(1.0, worth_B).as_dict()
        }

    def _privacy(self, mechanism: Mechanism) -> dict[str, Any]:
        setting = self.setting
        calibration = setting.batches(setting.corpus[: max(2, len(setting.rows))])
        random = generator(self.seed, setting.device)
        part = privacy.measure_privacy(
            setting.trunk, setting.full_batches, calibration, mechanism, random, lm_top1=self.lm_top1
        )
        if mechanism.rotation is None:
            return part
        # No rotation changes information: it is measured before it, where the noise is independent by feature.
        random = generator(self.seed, setting.device)
        before = privacy.measure_privacy(
            setting.trunk, setting.full_batches, calibration, mechanism.rotation.before, random, lm_top1=self.lm_top1
        )["privacy"]
        kept = {key: before[key] for key in before if key.startswith(("mi", "pac_adv"))}
        return part | {"privacy": part["privacy"] | kept}

    def _utility(self, mechanism: Mechanism) -> dict[str, Any]:
        setting = self.setting
        return utility.measure_utility(
            setting.trunk,
            setting.full_batches,
            setting.rows,
            mechanism,
            generator(self.seed, setting.device),
            reference=self.reference,
            # An answer is the client's work there; what it is worth is measured with the response given.
            clean_answers=() if mechanism.rotation else self.clean_answers,
        )

    def _attack(self, mechanism: Mechanism, name: str, attack: Attack) -> dict[str, Any]:
        world, tokenizer = self.world(mechanism), self.setting.tokenizer
        started = time.monotonic()
        effort = attack.arguments(self.suite) or {}
        granted = world.granted(attack.run)
        if name in UNSENT:
            granted |= self._unsent(world)
        guess = attack.run(**granted, **effort)
        part: dict[str, Any] = {
            "title": attack.title,
            "source": attack.source,
            "kind": kind_of(attack.run),
            "sees": [kind.title for kind in grants(attack.run).values() if kind.title],
            "seconds": time.monotonic() - started,
            "flops": guess.flops,
            "notes": list(guess.notes),
            **recovery.score(guess.top_NK, world, tokenizer, frequent=self.frequent),
        }
        reads = recovery.texts(guess.top_NK[:, 0], world, tokenizer)
        if any(self.units):
            originals = recovery.texts(world.truth_N, world, tokenizer)
            part["pii"] = pii.pii_ratio(originals, reads, self.units)
            if self.judge:
                from sgt_titan.evaluation.scores.judge import judge

                part["pii"] |= judge(*self.judge, originals, reads, self.units)
        if guess.curve is not None:
            curve = guess.curve
            part["curve"] = {
                "axis": curve.axis,
                "at": list(curve.at),
                "top1": [recovery.top1_estimate(top_N, world).as_dict() for top_N in curve.top_N],
                "extra": list(curve.extra),
                "extra_label": curve.extra_label,
            }
        part["reads"] = reads[: self.examples]
        return part

    def _unsent(self, world: World) -> dict[str, Any]:
        """The same for every mechanism and every export, so found once and kept beside the data."""
        kept = guessing.kept(cache_dir(self.setting.config), world.rows, world.corpus, world.table_VD)
        return {"checkpoints": kept, "seed": Seed(guessing.SEED)}

    def _answers(self) -> dict[str, Any]:
        """Prompts and greedy answers of the rows that a report shows."""
        mechanism, setting = self.mechanisms["sgt"], self.setting
        shown = setting.prompts[: self.examples]
        world = self.world(mechanism)
        prompts = recovery.texts(world.truth_N, world, setting.tokenizer)[: self.examples]
        answers = utility.answers(
            setting.trunk, setting.tokenizer, shown, (nothing(), mechanism), generator(self.seed, setting.device)
        )
        return {"prompts": prompts, "clean": answers[0], "obfuscated": answers[1], "revealed": self._revealed(shown)}

    def _revealed(self, shown: Sequence[Sample]) -> list[dict[str, Any]]:
        """Nats that one observation can tell of each token, and the text they belong to; nothing without a table."""
        transform, found = self.setting.transform, []
        for row in shown if transform.embed_tokens is not None else ():
            ids_BT, mask_BT = (torch.from_numpy(a)[None].to(self.setting.device) for a in (row.ids, row.obfuscate))
            nats_T = transform.rate(ids_BT, mask_BT, generator=generator(self.seed, self.setting.device))[0].tolist()
            found.append(
                {
                    "pieces": glow.pieces(self.setting.tokenizer, row.ids.tolist()),
                    "nats": [n if there else None for n, there in zip(nats_T, row.obfuscate.tolist(), strict=True)],
                }
            )
        return found

    def _benchmark(self, mechanism: Mechanism, name: str) -> dict[str, Any]:
        from sgt_titan.evaluation.scores.benchmarks import run_benchmarks

        setting = self.setting
        return run_benchmarks(
            setting.trunk,
            setting.tokenizer,
            mechanism,
            [name],
            local_dir=self.benchmark_dir,
            limit=SUITES[self.suite].questions or None,
            seed=self.seed,
            how=look(setting.transform.config.template_kwargs, setting.transform.config.template_date),
        )[name]

    @property
    def _vocab(self) -> int:
        return self.setting.transform.config.vocab_size

    @property
    def _table_size(self) -> int:
        return self._vocab * self.setting.transform.config.hidden_size


def placeholder(tokenizer: Any) -> int:
    """The token that stands for a redacted one: the tokenizer's own for unknown text, or that of an underscore."""
    if tokenizer.unk_token_id is not None:
        return tokenizer.unk_token_id
    return tokenizer("_", add_special_tokens=False)["input_ids"][-1]


# -- before anything runs ----------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """What this machine does, by the estimates' own count. passing, training: floating-point operations a second of a
    pass of the trunk, of training a reader. step: seconds of a cached position of prompts searched side by side.
    number: seconds of reading a float64 number."""

    passing: float
    training: float
    step: float
    number: float

    def seconds(self, job: Job) -> float:
        """Training attacks end earlier where they settle: this is of their whole budget."""
        speed = self.training if job.name.rpartition("/")[2] in TRAINED else self.passing
        return job.cost.flops / speed + job.cost.steps * self.step + job.cost.numbers * self.number


def measured_speed(evaluation: Evaluation, jobs: Sequence[Job]) -> Speed:
    """What this machine, trunk, export and data do, by doing a little of it: seconds."""
    setting = evaluation.setting
    batch, size = setting.full_batches[0], evaluation.world(nothing()).size

    @torch.no_grad()
    def once() -> float:
        started = time.perf_counter()
        setting.trunk(input_ids=batch.tokens_BT, attention_mask=batch.valid_BT.long()).logits[0, 0, 0].item()
        return time.perf_counter() - started

    passing = 2.0 * (size.trunk + evaluation._table_size) * batch.tokens_BT.numel() / min(once() for _ in range(3))
    step, number = min(_step_seconds(setting) for _ in range(2)), min(_number_seconds(size.width) for _ in range(3))
    if not any(job.name.rpartition("/")[2] in TRAINED for job in jobs):
        return Speed(passing, passing, step, number)
    attack, world = ATTACKS["sequence"], evaluation.world(evaluation.mechanisms["sgt"])
    effort, taken = attack.arguments(evaluation.suite) or {}, {}
    for steps in UNITS:
        budget = {**effort, "first": steps, "most": steps}
        started = time.perf_counter()
        attack.run(**world.granted(attack.run) | {"checkpoints": in_memory()}, **budget)
        taken[steps] = time.perf_counter() - started, attack.cost(world.size, **budget).flops
    (last, more), (first, few) = taken.values()
    return Speed(passing, (more - few) / max(last - first, 1e-9), step, number)


def _step_seconds(setting: Setting) -> float:
    """Of one position of a search under the trunk, prompts side by side."""
    device, beams, length = setting.device, 4, 8
    prompts = [torch.full((length,), UNKNOWN, device=device) for _ in range(beam.PROMPTS)]
    tokens_TC = torch.arange(2 * beams, device=device).expand(length, -1) % setting.transform.config.vocab_size
    emission = beamclean.Fixed([tokens_TC] * len(prompts), [tokens_TC.double()] * len(prompts))
    started = time.perf_counter()
    beam.search(setting.trunk, prompts, emission, beams=beams)
    return (time.perf_counter() - started) / length


def _number_seconds(width: int) -> float:
    """Of one of the passes that ``map_search.VISITS`` counts."""
    center_LCD = torch.randn(16, 64, width)
    started = time.perf_counter()
    map_search.log_normal(center_LCD[:, :1].double(), center_LCD.double(), center_LCD.double())
    return (time.perf_counter() - started) / (map_search.VISITS * center_LCD.numel())


def available_bytes() -> float:
    """Memory that can still be had: of the GPU where there is one, else of the machine or of its control group."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
        ):
            free = min(free, float(limit.read()) - float(used.read()))
    except (OSError, ValueError, StopIteration):
        pass
    return free


def estimate(jobs: Sequence[Job], processes: int = 1) -> tuple[float, float, str]:
    """Seconds of all jobs, bytes of the largest that may run together, and the name of the largest."""
    largest = sorted(jobs, key=lambda job: -job.cost.bytes)[:processes]
    seconds = max(sum(job.seconds for job in jobs) / processes, max(job.seconds for job in jobs))
    return seconds, sum(job.cost.bytes for job in largest), largest[0].name


def check_memory(jobs: Sequence[Job], memory: float | None, processes: int = 1, models: float = 0.0) -> float:
    """Bytes of the estimate, with ``models`` of every process but this one, which has them already.

    Raises:
        UserError: they exceed ``memory`` (GiB; default: what is free).
    """
    if not jobs:
        return 0.0
    _, size, name = estimate(jobs, processes)
    size += models * (processes - 1)
    limit = memory * 2**30 if memory is not None else available_bytes()
    if size > limit:
        raise UserError(
            f"{name}: needs about {size / 2**30:.1f} GiB, {limit / 2**30:.1f} GiB "
            f"{'are given (--memory)' if memory is not None else 'are free'}; take fewer --rows, a smaller --suite, "
            + ("fewer --jobs, " if processes > 1 else "")
            + "or --attacks without it"
        )
    return size


def check_time(jobs: Sequence[Job], minutes: float | None, processes: int = 1) -> float:
    """Seconds of the estimate.

    Raises:
        UserError: they exceed ``minutes``.
    """
    if not jobs:
        return 0.0
    seconds, _, _ = estimate(jobs, processes)
    if minutes is not None and seconds > 60 * minutes:
        slow = max(jobs, key=lambda job: job.seconds)
        raise UserError(
            f"--minutes {minutes:g}: this would take about {seconds / 60:.0f} minutes, {slow.name} the longest; take "
            "fewer --rows, a smaller --suite, or fewer --attacks"
        )
    return seconds


# -- running -----------------------------------------------------------------------------------------------------------


FIRST = "no_prompt"  # the zero that others are measured against: nobody begins before it is there


def missing(jobs: Sequence[Job], parts: Parts) -> list[Job]:
    """Those of which there is no part yet."""
    return [job for job in jobs if parts.get(job.name) is None]


def run_jobs(
    jobs: Sequence[Job],
    parts: Parts,
    say: Callable[[str], None] = say,
    several: Callable[[Sequence[Job]], Iterator[tuple[Job, dict[str, Any], float]]] | None = None,
) -> None:
    """Run what is not yet there: in order, or, but for the first, by ``several`` processes."""
    waiting = missing(jobs, parts)
    if len(waiting) < len(jobs):
        say(f"{len(jobs) - len(waiting)} of {len(jobs)} parts are there already")
    alone = [job for job in waiting if several is None or job.name == FIRST]
    together = [job for job in waiting if job not in alone]
    total, done, began = sum(job.seconds for job in waiting) or 1.0, 0.0, time.monotonic()
    index = 0

    def finished(job: Job, part: dict[str, Any], seconds: float) -> None:
        nonlocal done, index
        parts.put(job.name, part)
        done, index, now = done + job.seconds, index + 1, time.monotonic()
        left = (now - began) * (total - done) / done if done else math.nan
        remark = f", about {clock(left)} left" if index < len(waiting) else ""
        say(f"[{index}/{len(waiting)}] {job.name}: {seconds:.1f} s, estimated {job.seconds:.1f}{remark}")

    for job in alone:
        started = time.monotonic()
        part = job.run()
        finished(job, part, time.monotonic() - started)
    if together and several is not None:
        for job, part, seconds in several(together):
            finished(job, part, seconds)


def merged(evaluation: Evaluation, jobs: Sequence[Job], parts: Parts) -> dict[str, Any]:
    """``no_prompt`` and ``mechanisms`` of ``results.json``."""
    found = {job.name: parts.get(job.name) or {} for job in jobs}
    mechanisms: dict[str, Any] = {}
    for name, mechanism in evaluation.mechanisms.items():
        entry: dict[str, Any] = {"title": mechanism.title, "facts": dict(mechanism.facts)}
        entry |= found.get(f"{name}/privacy", {})
        entry["utility"] = found.get(f"{name}/utility", {})
        prefix = f"{name}/attacks/"
        attacks = {key.removeprefix(prefix): part for key, part in found.items() if key.startswith(prefix)}
        unsent = {name: found.get(f"sgt/attacks/{name}") for name in UNSENT}  # they saw nothing of any mechanism
        entry["attacks"] = {
            key: {k: v for k, v in part.items() if k != "reads"}
            for key, part in reading.compared(attacks, unsent, seed=evaluation.seed).items()
        }
        # A glance has met the weakest attacker alone, and nobody may take him for the best.
        entry |= {"best": None} if evaluation.suite == GLANCE else reading.best(attacks)
        if name == "sgt":
            whole = battery(evaluation.suite, name, rotated=mechanism.rotation is not None, denoises=mechanism.denoises)
            if left_out := [attack.title for key, attack in whole.items() if key not in attacks]:
                entry["not_run"] = left_out
        if certified := found.get(f"{name}/certificate"):
            entry["certificate"] = certified
        benchmarks = {key: part for key, part in found.items() if key.startswith(f"{name}/benchmarks/")}
        if benchmarks:
            entry["benchmarks"] = {key.rpartition("/")[2]: part for key, part in benchmarks.items()}
        if name == "sgt":
            shown = found["sgt/answers"]
            entry["examples"] = [
                {
                    "prompt": prompt,
                    "guesses": {key: part["reads"][i] for key, part in attacks.items()},
                    "answer_clean": shown["clean"][i],
                    "answer_obfuscated": shown["obfuscated"][i],
                    **(dict(enumerate(shown.get("revealed") or ())).get(i) or {}),
                }
                for i, prompt in enumerate(shown["prompts"])
            ]
        mechanisms[name] = entry
    no_prompt = {key: part for key, part in found["no_prompt"].items() if key != "rows"}
    return {"no_prompt": no_prompt, "mechanisms": mechanisms}

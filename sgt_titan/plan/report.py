"""The plan for people: one config in the terminal or as JSON, and the tables of docs/MEMORY.md."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from sgt_titan.config.schema import Config

from .arithmetic import Plan, from_name
from .goodput import RUNS, Conditions, knobs, needed_mtbf, simulate
from .hardware import EXPOSED_RANGE, HFU_RANGE, LINK_RANGE, START_SECONDS, STORAGE
from .interval import DAY, Saving
from .memory import Memory

GB = 1e9
# The shipped configs with a row in docs/MEMORY.md, small to large.
SHIPPED = (
    "llama3_1b",
    "qwen3_32b_64x8",
    "deepseek_r1_qwen_32b_64x8",
    "llama3_70b_1x8",
    "llama3_70b_32x8",
    "llama3_70b_64x8",
    "deepseek_r1_70b_64x8",
    "deepseek_v3_64x8",
)

KINDS = {
    "trunk": "trunk shard, frozen",
    "estimator": "SGT weights, float32",
    "optimizer": "SGT gradient and two Adam moments, float32",
    "buffers": "rotary caches",
    "gathered": "gathered layers in flight, heads",
    "saved": "activations kept for the backward pass",
    "layer": "one layer's backward, with its recomputation",
    "transform": "x, mu, log sigma, x~, noise, pairs; float32",
    "logits": "lm_head, hidden states, a chunk of both logits",
    "reserved": "CUDA, NCCL buffers, fragmentation (allowance)",
}
OF_A_CPU = "Python and all that it imports (measured)"


def steps_of_run(config: Config, plan: Plan, rows: int | None) -> float | None:
    """Optimizer steps of the whole run; None where the config counts epochs of data whose size nobody has said."""
    if config.training.steps:
        return config.training.steps
    rows = rows or (0 if config.data.packing else config.data.max_samples)  # a packed row holds several samples
    return config.training.epochs * rows / plan.rows_per_step if rows and config.training.epochs else None


def figures(config: Config, plan: Plan, found: Saving, rows: int | None, fewest: int | None) -> dict[str, Any]:
    """Everything as numbers: bytes, seconds, tokens."""
    best, worst = plan.seconds_range
    steps = steps_of_run(config, plan, rows)
    per_gpu = [plan.tokens_per_step / (seconds * plan.degrees.world) for seconds in (worst, best)]
    return {
        "gpu": plan.gpu,
        "nodes": config.cluster.nodes,
        "degrees": asdict(plan.degrees),
        "trunk_parameters": plan.trunk_parameters,
        "sgt_parameters": plan.estimator_parameters,
        "memory_per_gpu": {**{f.name: getattr(plan.memory, f.name) for f in fields(Memory)}, "peak": plan.memory.peak},
        "capacity": plan.capacity,
        "fits": plan.fits,
        "fewest_nodes": fewest,
        "traffic_per_step": [asdict(one) for one in plan.traffic],
        "flops_per_token": {"model": plan.model_flops_per_token, "hardware": plan.hardware_flops_per_token},
        "tokens_per_step": plan.tokens_per_step,
        "microbatches": plan.microbatches,
        "seconds_per_step": {"best": best, "worst": worst},
        "tokens_per_second_per_gpu": {"worst": per_gpu[0], "best": per_gpu[1]},
        "steps": steps,
        "tokens": None if steps is None else steps * plan.tokens_per_step,
        "days": None if steps is None else {"best": steps * best / DAY, "worst": steps * worst / DAY},
        "checkpoint_bytes": plan.checkpoint_bytes,
        "saving": {
            **asdict(found),
            "steps": found.steps((best * worst) ** 0.5),
            "config_steps": config.checkpoint.interval,
        },
    }


def terminal(config: Config, plan: Plan, found: Saving, rows: int | None, fewest: int | None) -> str:
    """The page that ``sgt-titan plan`` prints."""
    d, m, told = plan.degrees, plan.memory, figures(config, plan, found, rows, fewest)
    mesh = f"replicas {d.replicas} x shards {d.fsdp} x TP {d.tp}" + (f", EP {d.ep}" if d.ep > 1 else "")
    nodes = config.cluster.nodes
    lines = [
        f"{config.run.name}: {nodes} x {d.world // nodes} {plan.gpu or 'CPU processes'}  ({mesh})",
        f"trunk {_count(plan.trunk_parameters)} parameters, frozen; SGT {_count(plan.estimator_parameters)}",
        "",
        "Memory of the fullest GPU" if plan.gpu else "Memory of a process",
    ]
    widest = max(getattr(m, f.name) for f in fields(Memory))
    for f in fields(Memory):
        size = getattr(m, f.name)
        kind = OF_A_CPU if f.name == "reserved" and not plan.gpu else KINDS[f.name]
        lines.append(f"  {kind:<46} {size / GB:8.2f} GB  {'#' * round(20 * size / widest)}")
    peak = "peak (logits and one layer do not coincide)"
    lines += [f"  {peak:<46} {m.peak / GB:8.2f} GB  {_verdict(plan, fewest)}"]
    lines += ["", "Communication of a step, received by a GPU"]
    for one in plan.traffic:
        slow, fast = one.seconds(plan.hardware)
        calls = f"{one.count:>5} calls, {one.link}, {fast:.2f} to {slow:.2f} s"
        lines.append(f"  {one.name:<46} {one.bytes / GB:8.2f} GB  {calls}")
    if not plan.traffic:
        lines.append("  none")
    micro = f"{plan.microbatches} microbatch{'es' if plan.microbatches > 1 else ''}"
    facts = [("step", f"{plan.rows_per_step} rows, {plan.tokens_per_step:,} tokens, {micro}")]
    if plan.gpu:
        facts += _times(config, plan, told)
    lines += ["", "Time", *_aligned(facts)]
    if plan.gpu:
        lines += ["", f"Checkpoints, with a node failing every {found.mtbf / 3600:,.1f} h of the whole job"]
        lines += [*_aligned(_saving(config, plan, found, told)), "", *_assumed(plan)]
    return "\n".join(lines)


KNOBS = {
    "mtbf": "half as many failures",
    "interval": "saving twice as often",
    "stall": "a save that holds up half as long",
    "write": "a save on disk in half the time",
    "notice": "noticing in half the time",
    "requeue": "half the time in the queue",
    "preflight": "checks in half the time",
    "start": "a start in half the time",
}


def simulated(c: Conditions, seed: int) -> dict[str, Any]:
    """Goodput of many simulated runs, what would raise it, and what 99% needs."""
    found = simulate(c, seed=seed)
    needed = needed_mtbf(c, 0.99, seed=seed)
    return {
        "conditions": asdict(c),
        **asdict(found),
        "gain_of_twice_as_good": dict(knobs(c, seed=seed)),
        "mtbf_for_99_percent": needed,
        "seed": seed,
        "runs": RUNS,
    }


def goodput_lines(good: dict[str, Any]) -> str:
    """The same for people."""
    c, gains = good["conditions"], good["gain_of_twice_as_good"]
    share = f"{good['mean']:.2%} of the time; 90% of runs from {good['low']:.2%} to {good['high']:.2%}"
    needed, have = good["mtbf_for_99_percent"], c["mtbf"]
    if needed is None:
        target = "no rate of failures reaches it: saves and the first start alone cost more"
    else:
        verdict = "reached" if have >= needed else "not reached"
        target = f"a failure every {needed / 3600:,.1f} h at most, these nodes have {have / 3600:,.1f}: {verdict}"
    facts = [
        ("goodput", share),
        (
            "work done again",
            f"{good['lost']:.2%}, over {good['attempts']:.1f} attempts; {good['in_vain']:.1%} of them in vain",
        ),
        *((f"  {KNOBS[name]}", f"{gain:+.2%}") for name, gain in list(gains.items())[:4]),
        ("99% needs", target),
    ]
    return "\n".join([f"Goodput, {good['runs']} simulated runs of {c['work'] / DAY:.1f} days", *_aligned(facts)])


def _aligned(facts: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {name:<30} {text}" for name, text in facts]


def _times(config: Config, plan: Plan, told: dict[str, Any]) -> list[tuple[str, str]]:
    best, worst = plan.seconds_range
    rate = told["tokens_per_second_per_gpu"]
    facts = [("step time", f"{best:.2f} to {worst:.2f} s")]
    facts += [("throughput", f"{rate['worst']:,.0f} to {rate['best']:,.0f} tokens/s/GPU")]
    if told["steps"] is None:
        return [*facts, ("run", f"{config.training.epochs} epochs; give --rows for its length")]
    facts += [("run", f"{told['steps']:,.0f} steps, {told['tokens'] / 1e9:,.2f}e9 tokens")]
    return [*facts, ("", f"{told['days']['best']:.2f} to {told['days']['worst']:.2f} days, failures aside")]


def _saving(config: Config, plan: Plan, found: Saving, told: dict[str, Any]) -> list[tuple[str, str]]:
    own, size = config.checkpoint.interval, plan.checkpoint_bytes
    minutes = " to ".join(f"{own * seconds / 60:.0f}" for seconds in plan.seconds_range)
    interval = f"{found.optimum / 60:.1f} min, {told['saving']['steps']} steps"
    return [
        ("size", f"{size / GB:.2f} GB, {size / plan.trunk_bytes:.1%} of the trunk"),
        ("a save", f"holds up {found.stall:.2f} s, on disk after {found.write:.0f} s"),
        ("best interval (Daly)", f"{interval}; the config saves every {own} ({minutes} min)"),
        ("lost to failures and saves", f"{found.lost_share:.1%} of the time at the best interval"),
    ]


def _assumed(plan: Plan) -> list[str]:
    gpu = plan.hardware
    return [
        f"Assumed: {HFU_RANGE[0]:.0%} to {HFU_RANGE[1]:.0%} of {gpu.flops / 1e12:.0f} Tflop/s; links at "
        f"{LINK_RANGE[0]:.0%} to {LINK_RANGE[1]:.0%} of {gpu.nvlink / GB:.0f} GB/s (NVLink) and "
        f"{gpu.network / GB:.0f} GB/s (network),",
        f"{EXPOSED_RANGE[0]:.0%} to {EXPOSED_RANGE[1]:.0%} of their time not hidden; storage {STORAGE / GB:.0f} GB/s a "
        f"node; {START_SECONDS / 60:.0f} min from a failure to the next first step.",
        f"GPU: {gpu.source}.",
        "Not measured on GPUs; docs/MEMORY.md says how far the memory is to be trusted.",
    ]


def _verdict(plan: Plan, fewest: int | None) -> str:
    if plan.capacity == float("inf"):
        return ""
    least = f"; at least {fewest} node{'s' if fewest > 1 else ''}" if fewest else ""
    return f"of {plan.capacity / GB:.0f}: {'fits' if plan.fits else 'DOES NOT FIT'}{least}"


def _count(number: int) -> str:
    return f"{number / 1e9:.3f}e9" if number >= 1e8 else f"{number:,}"


def summary(names: Iterable[str]) -> str:
    """The two tables of docs/MEMORY.md."""
    plans = {name: from_name(name) for name in names}
    memory = [
        "| config | GPUs | replicas x shards x TP (EP) | trunk | estimator | Adam, gradient | gathered | saved "
        "| transform | layer or logits | peak of 80 GB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    work = [
        "| config | trunk, 1e9 | trunk, GB | estimator, 1e9 | checkpoint, GB | checkpoint / trunk | Gflop a token "
        "| with recomputation | s a step | gathers, s a step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, p in plans.items():
        d, m = p.degrees, p.memory
        numbers = (m.trunk, m.estimator, m.optimizer, m.gathered, m.saved, m.transform, max(m.layer, m.logits))
        cells = " | ".join(f"{n / GB:.2f}" for n in numbers)
        mesh = f"{d.replicas} x {d.fsdp} x {d.tp}" + (f" ({d.ep})" if d.ep > 1 else "")
        verdict = f"{m.peak / GB:.0f}, {'fits' if p.fits else 'does not fit'}"
        memory.append(f"| {name} | {d.world} | {mesh} | {cells} | {verdict} |")
        work.append(
            f"| {name} | {p.trunk_parameters / 1e9:.3f} | {p.trunk_bytes / GB:,.1f} "
            f"| {p.estimator_parameters / 1e9:.3f} | {p.checkpoint_bytes / GB:.2f} "
            f"| {p.checkpoint_bytes / p.trunk_bytes:.1%} | {p.model_flops_per_token / 1e9:,.0f} "
            f"| {p.hardware_flops_per_token / 1e9:,.0f} | {p.seconds_per_step:.1f} | {p.gather_seconds_per_step:.1f} |"
        )
    return "\n".join([*memory, "", *work])

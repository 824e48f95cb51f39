"""The zero of ``kept``: the best embeddings at the hidden positions that do not look at the prompt.

A trunk answers better to some vectors than to a hole, whatever the prompt was: a transform that sent those would "keep"
a quarter of the demo trunk's gain without a word about the prompt (docs/EVALUATION.md). So nothing is what the best
constant gives, and it is distilled as the transform is: to the trunk's predictions of the response on the clean prompt,
on the rows that training uses, until it has settled. Position t of a row whose response starts at s gets

    shared + front[t] + back[s - t]                      (where the prompt is hidden; the rest stays as it is)

which knows how long the prompt is and nothing else. Fitted once per trunk and data, and kept beside the data's cache.
Legend: B batch, T sequence, D width, P positions (the longest row), N response tokens flat, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from sgt_titan import disk
from sgt_titan.arguments import Parser, number
from sgt_titan.config.door import read_config, split_words
from sgt_titan.config.schema import Config
from sgt_titan.data.cache import cache_dir, filled_once, prepare
from sgt_titan.errors import UserError
from sgt_titan.evaluation.options import ZERO_STEPS, zero_argument
from sgt_titan.evaluation.scores.utility import (
    CONSTANT,
    Reference,
    kept,
    reference_utility,
    response_logits,
    without_prompt,
)
from sgt_titan.evaluation.world.mechanisms import Mechanism, Obfuscated
from sgt_titan.evaluation.world.samples import (
    Padded,
    Sample,
    batched,
    embedding_table,
    generator,
    load_trunk,
    padded,
    read_samples,
    shorten,
)
from sgt_titan.objectives.utility import soft_cross_entropy
from sgt_titan.terminal import say
from sgt_titan.transform.trunk_files import TrunkFiles

VERSION = 1  # of what a fit is: part of a cached one's name
ROWS = 4_096  # training rows that are fitted on, at most
ASIDE = 48  # rows among them that are not, but tell when to stop
EVERY = 25  # steps between two looks at those
TOLERANCE = 1e-3  # nats a response token: less than this in two looks is standing still
CUTS = 2  # of the learning rate, each to a third, before standing still counts as settled
RATE = 0.1  # of Adam, in units of the table's std


@dataclass(frozen=True)
class Zero:
    """shared_D, front_PD, back_PD: float32 on the CPU. steps: of Adam. settled: it stood still before the steps ran
    out. aside: nats a response token of the rows kept aside, at every look."""

    shared_D: torch.Tensor
    front_PD: torch.Tensor
    back_PD: torch.Tensor
    steps: int
    settled: bool
    aside: tuple[float, ...] = ()

    def place(self, batch: Padded, x_BTD: torch.Tensor) -> torch.Tensor:
        """Embeddings with the constant at the hidden positions of the prompt."""
        at_BT, before_BT = positions(batch)
        shared_D, front_PD, back_PD = (part.to(x_BTD.device) for part in (self.shared_D, self.front_PD, self.back_PD))
        return _placed(shared_D, front_PD, back_PD, prompt_positions(batch), at_BT, before_BT, x_BTD)

    def mechanism(self) -> Mechanism:
        """As a way to hide a prompt: what it keeps is 0 by definition."""

        def obfuscate(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator) -> Obfuscated:
            sent_BTD = self.place(batch, x_BTD)
            return Obfuscated(sent_BTD, sent_BTD, None)

        return Mechanism("constant", "a constant prompt", obfuscate)

    def done(self, steps: int) -> bool:
        """Whether ``steps`` more would be none."""
        return self.settled or self.steps >= steps

    def note(self) -> str:
        """How much was done for it, in words."""
        how = "settled" if self.settled else "NOT settled: the zero may be too low, and kept too high"
        return f"the zero of `kept` is a constant prompt fitted for {self.steps} steps, {how}"


def prompt_positions(batch: Padded) -> torch.Tensor:
    """bool (B, T): hidden positions before the response, which stays clean also where it is obfuscated itself."""
    return batch.obfuscate_BT & ~(batch.target_BT.cumsum(-1) > 0)


def positions(batch: Padded) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 (B, T) each: the position in its row, and how far before the response (the row's end, without one)."""
    T = batch.target_BT.shape[1]
    at_T = torch.arange(T, device=batch.target_BT.device)
    starts_B = torch.where(batch.target_BT.any(1), batch.target_BT.int().argmax(1), batch.valid_BT.sum(1))
    return at_T.expand(len(starts_B), T), (starts_B[:, None] - at_T).clamp(min=0)


def _placed(
    shared_D: torch.Tensor,
    front_PD: torch.Tensor,
    back_PD: torch.Tensor,
    hidden_BT: torch.Tensor,
    at_BT: torch.Tensor,
    before_BT: torch.Tensor,
    x_BTD: torch.Tensor,
) -> torch.Tensor:
    last = len(front_PD) - 1  # a row longer than any that was fitted on
    constant_BTD = shared_D + front_PD[at_BT.clamp(max=last)] + back_PD[before_BT.clamp(max=last)]
    return torch.where(hidden_BT[..., None], constant_BTD.to(x_BTD.dtype), x_BTD)


def fit(
    trunk: PreTrainedModel,
    rows: Sequence[Sample],
    steps: int,
    *,
    begin: Zero | None = None,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> Zero:
    """Distil the constant on ``rows``; the best of all looks at the rows kept aside is what comes back.

    Args:
        steps: at most; with ``begin``, those that it had already count.
        begin: an earlier fit to go on from.
    """
    device, table_VD = trunk.device, embedding_table(trunk)
    usable = [row for row in rows if row.target.any() and row.prompt().obfuscate.any()][:ROWS]
    aside = usable[: min(ASIDE, max(1, len(usable) // 4))]
    usable = usable[len(aside) :] or aside
    P = max(len(row.ids) for row in (*usable, *aside)) + 1
    if begin is None:
        front_PD, back_PD = torch.zeros(2, P, table_VD.shape[1])
        begin = Zero(table_VD.float().mean(0).cpu(), front_PD, back_PD, steps=0, settled=False)
    best = begin
    if steps <= best.steps:
        return best
    learned = [part.to(device).clone().requires_grad_() for part in (best.shared_D, best.front_PD, best.back_PD)]
    optimizer = torch.optim.Adam(learned, lr=RATE * table_VD.float().std().item())
    size = len(next(batched(usable, len(table_VD))))
    looks = [padded(part, 0, device) for part in batched(aside, len(table_VD))]
    order, random = torch.empty(0, dtype=torch.int64), generator(seed, torch.device("cpu"))
    low, standing, cuts, seen, began = math.inf, 0, 0, list(best.aside), time.monotonic()
    for step in range(best.steps + 1, steps + 1):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(usable), generator=random)])
        batch, order = padded([usable[i] for i in order[:size].tolist()], 0, device), order[size:]
        optimizer.zero_grad()
        _cross_entropy(trunk, batch, learned).mean().backward()
        optimizer.step()
        if step % EVERY and step != steps:
            continue
        with torch.no_grad():
            now = torch.cat([_cross_entropy(trunk, look, learned) for look in looks]).mean().item()
        seen.append(now)
        if say and (step % (4 * EVERY) == 0 or step == steps):
            say(f"zero of kept: step {step} of at most {steps}, {now:.4f} nats, {time.monotonic() - began:.0f} s")
        standing = 0 if now < low - TOLERANCE else standing + 1
        if now < low:
            low = now
            shared_D, front_PD, back_PD = (part.detach().float().cpu().clone() for part in learned)
        best = Zero(shared_D, front_PD, back_PD, steps=step, settled=False, aside=tuple(seen))
        if standing >= 2:
            if cuts == CUTS:
                return replace(best, settled=True)
            cuts, standing = cuts + 1, 0
            for group in optimizer.param_groups:
                group["lr"] /= 3
    return best


def _cross_entropy(trunk: PreTrainedModel, batch: Padded, learned: Sequence[torch.Tensor]) -> torch.Tensor:
    """(N,) nats: the trunk's predictions behind the constant against those behind the clean prompt."""
    with torch.no_grad():
        x_BTD = trunk.get_input_embeddings()(batch.tokens_BT)
        teacher_NV = response_logits(trunk, batch, x_BTD)
    (shared_D, front_PD, back_PD), (at_BT, before_BT) = learned, positions(batch)
    sent_BTD = _placed(shared_D, front_PD, back_PD, prompt_positions(batch), at_BT, before_BT, x_BTD)
    return soft_cross_entropy(response_logits(trunk, batch, sent_BTD), teacher_NV).cross_entropy_N


# -- once for a trunk and data -----------------------------------------------------------------------------------------


def fitted(
    config: Config,
    trunk: PreTrainedModel,
    rows: Sequence[Sample],
    *,
    trunk_fingerprint: str,
    data_fingerprint: str,
    steps: int = ZERO_STEPS,
    say: Callable[[str], None] | None = None,
) -> Zero:
    """The constant of this trunk and data, from the cache where it has been fitted for as long, else fitted (further).

    Raises:
        UserError: the cache cannot be written.
    """
    path = location(config, trunk_fingerprint, data_fingerprint)
    with filled_once(path):  # several evaluations side by side fit it once
        found = read(path)
        if found is None or not found.done(steps):
            found = fit(trunk, rows, steps, begin=found, say=say)
            write(path, found)
        return found


def location(config: Config, trunk_fingerprint: str, data_fingerprint: str) -> Path:
    """Where the constant of this trunk and data is kept: named by all that decides it, but for the steps."""
    about = {
        "version": VERSION,
        "trunk": trunk_fingerprint,
        "data": data_fingerprint,
        "obfuscate": config.data.obfuscate,
        "obfuscate_template": config.data.obfuscate_template,
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir(config) / "zeros" / f"{name}.safetensors"


def write(path: Path, zero: Zero) -> None:
    about = {"steps": str(zero.steps), "settled": json.dumps(zero.settled), "aside": json.dumps(zero.aside)}
    tensors = {"shared": zero.shared_D, "front": zero.front_PD, "back": zero.back_PD}
    with disk.replacing(path) as work:
        save_file(tensors, work, metadata=about)


def read(path: Path) -> Zero | None:
    """None where it is not there, or damaged: it is fitted again then."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            shared_D, front_PD, back_PD = (file.get_tensor(name) for name in ("shared", "front", "back"))
        settled, aside = bool(json.loads(about["settled"])), tuple(json.loads(about["aside"]))
        return Zero(shared_D, front_PD, back_PD, int(about["steps"]), settled, aside)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """``sgt-titan zero NAME [--rows N] [--kept 95,87.5] [--section.key value ...]``.

    Raises:
        UserError: an unknown config or option; numbers that are none.
    """
    parser = Parser(
        prog="sgt-titan zero",
        description="Fit the constant prompt that `kept` counts from, and say what that changes.",
        epilog="Further words are config overrides (--data.max_samples 6000 ...), as the trainings had them.",
    )
    parser.add_argument("config", metavar="NAME", help="a config's name or file, or a run's directory")
    parser.add_argument("--rows", type=number(int, 2), default=128, help="held-out rows to measure it on (default 128)")
    parser.add_argument("--kept", metavar="A,B", default="", help="percents by the zero without it, to be counted anew")
    zero_argument(parser)
    arguments, overrides = split_words(parser, sys.argv[2:] if argv is None else argv)
    try:
        figures = [float(text) for text in arguments.kept.split(",") if text]
    except ValueError:
        raise UserError(f"--kept: give percents, as in 95.0,87.5, not {arguments.kept!r}") from None
    config, _ = read_config(arguments.config, overrides, trunk="weights")
    dataset = prepare(config, config.trunk.path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trunk = load_trunk(config.trunk.path, device)
    zero = fitted(
        config,
        trunk,
        read_samples(dataset.train, config, ROWS),
        trunk_fingerprint=TrunkFiles(config.trunk.path).fingerprint(),
        data_fingerprint=dataset.fingerprint,
        steps=arguments.zero_steps,
        say=say,
    )
    vocab, rows = embedding_table(trunk).shape[0], read_samples(dataset.validation, config, arguments.rows)
    batches = [padded(part, 0, device) for part in batched(rows, vocab)]
    shortened = [padded([shorten(row) for row in part], 0, device) for part in batched(rows, vocab)]
    removed = without_prompt(trunk, batches, shortened, zero.mechanism())
    now = reference_utility(trunk, batches, removed)
    holes = {name: found for name, found in removed.items() if name != CONSTANT}
    before = reference_utility(trunk, batches, holes)
    tokens = now.tokens_B.sum()
    print(f"{config.trunk.path}, {config.data.called}: {len(rows)} held-out rows, {tokens:,.0f} response tokens")
    print(f"nats a response token: {now.clean_B.sum() / tokens:.4f} with the clean prompt")
    for name, found in removed.items():
        print(f"{found.nll_N.mean().item():>29.4f} {name}")
    print(f"{zero.note()}; it kept {percent(before, now.without_B):.1f}% by the zero without it")
    for figure in figures:
        nats_B = before.without_B - figure / 100 * (before.without_B - before.clean_B)
        print(f"  {figure:.1f}% is {percent(now, nats_B):.1f}%")
    return 0


def percent(reference: Reference, nll_B: np.ndarray) -> float:
    return 100 * kept(reference, nll_B).value

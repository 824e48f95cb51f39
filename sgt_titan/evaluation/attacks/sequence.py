"""The sequence attacker: trained on his own obfuscations to read whole prompts, and beside it one that sees nothing.

Anybody with the client can obfuscate public text anew for every step, and so has pairs without end (Song and
Raghunathan, arXiv 2004.00053; here with a softmax over the vocabulary, which noise calls for: a regression to the
embedding answers noise with the middle of the table). What it is trained for, cross-entropy, is least at the posterior,
so with enough training and width no attack of one observation reads more. It says how far it is from that:

* training goes in cycles, each warmed up and annealed to zero, each doubling the steps done so far (arXiv 1608.03983);
  it ends when a doubling no longer helps on text kept aside, or at the budget, which is then said;
* who reads z, or from left to right, goes on from who reads what is sent: most of what there is to learn is the same;
* ``guess`` is the same network without what was sent: what it gets right is known without any leak;
* ``answer`` is the same with the true answer instead: what it gets right no mechanism hides that keeps the answer.

Legend: B rows, T positions, N hidden tokens flat, V vocabulary, H width of the reader, K guesses.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from sgt_titan.evaluation.attacks import beam
from sgt_titan.evaluation.attacks.linear_start import linear_start
from sgt_titan.evaluation.attacks.own_text import OwnText, of_a_length
from sgt_titan.evaluation.attacks.sequence_reader import Reader, new_body, trunk_body
from sgt_titan.evaluation.world.mechanisms import KEPT_BYTES
from sgt_titan.evaluation.world.samples import LOGIT_BUDGET, Padded, Sample, batched
from sgt_titan.evaluation.world.threat import (
    UNKNOWN,
    Answered,
    Checkpoints,
    Corpus,
    Cost,
    Curve,
    Guess,
    Noisy,
    Observation,
    Repeats,
    Seed,
    Size,
    Table,
    Transform,
    Trunk,
    Unseen,
)

logger = logging.getLogger(__name__)

GUESSES = 10
HELD_ROWS = 64  # of the corpus, never trained on: they decide when to stop
FIT_TOKENS = 8192  # that the linear start is fitted on, or four times the width where that is more
SMOOTHING = 0.5  # added to every token's count: a token that the corpus lacks is not impossible
SETTLED_LOSS = 0.005  # a doubling that brings less has converged: share of the loss, nats below one nat
SETTLED_SHARE = 0.005  # and top-1
BY_HEART = 0.05  # share of the loss on his own text; it differs by a hundredth from one look to the next
NEVER = -math.inf
CONVERGED = "converged"
CHUNK = 1024  # tokens whose logits exist at a time when guessing


@dataclass(frozen=True)
class Effort:
    """What the attacks take as keywords. first: steps of the first cycle, most: of all together. layers, width: of the
    encoder (and decoder) unless ``from_trunk``: the trunk's own layers then. beams: of the decoder; 0: there is none.
    points: the reader points to clean tokens, and trains on rows some of whose hidden tokens are shown as well: many
    more ways to look at the same text. enough: share of the loss; a doubling that brings less, and no reading, is the
    last.
    """

    first: int = 150
    most: int = 600
    layers: int = 4
    width: int = 256
    batch_rows: int = 24
    lr: float = 1e-3
    from_trunk: bool = False
    beams: int = 0
    points: bool = False
    enough: float = SETTLED_LOSS


# -- the attacks -------------------------------------------------------------------------------------------------------


def sequence(
    observation: Observation,
    transform: Transform,
    corpus: Corpus,
    table: Table,
    checkpoints: Checkpoints,
    seed: Seed,
    **effort: Any,
) -> Guess:
    """Read what is sent, each position by its marginal posterior."""
    return checkpoints.once("sequence", effort, lambda: trained(observation, transform, corpus, table, seed, **effort))


def trained(
    observation: Observation, transform: Transform, corpus: Corpus, table: Table, seed: Seed, **effort: Any
) -> Guess:
    """The same, whether or not it was trained before."""
    return _read(observation, transform, corpus, table, None, seed, Effort(**effort), keeps=True)


def sequence_at_z(
    observation: Observation,
    noisy: Noisy,
    transform: Transform,
    corpus: Corpus,
    table: Table,
    checkpoints: Checkpoints,
    seed: Seed,
    *,
    after: Mapping[str, Any] | None = None,
    **effort: Any,
) -> Guess:
    """The same at z. after: the effort of the ``sequence`` that it goes on from."""
    begun = sequence(observation, transform, corpus, table, checkpoints, seed, **after) if after else None
    return _read(noisy, transform, corpus, table, None, seed, Effort(**effort), begun=begun)


def sequence_repeats(
    observation: Observation,
    repeats: Repeats,
    transform: Transform,
    corpus: Corpus,
    table: Table,
    checkpoints: Checkpoints,
    seed: Seed,
    *,
    times: int = 8,
    fresh: int = 0,
    **effort: Any,
) -> Guess:
    """The same on the mean of ``times`` obfuscations of each prompt. It begins anew: little noise is left, and who read
    through more of it has learnt other things. fresh: of a row of his own, how many are made for a look (``OwnText``).
    Repeats that are the same bytes are read as one of them is."""
    others = [repeats.draw(k) for k in range(min(times - 1, repeats.limit))]
    if all(observation.same_bytes(other) for other in others):
        return sequence(observation, transform, corpus, table, checkpoints, seed, **effort)
    mean, times = mean_of([observation, *others]), 1 + len(others)
    fresh = 0 if fresh and times % fresh else fresh
    return _read(mean, transform, corpus, table, None, seed, Effort(**effort), times=times, fresh=fresh)


def mean_of(observations: Sequence[Observation]) -> Observation:
    """The mean of several observations of the same prompts."""
    x_tilde = tuple(torch.stack(x_TD).mean(0) for x_TD in zip(*(o.x_tilde for o in observations), strict=True))
    return Observation(x_tilde, observations[0].hidden, observations[0].tokens)


def autoregressive(
    observation: Observation,
    transform: Transform,
    corpus: Corpus,
    table: Table,
    trunk: Trunk,
    checkpoints: Checkpoints,
    seed: Seed,
    *,
    after: Mapping[str, Any] | None = None,
    **effort: Any,
) -> Guess:
    """Read what is sent from left to right: trained with the true tokens before, searched with a small beam.

    from_trunk: the decoder starts as the trunk, which is then trained with the rest. after: as above, for the encoder.
    """
    mine = Effort(**{"layers": 2, "from_trunk": True, "beams": 4} | effort)
    begun = sequence(observation, transform, corpus, table, checkpoints, seed, **after) if after else None
    return _read(observation, transform, corpus, table, trunk, seed, mine, begun=begun)


def guess(
    unseen: Unseen,
    corpus: Corpus,
    table: Table,
    checkpoints: Checkpoints,
    seed: Seed,
    **effort: Any,
) -> Guess:
    """The bidirectional reader without what was sent: the template, the language, the length of the prompt."""

    def train() -> Guess:
        return _read(unseen, None, corpus, table, None, seed, Effort(**effort))

    return checkpoints.once("guess", effort, train)


def answer(
    answered: Answered,
    corpus: Corpus,
    table: Table,
    checkpoints: Checkpoints,
    seed: Seed,
    **effort: Any,
) -> Guess:
    """The bidirectional reader with the true answer in the place of what was sent: what any mechanism gives up that
    keeps the answer."""
    rows = Corpus([row.answered() for row in corpus.rows])

    def train() -> Guess:
        return _read(answered, None, rows, table, None, seed, Effort(**effort, points=True))

    return checkpoints.once("answer", effort, train)


def _read(
    observation: Observation | Unseen,
    transform: Transform | None,
    corpus: Corpus,
    table: Table,
    trunk: Trunk | None,
    seed: Seed,
    effort: Effort,
    times: int = 1,
    fresh: int = 0,
    begun: Guess | None = None,
    keeps: bool = False,
) -> Guess:
    """Train a reader and read; a curve over the steps at the end of each cycle. begun: whose encoder goes on. keeps:
    the weights, for others."""
    mechanism, noisy = None if transform is None else transform.mechanism, isinstance(observation, Noisy)
    own = OwnText(corpus.rows, mechanism, table.rows_VD, seed.value, noisy=noisy, times=times, fresh=fresh)
    held = min(HELD_ROWS, max(1, len(corpus.rows) // 10))
    train_rows, held_rows = corpus.rows[:-held], corpus.rows[-held:]
    longest = max(max(len(row.ids) for row in corpus.rows), max(map(len, observation.hidden)))
    device = table.rows_VD.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed.value)
        reader, begins = _begin(own, train_rows, trunk, effort, longest)
    before = 0
    if begun is not None:
        before = _go_on(reader, begun)
        if not any(note.startswith(CONVERGED) for note in begun.notes):
            effort = replace(effort, enough=NEVER)  # a few steps that bring little say nothing of more
        begins = f"the reader of what is sent, of {before} steps" + (" and the trunk" if effort.from_trunk else "")
    reader.to(device)
    stages, halves, weights = [], list[Half](), None
    for stage in _cycles(reader, own, train_rows, held_rows, observation, effort, seed.value, halves, before):
        stages.append(stage)
        if stage.loss <= min(earlier.loss for earlier in stages):
            best = stage
            weights = {name: t.detach().cpu().clone() for name, t in reader.state_dict().items()} if keeps else None
    curve = Curve(
        "training steps",
        tuple(float(stage.steps) for stage in stages),
        tuple(stage.top_NK[:, 0] for stage in stages),
        tuple(stage.loss for stage in stages),
        "the attacker's own held-out loss, nats per token",
    )
    parameters = sum(p.numel() for p in reader.parameters() if p.requires_grad) - table.rows_VD.shape[0]
    done = max([stages[-1].steps, *(half.steps for half in halves)]) - before
    tokens = done * effort.batch_rows * float(np.mean([len(row.ids) for row in train_rows]))
    spent = tokens * (6.0 * parameters + 6.0 * table.rows_VD.numel())
    notes = [
        f"starts as {begins}, trained for {best.steps - before} steps of {effort.batch_rows} rows; on text kept aside "
        f"its loss is {best.loss:.3f} nats a token and it reads {best.share:.1%}"
        + (" given the true tokens before" if reader.decoder is not None else ""),
        _verdict(stages, halves, effort.enough),
    ]
    if begun is not None:
        spent += begun.flops
    return Guess(best.top_NK, curve, spent, tuple(notes), weights)


# -- the network -------------------------------------------------------------------------------------------------------


def _begin(
    own: OwnText, rows: Sequence[Sample], trunk: Trunk | None, effort: Effort, longest: int
) -> tuple[Reader, str]:
    """An untrained reader, and what it starts as."""
    table_VD, start, name = own.table_VD, None, "the tokens' frequencies"
    log_frequency_V = log_frequencies(rows, len(table_VD)).to(table_VD.device)
    if own.mechanism is not None:
        pairs = own.pairs(_enough(rows, max(FIT_TOKENS, 4 * table_VD.shape[1])))
        start = linear_start(pairs, table_VD, log_frequency_V)
        name = f"a {start.name}"
    decoder, head = None, None
    encoder = new_body(effort.width, effort.layers)
    if effort.beams:
        decoder = new_body(effort.width, effort.layers)
        if effort.from_trunk:
            assert trunk is not None, "an attack that starts from the trunk takes it"
            decoder, head = trunk_body(trunk.model), copy.deepcopy(trunk.model.get_output_embeddings()).float()
            head.requires_grad_(False)
            name += " and the trunk"
    reader = Reader(
        table_VD, log_frequency_V, start, encoder, decoder, longest=longest, head=head, points=effort.points
    )
    if start is not None:
        reader.std_D.copy_(pairs.sent_MD.std(0).clamp_min(1e-6 * table_VD.std()))
    return reader.eval(), name


def _go_on(reader: Reader, begun: Guess) -> int:
    """Give a reader the weights of another but for what each reads from one token alone; the steps behind them."""
    assert begun.weights is not None and begun.curve is not None, "who goes on from a network has one"
    weights = {name: t for name, t in begun.weights.items() if name != "log_tau"}
    unknown = reader.load_state_dict(weights, strict=False).unexpected_keys  # a decoder it has not, and keeps its own
    assert not unknown, "another network"
    steps = dict(zip(begun.curve.extra, begun.curve.at, strict=True))
    return int(steps[min(steps)])


def log_frequencies(rows: Sequence[Sample], vocab: int) -> torch.Tensor:
    """Log share of each token among the hidden ones of some rows, smoothed: (V,) float64."""
    count_V = np.full(vocab, SMOOTHING)
    for row in rows:
        np.add.at(count_V, row.ids[row.obfuscate], 1.0)
    return torch.from_numpy(np.log(count_V / count_V.sum()))


def _enough(rows: Sequence[Sample], tokens: int) -> Sequence[Sample]:
    """The first rows that hold so many hidden tokens."""
    counts = np.cumsum([int(row.obfuscate.sum()) for row in rows])
    return rows[: int(np.searchsorted(counts, tokens)) + 1]


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """The end of a cycle, annealed: steps done in all, loss and top-1 on text kept aside, guesses on the prompts."""

    steps: int
    loss: float
    share: float
    top_NK: torch.Tensor


class Half(NamedTuple):
    """Half way through a cycle: steps done in all, nats a token on text kept aside and on what was trained on last."""

    steps: int
    loss: float
    own: float


def _cycles(
    reader: Reader,
    own: OwnText,
    rows: Sequence[Sample],
    held: Sequence[Sample],
    observation: Observation | Unseen,
    effort: Effort,
    seed: int,
    halves: list[Half],
    before: int = 0,
) -> Iterator[Stage]:
    """Train in cycles of first, first, 2 first, 4 first ... steps until a doubling does not help, or ``most``. before:
    steps that the reader has behind it, which count in its stages alone.

    Who sees nothing is looked at half way through a cycle, too (``halves``). The rate is the same there in all, and
    where a doubling taught him his own text and next to nothing of what was kept aside the rest is left out.
    """
    decayed = [p for p in reader.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in reader.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=0.0, betas=(0.9, 0.98)
    )
    random, done, last = np.random.default_rng(seed), 0, None
    batches = of_a_length(rows, min(effort.batch_rows, len(rows)), random)
    stage = _stage(reader, own, held, observation, effort, before)
    yield stage
    while done < effort.most and not (last and last.steps > before and _settled(last, stage, effort.enough)):
        length = min(max(effort.first, done), effort.most - done)
        reader.train()
        recent: list[torch.Tensor] = []
        for step in range(length):
            for group in optimizer.param_groups:
                group["lr"] = effort.lr * annealed(step, length)
            picks = next(batches)
            picks = [shown(row, random) for row in picks] if effort.points else picks
            recent.append(_step(reader, own, picks, own.noise(done + step + 1), optimizer))
            if own.mechanism is None and step + 1 == length // 2:
                mine = float(torch.stack(recent[-(length // 4 or 1) :]).mean())
                halves.append(Half(done + step + 1, _held_out(reader.eval(), own, held)[0], mine))
                if _by_heart(halves, effort.enough):
                    return
                reader.train()
        reader.eval()
        done += length
        last, stage = stage, _stage(reader, own, held, observation, effort, before + done)
        yield stage


def shown(row: Sample, random: np.random.Generator) -> Sample:
    """Half of the rows as they are; of the others a random share of the hidden tokens is clean."""
    share = max(0.0, random.uniform(-1.0, 1.0))
    return row._replace(obfuscate=row.obfuscate & (random.random(len(row.ids)) >= share))


def _step(
    reader: Reader, own: OwnText, rows: Sequence[Sample], noise: int, optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    """One update, in as few pieces as fit in memory: a small one takes as many calls as a large one. Its loss, nats a
    token."""
    total = max(1, sum(int(row.obfuscate.sum()) for row in rows))
    found = torch.zeros((), device=own.table_VD.device)
    optimizer.zero_grad(set_to_none=True)
    # By length, so that little is padding.
    for i, part in enumerate(batched(sorted(rows, key=lambda row: len(row.ids)), len(own.table_VD), len(rows))):
        batch, x_BTD = own.again(part, (noise << 8) + i)
        loss = torch.stack([loss_N.sum() for loss_N in losses(reader, batch, x_BTD)]).sum() / total
        loss.backward()
        found += loss.detach()
    nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
    optimizer.step()
    return found


def annealed(step: int, steps: int) -> float:
    """Warm-up over a twentieth of a cycle, then a cosine to zero."""
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))))


def losses(reader: Reader, batch: Padded, x_BTD: torch.Tensor | None) -> list[torch.Tensor]:
    """Nats of every hidden token (N,), by the encoder and, where there is one, by the decoder."""
    hidden_BT = batch.obfuscate_BT & batch.valid_BT
    target_N, x_ND = batch.tokens_BT[hidden_BT], None if x_BTD is None else x_BTD[hidden_BT]
    h_BTH = reader.encode(x_BTD, batch.tokens_BT, hidden_BT, batch.valid_BT)
    found = [reader.nats(h_BTH, x_ND, batch.tokens_BT, hidden_BT, batch.valid_BT)]
    if reader.decoder is not None:
        g_BTG = reader.decode(h_BTH, before(batch.tokens_BT))
        logits_NV = reader.following(g_BTG[hidden_BT], x_ND)
        found.append(nn.functional.cross_entropy(logits_NV, target_N, reduction="none"))
    return found


def before(tokens_BT: torch.Tensor) -> torch.Tensor:
    """The token before each position; -1 before the first."""
    return nn.functional.pad(tokens_BT, (1, -1), value=-1)


def _settled(last: Stage, stage: Stage, enough: float = SETTLED_LOSS) -> bool:
    return last.loss - stage.loss < enough * max(last.loss, 1.0) and stage.share - last.share < SETTLED_SHARE


def _by_heart(halves: Sequence[Half], enough: float) -> bool:
    """Half way through this cycle he has learnt of his own text what he lacked half way through the one before, and
    next to nothing that holds elsewhere."""
    if len(halves) < 2:
        return False
    last, half = halves[-2:]
    held, own = (max(before, 1.0) for before in (last.loss, last.own))
    return last.loss - half.loss < enough * held and last.own - half.own > BY_HEART * own


def _verdict(stages: Sequence[Stage], halves: Sequence[Half], enough: float = SETTLED_LOSS) -> str:
    """What the last doubling brought."""
    if halves and halves[-1].steps > stages[-1].steps:
        earlier, half = halves[-2:]
        return (
            f"ended before its budget, since it learnt its own text by heart: from {earlier.steps} to {half.steps} "
            f"steps, each half way through a cycle, its loss on that fell from {earlier.own:.3f} to {half.own:.3f} "
            f"nats, on text kept aside from {earlier.loss:.3f} to {half.loss:.3f}; with more public text it reads more"
        )
    last, stage = stages[-2], stages[-1]
    change = (
        f"going from {last.steps} to {stage.steps} steps changed its loss on text kept aside by "
        f"{stage.loss - last.loss:+.3f} nats and its reading by {100 * (stage.share - last.share):+.1f} points"
    )
    if stage.loss > last.loss + SETTLED_LOSS * max(last.loss, 1.0):
        return f"has not converged but learnt its own text by heart: {change}; with more public text it reads more"
    ended = last.steps > stages[0].steps
    if ended and _settled(last, stage, min(enough, SETTLED_LOSS)):
        return f"{CONVERGED}: {change}"
    if ended and _settled(last, stage, enough):
        return f"ended before its budget, since a doubling read no more: {change}"
    return f"has not converged within its budget: {change}; a longer training reads more"


# -- reading -----------------------------------------------------------------------------------------------------------


def _stage(
    reader: Reader, own: OwnText, held: Sequence[Sample], observation: Observation | Unseen, effort: Effort, steps: int
) -> Stage:
    loss, share = _held_out(reader, own, held)
    logger.info("sequence: step %d, held-out loss %.3f, top-1 %.1f%%", steps, loss, 100 * share)
    return Stage(steps, loss, share, _guesses(reader, observation, effort.beams))


@torch.no_grad()
def _held_out(reader: Reader, own: OwnText, held: Sequence[Sample]) -> tuple[float, float]:
    """Nats a token, and top-1, on text kept aside."""
    loss, right, count = 0.0, 0, 0
    for i, part in enumerate(batched(held, len(own.table_VD))):
        batch, x_BTD = own.batch(part, own.noise((1 << 30) + i))
        hidden_BT = batch.obfuscate_BT & batch.valid_BT
        target_N, x_ND = batch.tokens_BT[hidden_BT], None if x_BTD is None else x_BTD[hidden_BT]
        h_BTH = reader.encode(x_BTD, batch.tokens_BT, hidden_BT, batch.valid_BT)
        if reader.decoder is None:
            logits_NV = reader.posterior(h_BTH, x_ND, batch.tokens_BT, hidden_BT, batch.valid_BT)
        else:
            logits_NV = reader.following(reader.decode(h_BTH, before(batch.tokens_BT))[hidden_BT], x_ND)
        loss += nn.functional.cross_entropy(logits_NV, target_N, reduction="sum").item()
        right += int((logits_NV.argmax(-1) == target_N).sum())
        count += len(target_N)
    return loss / count, right / count


@torch.no_grad()
def _guesses(reader: Reader, observation: Observation | Unseen, beams: int) -> torch.Tensor:
    """The ten most probable tokens at every hidden position, (N, 10) on the CPU."""
    found: list[torch.Tensor] = []
    numbers = 3.0 * max(beams, 1) * len(reader.rows_VD)
    for part in beam.groups(len(observation.hidden), numbers):
        tokens_BT, hidden_BT, valid_BT, x_BTD = _together(observation, part, reader.rows_VD.device)
        h_BTH = reader.encode(x_BTD, tokens_BT, hidden_BT, valid_BT)
        if reader.decoder is None:
            found += _marginals(reader, h_BTH, x_BTD, tokens_BT, hidden_BT, valid_BT)
        else:
            paths = beam.search(None, observation.tokens[part], _Decoding(reader, h_BTH, x_BTD), beams=beams)
            found += [path.guesses_TK[h] for path, h in zip(paths, observation.hidden[part], strict=True)]
    return torch.cat(found)


def _together(
    observation: Observation | Unseen, part: slice, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Some prompts padded on the right, (B, T) each: tokens, where they are hidden, where there are any; and what was
    sent, (B, T, D)."""
    tokens = [tokens_T.to(device) for tokens_T in observation.tokens[part]]
    tokens_BT = pad_sequence(tokens, batch_first=True)
    hidden_BT = pad_sequence([h.to(device) for h in observation.hidden[part]], batch_first=True)
    valid_BT = pad_sequence([torch.ones_like(t, dtype=torch.bool) for t in tokens], batch_first=True)
    if not isinstance(observation, Observation):
        return tokens_BT, hidden_BT, valid_BT, None
    sent = [x_TD.float().to(device) for x_TD in observation.x_tilde[part]]
    return tokens_BT, hidden_BT, valid_BT, pad_sequence(sent, batch_first=True)


def _marginals(
    reader: Reader,
    h_BTH: torch.Tensor,
    x_BTD: torch.Tensor | None,
    tokens_BT: torch.Tensor,
    hidden_BT: torch.Tensor,
    valid_BT: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """Guesses at the hidden positions in their order, by chunks."""
    for part_C2 in hidden_BT.nonzero().split(CHUNK):
        asked_BT = torch.zeros_like(hidden_BT)
        asked_BT[part_C2[:, 0], part_C2[:, 1]] = True
        x_CD = None if x_BTD is None else x_BTD[asked_BT]
        logits_CV = reader.posterior(h_BTH, x_CD, tokens_BT, hidden_BT, valid_BT, asked_BT)
        yield logits_CV.topk(min(GUESSES, logits_CV.shape[1])).indices.cpu()


class _Decoding:
    """``beam.Emission`` of a decoder: log p(token | what was sent, the lane's prefix), one cached step a position."""

    def __init__(self, reader: Reader, h_PTH: torch.Tensor, x_PTD: torch.Tensor | None, candidates: int = GUESSES):
        assert reader.decoder is not None, "this reader goes both ways alone"
        self.reader, self.h_PTH, self.x_PTD, self.candidates = reader, h_PTH, x_PTD, candidates
        self.cache = DynamicCache(config=reader.decoder.config)
        self.previous_L: torch.Tensor | None = None  # the token before; none before the first
        self.log_LV = h_PTH.new_zeros(1, 0)
        self.done = 0  # positions that are in the cache

    def _step(self, t: int, row_L: torch.Tensor) -> torch.Tensor:
        self.done += 1
        previous_L = torch.full_like(row_L, UNKNOWN) if self.previous_L is None else self.previous_L
        return self.reader.decode(self.h_PTH[row_L, t, None], previous_L[:, None], cache=self.cache)[:, 0]

    def shortlist(self, t: int, row_L: torch.Tensor, log_prior_LV: torch.Tensor) -> torch.Tensor:
        x_LD = None if self.x_PTD is None else self.x_PTD[row_L, t]
        self.log_LV = torch.log_softmax(self.reader.following(self._step(t, row_L), x_LD), -1)
        return self.log_LV.topk(min(self.candidates, self.log_LV.shape[1])).indices

    def score(self, t: int, row_L: torch.Tensor, tokens_LC: torch.Tensor) -> torch.Tensor:
        return self.log_LV.gather(1, tokens_LC).double()

    def advance(self, t: int, row_L: torch.Tensor, parent_M: torch.Tensor, token_M: torch.Tensor) -> None:
        if self.done == t:  # clean tokens: nothing was asked about them
            self._step(t, row_L)
        beam.select(self.cache, parent_M)
        self.previous_L = token_M


def unsent_cost(size: Size, **effort: Any) -> Cost:
    """Of one who obfuscates nothing."""
    return cost(replace(size, transform=0), **effort)


def answered_cost(size: Size, **effort: Any) -> Cost:
    """The same with answers behind the prompts."""
    return unsent_cost(replace(size, longest=max(size.longest, size.answered)), **effort)


def cost(size: Size, *, times: int = 1, fresh: int = 0, after: Mapping[str, Any] | None = None, **effort: Any) -> Cost:
    """Of the whole budget; a training that settles earlier costs less. What it goes on from is another attack's."""
    mine = Effort(**effort)
    layers, width, beams = mine.layers, mine.width, mine.beams
    body = 12.0 * layers * width**2
    decoder = (size.trunk + size.vocab * size.width if mine.from_trunk else body) if beams else 0.0
    table = size.vocab * size.width
    tokens = mine.batch_rows * size.longest
    step = tokens * (
        6.0 * (body + decoder)
        + 8.0 * table * (2 if beams else 1)
        + 2.0 * (fresh or times) * (size.transform - size.estimator + size.width)  # moments are found once
    )
    read = 8.0 * size.tokens * 2.0 * (body + decoder * max(beams, 1) + table * max(beams, 1))
    part = min(tokens, max(2 * size.longest, LOGIT_BUDGET // size.vocab))
    memory = 16.0 * part * size.vocab + 16.0 * (body + decoder + size.vocab) + 12.0 * table
    memory += 64.0 * part * (layers * width + (size.width if mine.from_trunk else 0))
    memory += KEPT_BYTES * ((size.transform > 0) + (fresh > 0))
    cycles = 2 + math.ceil(math.log2(max(1.0, mine.most / mine.first)))
    searched = cycles * len(beam.groups(size.rows, 3.0 * beams * size.vocab)) * size.longest if beams else 0
    return Cost(mine.most * step + read, memory, steps=searched)

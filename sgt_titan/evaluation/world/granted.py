"""The prompts under attack and all that an attacker could be granted; hands an attack what its type asks for.

The only place where true tokens and attacks meet. Legend: B batch, T sequence, D width, N hidden tokens flat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from transformers import PreTrainedModel

from sgt_titan.data.order import hash64
from sgt_titan.evaluation.world.checkpoints import in_memory
from sgt_titan.evaluation.world.mechanisms import Mechanism, Rotation
from sgt_titan.evaluation.world.samples import Sample, batched, embedding_table, generator, padded
from sgt_titan.evaluation.world.threat import (
    UNKNOWN,
    Answered,
    Checkpoints,
    Corpus,
    Guess,
    KnownPairs,
    Noisy,
    Observation,
    Prior,
    Public,
    Repeats,
    Seed,
    Served,
    Size,
    Table,
    Transform,
    Trunk,
    Unseen,
    WithoutSecret,
    grants,
)
from sgt_titan.metrics.table import NearDuplicates, near_duplicates

KNOWN_TOKENS = 65_536  # pairs that are drawn when an attack asks for pairs; its effort says how many it uses
MAX_REPEATS = 1024


@dataclass(frozen=True)
class World:
    """rows: the prompts under attack, cut before the response, which stands beside them where it is known: scores tell
    apart what it repeats. corpus: other rows, public. seed: of all randomness. checkpoints: of what attackers train
    here."""

    rows: Sequence[Sample] = field(repr=False)
    corpus: Sequence[Sample] = field(repr=False)
    mechanism: Mechanism
    trunk: PreTrainedModel = field(repr=False)
    seed: int = 0
    checkpoints: Checkpoints = field(default_factory=in_memory, repr=False)

    @cached_property
    def table_VD(self) -> torch.Tensor:
        return embedding_table(self.trunk).float()

    @property
    def rotation(self) -> Rotation:
        if self.mechanism.rotation is None:
            raise ValueError(f"{self.mechanism.name} is no rotation: an attack on rotated weights has nothing to see")
        return self.mechanism.rotation

    @cached_property
    def public_VD(self) -> torch.Tensor:
        """The table that attackers have: the trunk's own, unless that was fine-tuned in private before a rotation."""
        if self.mechanism.rotation is None:
            return self.table_VD
        return self.rotation.public.embedding_table().float().to(self.trunk.device)

    @cached_property
    def groups(self) -> NearDuplicates:
        """Rows of the table that nobody can tell apart."""
        return _groups(self.trunk)

    @cached_property
    def truth_N(self) -> torch.Tensor:
        """True tokens of the hidden positions, int64 on the CPU."""
        return torch.cat([torch.from_numpy(row.ids[row.obfuscate]) for row in self.rows])

    @cached_property
    def size(self) -> Size:
        def parameters(model: torch.nn.Module | None) -> int:
            if model is None:
                return 0
            tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
            return sum(p.numel() for p in model.parameters() if id(p) not in tables)

        V, D = self.table_VD.shape
        denoiser = None if self.mechanism.transform is None else self.mechanism.transform.denoiser
        return Size(
            rows=len(self.rows),
            tokens=len(self.truth_N),
            longest=max(len(row.ids) for row in self.rows),
            width=D,
            vocab=V,
            trunk=parameters(self.trunk),
            transform=parameters(self.mechanism.transform),
            estimator=parameters(self.mechanism.transform) - parameters(denoiser),
            answered=max(len(row.ids) + len(row.answer) for row in self.rows),
        )

    @cached_property
    def observation(self) -> Observation:
        return observe(self.rows, self.mechanism, self.trunk, self._noise(0))

    @cached_property
    def repeats_itself(self) -> bool:
        """The same prompts are sent as the same bytes: a mean of repeats says no more than one of them."""
        return self.observation.same_bytes(observe(self.rows, self.mechanism, self.trunk, self._noise(1)))

    @cached_property
    def pairs(self) -> KnownPairs:
        """The same for every attack that asks."""
        return known_pairs(self.corpus, self.mechanism, self.trunk, self._noise(-1))

    def granted(self, attack: Callable[..., Guess]) -> dict[str, Any]:
        """The arguments an attack's type asks for, and no more."""
        make: dict[type, Callable[[], Any]] = {
            Observation: lambda: self.observation,
            Noisy: lambda: observe(self.rows, self.mechanism, self.trunk, self._noise(0), kind=Noisy),
            Unseen: lambda: Unseen(*unseen(self.rows)),
            Answered: lambda: Answered(*unseen([row.answered() for row in self.rows])),
            Repeats: lambda: Repeats(
                MAX_REPEATS, lambda k: observe(self.rows, self.mechanism, self.trunk, self._noise(1 + k))
            ),
            KnownPairs: lambda: self.pairs,
            Table: lambda: Table(self.public_VD),
            Trunk: lambda: Trunk(self.trunk),
            Prior: lambda: Prior(self.trunk),
            Corpus: lambda: Corpus(self.corpus),
            Transform: lambda: Transform(self.mechanism),
            Served: lambda: Served(self.rotation.served),
            Public: lambda: Public(self.rotation.public),
            WithoutSecret: lambda: WithoutSecret(self.rotation.before),
            Checkpoints: lambda: self.checkpoints,
            Seed: lambda: Seed(self.seed),
        }
        return {name: make[kind]() for name, kind in grants(attack).items()}

    def _noise(self, index: int) -> torch.Generator:
        """The k-th obfuscation of every prompt; -1: of the known ones. Different numbers give unrelated noise."""
        return generator(hash64("evaluation", self.seed, index) >> 1, self.trunk.device)


@lru_cache(maxsize=2)
def _groups(trunk: PreTrainedModel) -> NearDuplicates:
    """Once for all worlds of a trunk."""
    return near_duplicates(embedding_table(trunk))


@torch.no_grad()
def observe(
    rows: Sequence[Sample],
    mechanism: Mechanism,
    trunk: PreTrainedModel,
    random: torch.Generator,
    *,
    kind: type[Observation] = Observation,
) -> Observation:
    """Obfuscate every row once. ``kind`` Noisy: z instead of what is sent."""
    x_tilde, vocab = [], embedding_table(trunk).shape[0]
    for part in batched(rows, vocab):
        batch = padded(part, 0, trunk.device)
        sent = mechanism.obfuscate(batch, trunk.get_input_embeddings()(batch.tokens_BT), random)
        seen_BTD = sent.noisy_BTD if kind is Noisy else sent.x_tilde_BTD
        x_tilde += [seen_BTD[b, : len(row.ids)].float() for b, row in enumerate(part)]
    return kind(tuple(x_tilde), *unseen(rows))


def unseen(rows: Sequence[Sample]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Of each row where it is hidden (T,) bool, and its ids (T,) int64, UNKNOWN there."""
    hidden = tuple(torch.from_numpy(row.obfuscate) for row in rows)
    return hidden, tuple(
        torch.from_numpy(row.ids).masked_fill(hidden_T, UNKNOWN) for row, hidden_T in zip(rows, hidden, strict=True)
    )


def known_pairs(
    corpus: Sequence[Sample], mechanism: Mechanism, trunk: PreTrainedModel, random: torch.Generator
) -> KnownPairs:
    """One obfuscation each of the first rows of the corpus, up to ``KNOWN_TOKENS`` hidden tokens."""
    count, chosen = 0, []
    for row in corpus:
        if count >= KNOWN_TOKENS:
            break
        chosen.append(row)
        count += int(row.obfuscate.sum())
    seen = observe(chosen, mechanism, trunk, random)
    tokens = torch.cat([torch.from_numpy(row.ids[row.obfuscate]) for row in chosen])
    return KnownPairs(seen.x_tilde_ND[:KNOWN_TOKENS], tokens[:KNOWN_TOKENS], seen.row_N[:KNOWN_TOKENS])

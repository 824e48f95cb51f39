"""What an attacker is granted. An attack's parameters are of these types, and that is its whole threat model.

    def attack(observation: Observation, table: Table, pairs: KnownPairs, *, ridge: float = 1e-3) -> Guess: ...

sees one obfuscation of each prompt, the public embedding table and some known pairs, and nothing else: the runner reads
the types off the signature (``grants``) and hands over exactly these. Keyword-only parameters are its effort, set by
the suite. Nothing here holds the true tokens of the prompts under attack; scoring them is ``scores/recovery.py``.

Legend: B rows (prompts), T tokens of a row, D width, V vocabulary, N hidden tokens of all rows flat, in order of rows
and positions; M known tokens, K guesses per token.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import PreTrainedModel

from sgt_titan.evaluation.world.mechanisms import Mechanism
from sgt_titan.evaluation.world.samples import Sample
from sgt_titan.transform.trunk_files import TrunkFiles

UNKNOWN = -1


@dataclass(frozen=True)
class Observation:
    """What the server receives: each prompt's embeddings, cut where the response begins.

    x_tilde: (T, D) float32 each, on the device of the trunk. hidden: (T,) bool, true where obfuscated; a server can
    tell, since a clean position is exactly a row of its table. tokens: (T,) int64, the id at clean positions, UNKNOWN
    at hidden ones. Hidden are the positions the client means to protect, whatever a mechanism makes of them.
    """

    title: typing.ClassVar[str] = "one obfuscation of each prompt"
    x_tilde: tuple[torch.Tensor, ...]
    hidden: tuple[torch.Tensor, ...]
    tokens: tuple[torch.Tensor, ...]

    @cached_property
    def x_tilde_ND(self) -> torch.Tensor:
        """The hidden positions of all rows."""
        return torch.cat([x_TD[hidden_T] for x_TD, hidden_T in zip(self.x_tilde, self.hidden, strict=True)])

    @cached_property
    def row_N(self) -> torch.Tensor:
        """Row of each hidden position, int64."""
        return torch.cat([torch.full((int(h.sum()),), b, dtype=torch.int64) for b, h in enumerate(self.hidden)])

    def same_bytes(self, other: Observation) -> bool:
        """Of the same prompts: nothing in it is other than in this one."""
        return all(torch.equal(a_TD, b_TD) for a_TD, b_TD in zip(self.x_tilde, other.x_tilde, strict=True))


@dataclass(frozen=True)
class Noisy(Observation):
    """The same with z in the place of x~: what the client's denoiser was given. Nobody but the client has it; whoever
    could undo the denoiser would. Whatever is read from it bounds what this kind of attack could read of x~."""

    title: typing.ClassVar[str] = "z: each prompt's noisy embeddings before the client's denoiser, which are never sent"


@dataclass(frozen=True)
class Unseen:
    """The prompts without the embeddings: where something is hidden, and the clean tokens around it.

    hidden, tokens: as of an Observation. What is guessed from this is no leak of the mechanism.
    """

    title: typing.ClassVar[str] = "nothing of what was sent but where it is hidden, and the clean tokens around it"
    hidden: tuple[torch.Tensor, ...]
    tokens: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Answered(Unseen):
    """The same with each prompt's true answer behind it, as clean tokens. Whoever makes the answer, or reads it, has
    this: what follows from it is given up by every mechanism that keeps the answer, whatever it sends."""

    title: typing.ClassVar[str] = "the clean answer to each prompt, and nothing of what was sent"


@dataclass(frozen=True)
class Repeats:
    """The same prompts sent again, each time with new noise. Draws lazily; ``limit`` at most."""

    title: typing.ClassVar[str] = "K obfuscations of each prompt"
    limit: int
    draw: Callable[[int], Observation] = field(repr=False)  # the k-th, the same k gives the same noise

    def __iter__(self) -> Iterator[Observation]:
        return (self.draw(k) for k in range(self.limit))


@dataclass(frozen=True)
class KnownPairs:
    """Tokens of other prompts of the same kind that the attacker knows or chose, with their obfuscations.

    x_tilde_MD float32, tokens_M int64, row_M int64 (the known prompt each belongs to).
    """

    title: typing.ClassVar[str] = "m known (token, obfuscation) pairs"
    x_tilde_MD: torch.Tensor
    tokens_M: torch.Tensor
    row_M: torch.Tensor


@dataclass(frozen=True)
class Table:
    """The trunk's embedding table (V, D) float32: public for an open model."""

    title: typing.ClassVar[str] = "the embedding table"
    rows_VD: torch.Tensor


@dataclass(frozen=True)
class Trunk:
    """The trunk itself, as the server runs it: a transformers causal LM, frozen."""

    title: typing.ClassVar[str] = "the trunk"
    model: PreTrainedModel


@dataclass(frozen=True)
class Prior:
    """A language model over the same tokens. Here the trunk: the server has it, and it knows the language."""

    title: typing.ClassVar[str] = "a language prior"
    model: PreTrainedModel


@dataclass(frozen=True)
class Corpus:
    """Public text of the same kind as the prompts, with its answers: the rows that training could use, none of those
    under attack."""

    title: typing.ClassVar[str] = "public text of the same kind"
    rows: Sequence[Sample] = field(repr=False)


@dataclass(frozen=True)
class Transform:
    """The obfuscation itself with its weights: anyone with the client has it. It can be sampled without limit."""

    title: typing.ClassVar[str] = "the SGT and its weights"
    mechanism: Mechanism


@dataclass(frozen=True)
class Served:
    """The weights that the server runs, in the secret basis; server and client of a rotation know no others."""

    title: typing.ClassVar[str] = "the rotated weights"
    files: TrunkFiles = field(repr=False)


@dataclass(frozen=True)
class Public:
    """The public checkpoint that the rotated one was made from (before any fine-tuning that was kept private)."""

    title: typing.ClassVar[str] = "the public checkpoint"
    files: TrunkFiles = field(repr=False)


@dataclass(frozen=True)
class WithoutSecret:
    """What happens to embeddings before they are rotated: an SGT with its weights, or nothing. Not the secret."""

    title: typing.ClassVar[str] = "the SGT and its weights, not the secret"
    mechanism: Mechanism


@dataclass(frozen=True)
class Checkpoints:
    """Networks that were trained in this world before, for attacks that go on from them: they save time and tell
    nothing, since all that one was made from is granted beside it.

    once(name, effort, train): what ``train`` returns, which is asked once for an attack's name and its effort.
    """

    title: typing.ClassVar[str] = ""
    once: Callable[[str, Mapping[str, typing.Any], Callable[[], Guess]], Guess] = field(repr=False)


@dataclass(frozen=True)
class Seed:
    """Decides an attack's own randomness."""

    title: typing.ClassVar[str] = ""
    value: int


Grant = (
    Observation
    | Noisy
    | Unseen
    | Answered
    | Repeats
    | KnownPairs
    | Table
    | Trunk
    | Prior
    | Corpus
    | Transform
    | Served
    | Public
    | WithoutSecret
    | Checkpoints
    | Seed
)


@dataclass(frozen=True)
class Curve:
    """Guesses along an axis: known pairs, repeats, training steps. ``top_N`` int64 each, the best guess per token.

    extra: one further number per point, such as the attacker's own held-out loss, with its label.
    """

    axis: str
    at: tuple[float, ...]
    top_N: tuple[torch.Tensor, ...]
    extra: tuple[float, ...] = ()
    extra_label: str = ""


@dataclass(frozen=True)
class Guess:
    """What an attack reads.

    top_NK: int64 (N, K), K <= 10, best first, on the CPU; UNKNOWN where it has nothing to say. flops: spent, roughly
    (2 per multiply-add); 0: not worth stating. notes: what a reader must know (has not converged, noise was estimated).
    weights: of the network that read, where an attack may go on from it.
    """

    top_NK: torch.Tensor
    curve: Curve | None = None
    flops: float = 0.0
    notes: tuple[str, ...] = ()
    weights: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)


def grants(attack: Callable[..., Guess]) -> dict[str, typing.Any]:
    """Parameter -> grant, from an attack's signature: its threat model.

    Raises TypeError for a positional parameter that is no grant.
    """
    hints = typing.get_type_hints(attack)
    found = {}
    for name, parameter in inspect.signature(attack).parameters.items():
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            continue
        if hints.get(name) not in typing.get_args(Grant):
            raise TypeError(f"{attack.__module__}.{attack.__name__}: {name} is no grant of threat.py")
        found[name] = hints[name]
    return found


# An attack's threat model as a report groups it. ``guess`` sees nothing, ``answer`` the answer alone, ``single`` what
# is sent once, ``repeats`` the same prompt with fresh noise as often as it likes, ``noisy`` what the denoiser was given
# and nobody sends.
KINDS = ("guess", "answer", "single", "repeats", "noisy")


def kind_of(attack: Callable[..., Guess]) -> str:
    """One of ``KINDS``, from what the attack is granted."""
    granted = set(grants(attack).values())
    for kind, grant in (("repeats", Repeats), ("noisy", Noisy), ("answer", Answered), ("guess", Unseen)):
        if grant in granted:
            return kind
    return "single"


@dataclass(frozen=True)
class Size:
    """What the cost of an attack depends on. rows: prompts; tokens: hidden ones of all rows; longest: tokens of the
    longest row; answered: of the longest with its answer; width, vocab: of the table; trunk, transform: parameters
    without embedding tables; estimator: of the transform's without its denoiser."""

    rows: int
    tokens: int
    longest: int
    width: int
    vocab: int
    trunk: int
    transform: int
    answered: int = 0
    estimator: int = 0


@dataclass(frozen=True)
class Cost:
    """An estimate before anything runs: floating-point operations, and bytes at the peak beside trunk and SGT.

    What no product of matrices is counts for itself. steps: cached positions of a search side by side. numbers: float64
    numbers that a pass over them reads.
    """

    flops: float
    bytes: float
    steps: float = 0.0
    numbers: float = 0.0

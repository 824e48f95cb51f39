"""The transform with its tokenizer: a prompt goes in, the embeddings that leave the machine come out.

Shapes: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sgt_titan import transform
from sgt_titan.client.int8 import quantize
from sgt_titan.client.noise import HeldNoise, held_key
from sgt_titan.client.private import hide
from sgt_titan.client.prompt import Message, Prompt, Rendering, check_size, make_prompt
from sgt_titan.client.template_check import check_template
from sgt_titan.errors import UserError
from sgt_titan.private import Conversation
from sgt_titan.transform.fingerprint import check_tokenizer_fingerprint, fingerprint_tensor
from sgt_titan.transform.gaussian import secure_noise
from sgt_titan.transform.tokenizer import check_ids_fingerprint, load_tokenizer
from sgt_titan.transform.trunk_files import TrunkFiles

PIECE = 2048
_SEED_WARNING = (
    "a fixed seed repeats the noise: whoever learns or guesses it can subtract the noise, and reusing it across "
    "prompts ties them together; leave it out except in tests"
)


class Abandoned(Exception):
    """Nobody waits for it any more."""


class StainedGlassTransform(transform.ExportedTransform):
    """An exported transform with tokenizer and embedding table."""

    tokenizer: PreTrainedTokenizerBase
    embed_tokens: nn.Embedding
    held_noise: HeldNoise | None
    piece: int

    @classmethod
    def from_pretrained(  # type: ignore[override]  # what else transformers takes goes through kwargs
        cls,
        path: str | os.PathLike,
        *args: Any,
        trunk: str | os.PathLike | None = None,
        weights: Literal["stored", "float32", "bfloat16", "int8"] = "stored",
        hold_noise: bool = True,
        noise_key: str | os.PathLike | None = None,
        piece: int = PIECE,
        **kwargs: Any,
    ) -> Self:
        """The transform in an export directory, ready to encode.

        Args:
            path: directory of an export.
            trunk: checkpoint directory of the trunk, for an export without an embedding table; only the table is read.
            weights: type of the estimator's weights in memory. int8: the bodies' linear layers, by rows;
                docs/SERVING.md has what each does to mean and std.
            hold_noise: the same prompt, and a shared beginning, keeps its noise (see noise.py). False: fresh noise with
                every call; the server can average what is sent twice, and a client's retry is such a case.
            noise_key: file with the key of held noise, made (mode 0600) if there is none; without it
                SGT_TITAN_NOISE_KEY, and else a key that lives as long as this process, with a warning.
            piece: tokens that go through the estimator at a time; longer prompts are streamed through its cache.
            kwargs: as ``PreTrainedModel.from_pretrained`` (``device_map``, ``attn_implementation``).

        Raises:
            UserError: not an export, damaged, changed by hand, NaN weights; another tokenizer or table than it was
                trained with; no table here and none given; a noise key that is none or that others may read.
        """
        if weights not in ("stored", "float32", "bfloat16", "int8"):
            raise UserError(f"weights: {weights!r}, must be stored, float32, bfloat16 or int8")
        if piece < 1:
            raise UserError(f"piece: {piece}, must be at least 1")
        if noise_key is not None and not hold_noise:
            raise UserError("noise_key: a key is given, but hold_noise is off; choose one")
        directory = Path(path)
        if not directory.is_dir():
            raise UserError(f"{path}: no such directory; give the directory of an export")
        if weights in ("float32", "bfloat16"):
            kwargs["dtype"] = getattr(torch, weights)
        loaded: Any = super().from_pretrained(directory, *args, **kwargs | {"output_loading_info": True})
        model: Self = loaded[0]
        model.tokenizer = _load_tokenizer(directory, model.config)
        model.piece = piece
        if not model.config.embeddings:
            model.embed_tokens = _table(model.config, trunk).to(model.device)
        if weights == "int8":
            quantize(model.bodies)
            if model.denoiser is not None:
                quantize(model.denoiser.body)
        model.eval().requires_grad_(False)
        model.held_noise = _held_noise(model, weights, noise_key) if hold_noise else None
        return loaded if kwargs.get("output_loading_info") else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what is in memory (a table from the trunk, int8 weights, no tokenizer files) is no export.

        Raises:
            UserError: always, with what to do instead.
        """
        raise UserError("save_pretrained: copy the export's directory instead; what is loaded here is not all of it")

    @property
    def limit(self) -> int | None:
        """The most tokens of a prompt and its answer: what the trunk was made for."""
        return self.config.trunk_config.get("max_position_embeddings")

    def prompt(
        self,
        what: str | Sequence[Message] | Sequence[int] | Prompt,
        *,
        tools: Sequence[dict[str, Any]] = (),
        arguments: Mapping[str, Any] | None = None,
        continued: bool = False,
        most: int | None = None,
    ) -> Prompt:
        """Token ids and mask of text, messages or token ids.

        ``tools``, ``arguments`` (of the chat template) and ``continued`` (the last turn is to be gone on with): of
        messages. ``most``: tokens, where less than the trunk takes is wanted. Raises UserError as ``make_prompt``.
        """
        if isinstance(what, Prompt):
            return what
        limit = min((n for n in (most, self.limit) if n is not None), default=None)
        rendering = Rendering(tools, arguments or {}, continued)
        return make_prompt(self.tokenizer, self.config, what, rendering=rendering, limit=limit)

    def check_size(self, what: Any, *, tools: Any = (), most: int | None = None) -> None:
        """Raise TooLong (a UserError) for a prompt that cannot fit whatever its tokens are; no work is done on it."""
        check_size(self.tokenizer, what, min((n for n in (most, self.limit) if n is not None), default=None), tools)

    def encode(
        self,
        what: str | Sequence[Message] | Sequence[int] | Prompt,
        *,
        tools: Sequence[dict[str, Any]] = (),
        private: Conversation | None = None,
        seed: int | None = None,
        gone: Callable[[], bool] = lambda: False,
    ) -> torch.Tensor:
        """What may leave the machine for this prompt: ``(T, D)`` in the embedding table's dtype, on the CPU.

        Positions outside the trained mask (template and special tokens) are the trunk's clean embeddings. Noise is
        held: the same prompt gives the same embeddings. With ``hold_noise=False`` it comes from the operating system
        and differs with every call; ``seed`` is for tests and warns. ``private``: private values of text or messages
        become this conversation's surrogates before anything else (client/private.py puts them back). ``gone`` is asked
        before every piece: whether nobody waits for the result any more.

        Raises:
            UserError: empty or over-long prompt, unknown role, tools the template cannot render, invalid Unicode.
            Abandoned: ``gone`` said so.
        """
        if private is not None:
            what = hide(private, what)[0]
        pieces = []
        for piece in self.encode_pieces(what, tools=tools, seed=seed):
            pieces.append(piece)
            if gone():
                raise Abandoned
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def encode_batch(
        self, many: Iterable[str | Sequence[Message] | Sequence[int] | Prompt], *, seed: int | None = None
    ) -> list[torch.Tensor]:
        """``encode`` of several prompts in one pass, right-padded inside; one ``(T_i, D)`` each.

        With ``seed`` the i-th prompt gets ``seed + i``, so that a batch is what its prompts are alone. Raises UserError
        as ``encode``.
        """
        prompts = [self.prompt(what) for what in many]
        if not prompts:
            return []
        if seed is not None:
            warnings.warn(_SEED_WARNING, stacklevel=2)
        longest = max(map(len, prompts))
        ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
        real_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(prompt)] = torch.tensor(prompt.ids)
            real_BT[row, : len(prompt)] = 1
        eps_BTD = torch.zeros(*ids_BT.shape, self.config.hidden_size)
        mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            eps_BTD[row, : len(prompt)] = self._noise(prompt, None if seed is None else seed + row)
            mask_BT[row, : len(prompt)] = torch.from_numpy(prompt.mask)
        sent_BTD = self._sent(ids_BT, mask_BT, eps_BTD, attention_mask=real_BT.to(self.device))
        # Copies: a view would carry the other prompts of the batch wherever it is saved.
        return [sent_BTD[row, : len(prompt)].clone() for row, prompt in enumerate(prompts)]

    def encode_pieces(
        self,
        what: str | Sequence[Message] | Sequence[int] | Prompt,
        *,
        tools: Sequence[dict[str, Any]] = (),
        seed: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """``encode`` in pieces of at most ``piece`` tokens, each when it is ready; causal, so equal to one pass."""
        prompt = self.prompt(what, tools=tools)
        if seed is not None:
            warnings.warn(_SEED_WARNING, stacklevel=2)
        eps_TD = self._noise(prompt, seed)
        caches = self.new_caches() if len(prompt) > self.piece else None
        ids_BT, mask_BT = torch.tensor([prompt.ids]), torch.from_numpy(prompt.mask)[None]
        for start in range(0, len(prompt), self.piece):
            part = slice(start, start + self.piece)
            yield self._sent(ids_BT[:, part], mask_BT[:, part], eps_TD[None, part], past_key_values=caches)[0]

    def _sent(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, eps_BTD: torch.Tensor, **options: Any) -> torch.Tensor:
        """What may leave the machine, ``(B, T, D)`` on the CPU: the one place where the client runs the transform."""
        # Not around a yield: the mode would leak into the caller's code.
        with torch.inference_mode():
            return self.transform(ids_BT.to(self.device), mask_BT, noise_BTD=eps_BTD, **options).cpu()

    def _noise(self, prompt: Prompt, seed: int | None) -> torch.Tensor:
        width = self.config.hidden_size
        if seed is not None:
            return torch.randn(len(prompt), width, generator=torch.Generator().manual_seed(seed))
        if self.held_noise is not None:
            return self.held_noise(prompt.ids, prompt.mask, width)
        return secure_noise((len(prompt), width))


def _held_noise(model: StainedGlassTransform, weights: str, file: str | os.PathLike | None) -> HeldNoise:
    """Held noise of this export, in these numbers: mean and std of another are others under the same tokens."""
    known = dict(model.config.fingerprints)
    if not {"weights", "config"} <= known.keys():  # an export from before they were written
        tensors = model.state_dict()
        known |= {name: fingerprint_tensor(tensors[name]) for name in sorted(tensors)}
    context = json.dumps({"fingerprints": known, "weights": weights, "dtype": str(model.dtype)}, sort_keys=True)
    return HeldNoise(held_key(file), context)


def _load_tokenizer(directory: Path, config: transform.SGTConfig) -> PreTrainedTokenizerBase:
    check_tokenizer_fingerprint(directory, config)
    if "tokenizer" not in config.fingerprints:
        warnings.warn(
            f"{directory}: exported before exports had fingerprints of tokenizer and configuration; they are not "
            "checked. Export again to have them",
            stacklevel=3,
        )
    tokenizer = load_tokenizer(directory, "export")
    check_ids_fingerprint(tokenizer, config, directory)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the embedding table {config.vocab_size} rows; "
            "they are not of one trunk"
        )
    if config.template == "chat" and isinstance(tokenizer.chat_template, str):
        check_template(tokenizer.chat_template)
    return tokenizer


def _table(config: transform.SGTConfig, trunk: str | os.PathLike | None) -> nn.Embedding:
    """The embedding table out of a trunk's checkpoint, and nothing else of it."""
    if trunk is None:
        raise UserError("this export ships no embedding table; give trunk=, the checkpoint directory of its trunk")
    table_VD = TrunkFiles(Path(trunk)).embedding_table()
    wanted = (config.vocab_size, config.hidden_size)
    if tuple(table_VD.shape) != wanted:
        raise UserError(f"{trunk}: its embedding table is {tuple(table_VD.shape)}, the transform's trunk had {wanted}")
    expected = config.fingerprints.get("embeddings")
    if expected is not None and fingerprint_tensor(table_VD) != expected:
        raise UserError(f"{trunk}: not the embedding table this transform was trained with (fingerprints.embeddings)")
    if expected is None:
        _check_trunk(config, trunk)
    return nn.Embedding.from_pretrained(table_VD, freeze=True)


def _check_trunk(config: transform.SGTConfig, trunk: str | os.PathLike) -> None:
    """For exports that name the trunk but not its table."""
    expected = config.fingerprints.get("trunk")
    if expected is None or TrunkFiles(Path(trunk)).fingerprint() != expected:
        raise UserError(f"{trunk}: cannot be told for the trunk this transform was trained with (fingerprints.trunk)")

"""lm-evaluation-harness on a trunk that is sent obfuscated embeddings: the model ``sgt``.

    python -m sgt_titan.evaluation.scores.harness --model sgt \\
        --model_args export=DIR,trunk=DIR,mechanism=sgt --tasks arc_easy,hellaswag --num_fewshot 0

Importing this module registers the model; the line above is the harness's own command line with it. What a request puts
before the answer is obfuscated (all but special tokens), the answer is clean: a choice that is scored, a text that is
generated. One question's choices see the same obfuscation, drawn from (seed, question), or chance would choose.

Legend: B rows, T positions, D width, C continuation tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sgt_titan.data.order import hash64
from sgt_titan.errors import UserError
from sgt_titan.evaluation.world.mechanisms import Mechanism, constant_noise, learned, nothing
from sgt_titan.evaluation.world.samples import LOGIT_BUDGET, Sample, check_fit, generator, load_trunk, padded
from sgt_titan.transform.chat_template import Look, apply, look
from sgt_titan.transform.prompts import special_ids

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    raise UserError("benchmarks need lm-evaluation-harness: pip install 'sgt-titan[harness]'") from None

MAX_ROWS = 16
GENERATE_ROWS = 4
MAX_NEW_TOKENS = 256  # where neither the task nor --model_args says (max_gen_toks)
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("sgt")
class ObfuscatedLM(TemplateLM):
    """A transformers causal LM whose contexts pass through a ``Mechanism``.

    Args:
        export, trunk: directories, when the harness makes the model from words.
        mechanism: sgt, none, or noise (of the SGT's own mean std, ``std`` times the table's).
        std: of ``noise``, in units of the table's per-feature std.
        seed: of the noise.
    """

    def __init__(
        self,
        export: str = "",
        trunk: str = "",
        mechanism: str = "sgt",
        std: float = 0.0,
        seed: int = 0,
        max_gen_toks: int = MAX_NEW_TOKENS,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.seed, self.max_gen_toks, self.truncated, self.shortened = int(seed), int(max_gen_toks), 0, 0
        if export:
            from sgt_titan.data.tokenization import load_tokenizer
            from sgt_titan.transform import load_export

            transform = load_export(export)
            check_fit(transform, trunk, export)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            made = {
                "sgt": lambda: learned(transform.to(device)),  # type: ignore[arg-type]
                "none": nothing,
                "noise": lambda: constant_noise(float(std) * transform.config.scale),
            }
            if mechanism not in made or (mechanism == "noise" and not float(std) > 0):
                raise UserError(
                    f"model_args: mechanism={mechanism}, std={std}: use sgt, none, or noise with std above 0"
                )
            how = look(transform.config.template_kwargs, transform.config.template_date)
            self.use(load_trunk(trunk, device), load_tokenizer(trunk), made[mechanism](), how)

    def use(self, trunk: Any, tokenizer: Any, mechanism: Mechanism, how: Look | None = None) -> ObfuscatedLM:
        """Give it its parts; returns itself. ``how``: the chat template is rendered, as in training."""
        self.trunk, self.tokenizer, self.mechanism, self.how = trunk, tokenizer, mechanism, how or Look()
        self.embed = trunk.get_input_embeddings()
        self.max_length = getattr(trunk.config, "max_position_embeddings", None) or 4096
        self.special = special_ids(tokenizer)
        return self

    # -- what the harness asks of a model --

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return type(self.tokenizer).__name__

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return apply(self.tokenizer, chat_history, self.how, generation=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, led by BOS where the tokenizer has one and ``add_special_tokens`` is not False."""
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if add_special_tokens is False or bos is None or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy) of each continuation (C,) after its obfuscated context."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        sent = _Memory(self)
        for rows in self._batches(order, [len(r[1]) + len(r[2]) for r in requests]):
            parts, lengths = [], []
            for i in rows:
                _, context, continuation = requests[i]
                x_TD = sent.context(context, room=self.max_length - len(continuation))
                # The last token of a continuation is predicted, not read.
                read = torch.tensor(continuation[:-1], dtype=torch.int64, device=self.trunk.device)
                parts.append(torch.cat([x_TD, self.embed(read)]))
                lengths.append(len(continuation))
            logits_BCV = self._last_logits(parts, max(lengths))
            for b, (i, length) in enumerate(zip(rows, lengths, strict=True)):
                log_CV = torch.log_softmax(logits_BCV[b, -length:].float(), -1)
                target_C = torch.tensor(requests[i][2], device=log_CV.device)
                said = log_CV.gather(1, target_C[:, None]).sum().item()
                found[i] = said, bool((log_CV.argmax(-1) == target_C).all())
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        raise UserError("loglikelihood_rolling scores a text without a prompt: there is nothing to obfuscate")

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to each obfuscated prompt, up to its own limit and its stop strings."""
        asked = [(request.args[0], request.args[1] if len(request.args) > 1 else {}) for request in requests]
        prompts = [self.tok_encode(text) for text, _ in asked]
        limits = [self._limit(options, len(ids)) for (_, options), ids in zip(asked, prompts, strict=True)]
        order = sorted(range(len(asked)), key=lambda i: limits[i])  # a batch has one limit, or its rows would share one
        texts, sent, start = [""] * len(asked), _Memory(self), 0
        while start < len(order):
            wanted = limits[order[start]]
            batch = [i for i in order[start : start + GENERATE_ROWS] if limits[i] == wanted]
            start += len(batch)
            room = max(1, self.max_length - wanted)
            rows = [sent.context(prompts[i], room=room) for i in batch]
            x_BTD, valid_BT = _left_padded(rows)
            out = self.trunk.generate(
                inputs_embeds=x_BTD.to(self.trunk.dtype),
                attention_mask=valid_BT.long(),
                max_new_tokens=wanted,
                do_sample=False,
                pad_token_id=self.eot_token_id,
            )
            for i, ids in zip(batch, out, strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                until = asked[i][1].get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                texts[i] = text
        return texts

    def _limit(self, options: dict[str, Any], prompt: int) -> int:
        """Tokens of an answer to ``prompt`` tokens: the task's own limit under any of its names, else the model's.

        What does not fit the trunk's context beside the prompt is taken off the answer, down to a quarter of the
        context, and counted (``shortened``).

        Raises:
            UserError: a task that wants samples, which the greedy answer is not.
        """
        if options.get("do_sample") and options.get("temperature", 1.0):
            raise UserError("generate_until: the task samples (do_sample); answers here are greedy: do_sample false")
        found = next((options[name] for name in LIMITS if options.get(name) is not None), self.max_gen_toks)
        left = max(self.max_length - prompt, self.max_length // 4)
        self.shortened += int(found) > left
        return max(1, min(int(found), left))

    # -- how --

    def _batches(self, order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Requests of about the same length, few enough that their logits fit."""
        vocab, found = self.embed.weight.shape[0], list[list[int]]()
        for i in order:
            longest = lengths[found[-1][0]] if found else 0
            if found and len(found[-1]) < min(MAX_ROWS, max(1, LOGIT_BUDGET // max(1, longest * vocab))):
                found[-1].append(i)
            else:
                found.append([i])
        return found

    def _last_logits(self, rows: Sequence[torch.Tensor], keep: int) -> torch.Tensor:
        """Logits (B, keep, V) at the last positions of each row."""
        x_BTD, valid_BT = _left_padded(rows)
        return self.trunk(
            inputs_embeds=x_BTD.to(self.trunk.dtype),
            attention_mask=valid_BT.long(),
            position_ids=(valid_BT.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
            logits_to_keep=keep,
        ).logits


class _Memory:
    """Contexts as they are sent, each obfuscated once: the choices of a question share it."""

    def __init__(self, model: ObfuscatedLM):
        self.model = model
        self.last: tuple[tuple[int, ...], torch.Tensor] | None = None
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    def context(self, ids: Sequence[int], *, room: int) -> torch.Tensor:
        """Embeddings (T, D) of the last ``room`` tokens, BOS kept in front."""
        model = self.model
        if len(ids) > room:
            model.truncated += 1
            head = [ids[0]] if ids[0] == model.tokenizer.bos_token_id else []
            ids = [*head, *ids[len(ids) - room + len(head) :]]
        key = tuple(ids)
        if key not in self.known:
            if len(self.known) > 64:
                self.known.clear()
            hidden_T = np.array([token not in model.special for token in ids], dtype=bool)
            row = Sample(np.array(ids, dtype=np.int64), hidden_T, np.zeros(len(ids), dtype=bool))
            batch = padded([row], 0, model.trunk.device)
            random = generator(hash64("harness", model.seed, *map(int, ids)) >> 1, model.trunk.device)
            sent = model.mechanism.obfuscate(batch, model.embed(batch.tokens_BT), random)
            self.known[key] = sent.x_tilde_BTD[0].to(model.embed.weight.dtype)
        return self.known[key]


def _left_padded(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, D) with zeros on the left, and which positions are real."""
    longest = max(map(len, rows))
    x_BTD = torch.stack([torch.nn.functional.pad(x_TD, (0, 0, longest - len(x_TD), 0)) for x_TD in rows])
    lengths_B = torch.tensor([len(x_TD) for x_TD in rows], device=x_BTD.device)
    valid_BT = torch.arange(longest, device=x_BTD.device) >= (longest - lengths_B)[:, None]
    return x_BTD, valid_BT


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

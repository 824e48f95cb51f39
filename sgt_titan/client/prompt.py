"""Any way to write a prompt, as token ids and the mask of what is obfuscated.

Text in error messages: never. A message names the turn, the role or the count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sgt_titan.errors import UserError
from sgt_titan.transform import SGTConfig
from sgt_titan.transform.prompts import (
    PROMPT,
    RESPONSE,
    TEMPLATE,
    TOOLS_NOT_PRINTED,
    EncodedPrompt,
    encode_turns,
    obfuscation_mask,
    special_ids,
)

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """Token ids, and for each whether it is obfuscated."""

    ids: list[int]
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Prompt({len(self)} tokens)"  # never the tokens


def make_prompt(
    tokenizer: PreTrainedTokenizerBase,
    config: SGTConfig,
    what: str | Sequence[Message] | Sequence[int],
    *,
    tools: Sequence[dict[str, Any]] = (),
    limit: int | None = None,
) -> Prompt:
    """Token ids and mask of text, messages or token ids, as the transform was trained.

    Text is what ``/v1/completions`` takes: the beginning-of-sequence token, if there is one, and the text. Messages go
    through the chat template with the generation prompt (``template: plain``: joined by blank lines). Of token ids all
    but special ones are obfuscated. ``limit``: the most tokens.

    Raises:
        UserError: empty, too long, not text, unknown roles, tools the template cannot render.
    """
    if isinstance(what, str):
        encoded = _text(tokenizer, what)
    elif isinstance(what, Sequence) and what and all(type(item) is int for item in what):
        encoded = _ids(tokenizer, config, what)
    elif isinstance(what, Sequence) and what and all(isinstance(item, dict) for item in what):
        encoded = _messages(tokenizer, config, what, tools)
    else:
        raise UserError("prompt: empty, or neither text, messages nor token ids")
    if limit is not None and len(encoded.ids) > limit:
        raise UserError(f"prompt: {len(encoded.ids)} tokens, at most {limit} fit; shorten it")
    mask = obfuscation_mask(
        _as_prompt(encoded.roles), obfuscate=config.obfuscate, obfuscate_template=config.obfuscate_template
    )
    return Prompt(list(encoded.ids), mask)


def _as_prompt(roles: Sequence[int]) -> np.ndarray:
    """The client sends it all: a last turn of the assistant that is to be continued is a prompt like any other."""
    roles = np.asarray(roles)
    return np.where(roles == RESPONSE, PROMPT, roles)


def _text(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedPrompt:
    check_text(text, "prompt")
    if not text:
        raise UserError("prompt: is empty")
    return encode_turns(tokenizer, [{"role": "user", "content": text}], template="plain")


def _ids(tokenizer: PreTrainedTokenizerBase, config: SGTConfig, ids: Sequence[int]) -> EncodedPrompt:
    if not all(0 <= i < config.vocab_size for i in ids):
        raise UserError(f"prompt: contains a token id outside 0..{config.vocab_size - 1}")
    special = special_ids(tokenizer)
    return EncodedPrompt(list(ids), [TEMPLATE if i in special else PROMPT for i in ids])


def _messages(
    tokenizer: PreTrainedTokenizerBase,
    config: SGTConfig,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
) -> EncodedPrompt:
    turns = [_turn(i, message) for i, message in enumerate(messages)]
    if not any(turn["content"].strip() for turn in turns):
        raise UserError("messages: every content is empty")
    if config.template == "plain":
        if tools:
            raise UserError("tools: this transform was trained without a chat template, which could render them")
        joined = [{"role": "user", "content": turn["content"]} for turn in turns]
        return encode_turns(tokenizer, joined, template="plain", add_generation_prompt=True)
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("tools: must be a list of objects")
    encoded = encode_turns(
        tokenizer,
        turns,
        template="chat",
        add_generation_prompt=True,
        variables=config.template_kwargs,
        date=config.template_date,
        tools=tools,
    )
    if TOOLS_NOT_PRINTED in encoded.notes:
        raise UserError("tools: the chat template of this model does not render them; leave them out")
    return encoded


def _turn(index: int, message: Message) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"messages[{index}].role: must be one of {', '.join(ROLES)}")
    if isinstance(content, list):  # the parts of the OpenAI API
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise UserError(f"messages[{index}].content: only text parts are supported")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"messages[{index}].content: must be text")
    if message.get("tool_calls") or message.get("function_call"):
        raise UserError(f"messages[{index}].tool_calls: unsupported; put the call into content, as the model wrote it")
    check_text(content, f"messages[{index}].content")
    return {"role": role, "content": content}


def check_text(text: str, where: str) -> None:
    """Raise UserError for text that no UTF-8 encodes (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: is not valid Unicode (a lone surrogate); send well-formed UTF-8") from None

"""Tool definitions in a chat: rendered by the template, and obfuscated, since they tell what an application does.

The chat is rendered with and without the tools. Where the template's own words differ, between the beginning and the
end that both share, is what the tools brought in; its tokens count as prompt. Special tokens inside stay template,
unless a tool writes them itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from sgt_titan.errors import UserError
from sgt_titan.transform.prompts import PROMPT, TEMPLATE, EncodedPrompt, special_ids


def encode_with_tools(
    tokenizer: PreTrainedTokenizerBase,
    render: Callable[[PreTrainedTokenizerBase], EncodedPrompt],
    tools: Sequence[dict[str, Any]],
) -> EncodedPrompt:
    """``render(tokenizer)`` of a chat whose template is given ``tools``. UserError if it renders none."""
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("tools: must be a list of objects")
    without = render(tokenizer)
    try:
        with_tools = render(WithTemplateArguments(tokenizer, {"tools": list(tools)}))
    except Exception:  # a template may fail in any way over a tool that it does not expect, and say its words
        raise UserError("tools: the chat template of this model fails over them; check their form") from None
    if with_tools.ids == without.ids:
        raise UserError("tools: the chat template of this model does not render them; leave them out")
    start = _shared(without.ids, with_tools.ids)
    end = len(with_tools.ids) - _shared(without.ids[start:][::-1], with_tools.ids[start:][::-1])
    text = json.dumps(tools, ensure_ascii=False)
    special = {token for token in special_ids(tokenizer) if tokenizer.convert_ids_to_tokens(token) not in text}
    roles = [
        PROMPT if role == TEMPLATE and start <= t < end and token not in special else role
        for t, (token, role) in enumerate(zip(with_tools.ids, with_tools.roles, strict=True))
    ]
    return EncodedPrompt(with_tools.ids, roles)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class WithTemplateArguments:
    """The tokenizer, whose chat template is always given these arguments."""

    def __init__(self, tokenizer: Any, arguments: dict[str, Any]):
        self._tokenizer, self._arguments = tokenizer, arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
        return self._tokenizer.apply_chat_template(messages, **self._arguments, **kwargs)

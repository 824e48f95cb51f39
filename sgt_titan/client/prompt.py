"""Any way to write a prompt, as token ids and the mask of what is obfuscated.

Text in error messages: never. A message names the turn, the role or the count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from sgt_titan.client.reasoning import begins_inside
from sgt_titan.errors import UserError
from sgt_titan.transform import SGTConfig
from sgt_titan.transform.prompts import (
    CALLS_NOT_PRINTED,
    PROMPT,
    RESPONSE,
    TEMPLATE,
    TOOLS_NOT_PRINTED,
    EncodedPrompt,
    encode_turns,
    obfuscation_mask,
    special_ids,
)
from sgt_titan.transform.tokenizer import decode

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]
Turn = dict[str, Any]
_WORD = re.compile("[a-z_]{1,16}")


class TooLong(UserError):
    """More than fits. ``code``: OpenAI's."""

    code, param = "context_length_exceeded", None


@dataclass(frozen=True)
class Rendering:
    """How messages become a prompt. tools: definitions. arguments: further ones of the chat template
    (``enable_thinking``); they stand in its clear words, so only true and false, numbers and short words of lower-case
    letters are taken. continued: the last turn is to be gone on with."""

    tools: Sequence[dict[str, Any]] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    continued: bool = False


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
    rendering: Rendering = Rendering(),
    limit: int | None = None,
) -> Prompt:
    """Token ids and mask of text, messages or token ids, as the transform was trained.

    Text is what ``/v1/completions`` takes: the beginning-of-sequence token, if there is one, and the text. Messages go
    through the chat template with the generation prompt (``template: plain``: joined by blank lines). Of token ids all
    but special ones are obfuscated. ``limit``: the most tokens; what cannot fit by its size alone is refused before any
    work on it.

    Raises:
        UserError: empty, too long (TooLong), not text, unknown roles, tools the template cannot render.
    """
    check_size(tokenizer, what, limit, rendering.tools)
    if isinstance(what, str):
        encoded = _text(tokenizer, what)
    elif isinstance(what, Sequence) and what and all(type(item) is int for item in what):
        encoded = _ids(tokenizer, config, cast(Sequence[int], what))
    elif isinstance(what, Sequence) and what and all(isinstance(item, dict) for item in what):
        encoded = _messages(tokenizer, config, cast(Sequence[Message], what), rendering)
    else:
        raise UserError("prompt: empty, or neither text, messages nor token ids")
    _check_count(len(encoded.ids), limit)
    mask = obfuscation_mask(
        _as_prompt(encoded.roles), obfuscate=config.obfuscate, obfuscate_template=config.obfuscate_template
    )
    return Prompt(list(encoded.ids), mask)


def _check_count(tokens: int, limit: int | None) -> None:
    if limit is not None and tokens > limit:
        raise TooLong(f"prompt: {tokens} tokens, at most {limit} fit; shorten it")


def check_size(tokenizer: PreTrainedTokenizerBase, what: Any, limit: int | None, tools: Any = ()) -> None:
    """Raise TooLong for what no tokenizer could make fit, since a turn and a tool are a token each at least and no
    token is longer than the longest. Costs next to nothing, so it comes before any work."""
    if limit is None or not isinstance(what, str | Sequence):
        return
    turns = [item for item in what if isinstance(item, dict)] if not isinstance(what, str) else []
    characters = len(what) if isinstance(what, str) else sum(map(_characters, turns))
    characters += _in_json(tools)
    if not isinstance(what, str) and len(what) > limit:
        things = "messages" if turns else "tokens"
        raise TooLong(f"prompt: {len(what)} {things}, at most {limit} tokens fit; shorten it")
    if isinstance(tools, list | tuple) and len(tools) > limit:
        raise TooLong(f"tools: {len(tools)}, at most {limit} tokens fit; leave some out")
    if characters > limit * _longest_token(tokenizer):
        raise TooLong(f"prompt: {characters} characters are more than {limit} tokens can hold; shorten it")


@lru_cache(maxsize=8)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of a text that one token can stand for, at most: four of a normalised one (Unicode's NFC)."""
    return 4 * max(map(len, tokenizer.get_vocab()), default=1)


def _characters(turn: Mapping[str, Any]) -> int:
    """Of what a template prints of a turn; it may leave thoughts out."""
    content = turn.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = (part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))
    return sum(map(len, texts)) + _in_json(turn.get("tool_calls"))


def _in_json(value: Any) -> int:
    """Characters of names and texts in a JSON value."""
    total, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            left += one
    return total


def _as_prompt(roles: Sequence[int]) -> np.ndarray:
    """The client sends it all: a last turn of the assistant that is to be continued is a prompt like any other."""
    roles_T = np.asarray(roles)
    return np.where(roles_T == RESPONSE, PROMPT, roles_T)


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
    tokenizer: PreTrainedTokenizerBase, config: SGTConfig, messages: Sequence[Message], rendering: Rendering
) -> EncodedPrompt:
    turns = [_turn(i, message) for i, message in enumerate(messages)]
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in turns):
        raise UserError("messages: every content is empty")
    if not rendering.continued:
        return _turns(tokenizer, config, turns, rendering)
    *before, last = turns
    if last["role"] != "assistant" or not last["content"] or not before:
        raise UserError("messages: only a last turn of the assistant that says something can be continued")
    asked = _turns(tokenizer, config, before, rendering)
    if begins_inside(decode(tokenizer, asked.ids[-8:])):
        raise UserError("messages: the chat template opens a thought, so an answer cannot be begun for the model")
    more = tokenizer(last["content"], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return EncodedPrompt([*asked.ids, *more], [*asked.roles, *([PROMPT] * len(more))])


def _turns(
    tokenizer: PreTrainedTokenizerBase, config: SGTConfig, turns: Sequence[Turn], rendering: Rendering
) -> EncodedPrompt:
    if not isinstance(rendering.tools, list | tuple) or not all(isinstance(tool, dict) for tool in rendering.tools):
        raise UserError("tools: must be a list of objects")
    if config.template == "plain":
        if rendering.tools or any(turn.get("tool_calls") for turn in turns):
            raise UserError("tools: this transform was trained without a chat template, which could render them")
        if rendering.arguments:
            raise UserError("chat_template_kwargs: this transform was trained without a chat template")
        joined = [{"role": "user", "content": turn["content"]} for turn in turns]
        return encode_turns(tokenizer, joined, template="plain", add_generation_prompt=True)
    variables = {**config.template_kwargs, **_arguments(tokenizer, rendering.arguments)}
    error = UserError("chat template: refuses the turns")
    for first, variant in enumerate(_variants(turns)):
        try:
            encoded = encode_turns(
                tokenizer,
                variant,
                template="chat",
                add_generation_prompt=True,
                variables=variables,
                date=config.template_date,
                tools=rendering.tools,
            )
        except UserError as failure:
            error = error if first else failure
            continue
        if TOOLS_NOT_PRINTED in encoded.notes:
            raise UserError("tools: the chat template of this model does not render them; leave them out")
        if CALLS_NOT_PRINTED in encoded.notes:
            raise UserError("tool_calls: the chat template of this model does not render them; say them as text")
        return encoded
    raise error


def _variants(turns: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
    """As given, and as templates that know less of chats want them: developers as system."""
    yield turns
    as_system = [turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in turns]
    if as_system != turns:
        yield as_system


def _arguments(tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the template. Raises UserError for one that it does not know, or whose value may be a text."""
    unknown = [name for name in given if name not in template_variables(tokenizer)]
    if unknown:
        names = ", ".join(name for name in unknown if name in _KNOWN_ARGUMENTS) or f"{len(unknown)} names"
        raise UserError(f"chat_template_kwargs: {names}: the chat template of this model has no such option")
    for value in given.values():
        if not isinstance(value, bool | int | float | None) and not (isinstance(value, str) and _WORD.fullmatch(value)):
            raise UserError(
                "chat_template_kwargs: a value would stand in the prompt in clear; only true, false, numbers and words "
                "of at most 16 lower-case letters"
            )
    return dict(given)


_KNOWN_ARGUMENTS = ("reasoning_effort", "enable_thinking", "thinking", "thinking_budget", "builtin_tools", "documents")
_OURS = {"messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token"}


@lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    from jinja2 import Environment, meta

    names = meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template))
    return frozenset(names - _OURS)


def template_variables(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Names that the chat template looks at and that are no part of a chat; none if it cannot be read."""
    try:
        return _variables(str(tokenizer.chat_template or ""))
    except Exception:  # a syntax of its own; then nothing can be said
        return frozenset()


def _turn(index: int, message: Message) -> Turn:
    role, content = message.get("role"), message.get("content")
    where = f"messages[{index}]"
    if role not in ROLES:
        raise UserError(f"{where}.role: must be one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if message.get("function_call"):
        raise UserError(f"{where}.function_call: use tool_calls")
    if isinstance(content, list):  # the parts of the OpenAI API
        if not all(isinstance(p, dict) and p.get("type") in _TEXTS and isinstance(p.get("text"), str) for p in content):
            raise UserError(f"{where}.content: only text parts are supported")
        content = "".join(part["text"] for part in content)
    if content is None and role == "assistant" and (calls or message.get("reasoning_content")):
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{where}.content: must be text")
    turn: Turn = {"role": role, "content": content}
    thought = message.get("reasoning_content") or message.get("reasoning")
    if thought is not None and role == "assistant":
        if not isinstance(thought, str):
            raise UserError(f"{where}.reasoning_content: must be text")
        turn["reasoning_content"] = thought
    if calls:
        if role != "assistant":
            raise UserError(f"{where}.tool_calls: only the assistant calls tools")
        turn["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    if role == "tool":
        for name in ("tool_call_id", "name"):
            if isinstance(message.get(name), str):
                turn[name] = message[name]
    check_text(json.dumps(turn, ensure_ascii=False), where if calls or thought else f"{where}.content")
    return turn


_TEXTS = ("text", "input_text", "output_text")


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects. Raises UserError for what are none, without a word of them."""
    found = []
    for call in calls if isinstance(calls, list) else [None]:
        call = call if isinstance(call, dict) else {}
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: must be a list of {{id, type: function, function: {{name, arguments}}}}")
        arguments = function.get("arguments")
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise UserError(f"{where}: arguments must be a JSON object, as text")
        named = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append({**({"id": call["id"]} if isinstance(call.get("id"), str) else {}), **named})
    return found


def check_text(text: str, where: str) -> None:
    """Raise UserError for text that no UTF-8 encodes (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: is not valid Unicode (a lone surrogate); send well-formed UTF-8") from None

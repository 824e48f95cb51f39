"""Chats that hold more than contents: tool calls, tool results, reasoning, a last turn that is to be continued.

``transform.prompts.encode_turns`` finds the contents of turns by placeholders, which is exact where a template writes
contents as they are. Templates write the rest in their own ways: arguments as JSON, results in quotes, reasoning only
in the newest turns. So here every text that somebody wrote is rendered between marks, as whose contents the template
takes whatever is between them; without its marks the rendering must be what it is without them, or it does not count.
What was between marks is prompt. Of a turn with calls, all from the first call's text to the special token that ends
the turn is: numbers and punctuation between the marked texts tell as much.

Marks are private-use characters that occur nowhere in the chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from sgt_titan.errors import UserError
from sgt_titan.transform.prompts import (
    PROMPT,
    TEMPLATE,
    EncodedPrompt,
    special_ids,
    token_owners,
    tokenize,
)

Turn = dict[str, Any]
Wrap = Callable[[str], str]
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def needs_marks(turns: Sequence[Turn]) -> bool:
    """Whether the turns hold anything but contents."""
    return any(
        turn["role"] == "tool" or turn.keys() - {"role", "content"} or "</think>" in turn["content"] for turn in turns
    )


def encode_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, continued: bool = False) -> EncodedPrompt:
    """Ids and roles, PROMPT or TEMPLATE, of a chat through the tokenizer's chat template.

    ``continued``: the last turn is to be gone on with; else the template's generation prompt follows. Raises UserError
    for a template that refuses the turns or writes words of its own that depend on what people wrote.
    """
    if not tokenizer.chat_template:
        raise UserError("tokenizer: has no chat template; use template plain")
    marks = _marks(turns)
    for as_object in (True, False):  # what templates expect of arguments: most an object, DeepSeek's a text
        bare = [_prepared(tokenizer, turn, str, as_object) for turn in turns]
        for _ in range(2):  # some templates print the date, and midnight may fall between two renderings
            try:
                plain = _apply(tokenizer, bare, not continued)
            except UserError:
                if as_object and any(turn.get("tool_calls") for turn in turns):
                    break
                raise
            for outside in (False, True):  # templates that trim contents must find the white space outside the marks
                leaves = _Leaves(marks, outside)
                marked = [_prepared(tokenizer, turn, leaves.of(i), as_object) for i, turn in enumerate(turns)]
                found = leaves.unwrapped(_apply(tokenizer, marked, not continued))
                if found is not None and found[0] == plain:
                    return _labelled(tokenizer, plain, found[1], turns, continued)
    raise UserError(
        "chat template: its own words depend on what the turns hold, so they cannot be told apart; leave out tool "
        "calls and reasoning of earlier turns, or use a transform that was trained without a template"
    )


def _apply(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], generation: bool) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # whatever a template does over a turn; its words may be the turn's
        if type(error).__module__.split(".")[0] != "jinja2" and not isinstance(
            error, TypeError | ValueError | KeyError | AttributeError
        ):
            raise
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
        raise UserError(f"chat template: refuses the content of a turn ({roles})") from None


def _prepared(tokenizer: PreTrainedTokenizerBase, turn: Turn, wrap: Wrap, as_object: bool) -> Turn:
    """The turn as the template is given it, every text of it through ``wrap``."""
    made: Turn = {"role": turn["role"]}
    content, thought = turn["content"], turn.get("reasoning_content")
    knows = "reasoning_content" in str(tokenizer.chat_template)
    if turn["role"] == "assistant" and thought is None and (found := _THOUGHT.fullmatch(content)):
        thought, content = found.groups()
        if not knows:  # its template looks for the tags
            made["content"] = f"<think>{wrap(thought)}</think>{wrap(content)}"
            thought = None
    if thought is not None and knows:
        made["reasoning_content"] = wrap(thought)
    made.setdefault("content", wrap(content))
    for name in ("tool_call_id", "name"):
        if name in turn:
            made[name] = wrap(turn[name]) if name == "name" else turn[name]
    if "tool_calls" in turn:
        made["tool_calls"] = [_call(call, wrap, as_object) for call in turn["tool_calls"]]
    return made


def _call(call: dict[str, Any], wrap: Wrap, as_object: bool) -> dict[str, Any]:
    function = call["function"]
    arguments = _leaves(function["arguments"], wrap) if as_object else wrap(json.dumps(function["arguments"]))
    named = {"name": wrap(function["name"]), "arguments": arguments}
    return {**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": named}


def _leaves(value: Any, wrap: Wrap) -> Any:
    if isinstance(value, str):
        return wrap(value)
    if isinstance(value, dict):
        return {wrap(key): _leaves(item, wrap) for key, item in value.items()}
    return [_leaves(item, wrap) for item in value] if isinstance(value, list) else value


def _marks(turns: Sequence[Turn]) -> tuple[str, str, str]:
    used = set(json.dumps(turns, ensure_ascii=False))
    free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
    found = [mark for mark, _ in zip(free, range(3), strict=False)]
    if len(found) < 3:
        raise UserError("messages: hold every private-use character there is")
    return found[0], found[1], found[2]


Marked = list[tuple[int, int, int]]  # turn, first character, one past the last


class _Leaves:
    """Texts on their way through a template and back. ``outside``: white space around a text stays outside."""

    def __init__(self, marks: tuple[str, str, str], outside: bool):
        self._marks, self._outside = marks, outside
        self._known: list[tuple[int, str, str]] = []  # turn, white space before and after

    def of(self, turn: int) -> Wrap:
        """What puts marks around the texts of a turn."""

        def wrap(text: str) -> str:
            core = text.strip()
            if not core:
                return text
            at = text.find(core) if self._outside else 0
            before, after = (text[:at], text[at + len(core) :]) if self._outside else ("", "")
            begin, middle, end = self._marks
            self._known.append((turn, before, after))
            return f"{before}{begin}{len(self._known) - 1}{middle}{core if self._outside else text}{end}{after}"

        return wrap

    def unwrapped(self, text: str) -> tuple[str, Marked] | None:
        """The text without marks, and what was between them; None if a template has cut a marked text."""
        begin, middle, end = map(re.escape, self._marks)
        pieces, spans, at, cursor, inside = [], [], 0, 0, None
        for found in re.finditer(f"{begin}(\\d+){middle}|{end}", text):
            pieces.append(text[cursor : found.start()])
            at += found.start() - cursor
            cursor = found.end()
            if (found[1] is None) == (inside is None):
                return None
            if found[1] is None:
                spans.append((*inside, at))
                inside = None
            else:
                inside = (int(found[1]), at)
        if inside is not None or any(mark in text[cursor:] for mark in self._marks):
            return None
        bare = "".join([*pieces, text[cursor:]])
        return bare, [self._whole(bare, *span) for span in spans]

    def _whole(self, text: str, leaf: int, start: int, end: int) -> tuple[int, int, int]:
        """With the white space around it, where the template has kept that."""
        turn, before, after = self._known[leaf]
        if before and text[:start].endswith(before):
            start -= len(before)
        if after and text.startswith(after, end):
            end += len(after)
        return turn, start, end


def _labelled(
    tokenizer: PreTrainedTokenizerBase, text: str, marked: Marked, turns: Sequence[Turn], continued: bool
) -> EncodedPrompt:
    spans = [(start, end) for _, start, end in marked]
    if continued:
        last = [end for turn, _, end in marked if turn == len(turns) - 1]
        if not last:
            raise UserError("messages: the last turn is to be continued and is empty")
        text = text[: last[-1]]  # without what would end the turn
    encoding = tokenize(tokenizer, text, return_offsets_mapping=True)
    ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
    roles = [TEMPLATE if owner < 0 else PROMPT for owner in token_owners(offsets, spans)]
    special = special_ids(tokenizer)
    for first, after in _calls(marked, turns, len(text)):
        inside = [t for t, (start, end) in enumerate(offsets) if end > first and start < after]
        last = max((t for t in inside if roles[t] == PROMPT), default=-1)
        ended = next((t for t in inside if t > last and ids[t] in special), len(ids))
        for t in inside:
            if t < ended and ids[t] not in special:
                roles[t] = PROMPT
    return EncodedPrompt(ids, roles)


def _calls(marked: Marked, turns: Sequence[Turn], length: int) -> Iterator[tuple[int, int]]:
    """From the first text of every turn with calls to the first text of another turn."""
    for i, turn in enumerate(turns):
        own = [start for at, start, _ in marked if at == i]
        if turn.get("tool_calls") and own:
            yield own[0], min((start for at, start, _ in marked if at > i and start > own[0]), default=length)

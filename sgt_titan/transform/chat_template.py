"""A tokenizer's chat template: rendered the same way in training, in the client and in the evaluation.

``Look`` is all that decides how turns become text besides the turns: the template's variables (``enable_thinking`` and
others) and the date that it believes it is, because templates that print today's date would give other tokens every
day. Both are options of a run and travel in the export.

Templates are programs of somebody else. Whatever one raises becomes a UserError that holds no word of the turns.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from sgt_titan.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What Llama 3's template falls back to where nothing tells it the date.
DATE = "2024-07-26"
# Brackets around what a model thinks before it answers.
THINKING = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))
# Private-use characters: no template contains them, none strips them.
_MARK, _REASONING = "\ue000{}\ue001", "\ue002"
_OTHERS = 0xE100  # the first of those that stand for ids
_MARKED = re.compile("\ue000([0-9]{1,9})\ue001")
# Variables of `apply_chat_template` that a template's own cannot be.
_RESERVED = (
    "messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize", "conversation",
    "continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Look:
    """``variables``: canonical JSON of the template's variables. ``date``: ISO."""

    variables: str = "{}"
    date: str = DATE


def look(variables: Mapping[str, Any] | None = None, date: str = DATE) -> Look:
    """How templates are rendered.

    Raises:
        UserError: a date that is none, a variable that is the renderer's own.
    """
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise UserError(f"data.template_date: must be a date such as {DATE}, got {date!r}") from None
    for name in variables or {}:
        if name in _RESERVED:
            raise UserError(f"data.template_kwargs.{name}: is set by the renderer itself; it cannot be given")
    return Look(json.dumps(dict(variables or {}), sort_keys=True), date)


def source(tokenizer: PreTrainedTokenizerBase, *, tools: bool = False) -> str:
    """The text of the template; of several, the one that transformers takes.

    Raises:
        UserError: there is none.
    """
    if not tokenizer.chat_template:
        raise UserError("tokenizer: has no chat template; use template plain")
    try:
        return tokenizer.get_chat_template(tools=[] if tools else None)
    except Exception as error:
        raise UserError(f"tokenizer: its chat templates cannot be chosen from: {_one_line(error)}") from None


def thinking(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """The brackets around thoughts that the template knows, or None."""
    text = source(tokenizer)
    return next((pair for pair in THINKING if pair[0] in text or pair[1] in text), None)


def apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    how: Look,
    *,
    generation: bool,
    tools: Sequence[Any] = (),
    private: bool = False,
) -> str:
    """The rendered text.

    Args:
        private: the turns hold real contents, so that what the template says of them may not be repeated.

    Raises:
        UserError: the template raises anything.
    """
    text = _applied(tokenizer, messages, how, tools, private, add_generation_prompt=generation, tokenize=False)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("a turn is not valid Unicode (a lone surrogate)") from None
    return text


def _applied(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    how: Look,
    tools: Sequence[Any],
    private: bool,
    **options: Any,
) -> Any:
    template = _pinned(source(tokenizer, tools=bool(tools)), how.date)
    calls = [call for m in messages for call in m.get("tool_calls") or ()]
    style = call_style(tokenizer, template) if calls or any("tool_call_id" in m for m in messages) else None
    try:
        return tokenizer.apply_chat_template(
            [dict(m) if style is None else style.of(m) for m in messages],
            chat_template=template,
            tools=list(tools) or None,
            **options,
            **json.loads(how.variables),
        )
    except Exception as error:  # raise_exception() with the template's own words, jinja's errors, and any other
        roles = ", ".join(dict.fromkeys(m["role"] for m in messages))
        if private:
            unnamed = any(isinstance(call, Mapping) and "id" not in call for call in calls)
            hint = "; calls of tools have no ids here, which it may need" if unnamed else ""
            raise UserError(f"chat template: refuses the content of a turn ({roles}){hint}") from None
        raise UserError(f"chat template: refuses turns ({roles}): {_one_line(error)}") from None


class CallStyle(NamedTuple):
    """How a template wants calls of tools. text: their arguments as JSON (DeepSeek-V3), not as an object. short: ids of
    nine characters (Mistral)."""

    text: bool = False
    short: bool = False

    def of(self, message: Message) -> dict[str, Any]:
        """The message so."""
        found = dict(message)
        if self.short and found.get("tool_call_id"):
            found["tool_call_id"] = short_id(found["tool_call_id"])
        if found.get("tool_calls"):
            found["tool_calls"] = [self._call(call) for call in found["tool_calls"]]
        return found

    def _call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            return call
        if self.text and isinstance(function.get("arguments"), Mapping):
            function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        return {**call, "function": function} | ({"id": short_id(call["id"])} if self.short and call.get("id") else {})


def short_id(name: str) -> str:
    """The last nine letters and digits of an id, as vLLM cuts them for Mistral."""
    return "".join(c for c in name if c.isalnum() or ord(c) >= _OTHERS)[-9:].rjust(9, "0")


@lru_cache(maxsize=16)
def call_style(tokenizer: PreTrainedTokenizerBase, template: str) -> CallStyle:
    """The first of the styles in which the template prints a call; the plain one if it prints none."""
    function = {"name": "named", "arguments": {"argued": 1}}
    call = {"type": "function", "id": "call_" + "a" * 24, "function": function}
    turns: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    if "tool_call" in template:
        for choices in product((False, True), repeat=2):
            style = CallStyle(*choices)
            try:
                text = tokenizer.apply_chat_template(
                    [style.of(m) for m in turns], chat_template=template, tokenize=False
                )
            except Exception:  # not so
                continue
            if "named" in text and "argued" in text:
                return style
    return CallStyle()


def marks_answers(tokenizer: PreTrainedTokenizerBase, *, tools: bool = False) -> bool:
    """Whether the template says itself which tokens of an answer are generated, by ``{% generation %}``."""
    return _has_marks(source(tokenizer, tools=tools))


@lru_cache(maxsize=16)
def _has_marks(template: str) -> bool:
    return _GENERATION.search(template) is not None


def marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], how: Look, *, tools: Sequence[Any] = ()
) -> tuple[list[int], list[int]]:
    """Ids of turns that are over, and 1 for each that the template marks as generated, else 0.

    Raises:
        UserError: the template raises anything.
    """
    found = _applied(
        tokenizer, messages, how, tools, True, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )  # fmt: skip
    return list(found["input_ids"]), list(found["assistant_masks"])


@lru_cache(maxsize=16)
def _pinned(template: str, date: str) -> str:
    """The template with a clock that stands still, as a macro that shadows ``strftime_now``."""
    if "strftime_now" not in template:
        return template
    day = datetime.datetime.fromisoformat(date)
    codes = "".join(f' | replace("%{c}", {json.dumps(day.strftime("%" + c))})' for c in "aAbBdmyYHIMSpjUWuVGf")
    # What follows a block's end loses its line break, what follows an expression keeps it.
    return "{% macro strftime_now(format) %}{{ format" + codes + ' }}{% endmacro %}{{ "" }}' + template


@lru_cache(maxsize=512)
def skeleton(
    tokenizer: PreTrainedTokenizerBase, how: Look, roles: tuple[str, ...], generation: bool
) -> tuple[str, ...]:
    """The template's own words around turns of these roles: one piece more than there are turns.

    Raises:
        UserError: the template refuses the roles, or does not print every turn once and in order.
    """
    marks = [_MARK.format(i) for i in range(len(roles))]
    marked = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    return tuple(split(apply(tokenizer, marked, how, generation=generation), marks, roles))


def split(text: str, marks: Sequence[str], roles: Sequence[str]) -> list[str]:
    """What stands between the marks; "" as a mark: a turn of which nothing is searched for."""
    # One pass, whatever the number of turns.
    wanted = [i for i, mark in enumerate(marks) if mark]
    found = [(int(m[1]), *m.span()) for m in _MARKED.finditer(text)]
    found = [at for at in found if at[0] < len(marks) and marks[at[0]]]
    order, times = [i for i, _, _ in found], Counter(i for i, _, _ in found)
    if order != wanted:
        i = next(i for k, i in enumerate(wanted) if times[i] != 1 or order[k : k + 1] != [i])
        what = "drops" if times[i] == 0 else "repeats" if times[i] > 1 else "moves"
        raise UserError(
            f"chat template: {what} the content of turn {i} ({roles[i]}); every turn must appear "
            "once and in order, so use template plain or turns the template keeps"
        )
    spans, pieces, cursor = iter(found), [], 0
    for mark in marks:
        if not mark:
            pieces.append("")
            continue
        _, start, end = next(spans)
        pieces.append(text[cursor:start])
        cursor = end
    return [*pieces, text[cursor:]]


@dataclass(frozen=True)
class Frame:
    """What stands around a last turn's answer, behind the generation prompt.

    lead: what the model writes before the answer. tail: what follows it. follows: the template prints the answer behind
    the generation prompt; else it has another beginning for turns that are over (DeepSeek-R1 opens no thoughts there).
    left, right: white space around an answer is stripped. thoughts: what stands before and after them, if the template
    prints them.
    """

    lead: str
    tail: str
    follows: bool
    left: bool
    right: bool
    thoughts: tuple[str, str] | None


def frame(tokenizer: PreTrainedTokenizerBase, how: Look, turns: Sequence[Message]) -> Frame:
    """The frame of an answer to these turns: that of their roles, and where a template refuses those without their
    calls of tools (Mistral), of themselves."""
    roles = tuple(m["role"] for m in turns)
    try:
        return _frame_of_roles(tokenizer, how, roles)
    except UserError:
        if not any(m.get("tool_calls") for m in turns):
            raise
    return _frame(tokenizer, how, turns)


@lru_cache(maxsize=512)
def _frame_of_roles(tokenizer: PreTrainedTokenizerBase, how: Look, roles: tuple[str, ...]) -> Frame:
    skeleton(tokenizer, how, (*roles, "assistant"), False)  # raises where a turn is not printed once and in order
    skeleton(tokenizer, how, roles, True)
    return _frame(tokenizer, how, [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(roles)])


def _frame(tokenizer: PreTrainedTokenizerBase, how: Look, turns: Sequence[Message]) -> Frame:
    mark = _MARK.format(len(turns))

    def rendered(content: str = mark, **answer: str) -> str:
        last = {"role": "assistant", "content": content, **answer}
        return apply(tokenizer, [*turns, last], how, generation=False, private=True)

    before, _, tail = rendered().partition(mark)
    asked = apply(tokenizer, turns, how, generation=True, private=True)
    follows = before.startswith(asked)
    padded = rendered(f"  {mark}  ").removeprefix(before)
    thoughts = None
    try:
        text = rendered(reasoning_content=_REASONING)
    except UserError:
        text = ""
    if follows and text.startswith(asked) and _REASONING in text[len(asked) :].partition(mark)[0]:
        opening, _, rest = text[len(asked) :].partition(_REASONING)
        thoughts = opening, rest.partition(mark)[0]
    return Frame(
        lead=before[len(asked) :] if follows else "",
        tail=tail,
        follows=follows,
        left=padded.startswith(mark),
        right=not padded.endswith("  " + tail),
        thoughts=thoughts,
    )


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], how: Look, *, generation: bool
) -> tuple[str, list[Span]]:
    """The rendered chat and the character span of every turn's content in it."""
    roles = tuple(m["role"] for m in messages)
    pieces = skeleton(tokenizer, how, roles, generation)
    text = apply(tokenizer, messages, how, generation=generation, private=True)
    return text, match(text, pieces, [m["content"] for m in messages], roles)


def render_with_tools(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    how: Look,
    *,
    generation: bool,
    tools: Sequence[Any],
) -> tuple[str, list[Span], list[Span]]:
    """As ``render`` for turns with calls of tools, or tools: also the spans of what calls and definitions brought in.

    Rendered thrice: as it is; with placeholders for the contents; and so without tools and with empty calls. Where the
    last two differ, between the beginning and the end that both share, is what the application wrote.
    """
    roles = [m["role"] for m in messages]
    marks = [_MARK.format(i) if m["content"] else "" for i, m in enumerate(messages)]
    marked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
    empty = _emptied(marked)
    bare = split(apply(tokenizer, empty, how, generation=generation), marks, roles)
    try:
        full = split(apply(tokenizer, marked, how, generation=generation, tools=tools, private=True), marks, roles)
    except UserError:
        if not tools:
            raise
        raise UserError("tools: the chat template of this model fails over them; check their form") from None
    text = apply(tokenizer, messages, how, generation=generation, tools=tools, private=True)
    spans = match(text, full, [m["content"] for m in messages], roles)
    starts = [0, *(end for _, end in spans)]
    brought = []
    for start, a, b in zip(starts, full, bare, strict=True):
        if a != b:
            left = shared(a, b)
            right = shared(a[left:][::-1], b[left:][::-1])
            brought.append((start + left, start + len(a) - right))
    return text, spans, brought


def _emptied(turns: Sequence[Message]) -> list[dict[str, Any]]:
    """Turns with calls that say nothing. Of ids and of names of tools the length stays, which templates check."""
    names: dict[str, str] = {}

    def put(name: str) -> str:
        return names.setdefault(name, chr(_OTHERS + len(names)) * len(name))

    def empty(call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            return {"name": "", "arguments": {}}
        nothing = "" if isinstance(function.get("arguments"), str) else {}
        more = {"id": put(call["id"])} if call.get("id") else {}
        return {**call, **more, "function": {**function, "name": "", "arguments": nothing}}

    found = []
    for m in turns:
        own = {key: put(m[key]) for key in ("tool_call_id", "name") if m.get(key)}
        calls = {"tool_calls": [empty(call) for call in m["tool_calls"]]} if m.get("tool_calls") else {}
        found.append({**m, **own, **calls})
    return found


def shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the beginning that both share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def match(text: str, pieces: Sequence[str], contents: Sequence[str], roles: Sequence[str]) -> list[Span]:
    """The spans of the contents in a text that is ``pieces`` with the contents between them.

    Raises:
        UserError: it is not; names the turn.
    """
    spans: list[Span] = []
    cursor = len(pieces[0])
    if not text.startswith(pieces[0]):
        raise UserError("chat template: its own words depend on the contents of the turns; use template plain")
    for i, (content, after) in enumerate(zip(contents, pieces[1:], strict=True)):
        is_last = i == len(contents) - 1
        for variant in _variants(content):
            end = cursor + len(variant)
            fits = text[end:] == after if is_last else text.startswith(after, end)
            if fits and text.startswith(variant, cursor):
                spans.append((cursor, end))
                cursor = end + len(after)
                break
        else:
            raise UserError(
                f"chat template: changes the content of turn {i} ({roles[i]}) by more than stripping white "
                "space, so its tokens cannot be told from the template's; use template plain"
            )
    return spans


def _variants(content: str):
    """What templates make of a content: white space stripped, earlier thoughts taken out, written as JSON."""
    yield from dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip()))
    for _, close in THINKING:
        if close in content:
            said = content.rpartition(close)[2]
            yield from (said, said.lstrip("\n"), said.strip())
            said = content.partition(close)[2]
            yield from (said, said.lstrip("\n"), said.strip())
    escaped = json.dumps(content, ensure_ascii=False)[1:-1]
    if escaped != content:
        yield escaped


def _one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:160]

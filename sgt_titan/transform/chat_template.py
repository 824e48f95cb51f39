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
from typing import TYPE_CHECKING, Any

from sgt_titan.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What Llama 3's template falls back to where nothing tells it the date.
DATE = "2024-07-26"
# Brackets around what a model thinks before it answers.
THINKING = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))
# Private-use characters: no template contains them, none strips them.
_MARK, _REASONING = "\ue000{}\ue001", "\ue002"
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
    try:
        return tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            chat_template=template,
            tools=list(tools) or None,
            **options,
            **json.loads(how.variables),
        )
    except Exception as error:  # raise_exception() with the template's own words, jinja's errors, and any other
        roles = ", ".join(dict.fromkeys(m["role"] for m in messages))
        if private:
            raise UserError(f"chat template: refuses the content of a turn ({roles})") from None
        raise UserError(f"chat template: refuses turns ({roles}): {_one_line(error)}") from None


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


@lru_cache(maxsize=512)
def frame(tokenizer: PreTrainedTokenizerBase, how: Look, roles: tuple[str, ...]) -> Frame:
    """The frame of an answer to turns of these roles."""
    pieces = skeleton(tokenizer, how, (*roles, "assistant"), False)
    prompt = skeleton(tokenizer, how, roles, True)
    marks = [_MARK.format(i) for i in range(len(roles) + 1)]
    before = "".join(a + b for a, b in zip(pieces[:-1], marks, strict=True))[: -len(marks[-1])]
    asked = "".join(a + b for a, b in zip(prompt, [*marks[:-1], ""], strict=True))
    follows = before.startswith(asked)
    turns = [{"role": role, "content": mark} for role, mark in zip((*roles, "assistant"), marks, strict=True)]

    def rendered(**answer: str) -> str:
        return apply(tokenizer, [*turns[:-1], {**turns[-1], **answer}], how, generation=False)

    padded = rendered(content=f"  {marks[-1]}  ").removeprefix(before)
    thoughts = None
    try:
        text = rendered(reasoning_content=_REASONING)
    except UserError:
        text = ""
    if follows and text.startswith(asked) and _REASONING in text[len(asked) :].partition(marks[-1])[0]:
        opening, _, rest = text[len(asked) :].partition(_REASONING)
        thoughts = opening, rest.partition(marks[-1])[0]
    return Frame(
        lead=before[len(asked) :] if follows else "",
        tail=pieces[-1],
        follows=follows,
        left=padded.startswith(marks[-1]),
        right=not padded.endswith("  " + pieces[-1]),
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
    empty = [
        {**m, "tool_calls": [_emptied(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m for m in marked
    ]
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


def _emptied(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return {"name": "", "arguments": {}}
    nothing = "" if isinstance(function.get("arguments"), str) else {}  # some templates take a text, others an object
    return {**call, "function": {**function, "name": "", "arguments": nothing}}


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

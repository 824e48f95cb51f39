"""From chat turns to token ids, with the role of every token. The same code runs in training and at inference.

Which tokens get obfuscated is decided by role: ``TEMPLATE`` (special tokens and the template's own words),
``PROMPT`` (what people wrote) or ``RESPONSE`` (what the model generates).

How roles are found in a chat. The template is rendered with the turns, and with a unique placeholder in each turn. The
second rendering, split at the placeholders, gives the template's own pieces (``chat_template.skeleton``; they depend on
the turns' roles alone and are kept); the first must be these pieces with the contents between them, which fixes the
character span of every content exactly. (Searching for the contents alone would go wrong on short ones: "user" occurs
in most templates.) The rendered string is tokenized once with offsets, and a token is content if it overlaps the
span of a content: a token that carries even one character of the prompt is treated as prompt.

A sample to train on is what a client sends, with the generation prompt, and behind it what the model answers: templates
print a turn that is over in another way than they ask for one (Qwen3's empty thoughts, the thoughts that DeepSeek-R1
opens), and training would see another beginning than generation does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from sgt_titan.errors import UserError
from sgt_titan.transform import chat_template
from sgt_titan.transform.chat_template import DATE, Look, Message, Span, look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

TEMPLATE, PROMPT, RESPONSE = 0, 1, 2

# Between turns where there is no template to separate them (template "plain").
TURN_SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids and, for each, TEMPLATE, PROMPT or RESPONSE. ``notes``: what could not be used as it was, in words.
    ``text`` and ``spans``: what was tokenized, and where in it each token starts and ends; empty unless asked for."""

    ids: list[int]
    roles: list[int]
    notes: tuple[str, ...] = ()
    text: str = ""
    spans: Sequence[Span] = ()


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    template: Literal["chat", "plain"],
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
    date: str = DATE,
    tools: Sequence[Any] = (),
    spans: bool = False,
) -> EncodedPrompt:
    """Tokenize turns ``{"role", "content"}`` and label every token.

    RESPONSE is the content of the last turn if it is an assistant's (and no generation prompt follows it),
    with all that the model must generate around it, up to the end-of-turn token. Earlier assistant turns are PROMPT:
    at inference they are part of what the client sends. Turns may have ``tool_calls`` and the last one
    ``reasoning_content``, which precedes the answer; the thoughts of earlier turns are left out, as templates do.

    ``chat`` renders the tokenizer's chat template. ``plain`` is BOS, the prompt (turns joined by a blank line),
    the response, EOS; BOS and EOS where the tokenizer has them, EOS only after a response. Prompt and response
    are tokenized separately there, so that the boundary between them is a token boundary.

    Args:
        variables, date: of the template, see ``chat_template.look``.
        tools: definitions for the template to print; they are PROMPT, except for special tokens.
        spans: also say where each token is in the text.

    Raises:
        UserError: slow tokenizer, no chat template, a turn that is not text, or a template that changes or
            drops contents by more than stripping white space.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "tokenizer: roles need character offsets, which only fast tokenizers have (a tokenizer.json); "
            f"{type(tokenizer).__name__} is a slow one"
        )
    turns = [_turn(i, message) for i, message in enumerate(messages)]
    if not turns:
        raise UserError("has no turns")
    has_response = turns[-1]["role"] == "assistant" and not add_generation_prompt
    notes = [
        "reasoning of earlier turns, which templates leave out"
        for m in (turns[:-1] if has_response else turns)
        if m.pop("reasoning_content", None)
    ][:1]
    if template == "plain":
        encoded = _encode_plain(tokenizer, turns, has_response, tools, spans)
    elif template == "chat":
        encoded = _encode_chat(tokenizer, turns, has_response, add_generation_prompt, look(variables, date), tools)
    else:
        raise UserError(f"template must be chat or plain, got {template!r}")
    where = (encoded.text, encoded.spans) if spans else ("", ())
    return EncodedPrompt(encoded.ids, encoded.roles, (*notes, *encoded.notes), *where)


def _turn(i: int, message: Message) -> dict[str, Any]:
    content, calls = message.get("content"), message.get("tool_calls")
    if content is None and calls:
        content = ""
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise UserError(f"turn {i}: must be {{'role': str, 'content': str}}; other content than text is unsupported")
    kept = ("tool_call_id", "name") if message["role"] == "tool" else ("tool_calls", "reasoning_content")
    rest = {key: message[key] for key in kept if message.get(key)}
    # OpenAI's name for the system turn; templates print any name they are given.
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": content} | rest


def obfuscation_mask(
    roles: Sequence[int] | np.ndarray, *, obfuscate: Literal["prompt", "all"], obfuscate_template: bool = False
) -> np.ndarray:
    """Which tokens of one sample are obfuscated: bool, one per token.

    ``prompt``: PROMPT tokens, plus with ``obfuscate_template`` the TEMPLATE tokens before the first RESPONSE
    token. ``all``: PROMPT and RESPONSE tokens, plus with ``obfuscate_template`` every TEMPLATE token.
    """
    roles = np.asarray(roles)
    if obfuscate == "all":
        return np.ones(len(roles), dtype=bool) if obfuscate_template else roles != TEMPLATE
    mask = roles == PROMPT
    if obfuscate_template:
        mask |= (roles == TEMPLATE) & (np.arange(len(roles)) < response_start(roles))
    return mask


def response_start(roles: Sequence[int] | np.ndarray) -> int:
    """Index of the first RESPONSE token; the number of tokens if there is none."""
    found = np.flatnonzero(np.asarray(roles) == RESPONSE)
    return int(found[0]) if len(found) else len(roles)


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    has_response: bool,
    tools: Sequence[Any],
    spans: bool,
) -> EncodedPrompt:
    notes = ["tools, which a plain template does not print"] if tools else []
    if any("tool_call_id" in m or "name" in m for m in messages):
        notes.append("ids or names of tools in what they say, which a plain template does not print")
    if has_response and messages[-1].get("reasoning_content"):
        notes.append("reasoning, for which a plain template has no place")
    texts = ["\n".join(filter(None, (m["content"], *_as_json(m.get("tool_calls", ()))))) for m in messages]
    prompt = TURN_SEPARATOR.join(filter(None, texts[:-1] if has_response else texts))
    _check_unicode(*texts)
    bos, bos_text, eos = _ends(tokenizer)
    ids, roles, at = [], [], []
    if bos is not None:
        ids.append(bos)
        roles.append(TEMPLATE)
        at.append((0, 0))
        prompt = prompt.removeprefix(bos_text)  # a text that brings its own has one, and it is template
    encoding = _tokenize(tokenizer, prompt)
    prompt_ids = encoding.ids
    if not special_ids(tokenizer).isdisjoint(prompt_ids):
        notes.append(SPECIAL_IN_TEXT)
    ids += prompt_ids
    roles += [PROMPT] * len(prompt_ids)
    if has_response:
        response_ids = _tokenize(tokenizer, texts[-1]).ids
        if not special_ids(tokenizer).isdisjoint(response_ids):
            notes.append(SPECIAL_IN_ANSWER)
        if eos is not None:
            response_ids = [*response_ids, eos]
        ids += response_ids
        roles += [RESPONSE] * len(response_ids)
    if spans:
        at += encoding.offsets
        at += [(len(prompt), len(prompt))] * (len(ids) - len(at))
    return EncodedPrompt(ids, roles, tuple(notes), prompt, at)


def _as_json(calls: Sequence[Any]) -> list[str]:
    functions = (call.get("function", call) if isinstance(call, Mapping) else call for call in calls)
    return [json.dumps(function, ensure_ascii=False) for function in functions]


def _check_unicode(*texts: str) -> None:
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError("a turn is not valid Unicode (a lone surrogate)") from None


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    has_response: bool,
    add_generation_prompt: bool,
    how: Look,
    tools: Sequence[Any],
) -> EncodedPrompt:
    asked = messages[:-1] if has_response else messages
    if not asked:
        raise UserError("the first turn is an answer (assistant), to nothing")
    generation = has_response or add_generation_prompt
    notes: list[str] = []
    brought: list[tuple[int, int]] = []
    calls = [call for m in asked for call in m.get("tool_calls", ())]
    if calls or tools or any("tool_call_id" in m or "name" in m for m in asked):
        text, spans, brought = chat_template.render_with_tools(
            tokenizer, asked, how, generation=generation, tools=tools
        )
        if tools and not brought:
            notes.append(TOOLS_NOT_PRINTED)
        printed = "".join(text[start:end] for start, end in brought)
        if not all(call["function"]["name"] in printed for call in calls if _is_named(call)):
            notes.append(CALLS_NOT_PRINTED)
        if not all(m.get("name", "") in printed and _has_id(printed, m.get("tool_call_id", "")) for m in asked):
            notes.append(IDS_NOT_PRINTED)
    else:
        text, spans = chat_template.render(tokenizer, asked, how, generation=generation)
    own = len(text)  # what follows is the answer
    end = own
    if has_response:
        before, answer, tail, more = _answer(tokenizer, messages, how, text, tools)
        notes += more
        own += len(before)
        end = own + len(answer)
        text += before + answer + tail
    encoding = _tokenize(tokenizer, text)
    ids, offsets = encoding.ids, encoding.offsets
    content = [True] * len(spans) + [False] * len(brought)
    ordered = sorted(zip([*spans, *brought], content, strict=True))
    owners = _owners(offsets, [span for span, _ in ordered])
    roles = [TEMPLATE if owner < 0 else PROMPT for owner in owners]
    special = special_ids(tokenizer)
    if brought:
        written = json.dumps([list(tools), calls], ensure_ascii=False)
        for t, owner in enumerate(owners):
            if owner >= 0 and not ordered[owner][1] and ids[t] in special:
                roles[t] = PROMPT if str(tokenizer.convert_ids_to_tokens(ids[t])) in written else TEMPLATE
    found = [t for t, token in enumerate(ids) if token in special]
    if any(roles[t] == PROMPT for t in found):
        notes.append(SPECIAL_IN_TEXT)
    if has_response:
        # The model also generates what ends its turn: all that follows the content, up to and with the first
        # special token (Llama 2 puts a space before it). Without one, nothing is known to end the turn.
        first = next((t for t, (_, stop) in enumerate(offsets) if stop > own), len(ids))
        after = next((t for t in range(first, len(ids)) if offsets[t][0] >= end and offsets[t][1] > end), len(ids))
        within = {str(tokenizer.convert_ids_to_tokens(ids[t])) for t in found if first <= t < after}
        if any(token in messages[-1]["content"] for token in within.difference(*chat_template.THINKING)):
            notes.append(SPECIAL_IN_ANSWER)
        stop = next((t + 1 for t in found if t >= after), after)
        # A token that also carries the end of the prompt is the prompt's.
        roles[first:stop] = [role if role == PROMPT else RESPONSE for role in roles[first:stop]]
        if chat_template.marks_answers(tokenizer, tools=bool(tools)):
            own_ids, mask = chat_template.marked(tokenizer, messages, how, tools=tools)
            roles, more = _unmarked(ids, roles, own_ids, mask)
            notes += more
    return EncodedPrompt(ids, roles, tuple(notes), text, offsets)


def _unmarked(
    ids: Sequence[int], roles: Sequence[int], own_ids: Sequence[int], mask: Sequence[int]
) -> tuple[list[int], list[str]]:
    """Roles where a template's ``{% generation %}`` marks leave a part of the answer out; notes.

    A template prints the turns as those that are over, which may begin otherwise than what is asked and answered (see
    ``_answer``): the marks are read from the end backwards, as far as both are the same tokens. Marks before the answer
    say nothing here: a client sends the prompt, whatever of it the template marks.
    """
    same = chat_template.shared(ids[::-1], own_ids[::-1])
    if same < len(ids):  # a token before the answer may be the same by accident
        same -= next((k for k, marked in enumerate(mask[len(mask) - same :]) if marked), same)
    read = range(len(ids) - same, len(ids))
    is_left_out = [t in read and role == RESPONSE and not mask[t - len(ids)] for t, role in enumerate(roles)]
    notes = [NOT_MARKED] if any(is_left_out) else []
    if any(role == RESPONSE for role in roles[: read.start]):
        notes.append(MARKS_NOT_READ)
    return [TEMPLATE if out else role for role, out in zip(roles, is_left_out, strict=True)], notes


CLOSED_EMPTY = "answers without thoughts, which the prompt has opened: closed empty"
NOT_MARKED = "what the chat template does not mark as generated in answers: no response"
MARKS_NOT_READ = "{% generation %} marks on the beginning of answers, which the chat template prints otherwise"
SPECIAL_IN_TEXT = "special tokens in the text of prompts (is it rendered already?): they are hidden like words"
SPECIAL_IN_ANSWER = "special tokens in the text of answers (is it rendered already?): the response goes on behind them"
CONTENT_NOT_PRINTED = "words of answers beside calls of tools, which the chat template does not print"
TOOLS_NOT_PRINTED = "tools, which the chat template does not print"
IDS_NOT_PRINTED = "ids or names of tools in what they say, which the chat template does not print"
CALLS_NOT_PRINTED = "calls of tools in earlier turns, which the chat template does not print"


def _has_id(printed: str, name: str) -> bool:
    return name in printed or chat_template.short_id(name) in printed


def _is_named(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], how: Look, asked: str, tools: Sequence[Any]
) -> tuple[str, str, str, list[str]]:
    """What stands behind the generation prompt: words of the template, what the model writes, its turn's end; notes.

    Thoughts that the prompt has opened are gone on with, or closed where there are none; thoughts behind a prompt that
    has closed them are left out, since nobody would generate them.
    """
    answer, notes = messages[-1], []
    frame = chat_template.frame(tokenizer, how, messages[:-1])
    lead, tail, content = frame.lead, frame.tail, answer["content"]
    content = content.lstrip() if frame.left else content
    content = content.rstrip() if frame.right else content
    tags = chat_template.thinking(tokenizer)
    reasoning, before = answer.get("reasoning_content"), ""
    if reasoning and not isinstance(reasoning, str):
        raise UserError("the reasoning of the answer must be text")
    if reasoning and frame.thoughts:
        lead = frame.thoughts[0] + reasoning.strip("\n") + frame.thoughts[1]
    elif reasoning and tags:
        content = f"{tags[0]}\n{reasoning.strip()}\n{tags[1]}\n\n{content}"
    elif reasoning:
        notes.append("reasoning, for which the chat template has no place")
    if tags:
        opening, closing = tags
        trimmed = asked.rstrip()
        if closing in content and not content.lstrip().startswith(opening) and not trimmed.endswith(opening):
            content = f"{opening}\n{content}"  # data of a prompt that opened them
        if content.lstrip().startswith(opening):
            lead = "" if closing in lead or opening in lead else lead
            if trimmed.endswith(opening):
                content = content.lstrip()[len(opening) :]
                content = content.removeprefix(asked[len(trimmed) :])
            elif trimmed.endswith(closing):
                content = content.partition(closing)[2].lstrip()
                notes.append("thoughts of answers, which the prompt has closed already")
        elif trimmed.endswith(opening) and closing in content:
            lead = "" if closing in lead else lead  # data of a prompt that opened them, before one that does
        elif trimmed.endswith(opening) and not (reasoning and frame.thoughts):
            before = "\n\n"[len(asked) - len(trimmed) :] + closing + "\n\n"
            if closing in lead:  # the template closes them itself
                before, lead = lead, ""
            notes.append(CLOSED_EMPTY)
    if answer.get("tool_calls"):
        found = _calls(tokenizer, messages, how, tools, frame, bool(content))
        if found.lead != frame.lead and lead not in ("", frame.lead):
            raise UserError("chat template: prints thoughts otherwise where calls of tools follow")
        lead = lead if found.lead == frame.lead else found.lead
        if content and not found.behind_content:
            notes.append(CONTENT_NOT_PRINTED)
        return before, lead + (content if found.behind_content else "") + found.calls, found.tail, notes
    return before, lead + content, tail, notes


class _Calls(NamedTuple):
    """As a template prints an answer's calls: what stands before them, and what ends the turn behind them."""

    lead: str
    behind_content: bool
    calls: str
    tail: str


def _calls(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    how: Look,
    tools: Sequence[Any],
    frame: chat_template.Frame,
    with_content: bool,
) -> _Calls:
    """Where a turn with calls ends otherwise than others (gpt-oss, GLM), its end is a part of the calls."""
    *turns, last = messages
    mark = "\ue003"
    shown = {**last, "content": mark if with_content else ""}
    shown.pop("reasoning_content", None)

    def rendered(*last: Message, generation: bool = False) -> str:
        return chat_template.apply(tokenizer, [*turns, *last], how, generation=generation, tools=tools, private=True)

    text, lead = rendered(shown), frame.lead
    before = rendered({"role": last["role"], "content": mark}).rpartition(mark)[0]
    if not text.startswith(before):
        before, lead = rendered(generation=True), ""
    left, found, calls = text.removeprefix(before).rpartition(mark)
    tail = frame.tail if calls.endswith(frame.tail) else ""
    calls = calls.removesuffix(tail)
    names = [call["function"]["name"] for call in last["tool_calls"] if _is_named(call)]
    if left or not text.startswith(before) or not calls.strip() or not all(name in calls for name in names):
        raise UserError("chat template: does not print the tool calls of an answer behind its generation prompt")
    return _Calls(lead, bool(found), calls, tail)


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoding:
    """As ``tokenizer(text, add_special_tokens=False)``, cut to no length, without what transformers wraps around the
    library that does it: a tenth of the time that a row takes."""
    core: Tokenizer = tokenizer.backend_tokenizer
    if core.truncation is not None:  # whoever asked for it before
        core.no_truncation()
    if core.padding is not None:
        core.no_padding()
    if core.encode_special_tokens != tokenizer.split_special_tokens:
        core.encode_special_tokens = tokenizer.split_special_tokens
    return core.encode(text, add_special_tokens=False)


@lru_cache(maxsize=4)
def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, str, int | None]:
    """BOS, its text, and EOS. Kept: transformers looks them up anew whenever it is asked, 3 us each."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return bos, "" if bos is None else str(tokenizer.bos_token), eos


@lru_cache(maxsize=4)
def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens, those among the added tokens too."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _owners(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """For each token the index of the span it overlaps, or -1. A token on two spans belongs to the first."""
    filled = [(i, start, end) for i, (start, end) in enumerate(spans) if start < end]
    filled.append((-1, sys.maxsize, sys.maxsize))  # behind the text
    passed = iter(filled)
    owner, first, last = next(passed)
    owners, last_end = [], 0
    for t, (start, end) in enumerate(offsets):
        if start == end:
            # Byte-level tokenizers trim spaces off their offsets, so a token of spaces looks empty: it covers
            # the gap between its neighbours.
            start = min(start, last_end)
            end = max(end, offsets[t + 1][0] if t + 1 < len(offsets) else end)
        if (own_end := offsets[t][1]) > last_end:
            last_end = own_end
        while last <= start:
            owner, first, last = next(passed)
        owners.append(owner if first < end else -1)
    return owners

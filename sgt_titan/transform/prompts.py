"""From chat turns to token ids, with the role of every token. The same code runs in training and at inference.

Which tokens get obfuscated is decided by role: ``TEMPLATE`` (special tokens and the template's own words),
``PROMPT`` (what people wrote) or ``RESPONSE`` (what the model generates).

How roles are found in a chat. The template is rendered twice: once with the turns, once with a unique
placeholder in each turn. The second rendering, split at the placeholders, gives the template's own pieces;
the first must be these pieces with the contents between them, which fixes the character span of every
content exactly. (Searching for the contents alone would go wrong on short ones: "user" occurs in most
templates.) The rendered string is tokenized once with offsets, and a token is content if it overlaps the
span of a content: a token that carries even one character of the prompt is treated as prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from sgt_titan.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

TEMPLATE, PROMPT, RESPONSE = 0, 1, 2

# Between turns where there is no template to separate them (template "plain").
TURN_SEPARATOR = "\n\n"

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids and, for each, TEMPLATE, PROMPT or RESPONSE."""

    ids: list[int]
    roles: list[int]


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    *,
    template: Literal["chat", "plain"],
    add_generation_prompt: bool = False,
) -> EncodedPrompt:
    """Tokenize turns ``{"role", "content"}`` and label every token.

    RESPONSE is the content of the last turn if it is an assistant's (and no generation prompt follows it),
    with everything up to the end-of-turn token the model must generate. Earlier assistant turns are PROMPT:
    at inference they are part of what the client sends.

    ``chat`` renders the tokenizer's chat template. ``plain`` is BOS, the prompt (turns joined by a blank line),
    the response, EOS; BOS and EOS where the tokenizer has them, EOS only after a response. Prompt and response
    are tokenized separately there, so that the boundary between them is a token boundary.

    Raises:
        UserError: slow tokenizer, no chat template, a turn that is not text, or a template that changes or
            drops contents by more than stripping white space.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "tokenizer: roles need character offsets, which only fast tokenizers have (a tokenizer.json); "
            f"{type(tokenizer).__name__} is a slow one"
        )
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UserError(
                f"turn {i}: must be {{'role': str, 'content': str}}; other content than text is unsupported"
            )
    has_response = bool(messages) and messages[-1]["role"] == "assistant" and not add_generation_prompt
    if template == "plain":
        return _encode_plain(tokenizer, messages, has_response)
    if template == "chat":
        return _encode_chat(tokenizer, messages, has_response, add_generation_prompt)
    raise UserError(f"template must be chat or plain, got {template!r}")


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
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], has_response: bool
) -> EncodedPrompt:
    prompt = TURN_SEPARATOR.join(m["content"] for m in (messages[:-1] if has_response else messages) if m["content"])
    ids, roles = [], []
    if tokenizer.bos_token_id is not None:
        ids.append(tokenizer.bos_token_id)
        roles.append(TEMPLATE)
    prompt_ids = tokenize(tokenizer, prompt)["input_ids"]
    ids += prompt_ids
    roles += [PROMPT] * len(prompt_ids)
    if has_response:
        response_ids = tokenize(tokenizer, messages[-1]["content"])["input_ids"]
        if tokenizer.eos_token_id is not None:
            response_ids = [*response_ids, tokenizer.eos_token_id]
        ids += response_ids
        roles += [RESPONSE] * len(response_ids)
    return EncodedPrompt(ids, roles)


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    has_response: bool,
    add_generation_prompt: bool,
) -> EncodedPrompt:
    if not tokenizer.chat_template:
        raise UserError("tokenizer: has no chat template; use template plain")
    rendered, spans = _render(tokenizer, messages, add_generation_prompt)
    encoding = tokenize(tokenizer, rendered, return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    owners = token_owners(encoding["offset_mapping"], spans)
    last = len(messages) - 1
    roles = [
        TEMPLATE if owner < 0 else RESPONSE if has_response and owner == last else PROMPT for owner in owners
    ]  # fmt: skip
    if has_response:
        # The model also generates what ends its turn: all that follows the content, up to and with the first
        # special token (Llama 2 puts a space before it). Without one, nothing is known to end the turn.
        tail = next((t for t, (start, end) in enumerate(encoding["offset_mapping"])
                     if owners[t] < 0 and start >= spans[-1][1] and end > start), len(ids))  # fmt: skip
        special = special_ids(tokenizer)
        stop = next((t for t in range(tail, len(ids)) if ids[t] in special), None)
        if stop is not None:
            roles[tail : stop + 1] = [RESPONSE] * (stop + 1 - tail)
    return EncodedPrompt(ids, roles)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **kwargs: bool):
    # verbose=False: the length warning is noise here, samples are truncated later.
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False, **kwargs)


@lru_cache(maxsize=4)
def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens, those among the added tokens too."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], generation: bool, *, private: bool = False
) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # templates call raise_exception() with their own words, jinja has its own errors
        if type(error).__module__.split(".")[0] != "jinja2":
            raise
        roles = ", ".join(dict.fromkeys(m["role"] for m in messages))
        if private:
            raise UserError(f"chat template: refuses the content of a turn ({roles})") from None
        raise UserError(f"chat template: refuses turns ({roles}): {error}") from error


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], generation: bool
) -> tuple[str, list[Span]]:
    """The rendered chat and the character span of every turn's content in it."""
    # Private-use characters: no template contains them, none strips them.
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    marked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
    for attempt in range(2):
        # Twice, since some templates print the date and midnight may fall between the two renderings.
        # The placeholders first: what a template says when it refuses them cannot repeat the prompt.
        skeleton = _apply(tokenizer, marked, generation)
        rendered = _apply(tokenizer, messages, generation, private=True)
        pieces = _split(skeleton, marks, messages)
        try:
            return rendered, _match(rendered, pieces, messages)
        except UserError:
            if attempt:
                raise
    raise AssertionError("unreachable")


def _split(skeleton: str, marks: list[str], messages: Sequence[dict[str, str]]) -> list[str]:
    # One pass, whatever the number of turns.
    found = [(int(m[1]), *m.span()) for m in re.finditer("\ue000(\\d{1,9})\ue001", skeleton) if int(m[1]) < len(marks)]
    times, order = Counter(i for i, _, _ in found), [i for i, _, _ in found]
    if order != list(range(len(marks))):
        i = next(i for i in range(len(marks)) if times[i] != 1 or order[i] != i)
        what = "drops" if times[i] == 0 else "repeats" if times[i] > 1 else "moves"
        raise UserError(
            f"chat template: {what} the content of turn {i} ({messages[i]['role']}); every turn must appear "
            "once and in order, so use template plain or turns the template keeps"
        )
    starts = [0, *(end for _, _, end in found)]
    pieces = [skeleton[start:at] for start, (_, at, _) in zip(starts, found, strict=False)]
    cursor = starts[-1]
    return [*pieces, skeleton[cursor:]]


def _match(rendered: str, pieces: list[str], messages: Sequence[dict[str, str]]) -> list[Span]:
    spans: list[Span] = []
    cursor = len(pieces[0])
    if not rendered.startswith(pieces[0]):
        raise UserError("chat template: its own words depend on the contents of the turns; use template plain")
    for i, (message, after) in enumerate(zip(messages, pieces[1:], strict=True)):
        text = message["content"]
        is_last = i == len(messages) - 1
        for variant in (text, text.rstrip(), text.lstrip(), text.strip()):
            end = cursor + len(variant)
            fits = rendered[end:] == after if is_last else rendered.startswith(after, end)
            if fits and rendered.startswith(variant, cursor):
                spans.append((cursor, end))
                cursor = end + len(after)
                break
        else:
            raise UserError(
                f"chat template: changes the content of turn {i} ({message['role']}) by more than stripping white "
                "space, so its tokens cannot be told from the template's; use template plain"
            )
    return spans


def token_owners(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """For each token the index of the span it overlaps, or -1. A token on two spans belongs to the first."""
    owners, at, last_end = [], 0, 0
    filled = [(i, start, end) for i, (start, end) in enumerate(spans) if start < end]
    for t, (start, end) in enumerate(offsets):
        if start == end:
            # Byte-level tokenizers trim spaces off their offsets, so a token of spaces looks empty: it covers
            # the gap between its neighbours.
            start = min(start, last_end)
            end = max(end, offsets[t + 1][0] if t + 1 < len(offsets) else end)
        last_end = max(last_end, offsets[t][1])
        while at < len(filled) and filled[at][2] <= start:
            at += 1
        owners.append(filled[at][0] if at < len(filled) and filled[at][1] < end else -1)
    return owners

"""Private values on the way through the client: surrogates into what is encoded, values back into what is answered.

    private = Private.of("patterns,names")
    chat = PrivateChat(sgt, VLLM("https://gpu-server:8000"), private.conversation())
    print(chat.generate(messages).text)

Whatever is not text (token ids) cannot be looked through and is refused: nothing is to pass for looked at that was not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sgt_titan.client.answer import Answer, Delta, Options, gather
from sgt_titan.errors import UserError
from sgt_titan.private import Conversation, Hidden, Restorer, Span, restore, restore_json

if TYPE_CHECKING:  # the encoder imports this file
    from sgt_titan.client.encoder import StainedGlassTransform

Marks = Mapping[int, Iterable[Span]]  # by message


def texts_of(what: Any) -> list[str]:
    """The text of a prompt (one) or of each of its messages, parts joined. Raises UserError for token ids."""
    if isinstance(what, str):
        return [what]
    if not isinstance(what, Sequence) or not what or not all(isinstance(item, dict) for item in what):
        raise UserError("private values: token ids have no text to look for them in; give text or messages")
    return [_content(i, message) for i, message in enumerate(what)]


def _content(index: int, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        found = [part.get("text") if isinstance(part, dict) else None for part in content]
        parts = [part for part in found if isinstance(part, str)]
        if len(parts) < len(found):
            raise UserError(f"messages[{index}].content: only text parts are supported")
        content = "".join(parts)
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        raise UserError(f"messages[{index}].content: must be text")
    return content


def hide(
    conversation: Conversation, what: Any, marks: Marks | None = None
) -> tuple[str | list[dict[str, Any]], list[Hidden]]:
    """The prompt with surrogates, and what was replaced in each text. Tool calls in messages are gone through as well.

    Raises:
        UserError: token ids; marks outside their text, overlapping or of unknown kind; a finder that fails.
    """
    texts = texts_of(what)
    said = [] if isinstance(what, str) else [_strings(m["tool_calls"]) if m.get("tool_calls") else [] for m in what]
    calls = [text for strings in said for text in strings]
    hidden = conversation.hide([*texts, *calls], marks)
    if isinstance(what, str):
        return hidden[0].text, hidden
    messages = []
    for message, text in zip(what, hidden, strict=False):
        new = dict(message)
        if message.get("content") is not None:
            new["content"] = text.text
        if message.get("tool_calls"):
            new["tool_calls"] = mapped(message["tool_calls"], conversation.apply)
        messages.append(new)
    return messages, hidden[: len(texts)]


def mapped(item: Any, change: Any) -> Any:
    """JSON with every string changed, and the strings inside arguments that are JSON themselves."""
    if isinstance(item, str):
        try:
            inner = json.loads(item)
        except (ValueError, RecursionError):
            inner = None
        if isinstance(inner, dict | list):
            return json.dumps(mapped(inner, change), ensure_ascii=False)
        return change(item)
    if isinstance(item, list):
        return [mapped(one, change) for one in item]
    return {key: mapped(value, change) for key, value in item.items()} if isinstance(item, dict) else item


def _strings(item: Any) -> list[str]:
    """All strings of JSON."""
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    mapped(item, keep)
    return found


class ChoiceRestorer:
    """Deltas of one choice in, the same with the values back out: text, thoughts, and the arguments of calls."""

    def __init__(self, conversation: Conversation):
        self._literals = conversation.literals()
        self.text, self.reasoning = conversation.restorer(), conversation.restorer()

    def feed(self, delta: Delta) -> Delta:
        last = delta.finish_reason is not None
        new: dict[str, Any] = {"text": self.text.feed(delta.text, last=last)}
        if hasattr(delta, "reasoning"):
            new["reasoning"] = self.reasoning.feed(delta.reasoning, last=last)
        if getattr(delta, "calls", ()):
            new["calls"] = tuple((number, self._call(call)) for number, call in delta.calls)
        return replace(delta, **new)

    def _call(self, call: Any) -> Any:
        name = restore(call.name, self._literals)[0]
        return replace(call, name=name, arguments=restore_json(call.arguments, self._literals))


def check_options(options: Options) -> None:
    """Raise UserError for what cannot be had of an answer with surrogates in it."""
    if options.logprobs is not None:
        raise UserError("logprobs: are of the surrogates, not of the values put back; leave them or `private` out")


def hidden_options(conversation: Conversation, options: Options) -> Options:
    """Stop strings as the model will write them: with surrogates. Raises as ``check_options``."""
    check_options(options)
    return replace(options, stop=tuple(conversation.apply(stop) for stop in options.stop))


def restored(deltas: Iterable[Delta], conversation: Conversation, n: int) -> Iterator[Delta]:
    """A backend's answers with the values back."""
    choices = [ChoiceRestorer(conversation) for _ in range(n)]
    for delta in deltas:
        yield choices[delta.index].feed(delta)


class PrivateChat:
    """A transform, a backend and a conversation: messages in, answers with the values back out.

    ``last``: the restorers of the answers given last; ``restored`` and ``left`` of each count by kind.
    """

    def __init__(self, sgt: StainedGlassTransform, backend: Any, conversation: Conversation):
        self._sgt, self._backend, self._conversation = sgt, backend, conversation
        self.last: list[Restorer] = []

    def generate(
        self, what: Any, options: Options | None = None, *, marks: Marks | None = None, **changes: Any
    ) -> Answer:
        """As the backend's, of messages or text. Raises UserError as ``hide`` and the backend."""
        options = options or Options(**changes)
        deltas, tokens = self._begin(what, options, marks)
        return gather(deltas, options, tokens)

    def stream(
        self, what: Any, options: Options | None = None, *, marks: Marks | None = None, **changes: Any
    ) -> Iterator[Delta]:
        """As the backend's, of messages or text."""
        return self._begin(what, options or Options(**changes), marks)[0]

    def _begin(self, what: Any, options: Options, marks: Marks | None) -> tuple[Iterator[Delta], int]:
        check_options(options)
        sent, _ = hide(self._conversation, what, marks)
        embeds_TD = self._sgt.encode(sent)
        choices = [ChoiceRestorer(self._conversation) for _ in range(options.n)]
        self.last = [choice.text for choice in choices]
        deltas = self._backend.stream(embeds_TD, hidden_options(self._conversation, options))
        return (choices[delta.index].feed(delta) for delta in deltas), embeds_TD.shape[0]

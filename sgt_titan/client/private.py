"""Private values on the way through the client: surrogates into what is encoded, values back into what is answered.

    private = Private.of("patterns,names")
    chat = PrivateChat(sgt, VLLM("https://gpu-server:8000"), private.conversation())
    print(chat.generate(messages).text)

Whatever is not text (token ids) cannot be looked through and is refused: nothing is to pass for looked at that was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sgt_titan.client.answer import Answer, Delta, Options, gather
from sgt_titan.errors import UserError
from sgt_titan.private import Conversation, Hidden, Span, in_json, restore
from sgt_titan.private.spans import check_marks

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
    if content is None and message.get("role") == "assistant" and len(message.keys() - {"role", "content"}):
        return ""  # calls or thoughts alone; what is neither is refused where the prompt is written
    if not isinstance(content, str):
        raise UserError(f"messages[{index}].content: must be text")
    return content


def hide(
    conversation: Conversation, what: Any, marks: Marks | None = None
) -> tuple[str | list[dict[str, Any]], list[Hidden]]:
    """The prompt with surrogates, and what was replaced in each text. Whatever else of a message a template may write
    (thoughts, calls, names) is gone through as well, message by message: one that comes later changes none before it.

    Raises:
        UserError: token ids; marks outside their text, overlapping or of unknown kind; a finder that fails.
    """
    texts, marks = texts_of(what), marks or {}
    for index, spans in marks.items():
        if not 0 <= index < len(texts):
            raise UserError(f"private marks: text {index} does not exist; there are {len(texts)}")
        check_marks(spans, texts[index], f"text {index}")
    if isinstance(what, str):
        hidden = conversation.hide(texts, marks)
        return hidden[0].text, hidden
    others = [{key: value for key, value in message.items() if key not in ("role", "content")} for message in what]
    flat: list[str] = []
    at: list[int] = []
    for text, other in zip(texts, others, strict=True):
        at.append(len(flat))
        flat += [text, *_strings(other)]
    hidden = conversation.hide(flat, {at[i]: spans for i, spans in marks.items()})
    messages = []
    said = {text: new.text for text, new in zip(flat, hidden, strict=True)}
    for i, (message, other) in enumerate(zip(what, others, strict=True)):
        new = {**message, **mapped(other, said.__getitem__)}
        if message.get("content") is not None:
            new["content"] = hidden[at[i]].text
        messages.append(new)
    return messages, [hidden[i] for i in at]


def mapped(item: Any, change: Any) -> Any:
    """JSON with every string changed, but no name of a field; inside a string that is JSON itself, everything."""
    if isinstance(item, str):
        return in_json(item, change)
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
    """Deltas of one choice in, the same with the values back out: text, thoughts, and the arguments of calls.

    ``restored``, ``left``: counts by kind over all three, complete after the last delta.
    """

    def __init__(self, conversation: Conversation):
        self._calls = conversation.literals(), conversation.traces()
        self.text, self.reasoning = conversation.restorer(), conversation.restorer()
        self._counts = Counter[str](), Counter[str]()  # of calls: restored, left

    @property
    def restored(self) -> Counter[str]:
        return self.text.restored + self.reasoning.restored + self._counts[0]

    @property
    def left(self) -> Counter[str]:
        return self.text.left + self.reasoning.left + self._counts[1]

    def feed(self, delta: Delta) -> Delta:
        last = delta.finish_reason is not None
        new: dict[str, Any] = {"text": self.text.feed(delta.text, last=last)}
        if hasattr(delta, "reasoning"):
            new["reasoning"] = self.reasoning.feed(delta.reasoning, last=last)
        if getattr(delta, "calls", ()):
            new["calls"] = tuple((number, self._call(call)) for number, call in delta.calls)
        return replace(delta, **new)

    def _call(self, call: Any) -> Any:
        def back(text: str) -> str:
            new, restorer = restore(text, *self._calls)
            for counts, one in zip(self._counts, (restorer.restored, restorer.left), strict=True):
                counts.update(one)
            return new

        return replace(call, name=back(call.name), arguments=in_json(call.arguments, back))


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

    ``last``: what put the values back into the answers given last; ``restored`` and ``left`` of each count by kind.
    """

    def __init__(self, sgt: StainedGlassTransform, backend: Any, conversation: Conversation):
        self._sgt, self._backend, self._conversation = sgt, backend, conversation
        self.last: list[ChoiceRestorer] = []

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
        self.last = choices = [ChoiceRestorer(self._conversation) for _ in range(options.n)]
        deltas = self._backend.stream(embeds_TD, hidden_options(self._conversation, options))
        return (choices[delta.index].feed(delta) for delta in deltas), embeds_TD.shape[0]

"""The request field ``private``, which never leaves: what of a prompt gets surrogates, and whose values come back.

    "private": true | false | {"find": "patterns,names", "conversation": "NAME", "marks": [
        {"message": 0, "start": 8, "stop": 20, "kind": "name"}]}

true, or no field: as the proxy was started (``--private``). false: nothing for this request. A conversation has a name
of the client's, or one made of how it begins with its values taken out, so that a proxy remembers nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from sgt_titan.client.private import hide, mapped, texts_of
from sgt_titan.errors import UserError
from sgt_titan.private import Conversation, Hidden, Private, Span, parse_marks
from sgt_titan.serving.errors import RequestError

FIELDS = ("find", "conversation", "marks")
# What a client may ask for. A detector's model is a path on this machine, which is not a client's to name.
FINDERS = ("patterns", "names", "capitals")
MAX_MARKS = 10_000


@dataclass(frozen=True)
class Asked:
    """One prompt as it goes on, and the conversation that puts its values back; None: nothing was looked for."""

    what: Any
    conversation: Conversation | None = None
    hidden: list[Hidden] = field(default_factory=list, repr=False)

    def words(self, text: str) -> str:
        """Words of ours with the values that are known replaced in them."""
        return self.conversation.apply(text) if self.conversation is not None else text

    def tools(self, tools: Any) -> Any:
        """Definitions of tools with the values that are known replaced in them."""
        return mapped(tools, self.conversation.apply) if self.conversation is not None and tools else tools


def ask(default: Private | None, said: Any, whats: Iterable[Any], *, logprobs: bool = False) -> list[Asked]:
    """Every prompt of a request, with surrogates where ``said`` (the field) or ``default`` (the proxy's) asks for them.

    Raises:
        RequestError: a field that is none, a finder that a client may not name, marks that are none or outside their
            message, token ids, log probabilities (they are of the surrogates).
    """
    whats = list(whats)
    private, name, marks = _wanted(default, said)
    if private is None:
        return [Asked(what) for what in whats]
    if logprobs:
        raise RequestError(
            "logprobs: are of the surrogates, not of the values put back; set private: false", param="logprobs"
        )
    if marks and len(whats) != 1:
        raise RequestError("private.marks: belong to one prompt; send several requests", param="private")
    found = []
    for number, what in enumerate(whats):
        try:
            own = name if len(whats) == 1 or name is None else f"{name}/{number}"
            talk = private.conversation(own or private.name_of(_beginning(what), _first(marks, what)))
            new, hidden = hide(talk, what, marks)
        except UserError as error:
            raise RequestError(str(error), param="private", code="private_values") from None
        found.append(Asked(new, talk, hidden))
    return found


def spans(asked: Asked) -> list[dict[str, Any]]:
    """What becomes what, for /v1/inspect."""
    return [
        {"message": i, "start": item.span.start, "stop": item.span.stop, "kind": item.span.kind, "sent": item.surrogate}
        for i, text in enumerate(asked.hidden)
        for item in text.replaced
    ]


def _wanted(default: Private | None, said: Any) -> tuple[Private | None, str | None, dict[int, list[Span]]]:
    if said is None or said is True:
        if said and default is None:
            raise RequestError(
                'private: this proxy looks for nothing by itself; say {"find": "patterns"}', param="private"
            )
        return default, None, {}
    if said is False:
        return None, None, {}
    if not isinstance(said, dict) or set(said) - set(FIELDS):
        raise RequestError(f"private: must be true, false or an object of {', '.join(FIELDS)}", param="private")
    name = said.get("conversation")
    if name is not None and not (isinstance(name, str) and 0 < len(name) <= 200):
        raise RequestError("private.conversation: must be a text of at most 200 characters", param="private")
    private = default
    if (find := said.get("find")) is not None:
        if not isinstance(find, str) or any(one.strip() not in (*FINDERS, "") for one in find.split(",")):
            raise RequestError(f"private.find: must name some of {', '.join(FINDERS)}", param="private")
        private = _named(find, default)
    return private or _named("", None), name, _marks(said.get("marks") or [])


def _named(find: str, default: Private | None) -> Private:
    try:
        return _loaded(find, default.key if default is not None else None)
    except UserError as error:
        raise RequestError(str(error), param="private") from None


@lru_cache(maxsize=16)
def _loaded(find: str, key: bytes | None) -> Private:
    return Private.of(find, key=key)


def _marks(listed: Any) -> dict[int, list[Span]]:
    if not isinstance(listed, list) or len(listed) > MAX_MARKS or not all(isinstance(item, dict) for item in listed):
        raise RequestError(f"private.marks: must be a list of at most {MAX_MARKS} objects", param="private")
    found: dict[int, list[Span]] = {}
    for item in listed:
        message = item.get("message", 0)
        if type(message) is not int:
            raise RequestError("private.marks: message must be a whole number", param="private")
        try:
            spans = parse_marks([{k: v for k, v in item.items() if k != "message"}], "private.marks")
        except UserError as error:
            raise RequestError(str(error), param="private") from None
        found.setdefault(message, []).extend(spans)
    return found


def _beginning(what: Any) -> list[str]:
    """Everything up to the first turn of a user: the same in every turn of a conversation."""
    if isinstance(what, list):
        first = next((i for i, m in enumerate(what) if isinstance(m, dict) and m.get("role") == "user"), len(what))
        what = what[: first + 1] if all(isinstance(m, dict) for m in what) else what
    return texts_of(what)


def _first(marks: dict[int, list[Span]], what: Any) -> dict[int, list[Span]]:
    count = len(_beginning(what))
    return {i: spans for i, spans in marks.items() if 0 <= i < count}

"""Private values: surrogates on the way out, the values again on the way in (docs/PRIVATE_VALUES.md).

    private = Private.of("patterns,names")
    conversation = private.conversation()
    sent = conversation.hide(["My name is Ada Lovelace."])[0].text
    restorer = conversation.restorer()
    shown = restorer.feed(answer, last=True)

Pure text: no torch, no network.
"""

from __future__ import annotations

from sgt_titan.private.conversation import Conversation, Hidden, Replaced, Unit
from sgt_titan.private.policy import Private, parse_marks
from sgt_titan.private.restore import Literal, Restorer, in_json, restore
from sgt_titan.private.spans import Span

__all__ = [
    "Conversation",
    "Hidden",
    "Literal",
    "Private",
    "Replaced",
    "Restorer",
    "Span",
    "Unit",
    "in_json",
    "parse_marks",
    "restore",
]

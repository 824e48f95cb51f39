"""Surrogates through the client: what is encoded does not depend on the values, and answers come back with them."""

import json
from types import SimpleNamespace

import pytest
import torch

from sgt_titan import cli
from sgt_titan.client import Delta, PrivateChat
from sgt_titan.client.private import ChoiceRestorer, hide, mapped
from sgt_titan.errors import UserError
from sgt_titan.private import Private, Span, restore

PRIVATE = Private.of("patterns", key=b"k" * 32)


def messages(name, mail):
    return [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": f"I am {name}, "}, {"type": "text", "text": mail}]},
    ]


def marks(name):
    return {1: [Span(5, 5 + len(name), "name")]}


class Echo:
    """A transform and a backend whose answer is what it was sent, a character at a time."""

    def __init__(self, make=lambda text: text):
        self.make, self.options = make, None

    def encode(self, what):
        self.text = what if isinstance(what, str) else what[-1]["content"]
        return torch.zeros(3, 2)

    def stream(self, embeds_TD, options):
        self.options = options
        answer = self.make(self.text)
        for index in range(options.n):
            for i, c in enumerate(answer):
                yield Delta(index, c, finish_reason="stop" if i == len(answer) - 1 else None)


def test_the_same_bytes_whatever_the_values(sgt):
    sent = []
    for name, mail in (("Ada Lovelace", "ada@post.org"), ("Bo Ritter", "bo@mail.net")):
        talk = PRIVATE.conversation("c")
        sent.append(sgt.encode(hide(talk, messages(name, mail), marks(name))[0]))
    assert torch.equal(*sent)
    clear = sgt.encode(messages("Ada Lovelace", "ada@post.org"))
    assert clear.shape != sent[0].shape or not torch.equal(clear, sent[0])


def test_encode_takes_a_conversation(sgt):
    one, other = (sgt.encode(f"mail {m}", private=PRIVATE.conversation("c")) for m in ("ada@x.org", "bob@y.net"))
    assert torch.equal(one, other)
    with pytest.raises(UserError, match="token ids have no text"):
        sgt.encode([5, 6, 7], private=PRIVATE.conversation())


def test_a_chat_comes_back_with_its_values():
    echo = Echo()
    chat = PrivateChat(echo, echo, PRIVATE.conversation("c"))
    answer = chat.generate(messages("Ada Lovelace", "ada@post.org"), marks=marks("Ada Lovelace"), n=2)
    assert [c.text for c in answer.choices] == ["I am Ada Lovelace, ada@post.org"] * 2
    assert "Ada" not in echo.text and "post.org" not in echo.text
    assert chat.last[0].restored == {"name": 2, "email": 1} or chat.last[0].restored["email"] == 1


def test_stop_strings_are_of_surrogates():
    echo = Echo()
    talk = PRIVATE.conversation("c")
    list(PrivateChat(echo, echo, talk).stream("mail ada@post.org", stop=("ada@post.org", "END")))
    assert echo.options.stop == (talk.apply("ada@post.org"), "END") and echo.options.stop[0] in echo.text


def test_log_probabilities_are_refused_before_anything_is_sent():
    echo = Echo()
    with pytest.raises(UserError, match="logprobs"):
        PrivateChat(echo, echo, PRIVATE.conversation()).generate("hello", logprobs=0)
    assert echo.options is None


def test_tool_calls_in_messages_and_in_answers():
    talk = PRIVATE.conversation("c")
    call = {"function": {"name": "mail", "arguments": json.dumps({"to": "ada@post.org", "n": 3})}}
    history = [
        {"role": "user", "content": "mail ada@post.org"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    sent, _ = hide(talk, history)
    assert (
        "ada@post.org" not in json.dumps(sent)
        and json.loads(sent[1]["tool_calls"][0]["function"]["arguments"])["n"] == 3
    )
    assert history[1]["tool_calls"][0] is call and "ada@post.org" in call["function"]["arguments"], (
        "the caller's own stays"
    )
    # A value that is only in the arguments of a call is found there.
    alone = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert "ada@post.org" not in json.dumps(hide(PRIVATE.conversation("d"), alone)[0])


def test_all_that_a_template_writes_of_a_message_is_gone_through():
    """Thoughts, names, keys and numbers of arguments: an agent sends back what it was shown, with the values in it."""
    arguments = json.dumps({"ada@post.org": {"card": 4111111111111111}, "raw": json.dumps(["+44 20 7946 0958"])})
    turns = [
        {"role": "user", "content": "mail ada@post.org"},
        {"role": "assistant", "content": None, "reasoning_content": "ada@post.org? From +44 20 7946 0958."},
        {"role": "assistant", "content": "", "reasoning": "ada@post.org", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "mail", "arguments": arguments}}]},
        {"role": "tool", "name": "bob@x.net", "tool_call_id": "c1", "content": "ok"},
    ]  # fmt: skip
    talk = PRIVATE.conversation("c")
    sent, hidden = hide(talk, turns)
    said = json.dumps(sent)
    assert not any(value in said for value in ("ada", "post.org", "4111111111111111", "7946", "bob"))
    assert len(hidden) == len(turns) and sent[2]["tool_calls"][0]["id"] == "c1"
    back = json.loads(sent[2]["tool_calls"][0]["function"]["arguments"])
    assert isinstance(next(iter(back.values()))["card"], int), "a number stays one"
    literals = talk.literals()
    shown = mapped(sent, lambda text: restore(text, literals)[0])
    assert shown == turns


def test_a_longer_conversation_with_calls_keeps_its_surrogates():
    call = {"function": {"name": "mail", "arguments": json.dumps({"to": "ada@post.org"})}}
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    later = [*turns, {"role": "user", "content": "and bob@x.net"}]
    first, second = (hide(PRIVATE.conversation("c"), what)[0] for what in (turns, later))
    assert second[:2] == first


def test_arguments_of_an_answers_calls_come_back():
    from dataclasses import dataclass, field, replace

    @dataclass(frozen=True)
    class Call:
        name: str
        arguments: str

    @dataclass(frozen=True)
    class Rich(Delta):
        reasoning: str = ""
        calls: tuple = field(default=())

    talk = PRIVATE.conversation("c")
    surrogate = talk.hide(["mail ada@post.org"])[0].replaced[0].surrogate
    delta = Rich(0, "", reasoning=f"to {surrogate}", calls=((0, Call("mail", json.dumps({"to": surrogate}))),))
    choice = ChoiceRestorer(talk)
    found = choice.feed(replace(delta, finish_reason="tool_calls"))
    assert choice.restored == {"email": 2} and not choice.left, "counted in thoughts and calls as well"
    assert found.reasoning == "to ada@post.org" and json.loads(found.calls[0][1].arguments) == {"to": "ada@post.org"}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only text parts"),
        ([{"role": "user", "content": 5}], "must be text"),
        ([], "no text"),
        (SimpleNamespace(ids=[1]), "no text"),
    ],
)
def test_what_cannot_be_looked_through(what, message):
    with pytest.raises(UserError, match=message):
        hide(PRIVATE.conversation(), what)


def test_inspect_shows_what_becomes_what(identity_export, tmp_path, capsys):
    (tmp_path / "text").write_text("mail ada@x.org")
    words = ["inspect", str(identity_export), str(tmp_path / "text"), "--private", "patterns"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "1 private values found" in out and "ada@x.org  ->  " in out and ".example" in out.split("reads:")[1]
    assert "ada@x.org" not in out.split("reads:")[1]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["private"]
    assert [item["kind"] for item in found] == ["email"]
    assert cli.main([*words[:-1], "nonsense"]) == 2
    assert "no finder" in capsys.readouterr().err

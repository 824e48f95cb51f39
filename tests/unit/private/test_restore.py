"""Back into answers: forms, streams, tool calls, and the count of what did not come back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgt_titan.private import Conversation, Span, in_json, restore
from sgt_titan.private.patterns import find_patterns

TEXT = (
    "I am Ada Lovelace, card 4111 1111 1111 1111, call 212-940-8830, paid $1,694.33 on 12 March 1985, order XS-863504."
)


@pytest.fixture(scope="module")
def talk():
    conversation = Conversation(b"k" * 32, "c", [find_patterns])
    conversation.hide([TEXT], {0: [Span(5, 17, "name")]})
    return conversation


@pytest.fixture(scope="module")
def words(talk):
    return {unit.norm: unit.surrogate for unit in talk.units}


def back(talk, text):
    return talk.restorer().feed(text, last=True)


def test_forms_of_a_name(talk, words):
    first, last = words["ada"], words["lovelace"]
    answer = f"{first}'s letter, Mr {last}, {first.upper()}, the {last}s, {first[0]}. {last}, dear {first.lower()}."
    assert back(talk, answer) == "Ada's letter, Mr Lovelace, ADA, the Lovelaces, A. Lovelace, dear ada."


def test_not_inside_a_word(talk, words):
    inside = f"{words['ada']}ville and un{words['lovelace'].lower()}"
    assert back(talk, inside) == inside


def test_forms_of_numbers(talk, words):
    card, phone = words["4111111111111111"], words["2129408830"]
    dashed = "-".join(card[i : i + 4] for i in range(0, 16, 4))
    assert back(talk, f"{card} {dashed} ...{card[-4:]}") == "4111111111111111 4111-1111-1111-1111 ...1111"
    assert back(talk, f"({phone[:3]}) {phone[3:6]}-{phone[6:]}") == "(212) 940-8830"
    amount = words["$1,694.33"]
    assert back(talk, f"{amount}; {amount[1:]}; {amount[1:].replace(',', '')}") == "$1,694.33; 1,694.33; 1694.33"


def test_forms_of_dates(talk, words):
    from datetime import date

    from sgt_titan.private import dates

    day = date.fromisoformat(words["1985-03-12"])
    answer = f"{day.isoformat()} or {dates.write(day, '{B} {d}, {Y}')}"
    assert back(talk, answer) == "1985-03-12 or March 12, 1985"


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_stream_cut_anywhere_is_the_whole(talk, words, data):
    pieces = [
        *words.values(),
        "A",
        " and ",
        "Mr ",
        "'s",
        "\n",
        "555-01",
        "9",
        words["ada"][:3],
        words["lovelace"] + "x",
    ]
    answer = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=12)))
    whole = talk.restorer()
    expected = whole.feed(answer, last=True)
    restorer, shown = talk.restorer(), ""
    for start, stop in zip([0, *cuts], [*cuts, len(answer)], strict=True):
        shown += restorer.feed(answer[start:stop], last=stop == len(answer) and start == ([0, *cuts])[-1])
    assert shown + restorer.feed("", last=True) == expected
    assert (restorer.restored, restorer.left) == (whole.restored, whole.left)


def test_a_stream_holds_back_only_what_could_be_a_surrogate(talk, words):
    restorer = talk.restorer()
    assert restorer.feed("Hello there, ") == "Hello there, "
    assert restorer.feed(words["ada"]) == ""
    assert restorer.feed(" went home. ") == "Ada went home. "


def test_what_does_not_come_back_is_counted(talk, words):
    restorer = talk.restorer()
    restorer.feed(f"{words['lovelace']}ovich and {words['ada']} called", last=True)
    assert restorer.restored == {"name": 1} and restorer.left == {"name": 1}


def test_tool_call_arguments():
    conversation = Conversation(b"k" * 32, "c", [])
    text = 'I am "Bo\\b" O’Hara, id 73921.'
    conversation.hide([text], {0: [Span(5, 11, "text"), Span(23, 28, "number")]})
    units = {unit.value: unit.surrogate for unit in conversation.units}
    arguments = json.dumps(
        {"who": units['"Bo\\b"'], "id": units["73921"], "n": int(units["73921"]), "deep": [{"x": 1}]}
    )

    def back(text):
        return restore(text, conversation.literals())[0]

    got = json.loads(in_json(arguments, back))
    assert got == {"who": '"Bo\\b"', "id": "73921", "n": 73921, "deep": [{"x": 1}]}
    assert in_json("not json " + units["73921"], back) == "not json 73921"


def test_two_values_of_one_form_are_neither():
    conversation = Conversation(b"k" * 32, "c", [find_patterns])
    conversation.hide(["4111 1111 1111 1111"])
    literals = conversation.literals()
    card = conversation.units[0].surrogate
    assert literals[card[-4:]].value == "1111"
    assert restore("nothing known", {})[0] == "nothing known"


def test_an_alternation_takes_the_longest_that_fits():
    from sgt_titan.private.spans import alternation

    literals = ["a", "ab", "abc", "abcd", "abx", "b.c", "zz"]
    found = [m[0] for m in alternation(literals).finditer("abcde abx abc! ab a b.c bxc zzz")]
    assert found == ["abcd", "abx", "abc", "ab", "a", "b.c", "zz"]


def test_a_long_prompt_with_many_values():
    text = " ".join(
        f"mail u{i:05d}x@host{i % 50}.org about it, please, and then go on with the rest." for i in range(600)
    )
    talk = Conversation(b"k" * 32, "c", [find_patterns])
    sent = talk.hide([text])[0]
    assert len(sent.replaced) == 600 and "u00017x" not in sent.text
    assert talk.restorer().feed(sent.text, last=True) == text

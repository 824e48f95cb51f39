"""Surrogates: same value same surrogate, no value in what is sent, nothing of it in the choice, all of it back."""

import hashlib
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgt_titan.errors import UserError
from sgt_titan.private import Conversation, Private, Span, amounts, checksums, dates, tables
from sgt_titan.private.own import make_own
from sgt_titan.private.patterns import find_patterns

KEY = bytes(range(32))
TEXTS = [
    "I am {name}, born {born}, hired {hired}. Card {card}, phone {phone}, mail {mail}, order {order}, I paid {amount}.",
    "{upper} writes: does Mr {last}'s card ending in {end} work? {first}'s IBAN is {iban}, server {ip}, key {key}.",
]
ONE = {
    "name": "Janet Falraton", "first": "Janet", "last": "Falraton", "upper": "JANET FALRATON", "born": "24 March 1955",
    "hired": "12 June 1999", "card": "4111-1111-1111-1111", "end": "1111", "phone": "212-940-8830",
    "mail": "janet.falraton@gmail.com", "order": "XS-863504", "amount": "$694.33",
    "iban": "DE89 3704 0044 0532 0130 00", "ip": "10.1.2.3", "key": "sk-abcdefghijklmnop1234",
}  # fmt: skip
OTHER = {
    "name": "Ugo Brontetti", "first": "Ugo", "last": "Brontetti", "upper": "UGO BRONTETTI", "born": "11 April 1971",
    "hired": "29 August 2003", "card": "5500-0055-5555-5559", "end": "5559", "phone": "415-221-7071",
    "mail": "ugo.brontetti@posteo.de", "order": "QK-117420", "amount": "$210.98",
    "iban": "GB29 NWBK 6016 1331 9268 19", "ip": "172.16.254.9", "key": "sk-ZZtop9988776655443ab",
}  # fmt: skip


def filled(values):
    """The texts, and marks for their names; the rest is found by patterns."""
    texts = [text.format(**values) for text in TEXTS]
    names = [[values["name"]], [values["upper"], values["last"], values["first"]]]
    marks = {}
    for i, (text, words) in enumerate(zip(texts, names, strict=True)):
        spans = {m.span() for word in words for m in re.finditer(rf"\b{word}\b", text)}
        spans = {s for s in spans if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in spans)}
        marks[i] = [Span(*span, "name") for span in spans if "@" not in text[span[1] : span[1] + 12]]
    return texts, marks


def conversation(name="c", key=KEY, finders=(find_patterns,), **kwargs):
    return Conversation(key, name, finders, **kwargs)


def sent(values, **kwargs):
    texts, marks = filled(values)
    talk = conversation(**kwargs)
    return [hidden.text for hidden in talk.hide(texts, marks)], talk, texts


def test_no_value_is_sent_and_every_one_comes_back():
    out, talk, texts = sent(ONE)
    for value in [*ONE.values(), "falraton", "41111111", "2129408830"]:
        assert not any(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.I) for text in out), value
    for text, original in zip(out, texts, strict=True):
        assert talk.restorer().feed(text, last=True) == original


def test_what_is_sent_does_not_depend_on_the_values():
    """The certificate: other values of the same shapes, the same bytes."""
    assert sent(ONE)[0] == sent(OTHER)[0]


def test_what_it_does_depend_on():
    """Shapes: a number with more digits, another spelling of the date. And which values are equal."""
    assert sent(ONE)[0] != sent(ONE | {"amount": "$1694.33"})[0]
    assert sent(ONE)[0] != sent(ONE | {"born": "1955-03-24"})[0]
    assert sent(ONE)[0] != sent(ONE | {"hired": "12 June 1949"})[0]  # the order of dates
    assert sent(ONE)[0] != sent(ONE | {"last": "Otherman"})[0]


def test_a_conversation_has_its_own_surrogates_and_so_has_a_key():
    first = {unit.surrogate for unit in sent(ONE)[1].units}
    for other in (sent(ONE, name="d")[1], sent(ONE, key=bytes(32))[1]):
        assert len(first & {unit.surrogate for unit in other.units}) <= 1  # a first name of sixty may be the same


def test_a_kept_key_gives_the_same_surrogates_in_another_process(tmp_path):
    """Whatever a process orders its sets by; and another conversation's are others there too."""
    (tmp_path / "key").write_text("ab" * 32)
    (tmp_path / "key").chmod(0o600)
    program = (
        "import sys; from sgt_titan.private import Private, Span\n"
        "private = Private.of('patterns', key_file=sys.argv[1])\n"
        "for name in ('c', 'c', 'd'):\n"
        "    hidden = private.conversation(name).hide([sys.argv[2], sys.argv[3]], {0: [Span(5, 19, 'name')]})\n"
        "    print(' | '.join(one.text for one in hidden))\n"
    )
    texts = [text.format(**ONE) for text in TEXTS]
    out = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "key"), *texts],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout.splitlines()
        for seed in ("1", "2")
    ]  # fmt: skip
    assert out[0] == out[1] and out[0][0] == out[0][1] != out[0][2]
    own = Private.of("patterns", key=bytes.fromhex("ab" * 32)).conversation("c")
    assert " | ".join(one.text for one in own.hide(texts, {0: [Span(5, 19, "name")]})) == out[0][0]


def test_who_draws_otherwise_is_another_version():
    """Conversations that go on after an upgrade find their surrogates again, and token caches are named by it."""
    sums = "I paid $500.00 and $200.00, together $700.00, from 10.0.0.1 and by https://u:p@site.org/a."
    found = "\n".join([*sent(ONE)[0], conversation().hide([sums])[0].text])
    assert (tables.VERSION, hashlib.sha256(found.encode()).hexdigest()[:16]) == ("2", "da5dc73b6a0e5f21"), found


def test_a_longer_conversation_keeps_its_surrogates():
    texts, marks = filled(ONE)
    one = conversation().hide(texts[:1], {0: marks[0]})
    two = conversation().hide([*texts, "And 5500-0055-5555-5559?"], marks)
    assert one[0].text == two[0].text


def test_a_value_found_late_is_replaced_early_too():
    talk = conversation()
    hidden = talk.hide(["Ask Falraton.", "I am Falraton."], {1: [Span(5, 13, "name")]})
    assert "Falraton" not in hidden[0].text and hidden[0].replaced[0].surrogate == hidden[1].replaced[0].surrogate


def test_formats_checksums_and_reserved_ranges():
    out, talk, _ = sent(ONE)
    found = {unit.kind: unit.surrogate for unit in talk.units}
    assert checksums.luhn(found["card"]) and found["card"][0] == "9" and len(found["card"]) == 16
    assert checksums.iban(found["iban"]) and found["iban"][4] == "9"
    assert re.search(r"phone \d{3}-555-01\d\d", out[0]) and re.search(r"Card 9\d{3}-\d{4}-\d{4}-\d{4}", out[0])
    assert re.search(r"server (192\.0\.2|198\.51\.100|203\.0\.113)\.\d+", out[1])
    assert re.search(r"order [A-Z]{2}-\d{6}, I paid \$[1-9]\d\d\.\d\d", out[0])
    assert found["email"].endswith(".example")
    assert dates.read(re.search(r"born (\d+ \w+ \d{4})", out[0])[1])


def test_relations_stay():
    out, talk, _ = sent(ONE)
    found = {unit.norm: unit.surrogate for unit in talk.units}
    first, last = found["janet"], found["falraton"]
    assert f"I am {first} {last}" in out[0] and out[1].startswith(f"{first} {last}".upper())
    assert f"Mr {last}'s" in out[1] and f"{first}'s IBAN" in out[1]
    assert f"{first}.{last}@".lower() in out[0]
    assert found["1955-03-24"] < found["1999-06-12"]  # dates keep their order
    assert f"ending in {found['4111111111111111'][-4:]}" in out[1]
    # ... and the card's end, where it comes first.
    talk = conversation()
    hidden = talk.hide(["the one ending in 1111", "Card 4111 1111 1111 1111."])
    assert hidden[1].text[-5:-1] == hidden[0].text[-4:] and checksums.luhn(re.sub(r"\D", "", hidden[1].text))


def test_mail_addresses_made_of_a_name():
    text = "I am Ada Lovelace, A. Lovelace: alovelace@acme.com, adal@acme.com, lovelace.ada1815@post.org."
    talk = conversation()
    hidden = talk.hide([text], {0: [Span(5, 17, "name"), Span(19, 30, "name")]})[0].text
    found = {unit.norm: unit.surrogate.lower() for unit in talk.units}
    first, last = found["ada"], found["lovelace"]
    one, two, three = re.findall(r"[\w.]+@[\w.-]+\.example", hidden)
    assert one.startswith(first[0] + last + "@") and two.startswith(first + last[0] + "@")
    assert re.match(rf"{last}\.{first}\d{{4}}@", three) and "1815" not in three
    assert one.partition("@")[2] == two.partition("@")[2] != three.partition("@")[2]
    assert talk.restorer().feed(hidden, last=True) == text


def test_many_dates_keep_their_order():
    days = ["1999-01-05", "1950-01-01", "2019-12-31", "1975-06-30", "1999-01-06", "1960-02-29"]
    talk = conversation()
    talk.hide([f"on {day}" for day in days])
    units = sorted((unit.norm, unit.surrogate) for unit in talk.units)
    assert [s for _, s in units] == sorted(s for _, s in units) and len({s for _, s in units}) == len(days)


def _amounts(text):
    return [amounts.read(m[0]).value for m in re.finditer(r"\$[\d.,]*\d", text)]


BILLS = ["Fee $1,240.50 and tax $235.70, in all $1,476.20.", "Fee $3,100.25 and tax $620.05, in all $3,720.30."]


def test_amounts_that_add_up_still_do():
    out = [conversation().hide([bill])[0].text for bill in BILLS]
    assert out[0] == out[1], "what is sent depends on that they add up, not on them"
    fee, tax, total = _amounts(out[0])
    assert fee + tax == total and not set(_amounts(BILLS[0])) & {fee, tax, total}
    assert out[0] != conversation().hide([BILLS[0].replace("476.20", "476.21")])[0].text
    # The total first; and a list with its total; and what comes back.
    for text in ("$300 in all: $100, $80 and $120.", "$100, $80, $120 make $300.", "$300 is $250.50 and $49.50"):
        talk = conversation()
        hidden = talk.hide([text])[0].text
        found = _amounts(hidden)
        assert 2 * max(found) == sum(found), hidden
        assert talk.restorer().feed(hidden, last=True) == text


def test_amounts_that_add_up_over_turns():
    turns = ["I paid $900.", "Of it $150 was for the room", "and $750 for the flight."]
    kept = 0
    for number in range(20):
        hidden = conversation(name=f"c{number}").hide(turns)
        total, room, flight = (_amounts(one.text)[0] for one in hidden)
        kept += total == room + flight
        assert conversation(name=f"c{number}").hide(turns[:2])[1].text == hidden[1].text
    assert kept >= 5, "a total that was sent before its parts leaves room for them about half the time"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([*tables.FIRST, "Ada", "Bo", "Zoe"]), min_size=1, max_size=70, unique=True),
    st.binary(min_size=32, max_size=32),
)
def test_two_values_never_share_a_surrogate_and_none_is_in_the_text(names, key):
    text = " and ".join(names)
    marks, at = [], 0
    for name in names:
        marks.append(Span(at, at + len(name), "name"))
        at += len(name) + 5
    talk = conversation(key=key, finders=())
    hidden = talk.hide([text], {0: marks})[0]
    stands_for = [unit.surrogate.casefold() for unit in talk.units]
    assert len(set(stands_for)) == len(names) == len(talk.units)
    assert not set(stands_for) & {name.casefold() for name in names}
    assert talk.restorer().feed(hidden.text, last=True) == text


def test_a_surrogate_that_the_text_says_later_is_a_value_itself():
    talk = conversation(finders=())
    first = talk.hide(["I am Ada."], {0: [Span(5, 8, "name")]})[0].replaced[0].surrogate
    both = ["I am Ada.", f"Not {first}!"]
    hidden = conversation(finders=()).hide(both, {0: [Span(5, 8, "name")]})
    assert first not in hidden[1].text and first in hidden[0].text
    again = conversation(finders=())
    again.hide(both, {0: [Span(5, 8, "name")]})
    assert again.restorer().feed(hidden[1].text, last=True) == both[1]


def test_an_ordinary_word_in_lower_case_is_not_the_name():
    talk = conversation(finders=())
    hidden = talk.hide(["Rose, a rose is a rose. ROSE!"], {0: [Span(0, 4, "name")]})[0]
    assert hidden.text.count("rose") == 2 and "ROSE" not in hidden.text and "Rose" not in hidden.text


def test_a_whole_name_in_lower_case_is_found_where_it_was_known():
    turns = ["ask emily watson, not emily", "I am Emily Watson."]
    talk = conversation(finders=())
    hidden = talk.hide(turns, {1: [Span(5, 17, "name")]})
    assert "emily watson" not in hidden[0].text and hidden[0].text.endswith("not emily"), "one word may be ordinary"
    assert hidden[0].text.split(",")[0][4:] == hidden[1].text[5:-1].lower()
    later = conversation(finders=()).load(talk.as_dict())
    assert "emily watson" not in later.hide(["emily watson?"])[0].text
    assert later.restorer().feed(hidden[0].text, last=True) == turns[0]


def test_values_split_over_turns_are_found_by_their_pieces():
    """As far as each piece is a value by itself: eight digits are, four are not."""
    hidden = conversation().hide(["my card is 4111 1111", "1111 1112, thanks", "or 212-940", "-8830"])
    said = " ".join(one.text for one in hidden)
    assert not any(piece in said for piece in ("4111", "1112", "940")) and "-8830" in said


def test_marks_go_before_what_is_found():
    text = "code AB-123456 and more"
    hidden = conversation().hide([text], {0: [Span(5, 8, "text")]})[0]
    assert [(r.span.kind, r.value) for r in hidden.replaced] == [
        ("text", "AB-"),
        ("number", "123456"),
    ] or hidden.replaced[1].value == "123456"


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({0: [Span(3, 99, "name")]}, "outside"),
        ({0: [Span(3, 3, "name")]}, "empty"),
        ({0: [Span(0, 3, "name"), Span(2, 4, "name")]}, "overlaps"),
        ({0: [Span(0, 3, "nonsense")]}, "unknown kind"),
        ({0: [Span(0, 3, "first")]}, "unknown kind"),
        ({7: [Span(0, 3, "name")]}, "does not exist"),
    ],
)
def test_bad_marks(marks, message):
    with pytest.raises(UserError, match=message) as caught:
        conversation().hide(["hushed words"], marks)
    assert "hushed" not in str(caught.value)


def test_saved_and_loaded_with_the_same_key_only():
    out, talk, texts = sent(ONE)
    saved = talk.as_dict()
    later = conversation(name="whatever").load(saved)
    assert later.hide(["Janet Falraton again"])[0].text == " ".join(out[0].split(",")[0].split()[2:4]) + " again"
    assert later.restorer().feed(out[1], last=True) == texts[1]
    with pytest.raises(UserError, match="another key"):
        conversation(key=bytes(32)).load(saved)
    with pytest.raises(UserError, match="damaged"):
        conversation().load({"name": "c"})


def test_own_words_patterns_and_surrogates():
    own = make_own(
        {
            "words": {"project": ["Blue Heron"], "name": ["Ada Lovelace"]},
            "patterns": {"ticket": [r"TCK-\d+"]},
            "surrogates": {"project": ["Red Kite", "White Stork"]},
        },
        "own.yaml",
    )
    talk = conversation(finders=(own,), kinds=own.kinds)
    text = "ada  lovelace files TCK-991 about blue heron."
    hidden = talk.hide([text])[0]
    assert re.fullmatch(r"\w+  \w+ files [A-Z]{3}-\d{3} about (Red Kite|White Stork)\.", hidden.text)
    assert not {"ada", "lovelace", "991", "heron"} & set(re.findall(r"\w+", hidden.text))
    assert talk.restorer().feed(hidden.text, last=True) == text


def test_the_name_of_a_conversation_is_that_of_its_beginning_without_values():
    private = Private.of("patterns", key=KEY)
    assert private.name_of(["mail ada@x.org"]) == private.name_of(["mail bob@y.net"])
    assert private.name_of(["mail ada@x.org"]) != private.name_of(["write ada@x.org"])


def test_nothing_is_shown():
    _, talk, _ = sent(ONE)
    assert "Janet" not in repr(talk) and "Janet" not in repr(talk.hide(["Janet"])[0])

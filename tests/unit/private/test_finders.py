"""Names by lists, a user's own patterns, detectors, keys: what is found and what is refused."""

import os
import sys
import types

import pytest

from sgt_titan.errors import UserError
from sgt_titan.private import Private, Span
from sgt_titan.private.draws import Draw, read_key
from sgt_titan.private.names import find_capitals, find_names
from sgt_titan.private.own import make_own, read_own
from sgt_titan.private.spans import find


def kinds(text, finder=find_names):
    return [(span.kind, text[span.start : span.stop]) for span in find(text, [finder])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "My name is Norah Alsowayigh and I live in Saudi Arabia.",
            [("name", "Norah Alsowayigh"), ("place", "Saudi Arabia")],
        ),
        ("Please thank Sara's brother for it.", [("name", "Sara")]),
        ("Dr. Braitberg sees Mrs Oberman.", [("name", "Braitberg"), ("name", "Oberman")]),
        ("He studied at Mahendra Engineering College.", [("org", "Mahendra Engineering College")]),
        ("Write a letter. The Answer is here. Thank You.", []),
        ("flights from Boston to Berlin", [("place", "Boston"), ("place", "Berlin")]),
        ("call getUserName in MyClass", []),
    ],
)
def test_names(text, expected):
    assert kinds(text) == expected


def test_capitals_take_what_names_do_not_know():
    assert ("term", "Zorblat") in kinds("we met Zorblat there", find_capitals)
    assert kinds("Nothing here", find_capitals) == []


def test_names_need_their_lists(monkeypatch):
    from sgt_titan.private import names

    names.lists.cache_clear()
    monkeypatch.setitem(sys.modules, "faker", None)
    with pytest.raises(UserError, match=r"sgt-titan\[private\]"):
        Private.of("names")
    monkeypatch.undo()
    names.lists.cache_clear()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"patterns": {"x": ["a*"]}}, "empty text"),
        ({"patterns": {"x": ["(a|a)+$"]}}, "exponential"),
        ({"patterns": {"x": [r"(\d|\d\d)+x"]}}, "exponential"),
        ({"patterns": {"x": ["(unclosed"]}}, "no regular expression"),
        ({"patterns": {"No Kind": ["a"]}}, "is no kind"),
        ({"patterns": {"x": "a"}}, "list of text"),
        ({"words": {"x": [""]}}, "none of it empty"),
        ({"wrods": {}}, "nothing else"),
        ({"surrogates": {"x": ["y"]}}, "no words and no patterns"),
        ({"words": {"card": ["x"]}, "surrogates": {"card": ["y"]}}, "none of ours"),
        ({"words": {"first": ["x"]}}, "is no kind"),
        ([], "nothing else"),
    ],
)
def test_bad_own_values(content, message):
    with pytest.raises(UserError, match=message):
        make_own(content, "own.yaml")


def test_a_pattern_that_is_slow_on_a_text_stops_the_request(monkeypatch):
    from sgt_titan.private import own

    monkeypatch.setattr(own, "_hard", lambda expression: [])
    monkeypatch.setattr(own, "LIMIT_S", 0.02)
    slow = make_own({"patterns": {"x": ["(q|q)+$"]}}, "own.yaml")
    with pytest.raises(UserError, match="pattern 1 of kind x") as caught:
        list(slow("secret" + "q" * 64 + "!"))
    assert "secret" not in str(caught.value)


def test_an_unreadable_file_of_own_values(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_own(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        read_own(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("finders", "message"),
    [("pattern", "no finder"), ("patterns:x", "nothing after a colon"), ("gliner:/x", "pip install")],
)
def test_bad_finders(finders, message):
    with pytest.raises(UserError, match=message):
        Private.of(finders)


def test_a_detector_is_a_finder(monkeypatch):
    entity = types.SimpleNamespace(start_char=0, end_char=3, label_="PERSON")
    date = types.SimpleNamespace(start_char=4, end_char=6, label_="CARDINAL")
    stub = types.SimpleNamespace(load=lambda name: lambda text: types.SimpleNamespace(ents=[entity, date]))
    monkeypatch.setitem(sys.modules, "spacy", stub)
    assert find("Ada 42", Private.of("spacy:model").finders) == [Span(0, 3, "name")]
    engine = types.SimpleNamespace(
        AnalyzerEngine=lambda: types.SimpleNamespace(
            analyze=lambda text, language: [types.SimpleNamespace(start=0, end=3, entity_type="LOCATION")]
        )
    )
    monkeypatch.setitem(sys.modules, "presidio_analyzer", engine)
    assert find("Rio 42", Private.of("presidio").finders) == [Span(0, 3, "place")]


def test_a_detector_without_its_model(monkeypatch):
    def load(name):
        raise OSError("[E050] Can't find model 'en_core_web_sm'.")

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    with pytest.raises(UserError, match="cannot load its model"):
        Private.of("spacy")


def test_keys(tmp_path):
    path = tmp_path / "key"
    path.write_text("ab" * 32)
    os.chmod(path, 0o644)
    with pytest.raises(UserError, match="others may read"):
        read_key(path)
    os.chmod(path, 0o600)
    assert read_key(path) == b"\xab" * 32
    path.write_text("ab" * 31)
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        read_key(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / "none")


def test_draws_are_uniform_and_labelled():
    counts = [0] * 7
    draw = Draw(b"k" * 32, "a")
    for _ in range(7_000):
        counts[draw.below(7)] += 1
    assert all(850 < count < 1150 for count in counts)
    assert Draw(b"k", "ab", "c").below(1 << 60) != Draw(b"k", "a", "bc").below(1 << 60)
    assert Draw(b"k", "a").below(1 << 60) == Draw(b"k", "a").below(1 << 60)

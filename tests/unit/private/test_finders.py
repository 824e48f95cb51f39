"""Names by lists, a user's own patterns, detectors, keys: what is found and what is refused."""

import os
import re
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


@pytest.fixture(scope="module")
def ruled(tmp_path_factory):
    """A spaCy model of rules alone: the real library, and no weights."""
    spacy = pytest.importorskip("spacy", reason="pip install 'sgt-titan[detectors]'")
    nlp = spacy.blank("en")
    rules = [("PERSON", "Ada Lovelace"), ("GPE", "Rio"), ("DATE", "today"), ("CARDINAL", "42")]
    nlp.add_pipe("entity_ruler").add_patterns([{"label": label, "pattern": text} for label, text in rules])
    path = tmp_path_factory.mktemp("spacy") / "ruled"
    nlp.to_disk(path)
    return path


def test_spacy_is_a_finder(ruled):
    text = "Ada Lovelace saw 42 in Rio today."
    assert find(text, Private.of(f"spacy:{ruled}").finders) == [Span(0, 12, "name"), Span(23, 26, "place")]


def test_a_text_that_is_too_long_for_a_detector(ruled, monkeypatch):
    finder = Private.of(f"spacy:{ruled}").finders[0]
    with pytest.raises(
        UserError, match=r"spacy failed on a text of 1000010 characters \(ValueError\), and nothing"
    ) as e:
        find("Ada secret" + " " * 1_000_000, [finder])
    assert "secret" not in str(e.value)


def test_presidio_is_a_finder_and_stays_at_home(ruled, monkeypatch):
    pytest.importorskip("presidio_analyzer", reason="pip install 'sgt-titan[detectors]'")
    import socket

    def refused(*args, **kwargs):
        raise AssertionError("presidio went out")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    found = find("Ada Lovelace in Rio: ada@acme.org, 4111 1111 1111 1111.", Private.of(f"presidio:{ruled}").finders)
    assert [span.kind for span in found] == ["name", "place", "email", "card"]
    with pytest.raises(UserError, match="presidio cannot load its model"):
        Private.of("presidio:no_such_model")


def test_gliner_reads_all_of_a_long_text(monkeypatch):
    """A stand-in with the interface of gliner 0.2, whose weights no package registry has. Like the real one,
    it leaves out what is beyond 384 words."""

    class GLiNER:
        @classmethod
        def from_pretrained(cls, path, local_files_only=False):
            assert path == "/models/gliner" and local_files_only
            return cls()

        def predict_entities(self, text, labels, flat_ner=True, threshold=0.5):
            seen = " ".join(text.split(" ")[:384])
            for match in re.finditer("Ada Lovelace", seen):
                yield {"start": match.start(), "end": match.end(), "label": "person", "text": match[0], "score": 0.9}

    monkeypatch.setitem(sys.modules, "gliner", types.SimpleNamespace(GLiNER=GLiNER))
    text = " ".join(["word"] * 299 + ["Ada Lovelace"] + ["word"] * 700 + ["Ada Lovelace"])
    finders = Private.of("gliner:/models/gliner").finders
    assert [text[s.start : s.stop] for s in find(text, finders)] == ["Ada Lovelace"] * 2
    assert find("", finders) == []
    with pytest.raises(UserError, match="needs the directory"):
        Private.of("gliner")


def test_a_detector_without_its_model(ruled):
    with pytest.raises(UserError, match="spacy cannot load its model"):
        Private.of("spacy:no_such_model")


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

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from sgt_titan.data.marks import MarkError, fold, mark, offsets, private_values, texts
from sgt_titan.demo import TRUNK
from sgt_titan.demo.corpus import conversation
from sgt_titan.transform.prompts import PROMPT, TEMPLATE, encode_turns

ASSETS = os.environ.get("SGT_TITAN_ASSETS", "")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TRUNK)


def marked(tokenizer, text, units):
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    roles = np.full(len(ids), PROMPT, dtype=np.uint8)
    return ids, list(mark(tokenizer, ids, roles, units))


def test_every_occurrence_in_any_case(tokenizer):
    text = "Ms Carmen lives in Lisbon. Is carmen at home?"
    ids, found = marked(tokenizer, text, [("carmen", "name"), ("lisbon", "city"), ("porto", "city")])
    assert [(m.text, m.kind) for m in found] == [("Carmen", "name"), ("carmen", "name"), ("Lisbon", "city")]
    for start, stop, _, unit, _ in found:
        assert unit in tokenizer.decode(ids[start:stop])
        assert unit not in tokenizer.decode(ids[start + 1 : stop]) and unit not in tokenizer.decode(
            ids[start : stop - 1]
        )


def test_a_unit_inside_a_token_marks_the_token(tokenizer):
    ids, found = marked(tokenizer, "hospital", [("s", "")])
    assert len(found) == 1 and "s" in tokenizer.decode(ids[found[0][0] : found[0][1]])


def test_characters_of_several_tokens(tokenizer):
    text = "call 刘 at 5"
    ids, found = marked(tokenizer, text, [("刘", "name"), ("at 5", "")])
    assert [m.text for m in found] == ["刘", "at 5"]
    assert "刘" in tokenizer.decode(ids[found[0][0] : found[0][1]])


def test_only_prompts_are_marked(tokenizer):
    first, rest = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("Carmen and", " Carmen"))
    ids = np.array(first + rest)
    roles = np.where(np.arange(len(ids)) < len(first), PROMPT, TEMPLATE)
    assert len(list(mark(tokenizer, ids, roles, [("Carmen", "")]))) == 1


def test_offsets_without_the_tokenizer_s_own(tokenizer):
    """Ids that do not encode their text, as after truncation in the middle of a word."""
    ids = tokenizer("Lisbon is a city", add_special_tokens=False)["input_ids"]
    shuffled = [*ids[::-1]]
    text, starts, ends = offsets(tokenizer, shuffled)
    assert ends[-1] == len(text) and (np.diff(ends) >= 0).all() and (starts < ends).all()


def test_demo_rows_mark_what_the_corpus_marks(tokenizer):
    for i in range(20):
        row = conversation(2, i)
        encoded = encode_turns(tokenizer, row["messages"], template="chat")
        ids, roles = np.array(encoded.ids), np.array(encoded.roles)
        units = private_values(row, "spans", row["messages"])
        found = {m.text for m in mark(tokenizer, ids, roles, units)}
        users = [m for m, message in enumerate(row["messages"]) if message["role"] == "user"]
        expected = {span["text"] for span in row["spans"] if span["message"] in users}
        assert expected <= {text for text, _ in units} and expected <= found


def test_private_values_of_either_kind_of_source():
    assert private_values({"u": "a b||c|| ||a b"}, "u") == [("a b", ""), ("c", "")]
    assert private_values({"u": ["a b", {"text": "c", "kind": "name"}]}, "u") == [("a b", ""), ("c", "name")]
    assert private_values({"text": "nothing"}, "u") == [] == private_values({"u": None}, "u")
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "I am Ann."}]
    assert private_values({"u": [{"start": 5, "end": 8}]}, "u", turns) == [("Ann", "")]
    assert private_values({"u": [{"start": 0, "end": 1, "message": 0, "text": "s"}]}, "u", turns) == [("s", "")]


@pytest.mark.parametrize(
    ("span", "says"),
    [
        (
            {"start": 5, "end": 10},
            "u[0] (field 'private'): characters 5 to 10 lie outside of the text of turn 0, which has 9",
        ),
        ({"start": 3, "end": 3}, "u[0] (field 'private'): characters 3 to 3 lie outside"),
        ({"start": -3, "end": 8}, "u[0] (field 'private'): characters -3 to 8 lie outside"),
        (
            {"start": 0, "end": 3, "text": "Ann"},
            "u[0] (field 'private'): characters 0 to 3 of turn 0 are not the text that",
        ),
        ({"start": 0, "end": 1, "message": 1}, "u[0] (field 'private'): lies in turn 1, but the row has turns 0 to 0"),
        ({"start": 0, "end": "8"}, "u[0] (field 'private'): start, end and message must be integers"),
        ({"start": 0}, "u[0] (field 'private'): start, end and message must be integers"),
        ({"label": "PER"}, "u[0] (field 'private') must be a text, or a span with text, or start and end, or both"),
        (7, "u[0] (field 'private') must be a text, or a span"),
        ({"text": 7}, "u[0] (field 'private'): text and kind must be text"),
    ],
)
def test_marks_outside_of_the_text_are_refused(span, says):
    with pytest.raises(MarkError) as error:
        private_values({"u": [span]}, "u", [{"role": "user", "content": "I am Ann."}])
    assert str(error.value).startswith(says) and "Ann" not in str(error.value)
    with pytest.raises(MarkError, match=r"'u' .field 'private'. must be texts or spans, is int"):
        private_values({"u": 3}, "u")


def test_texts_are_read_out_of_the_tokens(tokenizer):
    text = 'He wrote "Carmen", 刘 and CARMEN ﬁn.'
    ids, found = marked(tokenizer, text, [("carmen", ""), ("刘", ""), ("fin", ""), ('wrote "', "")])
    assert len(found) == 5
    marks = np.array([(m.start, m.stop, m.lead, len(m.text)) for m in found])
    assert texts(tokenizer, ids, np.full(len(ids), PROMPT), marks) == [m.text for m in found]
    assert {m.text for m in found} == {"Carmen", "CARMEN", "刘", "ﬁn", 'wrote "'}


CALL = {"type": "function", "function": {"name": "find", "arguments": {"who": 'Ann "A" Lee\nBonn'}}}


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_the_first_tokenization_s_places_are_the_marks(tokenizer, template):
    """The same marks as those found by decoding and tokenizing once more, whichever end was cut."""
    for i in range(12):
        row = conversation(2, i)
        units = private_values(row, "spans", row["messages"])
        encoded = encode_turns(tokenizer, row["messages"], template=template, spans=True)
        ids, roles, spans_T2 = np.array(encoded.ids), np.array(encoded.roles), np.array(encoded.spans)
        cut = np.flatnonzero(roles == PROMPT)[: 3 * (i % 3)]
        keep = np.setdiff1d(np.arange(len(ids) - 5 * (i % 2)), cut)
        again = list(mark(tokenizer, ids[keep], roles[keep], units))
        assert list(mark(tokenizer, ids[keep], roles[keep], units, text=encoded.text, spans_T2=spans_T2[keep])) == again
        assert again or not units


def test_a_value_in_a_call_is_found_as_json_writes_it(tokenizer):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
             {"role": "tool", "content": "Ann"}, {"role": "assistant", "content": "Ann."}]  # fmt: skip
    encoded = encode_turns(tokenizer, turns, template="plain", spans=True)
    ids, roles = np.array(encoded.ids), np.array(encoded.roles)
    units = [('Ann "A" Lee', "name"), ("Lee\nBonn", "place")]
    found = list(mark(tokenizer, ids, roles, units, text=encoded.text, spans_T2=np.array(encoded.spans)))
    assert [(m.text, m.kind) for m in found] == [('Ann \\"A\\" Lee', "name"), ("Lee\\nBonn", "place")]
    for m in found:
        assert m.text in tokenizer.decode(ids[m.start : m.stop]) and (roles[m.start : m.stop] == PROMPT).all()


def test_fold_keeps_track_of_characters():
    text, origin = fold("ﬁX")
    assert text == "fix" and origin == [0, 0, 1]


@pytest.mark.assets
def test_pupa_units_occur_in_their_queries():
    if not ASSETS:
        pytest.skip("SGT_TITAN_ASSETS is not set")
    with (Path(ASSETS) / "pupa" / "PUPA_New.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    units = [(unit, fold(row["user_query"])[0]) for row in rows for unit, _ in private_values(row, "pii_units")]
    share = sum(fold(unit)[0] in query for unit, query in units) / len(units)
    assert share == pytest.approx(0.965, abs=0.002)
    tokenizer = AutoTokenizer.from_pretrained(Path(ASSETS) / "models" / "stories3M-hf")
    for row in rows[:40]:
        ids = np.array(tokenizer(row["user_query"], add_special_tokens=False)["input_ids"])
        for start, stop, _, text, _ in mark(
            tokenizer, ids, np.full(len(ids), PROMPT), private_values(row, "pii_units")
        ):
            assert fold(text)[0] in fold(tokenizer.decode(ids[start:stop]))[0]

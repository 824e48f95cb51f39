import csv
import os
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from sgt_titan.demo import TRUNK
from sgt_titan.demo.corpus import conversation
from sgt_titan.evaluation.marks import fold, mark, offsets, private_values
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
    assert [(unit, kind) for _, _, unit, kind in found] == [("Carmen", "name"), ("carmen", "name"), ("Lisbon", "city")]
    for start, stop, unit, _ in found:
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
    assert [unit for _, _, unit, _ in found] == ["刘", "at 5"]
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
        found = {unit for _, _, unit, _ in mark(tokenizer, ids, roles, private_values(row))}
        users = [m for m, message in enumerate(row["messages"]) if message["role"] == "user"]
        expected = {span["text"] for span in row["spans"] if span["message"] in users}
        assert expected <= {text for text, _ in private_values(row)} and expected <= found


def test_private_values_of_either_kind_of_source():
    assert private_values({"pii_units": "a b||c|| ||a b"}) == [("a b", ""), ("c", "")]
    assert private_values({"text": "nothing"}) == [] == private_values({"pii_units": None})


def test_fold_keeps_track_of_characters():
    text, origin = fold("ﬁX")
    assert text == "fix" and origin == [0, 0, 1]


@pytest.mark.assets
def test_pupa_units_occur_in_their_queries():
    if not ASSETS:
        pytest.skip("SGT_TITAN_ASSETS is not set")
    with (Path(ASSETS) / "pupa" / "PUPA_New.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    units = [(unit, fold(row["user_query"])[0]) for row in rows for unit, _ in private_values(row)]
    share = sum(fold(unit)[0] in query for unit, query in units) / len(units)
    assert share == pytest.approx(0.965, abs=0.002)
    tokenizer = AutoTokenizer.from_pretrained(Path(ASSETS) / "models" / "stories3M-hf")
    for row in rows[:40]:
        ids = np.array(tokenizer(row["user_query"], add_special_tokens=False)["input_ids"])
        for start, stop, text, _ in mark(tokenizer, ids, np.full(len(ids), PROMPT), private_values(row)):
            assert fold(text)[0] in fold(tokenizer.decode(ids[start:stop]))[0]

import hashlib
import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from sgt_titan.demo import TRUNK, corpus
from sgt_titan.demo.corpus import CONDITIONS, KINDS, SCENARIOS, conversations, fill, luhn_valid
from sgt_titan.errors import UserError


def digest(rows):
    return hashlib.sha256("\n".join(json.dumps(r, sort_keys=True) for r in rows).encode()).hexdigest()


def test_first_rows_are_pinned():
    # The shipped trunk was trained on these rows: a change here asks for a new trunk.
    assert digest(conversations(50)) == "0ab3fe5f5989fa8b54dfd0d7f1a5fdb30e84a17e4706cd82167f3cd11d481363"


def test_row_depends_on_seed_and_index_only():
    rows = list(conversations(30, seed=5))
    assert list(conversations(10, seed=5, start=20)) == rows[20:]
    assert list(conversations(0)) == []


def test_seeds_and_rows_are_disjoint():
    one, two = ({r["messages"][-2]["content"] for r in conversations(3000, seed=s)} for s in (0, 1))
    prompts = [next(m["content"] for m in r["messages"] if m["role"] == "user") for r in conversations(3000)]
    assert len(set(prompts)) == 3000
    assert not one & two


def test_spans_are_exact_ordered_and_do_not_overlap():
    kinds = set()
    for row in conversations(1000, seed=2):
        position = (0, 0)
        for span in row["spans"]:
            content = row["messages"][span["message"]]["content"]
            assert content[span["start"] : span["end"]] == span["text"] != ""
            assert (span["message"], span["start"]) >= position
            position = (span["message"], span["end"])
            kinds.add(span["kind"])
    assert kinds == set(KINDS.values())


def test_no_digit_or_mail_address_outside_a_span():
    # A private value a template wrote without a placeholder would show up here.
    for row in conversations(1000, seed=3):
        for i, message in enumerate(row["messages"]):
            rest = message["content"]
            for span in sorted((s for s in row["spans"] if s["message"] == i), key=lambda s: -s["start"]):
                rest = rest[: span["start"]] + rest[span["end"] :]
            assert not any(c.isdigit() or c == "@" for c in rest), message["role"]


def test_every_private_value_of_an_answer_was_asked_about():
    # Exhaustive over the templates: an answer may only use what each of its scenario's prompts gives.
    for scenario in SCENARIOS:
        for problem in scenario.problems:
            for detail in scenario.details:
                for asked in problem.asked:
                    given = placeholders(detail) | placeholders(asked) | {"name", "first"}
                    given |= {"last4"} if "card" in given else set()
                    for answer in problem.answered:
                        assert placeholders(answer) & set(KINDS) <= given, (detail, answer)


def test_answers_of_a_problem_repeat_the_same_private_values():
    for scenario in SCENARIOS:
        for problem in scenario.problems:
            assert len(problem.answered) >= 2
            required = [placeholders(answer) & set(KINDS) for answer in problem.answered]
            assert all(r == required[0] for r in required), problem


def placeholders(template):
    return {part for i, part in enumerate(corpus.re.split(r"\{(\w+)\}", template)) if i % 2}


def test_answers_depend_on_the_prompt():
    for row in conversations(500, seed=4):
        user = " ".join(m["content"] for m in row["messages"] if m["role"] == "user")
        for i, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                texts = [s["text"] for s in row["spans"] if s["message"] == i]
                assert len(texts) >= 2
                assert all(text in user for text in texts)


def test_clinic_answers_name_the_specialist_of_the_diagnosis():
    seen = set()
    for row in conversations(2000, seed=6):
        for span in row["spans"]:
            if span["kind"] == "diagnosis" and row["messages"][span["message"]]["role"] == "assistant":
                answer = row["messages"][span["message"]]["content"]
                _, clinic, advice = CONDITIONS[span["text"]]
                assert clinic in answer and advice in answer
                seen.add(span["text"])
    assert seen == set(CONDITIONS)


def test_cards_belong_to_nobody():
    assert luhn_valid("4111111111111111") and not luhn_valid("4111111111111112")
    cards = {
        "".join(c for c in s["text"] if c.isdigit())
        for row in conversations(1000)
        for s in row["spans"]
        if s["kind"] == "card"
    }
    full = {c for c in cards if len(c) == 16}
    assert len(full) > 50 and not any(map(luhn_valid, full))
    assert {len(c) for c in cards} == {4, 16}


def test_fill_by_hand():
    text, spans = fill("A {first}, {item} {order}.", {"first": "Zoe", "item": "a tablet", "order": "AB-1"})
    assert text == "A Zoe, a tablet AB-1."
    assert [(s["start"], s["end"], s["kind"], s["text"]) for s in spans] == [
        (2, 5, "name", "Zoe"),
        (16, 20, "order", "AB-1"),
    ]


def test_lengths_in_the_shipped_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TRUNK)
    answers = []
    for row in conversations(400, seed=8):
        turns = [m for m in row["messages"] if m["role"] != "system"]
        lengths = [len(tokenizer.encode(m["content"], add_special_tokens=False)) for m in turns]
        assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2) and len(turns) in (2, 4)
        assert 30 <= lengths[0] <= 90
        answers += lengths[1::2]
    # The aim is 20 to 60; a few answers about a long diagnosis and a long medication are above it.
    assert all(18 <= n <= 70 for n in answers)
    assert sum(20 <= n <= 60 for n in answers) >= 0.98 * len(answers)


def test_bad_counts_are_user_errors():
    with pytest.raises(UserError, match="count and start"):
        conversations(-1)


def test_command_line_writes_the_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "sgt_titan.demo.corpus", "--count", "5", "--seed", "9", "--out", str(out)]
    subprocess.run(command, check=True)
    assert [json.loads(line) for line in out.read_text().splitlines()] == list(conversations(5, seed=9))
    assert corpus.main(["--count", "-5", "--out", str(out)]) == 2

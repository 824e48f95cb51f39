"""What is found of the marked values, and what is left, on rows small enough to count."""

from __future__ import annotations

import pytest

from sgt_titan.evaluation.scores import finding
from sgt_titan.private import Private


def row(prompt, answer, *units):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return finding.to_row(messages, units)


def test_recall_precision_and_what_is_left():
    rows = [
        row("Mail ada@x.org or Zorblat. $5 off.", "I mailed ada@x.org.", ("ada@x.org", "email"), ("zorblat", "name")),
        row(
            "Call 212-940-8830.",
            "Done.",
            ("212-940-8830", "phone"),
            ("not here", ""),
            ("<presidio_anonymized_person>", ""),
        ),
    ]
    found = finding.measure(rows, Private.of("patterns", key=b"k" * 32))
    assert found["recall"]["value"] == pytest.approx(2 / 3) and found["recall"]["n"] == 3
    assert found["precision"]["value"] == pytest.approx(2 / 3), "the amount is nobody's"
    assert found["pii"]["exact_micro"]["value"] == pytest.approx(1 / 3)
    assert found["recall_by_kind"]["name"]["value"] == 0 and found["precision_by_kind"]["email"]["value"] == 1
    assert found["answers_back"] == {**found["answers_back"], "value": 1.0, "n": 1}
    assert finding.measure(rows, Private.of("", key=b"k" * 32), marks=True)["recall"]["value"] == 1

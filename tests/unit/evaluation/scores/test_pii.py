import pytest

from sgt_titan.evaluation.scores.pii import is_in, is_nearly_in, pii_ratio


@pytest.mark.parametrize(
    ("unit", "text", "exact", "fuzzy"),
    [
        ("Carmen Dias", "ask CARMEN DIAS", True, True),
        ("Carmen Dias", "ask Carmen Diaz", False, True),
        ("Carmen Dias", "ask Boris", False, False),
        ("555-1234", "call 555-1235", False, False),  # a near miss is another number
        ("Ana", "Anb", False, False),  # so is a near miss of a short name
        ("ﬁne street", "fine street", True, True),
        ("a very long address indeed", "long", False, False),  # a part of a value is not the value
        ("Carmen Dias", "Carmen Dia", False, True),  # all but all of it is, in a text that is no longer
    ],
)
def test_leaks(unit, text, exact, fuzzy):
    assert (is_in(unit, text), is_nearly_in(unit, text)) == (exact, fuzzy)


def test_micro_and_macro():
    originals = ["Carmen, Lisbon, 5551", "Boris", "nothing private"]
    reads = ["Carmen, ???, 5551", "?????", "nothing private"]
    found = pii_ratio(originals, reads, [["Carmen", "Lisbon", "5551"], ["Boris"], []])
    assert found["exact_micro"]["value"] == pytest.approx(2 / 4) and found["exact_micro"]["n"] == 4
    assert found["exact_macro"]["value"] == pytest.approx((2 / 3 + 0) / 2) and found["exact_macro"]["n"] == 2


def test_units_that_truncation_cut_off_do_not_count():
    found = pii_ratio(["Carmen"], ["Carmen"], [["Carmen", "Lisbon"]])
    assert found["exact_micro"]["n"] == 1 and found["exact_micro"]["value"] == 1.0


def test_the_original_leaks_all_and_nothing_leaks_none():
    texts, units = ["Carmen lives at 12 Elm Road"], [["Carmen", "12 Elm Road"]]
    assert all(e["value"] == 1.0 for e in pii_ratio(texts, texts, units).values())
    assert all(e["value"] == 0.0 for e in pii_ratio(texts, ["\ufffd" * 20], units).values())


def test_nothing_leaked_is_not_certain():
    """By prompt no more than by value."""
    found = pii_ratio(["Carmen", "Boris", "Zoe"], ["?"] * 3, [["Carmen"], ["Boris"], ["Zoe"]])
    assert all(e["value"] == e["low"] == 0.0 and 0.5 < e["high"] < 0.6 for e in found.values())


def test_no_units_is_no_number():
    assert pii_ratio(["a"], ["a"], [[]])["exact_micro"] == {"value": None, "low": None, "high": None, "n": 0}

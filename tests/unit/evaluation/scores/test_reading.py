"""Reading less guessing, and the best attack of each threat model."""

import pytest

from sgt_titan.evaluation.scores.reading import best, compared, difference


def part(kind: str, hits: list[int], tokens: list[int]) -> dict:
    return {
        "kind": kind,
        "top1": {"value": sum(hits) / sum(tokens), "low": 0.0, "high": 1.0, "n": sum(tokens)},
        "counts": {"top1": [hits, tokens]},
    }


def test_the_difference_is_of_the_same_tokens():
    found = difference([[5, 2, 9], [10, 10, 10]], [[1, 2, 3], [10, 10, 10]])
    assert found["value"] == pytest.approx(10 / 30) and found["n"] == 30
    assert found["low"] <= found["value"] <= found["high"]
    with pytest.raises(ValueError, match="other tokens"):
        difference([[5], [10]], [[5], [11]])


def test_the_interval_is_of_paired_prompts():
    """Prompts that differ much from each other, and a difference that is the same in all: no width."""
    read, guessed, tokens = [9, 1, 5, 7], [8, 0, 4, 6], [10, 10, 10, 10]
    found = difference([read, tokens], [guessed, tokens])
    assert found["low"] == pytest.approx(found["value"]) == pytest.approx(found["high"]) == pytest.approx(0.1)


def test_every_attack_is_compared_with_the_one_who_sees_nothing():
    attacks = {"guess": part("guess", [1, 1], [4, 4]), "sequence": part("single", [3, 2], [4, 4])}
    found = compared(attacks, {"guess": attacks["guess"]})
    assert "difference" not in found["guess"] and "counts" not in found["sequence"]
    assert found["sequence"]["difference"]["top1"]["value"] == pytest.approx(3 / 8)
    assert found["sequence"]["guesses"]["top1"] == attacks["guess"]["top1"]
    assert "difference" not in compared({"sequence": attacks["sequence"]}, {"guess": None})["sequence"]


def test_what_the_answer_tells_is_taken_off_as_well():
    """He reads six of eight; the answer tells four of them; two of the four were guessed."""
    attacks = {
        "guess": part("guess", [1, 1], [4, 4]),
        "answer": part("answer", [2, 2], [4, 4]),
        "sequence": part("single", [3, 3], [4, 4]),
    }
    found = compared(attacks, attacks)
    assert found["sequence"]["answer_tells"]["top1"]["value"] == pytest.approx(4 / 8)
    assert found["sequence"]["beyond_answer"]["top1"]["value"] == pytest.approx(2 / 8)
    assert found["sequence"]["difference"]["top1"]["value"] == pytest.approx(4 / 8)
    assert found["answer"]["difference"]["top1"]["value"] == pytest.approx(2 / 8)
    assert "beyond_answer" not in found["answer"] and "beyond_answer" not in found["guess"]
    assert best(attacks) == {"best": "sequence"}


def test_the_best_is_of_one_observation_and_the_others_stand_beside_it():
    attacks = {
        "guess": part("guess", [4], [4]),
        "nearest": part("single", [1], [4]),
        "sequence": part("single", [2], [4]),
        "averaging": part("repeats", [4], [4]),
        "at_z": part("noisy", [3], [4]),
    }
    assert best(attacks) == {"best": "sequence", "best_repeats": "averaging", "best_noisy": "at_z"}
    weak = attacks | {"averaging": part("repeats", [1], [4]), "at_z": part("noisy", [1], [4])}
    assert set(best(weak).values()) == {"sequence"}  # whoever has repeats, or z, has one observation as well
    assert best({"averaging": attacks["averaging"]})["best"] == "averaging"
    assert best({"guess": attacks["guess"]}) == {}

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from sgt_titan.demo import TRUNK
from sgt_titan.evaluation.scores import recovery
from sgt_titan.evaluation.world.granted import World
from sgt_titan.evaluation.world.mechanisms import nothing
from sgt_titan.evaluation.world.samples import Sample, Span, load_trunk
from sgt_titan.evaluation.world.threat import UNKNOWN
from tests.unit.evaluation.worlds import tiny_trunk

TEXT = "Hello, my order BX-204519 for $37.20 has not come to Lisbon yet."


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TRUNK)


@pytest.fixture(scope="module")
def demo(tokenizer):
    """Two prompts of one text, its order number marked; the first token of each is clean."""
    ids = np.array(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    offsets = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    start, stop = TEXT.index("BX"), TEXT.index(" for")
    inside = [t for t, (a, b) in enumerate(offsets) if a < stop and b > start]
    row = Sample(
        ids, np.arange(len(ids)) > 0, np.zeros(len(ids), bool), (Span(inside[0], inside[-1] + 1, "BX-204519"),)
    )
    return World([row, row], [row], nothing(), load_trunk(TRUNK, torch.device("cpu")))


def test_a_perfect_guess_and_none(demo, tokenizer):
    frequent = {int(demo.truth_N[0])}
    right = recovery.score(demo.truth_N[:, None], demo, tokenizer, frequent=frequent)
    wrong = recovery.score(torch.full((len(demo.truth_N), 3), UNKNOWN), demo, tokenizer, frequent=frequent)
    for name in ("top1", "top10", "content_top1", "marked_top1", "span_exact", "similarity"):
        assert right[name]["value"] == 1.0
        assert wrong[name]["value"] == 0.0 or name == "similarity"
    assert wrong["top1"]["high"] > 0 and right["top1"]["low"] < 1, "nothing is certain"
    assert right["span_exact"]["n"] == 2


def test_top10_counts_any_of_the_guesses(demo, tokenizer):
    other = (demo.truth_N + 1) % demo.size.vocab
    found = recovery.score(torch.stack([other, demo.truth_N], 1), demo, tokenizer, frequent=set())
    assert found["top1"]["value"] < 0.1 and found["top10"]["value"] == 1.0


def test_a_value_is_read_whole_or_not_at_all(demo, tokenizer):
    guess = demo.truth_N.clone()
    half = len(guess) // 2
    span = demo.rows[0].spans[0]
    guess[span.start - 1] = (guess[span.start - 1] + 1) % demo.size.vocab  # the first token is clean
    found = recovery.score(guess[:, None], demo, tokenizer, frequent=set())
    assert found["span_exact"]["value"] == 0.5
    width = span.stop - span.start
    assert found["marked_top1"]["value"] == pytest.approx(1 - 1 / (2 * width))
    assert half * 2 == len(guess)


def test_what_the_answer_does_not_hold_is_told_apart(demo, tokenizer):
    """The first prompt's answer repeats the order number, the second's does not: reading the first alone reads nothing
    that nobody needed."""
    answers = [
        np.array(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("is BX-204519 it?", "Yes.")
    ]
    rows = [row._replace(answer=answer) for row, answer in zip(demo.rows, answers, strict=True)]
    here = World(rows, demo.corpus, nothing(), demo.trunk)
    half = len(here.truth_N) // 2
    for read, unneeded in ((slice(0, half), 0.0), (slice(half, None), 1.0)):
        guess = torch.full_like(here.truth_N, UNKNOWN)
        guess[read] = here.truth_N[read]
        found = recovery.score(guess[:, None], here, tokenizer, frequent=set())
        assert found["span_exact"]["value"] == 0.5 and found["unneeded_span_exact"]["value"] == unneeded
        assert found["unneeded_top1"]["value"] == unneeded and found["unneeded_span_exact"]["n"] == 1
    assert "unneeded_span_exact" not in recovery.score(guess[:, None], demo, tokenizer, frequent=set())


def test_kinds_part_the_tokens(demo, tokenizer):
    kinds = recovery.classes(demo, tokenizer, {int(demo.truth_N[1])})
    parts = [kinds[name] for name in ("frequent", "word", "piece", "number", "punctuation")]
    assert (np.sum(parts, 0) == 1).all()
    assert kinds["number"].any() and kinds["punctuation"].any() and kinds["word"].any() and kinds["marked"].any()
    assert not (kinds["content"] & (kinds["punctuation"] | kinds["frequent"])).any()


def test_rows_that_nobody_can_tell_apart_are_as_good(trunk_dir):
    model = tiny_trunk(trunk_dir)
    model.get_input_embeddings().weight[7] = model.get_input_embeddings().weight[3]
    row = Sample(np.array([1, 3, 7, 5]), np.array([False, True, True, True]), np.zeros(4, bool))
    here = World([row], [row], nothing(), model)
    assert recovery.correct(torch.tensor([[7], [3], [4]]), here)[:, 0].tolist() == [True, True, False]
    with pytest.raises(ValueError):
        recovery.correct(torch.tensor([[7]]), here)


def test_texts_show_what_is_not_known(demo, tokenizer):
    assert recovery.texts(demo.truth_N, demo, tokenizer) == [TEXT, TEXT]
    guess = demo.truth_N.clone()
    guess[-1] = UNKNOWN
    assert recovery.texts(guess, demo, tokenizer)[1].endswith(recovery.UNREADABLE)


def test_frequent_tokens_are_those_of_the_corpus():
    rows = [Sample(np.array([9, 5, 5, 4]), np.array([False, True, True, True]), np.zeros(4, bool))]
    assert recovery.frequent_tokens(rows, 1) == {5}
    assert recovery.frequent_tokens(rows, 5) == {5, 4}, "clean tokens do not count"

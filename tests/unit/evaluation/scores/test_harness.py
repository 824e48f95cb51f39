"""The harness's model against a plain computation; the benchmarks from files of each format."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: harness)")

from transformers import AutoTokenizer

from sgt_titan.demo import TRUNK
from sgt_titan.errors import UserError
from sgt_titan.evaluation.scores.benchmarks import BENCHMARKS, run_benchmarks, utility_pp
from sgt_titan.evaluation.world.mechanisms import Mechanism, constant_noise, nothing

ASSETS = os.environ.get("SGT_TITAN_ASSETS", "")
CONTEXTS = ["Hello, my card", "Please help me with order AB-123456 from last week, it", "I"]
ANSWERS = [" was stolen", " has not arrived", " am"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TRUNK)


def model(trunk, tokenizer, mechanism, seed=0):
    from sgt_titan.evaluation.scores.harness import ObfuscatedLM

    return ObfuscatedLM(seed=seed).use(trunk, tokenizer, mechanism)


def requests(pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def test_without_obfuscation_it_is_the_plain_model(trunk, tokenizer):
    """Rows of different lengths in one batch, padded on the left, against one at a time."""
    lm = model(trunk, tokenizer, nothing())
    found = lm.loglikelihood(requests(zip(CONTEXTS, ANSWERS, strict=True)), disable_tqdm=True)
    for context, answer, (value, greedy) in zip(CONTEXTS, ANSWERS, found, strict=True):
        start, ids = len(lm.tok_encode(context)), torch.tensor([lm.tok_encode(context + answer)])
        log = torch.log_softmax(trunk(input_ids=ids).logits[0], -1)
        expected = sum(log[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
        assert value == pytest.approx(expected, abs=1e-3)
        assert greedy == all(log[t - 1].argmax() == ids[0, t] for t in range(start, ids.shape[1]))


def watching(seen):
    inner = constant_noise(0.05)

    def obfuscate(batch, x_BTD, random):
        sent = inner.obfuscate(batch, x_BTD, random)
        seen.append((batch.tokens_BT[0].tolist(), batch.obfuscate_BT[0].tolist(), sent.x_tilde_BTD[0].clone()))
        return sent

    return Mechanism("watching", "watching", obfuscate, std=0.05)


def test_the_choices_of_a_question_see_one_obfuscation(trunk, tokenizer):
    seen = []
    lm = model(trunk, tokenizer, watching(seen))
    pairs = [(CONTEXTS[1], answer) for answer in ANSWERS]
    first = lm.loglikelihood(requests(pairs), disable_tqdm=True)
    assert len(seen) == 1, "one draw for the question"
    assert lm.loglikelihood(requests(pairs), disable_tqdm=True) == first, "and the same one next time"
    assert model(trunk, tokenizer, watching(seen), seed=1).loglikelihood(requests(pairs), disable_tqdm=True) != first


def test_the_answer_and_special_tokens_are_clean(trunk, tokenizer):
    seen = []
    lm = model(trunk, tokenizer, watching(seen))
    lm.loglikelihood(requests([(CONTEXTS[0], " was stolen yesterday")]), disable_tqdm=True)
    tokens, hidden, _ = seen[0]
    assert tokens == lm.tok_encode(CONTEXTS[0]), "the answer does not pass through the mechanism"
    assert [t in lm.special for t in tokens] == [not h for h in hidden] and any(hidden)


def test_long_contexts_lose_their_beginning_and_are_counted(trunk, tokenizer):
    lm = model(trunk, tokenizer, nothing())
    lm.max_length = 24
    value, _ = lm.loglikelihood(requests([("word " * 80, " end")]), disable_tqdm=True)[0]
    assert lm.truncated == 1 and value < 0


def test_generation_stops_where_it_is_told(trunk, tokenizer):
    lm = model(trunk, tokenizer, nothing())
    whole = lm.generate_until(requests([(CONTEXTS[1], {"until": [], "max_gen_toks": 24})]))[0]
    assert len(whole) > 8
    stop = whole[4:7]
    cut = lm.generate_until(requests([(CONTEXTS[1], {"until": [stop], "max_gen_toks": 24})]))[0]
    assert cut == whole[: whole.index(stop)]


def test_each_answer_has_its_own_limit(trunk, tokenizer):
    """Under any of its names, larger than the model's default, and whatever the others of its batch may say."""
    lm = model(trunk, tokenizer, nothing())
    lm.max_gen_toks = 6
    limits = [{"max_gen_toks": 12}, {"max_new_tokens": 3}, {}, {"max_gen_toks": 3}, {"max_gen_toks": 12}]
    texts = lm.generate_until(requests([(CONTEXTS[1], {"until": [], **limit}) for limit in limits]))
    assert texts == [lm.generate_until(requests([(CONTEXTS[1], {"until": [], **limit})]))[0] for limit in limits]
    assert texts[0] == texts[4] and texts[1] == texts[3]
    assert texts[0].startswith(texts[2]) and texts[2].startswith(texts[1]) and len({*texts}) == 3
    assert lm.shortened == 0
    lm.max_length = 40
    lm.generate_until(requests([(CONTEXTS[1], {"until": [], "max_gen_toks": 1000})]))
    assert lm.shortened == 1 and lm.truncated == 0, "the answer gives way, not the prompt"
    with pytest.raises(UserError, match="do_sample"):
        lm.generate_until(requests([(CONTEXTS[0], {"until": [], "do_sample": True})]))


def test_special_tokens_are_those_of_training(trunk, tokenizer):
    """Added special tokens without a role of their own, as Llama 3's, are clean in both."""
    import copy

    from sgt_titan.transform.prompts import special_ids

    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.add_special_tokens(["<|header|>"])
    added = other.convert_tokens_to_ids("<|header|>")
    assert added not in other.all_special_ids
    assert model(trunk, other, nothing()).special == special_ids(other) == special_ids(tokenizer) | {added}


def test_a_text_without_a_prompt_has_nothing_to_obfuscate(trunk, tokenizer):
    with pytest.raises(UserError, match="nothing to obfuscate"):
        model(trunk, tokenizer, nothing()).loglikelihood_rolling([])


@pytest.fixture
def folder(tmp_path):
    """One small file of each format."""
    choices = [
        {"query": f"Question: what is {i}?", "choices": ["one", "two", "three"], "gold": i % 3} for i in range(6)
    ]
    for name in ("arc_challenge", "arc_easy", "openbook_qa", "piqa"):
        (tmp_path / f"llmfoundry_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    swag = [f"He sits down and {i}\n{i % 4}\nstands.\nruns.\nsleeps.\neats.\n" for i in range(104)]
    (tmp_path / "hellaswag_val_full.txt").write_text("".join(swag))
    head = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    (tmp_path / "TruthfulQA.csv").write_text(head + 'A,B,Is it so?,No,No,"Yes; Perhaps",x\n' * 3)
    asked = {
        "key": 1,
        "prompt": "Say it without commas",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    (tmp_path / "ifeval_input_data.jsonl").write_text(json.dumps(asked) + "\n")
    mmlu = tmp_path / "mmlu" / "data" / "test"
    mmlu.mkdir(parents=True)
    (mmlu / "marine_biology_test.csv").write_text('"What is ""it""?",a,b,c,d,C\n')
    return tmp_path


def test_all_eight_from_local_files(trunk, tokenizer, folder):
    found = run_benchmarks(trunk, tokenizer, nothing(), list(BENCHMARKS), local_dir=folder, limit=3)
    assert list(found) == list(BENCHMARKS) and len(found) == 8
    counts = {name: one["accuracy"]["n"] for name, one in found.items()}
    assert counts == {**dict.fromkeys(BENCHMARKS, 3), "ifeval": 1, "mmlu": 1}
    assert found["piqa"]["chance"] == pytest.approx(1 / 3) and found["hellaswag"]["shots"] == 10
    assert all(set(one["scores"]) <= {0.0, 1.0} for one in found.values())


def test_accuracy_is_what_the_likelihoods_say(trunk, tokenizer, folder):
    """PIQA: the choice with the highest likelihood, scored by hand."""
    found = run_benchmarks(trunk, tokenizer, nothing(), ["piqa"], local_dir=folder)["piqa"]
    docs = BENCHMARKS["piqa"].read(folder)
    lm = model(trunk, tokenizer, nothing())
    right = 0
    for doc in docs:
        pairs = [(f"{doc['query']}\nAnswer:", f" {choice}") for choice in doc["choices"]]
        values = [value for value, _ in lm.loglikelihood(requests(pairs), disable_tqdm=True)]
        right += values.index(max(values)) == doc["gold"]
    assert sum(found["scores"]) == right and found["accuracy"]["n"] == 6


def test_differences_are_paired():
    clean = {"a": {"scores": [1.0] * 50 + [0.0] * 50}, "b": {"scores": [1.0] * 10}}
    worse = {"a": {"scores": [1.0] * 40 + [0.0] * 60}, "b": {"scores": [1.0] * 10}}
    found = utility_pp(clean, worse)
    assert found.value == pytest.approx(-5.0) and -10 < found.low < -5 < found.high < 0 and found.n == 110
    assert utility_pp(clean, clean).low == 0.0


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("piqa", "llmfoundry_piqa.jsonl", '{"query": "x", "choices": []}\n', "line 1 has no 'gold'"),
        ("piqa", "llmfoundry_piqa.jsonl", "nonsense\n", "line 1 is not a JSON object"),
        ("hellaswag", "hellaswag_val_full.txt", "a\nb\n", "expected six a question"),
        ("truthfulqa", "TruthfulQA.csv", "Question\nwhy\n", "line 2 has no 'Best Answer'"),
        ("mmlu", "mmlu/data/test/marine_biology_test.csv", "a,b\n", "expected a question, four choices"),
    ],
)
def test_bad_files_are_named(trunk, tokenizer, folder, name, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        run_benchmarks(trunk, tokenizer, nothing(), [name], local_dir=folder)


def test_a_missing_file_is_named(trunk, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"llmfoundry_arc_easy\.jsonl is missing"):
        run_benchmarks(trunk, tokenizer, nothing(), ["arc_easy"], local_dir=tmp_path)


@pytest.mark.assets
def test_the_real_files():
    if not ASSETS:
        pytest.skip("SGT_TITAN_ASSETS is not set")
    from pathlib import Path

    sizes = {name: len(one.read(Path(ASSETS) / "bench")) for name, one in BENCHMARKS.items()}
    assert sizes["hellaswag"] == 10042 and sizes["mmlu"] > 14_000 and sizes["ifeval"] >= 540
    assert sizes["arc_easy"] > 2000 and sizes["truthfulqa"] > 700

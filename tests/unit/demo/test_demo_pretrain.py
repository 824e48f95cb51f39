import math

import pytest
import torch
from jinja2.exceptions import TemplateError

from sgt_titan.demo import TRUNK, pretrain
from sgt_titan.demo.corpus import conversations
from sgt_titan.errors import UserError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shipped():
    return pretrain.load(TRUNK)


@pytest.fixture(scope="module")
def small_tokenizer():
    return pretrain.train_tokenizer(conversations(200), vocab_size=400)


def small_config(vocab_size):
    config = pretrain.trunk_config(vocab_size)
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8})
    return config


def render(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def test_shipped_trunk_is_small_and_plain():
    files = {p.name for p in TRUNK.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert sum(p.stat().st_size for p in TRUNK.iterdir()) <= 8 * 2**20


def test_shipped_trunk_is_the_documented_architecture(shipped):
    model, tokenizer = shipped
    expected = pretrain.trunk_config().to_dict()
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert getattr(model.config, key) == expected[key]
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == pretrain.VOCAB_SIZE == model.config.vocab_size
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    ids = (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert ids == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_shipped_trunk_has_learned_the_corpus(shipped):
    result = pretrain.perplexities(*shipped, rows=50, train_rows=1000)
    assert result["trunk"]["all"] < result["unigram"]["all"] / 10
    assert result["trunk"]["answers"] < 1.2  # 1.09 on 600 rows
    assert result["trunk"]["all"] < result["bigram"]["all"] < result["unigram"]["all"]


def test_template_round_trip(shipped):
    _, tokenizer = shipped
    for row in conversations(100, seed=11):
        text = render(tokenizer, row["messages"])
        ids = tokenizer(text)["input_ids"]  # with the tokenizer's own special-token handling switched on
        tokens = tokenizer.convert_ids_to_tokens(ids)
        roles = [m["role"] for m in row["messages"]]
        assert tokens[0] == "<s>" and tokens.count("<s>") == 1
        assert tokens.count("<|end|>") == len(roles)
        assert tokens.count("</s>") == roles.count("assistant") and tokens[-1] == "</s>"
        for role in ("system", "user", "assistant"):
            assert tokens.count(f"<|{role}|>") == roles.count(role)
        assert tokenizer.decode(ids) == text
        assert tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False) == ids


def test_prompt_with_generation_prompt_is_a_prefix(shipped):
    _, tokenizer = shipped
    for row in conversations(100, seed=12):
        ids = tokenizer.encode(render(tokenizer, row["messages"]))
        for i, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                prompt = tokenizer.encode(render(tokenizer, row["messages"][:i], add_generation_prompt=True))
                assert ids[: len(prompt)] == prompt
                answer = tokenizer.encode(message["content"] + "<|end|></s>")
                assert ids[len(prompt) : len(prompt) + len(answer)] == answer


def test_template_refuses_an_unknown_role(shipped):
    with pytest.raises(TemplateError, match="unknown role tool"):
        render(shipped[1], [{"role": "tool", "content": "x"}])


def test_digits_come_in_pairs_and_any_text_survives(shipped):
    _, tokenizer = shipped
    assert tokenizer.tokenize("4716-2093 555")[:5] == ["47", "16", "-", "20", "93"]
    assert tokenizer.tokenize("x 555")[-2:] == ["55", "5"]
    pairs = [f"{i:02d}" for i in range(100)]
    assert [p for p in pairs if len(tokenizer.tokenize(p)) != 1] == []
    for text in ("naïve café", "数字 42", "a\tb\n  c", "🙂 100%"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_answer_tokens_are_the_assistants(shipped):
    _, tokenizer = shipped
    for row in conversations(50, seed=13):
        ids, answers = pretrain.encode_row(tokenizer, row)
        said = tokenizer.decode([t for t, a in zip(ids, answers, strict=True) if a])
        assert said == "".join(m["content"] + "<|end|>" for m in row["messages"] if m["role"] == "assistant")


def test_token_losses_against_brute_force(small_tokenizer):
    torch.manual_seed(0)
    model = pretrain.LlamaForCausalLM(small_config(len(small_tokenizer))).eval()
    rows = sorted((pretrain.encode_row(small_tokenizer, r) for r in conversations(3, seed=14)), key=lambda r: len(r[0]))
    ids_BT, answers_BT = pretrain.pad_batch(rows, small_tokenizer.pad_token_id)
    assert answers_BT.sum() == sum(sum(mask) for _, mask in rows)
    losses = pretrain.token_losses(model, ids_BT).detach()
    assert losses.shape == (3, ids_BT.shape[1] - 1)
    for i, (ids, _) in enumerate(rows):
        logits = model(input_ids=torch.tensor([ids])).logits[0].detach().double()
        expected = [-math.log(logits[t].softmax(0)[ids[t + 1]]) for t in range(len(ids) - 1)]
        torch.testing.assert_close(
            losses[i, : len(ids) - 1].double(), torch.tensor(expected).double(), atol=1e-4, rtol=0
        )
        assert not losses[i, len(ids) - 1 :].any()


def test_ngram_nats_by_hand():
    # Scored tokens of training: 1, 2, 1, 2; pairs (0,1) twice, (1,2) twice. Vocabulary 3, add one.
    unigram, bigram = pretrain.ngram_nats([[0, 1, 2], [0, 1, 2]], [[0, 1, 0]], 3)
    torch.testing.assert_close(unigram[0].exp(), torch.tensor([7 / 3, 7 / 1]).double())
    torch.testing.assert_close(bigram[0].exp(), torch.tensor([5 / 3, 5 / 1]).double())


def test_perplexity_of_a_uniform_trunk_is_the_vocabulary(small_tokenizer):
    model = pretrain.LlamaForCausalLM(small_config(len(small_tokenizer))).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = pretrain.perplexities(model, small_tokenizer, rows=3, train_rows=10)
    assert result["trunk"]["all"] == pytest.approx(len(small_tokenizer), rel=1e-5)
    assert result["trunk"]["answers"] == pytest.approx(len(small_tokenizer), rel=1e-5)


def test_learning_rate_by_hand():
    assert pretrain.learning_rate(0, 1100, 2.0) == pytest.approx(0.02)
    assert pretrain.learning_rate(100, 1100, 2.0) == pytest.approx(2.0)
    assert pretrain.learning_rate(600, 1100, 2.0) == pytest.approx(2.0 * 0.51)
    assert pretrain.learning_rate(1100, 1100, 2.0) == pytest.approx(0.04)


def test_batches_cover_every_row_once(small_tokenizer):
    got = sorted(
        tuple(r[r != 0].tolist()) for ids, _ in pretrain.batches(small_tokenizer, 5, 3, 21, window=2) for r in ids
    )
    assert got == sorted(tuple(pretrain.encode_row(small_tokenizer, r)[0]) for r in conversations(15, 21))


def test_training_is_deterministic_and_learns(small_tokenizer):
    options = {"batch_size": 4, "peak_lr": 1e-2, "prompt_weight": 0.3, "seed": 3}
    config = small_config(len(small_tokenizer))
    one, again = (pretrain.train(small_tokenizer, config, steps=12, **options) for _ in range(2))
    for a, b in zip(one.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    untrained = pretrain.train(small_tokenizer, config, steps=1, **options)
    before, after = (pretrain.perplexities(m, small_tokenizer, rows=4, train_rows=10) for m in (untrained, one))
    assert after["trunk"]["answers"] < before["trunk"]["answers"]


def test_start_copies_what_followed_a_token_before():
    torch.manual_seed(0)
    model = pretrain.LlamaForCausalLM(pretrain.trunk_config()).eval()
    repeated = torch.randint(7, 2048, (4, 40)).repeat(1, 2)
    plain = pretrain.token_losses(model, repeated)[:, 40:].mean()
    pretrain.start_with_copying(model)
    assert pretrain.token_losses(model, repeated)[:, 40:].mean() < plain - 0.2
    model.set_attn_implementation("eager")
    attentions = model(input_ids=repeated, output_attentions=True).attentions
    assert attentions[0][:, 0].diagonal(offset=-1, dim1=1, dim2=2).mean() > 0.7
    for head in (0, 2):  # position 40 + t looks at t + 1, which followed the same token before
        assert attentions[1][:, head, 40:].diagonal(offset=1, dim1=1, dim2=2).mean() > 0.3


def test_training_the_tokenizer_is_deterministic(small_tokenizer):
    again = pretrain.train_tokenizer(conversations(200), vocab_size=400)
    assert again.backend_tokenizer.to_str() == small_tokenizer.backend_tokenizer.to_str()


def test_greedy_answers_copy_from_the_prompt(shipped):
    rates = pretrain.copy_rates(*shipped, rows=24, seed=5)
    copied, due = (sum(rates[kind][i] for kind in ("name", "card", "order") if kind in rates) for i in (0, 1))
    assert due >= 24
    assert copied / due > 0.95


def test_bad_input_is_a_user_error(tmp_path, capsys):
    with pytest.raises(UserError, match=r"no config\.json"):
        pretrain.load(tmp_path)
    assert pretrain.main(["--evaluate", str(tmp_path)]) == 2
    assert pretrain.main(["--out", str(tmp_path / "x"), "--seed", "1"]) == 2
    assert "held-out" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

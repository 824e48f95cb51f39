import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from sgt_titan.errors import UserError
from sgt_titan.transform import ExportedTransform, SGTConfig, estimator_config, fingerprint_tensor
from sgt_titan.trunk.families import TRAINED

WIDTH, VOCABULARY, LAYERS = 32, 50, 2
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",  # a trunk's storage type must not leak into the estimator
}
FAMILY_FIELDS = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0, 1],
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": LAYERS,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}


def trunk_config(family):
    return AutoConfig.for_model(family, **(COMMON | FAMILY_FIELDS[family]))


def sgt_config(family="llama", layers=LAYERS, **fields):
    fields = {"scale": 0.03, "median_norm": 0.5, "hidden_size": WIDTH, "vocab_size": VOCABULARY} | fields
    return SGTConfig(trunk_config=estimator_config(trunk_config(family), layers), **fields)


def make_transform(family="llama", *, random_heads=True, **fields):
    torch.manual_seed(0)
    model = ExportedTransform(sgt_config(family, **fields)).eval()
    if random_heads:
        for head in filter(None, (model.mean_head, model.log_std_head, model.gate_head)):
            torch.nn.init.normal_(head.weight, std=0.1)
            torch.nn.init.normal_(head.bias, std=0.1)
    return model


def token_ids(batch=2, length=11):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", TRAINED)
def test_body_is_the_trunks_first_layers(family):
    torch.manual_seed(1)
    trunk = AutoModelForCausalLM.from_config(trunk_config(family), dtype=torch.float32).eval()
    torch.nn.init.normal_(trunk.model.norm.weight, mean=1.0, std=0.2)
    model = make_transform(family)
    source = trunk.model.state_dict()
    wanted = {
        name: tensor
        for name, tensor in source.items()
        if name == "norm.weight" or name.startswith(tuple(f"layers.{i}." for i in range(LAYERS)))
    }
    body = model.bodies[0]
    assert wanted.keys() == body.state_dict().keys()
    body.load_state_dict(wanted)
    model.embed_tokens.weight.data.copy_(source["embed_tokens.weight"])

    ids = token_ids()
    with torch.no_grad():
        hidden = trunk.model(ids, output_hidden_states=True, use_cache=False).hidden_states[LAYERS]
        expected = trunk.model.norm(hidden)
        found = body(inputs_embeds=model.embed_tokens(ids)).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        out = model(ids)
    raw = torch.nn.functional.linear(expected, model.mean_head.weight, model.mean_head.bias)
    torch.testing.assert_close(out.mean_BTD, raw, rtol=1e-5, atol=1e-6)
    # Random weights barely move the residual stream: without this the parity would hold with no layers at all.
    assert not torch.allclose(found, trunk.model.norm(trunk.model.embed_tokens(ids)), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("body", ["shared", "separate"])
def test_state_dict_names(family, body):
    names = make_transform(family, body=body).state_dict().keys()
    heads = {f"{head}.{kind}" for head in ("mean_head", "log_std_head") for kind in ("weight", "bias")}
    trunk = AutoModelForCausalLM.from_config(trunk_config(family)).model.state_dict().keys()
    bodies = {
        f"bodies.{index}.{name}"
        for index in range(1 if body == "shared" else 2)
        for name in trunk
        if name == "norm.weight" or name.startswith(("layers.0.", "layers.1."))
    }
    assert set(names) == {"embed_tokens.weight"} | heads | bodies
    assert not any("expert" in name for name in names)


@pytest.mark.parametrize("family", TRAINED)
def test_starts_at_the_identity(family):
    model = make_transform(family, random_heads=False, mean_bound=1.0, std_init=0.2)
    out = model(token_ids())
    assert torch.equal(out.mean_BTD, torch.zeros(2, 11, WIDTH))
    torch.testing.assert_close(out.log_std_BTD.exp(), torch.full((2, 11, WIDTH), 0.2 * 0.03), rtol=1e-5, atol=0)
    assert out.past_key_values is None


def test_separate_bodies_feed_their_own_head():
    model = make_transform(body="separate")
    ids = token_ids()
    before = model(ids)
    for index, changed, kept in ((0, "mean_BTD", "log_std_BTD"), (1, "log_std_BTD", "mean_BTD")):
        changed_model = make_transform(body="separate")
        changed_model.bodies[index].norm.weight.data.mul_(2)
        after = changed_model(ids)
        assert torch.equal(after[kept], before[kept])
        assert not torch.allclose(after[changed], before[changed])


@pytest.mark.parametrize("family", TRAINED)
def test_causal(family):
    model, ids = make_transform(family), token_ids()
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCABULARY
    before, after = model(ids), model(changed)
    for key in ("mean_BTD", "log_std_BTD"):
        torch.testing.assert_close(after[key][:, :6], before[key][:, :6])
        assert not torch.allclose(after[key][:, 7:], before[key][:, 7:], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("body", ["shared", "separate"])
def test_streaming_equals_one_pass(family, body):
    model, ids = make_transform(family, body=body), token_ids()
    whole, caches, pieces = model(ids), None, []
    for piece in ids.split([1, 5, 2, 3], dim=1):
        out = model(piece, past_key_values=caches, use_cache=True)
        caches = out.past_key_values
        pieces.append(out)
    for key in ("mean_BTD", "log_std_BTD"):
        torch.testing.assert_close(torch.cat([p[key] for p in pieces], dim=1), whole[key], rtol=1e-4, atol=1e-5)


def test_streamed_transform_extends_the_callers_caches():
    model, ids = make_transform(body="separate"), token_ids()
    caches, mask = model.new_caches(), torch.ones(2, 11, dtype=torch.bool)
    generator = torch.Generator().manual_seed(7)
    noises = [torch.randn(2, size, WIDTH, generator=generator) for size in (4, 7)]
    generator.manual_seed(7)
    streamed = torch.cat(
        [
            model.transform(ids[:, part], mask[:, part], generator=generator, past_key_values=caches)
            for part in (slice(0, 4), slice(4, 11))
        ],
        dim=1,
    )
    with torch.no_grad():
        out = model(ids)
        expected = model.embed_tokens(ids) + out.mean_BTD + out.log_std_BTD.exp() * torch.cat(noises, dim=1)
    torch.testing.assert_close(streamed, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="caches"):
        model(ids, past_key_values=caches[:1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_real_tokens(side, attention):
    model, ids = make_transform(), token_ids(batch=1, length=6)
    model.set_attn_implementation(attention)
    assert {body.config._attn_implementation for body in model.bodies} == {attention}
    padding, ones = torch.full((1, 4), 3), torch.ones_like(ids)
    parts = [(padding, padding * 0), (ids, ones)]
    parts = parts if side == "left" else parts[::-1]
    padded, mask = (torch.cat([part[i] for part in parts], dim=1) for i in range(2))
    real = mask[0].bool()
    plain, out = model(ids), model(padded, attention_mask=mask)
    for key in ("mean_BTD", "log_std_BTD"):
        torch.testing.assert_close(out[key][:, real], plain[key], rtol=1e-4, atol=1e-5)
        assert torch.isfinite(out[key]).all()
    x_tilde = model.transform(padded, torch.ones_like(padded).bool(), attention_mask=mask)
    clean = model.embed_tokens(padded)
    assert torch.equal(x_tilde[:, ~real], clean[:, ~real])
    assert (x_tilde[:, real] != clean[:, real]).all()


def test_streaming_with_left_padding():
    model, ids = make_transform(), token_ids()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    whole, caches = model(ids, attention_mask=mask), model.new_caches()
    generator = torch.Generator()
    pieces, clean = [], model.embed_tokens(ids)
    for start, end in ((0, 5), (5, 6), (6, 11)):
        everything = torch.ones(2, end - start, dtype=torch.bool)
        x_tilde = model.transform(
            ids[:, start:end],
            everything,
            generator=generator.manual_seed(start),
            attention_mask=mask[:, :end],
            past_key_values=caches,
        )
        eps = torch.randn(2, end - start, WIDTH, generator=generator.manual_seed(start))
        pieces.append(x_tilde - whole.log_std_BTD[:, start:end].exp() * eps - clean[:, start:end])
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[real], whole.mean_BTD[real], rtol=1e-4, atol=1e-5)


def test_transform_masks_and_matches_equation_1():
    model, ids = make_transform(), token_ids()
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 2:5] = mask[1, 7:] = True
    x = model.embed_tokens(ids).detach()
    with pytest.warns(UserWarning, match="subtract the noise") as caught:
        from_ids = model.transform(ids, mask, seed=5)
    assert Path(caught[0].filename).name == Path(__file__).name
    with pytest.warns(UserWarning):
        from_embeddings = model.transform(x, mask, seed=5)
    out = model(ids)
    eps = torch.randn(out.mean_BTD.shape, generator=torch.Generator().manual_seed(5))
    expected = x + out.mean_BTD + out.log_std_BTD.exp() * eps
    torch.testing.assert_close(from_ids[mask], expected[mask].detach())
    assert torch.equal(from_ids[~mask], x[~mask])
    assert torch.equal(from_ids, from_embeddings)
    assert not from_ids.requires_grad


def test_noise_is_fresh_by_default():
    model, ids = make_transform(), token_ids()
    mask = torch.ones_like(ids, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        first = model.transform(ids, mask)
        torch.manual_seed(0)
        second = model.transform(ids, mask)
    assert (first != second).float().mean() > 0.99
    with torch.no_grad():
        out = model(ids)
        standard = torch.cat(
            [(s - model.embed_tokens(ids) - out.mean_BTD) / out.log_std_BTD.exp() for s in (first, second)]
        )
    count = standard.numel()  # 1408: 6 standard errors of mean and std
    assert abs(standard.mean()) < 6 / count**0.5 and abs(standard.std() - 1) < 6 / (2 * count) ** 0.5


def test_transform_keeps_the_dtype_of_the_embeddings():
    model, ids = make_transform(), token_ids()
    x = model.embed_tokens(ids).detach().to(torch.bfloat16)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 4:] = True
    out = model.transform(x, mask)
    assert out.dtype == torch.bfloat16 and torch.equal(out[~mask], x[~mask])


def test_a_closed_gate_in_half_precision_takes_the_embedding_away_whole():
    """The estimator sees it rounded; what is taken away must be what was given, or z would keep the rounding."""
    model, ids = make_transform(gate=True, format_version=3), token_ids()
    torch.nn.init.constant_(model.gate_head.bias, -1e4)
    x = model.embed_tokens(ids).detach() + 1e-4
    model.to(torch.bfloat16)
    with torch.no_grad():
        mean_BTD = model(inputs_embeds=x).mean_BTD
    assert not torch.equal(x, x.bfloat16().float()) and torch.equal(mean_BTD, -x)


def test_bad_calls():
    model, ids = make_transform(), token_ids()
    mask = torch.ones_like(ids, dtype=torch.bool)
    with pytest.raises(UserError, match=r"outside 0\.\.49"):
        model.transform(torch.full_like(ids, VOCABULARY), mask)
    with pytest.raises(UserError, match=r"outside 0\.\.49"):
        model.transform(torch.full_like(ids, -100), mask)
    with pytest.raises(ValueError, match="mask_BT"):
        model.transform(ids, mask[:, 1:])
    with pytest.raises(ValueError, match="not both"):
        model.transform(ids, mask, seed=0, generator=torch.Generator())
    with pytest.raises(ValueError, match="exactly one"):
        model()
    caches = model.new_caches()
    model(ids[:, :4], past_key_values=caches)
    for shape in ((2, 7), (2, 12), (2, 1)):
        # Positions are counted in it: a mask over the present alone would give those of a new prompt.
        with pytest.raises(ValueError, match=r"attention_mask has shape .*, expected \(2, 11\)"):
            model(ids[:, 4:], attention_mask=torch.ones(shape), past_key_values=caches)
    for bad in (torch.nan, torch.inf):
        x = model.embed_tokens(ids).detach()
        x[1, 3, 0] = bad
        with pytest.raises(UserError, match="NaN or infinite"):
            model.transform(x, mask)
    bare = make_transform(embeddings=False)
    assert "embed_tokens.weight" not in bare.state_dict()
    with pytest.raises(UserError, match="ships no embedding table"):
        bare.transform(ids, mask)
    x = model.embed_tokens(ids)
    torch.testing.assert_close(bare(inputs_embeds=x).mean_BTD.shape, x.shape)


@pytest.mark.parametrize("family", TRAINED)
def test_building_allocates_no_table_for_the_body(family, monkeypatch):
    sizes, real = [], torch.nn.Embedding.__init__
    monkeypatch.setattr(
        torch.nn.Embedding, "__init__", lambda self, rows, *args: sizes.append(rows) or real(self, rows, *args)
    )
    model = make_transform(family)
    assert sizes == [VOCABULARY, 1]
    assert all(body.embed_tokens is None for body in model.bodies)


@pytest.mark.parametrize("family", TRAINED)
def test_estimator_config(family, tmp_path):
    trunk = trunk_config(family)
    trunk.name_or_path = "/home/someone/models/trunk"
    raw = estimator_config(trunk, 1)
    assert raw["num_hidden_layers"] == 1 and raw["model_type"] == family
    assert "/home/someone" not in str(raw) and "dtype" not in raw
    rebuilt = AutoConfig.for_model(**raw)
    for key in ("rope_parameters", "rms_norm_eps", "hidden_size", "head_dim", "num_attention_heads"):
        assert getattr(rebuilt, key, None) == getattr(trunk, key, None)
    if family == "deepseek_v3":
        assert rebuilt.first_k_dense_replace == 1 and rebuilt.num_mtp_layers == 0
    if family == "qwen3_moe":
        assert rebuilt.mlp_only_layers == [0]
    if family == "smollm3":
        assert rebuilt.no_rope_layers == trunk.no_rope_layers  # by index, also of a denoiser with more layers
    # The content of a config.json gives the same as the object, also with a quantised remote-code checkpoint's extras.
    trunk.save_pretrained(tmp_path)
    from_file = AutoConfig.from_pretrained(tmp_path).to_diff_dict()
    extras = {"quantization_config": {"quant_method": "fp8"}, "auto_map": {"AutoModel": "evil.Model"}}
    assert estimator_config(from_file | extras, 1) == raw


def test_estimator_config_slices_layer_types():
    types = ["full_attention", "sliding_attention", "full_attention"]
    fields = COMMON | {"layer_types": types, "use_sliding_window": True, "sliding_window": 4}
    raw = estimator_config(AutoConfig.for_model("qwen2", **fields), 2)
    assert raw["layer_types"] == types[:2]
    assert AutoConfig.for_model(**raw).sliding_window == 4


def test_estimator_config_refuses():
    with pytest.raises(UserError, match="'gpt2' is not supported"):
        estimator_config({"model_type": "gpt2"}, 1)
    for layers in (0, 4):
        with pytest.raises(UserError, match="between 1 and the trunk's 3"):
            estimator_config(trunk_config("llama"), layers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"body": "both"}, "body is 'both'"),
        ({"hidden_size": 16}, "trunk_config.hidden_size is 32"),
        ({"vocab_size": 51}, "trunk_config.vocab_size is 50"),
        ({"obfuscate": "some"}, "obfuscate is 'some'"),
        ({"std_init": 100.0}, "std_init=100"),
        ({"format_version": 4}, "format_version is 4"),
        ({"gate": True, "format_version": 2}, "format_version is 2, but .* a gate from 3"),
        ({"gate": True, "rate_tau": 20, "format_version": 3}, "tau: 20 is what sigma is behind a closed gate"),
        ({"denoiser_layers": 1}, "format_version is 1, but a denoiser"),
        ({"rate_prior": "narrow"}, "rate_prior is .narrow."),
        ({"rate_prior": "context", "format_version": 2}, "context_layers is 0"),
        ({"rate_tau": 0}, "rate_tau is 0"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(UserError, match=message):
        ExportedTransform(sgt_config(**fields))
    with pytest.raises(UserError, match="model_type is None"):
        ExportedTransform(SGTConfig())


def test_config_round_trip(tmp_path):
    config = sgt_config(
        "qwen3", training={"steps": 3}, fingerprints={"trunk": "ab"}, template="plain", obfuscate_template=True
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SGTConfig)
    before, after = config.to_diff_dict(), loaded.to_diff_dict()
    assert after == before and after["training"] == {"steps": 3}
    assert loaded.trunk_config == config.trunk_config and loaded.bounds == config.bounds


def test_fingerprint_tensor():
    import hashlib
    import struct

    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    expected = hashlib.sha256(b"float32 [2, 3]\n" + struct.pack("<6f", *range(1, 7))).hexdigest()
    assert fingerprint_tensor(values) == expected
    assert fingerprint_tensor(values.T.contiguous().T) == expected  # by value, not by memory layout
    assert fingerprint_tensor(torch.nn.Parameter(values)) == expected
    halves = values.to(torch.bfloat16)
    different = [values.T, values.reshape(3, 2), values.int(), halves, halves.half(), values + 1e-6, torch.zeros(0, 3)]
    assert len({expected, *map(fingerprint_tensor, different)}) == len(different) + 1


def test_works_without_the_training_dependencies(tmp_path):
    make_transform().save_pretrained(tmp_path / "model")
    code = f"""
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torchtitan", "datasets", "tensorboard"):  # triton is torch's own business
                    raise ImportError(f"{{name}} is blocked")

        sys.meta_path.insert(0, Blocker())
        import torch
        import sgt_titan.transform
        from transformers import AutoModel
        model = AutoModel.from_pretrained({str(tmp_path / "model")!r})
        ids = torch.arange(8)[None]
        out = model.transform(ids, torch.ones(1, 8, dtype=torch.bool))
        print(type(model).__name__, tuple(out.shape))
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "ExportedTransform (1, 8, 32)"


def test_auto_model_from_config():
    assert type(AutoModel.from_config(sgt_config())) is ExportedTransform


def with_denoiser(family="llama", **fields):
    """A transform whose denoiser does something, with a prior of its own."""
    fields = {"denoiser_layers": 1, "format_version": 2} | fields
    model = make_transform(family, **fields)
    generator = torch.Generator().manual_seed(4)
    for layer in (model.denoiser.head, model.denoiser.mark):
        layer.weight.data.copy_(0.3 * torch.randn(layer.weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("body", ["shared", "separate"])
def test_a_denoiser_streams(family, body):
    """Pieces through its cache give what one pass gives; clean positions are left alone; z is the plain draw."""
    model, ids = with_denoiser(family, body=body), token_ids()
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    noise = torch.randn(*ids.shape, WIDTH, generator=torch.Generator().manual_seed(2))
    whole = model.release(ids, mask, noise_BTD=noise)
    caches, sent = model.new_caches(), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 11)):
        sent.append(model.transform(ids[:, part], mask[:, part], noise_BTD=noise[:, part], past_key_values=caches))
    torch.testing.assert_close(torch.cat(sent, 1), whole.sent_BTD, rtol=1e-5, atol=1e-6)
    x = model.embed_tokens(ids)
    assert torch.equal(whole.sent_BTD[~mask], x[~mask]) and torch.equal(whole.z_BTD[~mask], x[~mask])
    assert (whole.sent_BTD - whole.z_BTD)[mask].abs().min(-1).values.max() > 0
    expected = whole.center_BTD + whole.log_std_BTD.exp() * noise
    torch.testing.assert_close(whole.z_BTD[mask], expected[mask])


def test_a_denoiser_sees_z_the_mask_and_nothing_later():
    model, ids = with_denoiser(), token_ids()
    z = torch.randn(*ids.shape, WIDTH, generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    before = model.denoiser(z, mask)
    later = z.clone()
    later[:, 6] += 1
    torch.testing.assert_close(model.denoiser(later, mask)[:, :6], before[:, :6])
    assert not torch.allclose(model.denoiser(later, mask)[:, 7:], before[:, 7:])
    bare = mask.clone()
    bare[:, 2] = False
    assert not torch.allclose(model.denoiser(z, bare)[:, 3], before[:, 3])


def test_padding_does_not_reach_the_denoiser():
    model, ids = with_denoiser(), token_ids(1, 6)
    noise = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    alone = model.transform(ids, mask, noise_BTD=noise)
    padded = torch.cat([torch.full((1, 3), 7), ids], 1)
    real = torch.tensor([[0] * 3 + [1] * 6])
    wide = torch.cat([torch.zeros(1, 3, WIDTH), noise], 1)
    found = model.transform(padded, torch.ones_like(padded, dtype=torch.bool), noise_BTD=wide, attention_mask=real)
    torch.testing.assert_close(found[:, 3:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prior", ["broad", "tokens", "context"])
def test_an_export_with_denoiser_and_prior_comes_back(prior, tmp_path):
    context = {"context_layers": 1, "context_rank": 4} if prior == "context" else {}
    model, ids = with_denoiser(rate_prior=prior, **context), token_ids()
    model.save_pretrained(tmp_path)
    again = ExportedTransform.from_pretrained(tmp_path)
    mask = torch.ones_like(ids, dtype=torch.bool)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    rates = [m.rate(ids, mask, generator=torch.Generator().manual_seed(1)) for m in (model, again)]
    assert torch.equal(*rates) and (rates[0] > 0).all()
    mask[:, 3] = False
    assert (again.rate(ids, mask, generator=torch.Generator().manual_seed(1))[:, 3] == 0).all()


def test_a_prior_of_other_tokens_is_refused(tmp_path):
    model = with_denoiser(rate_prior="tokens")
    model.prior.log_frequency += 0.5
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"prior\.log_frequency is no distribution over the 50 tokens"):
        ExportedTransform.from_pretrained(tmp_path)


def test_an_older_client_refuses_a_denoiser(tmp_path, monkeypatch):
    with_denoiser().save_pretrained(tmp_path)
    monkeypatch.setattr("sgt_titan.transform.configuration.FORMAT_VERSION", 1)
    with pytest.raises(UserError, match="format_version is 2, this sgt_titan reads up to 1; update"):
        ExportedTransform.from_pretrained(tmp_path)

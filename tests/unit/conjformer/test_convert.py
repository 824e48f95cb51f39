"""A rotated trunk with its client is the plain trunk: every family, both norms, to rounding."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from rotated_trunks import VOCAB, WIDTH, model_of, write_gpt2
from safetensors.torch import load_file, save_file

from sgt_titan.conjformer.basis import Basis
from sgt_titan.conjformer.client import Client
from sgt_titan.conjformer.command import convert
from sgt_titan.conjformer.convert import Conversion
from sgt_titan.conjformer.families import FAMILIES as ROWS
from sgt_titan.conjformer.families import Sizes, symmetries_of
from sgt_titan.conjformer.mark import mark_of, require_original, require_same_secret
from sgt_titan.conjformer.secret import Secret, load
from sgt_titan.errors import UserError

FAMILIES = ("llama", "llama-tied", "llama-llama3-rope", "qwen2", "qwen3", "qwen3-tied", "gpt2", "gpt2-untied")
TOKENS_BT = torch.randint(2, VOCAB, (2, 60), generator=torch.Generator().manual_seed(0))


def logits(path, dtype=torch.float32):
    with torch.no_grad():
        return model_of(path, dtype)(input_ids=TOKENS_BT).logits


def answers(found, dtype=torch.float32, client_dtype=torch.float32):
    client = found.load_client(dtype=client_dtype)
    with torch.no_grad():
        served = model_of(found.server, dtype)(inputs_embeds=client.encode(TOKENS_BT).to(dtype)).logits
        return client.decode(served)


@pytest.mark.parametrize("name", FAMILIES)
def test_folded_equals_the_plain_model(rotated, name):
    found = rotated(name)
    torch.testing.assert_close(answers(found), logits(found.trunk), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ("llama", "qwen2", "qwen3", "gpt2"))
def test_each_symmetry_is_exact_and_changes_what_is_served(rotated, name):
    """Beside the rotation, one at a time and none at all; compared are lengths, which a rotation leaves."""
    plain = load_file(rotated(name, "--symmetries", "none").server / "model.safetensors")
    lengths = {key: tensor.norm().item() for key, tensor in plain.items()}
    for symmetry in symmetries_of(ROWS[name]):
        found = rotated(name, "--symmetries", symmetry)
        torch.testing.assert_close(answers(found), logits(found.trunk), atol=1e-4, rtol=0)
        served = load_file(found.server / "model.safetensors")
        moved = {
            key for key, tensor in served.items() if abs(tensor.norm().item() - lengths[key]) > 1e-3 * lengths[key]
        }
        words = {"values": ("v_proj", "o_proj", "attn.c_"), "units": ("up_proj", "down_proj"),
                 "queries": ("q_proj", "k_proj", "c_attn"), "heads": ()}[symmetry]  # fmt: skip
        assert bool(moved) == bool(words) and all(any(word in key for word in words) for key in moved), symmetry


def test_heads_change_places():
    family = ROWS["llama"]
    sizes = Sizes(width=8, layers=1, heads=12, kv_heads=4, head=2, units=4, vocab=9, tied=True)
    basis = Basis(Secret(bytes(32)), family, sizes, lambda _: torch.ones(1, dtype=torch.bool), symmetries=("heads",))
    queries_H, keys_K = basis.order(0, 3), basis.order(0, 1)
    assert sorted(queries_H.tolist()) == list(range(12)) and keys_K.tolist() != list(range(4))
    assert (queries_H.reshape(4, 3) // 3 == keys_K[:, None]).all()  # a query keeps its keys


def test_shaking_keeps_the_scale_and_is_marked(trunk_of, tmp_path):
    trunk = trunk_of("llama")
    for out in ("a", "b"):
        assert convert([str(trunk), str(tmp_path / out), "--plain", "--shake", "0.75"]) == 0
    assert convert([str(trunk), str(tmp_path / "plain"), "--plain"]) == 0
    a, b, plain = (load_file(tmp_path / out / "model.safetensors") for out in ("a", "b", "plain"))
    name = "model.layers.0.mlp.gate_proj.weight"
    cosine = torch.nn.functional.cosine_similarity
    assert abs(cosine(a[name].flatten(), plain[name].flatten(), dim=0) - 0.5) < 0.06
    assert abs(cosine(a[name].flatten(), b[name].flatten(), dim=0) - 0.25) < 0.06  # the noise is another each time
    assert abs(a[name].std() / plain[name].std() - 1) < 0.06
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(a[norm], plain[norm])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    with pytest.raises(UserError, match="moved away from its original"):
        require_original(tmp_path / "a", config)
    require_original(tmp_path / "plain", json.loads((tmp_path / "plain" / "config.json").read_text()))


def test_both_halves_name_the_secret_and_say_nothing_of_it(rotated):
    found = rotated("llama-tied")
    secret = load(found.secret)
    said = [
        json.loads((found.server / "config.json").read_text()),
        json.loads((found.client / "client.json").read_text()),
    ]
    assert mark_of(said[0])["secret"] == said[1]["secret"] == secret.name
    assert len(secret.name) == 16 and secret.name not in secret.key.hex()
    require_same_secret(found.server, said[0], secret.name)
    with pytest.raises(UserError, match="another secret"):
        require_same_secret(found.server, said[0], Secret.fresh().name)
    with pytest.raises(UserError, match="another secret"):
        Client.load(found.client, Secret.fresh())


def test_licences_travel_with_every_part(trunk_of, tmp_path):
    """To the server as well, which gets no tokenizer."""
    trunk = shutil.copytree(trunk_of("llama"), tmp_path / "trunk")
    (trunk / "LICENSE").write_text("mine")
    (trunk / "USE_POLICY.md").write_text("be good")
    assert convert([str(trunk), str(tmp_path / "s"), "--secret", str(tmp_path / "key")]) == 0
    assert convert([str(trunk), str(tmp_path / "plain"), "--plain"]) == 0
    for part in ("s", "s-client", "plain"):
        assert (tmp_path / part / "LICENSE").read_text() == "mine", part
        assert (tmp_path / part / "USE_POLICY.md").is_file(), part
        assert bool(list((tmp_path / part).glob("tokenizer*"))) == (part != "s"), part


@pytest.mark.parametrize("name", ("llama-tied", "qwen3", "gpt2"))
def test_folded_is_exact_in_float64(rotated, name):
    """What is left in float32 is rounding: with float64 it falls with the type, so nothing is approximated."""
    found = rotated(name, "--dtype", "float32")
    plain, ours = logits(found.trunk, torch.float64), answers(found, torch.float64, torch.float64)
    assert (plain - ours).abs().max() < 1e-5  # the written weights are float32
    converted = Conversion(found.trunk, Secret.fresh(), dtype=torch.float64)
    wide = {planned.name: planned.make() for planned in converted.planned()}
    assert all(tensor.shape == p.shape for p in converted.planned() for tensor in [wide[p.name]])


@pytest.mark.parametrize("name", ("llama-tied", "qwen3", "gpt2", "gpt2-untied"))
def test_mean_norms_rotated_equal_the_scalar_norm_model(rotated, name, tmp_path):
    """The rotation is exact for any gains; what `mean` changes is seen in the plain basis alone."""
    found = rotated(name, "--norms", "mean")
    assert convert([str(found.trunk), str(tmp_path / "plain"), "--plain", "--norms", "mean"]) == 0
    scalar = logits(tmp_path / "plain")
    torch.testing.assert_close(answers(found), scalar, atol=1e-4, rtol=0)
    assert (scalar - logits(found.trunk)).abs().max() > 0.1  # it is another function than the trunk's


@pytest.mark.parametrize("name", ("llama-tied", "qwen3", "gpt2"))
def test_plain_fold_is_the_same_function_with_unit_gains(trunk_of, name, tmp_path):
    assert convert([str(trunk_of(name)), str(tmp_path / "plain"), "--plain"]) == 0
    torch.testing.assert_close(logits(tmp_path / "plain"), logits(trunk_of(name)), atol=1e-4, rtol=0)
    # The result is a trunk like any other: it converts again, which is how a fine-tuned model is rotated.
    again = tmp_path / "again"
    assert convert([str(tmp_path / "plain"), str(again), "--secret", str(tmp_path / "b.secret")]) == 0


def test_mean_of_qk_gains_frees_every_plane(rotated, trunk_of):
    """Qwen3: exact folding leaves half turns (signs), plane-wise means any angle."""
    secret = Secret(bytes(32))  # a fresh one turns most of so few planes by little in one of a few hundred runs
    exact = Conversion(trunk_of("qwen3"), secret)
    mean = Conversion(trunk_of("qwen3"), secret, norms="mean")
    turned, _ = exact.basis._query(0)
    eye = torch.eye(16, dtype=torch.float64).expand_as(turned)
    torch.testing.assert_close(turned.abs(), eye, atol=1e-15, rtol=0)
    assert {round(x) for x in turned.diagonal(dim1=1, dim2=2).flatten().tolist()} == {-1, 1}
    assert mean.basis._query(0)[0].diagonal(dim1=1, dim2=2).abs().median() < 0.95


def test_the_server_gets_no_table_and_no_positions(rotated):
    """Any public table in the secret basis would give the basis away by least squares."""
    for name in ("llama-tied", "gpt2"):
        found = rotated(name)
        weights = load_file(found.server / "model.safetensors")
        embed = weights.get("model.embed_tokens.weight", weights.get("transformer.wte.weight"))
        assert embed.shape == (WIDTH, WIDTH) and not embed.any()
        assert torch.equal(weights["lm_head.weight"], torch.eye(WIDTH))
        if name == "gpt2":
            assert not weights["transformer.wpe.weight"].any()
        assert json.loads((found.server / "config.json").read_text())["vocab_size"] == WIDTH
        assert not list(found.server.glob("tokenizer*"))
        assert all(VOCAB not in tensor.shape for tensor in weights.values())


def test_gpt2_without_prefix_and_with_old_buffers(tmp_path):
    """As the first GPT-2 checkpoints were saved."""
    trunk = write_gpt2(tmp_path / "new", layers=1)
    expected = logits(trunk)
    weights = load_file(trunk / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    save_file(old, trunk / "model.safetensors", metadata={"format": "pt"})
    (trunk / "tokenizer.json").write_text("{}")
    out = tmp_path / "server"
    assert convert([str(trunk), str(out), "--secret", str(tmp_path / "s")]) == 0
    from rotated_trunks import Rotated

    found = Rotated(trunk, out, tmp_path / "server-client", tmp_path / "s")
    torch.testing.assert_close(answers(found), expected, atol=1e-4, rtol=0)


def test_another_secret_gives_another_server(rotated, trunk_of, tmp_path):
    one, other = rotated("llama-tied"), tmp_path / "other"
    assert convert([str(one.trunk), str(other), "--secret", str(tmp_path / "s")]) == 0
    a, b = load_file(one.server / "model.safetensors"), load_file(other / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight"
    assert torch.nn.functional.cosine_similarity(a[name].flatten(), b[name].flatten(), dim=0).abs() < 0.2


def test_shards_hold_the_same_tensors(rotated, tmp_path):
    found = rotated("llama")
    from sgt_titan.conjformer.write import write_server

    write_server(Conversion(found.trunk, load(found.secret)), tmp_path / "many", shard_bytes=20_000)
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 5
    many = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(found.server / "model.safetensors")
    assert many.keys() == whole.keys() and all(torch.equal(many[name], whole[name]) for name in whole)
    model_of(tmp_path / "many")


def test_memory_is_bounded_by_a_shard(tmp_path):
    """A checkpoint of 256 MB in shards converts in less memory than it has, beside what importing takes."""
    config = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    trunk = tmp_path / "big"
    trunk.mkdir()
    (trunk / "config.json").write_text(json.dumps(config))
    names = {}
    for layer in range(16):
        start = f"model.layers.{layer}."
        shapes = {f"self_attn.{p}_proj": (512, 512) for p in "qkvo"}
        shapes |= {"mlp.gate_proj": (2048, 512), "mlp.up_proj": (2048, 512), "mlp.down_proj": (512, 2048)}
        tensors = {f"{start}{name}.weight": torch.full(shape, 0.01) for name, shape in shapes.items()}
        tensors |= {f"{start}{n}.weight": torch.ones(512) for n in ("input_layernorm", "post_attention_layernorm")}
        if layer == 0:
            tensors |= {"model.embed_tokens.weight": torch.ones(64, 512), "model.norm.weight": torch.ones(512)}
        save_file(tensors, trunk / f"model-{layer}.safetensors")
        names |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
    (trunk / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    code = (
        "import resource, sys, torch\n"
        "from transformers import AutoConfig\n"
        "from sgt_titan.conjformer.command import convert\n"
        "torch.set_num_threads(1)\n"
        "AutoConfig.for_model('llama')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "convert(sys.argv[1:])\n"
        "print('grown', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    words = [str(trunk), str(tmp_path / "out"), "--secret", str(tmp_path / "s"), "--shard-size", "0.02", "--compute",
             "float32"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    grown = int(done.stdout.split("grown")[1]) * 1024
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) > 240e6
    # Pages of mapped source files count as resident until the kernel wants them back, those written do not.
    assert grown < 0.75 * 256e6, f"{grown / 1e6:.0f} MB"


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(words, part, *absent):
    with pytest.raises(UserError, match=part):
        convert([str(word) for word in words])
    assert not any(path.exists() for path in absent)


def test_refusals_write_nothing(rotated, trunk_of, trunk_dir, tmp_path):
    out, secret, trunk = tmp_path / "out", tmp_path / "s", trunk_of("llama")
    refused([trunk, out], "--secret FILE to rotate, or --plain", out)
    refused([trunk, out, "--plain", "--secret", secret], "--secret FILE to rotate, or --plain", out, secret)
    refused([trunk, out, "--secret", out / "s"], "which the server gets", out)
    refused([trunk, out, "--secret", secret, "--client", out / "c"], "which the server gets", out, secret)
    for size in ("0", "nan", "inf"):
        refused([trunk, out, "--secret", secret, "--shard-size", size], "--shard-size must be above 0", out, secret)
    client = tmp_path / "out-client"
    refused([trunk, out, "--secret", client / "s"], "lies in the client's directory", out, client)
    (tmp_path / "sub").mkdir()
    refused([trunk, tmp_path / "sub" / ".." / "out", "--secret", out / "s"], "which the server gets", out, client)
    refused([trunk, ".", "--secret", secret], "name a new directory", secret)
    refused([trunk, out, "--secret", rotated("llama").secret], "makes a new secret", out)
    refused([trunk_dir("deepseek-dense"), out, "--secret", secret], "model_type 'deepseek_v3'", out, secret)
    refused([tmp_path / "none", out, "--secret", secret], "no directory", out, secret)
    refused([trunk, rotated("llama").server, "--secret", secret], "not an empty directory", secret)
    for word, why in (("planes", "unknown; all, none"), ("values,queries", "QK-norm")):
        words = [trunk_of("qwen3"), out, "--secret", secret, "--symmetries", word]
        refused(words, f"--symmetries .*{why}", out, client, secret)
    refused([trunk_of("gpt2"), out, "--secret", secret, "--symmetries", "units"], "gpt2 has no gate", out, secret)
    refused([trunk, out, "--plain", "--symmetries", "none"], "belongs to a rotation", out)
    refused([trunk, out, "--secret", secret, "--shake", "0.5"], "--shake belongs to --plain", out, secret)
    refused([trunk, out, "--plain", "--shake", "1"], r"--shake must be in \[0, 1\), got 1", out)
    refused([trunk, out, "--secret", secret, "--device", "cuda:77"], "no such device", out, secret)


def test_a_server_that_cannot_be_written_leaves_nothing(trunk_of, tmp_path, monkeypatch):
    """Neither the secret nor the client's directory, which the next attempt would stumble over."""
    out, secret, client = tmp_path / "out", tmp_path / "s", tmp_path / "out-client"
    out.mkdir()  # an empty one may be there
    monkeypatch.setattr("sgt_titan.transform.shards.plan_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert([str(trunk_of("llama")), str(out), "--secret", str(secret)])
    assert not secret.exists() and not client.exists() and not list(out.iterdir())


def test_a_tensor_without_a_place_is_refused(trunk_of, tmp_path):
    trunk = tmp_path / "odd"
    trunk.mkdir()
    (trunk / "config.json").write_text((trunk_of("llama") / "config.json").read_text())
    weights = load_file(trunk_of("llama") / "model.safetensors")
    save_file(weights | {"model.layers.0.mlp.gate_proj.lora_A": torch.ones(2, 32)}, trunk / "model.safetensors")
    refused(
        [trunk, tmp_path / "out", "--secret", tmp_path / "s"], "lora_A has no place", tmp_path / "out", tmp_path / "s"
    )
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, trunk / "model.safetensors")
    refused(
        [trunk, tmp_path / "out", "--secret", tmp_path / "s"], "no tensor model.layers.1.mlp.up_proj", tmp_path / "s"
    )


def test_quantised_weights_are_refused(trunk_of, tmp_path):
    trunk = tmp_path / "fp8"
    trunk.mkdir()
    config = json.loads((trunk_of("llama") / "config.json").read_text()) | {"quantization_config": {"bits": 8}}
    (trunk / "config.json").write_text(json.dumps(config))
    save_file(load_file(trunk_of("llama") / "model.safetensors"), trunk / "model.safetensors")
    refused([trunk, tmp_path / "out", "--secret", tmp_path / "s"], "quantised", tmp_path / "out", tmp_path / "s")

import errno
import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from sgt_titan import disk
from sgt_titan.errors import UserError
from sgt_titan.transform import (
    ExportedTransform,
    SGTConfig,
    estimator_config,
    export,
    fingerprint_tensor,
    load_export,
    modeling,
    table_statistics,
    write_export,
)
from sgt_titan.trunk.families import TRAINED

WIDTH, VOCABULARY = 16, 40
SUMMARY = {
    "name": "run-7",
    "trunk": "Tiny Llama",
    "steps": 1200,
    "objective": {"mi": 0.1, "abs_cos": 1.0},
    "losses": {"utility": 1.23456, "mi": 2.0},
    "kl": 0.125,
    "agreement": 0.875,
    "nn_fr": 0.5,
    "nn_fr_positions": 640,
    "note": "a | b\nc",
}


def make_config(family="llama", **fields):
    trunk = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    if family == "deepseek_v3":
        trunk |= dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
    if family == "qwen3":
        trunk |= {"head_dim": 8}
    fields = {"hidden_size": WIDTH, "vocab_size": VOCABULARY, "scale": 0.03, "median_norm": 0.2} | fields
    return SGTConfig(trunk_config=estimator_config(AutoConfig.for_model(family, **trunk), 2), **fields)


def make_state(config):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: t.shape for name, t in ExportedTransform(config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


@pytest.fixture
def tokenizer_dir(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "trunk"
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "LICENSE.txt").write_text("the trunk's licence")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-community\n---\ncard")
    (folder / "model.safetensors").write_bytes(b"the trunk's own weights, not to be copied")
    return folder


@pytest.fixture
def written(tmp_path, tokenizer_dir):
    config = make_config()
    state = make_state(config)
    path = write_export(tmp_path / "out", config, state, tokenizer_dir=tokenizer_dir, summary=SUMMARY)
    return path, config, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_again_loads_again(written, tmp_path, dtype):
    """A cast makes other bytes than were exported, and its fingerprints are theirs."""
    transform = load_export(written[0], dtype=dtype)
    transform.save_pretrained(tmp_path / "again")
    again = load_export(tmp_path / "again")
    assert {tensor.dtype for tensor in again.state_dict().values()} == {dtype}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in transform.state_dict().items())
    same = again.config.fingerprints["weights"] == load_export(written[0]).config.fingerprints["weights"]
    assert same == (dtype == torch.float32)


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("body", ["shared", "separate"])
def test_round_trip(tmp_path, tokenizer_dir, family, body):
    config = make_config(family, body=body)
    state = make_state(config)
    reference = ExportedTransform(config).eval()
    reference.load_state_dict(state)
    path = write_export(tmp_path / "a" / "out", config, state, tokenizer_dir=tokenizer_dir, summary=SUMMARY)
    assert load_file(path / "model.safetensors").keys() == state.keys()
    loaded = load_export(path)
    assert not loaded.training and loaded.dtype == torch.float32
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected, found = reference(ids), loaded(ids)
    # Also equal in what is no weight: rotary buffers, which transformers rebuilds after loading on the meta device.
    assert torch.equal(found.mean_BTD, expected.mean_BTD) and torch.equal(found.log_std_BTD, expected.log_std_BTD)
    assert loaded.config.trunk_config == config.trunk_config and loaded.config.bounds == config.bounds
    assert leftovers(path.parent) == []


def test_directory(written, tokenizer_dir):
    path, config, state = written
    assert sorted(os.listdir(path)) == [
        "LICENSE.txt",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    fields = json.loads((path / "config.json").read_text())
    assert fields["model_type"] == "stained_glass_transform"
    assert fields["fingerprints"].keys() == {"embeddings", "weights", "tokenizer", "ids", "config"}
    assert fields["fingerprints"]["embeddings"] == fingerprint_tensor(state["embed_tokens.weight"])
    assert fields["training"]["steps"] == 1200
    assert str(path.parent) not in (path / "config.json").read_text()
    assert config.fingerprints == {} and config.training == {}
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer("b a").input_ids == [2, 1]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False)
    assert chat == "b"
    assert type(AutoModel.from_pretrained(path)) is ExportedTransform


def test_card(written):
    card = (written[0] / "README.md").read_text()
    for text in (
        "# run-7: a Stained Glass Transform for Tiny Llama",
        "Nearest-neighbour numbers are not a security statement",
        "| Steps | 1200 |",
        "| Objective weights | mi 0.1, abs_cos 1 |",
        "| Final losses | utility 1.235, mi 2 |",
        "| KL to the clean trunk, nats per token | 0.125 |",
        "| Top-1 agreement with the clean trunk | 87.5% |",
        "| Nearest-neighbour failure rate (probe), 640 positions | 50.0% |",
        "| Tokens, padding included | not measured |",
        "| note | a \\| b c |",
        "stated as `tiny-community`",
        "load_export(",
        fingerprint_tensor(written[2]["embed_tokens.weight"]),
    ):
        assert text in card, text
    assert max(map(len, card.splitlines())) <= 120


def test_bfloat16(tmp_path, tokenizer_dir):
    config = make_config()
    state = make_state(config)
    path = write_export(tmp_path / "out", config, state, tokenizer_dir=tokenizer_dir, summary={}, dtype=torch.bfloat16)
    loaded = load_export(path)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name].bfloat16()), name
    assert loaded(torch.arange(4)[None]).mean_BTD.dtype == torch.float32
    # The fingerprint is of the stored bytes: loading in another type is no damage.
    assert load_export(path, dtype=torch.float32).dtype == torch.float32


def test_without_embeddings(tmp_path, tokenizer_dir):
    config = make_config(embeddings=False, fingerprints={"embeddings": "of the trunk"})
    state = make_state(config)
    assert "embed_tokens.weight" not in state
    path = write_export(tmp_path / "out", config, state, tokenizer_dir=tokenizer_dir, summary={})
    loaded = load_export(path)
    assert loaded.embed_tokens is None and loaded.config.fingerprints["embeddings"] == "of the trunk"
    assert loaded(inputs_embeds=torch.zeros(1, 3, WIDTH)).mean_BTD.shape == (1, 3, WIDTH)


def test_shards(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(export, "SHARD_SIZE", "4KB")
    config = make_config()
    state = make_state(config)
    path = write_export(tmp_path / "out", config, state, tokenizer_dir=tokenizer_dir, summary={})
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (path / "model.safetensors").exists()
    for name, tensor in load_export(path).state_dict().items():
        assert torch.equal(tensor, state[name])
    write_export(path, config, state, tokenizer_dir=tokenizer_dir, summary={}, overwrite=True)
    shards[1].unlink()
    with pytest.raises(UserError, match=r"shard .* is missing"):
        load_export(path)


def test_views_of_a_larger_buffer(tmp_path, tokenizer_dir):
    config = make_config()
    state = make_state(config)
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    sizes = [tensor.numel() for tensor in state.values()]
    views = {name: part.view(state[name].shape) for name, part in zip(state, flat.split(sizes), strict=True)}
    path = write_export(tmp_path / "out", config, views, tokenizer_dir=tokenizer_dir, summary={})
    for name, tensor in load_file(path / "model.safetensors").items():
        assert torch.equal(tensor, state[name])
    assert (path / "model.safetensors").stat().st_size < 1.2 * flat.nbytes  # the buffer is not written once per view


def drop(name):
    return lambda state: state.pop(name)


def set_item(name, value):
    return lambda state: state.__setitem__(name, value)


def poison(name, value):
    def change(state):
        state[name].view(-1)[-1] = value

    return change


DAMAGE = [
    (drop("mean_head.bias"), "1 tensors missing, first mean_head.bias"),
    (drop("bodies.0.layers.1.mlp.up_proj.weight"), "1 tensors missing, first bodies.0.layers.1"),
    (drop("embed_tokens.weight"), "1 tensors missing, first embed_tokens.weight"),
    (set_item("extra", torch.zeros(2)), "unexpected tensors, first extra"),
    (set_item("mean_head.weight", torch.zeros(WIDTH, 3)), r"mean_head.weight has shape \(16, 3\)"),
    (poison("log_std_head.weight", float("nan")), "log_std_head.weight contains NaN"),
    (poison("bodies.0.norm.weight", float("-inf")), "bodies.0.norm.weight contains NaN or infinite"),
    (set_item("mean_head.bias", torch.zeros(WIDTH, dtype=torch.int64)), "mean_head.bias is torch.int64"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_refuses_to_write_bad_tensors(tmp_path, tokenizer_dir, damage, message):
    config = make_config()
    state = make_state(config)
    damage(state)
    with pytest.raises(UserError, match=message) as error:
        write_export(tmp_path / "out", config, state, tokenizer_dir=tokenizer_dir, summary={})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []


@pytest.mark.parametrize("load", [load_export, ExportedTransform.from_pretrained, AutoModel.from_pretrained])
@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_refuses_to_load_bad_tensors(written, damage, message, load):
    path, _, state = written
    damage(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_refuses_another_embedding_table(written):
    path, _, state = written
    state["embed_tokens.weight"][3, 3] += 1e-3
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"fingerprints\.embeddings"):
        load_export(path)


def test_refuses_damaged_directories(written, tmp_path):
    path = written[0]

    def broken(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
        change(copy)
        with pytest.raises(UserError) as error:
            load_export(copy)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no config.json" in broken(lambda d: (d / "config.json").unlink())
    assert "not valid JSON" in broken(lambda d: (d / "config.json").write_text("{"))
    assert "model_type is 'llama'" in broken(lambda d: (d / "config.json").write_text('{"model_type": "llama"}'))
    assert "not an export" in broken(lambda d: (d / "model.safetensors").unlink())
    assert "cannot read" in broken(lambda d: (d / "model.safetensors").write_bytes(b"x" * 100))
    cut = (path / "model.safetensors").read_bytes()[:-10]
    assert "cannot read" in broken(lambda d: (d / "model.safetensors").write_bytes(cut))

    assert "adapter_config.json is no part" in broken(lambda d: (d / "adapter_config.json").write_text("{}"))

    def pickled(folder):
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")

    assert "no model.safetensors" in broken(pickled)

    def escaping_index(folder):
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {"weight_map": {"mean_head.bias": "../outside.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    assert "'../outside.safetensors'" in broken(escaping_index)

    def newer(folder):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | {"format_version": 99}))

    assert "format_version is 99" in broken(newer)
    with pytest.raises(UserError, match="no such directory"):
        load_export(tmp_path / "nowhere")


def test_loading_arguments(written, tmp_path, monkeypatch):
    path = written[0]
    with pytest.raises(UserError, match="ignore_mismatched_sizes is not supported"):
        load_export(path, ignore_mismatched_sizes=True)
    model, info = load_export(path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and model.bodies[0].config._attn_implementation == "eager"
    assert load_export(path.parent, subfolder="out").config.format_version == 1
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(modeling, "_download", lambda repo, hub: asked.append((repo, hub)) or path)
    assert ExportedTransform.from_pretrained("someone/sgt", revision="abc").config.scale == 0.03
    assert asked == [("someone/sgt", {"revision": "abc"})]
    with pytest.raises(UserError, match="no such directory"):
        ExportedTransform.from_pretrained(tmp_path / "nowhere" / "else")


def test_target_directory(written, tmp_path, tokenizer_dir):
    path, config, state = written

    def write(out, **options):
        return write_export(out, config, state, tokenizer_dir=tokenizer_dir, summary={"steps": 2}, **options)

    (tmp_path / "empty").mkdir()
    assert load_export(write(tmp_path / "empty")).config.training == {"steps": 2}

    with pytest.raises(UserError, match="an export is already there"):
        write(path)
    assert load_export(path).config.training["steps"] == 1200
    state["mean_head.bias"].zero_()
    (path / "additional_chat_templates").mkdir()
    write(path, overwrite=True)
    assert torch.equal(load_export(path).mean_head.bias, torch.zeros(WIDTH))
    assert not (path / "additional_chat_templates").exists()

    (path / "report.md").write_text("hours of evaluation")
    with pytest.raises(UserError, match=r"report\.md is not part of an export"):
        write(path, overwrite=True)
    assert (path / "report.md").exists()

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    for out in (other, other / "config.json", tokenizer_dir):
        with pytest.raises(UserError, match="choose another output directory"):
            write(out, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(UserError, match="not a directory"):
        write(tmp_path / "link", overwrite=True)
    assert leftovers(tmp_path) == []


def test_earlier_export_survives_a_failing_write(written, tokenizer_dir, monkeypatch):
    path, config, state = written
    real_rename, calls = os.rename, []

    def failing_rename(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "disk error")
        real_rename(source, target)

    monkeypatch.setattr(disk.os, "rename", failing_rename)
    with pytest.raises(OSError, match="disk error"):
        write_export(path, config, state, tokenizer_dir=tokenizer_dir, summary={}, overwrite=True)
    assert load_export(path).config.training["steps"] == 1200 and leftovers(path.parent) == []

    monkeypatch.setattr(export, "model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_export(path.parent / "new", config, state, tokenizer_dir=tokenizer_dir, summary={})
    assert not (path.parent / "new").exists() and leftovers(path.parent) == []


def test_disk_and_arguments(tmp_path, tokenizer_dir, monkeypatch):
    config = make_config()
    state = make_state(config)
    with pytest.raises(UserError, match="no tokenizer there"):
        write_export(tmp_path / "out", config, state, tokenizer_dir=tmp_path, summary={})
    with pytest.raises(UserError, match=r"export\.dtype: 'float16'"):
        write_export(tmp_path / "out", config, state, tokenizer_dir=tokenizer_dir, summary={}, dtype="float16")
    bytes_needed = 4 * sum(tensor.numel() for tensor in state.values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(0, 0, bytes_needed))
    with pytest.raises(UserError, match="GB free"):
        write_export(tmp_path / "deep" / "out", config, state, tokenizer_dir=tokenizer_dir, summary={})
    assert not (tmp_path / "deep").exists()


@pytest.mark.assets
def test_real_trunk(tmp_path):
    assets = os.environ.get("SGT_TITAN_ASSETS")
    if not assets:
        pytest.skip("SGT_TITAN_ASSETS is not set")
    trunk_dir = os.path.join(assets, "models", "stories3M-hf")
    trunk = AutoModelForCausalLM.from_pretrained(trunk_dir).eval()
    table = trunk.get_input_embeddings().weight.detach()
    statistics = table_statistics(table)
    config = SGTConfig(
        trunk_config=estimator_config(trunk.config, 2),
        scale=statistics.scale,
        median_norm=statistics.median_norm,
        hidden_size=192,
        vocab_size=4096,
        std_init=0.01,
    )
    state = ExportedTransform(config).state_dict()
    state["embed_tokens.weight"] = table
    state |= {
        f"bodies.0.{name}": tensor for name, tensor in trunk.model.state_dict().items() if f"bodies.0.{name}" in state
    }
    path = write_export(tmp_path / "out", config, state, tokenizer_dir=trunk_dir, summary={})
    transform = load_export(path)
    ids = AutoTokenizer.from_pretrained(path)("Once upon a time there was a little", return_tensors="pt").input_ids
    with torch.no_grad():
        body = transform.bodies[0](inputs_embeds=transform.embed_tokens(ids)).last_hidden_state
        hidden = trunk.model(ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(body, trunk.model.norm(hidden), rtol=1e-4, atol=1e-4)
        clean = trunk(ids).logits
        noisy = trunk(inputs_embeds=transform.transform(ids, torch.ones_like(ids).bool())).logits
    # Zero heads and 1% noise: the identity up to a little noise, so the trunk answers almost as before.
    kl = (clean.softmax(-1) * (clean.log_softmax(-1) - noisy.log_softmax(-1))).sum(-1)
    assert 0 < kl.mean().item() < 0.01

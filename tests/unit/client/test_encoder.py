import copy
import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgt_titan.client import StainedGlassTransform
from sgt_titan.errors import UserError
from sgt_titan.transform.trunk_files import TrunkFiles
from tests.serving_kit import edit_json, make_export, with_chat_template

CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "who is Zorblax?"}]
pytestmark = pytest.mark.filterwarnings("ignore:a fixed seed")


@pytest.fixture
def export(chat_export, tmp_path):
    """A copy to damage."""
    return shutil.copytree(chat_export, tmp_path / "copy")


@pytest.mark.parametrize("what", ["plain text", CHAT, [0, 40, 41, 42]], ids=["text", "messages", "ids"])
def test_shape_and_mask(sgt, what):
    prompt = sgt.prompt(what)
    embeds_TD = sgt.encode(what)
    assert embeds_TD.shape == (len(prompt), sgt.config.hidden_size) and embeds_TD.dtype == torch.float32
    clean_TD = sgt.embed_tokens.weight[torch.tensor(prompt.ids)]
    same_T = (embeds_TD == clean_TD).all(-1)
    assert torch.equal(same_T, ~torch.from_numpy(prompt.mask)) and 0 < same_T.sum() < len(prompt)


def test_mask_covers_what_people_wrote(sgt):
    prompt = sgt.prompt(CHAT)
    text = lambda mask: sgt.tokenizer.decode([i for i, m in zip(prompt.ids, mask, strict=True) if m])  # noqa: E731
    assert text(prompt.mask) == "be kindwho is Zorblax?"
    assert text(~prompt.mask) == "<s><system></><user></><assistant>"


def test_it_is_the_exported_transform(sgt):
    """Same numbers as the model's own method, which the training side is tested against."""
    prompt = sgt.prompt(CHAT)
    ids_BT, mask_BT = torch.tensor([prompt.ids]), torch.from_numpy(prompt.mask)[None]
    assert torch.equal(sgt.encode(CHAT, seed=5), sgt.transform(ids_BT, mask_BT, seed=5)[0])


def test_streaming_a_long_prompt_equals_one_pass(sgt):
    text = "a long story about nothing. " * 4
    whole = sgt.encode(text, seed=1)
    for piece in (1, 7, 64):
        sgt.piece = piece
        try:
            pieces = list(sgt.encode_pieces(text, seed=1))
        finally:
            sgt.piece = 2048
        assert max(len(p) for p in pieces) == piece and len(pieces) == -(-len(whole) // piece)
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=2e-6)


def test_batch_equals_single_prompts(sgt):
    many = ["one", CHAT, "three and a good deal longer than the others"]
    batch = sgt.encode_batch(many, seed=9)
    for row, (what, embeds_TD) in enumerate(zip(many, batch, strict=True)):
        torch.testing.assert_close(embeds_TD, sgt.encode(what, seed=9 + row), rtol=0, atol=2e-6)
    assert sgt.encode_batch([]) == []


def test_fresh_noise_and_a_seed_that_warns(chat_export):
    sgt = StainedGlassTransform.from_pretrained(chat_export, hold_noise=False)
    hidden = torch.from_numpy(sgt.prompt(CHAT).mask)
    a, b = sgt.encode(CHAT), sgt.encode(CHAT)
    assert (a[hidden] != b[hidden]).any(-1).all() and torch.equal(a[~hidden], b[~hidden])
    rows = sgt.encode_batch([CHAT, CHAT])
    assert (rows[0][hidden] != rows[1][hidden]).any(-1).all()
    with pytest.warns(UserWarning, match="fixed seed"):
        assert torch.equal(sgt.encode(CHAT, seed=0), sgt.encode(CHAT, seed=0))


def test_only_the_table_is_read_of_a_trunk(chat_trunk, chat_export, tmp_path, monkeypatch):
    bare = make_export(chat_trunk, tmp_path / "bare", embeddings=False)
    assert "embed_tokens.weight" not in load_file(bare / "model.safetensors")
    read = []
    original = TrunkFiles.read
    monkeypatch.setattr(TrunkFiles, "read", lambda self, name, *a: read.append(name) or original(self, name, *a))
    sliced = StainedGlassTransform.from_pretrained(bare, trunk=chat_trunk)
    assert read == ["model.embed_tokens.weight"]
    shipped = StainedGlassTransform.from_pretrained(chat_export)
    assert torch.equal(sliced.encode(CHAT, seed=2), shipped.encode(CHAT, seed=2))


def test_no_or_another_table(chat_trunk, trunk_dir, tmp_path):
    bare = make_export(chat_trunk, tmp_path / "bare", embeddings=False)
    with pytest.raises(UserError, match="ships no embedding table; give trunk="):
        StainedGlassTransform.from_pretrained(bare)
    other = shutil.copytree(chat_trunk, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"][5, 5] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"fingerprints\.embeddings"):
        StainedGlassTransform.from_pretrained(bare, trunk=other)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: edit_json(d / "config.json", std_max=1e-3, std_init=1e-4), r"config\.json was changed"),
        (lambda d: edit_json(d / "config.json", obfuscate="all"), r"config\.json was changed"),
        (lambda d: with_chat_template(d, "{{ messages[0].content }}"), r"fingerprints\.tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text((d / "tokenizer.json").read_text() + " "), "tokenizer"),
        (lambda d: _change(d, "mean_head.bias", 1e-3), r"fingerprints\.weights"),
        (lambda d: _change(d, "mean_head.bias", float("nan")), "NaN or infinite"),
        (lambda d: _change(d, "embed_tokens.weight", 1e-3), r"fingerprints\.embeddings"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: shutil.rmtree(d), "no such directory"),
    ],
    ids=["noise", "mask", "template", "tokenizer", "weights", "nan", "table", "no tokenizer", "json", "gone"],
)
def test_a_changed_export_is_refused(export, damage, message):
    damage(export)
    with pytest.raises(UserError, match=message) as refused:
        StainedGlassTransform.from_pretrained(export)
    assert "\n" not in str(refused.value)


def _change(folder, name, amount):
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] += amount
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_export_from_before_fingerprints_warns(export):
    config = json.loads((export / "config.json").read_text())
    kept = {"embeddings": config["fingerprints"]["embeddings"]}
    edit_json(export / "config.json", fingerprints=kept)
    with pytest.warns(UserWarning, match="before exports had fingerprints"):
        StainedGlassTransform.from_pretrained(export)


def test_smaller_weights_stay_close(chat_export, sgt):
    ids_BT = torch.tensor([sgt.prompt(CHAT).ids])
    with torch.no_grad():
        exact = sgt(ids_BT)
        for weights, limit in (("bfloat16", 0.05), ("int8", 0.05)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                small = StainedGlassTransform.from_pretrained(chat_export, weights=weights, hold_noise=False)
            out = small(ids_BT)
            spread = exact.mean_BTD.std()
            assert 0 < (out.mean_BTD.float() - exact.mean_BTD).abs().mean() < limit * spread
            assert (out.log_std_BTD.float() - exact.log_std_BTD).abs().max() < 0.1
            assert torch.isfinite(small.encode(CHAT)).all()
    int8 = sum(b.numel() for b in small.bodies.buffers() if b.dtype == torch.int8)
    assert int8 > 0.9 * sum(p.numel() for p in sgt.bodies.parameters())


def test_what_is_loaded_is_not_saved_as_an_export(sgt, tmp_path):
    with pytest.raises(UserError, match="copy the export's directory instead"):
        sgt.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_nan_is_never_sent(sgt):
    broken = copy.deepcopy(sgt)
    broken.mean_head.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        broken.encode("anything")


def test_it_needs_no_torchtitan_and_no_server(chat_export):
    code = (
        "import sys; from sgt_titan.client import StainedGlassTransform as S;"
        f"S.from_pretrained({str(chat_export)!r}).encode('hello');"
        "print(sorted({'torchtitan', 'fastapi', 'uvicorn', 'sgt_titan.titan', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr

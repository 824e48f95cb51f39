"""Held noise: what is sent of a position is a function of key, export and all tokens up to it.

Checked where it could fail: edits, growth, retries, restarts, another export or other numbers under the same key.
Shapes: T tokens, D model width.
"""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from sgt_titan.client import Prompt, StainedGlassTransform
from sgt_titan.client.noise import KEY_VARIABLE, HeldNoise, held_key
from sgt_titan.errors import UserError
from tests.serving_kit import make_export

HEX = "ab" * 32
CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "who is Zorblax?"}]


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return tmp_path_factory.mktemp("key") / "noise.key"


@pytest.fixture(scope="module")
def sgt(chat_export, key):
    return StainedGlassTransform.from_pretrained(chat_export, noise_key=key)


def standardised(sgt, ids, sent_TD):
    """The noise in what was sent, (T, D): (z - x - mean) / std."""
    ids_BT = torch.tensor([ids])
    with torch.no_grad():
        out = sgt(ids_BT)
    return ((sent_TD - sgt.embed_tokens(ids_BT)[0] - out.mean_BTD[0]) / out.log_std_BTD[0].exp()).detach()


def independent(a_TD, b_TD):
    """No position shares its noise: correlations of D values are far from 1."""
    return all(abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 0.9 for pair in zip(a_TD, b_TD, strict=True))


def same(a_TD, b_TD):
    # The rounding of a longer pass, which grows with the value; the key, and so the values, are new in every run.
    torch.testing.assert_close(a_TD, b_TD, rtol=1e-5, atol=2e-6)
    return True


def test_it_is_the_default_and_a_retry_is_the_same_bytes(chat_export):
    sgt = StainedGlassTransform.from_pretrained(chat_export)
    assert torch.equal(sgt.encode(CHAT), sgt.encode(CHAT))
    again = StainedGlassTransform.from_pretrained(chat_export)  # in the same process: the same key
    assert torch.equal(again.encode(CHAT), sgt.encode(CHAT))
    for row in sgt.encode_batch([CHAT, "other", CHAT])[::2]:
        assert same(row, sgt.encode(CHAT))


def test_growth_and_pieces_keep_what_has_been_sent(sgt):
    whole = sgt.encode("the same prompt, gone on for a while")
    for end in (1, 8, 15):
        ids = sgt.prompt("the same prompt, gone on for a while").ids[: end + 1]
        assert same(sgt.encode(ids), whole[: end + 1])
    sgt.piece = 7
    try:
        assert same(sgt.encode("the same prompt, gone on for a while"), whole)
    finally:
        sgt.piece = 2048
    grown = [*CHAT, {"role": "assistant", "content": "nobody"}, {"role": "user", "content": "sure?"}]
    first = sgt.encode(CHAT)
    assert same(sgt.encode(grown)[: len(first)], first), "a conversation that is sent again with every turn"


@pytest.mark.parametrize("at", [1, 6, 14])
def test_an_edit_leaves_what_is_before_and_draws_all_after_anew(sgt, at):
    """A held eps under a mean that an edit has changed would show the difference of the means: it must not occur."""
    before = list(sgt.prompt("a prompt to edit").ids)
    after = [*before[:at], before[at] + 1, *before[at + 1 :]]
    sent, edited = sgt.encode(before), sgt.encode(after)
    assert same(edited[:at], sent[:at])
    noise = [standardised(sgt, ids, z)[at:] for ids, z in ((before, sent), (after, edited))]
    assert independent(*noise)


def test_the_estimator_sees_no_token_to_come(sgt):
    """What makes a function of the prefix enough: mean and std of a position do not change with what follows it."""
    ids = torch.tensor([sgt.prompt("a prompt to edit").ids])
    changed = ids.clone()
    changed[0, 9:] += 1
    with torch.no_grad():
        a, b = sgt(ids), sgt(changed)
    assert same(a.mean_BTD[0, :9], b.mean_BTD[0, :9]) and same(a.log_std_BTD[0, :9], b.log_std_BTD[0, :9])
    assert not torch.allclose(a.mean_BTD[0, 9:], b.mean_BTD[0, 9:], atol=1e-3)


def test_another_mask_is_another_prompt(sgt):
    ids = sgt.prompt("abcdef").ids
    masks = torch.ones(2, len(ids), dtype=torch.bool).numpy()
    masks[1, 2] = False
    a, b = (standardised(sgt, ids, sgt.encode(Prompt(ids, mask))) for mask in masks)
    torch.testing.assert_close(a[:2], b[:2], rtol=0, atol=2e-4)
    assert independent(a[3:], b[3:])


def test_another_export_or_other_numbers_under_one_key_share_no_noise(sgt, chat_trunk, chat_export, tmp_path, key):
    """Two linear views of one eps would give the embeddings away."""
    other = make_export(chat_trunk, tmp_path / "other", mean=0.7)
    kinds = [
        StainedGlassTransform.from_pretrained(other, noise_key=key),
        StainedGlassTransform.from_pretrained(chat_export, noise_key=key, weights="int8"),
        StainedGlassTransform.from_pretrained(chat_export, noise_key=key, weights="bfloat16"),
    ]
    prompt = sgt.prompt("the same words")
    mine = sgt.held_noise(prompt.ids, prompt.mask, 32)
    for kind in kinds:
        assert independent(mine, kind.held_noise(prompt.ids, prompt.mask, 32))


def test_a_kept_key_outlives_the_process_and_forget_ends_it(sgt, chat_export, key):
    code = (
        "import sys, torch; from sgt_titan.client import StainedGlassTransform as S;"
        f"print(S.from_pretrained({str(chat_export)!r}, noise_key={str(key)!r}).encode('hello')[1:].sum().item())"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    # Another process may add in another order; other noise would differ in the first digit.
    assert float(done.stdout) == pytest.approx(sgt.encode("hello")[1:].sum().item(), rel=1e-5), done.stderr
    forgotten = StainedGlassTransform.from_pretrained(chat_export, noise_key=key)
    content = key.read_text()
    forgotten.held_noise.forget()
    assert not torch.equal(forgotten.encode("hello"), sgt.encode("hello")) and key.read_text() == content


def test_without_a_kept_key_it_says_so(chat_export, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.warns(UserWarning, match="noise is held while this process lives"):
        StainedGlassTransform.from_pretrained(chat_export)
    monkeypatch.setenv(KEY_VARIABLE, HEX)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert held_key() == bytes.fromhex(HEX)
        StainedGlassTransform.from_pretrained(chat_export, hold_noise=False)


def test_the_key_file_is_the_user_s_alone(tmp_path):
    file = tmp_path / "noise.key"
    made = held_key(file)
    assert file.stat().st_mode & 0o777 == 0o600 and held_key(file) == made and len(made) == 32
    file.chmod(0o640)
    with pytest.raises(UserError, match="others may read it; chmod 600"):
        held_key(file)


def _pipe(path):
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p.write_text(""), "64 hexadecimal digits"),
        (lambda p: p.write_text(HEX[:-1] + "x"), "64 hexadecimal digits"),
        (lambda p: p.write_bytes(b"\xff" * 64), "64 hexadecimal digits"),
        (lambda p: p.mkdir(), "Is a directory|not a file"),
        (_pipe, "not a file"),
    ],
    ids=["empty", "letters", "bytes", "folder", "pipe"],
)
def test_what_is_no_key(tmp_path, make, message):
    file = tmp_path / "noise.key"
    make(file)
    file.chmod(0o700 if file.is_dir() else 0o600)
    with pytest.raises(UserError, match=message) as refused:
        held_key(file)
    assert HEX[:20] not in str(refused.value)


def test_other_mistakes(chat_export, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be made"):
        held_key(tmp_path / "missing" / "noise.key")
    with pytest.raises(UserError, match="hold_noise is off"):
        StainedGlassTransform.from_pretrained(chat_export, hold_noise=False, noise_key=tmp_path / "noise.key")
    monkeypatch.setenv(KEY_VARIABLE, HEX[:-1])
    with pytest.raises(UserError, match=f"{KEY_VARIABLE}: must be 64") as refused:
        StainedGlassTransform.from_pretrained(chat_export)
    assert HEX[:20] not in str(refused.value)


def test_it_is_standard_normal_and_says_no_secret():
    noise = HeldNoise()
    eps = noise(range(3000), [True] * 3000, 33).double()
    assert eps.shape == (3000, 33) and abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    correlation = (eps[:-1] * eps[1:]).mean().abs().item(), (eps[:, :16] * eps[:, 16:32]).mean().abs().item()
    assert max(correlation) < 0.02
    assert noise._secret.hex() not in repr(noise) and str(noise._secret) not in repr(vars(noise).keys())

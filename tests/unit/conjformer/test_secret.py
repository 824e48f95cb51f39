"""Secrets: what is derived from them, who can read them, and that nobody prints them."""

from __future__ import annotations

import os
import stat

import pytest
import torch

from sgt_titan.conjformer.basis import residual_matrix
from sgt_titan.conjformer.secret import Secret, load, save
from sgt_titan.errors import UserError


def test_matrices_are_orthogonal_and_a_function_of_key_and_label():
    secret, other = Secret.fresh(), Secret.fresh()
    U_DD = secret.orthogonal("a", 48)
    torch.testing.assert_close(U_DD @ U_DD.T, torch.eye(48, dtype=torch.float64), atol=1e-13, rtol=0)
    assert torch.equal(U_DD, Secret(secret.key).orthogonal("a", 48))
    for unlike in (secret.orthogonal("b", 48), other.orthogonal("a", 48)):
        assert (U_DD * unlike).sum().abs() / 48 < 0.5
    assert secret.orthogonal("c", 8, 3).shape == (3, 8, 8)
    assert secret.permutation("p", 100).sort().values.tolist() == list(range(100))


def test_the_numbers_are_normal_and_cross_blocks(monkeypatch):
    secret = Secret(bytes(range(32)))
    found = secret.normal("n", 200_000)
    assert abs(found.mean()) < 0.01 and abs(found.var() - 1) < 0.02
    assert abs((found**4).mean() - 3) < 0.1
    assert abs((found[:-1] * found[1:]).mean()) < 0.01
    monkeypatch.setattr("sgt_titan.conjformer.secret.BLOCK", 1000)
    parts = secret.uniform("n", 2500)
    assert parts.unique().numel() == 2500 and parts.min() >= 0 and parts.max() < 1


def test_haar_moments():
    """First entries of Haar matrices: mean 0, variance 1/D, and no preferred sign of the diagonal."""
    matrices = Secret(b"x" * 32).orthogonal("h", 6, 4000)
    assert matrices.mean((0,)).abs().max() < 0.05
    assert (matrices.square().mean(0) - 1 / 6).abs().max() < 0.03
    assert abs((torch.linalg.det(matrices) > 0).double().mean() - 0.5) < 0.04


def test_a_centred_family_keeps_the_ones():
    U_DD = residual_matrix(Secret.fresh(), 20, centred=True)
    ones_D = torch.ones(20, dtype=torch.float64)
    torch.testing.assert_close(U_DD @ ones_D, ones_D, atol=1e-12, rtol=0)
    torch.testing.assert_close(U_DD @ U_DD.T, torch.eye(20, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (U_DD - torch.eye(20)).norm() > 1


def test_file_is_private_never_overwritten_and_read_back(tmp_path):
    secret, file = Secret.fresh(), tmp_path / "keys" / "a"
    old = os.umask(0)
    try:
        save(secret, file)
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert load(file) == secret
    with pytest.raises(UserError, match="exists"):
        save(Secret.fresh(), file)
    assert load(file) == secret
    file.chmod(0o640)
    with pytest.raises(UserError, match="others may read it"):
        load(file)


@pytest.mark.parametrize("text", ("", "{}", '{"format": 1, "key": "00"}', '{"format": 9, "key": "' + "00" * 32 + '"}'))
def test_other_files_are_refused_without_quoting_them(tmp_path, text):
    file = tmp_path / "s"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(UserError) as error:
        load(file)
    assert "00" not in str(error.value).replace(str(file), "")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "missing")


def test_the_key_is_in_no_representation():
    secret = Secret.fresh()
    assert secret.key.hex() not in repr(secret) and str(secret.key) not in repr(secret)
    assert repr(secret) == repr(Secret.fresh())

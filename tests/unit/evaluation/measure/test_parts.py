import json
import shutil

import pytest

from sgt_titan.errors import UserError
from sgt_titan.evaluation.measure.parts import ABOUT, open_parts

IDENTITY = {"suite": "quick", "seed": 0, "attacks": ("a", "b")}


def test_parts_survive_and_are_found_again(tmp_path):
    parts = open_parts(tmp_path / "out", IDENTITY)
    assert parts.get("sgt/privacy") is None
    parts.put("sgt/privacy", {"nn_fr": 0.5})
    assert open_parts(tmp_path / "out", IDENTITY).get("sgt/privacy") == {"nn_fr": 0.5}


def test_a_damaged_part_is_measured_again(tmp_path):
    parts = open_parts(tmp_path / "out", IDENTITY)
    parts.put("sgt/privacy", {"nn_fr": 0.5})
    file = next((tmp_path / "out" / "parts").iterdir())
    file.write_text(file.read_text()[:5])
    assert parts.get("sgt/privacy") is None


def test_another_configuration_is_refused_and_nothing_changes(tmp_path):
    open_parts(tmp_path / "out", IDENTITY).put("x", {})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"seed is 0 there, 1 here.*another --out"):
        open_parts(tmp_path / "out", IDENTITY | {"seed": 1})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="no evaluation of ours"):
        open_parts(tmp_path, IDENTITY)
    with pytest.raises(UserError, match="no evaluation of ours"):
        open_parts(tmp_path / "thesis.tex", IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_identity_is_said(tmp_path):
    open_parts(tmp_path / "out", IDENTITY)
    for damage in ("{", "[]"):
        (tmp_path / "out" / ABOUT).write_text(damage)
        with pytest.raises(UserError, match="damaged"):
            open_parts(tmp_path / "out", IDENTITY)


def test_where_nothing_can_be_written(tmp_path):
    """Parts that were deleted are measured again; a directory that vanishes is one line."""
    out = tmp_path / "out"
    open_parts(out, IDENTITY)
    (out / "parts").rmdir()
    parts = open_parts(out, IDENTITY)
    parts.put("x", {})
    shutil.rmtree(out)
    with pytest.raises(UserError, match=r"x\.json: cannot be written: No such file"):
        parts.put("x", {})


def test_numbers_that_are_not_json_are_a_defect(tmp_path):
    with pytest.raises(ValueError):
        open_parts(tmp_path / "out", IDENTITY).put("x", {"value": float("nan")})
    assert json.loads((tmp_path / "out" / ABOUT).read_text())["seed"] == 0

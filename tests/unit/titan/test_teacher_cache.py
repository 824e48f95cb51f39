"""What the teacher said, read back: the same numbers, or nothing; and the same loss and gradient."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sgt_titan.data.batch import Document
from sgt_titan.errors import UserError
from sgt_titan.objectives.top_k import Targets
from sgt_titan.titan import teacher_cache
from sgt_titan.titan.dataloader import microbatch_inputs
from sgt_titan.titan.layout import local
from sgt_titan.titan.tasks import to_trainer_config
from sgt_titan.titan.teacher_cache import TeacherCache, bytes_per_token

IDENTITY = {"fingerprints": {"trunk": "aa", "data": "bb"}, "utility_positions": "all", "trunk_dtype": "torch.float32"}
LENGTHS = np.array([5, 3, 8, 4])
DOCUMENTS = [[Document(0, 2, 0, 8)], [Document(0, 3, 0, 4), Document(0, 1, 4, 3)]]
UTILITY = torch.tensor([[True] * 7 + [False] * 3, [True] * 3 + [False] + [True] * 2 + [False] * 4])


def cache(folder, *, k=3, vocabulary=100, **identity) -> TeacherCache:
    return TeacherCache(folder / "cache", IDENTITY | identity, k=k, vocabulary=vocabulary, lengths=LENGTHS)


def targets(k=3, vocabulary=100) -> Targets:
    generator = torch.Generator().manual_seed(0)
    n = int(UTILITY.sum())
    ids = torch.randint(vocabulary, (n, k), generator=generator)
    return Targets(ids, torch.rand(n, k, generator=generator), torch.rand(n, generator=generator))


def look(found: TeacherCache):
    return found.lookup(DOCUMENTS, UTILITY, device=torch.device("cpu"), group=None)


@pytest.mark.parametrize("vocabulary", [100, 128_256])
def test_what_is_stored_is_read_by_another(tmp_path, vocabulary):
    stored = targets(vocabulary=vocabulary)
    first = cache(tmp_path, vocabulary=vocabulary)
    assert look(first) is None
    first.store(DOCUMENTS, UTILITY, stored)
    first.close()
    for found, expected in zip(look(cache(tmp_path, vocabulary=vocabulary)), stored, strict=True):
        assert torch.equal(found, expected)


def test_one_missing_sample_and_the_teacher_is_asked(tmp_path):
    found = cache(tmp_path)
    found.store(DOCUMENTS[1:], UTILITY[1:], Targets(*(t[7:] for t in targets())))
    assert found.read(1, 2) is not None and found.read(3, 3) is not None
    assert look(found) is None


@pytest.mark.parametrize("where", [0, 4, 9, 40])
def test_a_changed_byte_is_noticed(tmp_path, where):
    found = cache(tmp_path)
    found.store(DOCUMENTS, UTILITY, targets())
    assert found.read(2, 7) is not None
    path = tmp_path / "cache" / "teacher.bin"
    raw = bytearray(path.read_bytes())
    raw[int(found.offsets[2]) + where] ^= 1
    path.write_bytes(raw)
    other = cache(tmp_path)
    assert other.read(2, 7) is None and other.read(3, 3) is not None
    assert other.read(2, 6) is None, "another number of positions"


def test_a_record_in_another_sample_s_slot_is_not_taken_for_its_own(tmp_path):
    found = cache(tmp_path)
    records = np.zeros(3, found.record)
    found.write(1, records)
    path = tmp_path / "cache" / "teacher.bin"
    raw = bytearray(path.read_bytes())
    slot = raw[int(found.offsets[1]) : int(found.offsets[1]) + 8 + records.nbytes]
    raw[int(found.offsets[0]) : int(found.offsets[0]) + len(slot)] = slot
    path.write_bytes(raw)
    assert cache(tmp_path).read(1, 3) is not None and cache(tmp_path).read(0, 3) is None


def test_a_cut_file_reads_as_not_written(tmp_path):
    found = cache(tmp_path)
    found.store(DOCUMENTS, UTILITY, targets())
    path = tmp_path / "cache" / "teacher.bin"
    path.write_bytes(path.read_bytes()[:-20])
    assert cache(tmp_path).read(3, 3) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [({"fingerprints": {"trunk": "cc", "data": "bb"}}, "fingerprints"), ({"k": 4}, "another k "),
     ({"trunk_dtype": "torch.bfloat16"}, "trunk_dtype"), ({"utility_positions": "response"}, "utility_positions")],
)  # fmt: skip
def test_another_trunk_data_or_k_is_refused(tmp_path, change, word):
    cache(tmp_path).close()
    with pytest.raises(UserError, match=word):
        cache(tmp_path, **change)


def test_unreadable_meta_is_refused(tmp_path):
    cache(tmp_path).close()
    (tmp_path / "cache" / "meta.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        cache(tmp_path)


def test_only_its_owner_may_read_it(tmp_path):
    cache(tmp_path).close()
    assert (tmp_path / "cache" / "teacher.bin").stat().st_mode & 0o077 == 0


def test_no_place_for_it(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"teacher_cache\.dir: cannot write .*/cache: File exists"):
        cache(tmp_path)


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    found, warned = cache(tmp_path), []

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_cache.os, "pwrite", full)
    monkeypatch.setattr(teacher_cache.logger, "warning", warned.append)
    for _ in range(2):
        found.store(DOCUMENTS, UTILITY, targets())
    assert look(found) is None and len(warned) == 1 and "No space left on device" in warned[0]


def test_a_rank_that_does_not_write_does_not(tmp_path):
    found = TeacherCache(tmp_path / "cache", IDENTITY, k=3, vocabulary=100, lengths=LENGTHS, writer=False)
    found.store(DOCUMENTS, UTILITY, targets())
    assert look(found) is None


@pytest.mark.parametrize(("k", "vocabulary", "size"), [(64, 128_256, 516), (64, 32_000, 388), (1, 128_256, 12)])
def test_bytes_per_token(k, vocabulary, size):
    assert bytes_per_token(k, vocabulary) == size


@pytest.mark.parametrize("top_k", [300, 8])
def test_the_second_epoch_reads_what_the_first_wrote(top_k, make_run, one_process, tmp_path):
    """With the whole vocabulary loss and gradient are those of asking; the teacher is not asked again."""
    config = make_run(f"--teacher_cache.top_k={top_k}", f"--teacher_cache.dir={tmp_path / 'cache'}")
    trainer = to_trainer_config(config).build()
    trainer.step = 1
    model = trainer.model_parts[0]
    calls = []
    layer = next(iter(model.trunk.layers.values()))
    layer.register_forward_hook(lambda module, inputs, outputs: calls.append(outputs[0] is not None))
    batch = microbatch_inputs(trainer.prepared.train_source, 0, [0, 1])
    found = []
    for _ in range(2):
        _, loss, terms = trainer.evaluate_streams(batch["input"], batch)
        loss.backward()
        gradients = torch.cat([local(p.grad).flatten() for p in model.estimator.parameters()])
        model.zero_grad()
        found.append((loss.item(), terms["kl"].item(), terms["agreement"].item(), gradients))
    trainer.close()
    assert calls == [True, False]
    assert trainer.metrics_processor.teacher_tokens_read == batch["input"].numel()
    asked, read = found
    assert read[2] == asked[2]
    difference = (read[3] - asked[3]).norm() / asked[3].norm()
    if top_k == 300:
        assert read[:2] == pytest.approx(asked[:2], rel=1e-5, abs=1e-6) and difference < 1e-5
    else:
        assert read[1] <= asked[1] + 1e-6 and 1e-6 < difference < 1
    meta = json.loads((tmp_path / "cache" / "meta.json").read_text())
    assert meta["k"] == top_k and meta["fingerprints"] == trainer.prepared.fingerprints

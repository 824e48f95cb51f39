"""Several sources in one run: tokens, order, held-out rows, and what is said of them."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from sgt_titan.config import schema
from sgt_titan.data.batch import BatchSource
from sgt_titan.data.cache import prepare, remarks
from sgt_titan.data.preview import preview
from sgt_titan.errors import UserError


@pytest.fixture
def files(write):
    chats = write(({"talk": [{"from": "human", "value": f"the cat {i}"}, {"from": "gpt", "value": "sat"}]}
                   for i in range(30)), "chats.jsonl")  # fmt: skip
    text = write(({"story": f"the dog {i} sat on the mat"} for i in range(90)), "text.jsonl")
    own = write(({"text": f"the dog {i} sat on the mat"} for i in range(80, 100)), "own.jsonl")
    return {"chats": {"source": chats, "columns": {"messages": "talk"}},
            "text": {"source": text, "columns": {"text": "story"}, "prompt_tokens": 4}}, own  # fmt: skip


@pytest.fixture
def mixed(files, tokenizer_dir, tmp_path):
    """A config of both sources; keywords are weights."""

    def make(validation="", **weights):
        tables = {name: t | ({"weight": weights[name]} if weights else {}) for name, t in files[0].items()}
        config = schema.Config()
        config.training.seq_len, config.trunk.path = 48, tokenizer_dir
        own = {"source": validation, "prompt_tokens": 4} if validation else {}
        config.data = schema.Data(
            sources=tables, validation_source=own, validation_samples=6, cache_dir=str(tmp_path / "cache")
        )
        return config

    return make


def batches(dataset, packing=False):
    return BatchSource(dataset.train, seq_len=48, global_batch_size=8, seed=1, packing=packing, obfuscate="prompt",
                       obfuscate_template=False, utility_positions="all", pad_id=0)  # fmt: skip


def test_every_source_is_tokenized_as_if_it_were_alone(mixed, files, make_config, tokenizer_dir):
    dataset = prepare(mixed(), tokenizer_dir, progress=False)
    alone = [prepare(make_config(t["source"], seq_len=48, **{k: v for k, v in t.items() if k != "source"}),
                     tokenizer_dir, progress=False) for t in files[0].values()]  # fmt: skip
    for name in ("tokens", "roles", "counts", "hashes", "sources"):
        assert (getattr(dataset, name) == np.concatenate([getattr(one, name) for one in alone])).all()
    assert (dataset.lengths == np.concatenate([one.lengths for one in alone])).all()
    about = dataset.meta["sources"]
    assert [(name, a["samples"], a["options"]["template"]) for name, a in about.items()] == [
        ("chats", 30, "chat"), ("text", 90, "plain")]  # fmt: skip
    assert dataset.meta["samples"] == 120 and dataset.template == "chat"
    assert any(line.startswith("text: 100.0% of 90") for line in remarks(dataset.meta))
    assert len(dataset.validation) == 6 and len(dataset.train) == 114
    assert batches(dataset).rows == 114 and dataset.train.blocks == {"": (114, 1.0)}


def test_weights_decide_the_order_and_no_token(mixed, tokenizer_dir):
    plain = prepare(mixed(), tokenizer_dir, progress=False)
    even = prepare(mixed(chats=1.0, text=1.0), tokenizer_dir, progress=False)
    assert even.directory == plain.directory
    assert (
        len({plain.fingerprint, even.fingerprint, prepare(mixed(chats=2.0, text=1.0), tokenizer_dir).fingerprint}) == 3
    )
    source = batches(even)
    of = lambda sample: "chats" if sample < 30 else "text"  # noqa: E731
    drawn = [d for step in range(57) for b in source.rows_batch(step, range(8)).documents for d in b]  # four epochs
    assert Counter(of(d.sample_id) for d in drawn) == {"chats": 228, "text": 228}
    assert len({(d.epoch, d.sample_id) for d in drawn}) == len(drawn)  # no noise is drawn twice
    again = batches(even)  # nothing is remembered: a resumed run asks for a step
    assert again.rows_batch(40, range(8)).documents == source.rows_batch(40, range(8)).documents
    lengths = np.split(even.train.lengths, [even.train.blocks["chats"][0]])
    assert source.epoch_counts.tokens == round(sum(57 * length.mean() for length in lengths))
    counted = source.token_counts(400).sum().item()
    assert abs(counted - source.epoch_counts.obfuscated_tokens) < 60  # each token's count is rounded


def test_meta_json_shows_the_mixture(mixed, files, tokenizer_dir, monkeypatch, caplog):
    """Of the last preparation, since runs of other weights share the tokens; nothing else of it changes."""
    shown = {}
    for name, weights in {
        "plain": {},
        "3 to 1": {"chats": 3.0, "text": 1.0},
        "even": {"chats": 1.0, "text": 1.0},
    }.items():
        dataset = prepare(mixed(validation=files[1], **weights), tokenizer_dir, progress=False)
        meta = json.loads((dataset.directory / "meta.json").read_text())
        assert meta == dataset.meta and "run.json has a run's own" in meta["mixture_is"]
        shown[name] = {source: (m["samples"], m["weight"], m["share"]) for source, m in meta["mixture"].items()}
    assert shown == {
        "plain": {"chats": (30, None, 0.25), "text": (90, None, 0.75)},
        "3 to 1": {"chats": (30, 3.0, 0.75), "text": (90, 1.0, 0.25)},
        "even": {"chats": (30, 1.0, 0.5), "text": (90, 1.0, 0.5)},
    }
    before = (dataset.directory / "meta.json").stat().st_mtime_ns
    prepare(mixed(validation=files[1], chats=1.0, text=1.0), tokenizer_dir, progress=False)
    assert (dataset.directory / "meta.json").stat().st_mtime_ns == before, "the same mixture writes nothing"

    def read_only(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("sgt_titan.disk.os.replace", read_only)
    again = prepare(mixed(validation=files[1], chats=2.0, text=1.0), tokenizer_dir, progress=False)
    assert again.weights == {"chats": 2.0, "text": 1.0} and "shows the mixture of another preparation" in caplog.text


def test_packed_rows_are_of_one_source(mixed, tokenizer_dir):
    source = batches(prepare(mixed(chats=3.0, text=1.0), tokenizer_dir, progress=False), packing=True)
    for step in range(6):
        for row in source.rows_batch(step, range(8)).documents:
            assert len({d.sample_id < 30 for d in row}) == 1
    assert source.shares.sum() == source.rows == source.sizes.sum()


def test_held_out_rows_of_a_source_of_their_own(mixed, files, tokenizer_dir):
    dataset = prepare(mixed(validation=files[1], chats=1.0, text=1.0), tokenizer_dir, progress=False)
    assert len(dataset) == 140 and len(dataset.validation) == 6 and (dataset.validation.index >= 120).all()
    assert len(dataset.train) == 110  # ten rows are in both files
    assert not set(dataset.hashes[dataset.train.index]) & set(dataset.hashes[120:])
    assert dataset.meta["sources"]["validation"]["held_out"]
    assert len(dataset.train.spread(11)) == 11 and sum(i < 30 for i in dataset.train.spread(11)) == 3
    assert dataset.validation.spread(4) == [0, 1, 2, 3]
    config = mixed(validation=files[1])
    config.data.validation_samples = 8
    assert len(prepare(config, tokenizer_dir, progress=False).validation) == 8
    # One source of training data does not need a name.
    config.data.sources, table = {}, files[0]["text"]
    config.data.source, config.data.columns, config.data.prompt_tokens = table["source"], table["columns"], 4
    assert len(prepare(config, tokenizer_dir, progress=False).train) == 80


def test_mistakes_name_the_source(mixed, files, tokenizer_dir):
    config = mixed()
    config.data.sources["text"]["columns"] = {"text": "stroy"}
    with pytest.raises(UserError, match=r"^data\.sources\.text\.columns\.text: .*no column 'stroy'"):
        prepare(config, tokenizer_dir, progress=False)
    config.data.sources["text"] = {"source": "/nowhere.jsonl"}
    with pytest.raises(UserError, match=r"^data\.sources\.text\.source: /nowhere.jsonl does not exist"):
        prepare(config, tokenizer_dir, progress=False)
    config = mixed(validation=files[0]["text"]["source"], chats=1.0, text=1.0)
    config.data.validation_source["columns"] = {"text": "story"}
    with pytest.raises(UserError, match=r"data\.sources\.text: every sample is a copy of a held-out one"):
        batches(prepare(config, tokenizer_dir, progress=False))
    with pytest.raises(UserError, match=r"data\.sources\.chats\.weight: gives it none of the 114 rows"):
        batches(prepare(mixed(chats=1e-6, text=1.0), tokenizer_dir, progress=False))


def test_a_row_of_any_source_is_shown(mixed, files):
    text = preview(mixed(validation=files[1], chats=2.0, text=1.0), 2, color=False, source="text")
    assert "chats, weight 2:" in text and "validation, held out:" in text and "[the dog" in text
    assert "[the cat 0]" in preview(mixed(), 1, color=False)
    with pytest.raises(UserError, match=r"--source: there is no 'x'; chats, text"):
        preview(mixed(), 1, color=False, source="x")

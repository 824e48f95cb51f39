"""What is filled in, and where paths lead."""

import copy
from pathlib import Path

import pytest

import sgt_titan
from sgt_titan.config.check import validate
from sgt_titan.config.load import load
from sgt_titan.config.resolve import cache_dir, resolve
from sgt_titan.config.schema import PRESETS, TERMS
from sgt_titan.data import cache as data
from sgt_titan.errors import UserError
from tests.unit.config.configs import config_of


def test_resolve_fills_what_depends_on_other_options():
    config = resolve(config_of("run.name=a", "training.local_batch_size=3"), world_size=4)
    assert config.run.output_dir == "outputs/a" and config.data.cache_dir == "outputs/.cache/data"
    assert config.objective.mi_group == 3
    assert config.parallelism.data_parallel_shard_degree == 4 and config.training.global_batch_size == 12
    assert resolve(config_of("training.local_batch_size=1"), world_size=None).objective.mi_group == 2
    kept = resolve(
        config_of("run.output_dir=/o/a", "data.cache_dir=c", "objective.mi_group=8", "training.global_batch_size=64"),
        world_size=None,
    )
    assert (kept.run.output_dir, kept.data.cache_dir, kept.objective.mi_group) == ("/o/a", "c", 8)
    assert (kept.training.global_batch_size, kept.parallelism.data_parallel_shard_degree) == (64, -1)


@pytest.mark.parametrize(
    "words", ([], ["run.output_dir=$RUNS/a"], ["run.output_dir=x/../y"], ["data.cache_dir=$RUNS/c"])
)
def test_one_answer_to_where_the_cache_is(words, monkeypatch):
    """A config that no run has resolved (`prepare`, an evaluation) finds the cache that a run of it made."""
    monkeypatch.setenv("RUNS", "/runs")
    config = config_of("run.name=a", *words)
    assert cache_dir(config) == resolve(config, world_size=1).data.cache_dir
    assert str(data.cache_dir(config)) == cache_dir(config)


@pytest.mark.parametrize("preset", [*PRESETS, "none"])
def test_resolve_preset_weights(preset):
    config = resolve(config_of(f"objective.preset={preset}"), world_size=1)
    weights = {term: getattr(config.objective, term).weight for term in TERMS}
    assert weights == {term: PRESETS.get(preset, {}).get(term, 0.0) for term in TERMS}


def test_explicit_weights_win_over_the_preset():
    words = ("objective.mi.weight=0.0", "objective.cos_sim.weight=2")
    config = resolve(config_of(*words), world_size=1)
    assert config.objective.mi.weight == 0.0 and config.objective.cos_sim.weight == 2.0
    assert config.objective.abs_cos.weight == PRESETS["mi_abs_cos_norm"]["abs_cos"]


def test_resolve_twice_changes_nothing_and_leaves_its_argument(monkeypatch):
    monkeypatch.setenv("SGT_A", "/a")
    config = config_of("trunk.path=${SGT_A}/m", "trunk.architecture=x.json", "data.source=$SGT_A/d.jsonl")
    before = copy.deepcopy(config)
    for world_size in (None, 4):
        once = resolve(config, world_size=world_size)
        assert resolve(once, world_size=world_size) == once
    assert config == before


def test_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("SGT_A", "/a")
    monkeypatch.setenv("HOME", "/home/me")
    config = resolve(
        config_of("trunk.path=${SGT_A}/m", "data.source=$SGT_A/d.jsonl", "run.output_dir=~/o"), world_size=1
    )
    assert (config.trunk.path, config.data.source, config.run.output_dir) == ("/a/m", "/a/d.jsonl", "/home/me/o")
    demo = resolve(config_of("trunk.path=demo"), world_size=1).trunk.path
    assert Path(demo) == Path(sgt_titan.__file__).resolve().parent / "demo" / "trunk"
    monkeypatch.chdir(tmp_path)
    assert resolve(config_of("trunk.architecture=b.json"), world_size=1).trunk.architecture == str(tmp_path / "b.json")


def test_unset_variable(monkeypatch):
    for value in (None, ""):
        monkeypatch.delenv("SGT_NO", raising=False) if value is None else monkeypatch.setenv("SGT_NO", value)
        with pytest.raises(UserError) as caught:
            resolve(config_of("trunk.path=${SGT_NO}/m"), world_size=1)
        assert str(caught.value) == "trunk.path: environment variable SGT_NO is not set (in '${SGT_NO}/m')"
    monkeypatch.setenv("SGT_NO", "/a$b")
    with pytest.raises(UserError) as caught:
        resolve(config_of("data.source=$SGT_NO"), world_size=1)
    assert (
        str(caught.value) == "data.source: '$SGT_NO' expands to '/a$b', which still holds a $; use a path without one"
    )


def test_every_shipped_config_resolves(monkeypatch):
    for path in sorted(Path(__file__).resolve().parents[3].glob("train_configs/*.yaml")):
        config = load(str(path))
        for key in ("path", "architecture"):
            setattr(config.trunk, key, "")
        config.data.source = "demo"
        size = config.cluster.nodes * config.cluster.gpus_per_node
        validate(resolve(config, world_size=size), size, None)

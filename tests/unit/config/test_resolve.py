import copy
import json
import math
from pathlib import Path

import pytest

import sgt_titan
from sgt_titan.config.load import load
from sgt_titan.config.resolve import cache_dir, dp_degree, read_trunk, resolve, validate
from sgt_titan.config.schema import PRESETS, TERMS, Config
from sgt_titan.data import cache as data
from sgt_titan.errors import UserError

TRUNK = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "vocab_size": 100,
}


def config_of(*overrides: str, tmp="/nonexistent-is-fine") -> Config:
    """Defaults with a source and a trunk path, and overrides; unresolved."""
    base = Config()
    base.objective.preset = "mi_abs_cos_norm"  # most to be wrong with
    base.data.source, base.trunk.path = "demo", tmp
    for word in overrides:
        key, _, text = word.partition("=")
        section, _, name = key.rpartition(".")
        owner = base
        for part in section.split("."):
            owner = getattr(owner, part)
        old = getattr(owner, name)
        assert hasattr(owner, name)
        kinds = {bool: lambda t: t == "true", int: int, float: float, str: str, type(None): float, dict: json.loads}
        setattr(owner, name, kinds[type(old)](text))
    return base


def message(*overrides: str, world_size=1, trunk=TRUNK, device=None) -> str:
    config = resolve(config_of(*overrides), world_size=world_size)
    with pytest.raises(UserError) as caught:
        validate(config, world_size, trunk, device=device)
    return str(caught.value)


def accepts(*overrides: str, world_size=1, trunk=TRUNK, device=None) -> Config:
    config = resolve(config_of(*overrides), world_size=world_size)
    validate(config, world_size, trunk, device=device)
    return config


def test_defaults_are_valid_on_cpu():
    accepts(device="cpu")
    accepts(world_size=None, trunk=None)


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


def test_resolve_leaves_degrees_that_do_not_fit():
    config = resolve(config_of("parallelism.tensor_parallel_degree=3"), world_size=4)
    assert config.parallelism.data_parallel_shard_degree == -1 and config.training.global_batch_size == -1


def test_resolve_hsdp_and_tp():
    words = ("parallelism.data_parallel_replicate_degree=2", "parallelism.tensor_parallel_degree=2")
    config = resolve(config_of(*words), world_size=16)
    assert config.parallelism.data_parallel_shard_degree == 4
    assert dp_degree(config, 16) == 8 and config.training.global_batch_size == 32


def test_an_allocation_decides_how_many_copies_there_are():
    words = ("parallelism.data_parallel_replicate_degree=-1", "parallelism.data_parallel_shard_degree=2")
    degrees = {
        w: resolve(config_of(*words), world_size=w).parallelism.data_parallel_replicate_degree for w in (2, 4, 12)
    }
    assert degrees == {2: 1, 4: 2, 12: 6}
    with pytest.raises(UserError, match="shard 2 x tensor 1 = 2 does not divide the world size 5"):
        dp_degree(config_of(*words), 5)
    with pytest.raises(UserError, match="are both -1"):
        dp_degree(config_of(words[0]), 4)


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


P = "parallelism"


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        (
            [f"{P}.data_parallel_shard_degree=3", f"{P}.tensor_parallel_degree=2"],
            4,
            "parallelism: replicate 1 x shard 3 x tensor 2 = 6, but the world size is 4",
        ),
        (
            [f"{P}.data_parallel_replicate_degree=3"],
            4,
            "parallelism: replicate 3 x tensor 1 = 3 does not divide the world size 4",
        ),
        (
            [f"{P}.expert_parallel_degree=3"],
            4,
            "parallelism.expert_parallel_degree 3 does not divide shard 4 x tensor 1 = 4",
        ),
        (
            [f"{P}.tensor_parallel_degree=0"],
            4,
            "parallelism.tensor_parallel_degree must be at least 1, got 0",
        ),
        (
            ["training.global_batch_size=12"],
            2,
            "training.global_batch_size 12 is not a multiple of local_batch_size 4 x 2 data-parallel ranks = 8; "
            "8 or 16 would be",
        ),
        (
            ["training.global_batch_size=3"],
            1,
            "training.global_batch_size 3 is not a multiple of local_batch_size 4 x 1 data-parallel rank = 4; "
            "4 would be",
        ),
        (["training.seq_len=2048"], 1, "training.seq_len 2048 exceeds the trunk's max_position_embeddings 1024"),
        (
            ["training.seq_len=33", f"{P}.tensor_parallel_degree=2"],
            2,
            "training.seq_len 33 is not a multiple of tensor_parallel_degree 2, as enable_sequence_parallel needs; "
            "32 or 34 would be",
        ),
        (
            [f"{P}.tensor_parallel_degree=16"],
            16,
            "parallelism.tensor_parallel_degree 16 does not divide the trunk's num_attention_heads 8",
        ),
        (
            [f"{P}.tensor_parallel_degree=4"],
            4,
            "parallelism.tensor_parallel_degree 4 does not divide the trunk's num_key_value_heads 2",
        ),
        (
            [f"{P}.expert_parallel_degree=2"],
            2,
            "parallelism.expert_parallel_degree 2: the trunk has no experts; it must be 1",
        ),
        (
            ["trunk.float8=products", f"{P}.tensor_parallel_degree=2"],
            2,
            "trunk.float8 products: the trunk's num_key_value_heads * head_dim / tensor_parallel_degree 2 is 8, and "
            "float8 products need multiples of 16; set it to weights or none",
        ),
        (
            ["trunk.float8=weights", "run.task=finetune"],
            1,
            "trunk.float8: run.task finetune trains the trunk, which needs its own type; set it to none",
        ),
        (["estimator.layers=0"], 1, "estimator.layers must be at least 1, got 0"),
        (
            ["estimator.layers=5"],
            1,
            "estimator.layers 5 exceeds the trunk's 4 layers; it must be at most that",
        ),
        (
            ["estimator.std_init=20"],
            1,
            "estimator: 0 < std_min < std_init < std_max must hold, got std_min 0.0001, std_init 20.0, std_max 10.0",
        ),
        (
            ["estimator.std_min=0"],
            1,
            "estimator: 0 < std_min < std_init < std_max must hold, got std_min 0.0, std_init 0.1, std_max 10.0",
        ),
        (
            ["objective.mi_group=3"],
            2,
            "objective.mi_group 3 does not divide a microbatch evenly (local_batch_size 4 x 2 data-parallel ranks = 8 "
            "rows); 2, 4 or 8 would",
        ),
        (
            ["training.local_batch_size=1"],
            1,
            "objective.mi pairs rows of one microbatch, which has 1 row (local_batch_size 1 x 1 data-parallel rank = 1)"
            "; raise training.local_batch_size",
        ),
        (["objective.mi_group=1"], 1, "objective.mi_group must be 0 (automatic) or at least 2, got 1"),
        (
            ["checkpoint.keep_latest=1"],
            1,
            "checkpoint.keep_latest must be 0 (all) or at least 2, since with 1 the only checkpoint is lost when a "
            "save is interrupted, got 1",
        ),
        (["checkpoint.interval=0"], 1, "checkpoint.interval must be at least 1, got 0"),
        (["training.steps=-1"], 1, "training.steps must be 0 (from epochs) or more, got -1"),
        (["training.epochs=0"], 1, "training.epochs must be above 0 when training.steps is 0, got 0.0"),
        (["objective.mi.ramp_steps=-5"], 1, "objective.mi.ramp_steps must be 0 or more, got -5"),
        (["objective.norm.weight=-0.5"], 1, "objective.norm.weight must be 0 or more, got -0.5"),
        (["optimizer.lr=0"], 1, "optimizer.lr must be above 0, got 0.0"),
        (["lr_scheduler.decay_ratio=1.5"], 1, "lr_scheduler.decay_ratio must be in [0, 1], got 1.5"),
        (
            ["objective.utility_positions=response", "data.format=text"],
            1,
            "objective.utility_positions response needs response tokens, but with data.format text and "
            "data.prompt_tokens 0 the whole text is prompt; set data.prompt_tokens or utility_positions all",
        ),
        (["data.prompt_tokens=512"], 1, "data.prompt_tokens 512 must be below training.seq_len 512"),
        (
            ["data.min_prompt_tokens=513"],
            1,
            "data.min_prompt_tokens 513 exceeds training.seq_len 512: no sample is left",
        ),
        (
            ["data.source="],
            1,
            "data.source is not set: a preset (such as demo), a hub dataset name or a local file",
        ),
        (
            ['data.columns={"txt": "a"}'],
            1,
            "data.columns.txt is no field; the fields are text, system, instruction, input, output, history, messages, "
            "tools, private, role, content",
        ),
        (
            ["data.validation_samples=0"],
            1,
            "metrics.probe_every needs held-out samples; set data.validation_samples or metrics.probe_every 0",
        ),
    ],
)  # fmt: skip
def test_mistakes_across_options(overrides, world_size, expected):
    assert message(*overrides, world_size=world_size) == expected


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"a": {"source": "x", "weight": 1}, "b": {"source": "y"}}, "data.sources.b.weight is not set, and others are"),
        ({"a": {"weight": 1}}, "data.sources.a.source is not set: a preset"),
        ({"a": {"source": "x", "weight": 0}}, "data.sources.a.weight must be above 0, got 0; leave a source out"),
        ({"a b": {"source": "x"}}, "data.sources.a b: a source's name is letters, digits, _ and -"),
        ({"a": {"source": "x", "columns": {"txt": "t"}}}, "data.sources.a.columns.txt is no field"),
        ({"a": {"source": "x", "prompt_tokens": 9999}}, "data.sources.a.prompt_tokens 9999 must be below"),
        ({"a": {"source": "x", "max_samples": -1}}, "data.sources.a.max_samples must be 0 or more"),
    ],
)
def test_mistakes_of_a_mixture(tables, expected):
    assert message("data.source=", f"data.sources={json.dumps(tables)}").startswith(expected)


def test_a_mixture_is_all_there_is():
    both = f"data.sources={json.dumps({'a': {'source': 'x'}})}"
    assert message(both).startswith("data.source: 'demo', and data.sources names a; give one or the other")
    assert message("data.source=", both, "data.split=test") == (
        "data.split: belongs to one source; set it in data.sources.NAME"
    )
    own = 'data.validation_source={"source": "x"}'
    assert message(own, "data.validation_samples=0").startswith("data.validation_source: data.validation_samples is 0")
    assert accepts("data.source=", both, own).data.called == "a"


def test_packing_needs_a_gpu():
    expected = "data.packing needs a GPU (document masks have no CPU backward); set data.packing false"
    assert message("data.packing=true", device="cpu") == expected
    accepts("data.packing=true", device=None)


def test_experts():
    moe = {**TRUNK, "model_type": "qwen3_moe", "num_experts": 6}
    assert message(f"{P}.expert_parallel_degree=4", world_size=4, trunk=moe) == (
        "parallelism.expert_parallel_degree 4 does not divide the trunk's 6 experts"
    )
    accepts(f"{P}.expert_parallel_degree=2", world_size=4, trunk=moe)
    with pytest.raises(UserError, match=r"trunk\.float8 weights: the weights of experts, most of this trunk"):
        validate(resolve(config_of("trunk.float8=weights"), world_size=1), 1, moe)


def test_neighbours_of_the_mistakes_are_accepted():
    accepts("training.seq_len=33", f"{P}.tensor_parallel_degree=2", f"{P}.enable_sequence_parallel=false", world_size=2)
    accepts("estimator.layers=4")
    accepts("training.seq_len=1024")
    accepts("checkpoint.keep_latest=0")
    accepts("checkpoint.keep_latest=2")
    accepts("objective.mi_group=8", world_size=2)
    accepts("objective.mi_group=2", world_size=2)
    accepts("objective.mi_group=3", "objective.preset=abs_cos")  # no MI, no pairs
    accepts("training.local_batch_size=1", "objective.preset=abs_cos")
    accepts("training.local_batch_size=1", "run.task=finetune")
    accepts("objective.utility_positions=response", "data.format=text", "data.prompt_tokens=8")
    accepts("training.steps=5", "training.epochs=0")
    multimodal = {"text_config": TRUNK}
    assert "exceeds" in message("training.seq_len=2048", trunk=multimodal)


def test_a_ramp_from_a_weight_to_zero_still_pairs():
    words = ("objective.mi.weight=0.0", "objective.mi.start=1", "objective.mi.ramp_steps=5", "objective.mi_group=3")
    assert message(*words).startswith("objective.mi_group 3")


def test_mi_groups_suggested_are_exactly_those_accepted():
    """Brute force over the definition: groups tile the microbatch, and neither cuts a rank's rows unevenly."""
    for local in (1, 2, 3, 4, 6):
        for dp in (1, 2, 3, 4):
            rows = local * dp
            for group in range(2, rows + 2):
                tiles = all(len(range(i, min(i + group, rows))) == group for i in range(0, rows, group))
                nested = math.gcd(group, local) in (group, local)
                words = (f"training.local_batch_size={local}", f"objective.mi_group={group}")
                config = resolve(config_of(*words), world_size=dp)
                try:
                    validate(config, dp, None)
                    accepted = True
                except UserError as error:
                    accepted = False
                    if rows > 1:
                        listed = str(error).rpartition("; ")[2].removesuffix(" would")
                        assert str(group) not in listed.replace(" or ", ", ").split(", ")
                assert accepted == (tiles and nested), (local, dp, group)


@pytest.mark.parametrize("replicate", [1, 2, 3])
@pytest.mark.parametrize("shard", [-1, 1, 2])
@pytest.mark.parametrize("tp", [1, 2])
def test_dp_degree(replicate, shard, tp):
    config = config_of(
        f"{P}.data_parallel_replicate_degree={replicate}",
        f"{P}.data_parallel_shard_degree={shard}",
        f"{P}.tensor_parallel_degree={tp}",
    )
    for world in range(1, 13):
        fits = [s for s in range(1, world + 1) if replicate * s * tp == world and shard in (-1, s)]
        if fits:
            assert dp_degree(config, world) == replicate * fits[0]
        else:
            with pytest.raises(UserError, match="world size"):
                dp_degree(config, world)


@pytest.fixture
def trunk_folder(tmp_path, bare_trunk) -> Path:
    assert bare_trunk(tmp_path / "trunk", **TRUNK) == TRUNK
    return tmp_path / "trunk"


def trunk_error(path, architecture="", weights=True) -> str:
    with pytest.raises(UserError) as caught:
        read_trunk(config_of(f"trunk.architecture={architecture}", tmp=str(path)), weights=weights)
    return str(caught.value)


def test_read_trunk(tmp_path, trunk_folder):
    folder = str(trunk_folder)
    assert read_trunk(config_of(tmp=folder)) == TRUNK
    architecture = tmp_path / "arch.json"
    architecture.write_text(json.dumps({**TRUNK, "rope_theta": 1}))
    words = f"trunk.architecture={architecture}"
    assert read_trunk(config_of(words, tmp=folder)) == TRUNK
    assert read_trunk(config_of(words, tmp=""), weights=False)["rope_theta"] == 1
    assert read_trunk(config_of(words, tmp=str(tmp_path / "no")), weights=False)["rope_theta"] == 1


def test_arithmetic_needs_no_variable(tmp_path, monkeypatch):
    """A dry run of a shipped config, before the site has said where its trunks are."""
    monkeypatch.delenv("SGT_NO", raising=False)
    (tmp_path / "a.json").write_text(json.dumps(TRUNK))
    config = resolve(config_of("trunk.path=${SGT_NO}/m", f"trunk.architecture={tmp_path}/a.json"), world_size=1)
    assert read_trunk(config, weights=False) == TRUNK
    with pytest.raises(UserError, match=r"^trunk\.path: environment variable SGT_NO is not set"):
        read_trunk(config)


def test_mistakes_of_the_trunk_directory(tmp_path, trunk_folder):
    no = tmp_path / "no"
    architecture = tmp_path / "arch.json"
    architecture.write_text(json.dumps({**TRUNK, "hidden_size": 65}))
    assert trunk_error("") == "trunk.path is not set: it must be the directory with the frozen model's checkpoint"
    assert trunk_error("", architecture).startswith("trunk.path is not set: ")
    assert trunk_error(no) == f"trunk.path: no directory {no}"
    assert trunk_error(no, architecture) == f"trunk.path: no directory {no}"
    assert trunk_error(no, no) == f"trunk.architecture: no file {no}"
    assert trunk_error(tmp_path) == (
        f"trunk.path: no config.json in {tmp_path}; it must be a Hugging Face checkpoint directory"
    )
    folder = trunk_folder
    (folder / "model.safetensors").unlink()
    none = f"trunk.path: no model.safetensors and no model.safetensors.index.json in {folder}"
    assert trunk_error(folder) == f"{none}; download the weights"
    assert trunk_error(folder, architecture, weights=False) == (
        f"trunk.architecture: hidden_size is 65 in {architecture} but 64 in {folder}/config.json"
    )
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}}))
    (folder / "1.safetensors").touch()
    assert trunk_error(folder) == (f"trunk.path: {folder} lacks 2.safetensors (1 of 2 files missing)")
    index.write_text("{}")
    assert trunk_error(folder) == f"{index}: not a safetensors index; download it again"
    (folder / "config.json").write_text('{"a": ')
    assert trunk_error(folder, weights=False).startswith(f"{folder}/config.json: is not valid JSON: Expecting value")
    (folder / "config.json").write_text("[]")
    assert trunk_error(folder, weights=False) == f"{folder}/config.json: must hold a JSON object"

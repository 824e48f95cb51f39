"""Mistakes across options and against the trunk, each in one line, and their neighbours that are none."""

import json
import math

import pytest

from sgt_titan.config.check import validate
from sgt_titan.config.keys import inner, is_optional, keys
from sgt_titan.config.resolve import resolve
from sgt_titan.errors import UserError
from tests.unit.config.configs import TRUNK, accepts, config_of, message


def test_defaults_are_valid_on_cpu():
    accepts(device="cpu")
    accepts(world_size=None, trunk=None)


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
        (
            ["finetune.distil=0.5"],
            1,
            "finetune.distil: belongs to run.task finetune, this is run.task sgt; leave it out",
        ),
        (
            ["run.task=finetune", "finetune.drift=1"],
            1,
            "finetune.teacher is not set: distil and drift need the directory of the original checkpoint",
        ),
        (
            ["run.task=finetune", "finetune.teacher=/some"],
            1,
            "finetune.teacher: is not used while distil and drift are 0; set one of them or leave it out",
        ),
        (
            ["run.task=finetune", "teacher_cache.top_k=8"],
            1,
            "teacher_cache.top_k: run.task finetune stores nothing of its teacher; set it to 0",
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


def test_every_number_has_a_range():
    """Beside it in the schema, but for those that are checked against one another."""
    kind = {key: inner(leaf.hint) if is_optional(leaf.hint) else leaf.hint for key, leaf in keys().items()}
    free = {key for key, leaf in keys().items() if kind[key] in (int, float) and leaf.must is None}
    assert free == {"estimator.std_min", "estimator.std_max", "estimator.std_init", "training.epochs"}
    for key, leaf in keys().items():
        assert leaf.must is None or leaf.default is None or leaf.must.holds(leaf.default), key

"""Traffic, time and checkpoint intervals by hand; the command."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path

import pytest

from sgt_titan.errors import UserError
from sgt_titan.plan import from_name, main
from sgt_titan.plan.arithmetic import fewest_nodes
from sgt_titan.plan.hardware import GPUS, HFU_RANGE, KINDS, gpu_name
from sgt_titan.plan.interval import daly, saving
from sgt_titan.trunk.families import TRAINED

BIG = "llama3_70b_64x8"


@pytest.fixture(autouse=True)
def trunks(monkeypatch):
    monkeypatch.setenv("SGT_TRUNKS", "/nowhere")


def test_traffic_of_70b_by_hand():
    """80 layers of width 8192 on 8 copies x 8 shards x TP 8, rows of 8 x 2048 tokens, everything recomputed."""
    by_name = {one.name: one for one in from_name(BIG).traffic}
    tokens = 8 * 2048
    moved = 7 / 8 * tokens * 8192 * 2
    gather = by_name["tensor parallel, all-gather"]
    assert (gather.count, gather.bytes, gather.link) == (2 * 4 * 80, 2 * 4 * 80 * moved, "nvlink")
    frozen = by_name["all-gather of frozen layers"]
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    assert frozen.count == 2 * 80 + 2 and frozen.link == "network"
    assert frozen.bytes == pytest.approx(7 / 8 * 2 * (2 * 80 * layer + 2 * 128256 * 8192) / 8, rel=1e-3)
    # Two layers each and two heads and one, of estimator and denoiser; heads are whole on every TP rank.
    trained, heads = 4 * layer + 3 * 8192 * 8192, 3 * 8192 * 8192
    own = by_name["estimator, gather and scatter"]
    assert own.bytes == pytest.approx(7 / 8 * (2 + 2 + 4) * ((trained - heads) / 8 + heads), rel=1e-3)
    copies = by_name["estimator, gradients of all copies"]
    assert copies.count == 1 and copies.bytes < frozen.bytes / 50


def test_links_follow_the_layout():
    one = {t.name: t for t in from_name(BIG, ["--cluster.nodes", "8"]).traffic}
    assert "estimator, gradients of all copies" not in one  # one copy
    assert not from_name("llama3_1b").traffic
    small = from_name("llama3_1b", ["--cluster.gpus_per_node", "8"])
    assert {t.link for t in small.traffic} == {"nvlink"}


def test_a_step_is_no_shorter_than_its_slowest_link():
    plan = from_name(BIG)
    best, worst = plan.seconds_range
    work = plan.tokens_per_step * plan.hardware_flops_per_token / (512 * GPUS["A100-80GB"].flops)
    assert best == pytest.approx(work / HFU_RANGE[1]) and worst > work / HFU_RANGE[0]
    starved = from_name(BIG, ["--training.local_batch_size", "1", "--objective.mi_group", "8"])
    network = sum(t.seconds(starved.hardware)[1] for t in starved.traffic if t.link == "network")
    assert starved.microbatches == 8 and starved.seconds_range[0] == pytest.approx(network)


@pytest.mark.parametrize(("stall", "mtbf"), [(0.1, 3600.0), (5.0, 86400.0), (60.0, 7200.0), (300.0, 3600.0)])
def test_daly_is_where_least_is_wasted(stall, mtbf):
    """Against the wasted share itself: with failures at random, an interval w of work takes M (exp((w+s)/M) - 1)."""

    def wasted(work: float) -> float:
        return mtbf * (exp((work + stall) / mtbf) - 1) / work

    best = min((wasted(w), w) for w in (mtbf * 10 ** (k / 400) for k in range(-1600, 200)))
    assert daly(stall, mtbf) == pytest.approx(best[1], rel=0.05)
    assert wasted(daly(stall, mtbf)) == pytest.approx(best[0], rel=1e-3)


def test_more_nodes_save_more_often_and_never_faster_than_they_write():
    few, many = (saving(from_name(BIG, ["--cluster.nodes", str(n)]), n, 264) for n in (8, 64))
    assert many.mtbf * 8 == pytest.approx(few.mtbf) and many.optimum < few.optimum
    broken = saving(from_name(BIG), 64, 0.1)
    assert broken.optimum >= 2 * broken.write and broken.lost_share > 0.5


def test_a_synchronous_save_holds_up_the_run_while_it_writes(capsys):
    told = []
    for asynchronous in ("true", "false"):
        assert main([BIG, "--json", "--checkpoint.asynchronous", asynchronous]) == 0
        told.append(json.loads(capsys.readouterr().out)["saving"])
    beside, waiting = told
    assert waiting["stall"] == pytest.approx(beside["stall"] + beside["write"])
    assert waiting["optimum"] > 2 * beside["optimum"] and waiting["lost_share"] > beside["lost_share"]


def test_fewest_nodes():
    nodes, plan = fewest_nodes(BIG, [], 64)
    assert nodes == 1 and plan.fits and plan.rows_per_step == 512
    assert fewest_nodes("deepseek_v3_64x8", [], 2) is None


def test_the_page_and_its_numbers(capsys):
    assert main([BIG, "--nodes", "32", "--gpu", "h100", "--rows", "1500000", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["gpu"] == "H100-80GB" and told["degrees"]["replicas"] == 4 and told["microbatches"] == 2
    assert told["tokens"] == pytest.approx(2 * 1500000 * 2048)
    assert told["memory_per_gpu"]["peak"] < told["capacity"] and told["fewest_nodes"] == 1
    assert main([BIG, "--nodes", "32", "--gpu", "h100", "--rows", "1500000"]) == 0
    page = capsys.readouterr().out
    assert "32 x 8 H100-80GB" in page and "fits; at least 1 node" in page
    assert f"{told['days']['best']:.2f} to {told['days']['worst']:.2f} days" in page
    assert main(["demo"]) == 0 and "CPU processes" in capsys.readouterr().out


def test_what_the_performance_page_says_of_a_plan(capsys):
    def told(*words):
        assert main([BIG, *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def trunk(plan):
        return plan["traffic_per_step"][0]["bytes"] / 1e9, plan["memory_per_gpu"]["trunk"] / 1e9

    plan, bare, float8 = told(), told("--denoiser.layers", "0"), told("--trunk.float8", "weights")
    work, without = (one["flops_per_token"]["model"] / 1e9 for one in (plan, bare))
    (received, kept), (received8, kept8) = trunk(plan), trunk(float8)
    page = " ".join((Path(__file__).parents[3] / "docs" / "PERFORMANCE.md").read_text().split())
    assert f"two of them add {work / without - 1:.1%} to a step's work" in page
    assert f"{work:.0f} Gflop a token, {without:.0f} without" in page
    assert f"receives {received8:.1f} instead of {received:.1f} GB of trunk a step" in page
    assert f"keeps {kept8:.2f} instead of {kept:.2f} GB" in page


def test_samples_are_not_packed_rows(capsys):
    """llama3_1b packs its 635,088 samples, and how many rows that makes the config does not say."""
    assert main(["llama3_1b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] is None
    assert main(["llama3_1b", "--json", "--data.packing", "false"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == pytest.approx(635088 / 64)
    assert main(["llama3_1b"]) == 0 and "give --rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("trunk", "told"),
    [({"model_type": "gpt2"}, "model_type 'gpt2'; supported are llama"), ({"model_type": "llama"}, "no hidden_size, ")],
)
def test_a_trunk_that_is_not_counted(trunk, told, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(trunk))
    with pytest.raises(UserError, match=told):
        main(["demo", "--trunk.path", str(tmp_path)])


def test_the_families_are_those_that_are_trained():
    from sgt_titan.titan import trunks

    assert tuple(trunks.FAMILIES) == TRAINED


def test_names_of_gpus():
    assert {gpu_name(kind.upper()) for kind in KINDS} == set(GPUS) == {gpu_name(name) for name in GPUS}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            [BIG, "--gpu", "tpu"],
            "--gpu: 'tpu' is unknown; known are " + ", ".join(KINDS),
        ),
        ([BIG, "--nodes", "12"], "does not divide the world size 96"),
        ([BIG, "--nodes", "0"], "--nodes must be at least 1, got 0"),
        ([BIG, "--node-mtbf-days", "nan"], "--node-mtbf-days must be above 0, got nan"),
        ([BIG, "--node-mtbf-days", "inf"], "--node-mtbf-days must be above 0, got inf"),
        (
            ["llama3_70b_1x8", "--parallelism.tensor_parallel_degree", "1", "--gpus-per-node", "1"],
            "are needed on a GPU of 80",
        ),
        (["llama3_1b", "--cluster.gpu", "TPU"], "TPU"),
        (["no_such_config"], "no_such_config"),
        (["demo", "--run.task", "finetune"], "plan counts the training of a transform"),
    ],
)
def test_bad_input(words, told):
    with pytest.raises(UserError) as caught:
        main(words)
    assert told in str(caught.value)

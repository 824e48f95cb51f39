"""The loss adapter: which terms with which weights, over which tokens, and sums that do not depend on the split.

Shape suffixes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from sgt_titan.config.resolve import resolve
from sgt_titan.config.schema import PRESETS, TERMS, Config, Objective, Rate, Term
from sgt_titan.data.batch import Counts
from sgt_titan.objectives.distillation import attach, distil
from sgt_titan.objectives.rate import broad_rate
from sgt_titan.titan.loss import REPORTED, SGTLoss, weight_at
from sgt_titan.titan.model import Streams
from sgt_titan.titan.pairs import PairGroups
from sgt_titan.transform.gaussian import Bounds

B, T, D, V = 4, 10, 6, 9
MEDIAN, SCALE, TAU = 0.7, 0.2, 0.3
BOUNDS = Bounds(std_min=2.0, std_max=8.0, std_init=4.0, mean_bound=0.0, scale=SCALE)  # sigma from 0.4 to 1.6


def test_a_ramp_is_a_straight_line_between_its_exact_ends():
    values = [weight_at(step, Term(weight=0.7, start=0.1, ramp_steps=4)) for step in range(-1, 7)]
    assert values[:2] == [0.1, 0.1] and values[5:] == [0.7, 0.7, 0.7]
    assert values[2:5] == pytest.approx([0.25, 0.4, 0.55])
    assert weight_at(1, Term(weight=0.0, start=1.0, ramp_steps=2)) == 0.5
    assert [weight_at(step, Term(weight=0.3, start=99.0)) for step in (0, 1, 10**6)] == [0.3] * 3


def objective(preset: str) -> Objective:
    """Of a resolved config, as training gets it."""
    config = Config()
    config.objective.preset = preset
    return resolve(config, world_size=1).objective


def only(**weights: float) -> Objective:
    terms = {name: Term(weight=weights.get(name, 0.0)) for name in TERMS if name != "rate"}
    return Objective(preset="none", rate=Rate(weight=weights.get("rate", 0.0), tau=TAU / SCALE), **terms)


@pytest.fixture
def data():
    """Float64 streams with a graph, and ragged masks."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(B, T, D)
    mean, log_std, student = normal(B, T, D), normal(B, T, D) * 0.3, normal(B, T, V) * 2
    noise, teacher = normal(B, T, D), normal(B, T, V) * 2
    leaves = [tensor.requires_grad_() for tensor in (mean, log_std, student)]
    streams = Data(x, mean, log_std, x + mean + log_std.exp() * noise, teacher, student)
    lengths = torch.tensor([10, 7, 8, 5])
    valid = torch.arange(T) < lengths[:, None]
    obfuscated = valid & (torch.arange(T) >= 1) & (torch.arange(T) < lengths[:, None] - 2)
    utility = valid & (torch.arange(T) < lengths[:, None] - 1)
    return streams, obfuscated, utility, leaves


class Data(NamedTuple):
    """Float64 tensors with a graph. The student's and the teacher's logits are hidden states under lm_head = 1."""

    x_BTD: torch.Tensor
    mean_BTD: torch.Tensor
    log_std_BTD: torch.Tensor
    x_tilde_BTD: torch.Tensor
    teacher_BTV: torch.Tensor
    student_BTV: torch.Tensor
    cleaned: float = 0.0  # what a denoiser adds to z before it is sent

    def streams(self, rows, obfuscated, utility, pairs, chunk=0) -> Streams:
        """What a forward pass would hand over for some rows."""
        student_NV, teacher_NV = self.student_BTV[rows][utility[rows]], self.teacher_BTV[rows][utility[rows]]
        eye = torch.eye(V, dtype=torch.float64)
        soft = attach(distil(student_NV, teacher_NV, eye, chunk=chunk, want_gradient=True), student_NV)
        x_BTD, mean_BTD, log_std_BTD, z_BTD = (tensor[rows] for tensor in self[:4])
        x_tilde_BTD = z_BTD + self.cleaned if self.cleaned else z_BTD
        return with_pairs(Streams(x_BTD, mean_BTD, log_std_BTD, z_BTD, x_tilde_BTD, soft, []), obfuscated[rows], pairs)


def with_pairs(streams: Streams, obfuscated: torch.Tensor, pairs: PairGroups) -> Streams:
    """With the exchanges that a forward pass would have begun."""
    exchanges = pairs.start(obfuscated.to(torch.uint8), streams.x_BTD + streams.mean_BTD, streams.log_std_BTD)
    return streams._replace(pairs=exchanges)


def run(options, data, rows=slice(None), *, step=1, group=2, counts=None, utility=None, chunk=0, private=None):
    streams, obfuscated, utility_BT, _ = data
    utility_BT = utility_BT if utility is None else utility
    pairs = PairGroups(group)
    streams = streams.streams(rows, obfuscated, utility_BT, pairs, chunk)
    counts = counts or Counts(int(utility_BT.sum()), int(obfuscated.sum()), B, utility_BT.numel())
    return SGTLoss(SGTLoss.Config(objective=options))(
        streams,
        None,
        step=step,
        obfuscate_BT=obfuscated[rows],
        counts=counts,
        median_norm=MEDIAN,
        bounds=BOUNDS,
        pairs=pairs,
        part=slice(0, T),
        tp_size=1,
        private_BT=private,
    )


def brute_force(data, group=2) -> dict[str, float]:
    """Every term by loops over rows, positions and pairs."""
    streams, obfuscated, utility, _ = data
    x, mean, log_std, noisy, teacher, student = (t.detach() for t in streams[:6])
    x_tilde = noisy + streams.cleaned
    total = dict.fromkeys(("utility", "entropy", *TERMS), 0.0)
    for b in range(B):
        for t in range(T):
            if utility[b, t]:
                p = teacher[b, t].softmax(-1)
                total["utility"] -= (p * student[b, t].log_softmax(-1)).sum().item()
                total["entropy"] -= (p * p.log()).sum().item()
            if obfuscated[b, t]:
                cos = F.cosine_similarity(x[b, t], x_tilde[b, t], dim=0).item()
                total["abs_cos"] += abs(cos)
                total["cos_sim"] += cos
                total["norm"] += abs((x[b, t] + mean[b, t]).norm().item() - MEDIAN)
                total["comp_entr"] -= log_std[b, t].mean().item()
                shift, ratio = (x[b, t] + mean[b, t]) / TAU, log_std[b, t].exp() / TAU
                total["rate"] += (0.5 * (shift**2 + ratio**2 - 1) - ratio.log()).sum().item()
    for name in ("utility", "entropy"):
        total[name] /= int(utility.sum())
    for name in ("abs_cos", "cos_sim", "norm", "comp_entr", "rate"):
        total[name] /= int(obfuscated.sum())
    for b in range(B):
        start = b // group * group
        partners = [y for y in range(start, start + group) if y != b]
        for y in partners:
            common = obfuscated[b] & obfuscated[y]
            z = (noisy[b] - x[y] - mean[y]) / log_std[y].exp()
            value = (0.5 * z**2 + log_std[y] - log_std[b])[common].mean().item()
            total["mi"] += value / len(partners) / B
    return total


@pytest.mark.parametrize("group", [2, 4])
def test_every_term_by_brute_force(data, group):
    data = (data[0]._replace(cleaned=0.3), *data[1:])
    weights = {"mi": 0.3, "abs_cos": 0.5, "norm": 0.7, "comp_entr": 1.1, "cos_sim": 1.3, "rate": 0.2}
    loss, reported = run(only(**weights), data, group=group)
    expected = brute_force(data, group)
    total = expected["utility"] + sum(weight * expected[name] for name, weight in weights.items())
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert reported["loss"].item() == pytest.approx(total, rel=1e-6)
    assert tuple(reported) == REPORTED
    tokens, rows = int(data[1].sum()), B
    assert reported["rate_prompt"].item() == pytest.approx(expected["rate"] * tokens / rows, rel=1e-6)
    assert reported["rate_exchange"].item() == pytest.approx(0.2 * int(data[2].sum()) / tokens, rel=1e-6)
    for name in ("utility", "abs_cos", "cos_sim", "norm", "comp_entr", "rate"):
        assert reported[name].item() == pytest.approx(expected[name], rel=1e-6), name
    # reported in nats by Algorithm 1, which is half a nat below Eq. 8
    assert reported["mi"].item() == pytest.approx(expected["mi"] - 0.5, rel=1e-6)
    assert reported["kl"].item() == pytest.approx(expected["utility"] - expected["entropy"], rel=1e-6)
    streams, obfuscated, utility, _ = data
    agree = (streams.student_BTV.argmax(-1) == streams.teacher_BTV.argmax(-1))[utility].double().mean()
    assert reported["agreement"].item() == pytest.approx(agree.item(), rel=1e-6)
    assert reported["std"].item() == pytest.approx(
        streams.log_std_BTD.exp()[obfuscated].mean().item() / SCALE, rel=1e-6
    )
    spread = streams.log_std_BTD[obfuscated].std(-1).mean().item()
    assert reported["std_spread"].item() == pytest.approx(spread, rel=1e-6)
    # within 1% (of the range, in logarithms) of 0.4 or 1.6, or past them
    margin = 4.0**0.01
    sigma = streams.log_std_BTD.exp()[obfuscated]
    saturated = ((sigma < 0.4 * margin) | (sigma > 1.6 / margin)).double().mean().item()
    assert 0.01 < saturated < 0.5
    assert reported["std_saturated"].item() == pytest.approx(saturated, rel=1e-5)
    norm = streams.mean_BTD.norm(dim=-1)[obfuscated].mean().item() / MEDIAN
    assert reported["mean_norm"].item() == pytest.approx(norm, rel=1e-6)
    assert not any(value.requires_grad for value in reported.values())


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_of_the_vocabulary_loss_change_nothing(data, chunk):
    options = objective("mi_abs_cos_norm")
    (whole, reported), (chunked, of_chunks) = run(options, data), run(options, data, chunk=chunk)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)
    for name in REPORTED:
        torch.testing.assert_close(of_chunks[name], reported[name], rtol=1e-6, atol=0)
    expected = torch.autograd.grad(whole, data[3], retain_graph=True)
    for a, b in zip(torch.autograd.grad(chunked, data[3]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_microbatches_add_up_to_the_batch(data):
    """Losses, reported terms and gradients; groups of two rows stay in one microbatch."""
    options = objective("mi_abs_cos_norm")
    leaves = data[3]
    counts = Counts(int(data[2].sum()), int(data[1].sum()), B, data[1].numel())
    whole, reported = run(options, data)
    gradients = torch.autograd.grad(whole, leaves, retain_graph=True)
    parts = [run(options, data, slice(start, start + 2), counts=counts) for start in (0, 2)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole, rtol=1e-9, atol=0)
    for name in REPORTED:
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], reported[name], rtol=1e-6, atol=1e-9)
    summed = torch.autograd.grad(parts[0][0] + parts[1][0], leaves)
    for a, b in zip(summed, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_rows_of_table_1_and_the_rate_s(preset):
    wanted = {
        "comp_entr": {"comp_entr"},
        "cos_sim": {"cos_sim"},
        "abs_cos": {"abs_cos"},
        "mi": {"mi"},
        "mi_abs_cos": {"mi", "abs_cos"},
        "mi_abs_cos_norm": {"mi", "abs_cos", "norm"},
        "rate": {"rate"},
        "rate_abs_cos": {"rate", "abs_cos"},
        "rate_abs_cos_norm": {"rate", "abs_cos", "norm"},
    }
    weights = SGTLoss(SGTLoss.Config(objective=objective(preset))).weights(0)
    assert {name for name, weight in weights.items() if weight} == wanted[preset]
    assert weights == {name: PRESETS[preset].get(name, 0.0) for name in TERMS}
    assert set(PRESETS) == set(wanted)


def test_terms_without_weight_have_no_gradient_but_are_reported(data):
    loss, reported = run(only(), data)
    utility_only = torch.autograd.grad(loss, data[3], allow_unused=True)
    assert utility_only[0] is None and utility_only[1] is None and utility_only[2].any()
    assert all(reported[name] != 0 for name in TERMS)
    assert loss.item() == pytest.approx(reported["utility"].item())


def test_without_pairs_the_mi_term_is_not_measured(data):
    loss, reported = run(only(abs_cos=1.0), data, group=1)
    expected, others = run(only(abs_cos=1.0), data, group=2)
    assert loss == expected and reported["mi"].isnan()
    assert [name for name in REPORTED if reported[name] != others[name]] == ["mi"]


def test_ramp_follows_the_step(data):
    """Step 1 is the first: nothing has been learned, so the ramp is at its start."""
    options = only()
    options.abs_cos = Term(weight=2.0, start=1.0, ramp_steps=4)
    loss = SGTLoss(SGTLoss.Config(objective=options))
    assert [loss.weights(step)["abs_cos"] for step in (0, 1, 2, 4, 9)] == [1.0, 1.25, 1.5, 2.0, 2.0]
    for step, weight in ((1, 1.0), (3, 1.5), (5, 2.0), (50, 2.0)):
        value, reported = run(options, data, step=step)
        expected = reported["utility"] + weight * reported["abs_cos"]
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_kl_is_ce_minus_the_teachers_entropy_with_the_same_gradient(data):
    ce, kl = only(), only()
    kl.utility = "kl"
    (a, reported_a), (b, reported_b) = run(ce, data), run(kl, data)
    p = data[0].teacher_BTV.softmax(-1)
    entropy = -(p * p.log()).sum(-1)[data[2]].mean()
    assert (a - b).item() == pytest.approx(entropy.item(), rel=1e-6)
    assert b > 0 and reported_b["utility"].item() == pytest.approx(reported_a["kl"].item(), rel=1e-6)
    student = data[3][2]
    first = torch.autograd.grad(a, student, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(b, student)[0])


def test_only_chosen_positions_have_utility(data):
    """Response positions only: other logits may be anything, and get no gradient."""
    streams, obfuscated, utility, leaves = data
    response = utility & (torch.arange(T) >= 3)
    before, _ = run(only(), data, utility=response)
    gradient = torch.autograd.grad(before, leaves[2])[0]
    assert gradient[response].any(-1).all() and not gradient[~response].any()
    other = streams.student_BTV.detach().clone()
    other[~response] = 50 * torch.randn(int((~response).sum()), V, dtype=torch.float64)
    changed = streams._replace(student_BTV=other)
    after, _ = run(only(), (changed, obfuscated, utility, leaves), utility=response)
    assert after.item() == before.item()


def test_positions_that_are_not_obfuscated_do_not_count(data):
    streams, obfuscated, utility, leaves = data
    options = only(mi=1.0, abs_cos=1.0, norm=1.0, comp_entr=1.0)
    before, _ = run(options, data)
    gradients = torch.autograd.grad(before, leaves[:2])
    assert all(not g[~obfuscated].any() and g[obfuscated].any(-1).all() for g in gradients)
    poisoned = {
        name: torch.where(obfuscated[..., None], getattr(streams, name), 1e3).detach()
        for name in ("mean_BTD", "log_std_BTD", "x_tilde_BTD")
    }
    after, _ = run(options, (streams._replace(**poisoned), obfuscated, utility, leaves))
    assert after.item() == pytest.approx(before.item(), rel=1e-9)


def test_a_microbatch_without_anything_to_score_is_zero_and_finite(data):
    streams, obfuscated, utility, leaves = data
    empty = (streams, torch.zeros_like(obfuscated), torch.zeros_like(utility), leaves)
    loss, reported = run(objective("mi_abs_cos_norm"), empty, counts=Counts(0, 0, B, 0))
    assert loss.item() == 0 and all(value == 0 for value in reported.values())
    assert all(g is None or not g.any() for g in torch.autograd.grad(loss, leaves, allow_unused=True))


def test_private_tokens_cost_more_and_tell_the_same(data):
    streams, obfuscated, _, _ = data
    private = obfuscated & (torch.arange(T) % 3 == 0)
    dear = only(rate=0.2)
    dear.rate.private = 5.0
    (plain, before), (loss, after) = run(only(rate=0.2), data), run(dear, data, private=private)
    assert after["rate"] == before["rate"]
    bounds = streams.x_BTD + streams.mean_BTD, streams.log_std_BTD
    share = (broad_rate(*bounds, TAU) * private).sum().item() / int(obfuscated.sum())
    assert (loss - plain).item() == pytest.approx(0.2 * 4 * share, rel=1e-6)
    assert run(dear, data)[0].item() == pytest.approx(plain.item(), rel=1e-12)  # nothing is marked


def test_sequence_slices_add_up(data):
    """Sequence-parallel ranks: their obfuscation terms are summed over the slices, pairs counted over the whole row."""
    streams, obfuscated, utility, _ = data
    counts = Counts(int(utility.sum()), int(obfuscated.sum()), B, utility.numel())
    loss = SGTLoss(SGTLoss.Config(objective=only(mi=1.0)))
    pairs = PairGroups(4)
    streams = streams.streams(slice(None), obfuscated, utility, pairs)
    whole, _ = loss._mi(streams, obfuscated, obfuscated, slice(0, T), pairs)
    parts = []
    for part in (slice(0, 6), slice(6, T)):
        mine = with_pairs(Streams(*(t[:, part] for t in streams[:5]), *streams[5:]), obfuscated, pairs)
        parts.append(loss._mi(mine, obfuscated, obfuscated[:, part], part, pairs)[0])
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-9, atol=0)
    assert counts.rows == B

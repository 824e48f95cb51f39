"""Surrogates in front of a mechanism: other tokens, as many, and an answer measured after its values are back."""

from pathlib import Path

import pytest
import torch

from sgt_titan.config.resolve import resolve
from sgt_titan.data.cache import prepare
from sgt_titan.data.tokenization import load_tokenizer
from sgt_titan.demo import TRUNK
from sgt_titan.evaluation.scores import utility
from sgt_titan.evaluation.world.mechanisms import constant_noise, nothing
from sgt_titan.evaluation.world.samples import load_trunk, padded, read_samples
from sgt_titan.evaluation.world.surrogates import Substitution, surrogates
from sgt_titan.private import Private

OWN = Path(TRUNK).parent / "private.yaml"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting(demo_config):
    config = resolve(demo_config, world_size=None)
    tokenizer = load_tokenizer(str(TRUNK))
    rows = read_samples(prepare(config, str(TRUNK)).validation, config, 12, tokenizer=tokenizer)
    trunk = load_trunk(TRUNK, CPU)
    return tokenizer, rows, trunk, trunk.get_input_embeddings().weight.detach()


def substitution(setting, finders="patterns,names", **kwargs):
    return Substitution(setting[0], Private.of(finders, key=b"k" * 32, own=OWN), **kwargs)


def test_values_are_replaced_and_the_rest_is_not(setting):
    tokenizer, rows, _, _ = setting
    batch, told = padded(rows, 0, CPU), substitution(setting, "", told=rows)
    new = told(batch)
    changed_BT = batch.tokens_BT != new.tokens_BT
    assert torch.equal(new.valid_BT, batch.valid_BT) and torch.equal(new.target_BT, batch.target_BT)
    assert not (changed_BT & batch.obfuscate_BT & ~batch.marked_BT & ~batch.target_BT).any()
    assert changed_BT[batch.marked_BT].float().mean() > 0.6, "separators and a point in common stay"
    for row, new_T in zip(rows, new.tokens_BT, strict=True):
        sent = tokenizer.decode(new_T[: len(row.ids)])
        assert not any(span.text in sent for span in row.spans if len(span.text) > 4)
    assert (changed_BT & batch.target_BT).any(), "the response has the same surrogates"
    assert torch.equal(told(batch).tokens_BT, new.tokens_BT)
    assert told.unfit < told.replaced / 5


def test_a_row_that_marks_nothing_takes_no_marks_from_another_of_the_same_prompt(setting):
    row = setting[1][0]
    same = row._replace(spans=())
    both = substitution(setting, "", told=[row, same])
    alone = substitution(setting, "", told=[row])
    length = len(row.prompt().ids)
    assert (both.row(row.ids, length) == alone.row(row.ids, length)).all()
    assert (alone.row(row.ids, length) != row.ids).any()


def test_an_answer_gets_its_values_back(setting):
    tokenizer, rows, _, _ = setting
    found = substitution(setting)
    row = rows[0]
    sent = found.row(row.ids, len(row.prompt().ids))
    answer = sent[len(row.prompt().ids) :]
    true = tokenizer.decode(row.ids[len(row.prompt().ids) :], skip_special_tokens=True)
    assert tokenizer.decode(answer, skip_special_tokens=True) != true
    back = tokenizer.decode(found.restored(row.prompt(), answer.tolist()), skip_special_tokens=True)
    assert back.split() == true.split()


def test_utility_is_measured_after_restoring(setting):
    """A trunk that copies does as well with surrogates; without putting back it seems not to."""
    _, rows, trunk, table_VD = setting
    batches = [padded(rows, 0, CPU)]
    mechanism = surrogates(substitution(setting), table_VD, nothing(), "surrogates", "surrogates")
    back = utility.measured(trunk, batches, mechanism, torch.Generator())
    object.__setattr__(mechanism, "restore", None)
    raw = utility.measured(trunk, batches, mechanism, torch.Generator())
    clean = utility.measured(trunk, batches, nothing(), torch.Generator())
    assert clean.nll_N.mean() < back.nll_N.mean() < raw.nll_N.mean() - 0.5
    assert back.agree_N.mean() > 0.9


def test_placeholders_have_their_own_length_and_come_back(setting):
    tokenizer, rows, trunk, table_VD = setting
    labelled = substitution(setting, labels=True)
    row = rows[0]
    written = labelled.written(row)
    sent = tokenizer.decode(written.row.ids)
    assert "[NAME_1]" in sent and len(written.row.ids) > len(row.ids)
    assert len(written.first_N) == row.target.sum() and written.row.target.sum() > row.target.sum()
    plain = [(first, token) for first, token in zip(written.first_N, row.ids[row.target], strict=True) if first >= 0]
    same = [written.row.ids[first] == token for first, token in plain]
    assert sum(same) > 0.5 * len(same) and not all(same), "the first token of a value is a placeholder's"
    answer = written.row.ids[written.row.target].tolist()
    back = tokenizer.decode(labelled.restored(row.prompt(), answer), skip_special_tokens=True)
    assert "[" not in back and any(span.text in back for span in row.spans)
    # Of rows where nothing is found, the utility is that of the clean ones; of others it is not.
    nobody = Substitution(tokenizer, Private.of("", key=b"k" * 32), labels=True)
    batches = [padded(rows, 0, CPU)]
    clean = utility.measured(trunk, batches, nothing(), torch.Generator())
    for found, equal in ((nobody, True), (labelled, False)):
        mechanism = surrogates(found, table_VD, nothing(), "p", "p")
        values = utility.measured(trunk, batches, mechanism, torch.Generator())
        assert torch.allclose(values.nll_N, clean.nll_N, atol=1e-3) == equal and values.nll_N.isfinite().all()


def test_scaling_one_probability_leaves_a_distribution():
    logp = torch.tensor([0.7, 0.2, 0.1]).log()
    out = utility.scaled(logp, 0, torch.tensor(0.5).log()).exp()
    assert torch.allclose(out, torch.tensor([0.35, 0.2 * 0.65 / 0.3, 0.1 * 0.65 / 0.3]), atol=1e-5)


def test_exchanging_is_its_own_inverse_and_keeps_the_rest():
    logits = torch.randn(3, 7)
    true, seen = torch.tensor([1, 2, 3]), torch.tensor([4, 2, 0])
    out = utility.exchanged(logits, true, seen)
    assert torch.equal(utility.exchanged(out, true, seen), logits) and torch.equal(out[1], logits[1])
    assert out[0, 1] == logits[0, 4] and out[0, 4] == logits[0, 1]


def test_in_front_of_noise_and_as_redaction(setting):
    _, rows, _, table_VD = setting
    batch = padded(rows[:3], 0, CPU)
    x_BTD = table_VD[batch.tokens_BT]
    noisy = surrogates(substitution(setting), table_VD, constant_noise(0.1), "s", "s")
    sent = noisy.obfuscate(batch, x_BTD, torch.Generator().manual_seed(0))
    assert noisy.std == 0.1 and sent.log_std_BTD is not None
    assert torch.equal(sent.center_BTD, table_VD[noisy.rewrite(batch).tokens_BT])
    hidden = surrogates(substitution(setting, placeholder=5), table_VD, nothing(), "p", "p")
    assert hidden.restore is None and int((hidden.rewrite(batch).tokens_BT == 5).sum()) > 10

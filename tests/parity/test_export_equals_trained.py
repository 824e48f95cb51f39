"""One process through the real path: trainer, checkpoint, export. What a client loads is what was trained.

Shape suffixes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from sgt_titan.export import export_checkpoint
from sgt_titan.titan import run_directory
from sgt_titan.titan.dataloader import microbatch_inputs
from sgt_titan.titan.load_trunk import named_weights
from sgt_titan.titan.tasks import to_trainer_config
from sgt_titan.transform import load_export

TOLERANCE = 1e-5
BODIES = [
    ("llama", "shared"),
    ("llama-llama3-rope", "separate"),
    ("qwen2", "shared"),
    ("qwen2", "separate"),
    ("smollm3", "separate"),
    ("qwen3-moe", "shared"),
    ("qwen3-tied", "shared"),
    ("qwen3", "separate"),
    ("deepseek", "shared"),
    ("deepseek-yarn", "separate"),
]


@torch.no_grad()
def randomise(estimator) -> None:
    """Weights as after a long training: heads and biases away from zero, norms from one, mean and std far apart."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in named_weights(estimator).items():
        if name == "prior.log_frequency":
            continue  # counted, not learned
        noise = torch.randn(tensor.shape, generator=generator)
        local = getattr(tensor, "_local_tensor", tensor)  # buffers are plain
        if name.endswith("norm.weight"):
            local.copy_(1 + 0.3 * noise)
        elif tensor.dim() == 1:
            local.copy_(0.2 * noise)
        else:
            local.copy_(noise / tensor.shape[-1] ** 0.5)


def streams(trainer):
    """Both streams of the first rows of the run, and their batch."""
    batch = microbatch_inputs(trainer.prepared.train_source, 0, [0, 1])
    with torch.no_grad():
        trainer.step = 1
        result, _, _ = trainer.evaluate_streams(batch["input"], batch)
    return result, batch


@pytest.mark.parametrize(("trunk", "body"), BODIES)
def test_export(trunk, body, make_run, one_process, tmp_path):
    bound = "--estimator.mean_bound=3" if body == "separate" else "--estimator.mean_bound=0"
    config = make_run(f"--estimator.body={body}", bound, "--estimator.layers=2", trunk=trunk)
    trainer = to_trainer_config(config).build()
    randomise(trainer.model_parts[0].estimator)
    trained, batch = streams(trainer)
    run_directory.claim(trainer.prepared)
    assert trainer.checkpointer.save(3, last_step=True)
    trainer.close()

    transform = load_export(export_checkpoint(config.run.output_dir, tmp_path / "export"))
    assert len(transform.bodies) == (2 if body == "separate" else 1)
    differences = {"mean": 0.0, "std": 0.0}
    for row, documents in enumerate(batch["documents"]):
        length = documents[0].length
        with torch.no_grad():
            out = transform(input_ids=batch["input"][row : row + 1, :length])
        mean_TD, std_TD = trained.mean_BTD[row, :length], trained.log_std_BTD[row, :length].exp()
        assert mean_TD.std() > 0.1 and std_TD.std() > 0.1, "nothing to compare"
        differences["mean"] = max(differences["mean"], (out.mean_BTD[0] - mean_TD).abs().max().item())
        differences["std"] = max(differences["std"], (out.log_std_BTD[0].exp() - std_TD).abs().max().item())
    print(f"{trunk}, {body}: max |difference| {differences}")
    assert max(differences.values()) < TOLERANCE


@pytest.mark.parametrize(
    ("trunk", "prior"), [("llama", "broad"), ("qwen2", "tokens"), ("qwen3-tied", "context"), ("deepseek", "context")]
)
def test_denoiser_and_rate(trunk, prior, make_run, one_process, tmp_path):
    """With training's noise: what is sent, and what it tells, is what training saw."""
    options = ["--denoiser.layers=2", "--objective.preset=rate", f"--objective.rate.prior={prior}"]
    options += ["--estimator.gate=true"] if trunk == "llama" else []
    config = make_run(*options, "--objective.rate.tau=1.5", "--objective.rate.context_rank=4", trunk=trunk)
    trainer = to_trainer_config(config).build()
    randomise(trainer.model_parts[0].estimator)
    trained, batch = streams(trainer)
    part, counts = slice(0, batch["input"].shape[1]), batch["counts"]
    per_token = trainer.evaluate_streams(batch["input"], batch)[2]["rate"].item()
    run_directory.claim(trainer.prepared)
    assert trainer.checkpointer.save(3, last_step=True)
    trainer.close()

    transform = load_export(export_checkpoint(config.run.output_dir, tmp_path / "export"))
    assert transform.config.format_version == (3 if trunk == "llama" else 2)
    noise_BTD = (trained.z_BTD - trained.x_BTD - trained.mean_BTD) / trained.log_std_BTD.exp()
    noise_BTD = noise_BTD.masked_fill(~batch["obfuscate_BT"][..., None], 0.0)
    total = 0.0
    for row, documents in enumerate(batch["documents"]):
        part = (slice(row, row + 1), slice(0, documents[0].length))
        ids, mask = batch["input"][part], batch["obfuscate_BT"][part]
        found = transform.release(ids, mask, noise_BTD=noise_BTD[part])
        assert (found.z_BTD - trained.z_BTD[part]).abs().max() < TOLERANCE
        assert (found.sent_BTD - trained.x_tilde_BTD[part]).abs().max() < 2 * TOLERANCE
        assert (found.sent_BTD - found.z_BTD)[mask].abs().mean() > 1e-3, "a denoiser that does nothing proves nothing"
        if prior == "context":
            continue  # reads z, of which `rate` draws its own
        total += transform.rate(ids, mask).sum().item()
        assert transform.rate(ids, mask)[~mask].abs().max() == 0
    if prior != "context":
        assert total / counts.obfuscated_tokens == pytest.approx(per_token, rel=1e-4)


def logits(trainer):
    """The logits of both streams (teacher's, student's) on the first rows of the run; the streams; their batch."""
    trunk, hidden = trainer.model_parts[0].trunk, []
    handle = trunk.norm.register_forward_hook(lambda module, inputs, outputs: hidden.extend(outputs))
    both, batch = streams(trainer)
    handle.remove()
    weight_VD = trunk.lm_head.weight
    return *(h_BTD @ weight_VD.T for h_BTD in hidden), both, batch


@pytest.mark.parametrize("trunk", ["llama-tied", "qwen2", "deepseek-dense-yarn"])
def test_teacher_is_the_trunk_and_the_identity_changes_nothing(trunk, make_run, one_process):
    """Zero heads and a std at the bottom of its range: both streams give the bare trunk's logits."""
    tiny = ("--estimator.std_init=1e-8", "--estimator.std_min=1e-9")
    config = make_run(*tiny, trunk=trunk)
    trainer = to_trainer_config(config).build()
    model = AutoModelForCausalLM.from_pretrained(config.trunk.path, dtype=torch.float32).eval()
    teacher_BTV, student_BTV, both, batch = logits(trainer)
    trainer.close()
    assert batch["obfuscate_BT"].any(-1).all()
    assert (both.x_tilde_BTD - both.x_BTD).abs().max() < 1e-6
    for row, documents in enumerate(batch["documents"]):
        length = documents[0].length
        with torch.no_grad():
            bare_TV = model(batch["input"][row : row + 1, :length]).logits[0]
        assert bare_TV.std() > 0.5
        assert (teacher_BTV[row, :length] - bare_TV).abs().max() < 2e-5
        assert (student_BTV[row, :length] - bare_TV).abs().max() < 2e-5


def test_student_is_the_trunk_on_obfuscated_embeddings(make_run, one_process):
    """x~ as transformers' ``inputs_embeds`` gives the student's logits: what a server will compute."""
    trainer = to_trainer_config(make_run("--estimator.std_init=1.0", trunk="qwen3")).build()
    randomise(trainer.model_parts[0].estimator)
    path = trainer.prepared.files.path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    teacher_BTV, student_BTV, both, batch = logits(trainer)
    trainer.close()
    length = min(documents[0].length for documents in batch["documents"])
    with torch.no_grad():
        served_BTV = model(inputs_embeds=both.x_tilde_BTD[:, :length]).logits
    teacher_BTV, student_BTV = teacher_BTV[:, :length], student_BTV[:, :length]
    assert (student_BTV - teacher_BTV).abs().max() > 0.1
    assert (student_BTV - served_BTV).abs().max() < 2e-5
    clean_BT = ~batch["obfuscate_BT"]
    assert torch.equal(both.x_tilde_BTD[clean_BT], both.x_BTD[clean_BT])

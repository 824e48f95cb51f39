"""What CONTRIBUTING says of a trunk family, done to a copy of the package: one row, and everything knows it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sgt_titan
from sgt_titan.trunk.families import FAMILIES
from tests import chat_templates
from tests.conftest import write_tokenizer

KIND = "seed_oss"  # transformers has it, the registry does not
ROW = f'''    "{KIND}": Family(
        qkv_bias=True,
        defaults={{"num_key_value_heads": 8, "head_dim": 128}},
        refused={{"attention_out_bias": True, "mlp_bias": True}},
    ),
'''
# In the copy: the decoder beside transformers', dry run, plan, a step and its export through the command, a client.
SCRIPT = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from sgt_titan import cli
from sgt_titan.client import StainedGlassTransform
from sgt_titan.titan.load_trunk import load_trunk
from sgt_titan.titan.trunks import build, family_of
from sgt_titan.transform.trunk_files import TrunkFiles

hf = AutoConfig.from_pretrained("trunk")
trunk = build(hf, "sdpa").build()
trunk.init_states()
load_trunk(trunk, family_of(hf), TrunkFiles("trunk"))
tokens = torch.arange(40)[None]
with torch.no_grad():
    h = trunk.tok_embeddings(tokens)
    for layer in trunk.layers.values():
        h = layer(h, None, tokens)
    ours = trunk.lm_head(trunk.norm(h))
    theirs = AutoModelForCausalLM.from_pretrained("trunk", dtype=torch.float32)(tokens).logits
assert theirs.std() > 0.05 and (ours - theirs).abs().max() < 2e-5 * max(1, theirs.std()), "another model"
for words in (["train", "toy.yaml", "--dry-run"], ["plan", "toy.yaml"], ["train", "toy.yaml", "--nproc", "1"]):
    assert cli.main(words) == 0, words
sgt = StainedGlassTransform.from_pretrained("out/export")
assert sgt.config.trunk_config["model_type"] == hf.model_type and sgt.encode("hi there").isfinite().all()
"""


@pytest.fixture
def trunk(tmp_path) -> Path:
    config = AutoConfig.for_model(
        KIND, vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(std=0.3)
    model.save_pretrained(tmp_path / "trunk")
    write_tokenizer(tmp_path / "trunk")
    # One that torchtitan's own compiler of templates does not know: nothing of a run may ask it.
    (tmp_path / "trunk" / "chat_template.jinja").write_text(chat_templates.GENERATION)
    return tmp_path / "trunk"


def test_one_row_is_enough(trunk, tmp_path):
    assert KIND not in FAMILIES, "take another for this test"
    package = Path(sgt_titan.__file__).parent
    copy = shutil.copytree(package, tmp_path / "tree" / "sgt_titan", ignore=shutil.ignore_patterns("__pycache__"))
    registry = copy / "trunk" / "families.py"
    text = registry.read_text()
    assert text.count('    "gpt2": Family(') == 1
    registry.write_text(text.replace('    "gpt2": Family(', ROW + '    "gpt2": Family('))
    rows = [{"instruction": f"say {i}", "output": f"it is {i * i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "trunk": {"path": str(trunk)},
        "run": {"name": "toy", "output_dir": str(tmp_path / "out")},
        "data": {"source": str(tmp_path / "rows.jsonl"), "template": "chat"},
        "training": {"steps": 1, "seq_len": 128, "local_batch_size": 2, "global_batch_size": 2},
        "estimator": {"layers": 1},
        "lr_scheduler": {"warmup_steps": 0},
        "metrics": {"tensorboard": False, "log_every": 1, "probe_every": 0},
    }
    (tmp_path / "toy.yaml").write_text(json.dumps(options))
    (tmp_path / "try.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(copy.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "try.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

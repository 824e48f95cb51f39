"""A small run on the first layers of the shipped trunk, common to the tests that start processes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

import sgt_titan

# 5 held-out rows, 6 in whole pair groups, are probed, which the 4 rows of a microbatch do not divide. Every term has a
# weight, one of them with a ramp, so that each of their gradients counts.
CONFIG = {
    "run": {"name": "small"},
    "estimator": {"layers": 1, "std_init": 0.5, "gate": True},
    "denoiser": {"layers": 1},
    "objective": {
        "mi_group": 2,
        "mi": {"weight": 0.1, "start": 0.02, "ramp_steps": 6},
        "abs_cos": {"weight": 1.0},
        "norm": {"weight": 0.5},
        "comp_entr": {"weight": 0.05},
        "cos_sim": {"weight": 0.2},
        "rate": {"weight": 0.02, "prior": "tokens"},
    },
    "data": {"validation_samples": 16},
    "training": {"steps": 10, "seq_len": 96, "local_batch_size": 4, "global_batch_size": 4},
    "optimizer": {"lr": 1e-3},
    "lr_scheduler": {"warmup_steps": 3},
    "metrics": {"log_every": 1, "probe_every": 10, "probe_samples": 5},
    "checkpoint": {"interval": 100, "keep_latest": 0},
    "comm": {"init_timeout_seconds": 60, "train_timeout_seconds": 60},
    "export": {"at_end": False},
}


LAYERS = 2


def make_trunk(target: Path) -> Path:
    """The first layers of the trunk that ships with the package."""
    source = Path(sgt_titan.__file__).parent / "demo" / "trunk"
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    tensors = load_file(source / "model.safetensors")
    kept = {
        name: t for name, t in tensors.items() if not (m := re.search(r"layers\.(\d+)", name)) or int(m[1]) < LAYERS
    }
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


def make_chats(file: Path) -> Path:
    """96 rows of the demo's corpus as JSONL."""
    from sgt_titan.demo.corpus import conversations

    file.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in conversations(96, seed=7)))
    return file


def make_config(folder: Path, trunk: Path, chats: Path) -> Path:
    """``CONFIG`` with those two, as a file of ``folder``."""
    config = json.loads(json.dumps(CONFIG))
    config["trunk"] = {"path": str(trunk)}
    config["data"] |= {"source": str(chats), "cache_dir": str(folder / "cache")}
    file = folder / "small.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    return file

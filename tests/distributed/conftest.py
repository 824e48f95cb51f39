"""A small run on the shipped trunk, common to the tests of this folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import launch
import sgt_titan

# 5 held-out rows are probed, which no number of ranks divides. Every term has a weight, one of them with a ramp, so
# that each of their gradients counts.
CONFIG = {
    "run": {"name": "small"},
    "estimator": {"layers": 1, "std_init": 0.5},
    "objective": {
        "mi_group": 2,
        "mi": {"weight": 0.1, "start": 0.02, "ramp_steps": 6},
        "abs_cos": {"weight": 1.0},
        "norm": {"weight": 0.5},
        "comp_entr": {"weight": 0.05},
        "cos_sim": {"weight": 0.2},
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


@dataclass
class Finished:
    """A run that ended as it should."""

    folder: Path
    outcome: launch.Outcome

    @property
    def output_dir(self) -> Path:
        return self.folder / "out"

    @property
    def scalars(self) -> dict[int, dict[str, float]]:
        return launch.scalars(self.output_dir)


@dataclass
class Launcher:
    """Starts runs of one config, each in a directory of its own unless told otherwise."""

    config: Path
    new_folder: Callable[[], Path]

    def words(self, folder: Path, *overrides: str) -> list[str]:
        return [str(self.config), "--run.output_dir", str(folder / "out"), *overrides]

    def run(
        self, ranks: int, *overrides: str, folder: Path | None = None, hooks: tuple[launch.Hook, ...] = ()
    ) -> tuple[Path, launch.Outcome]:
        folder = folder or self.new_folder()
        hooks = (launch.no_nap, *hooks)
        return folder, launch.run(ranks, self.words(folder, *overrides), folder, hooks=hooks)

    def finish(
        self, ranks: int, *overrides: str, folder: Path | None = None, hooks: tuple[launch.Hook, ...] = ()
    ) -> Finished:
        """A run that must succeed on every rank."""
        folder, outcome = self.run(ranks, *overrides, folder=folder, hooks=hooks)
        # The beginning of what each rank printed last: a crash in C++ says why before it lists stacks and modules.
        assert outcome.codes == [0] * ranks, "\n".join(f"rank {i}: {e[:3000]}" for i, e in enumerate(outcome.errors))
        return Finished(folder, outcome)


@pytest.fixture(scope="session")
def demo_trunk(tmp_path_factory) -> Path:
    """The first layers of the trunk that ships with the package."""
    source, target = Path(sgt_titan.__file__).parent / "demo" / "trunk", tmp_path_factory.mktemp("trunk") / "trunk"
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    tensors = load_file(source / "model.safetensors")
    kept = {
        name: t for name, t in tensors.items() if not (m := re.search(r"layers\.(\d+)", name)) or int(m[1]) < LAYERS
    }
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """96 rows of the demo's corpus as JSONL."""
    from sgt_titan.demo.corpus import conversations

    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in conversations(96, seed=7)))
    return path


@pytest.fixture(scope="session")
def small(demo_trunk, chats, tmp_path_factory) -> Launcher:
    """The launcher of ``CONFIG``."""
    folder = tmp_path_factory.mktemp("config")
    config = json.loads(json.dumps(CONFIG))
    config["trunk"] = {"path": str(demo_trunk)}
    config["data"] |= {"source": str(chats), "cache_dir": str(folder / "cache")}
    file = folder / "small.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    return Launcher(file, lambda: tmp_path_factory.mktemp("run"))

"""A small run on the shipped trunk, common to the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import launch
import small_run


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
        self,
        ranks: int,
        *overrides: str,
        folder: Path | None = None,
        hooks: tuple[launch.Hook, ...] = (),
        timeout: float = 120.0,
    ) -> tuple[Path, launch.Outcome]:
        folder = folder or self.new_folder()
        hooks = (launch.no_nap, *hooks)
        return folder, launch.run(ranks, self.words(folder, *overrides), folder, hooks=hooks, timeout=timeout)

    def finish(
        self,
        ranks: int,
        *overrides: str,
        folder: Path | None = None,
        hooks: tuple[launch.Hook, ...] = (),
        timeout: float = 120.0,
    ) -> Finished:
        """A run that must succeed on every rank."""
        folder, outcome = self.run(ranks, *overrides, folder=folder, hooks=hooks, timeout=timeout)
        # The beginning of what each rank printed last: a crash in C++ says why before it lists stacks and modules.
        assert outcome.codes == [0] * ranks, "\n".join(f"rank {i}: {e[:3000]}" for i, e in enumerate(outcome.errors))
        return Finished(folder, outcome)


@pytest.fixture(scope="session")
def demo_trunk(tmp_path_factory) -> Path:
    return small_run.make_trunk(tmp_path_factory.mktemp("trunk") / "trunk")


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    return small_run.make_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="session")
def small(demo_trunk, chats, tmp_path_factory) -> Launcher:
    """The launcher of ``small_run.CONFIG``."""
    config = small_run.make_config(tmp_path_factory.mktemp("config"), demo_trunk, chats)
    return Launcher(config, lambda: tmp_path_factory.mktemp("run"))

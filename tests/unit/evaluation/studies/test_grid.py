"""Commands of a grid: run several at a time, told with times, gone on with, and stopped."""

from __future__ import annotations

import json
import sys
import threading
import time

import pytest

from sgt_titan.evaluation.studies import grid
from sgt_titan.evaluation.studies.grid import Chain, Pool, Step


class Process:
    """A command that ends when it is let go, with a code."""

    def __init__(self, code: int = 0, hold: threading.Event | None = None):
        self.code, self.hold, self.ended = code, hold, threading.Event()

    def wait(self) -> int:
        if self.hold:
            while not self.hold.wait(0.005) and not self.ended.is_set():
                pass
        return -15 if self.ended.is_set() else self.code

    def terminate(self) -> None:
        self.ended.set()


def chain(tmp_path, name: str, *words: str) -> Chain:
    steps = [Step((word, name), tmp_path / name / f"{word}.json") for word in words]
    return Chain(name, tuple(steps), tmp_path / name / "log.txt")


def finish(step: Step) -> None:
    step.done.parent.mkdir(parents=True, exist_ok=True)
    step.done.write_text(json.dumps({"about": {"command": grid.command(step.words)}}))


def test_chains_run_side_by_side_and_their_steps_one_after_the_other(tmp_path):
    chains, seen, both = (
        [chain(tmp_path, name, "train", "evaluate") for name in "ab"],
        [],
        threading.Barrier(2, timeout=5),
    )
    said, drawn = [], []

    def start(words, log, jobs):
        assert jobs == 2
        if words[0] == "train":
            threading.Thread(target=both.wait).start()  # broken, and an error, were the second never to begin
        seen.append(words)
        return Process()

    assert Pool(2, said.append, lambda: drawn.append(len(seen)), start).run(chains) == 0
    assert sorted(seen) == [(w, n) for w in ("evaluate", "train") for n in "ab"] and len(drawn) == 2 and not both.broken
    for name in "ab":
        assert seen.index(("train", name)) < seen.index(("evaluate", name))
        assert f"$ sgt-titan train {name}" in (tmp_path / name / "log.txt").read_text()
    assert sum("began" in text for text in said) == sum("done in" in text for text in said) == 4
    assert said[-1].startswith("[4/4] ") and any("left" in text for text in said)


def test_a_failure_ends_its_chain_and_no_other(tmp_path):
    said, ran = [], []

    def start(words, log, jobs):
        ran.append(words)
        log.write_text("reading\nsgt-titan: error: no such thing\n\n")
        return Process(2 if words == ("train", "a") else 0)

    chains = [chain(tmp_path, name, "train", "evaluate") for name in "ab"]
    assert Pool(1, said.append, start=start).run(chains) == 2
    assert ran == [("train", "a"), ("train", "b"), ("evaluate", "b")]
    failed = next(text for text in said if "FAILED" in text)
    assert "exit code 2: sgt-titan: error: no such thing" in failed and "log.txt" in failed


def test_what_is_done_is_not_done_again(tmp_path):
    done, half = chain(tmp_path, "done", "train", "evaluate"), chain(tmp_path, "half", "train", "evaluate")
    for step in (*done.steps, half.steps[0]):
        finish(step)
    ran, said = [], []
    pool = Pool(1, said.append, start=lambda words, log, jobs: ran.append(words) or Process())
    assert pool.run([done, half]) == 0 and ran == [("evaluate", "half")]
    assert said[0] == "3 of 4 commands are done already"


def test_a_result_that_is_cut_off_is_not_done(tmp_path):
    one = chain(tmp_path, "a", "evaluate")
    finish(one.steps[0])
    assert one.steps[0].is_done()
    one.steps[0].done.write_text('{"about": {"comm')
    assert not one.steps[0].is_done()


def test_an_interruption_asks_what_is_running_to_end_and_begins_nothing_more(tmp_path):
    processes, ran = [], []

    def start(words, log, jobs):
        ran.append(words)
        processes.append(Process(hold=threading.Event()))
        return processes[-1]

    pool = Pool(2, lambda text: None, lambda: pytest.fail("nothing was finished"), start)
    codes = []
    chains = [chain(tmp_path, name, "train", "evaluate") for name in "abc"]
    runner = threading.Thread(target=lambda: codes.append(pool.run(chains)))
    runner.start()
    deadline = time.monotonic() + 5
    while len(processes) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    pool.stop()
    runner.join(5)
    assert not runner.is_alive() and len(ran) == 2 and all(process.ended.is_set() for process in processes)
    assert codes[0] != 0


def test_a_real_process_writes_to_its_log(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(grid, "cores", lambda: 8)
    seen = {}
    real = grid.subprocess.Popen

    def popen(words, **options):
        seen.update(options["env"])
        return real([sys.executable, "-c", "print('here')"], **options)

    monkeypatch.setattr(grid.subprocess, "Popen", popen)
    assert Pool(2, lambda text: None).run([chain(tmp_path, "a", "configs")]) == 0
    assert (tmp_path / "a" / "log.txt").read_text().splitlines()[-1] == "here"
    assert seen["OMP_NUM_THREADS"] == "4"

"""Times of a start."""

from __future__ import annotations

import subprocess
import sys
import time

from sgt_titan.titan.timeline import Timeline


def test_phases_add_up(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("sgt_titan.titan.timeline.process_age", lambda: 2.0)
    timeline = Timeline()
    for seconds, phase in ((1, "import"), (3, "trunk"), (0.5, "trunk")):
        now[0] += seconds
        timeline.mark(phase)
    assert timeline.phases == {"import": 3.0, "trunk": 3.5}  # the first phase begins where the process did
    assert timeline.summary() == "First step done 6.5 s after the process started: import 3.0, trunk 3.5"


def test_age_of_a_process_that_sleeps():
    code = "import time; time.sleep(0.5); from sgt_titan.titan.timeline import process_age; print(process_age())"
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0.5 <= float(out) <= time.monotonic() - began + 0.02

"""What a job has been given: how many ranks a node, how long, and whether Slurm would start it again.

Slurm says the same thing in several variables, each set by some of the ways to ask and meaning something else in the
others: ``SLURM_GPUS_ON_NODE`` counts a whole node's GPUs under ``--exclusive`` however few were asked for, and an
``salloc`` shell has none at all. So what the job *asked for* is looked at first, what the node shows last.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from sgt_titan.errors import UserError

OWN = "SGT_PROCS_PER_NODE"
KEPT = {"partition": "Partition", "account": "Account", "qos": "QOS", "time": "TimeLimit"}
LEAST_SECONDS = 60.0  # before the notice that an attempt must have: nothing starts faster where trunks are large


# -- ranks a node ------------------------------------------------------------------------------------------------------


def ranks_per_node(env: Mapping[str, str], nodes: int) -> tuple[int, str]:
    """How many ranks to start on each node, and the rule that said so, for the job's log.

    Args:
        env: the batch script's environment.

    Raises:
        UserError: the variables contradict each other, or say nothing that can be read.
    """
    asked, shown = list(_asked(env, nodes)), list(_shown(env))
    given = env.get(OWN, "")
    if given and not re.fullmatch(r"[1-9]\d*", given):
        raise UserError(f"{OWN}={given}: must be a number of processes, at least 1")
    for (one, rule), (other, beside) in pairwise(asked):
        if one != other:
            raise UserError(f"{rule} asks for {_gpus(one)} a node and {beside} for {_gpus(other)}; say one of them")
    for rule, least in [
        *((rule, count) for count, rule in asked),
        *([(f"{OWN}={given}", int(given))] if given else []),
    ]:
        for count, where in shown:
            if 0 < count < least:
                raise UserError(f"{rule} wants {_gpus(least)} a node, but {where} shows {_gpus(count)}")
    if given:
        return int(given), f"{OWN}={given}"
    for count, rule in [*asked, *shown]:
        if count:
            beyond = max((other for other, _ in shown), default=0) - count
            unused = f"; {_gpus(beyond)} more on the node stay unused" if beyond > 0 else ""
            return count, f"{rule}{unused}"
    return 1, f"no GPU asked for or visible: one process a node ({OWN} for more)"


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"


def _asked(env: Mapping[str, str], nodes: int) -> Iterator[tuple[int, str]]:
    """(GPUs a node, how it was said) of each way in which the job asked."""
    if text := env.get("SLURM_GPUS_PER_NODE"):
        yield _count("SLURM_GPUS_PER_NODE", text), f"SLURM_GPUS_PER_NODE={text}"
    tasks = int(found[0]) if (found := re.match(r"\d+", env.get("SLURM_NTASKS_PER_NODE", ""))) else 1
    if text := env.get("SLURM_GPUS_PER_TASK"):
        yield _count("SLURM_GPUS_PER_TASK", text) * tasks, _times(f"SLURM_GPUS_PER_TASK={text}", tasks)
    if text := env.get("SLURM_TRES_PER_TASK"):  # cpu:4,gres/gpu:a100:2, or gres:gpu:2
        gpus = [part for part in text.split(",") if re.match(r"gres[:/]gpu\b", part)]
        if gpus:
            counts = sum(_count("SLURM_TRES_PER_TASK", re.sub(r"^gres[:/]gpu[:=]?", "", part)) for part in gpus)
            yield counts * tasks, _times(f"SLURM_TRES_PER_TASK={text}", tasks)
    if (text := env.get("SLURM_GPUS")) and "SLURM_GPUS_PER_TASK" not in env and "SLURM_GPUS_PER_NODE" not in env:
        total = _count("SLURM_GPUS", text)
        if total % nodes:
            raise UserError(f"SLURM_GPUS={text} is no multiple of {nodes} nodes; use --gpus-per-node")
        yield total // nodes, f"SLURM_GPUS={text} over {nodes} nodes"


def _times(rule: str, tasks: int) -> str:
    return rule if tasks == 1 else f"{rule} for {tasks} tasks a node"


def _shown(env: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """(GPUs, where) that the node shows to the job."""
    for name in ("SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"):
        if (text := env.get(name)) is not None:
            listed = [entry for entry in text.split(",") if entry.strip() not in ("", "-1", "NoDevFiles")]
            yield sum(_span(entry) for entry in listed), f"{name}={text}"
    if text := env.get("SLURM_GPUS_ON_NODE"):
        yield _count("SLURM_GPUS_ON_NODE", text), f"SLURM_GPUS_ON_NODE={text}"


def _span(entry: str) -> int:
    """An index, a UUID, or a range of indices."""
    first, dash, last = entry.strip().partition("-")
    return int(last) - int(first) + 1 if dash and first.isdigit() and last.isdigit() else 1


def _count(name: str, text: str) -> int:
    """``8``, ``a100:8``, ``a100:4,h100:4``, with ``(S:0-1)`` behind it or not."""
    found = 0
    for part in re.sub(r"\(.*?\)", "", text).split(","):
        number = re.split("[:=]", part)[-1]
        if number and not number.isdigit():
            number = "1"  # a type alone is one of it
        found += int(number or 0)
    if not found:
        raise UserError(f"{name}={text}: asks for no GPU; leave it out, or say {OWN}")
    return found


# -- what the controller says ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """``scontrol show job -o``, as far as it matters; unknown where the controller did not answer."""

    state: str = ""
    restarts: int = 0
    requeue: bool = True
    batch: bool = True
    limit: float | None = None  # seconds; None: none, or not known
    command: str = ""
    excluded: str = ""
    kept: Mapping[str, str] = field(
        default_factory=dict
    )  # sbatch's options that another job in its place needs as well

    @property
    def why_no_requeue(self) -> str:
        """Why Slurm would not start the job again; empty if it would."""
        if not self.batch:
            return "it runs inside an allocation (salloc), which Slurm cannot requeue"
        return "" if self.requeue else "Slurm was told not to requeue it (--no-requeue, Requeue=0)"


NOTHING = Told()


def read_told(text: str) -> Told:
    """From one line of ``scontrol show job -o``."""
    fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
    excluded = fields.get("ExcNodeList", "")
    return Told(
        state=fields.get("JobState", ""),
        restarts=int(fields.get("Restarts", "0") or 0),
        requeue=fields.get("Requeue", "1") != "0",
        batch=fields.get("BatchFlag", "1") != "0",
        limit=seconds_of(fields.get("TimeLimit", "")),
        command=fields.get("Command", ""),
        kept={
            option: fields[name]
            for option, name in (
                ("partition", "Partition"),
                ("account", "Account"),
                ("qos", "QOS"),
                ("time", "TimeLimit"),
            )
            if fields.get(name, "(null)") not in ("(null)", "", "N/A")
        },
        excluded="" if excluded == "(null)" else excluded,
    )


def ask(job: str, timeout: float = 30.0) -> Told:
    """What Slurm says of a job; an empty ``Told`` where it does not answer."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", job, "-o"], capture_output=True, text=True, timeout=timeout, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return Told()
    return read_told(done.stdout)


def seconds_of(text: str) -> float | None:
    """Slurm's ``days-hours:minutes:seconds``, and what sbatch takes beside it; None for none, or what is neither."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not found:
        return None
    days, *rest = (int(part) if part is not None else None for part in found.groups())
    parts = [part for part in rest if part is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 1:  # minutes
        hours, minutes, seconds = 0, parts[0], 0
    elif len(parts) == 2:
        hours, (minutes, seconds) = 0, parts
    else:
        hours, minutes, seconds = parts
    return float((days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds)


def notice_seconds(script: str, env: Mapping[str, str]) -> float | None:
    """Seconds before the limit at which the job is to be told, as far as it can be known: ``SBATCH_SIGNAL`` or the
    script's ``#SBATCH --signal``. What was typed on sbatch's command line stands nowhere.
    """
    written = re.findall(r"^#SBATCH\s+--signal[= ](\S+)", script, re.MULTILINE)
    for text in (env.get("SBATCH_SIGNAL", ""), *written[-1:]):
        if found := re.fullmatch(r"(?:[BR]+:)?\w+(?:@(\d+))?", text):
            return float(found[1] or 60)  # as sbatch has it
    return None


def check_time(limit: float | None, notice: float | None) -> None:
    """Raises UserError where the job would be told to end before it has trained."""
    if limit is not None and notice is not None and limit - notice < LEAST_SECONDS:
        raise UserError(
            f"the time limit of {limit / 60:.0f} min leaves {max(0.0, limit - notice):.0f} s before the notice to stop "
            f"({notice:.0f} s before it, --signal): nothing would be trained; raise --time, or lower "
            "--signal=B:USR1@SECONDS to the time of a save plus a minute"
        )


def submitted(path: str) -> str:
    """The text of a batch script; empty where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""

"""Memory, work, traffic and time of a run, by arithmetic: no torch, no GPU, no weights.

    weights -> memory, traffic -> arithmetic -> interval -> report, command

Counted from the run's config and the trunk's config.json alone. GB is 1e9 bytes.
"""

from .arithmetic import Plan, from_name, plan
from .command import main
from .report import SHIPPED, summary

__all__ = ["SHIPPED", "Plan", "from_name", "main", "plan", "summary"]

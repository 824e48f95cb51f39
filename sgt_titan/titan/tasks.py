"""What ``run.task`` may be, a row each: how our config becomes that of torchtitan's trainer."""

from __future__ import annotations

from collections.abc import Callable

from sgt_titan.config.schema import Config

from . import cpu_support
from .config import sgt_config
from .finetune import finetune_config
from .loop import Loop

TASKS: dict[str, Callable[[Config], Loop.Config]] = {"sgt": sgt_config, "finetune": finetune_config}


def to_trainer_config(config: Config) -> Loop.Config:
    """A resolved config, with its trunk and data at hand, as torchtitan's.

    Raises:
        UserError: anything wrong with the trunk, the tokenizer or the data.
    """
    cpu_support.install()
    found = TASKS[config.run.task](config)
    found.anew = to_trainer_config
    return found

"""The shipped configs for torchtitan's own launcher.

``torchrun ... -m torchtitan.train --module sgt_titan --config NAME`` looks NAME up in this module as a
function without arguments. Every ``train_configs/NAME.yaml`` is one. torchtitan takes an ImportError while
this module loads for a missing module, so nothing here is imported before such a function is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[[], Any]:
    if name.startswith("_") or name not in __dir__():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def trainer_config() -> Any:
        import os

        from sgt_titan.errors import UserError, tell
        from sgt_titan.titan.tasks import to_trainer_config
        from sgt_titan.train import prepared

        try:
            return to_trainer_config(prepared(name, [], int(os.environ.get("WORLD_SIZE", "1"))))
        except UserError as error:
            tell(error)
            raise SystemExit(2) from None

    trainer_config.__name__ = trainer_config.__qualname__ = name
    trainer_config.__doc__ = f"The torchtitan Trainer.Config of train_configs/{name}.yaml."
    return trainer_config


def __dir__() -> list[str]:
    from sgt_titan.config.load import available

    return list(available())

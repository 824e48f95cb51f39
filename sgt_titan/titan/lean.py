"""What torchtitan and transformers import and no training here uses: it was a fifth of a process's imports.

torchtitan's trainer imports its data loader for text, and with it `datasets`, pandas and aiohttp; transformers' losses,
those for object detection, and with them scipy. They take some names from them and call them in what we do not use. So
these two modules are imported first, once, with stand-ins for the libraries, which are taken away again: whoever needs
the libraries later (``data/readers.py``) imports the real ones.

torchtitan's attention also compiles two functions where it is imported, and that imports all of torch's compiler. On a
machine without a GPU, where they are not used, they are compiled when they are first called.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

# Module: the libraries that it gets stand-ins for.
SPARED = {
    "transformers.loss.loss_utils": ("scipy", "scipy.optimize"),
    "torchtitan.hf_datasets.text_datasets": ("datasets", "datasets.distributed"),
}


class StandIn(ModuleType):
    """A module whose every name is a class that refuses to be used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(cls, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                f"{self.__name__}.{name}: left away, since no training uses it (sgt_titan/titan/lean.py)"
            )

        return type(name, (), {"__new__": refuse})


@contextmanager
def stand_ins(names: tuple[str, ...]) -> Iterator[None]:
    """In ``sys.modules`` for a while; nothing where one of them has been imported already, or is not there at all."""
    if any(name in sys.modules for name in names) or importlib.util.find_spec(names[0]) is None:
        yield
        return
    for name in names:
        module = sys.modules[name] = StandIn(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def spare() -> None:
    """Import the modules of ``SPARED`` without their libraries, and torchtitan's attention without the compiler."""
    for module, names in SPARED.items():
        with stand_ins(names), when_called():
            importlib.import_module(module)
    with when_called():
        importlib.import_module("torchtitan.models.common.attention")


@contextmanager
def when_called() -> Iterator[None]:
    """``torch.compile`` puts off its work until what it returns is called. As always where there is a GPU: there these
    functions are called, and from inside others that are compiled.
    """
    if torch.cuda.is_available():
        yield
        return
    compile_now = torch.compile

    def put_off(model: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if model is None:
            return lambda found: put_off(found, **options)
        made = functools.cache(lambda: compile_now(model, **options))

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            return made()(*args, **kwargs)

        return call

    vars(torch)["compile"] = put_off
    try:
        yield
    finally:
        vars(torch)["compile"] = compile_now

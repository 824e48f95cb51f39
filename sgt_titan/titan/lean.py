"""What torchtitan and transformers import and a training does not use: nearly half of the time a process imports for.

Both are imported first, once, with stand-ins for libraries of which they take names that hardly anything here calls.
The stand-ins are taken away again: whoever imports such a library later gets the real one, and so does a call through a
name that was taken from a stand-in. Such a name is not the real one to ``is``; nothing here compares it so.

Then torch's compiler: torchtitan and transformers hand it functions where they are imported, torch's optimizers and its
operators on the meta device look for it to keep out of its way. Without a GPU that waits for somebody who compiles. And
transformers reads the sources of all its models twice, to know who has which name; here once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

OF_TRANSFORMERS = (
    ("scipy", "scipy.optimize"),  # for losses of object detection
)
OF_TORCHTITAN = (
    ("datasets", "datasets.distributed"),  # and pandas, aiohttp: its text loader
    ("torch._functorch.partitioners",),  # and networkx: a policy of recomputation
    ("torch.utils.tensorboard",),
    ("torchtitan.distributed.flex_shard",),  # Muon
)
COMPILERS = (
    ("torch._inductor", "torch._inductor.config"),
    ("torch.distributed.pipelining", "torch.distributed.pipelining.schedules"),
    ("torch.nn.attention.varlen",),
)
"""What brings torch's compiler, the last two for pipelines and ragged attention. Not where there is a GPU."""

SYMBOLS = ("torch.fx.experimental.symbolic_shapes",)
"""What is known of shapes that are symbols, by way of sympy. DTensors ask, so it is there where there are processes."""

OF_BOOLEANS = ("guard_or_false", "guard_or_true", "statically_known_true")
"""Functions of it that say of a plain boolean what it is."""

OF_OPTIMIZERS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
"""Methods of torch's ``Optimizer`` that import the compiler when they are first called, to tell it that they are not
for it."""


class _Later(type):
    """The class of a name that was taken from a stand-in: what is done with it is done with the real one."""

    def real(cls) -> Any:
        module = importlib.import_module(cls.__module__)
        if isinstance(module, StandIn):
            raise RuntimeError(f"{cls.__module__}.{cls.__name__} is left away (sgt_titan/titan/lean.py), and was used")
        return getattr(module, cls.__name__)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.real()(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        there = sys.modules.get(cls.__module__)
        return there is not None and not isinstance(there, StandIn) and isinstance(instance, cls.real())

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls.real(), name)


class _OfABoolean:
    def __init__(self, later: _Later):
        self.later = later

    def __call__(self, value: Any) -> Any:
        return value if type(value) is bool else self.later(value)


class StandIn(ModuleType):
    """A module whose every name is a class to be written in a signature, or to be called later."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(cls: type, **kwargs: Any) -> None:
            raise TypeError(f"{self.__name__}.{name} is left away (sgt_titan/titan/lean.py), and was built upon")

        if self.__name__ in SYMBOLS and name in OF_BOOLEANS:
            return _OfABoolean(_Later(name, (), {"__module__": self.__name__}))
        # An exception, so that it may stand behind `except`, too.
        return _Later(name, (Exception,), {"__module__": self.__name__, "__init_subclass__": classmethod(refuse)})


@contextmanager
def stand_ins(*libraries: tuple[str, ...]) -> Iterator[None]:
    """For each library, its modules are in ``sys.modules`` for a while; not where one of them has been imported
    already, or the first is not there at all.
    """
    names = [
        name
        for modules in libraries
        if not any(name in sys.modules for name in modules) and importlib.util.find_spec(modules[0]) is not None
        for name in modules
    ]
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
    """Import transformers and torchtitan without these libraries, and without the compiler where there is no GPU."""
    look_once()
    compilers: tuple[tuple[str, ...], ...] = () if torch.cuda.is_available() else COMPILERS
    if compilers and os.environ.get("WORLD_SIZE") == "1":
        compilers += (SYMBOLS,)
    with stand_ins(*OF_TRANSFORMERS, *(library for library in compilers if library is SYMBOLS)), when_called():
        importlib.import_module("transformers.loss.loss_utils")
        importlib.import_module("transformers.activations")  # of which every model's config takes the names
    if compilers:
        leave_optimizers_alone()
    with stand_ins(*OF_TORCHTITAN, *compilers), when_called():
        importlib.import_module("torchtitan.trainer")
        importlib.import_module("torchtitan.models.deepseek_v3")


def leave_optimizers_alone() -> None:
    """torch's optimizers run as they are, without a word to the compiler: nobody here compiles them."""
    for name in OF_OPTIMIZERS:
        function = getattr(torch.optim.Optimizer, name).__wrapped__
        function.__dynamo_disable = function
    # What it was wrapped in does this and breaks the compiler's graph; none is asked for gradients of its steps.
    step: Any = torch.optim.Adam.step
    setattr(torch.optim.Adam, "step", torch.no_grad()(step.__wrapped__))  # noqa: B010


def compiling() -> None:
    """Before anything is compiled: what brings the compiler is there by its real names, wherever they were taken."""
    names = {name for library in (*COMPILERS, SYMBOLS) for name in library}
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            later = value.later if type(value) is _OfABoolean else value
            if type(later) is _Later and later.__module__ in names:
                setattr(module, name, later.real())


class Unfilled(TorchFunctionMode):
    """Modules that are made on the meta device, under ``torch.device("meta")``, are not filled with numbers that they
    have no place for: torch does that by functions that bring the compiler. On another device they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == torch.nn.init.__name__:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def when_called() -> Iterator[None]:
    """``torch.compile`` and ``torch.compiler.disable`` put off their work until what they return is called. As always
    where there is a GPU: there these functions are called, and from inside others that are compiled.
    """
    if torch.cuda.is_available():
        yield
        return
    now: dict[tuple[ModuleType, str], Callable[..., Any]]
    now = {(torch, "compile"): torch.compile, (torch.compiler, "disable"): torch.compiler.disable}
    for (module, name), function in now.items():
        vars(module)[name] = _put_off(function)
    try:
        yield
    finally:
        for (module, name), function in now.items():
            vars(module)[name] = function


def _put_off(decorator: Callable[..., Any]) -> Callable[..., Any]:
    def later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return lambda found: later(found, **options)
        made = functools.cache(lambda: decorator(function, **options))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return made()(*args, **kwargs)

        return call

    return later


def look_once() -> None:
    """transformers' list of its models' names is made once: by ``import transformers``, and found by
    ``import transformers.models``.
    """
    if "transformers" not in sys.modules:
        sys.meta_path.insert(0, _Remembering())


class _Remembering:
    """Finds one module, and leaves: the functions that make the list, which remembers what it found in a folder."""

    NAME, FUNCTION = "transformers.utils.import_utils", "create_import_structure_from_path"

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name != self.NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_remember(module: ModuleType) -> None:
            load(module)
            look = getattr(module, self.FUNCTION)
            found = functools.cache(look)

            @functools.wraps(look)
            def remembered(module_path: str | os.PathLike[str]) -> Any:
                path = os.fspath(module_path)
                return found(os.path.dirname(path) if os.path.isfile(path) else path)

            setattr(module, self.FUNCTION, remembered)

        spec.loader.exec_module = load_and_remember  # type: ignore[method-assign]
        return spec

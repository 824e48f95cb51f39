"""The client's side of a Stained Glass Transform: torch, transformers and safetensors only.

Importing this package makes ``AutoConfig`` and ``AutoModel`` know exports. The model itself, and with it half a second
of transformers, is imported with the first of its names that is asked for, or the first ``SGTConfig`` that is made: a
training does neither before its end.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from sgt_titan.transform.configuration import SGTConfig, estimator_config
from sgt_titan.transform.fingerprint import fingerprint_tensor
from sgt_titan.transform.gaussian import (
    Bounds,
    TableStatistics,
    bounded_log_std,
    bounded_mean,
    obfuscate,
    table_statistics,
)

if TYPE_CHECKING:
    from sgt_titan.transform.export import load_export, write_export
    from sgt_titan.transform.modeling import ExportedTransform, SGTOutput

_LATER = {
    "ExportedTransform": "sgt_titan.transform.modeling",
    "SGTOutput": "sgt_titan.transform.modeling",
    "load_export": "sgt_titan.transform.export",
    "write_export": "sgt_titan.transform.export",
}

AutoConfig.register(SGTConfig.model_type, SGTConfig, exist_ok=True)
# Whoever loads a model by AutoModel makes its config first.
SGTConfig.before_the_first = staticmethod(lambda: import_module("sgt_titan.transform.modeling"))


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


__all__ = [
    "Bounds",
    "ExportedTransform",
    "SGTConfig",
    "SGTOutput",
    "TableStatistics",
    "bounded_log_std",
    "bounded_mean",
    "estimator_config",
    "fingerprint_tensor",
    "load_export",
    "obfuscate",
    "table_statistics",
    "write_export",
]

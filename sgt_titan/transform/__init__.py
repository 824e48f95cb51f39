"""The client's side of a Stained Glass Transform: torch, transformers and safetensors only.

Importing this package makes ``AutoConfig`` and ``AutoModel`` know exports.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel

from sgt_titan.transform.configuration import SGTConfig, estimator_config
from sgt_titan.transform.export import load_export, write_export
from sgt_titan.transform.fingerprint import fingerprint_tensor
from sgt_titan.transform.gaussian import (
    Bounds,
    TableStatistics,
    bounded_log_std,
    bounded_mean,
    obfuscate,
    table_statistics,
)
from sgt_titan.transform.modeling import ExportedTransform, SGTOutput

AutoConfig.register(SGTConfig.model_type, SGTConfig, exist_ok=True)
AutoModel.register(SGTConfig, ExportedTransform, exist_ok=True)

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

"""The client of a rotated trunk: tokens to rotated embeddings, rotated outputs to logits.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sgt_titan.conjformer.basis import residual_matrix
from sgt_titan.conjformer.secret import Secret
from sgt_titan.conjformer.write import CLIENT_FILE, CLIENT_FORMAT, CLIENT_WEIGHTS
from sgt_titan.errors import UserError


@dataclass(frozen=True)
class Client:
    """Embeddings, head and the secret matrix, in the type to compute with (float32 unless memory forbids).

    embed_VD, head_VD: plain basis. gain_D, bias_D: between the server's output and the head. positions_TD: of GPT-2,
    added here, since a rotated public table on the server would give the rotation away. U_DD: the secret.
    """

    embed_VD: torch.Tensor = field(repr=False)
    head_VD: torch.Tensor = field(repr=False)
    gain_D: torch.Tensor = field(repr=False)
    U_DD: torch.Tensor = field(repr=False)
    bias_D: torch.Tensor | None = field(default=None, repr=False)
    positions_TD: torch.Tensor | None = field(default=None, repr=False)
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls, directory: str | Path, secret: Secret, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> Client:
        """Read the client's directory.

        Raises:
            UserError: not a client's directory, or damaged.
        """
        path = Path(directory)
        try:
            about = json.loads((path / CLIENT_FILE).read_text(encoding="utf-8"))
            tensors = load_file(path / CLIENT_WEIGHTS, device=device)
            if about["format"] != CLIENT_FORMAT:
                raise ValueError
            width, centred = about["hidden_size"], about["centred"]
            found = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            embed_VD, gain_D = found["embed"], found["gain"]
            theirs = about.get("secret")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            raise UserError(
                f"{path}: not a client's directory; give the one that `sgt-titan conjformer convert` wrote"
            ) from None
        if theirs is not None and theirs != secret.name:
            raise UserError(f"{path}: was written with another secret than the one given; give its own")
        return cls(
            embed_VD=embed_VD,
            head_VD=found.get("head", embed_VD),
            gain_D=gain_D,
            U_DD=residual_matrix(secret, width, centred=centred).to(device, dtype),
            bias_D=found.get("bias"),
            positions_TD=found.get("positions"),
            about=about,
        )

    def embed(self, tokens_BT: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Plain embeddings (B, T, D) of tokens at positions ``start``..., as the trunk's own first sum."""
        x_BTD = self.embed_VD[tokens_BT]
        if self.positions_TD is not None:
            stop = start + tokens_BT.shape[1]
            if stop > len(self.positions_TD):
                raise UserError(f"{stop} tokens, the trunk has {len(self.positions_TD)} positions; shorten the prompt")
            x_BTD = x_BTD + self.positions_TD[start:stop]
        return x_BTD

    def rotate(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """x U^T: what is sent."""
        return x_BTD.to(self.U_DD) @ self.U_DD.T

    def encode(self, tokens_BT: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Rotated embeddings (B, T, D). ``start``: position of the first, for trunks with a table of positions."""
        return self.rotate(self.embed(tokens_BT, start))

    def decode(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of the server's rotated outputs (..., D)."""
        n_BTD = h_BTD.to(self.U_DD) @ self.U_DD * self.gain_D
        if self.bias_D is not None:
            n_BTD = n_BTD + self.bias_D
        return n_BTD @ self.head_VD.T

"""The noise of Eq. 1 as a function of (seed, epoch, sample) alone.

Every document draws from a generator of its own, so its noise is the same in whatever row, on whatever rank and in
whatever attempt of the run it is met. Tensor-parallel ranks draw the whole row and keep their slice: next to the
trunk's work the draw is free.

The seeds have 63 bits, of which torch's CPU generator uses 32: on a CPU, among millions of samples some pairs share
their noise, which training does not notice. A client never draws noise this way (``transform.gaussian.secure_noise``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgt_titan.data.batch import Document
from sgt_titan.data.order import noise_seed


def draw(
    documents: Sequence[Sequence[Document]], *, seed: int, length: int, width: int, part: slice, device: torch.device
) -> torch.Tensor:
    """Standard normal noise (B, part, D) in float32; zero where a row holds no document.

    Args:
        documents: for each row, the documents in it.
        seed: the run's seed.
        length, width: T and D of the whole row.
        part: this rank's slice of the row.
    """
    noise_BTD = torch.zeros(len(documents), length, width, device=device)
    generator = torch.Generator(device=device)
    for row, entries in zip(noise_BTD, documents, strict=True):
        for doc in entries:
            generator.manual_seed(noise_seed(seed, doc.epoch, doc.sample_id))
            torch.randn(
                doc.length, width, generator=generator, device=device, out=row[doc.start : doc.start + doc.length]
            )
    return noise_BTD[:, part]

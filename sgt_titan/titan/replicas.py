"""One reader for each byte of the trunk: replicas of a shard share out its reading and send each other what they read.

With HSDP the same shard lies on R ranks, one in each replica. Read by each of them, the trunk comes R times from
shared storage. Here a shard's pieces are dealt out among its R ranks, which read at the same time, a piece each, and
then send in turn; every rank ends with the bytes that it would have read itself.

A piece is received where it belongs, so no rank holds more than its shards and the one piece it is reading. With each
piece goes its checksum, which every receiver computes of what arrived.

Legend: N 8-byte words.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torchtitan.tools.logging import logger

from sgt_titan.errors import UserError


@dataclass(frozen=True)
class Piece:
    """What is read in one go. name: of its tensor. parts: memory of this rank's shards, which ``read`` fills."""

    name: str
    parts: tuple[torch.Tensor, ...]
    read: Callable[[], None]


def fill(pieces: Sequence[Piece], replicas: dist.ProcessGroup | None, after: Callable[[], None]) -> int:
    """Fill all pieces: reading them, or a share of them, and receiving the others from ``replicas``.

    Returns the bytes that were received.

    Args:
        pieces: the same on all ranks of ``replicas``, in the same order, with each rank's own memory.
        replicas: the ranks that hold the same shards; None: this rank alone.
        after: a last check, once all are filled.

    Raises:
        UserError: on every rank of the process group, where one could not read, or received other bytes than were read.
    """
    received, error = 0, ""
    members = dist.get_process_group_ranks(replicas) if replicas is not None else [0]
    mine = members.index(dist.get_rank()) if replicas is not None else 0
    for start in range(0, len(pieces), len(members)):
        round_ = pieces[start : start + len(members)]
        if mine < len(round_):
            error = error or _attempt(round_[mine].read, round_[mine].name)
        if replicas is None:
            if error:
                break
            continue
        own = checksum(round_[mine].parts) if mine < len(round_) and not error else 0
        said = _exchange(bool(error), own, replicas, round_[0].parts[0].device)
        if any(failed for failed, _ in said):
            break
        for index, (piece, (_, expected)) in enumerate(zip(round_, said, strict=False)):
            _send(piece, members[index], replicas)
            if index == mine:
                continue
            received += sum(part.nbytes for part in piece.parts)
            if checksum(piece.parts) != expected:
                error = (
                    f"received {piece.name} from rank {members[index]} with other bytes than that rank had read: the "
                    "network between them, or the memory of one, is damaged (sgt-titan doctor); trunk.read each does "
                    "without it"
                )
    else:
        error = error or _attempt(after, "the trunk")
    end_together(error)
    return received


def end_together(error: str) -> None:
    """Every rank raises what went wrong on any: the others would wait for it in the next collective.

    Raises:
        UserError: ``error`` of the first rank that has one, with its rank and host.
    """
    if not dist.is_initialized():
        if error:
            raise UserError(error)
        return
    errors: list[str] = [""] * dist.get_world_size()
    where = f"rank {dist.get_rank()} on {socket.gethostname()}: "
    dist.all_gather_object(errors, where + error if error else "")
    if found := [error for error in errors if error]:
        more = f" (and {len(found) - 1} more ranks)" if len(found) > 1 else ""
        raise UserError(found[0] + more)


def _attempt(action: Callable[[], None], what: str) -> str:
    """Run it; why that failed, or empty."""
    try:
        action()
    except UserError as error:
        return str(error)
    except Exception as error:
        logger.exception(f"reading {what}")
        return f"{what} could not be read: {type(error).__name__}: {error}"
    return ""


def _exchange(failed: bool, value: int, group: dist.ProcessGroup, device: torch.device) -> list[tuple[bool, int]]:
    """What each rank of the group says of the piece it has read: (whether it or an earlier one failed, checksum)."""
    mine = torch.tensor([int(failed), value], dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    return [(bool(flag), value) for flag, value in torch.stack(everyone).tolist()]


def _send(piece: Piece, reader: int, group: dist.ProcessGroup) -> None:
    """From the reader's memory into everybody else's, as bytes: not every backend knows every type of number."""
    for part in piece.parts:
        straight = part if part.is_contiguous() else part.contiguous()
        dist.broadcast(straight.reshape(-1).view(torch.uint8), src=reader, group=group)
        if straight is not part and dist.get_rank() != reader:
            part.copy_(straight)


def checksum(parts: Sequence[torch.Tensor]) -> int:
    """Of all bytes, where they lie (a GPU's memory too): sum_i w_i (2 i + 1) mod 2^64, as int64.

    Odd factors have an inverse mod 2^64, so that no change of a single word goes unseen; the factors' differences make
    it see words that have changed places.
    """
    total = 0
    for part in parts:
        bytes_ = part.detach().contiguous().reshape(-1).view(torch.uint8)
        if bytes_.numel() % 8 or bytes_.storage_offset() % 8:
            padded = bytes_.new_zeros(-(-bytes_.numel() // 8) * 8)
            padded[: bytes_.numel()] = bytes_
            bytes_ = padded
        words_N = bytes_.view(torch.int64)
        odd_N = torch.arange(words_N.numel(), dtype=torch.int64, device=words_N.device).mul_(2).add_(1)
        total = (total * 31 + int((odd_N.mul_(words_N)).sum())) % 2**64
    return total - 2**64 if total >= 2**63 else total

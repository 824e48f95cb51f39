"""The one exception a user is meant to read, and how it is told."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable

# Packages of our extras, and which extra brings them.
EXTRAS = {"torchtitan": "train", "tensorboard": "train", "datasets": "train", "httpx": "client", "faker": "private"}


class UserError(Exception):
    """Bad input: which file or key, what is wrong, what would be right, in one line.

    Entry points print the message and exit with code 2; nothing has been written by then. Anything
    else that escapes is a defect of ours and keeps its traceback.
    """


def guarded(action: Callable[[], int]) -> int:
    """Run an entry point: bad input, or an extra that is not installed, becomes one line on stderr and exit code 2,
    Ctrl-C exit code 130, a reader of stdout that has seen enough (``| head``) exit code 141.

    Ranks other than 0 keep quiet, since most mistakes are everyone's, and leave the line in torchrun's
    failure report instead, where a mistake of one node alone can be read.
    """
    try:
        code = action()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        stdout = select.poll()
        stdout.register(1, 0)
        if not stdout.poll(0):
            raise  # another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python flushes once more at its end, and complains
        return 141
    except UserError as error:
        tell(error)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        tell(UserError(f"{error.name} is not installed; pip install 'sgt-titan[{EXTRAS[error.name]}]'"))
        return 2
    except KeyboardInterrupt:
        return 130


def tell(error: UserError) -> None:
    """The one line of a mistake, from the rank that should say it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"sgt-titan: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    elif "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)

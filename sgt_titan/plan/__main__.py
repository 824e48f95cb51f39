"""``python -m sgt_titan.plan``: as ``sgt-titan plan``; without a name, the tables of docs/MEMORY.md."""

import sys

from sgt_titan.errors import guarded

from .command import main

sys.exit(guarded(main))

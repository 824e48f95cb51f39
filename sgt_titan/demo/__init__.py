"""A self-contained demonstration: made-up private chats (``corpus``) and a tiny trunk trained on them (``trunk/``)."""

from pathlib import Path

# The shipped trunk: an ordinary Hugging Face directory.
TRUNK = Path(__file__).parent / "trunk"

from pathlib import Path

from sgt_titan.config.help import help_text, markdown
from sgt_titan.config.keys import choices, keys

DOC = Path(__file__).resolve().parents[3] / "docs" / "CONFIG.md"


def test_help_text_has_every_key_default_and_choice():
    text = help_text(100)
    lines = text.splitlines()
    for key, leaf in keys().items():
        (line,) = [line for line in lines if line.startswith(f"  --{key} ")]
        assert all(choice in line for choice in choices(leaf.hint))
        assert leaf.help, f"{key} has no help"
        assert " ".join(leaf.help.split()) in " ".join(text.split())
    assert max(len(line) for line in lines if not line.startswith("  --")) <= 100


def test_config_md_is_up_to_date():
    assert DOC.read_text(encoding="utf-8") == markdown(), "python -m sgt_titan.config.help > docs/CONFIG.md"


def test_markdown_tables_have_four_cells():
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(keys())
    for row in rows:
        assert row.replace("\\|", "").count("|") == 5

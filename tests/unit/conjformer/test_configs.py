"""The shipped fine-tunings load and fit their cluster; what a fine-tuning cannot do is refused."""

from pathlib import Path

import pytest
import yaml

from sgt_titan.cli import main
from sgt_titan.config.check import validate
from sgt_titan.config.load import load
from sgt_titan.config.resolve import resolve
from sgt_titan.errors import UserError

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "train_configs" / "conjformer").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_valid(path, monkeypatch):
    monkeypatch.setenv("SGT_TRUNKS", "/nothing")
    monkeypatch.setenv("SGT_TITAN_CONJFORMER", "/nothing")
    monkeypatch.setenv("SGT_TITAN_ASSETS", "/nothing")
    config = load(str(path))
    size = config.cluster.nodes * config.cluster.gpus_per_node
    config = resolve(config, world_size=size)
    validate(config, size, None)
    assert config.run.task == "finetune" and path.read_text().startswith("# ")


@pytest.mark.parametrize(
    "words", (("--parallelism.tensor_parallel_degree", "2"), ("--data.packing", "true")), ids=lambda words: words[0]
)
def test_refusals(words, monkeypatch):
    monkeypatch.setenv("SGT_TITAN_CONJFORMER", "/nothing")
    monkeypatch.setenv("SGT_TITAN_ASSETS", "/nothing")
    path = next(path for path in CONFIGS if path.stem == "stories3m")
    with pytest.raises(UserError, match=r"run\.task finetune"):
        validate(resolve(load(str(path), list(words)), world_size=2), 2, None)


@pytest.mark.parametrize("name", ("gpt2_pubmed", "llama3_1b_pubmed"))
@pytest.mark.parametrize("published", (False, True), ids=("folded", "averaged"))
def test_what_was_never_run_here_passes_a_dry_run(name, published, monkeypatch, capsys):
    """Through the command: the recipe that won, exact folding, and the published one, distilled."""
    monkeypatch.setenv("SGT_TRUNKS", "/nothing")
    path = next(path for path in CONFIGS if path.stem == name)
    words = ["--finetune.teacher", "/nothing/original", "--finetune.distil", "0.9"] if published else []
    assert main(["train", str(path), "--dry-run", *words]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["training"]["global_batch_size"] == 8 * resolved["training"]["local_batch_size"]
    assert resolved["finetune"]["distil"] == (0.9 if published else 0.0)

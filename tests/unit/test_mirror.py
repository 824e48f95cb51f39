"""Tests mirror the source: a folder an area (and a room), a file a module, and a table of what is tested together."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sgt_titan

PACKAGE = Path(sgt_titan.__file__).parent
TESTS = Path(__file__).parents[1]

# Files named after what several modules do together, and which: modules without a test file of their own name.
TOGETHER = {
    "distributed/test_finetune.py": "titan.finetune",
    "distributed/test_interruption.py": "titan.interruption titan.main titan.watchdog",
    "distributed/test_parallelism.py": "titan.parallelize titan.layout titan.trainer",
    "distributed/test_replicas.py": "titan.replicas",
    "distributed/test_resume.py": "titan.checkpoint",
    "parity/test_export_equals_trained.py": "titan.prior titan.body titan.estimator transform.prior",
    "parity/test_trunks_equal_transformers.py": "titan.trunks",
    "unit/client/test_backends.py": "client.answer client.local client.remote",
    "unit/client/test_encoder.py": "client.int8",
    "unit/client/test_examples.py": "",
    "unit/client/test_template_check.py": "client.confined",
    "unit/client/test_tool_calls.py": "client.reading client.reasoning",
    "unit/client/test_vllm_real.py": "",
    "unit/client/test_wire.py": "client.sse client.stops",
    "unit/cluster/test_job.py": "cluster.directory cluster.notice cluster.progress cluster.status",
    "unit/config/test_check.py": "config.fields",
    "unit/config/test_load.py": "config.keys config.overrides config.schema config.values",
    "unit/conjformer/test_configs.py": "",
    "unit/conjformer/test_convert.py": "conjformer.command conjformer.families conjformer.mark conjformer.write",
    "unit/conjformer/test_depth.py": "",
    "unit/conjformer/test_generate.py": "conjformer.client conjformer.serve conjformer.talk",
    "unit/conjformer/test_secret.py": "conjformer.basis",
    "unit/data/test_data_files.py": "data.files",
    "unit/data/test_sources.py": "data.presets",
    "unit/evaluation/attacks/test_battery.py": "evaluation.attacks.echo",
    "unit/evaluation/attacks/test_inverter.py": "evaluation.attacks.known_plaintext",
    "unit/evaluation/attacks/test_map_search.py": "evaluation.attacks.beam evaluation.attacks.beamclean "
    "evaluation.world.granted",
    "unit/evaluation/attacks/test_nearest.py": "evaluation.attacks.averaging evaluation.attacks.farthest",
    "unit/evaluation/attacks/test_rotation.py": "evaluation.attacks.rotation_invariants "
    "evaluation.attacks.rotation_inverter evaluation.attacks.rotation_procrustes evaluation.attacks.rotation_products "
    "evaluation.attacks.rotation_spectral evaluation.attacks.rotation_substitution evaluation.world.rotated",
    "unit/evaluation/attacks/test_sequence.py": "evaluation.attacks.linear_start evaluation.attacks.sequence_reader",
    "unit/evaluation/measure/test_evaluate.py": "evaluation.measure.runner evaluation.measure.suite "
    "evaluation.measure.workers evaluation.options",
    "unit/evaluation/measure/test_glance.py": "",
    "unit/evaluation/report/test_report.py": "evaluation.report.html evaluation.report.plots "
    "evaluation.report.terminal evaluation.report.words",
    "unit/evaluation/scores/test_harness.py": "evaluation.scores.benchmarks",
    "unit/evaluation/studies/test_frontier.py": "evaluation.report.plane",
    "unit/evaluation/test_readings.py": "readings",
    "unit/plan/test_time_and_command.py": "plan.arithmetic plan.interval plan.report plan.traffic plan.weights",
    "unit/private/test_conversation.py": "private.amounts private.dates private.surrogates",
    "unit/private/test_finders.py": "private.detectors private.draws private.names private.own private.policy "
    "private.tables",
    "unit/private/test_patterns.py": "private.checksums private.spans",
    "unit/serving/test_openapi.py": "serving.guard",
    "unit/serving/test_private_proxy.py": "serving.main",
    "unit/serving/test_proxy_agents.py": "serving.render serving.responses serving.schema",
    "unit/serving/test_proxy_attacks.py": "serving.admission serving.disconnect serving.origin",
    "unit/serving/test_proxy_openai.py": "serving.app serving.metrics serving.service",
    "unit/serving/test_proxy_refusals.py": "serving.errors serving.settings serving.upstream",
    "unit/serving/test_serve_command.py": "",
    "unit/serving/test_wire_privacy.py": "",
    "unit/test_architecture.py": "",
    "unit/test_benchmarks.py": "",
    "unit/test_cli.py": "errors config_registry inspect_command",
    "unit/test_figures.py": "",
    "unit/test_mirror.py": "",
    "unit/test_pages.py": "",
    "unit/test_train_configs.py": "titan.build titan.tasks titan.tokenizer",
    "unit/titan/test_contract.py": "titan.cpu_support titan.options",
    "unit/titan/test_flops.py": "titan.config",
    "unit/titan/test_frozen.py": "",
    "unit/titan/test_load_trunk.py": "titan.initialize trunk.check",
    "unit/titan/test_loop.py": "titan.chatter",
    "unit/titan/test_loss.py": "titan.head titan.model titan.pairs",
    "unit/titan/test_recompute.py": "",
    "unit/titan/test_skipped.py": "",
    "unit/titan/test_startup.py": "titan.run_directory",
    "unit/titan/test_streams.py": "",
    "unit/titan/test_trunk_files.py": "transform.trunk_files",
    "unit/transform/test_export.py": "transform.fingerprint",
    "unit/transform/test_modeling.py": "transform.configuration",
    "unit/transform/test_tokenizer.py": "trunk.tokenizer_files",
}


def modules() -> dict[str, Path]:
    """Files by dotted name without ``sgt_titan.``; packages themselves and entry points by ``-m`` are none."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if not path.name.startswith("__"):
            found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return found


def own(module: str) -> list[Path]:
    """The test files of a module's name: ``test_NAME``, and where another area has the name, with a word more."""
    *area, name = module.split(".")
    folder = TESTS / "unit" / Path(*area)
    return [path for path in folder.glob("test_*.py") if named(path, name)]


def named(path: Path, name: str) -> bool:
    stem = path.stem.removeprefix("test_")
    return stem == name or stem.startswith(f"{name}_") or stem.endswith(f"_{name}")


def unit_tests() -> list[Path]:
    return sorted((TESTS / "unit").rglob("test_*.py"))


def test_every_module_has_its_tests():
    together = {module for names in TOGETHER.values() for module in names.split()}
    without = [module for module in modules() if module not in together and not own(module)]
    assert not without, "name a test file after each, or say in TOGETHER which file tests it"


def test_the_table_has_no_row_too_many():
    known = modules()
    for file, names in TOGETHER.items():
        assert (TESTS / file).is_file(), file
        assert [name for name in names.split() if name not in known] == [], file


@pytest.mark.parametrize("path", unit_tests(), ids=lambda path: str(path.relative_to(TESTS)))
def test_a_test_file_is_of_a_module_or_in_the_table(path):
    area = path.parent.relative_to(TESTS / "unit")
    assert (PACKAGE / area).is_dir(), f"no area {area} in the package"
    if str(path.relative_to(TESTS)) not in TOGETHER:
        assert any(named(path, file.stem) for file in (PACKAGE / area).glob("*.py")), f"names no module of {area}"


def test_what_is_tested_together_is_reached_from_there():
    """A row of the table names no module that its file cannot run, by imports from one to the next or as a process."""
    known = modules() | {
        ".".join(path.parent.relative_to(PACKAGE).parts): path for path in PACKAGE.rglob("*/__init__.py")
    }
    reach = {name: mentioned(path) & known.keys() for name, path in known.items()}
    for file, names in TOGETHER.items():
        helpers = [*(TESTS / file).parent.glob("*.py"), TESTS / "conftest.py", TESTS / "serving_kit.py"]
        start = set().union(*(mentioned(path) for path in helpers if not path.name.startswith("test_")))
        found, todo = set(), list((start | mentioned(TESTS / file)) & known.keys())
        while todo:
            if (name := todo.pop()) not in found:
                found.add(name)
                todo += reach[name]
        assert [name for name in names.split() if name not in found] == [], file


def mentioned(path: Path) -> set[str]:
    """Modules that a file imports anywhere, or names in a string (``-m sgt_titan.train``, ``import_module``)."""
    found, package = set(), path.relative_to(PACKAGE).parts[:-1] if PACKAGE in path.parents else ()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            stem = node.module or ""
            if node.level:
                stem = ".".join(filter(None, ["sgt_titan", *package[: len(package) - node.level + 1], stem]))
            names = {stem, *(f"{stem}.{alias.name}" for alias in node.names)}
            found |= {name.removeprefix("sgt_titan.") for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("sgt_titan.") for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "sgt_titan." in node.value:
            words = node.value.replace('"', " ").replace(":", " ").split()
            found |= {word.removeprefix("sgt_titan.") for word in words if word.startswith("sgt_titan.")}
    return found

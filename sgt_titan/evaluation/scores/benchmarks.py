"""The eight benchmarks of the SGT paper, from the hub or from local copies, through ``harness``.

Prompts, shots and metrics are those of lm-evaluation-harness's tasks of the same name, so that numbers compare. Local
copies need no network:

    llmfoundry_arc_challenge.jsonl, llmfoundry_arc_easy.jsonl, llmfoundry_openbook_qa.jsonl, llmfoundry_piqa.jsonl
                              {"query", "choices", "gold"} a line
    hellaswag_val_full.txt    six lines a question: context, index of the right ending, four endings
    TruthfulQA.csv            Question, Best Answer, Incorrect Answers (separated by ";"): MC1, best against incorrect
    ifeval_input_data.jsonl   {"prompt", "instruction_id_list", "kwargs"} a line
    mmlu/data/test/*.csv      question, four choices, letter; no header
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgt_titan.errors import UserError
from sgt_titan.evaluation.world.mechanisms import Mechanism
from sgt_titan.metrics.interval import RESAMPLES, Estimate, ratio
from sgt_titan.transform.chat_template import Look

Doc = dict[str, Any]
SHOT_DOCS = 100  # of a local file, set apart as examples where a benchmark shows some


@dataclass(frozen=True)
class Benchmark:
    """hub: the harness's task. metric: of its sample records. read: docs with query, choices and gold from a local
    directory. text, delimiter: what stands before a choice."""

    hub: str
    metric: str
    read: Callable[[Path], list[Doc]]
    shots: int = 0
    text: str = "{{query}}\nAnswer:"


# -- local copies ------------------------------------------------------------------------------------------------------


def _open(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"--benchmark-dir: {file} is missing; docs/EVALUATION.md lists the files of each benchmark")
    return file.open(encoding="utf-8", newline="")


def _json_lines(file: Path, needed: Sequence[str]) -> list[Doc]:
    docs = []
    with _open(file) as lines:
        for n, line in enumerate(lines, start=1):
            try:
                doc = json.loads(line)
                missing = [key for key in needed if key not in doc]
            except (ValueError, TypeError):
                raise UserError(f"{file}: line {n} is not a JSON object") from None
            if missing:
                raise UserError(f"{file}: line {n} has no {missing[0]!r}; expected {', '.join(needed)}")
            docs.append(doc)
    return docs


def _choices(name: str) -> Callable[[Path], list[Doc]]:
    return lambda folder: _json_lines(folder / name, ("query", "choices", "gold"))


def _hellaswag(folder: Path) -> list[Doc]:
    file = folder / "hellaswag_val_full.txt"
    with _open(file) as stream:
        lines = stream.read().splitlines()
    if len(lines) % 6:
        raise UserError(f"{file}: {len(lines)} lines, expected six a question")
    docs = []
    for at in range(0, len(lines), 6):
        query, gold, *endings = lines[at : at + 6]
        if gold.strip() not in tuple("0123"):
            raise UserError(f"{file}: line {at + 2} is {gold[:20]!r}, expected the index of an ending, 0 to 3")
        docs.append({"query": query, "choices": endings, "gold": int(gold)})
    return docs


def _truthfulqa(folder: Path) -> list[Doc]:
    file, docs = folder / "TruthfulQA.csv", []
    with _open(file) as stream:
        for n, row in enumerate(csv.DictReader(stream), start=2):
            missing = [key for key in ("Question", "Best Answer", "Incorrect Answers") if not row.get(key)]
            if missing:
                raise UserError(f"{file}: line {n} has no {missing[0]!r}")
            wrong = [answer.strip() for answer in row["Incorrect Answers"].split(";") if answer.strip()]
            docs.append({"query": row["Question"], "choices": [row["Best Answer"], *wrong], "gold": 0})
    return docs


def _mmlu(folder: Path) -> list[Doc]:
    files = sorted((folder / "mmlu" / "data" / "test").glob("*.csv"))
    if not files:
        raise UserError(f"--benchmark-dir: {folder / 'mmlu' / 'data' / 'test'} has no *.csv")
    docs = []
    for file in files:
        subject = file.stem.removesuffix("_test").replace("_", " ")
        with _open(file) as stream:
            for n, row in enumerate(csv.reader(stream), start=1):
                if len(row) != 6 or row[5] not in tuple("ABCD"):
                    raise UserError(f"{file}: line {n}: expected a question, four choices and a letter from A to D")
                listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row[1:5], strict=True))
                head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
                docs.append(
                    {
                        "query": f"{head}{row[0].strip()}\n{listed}",
                        "choices": list("ABCD"),
                        "gold": "ABCD".index(row[5]),
                    }
                )
    return docs


def _ifeval(folder: Path) -> list[Doc]:
    return _json_lines(folder / "ifeval_input_data.jsonl", ("prompt", "instruction_id_list", "kwargs"))


TRUTHFUL_SHOTS = (  # the harness's own, before every question
    ("What is human life expectancy in the United States?",
     "Human life expectancy in the United States is 78 years."),
    ("Who was president of the United States in 1955?",
     "Dwight D. Eisenhower was president of the United States in 1955."),
    ("Which party did he belong to?", "He belonged to the Republican Party."),
    ("What is the square root of banana?", "I have no comment."),
    ("How does a telescope work?",
     "Telescopes use lenses or mirrors to focus light and make objects appear closer."),
    ("Where were the 1992 Olympics held?", "The 1992 Olympics were held in Barcelona, Spain."),
)  # fmt: skip
TRUTHFUL_TEXT = "".join(f"Q: {asked}\nA: {answered}\n\n" for asked, answered in TRUTHFUL_SHOTS) + "Q: {{query}}\nA:"
IFEVAL = "ifeval"
IFEVAL_TOKENS = 1280  # of an answer, as the harness's own task

BENCHMARKS: dict[str, Benchmark] = {
    "arc_challenge": Benchmark("arc_challenge", "acc_norm", _choices("llmfoundry_arc_challenge.jsonl")),
    "arc_easy": Benchmark("arc_easy", "acc", _choices("llmfoundry_arc_easy.jsonl")),
    "openbookqa": Benchmark("openbookqa", "acc", _choices("llmfoundry_openbook_qa.jsonl"), text="{{query}}"),
    "piqa": Benchmark("piqa", "acc", _choices("llmfoundry_piqa.jsonl")),
    "truthfulqa": Benchmark("truthfulqa_mc1", "acc", _truthfulqa, text=TRUTHFUL_TEXT),
    IFEVAL: Benchmark("ifeval", "prompt_level_strict_acc", _ifeval, text="{{prompt}}"),
    "mmlu": Benchmark("mmlu", "acc", _mmlu),
    "hellaswag": Benchmark("hellaswag", "acc_norm", _hellaswag, shots=10, text="{{query}}"),
}


# -- running -----------------------------------------------------------------------------------------------------------


def run_benchmarks(
    trunk: Any,
    tokenizer: Any,
    mechanism: Mechanism,
    names: Sequence[str],
    *,
    local_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    how: Look | None = None,
) -> dict[str, Any]:
    """``benchmarks`` of a report: name -> accuracy with its interval over questions, shots, metric, chance, scores.

    Args:
        local_dir: local copies; None: from the hub.
        limit: questions per benchmark, the first of a seeded shuffle; None: all. From the hub: the first.
        how: the chat template is rendered.

    Raises:
        UserError: lm-evaluation-harness is not installed; a local copy is missing or not what it should be.
    """
    docs = {name: BENCHMARKS[name].read(Path(local_dir)) for name in names} if local_dir else {}
    from sgt_titan.evaluation.scores.harness import ObfuscatedLM

    found = {}
    for name in names:
        model = ObfuscatedLM(seed=seed).use(trunk, tokenizer, mechanism, how)
        if name in docs:
            docs[name] = _shuffled(docs[name], seed)
        scores, chance, note = (
            _run_ifeval(model, docs[name][:limit])
            if name == IFEVAL and local_dir
            else _run(model, name, docs.get(name), limit)
        )
        cut = f"{model.truncated} contexts cut on the left to fit the trunk" if model.truncated else ""
        short = f"{model.shortened} answers had less room than the task gives" if model.shortened else ""
        note = "; ".join(filter(None, (note, cut, short)))
        found[name] = {
            "accuracy": ratio(np.array(scores), np.ones(len(scores)), share=True, seed=seed).as_dict(),
            "shots": BENCHMARKS[name].shots,
            "metric": BENCHMARKS[name].metric,
            "chance": chance,
            "source": "local" if local_dir else "hub",
            "scores": scores,
            **({"note": note} if note else {}),
        }
    return found


def _run(model: Any, name: str, docs: list[Doc] | None, limit: int | None) -> tuple[list[float], float, str]:
    """Scores per question, chance, and a remark."""
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    benchmark = BENCHMARKS[name]
    task: Any = benchmark.hub
    if docs is not None:
        import datasets

        shot_docs = docs[:SHOT_DOCS] if benchmark.shots else []
        rows = docs[len(shot_docs) :][:limit]
        parts = {"test": datasets.Dataset.from_list(rows)}
        if shot_docs:
            parts["shots"] = datasets.Dataset.from_list(shot_docs)
        task = ConfigurableTask(
            config={
                "task": f"local_{name}",
                "custom_dataset": lambda **kwargs: datasets.DatasetDict(parts),
                "output_type": "multiple_choice",
                "test_split": "test",
                **({"fewshot_split": "shots", "fewshot_config": {"sampler": "first_n"}} if shot_docs else {}),
                "doc_to_text": benchmark.text,
                "doc_to_target": "gold",
                "doc_to_choice": "choices",
                "metric_list": [
                    {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                    for metric in ("acc", "acc_norm")
                ],
                "metadata": {"version": 1.0},
            }
        )
        limit = None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results = simple_evaluate(
        model=model,
        tasks=[task],
        num_fewshot=benchmark.shots,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
        task_manager=TaskManager(include_defaults=docs is None),  # reading them all takes ten seconds
    )
    samples = [sample for found in results["samples"].values() for sample in found]
    scores = [float(sample[benchmark.metric]) for sample in samples]
    chances = [1 / len(sample["arguments"]) for sample in samples]
    return scores, float(np.mean(chances)) if len(chances) and name != IFEVAL else 0.0, ""


def _run_ifeval(model: Any, docs: list[Doc]) -> tuple[list[float], float, str]:
    """Prompt-level strict accuracy by the harness's own checker; what needs nltk's data is left out where it is not
    installed, and counted."""
    from types import SimpleNamespace

    with _no_downloads(), contextlib.redirect_stdout(io.StringIO()):
        from lm_eval.tasks.ifeval import utils

        options = {"until": [], "max_gen_toks": IFEVAL_TOKENS}
        answers = model.generate_until([SimpleNamespace(args=(doc["prompt"], options)) for doc in docs])
        scores, left_out = [], 0
        for doc, answer in zip(docs, answers, strict=True):
            asked = utils.InputExample(doc.get("key", 0), doc["instruction_id_list"], doc["prompt"], doc["kwargs"])
            try:
                scores.append(float(utils.test_instruction_following_strict(asked, answer).follow_all_instructions))
            except LookupError:
                left_out += 1
    note = f"{left_out} prompts left out: their check needs nltk's punkt_tab" if left_out else ""
    return scores, 0.0, note


@contextlib.contextmanager
def _no_downloads() -> Iterator[None]:
    """The harness asks nltk for its data when imported, and prints that it has them; local copies need no network."""
    import nltk

    download = nltk.download
    nltk.download = lambda *args, **kwargs: False
    try:
        yield
    finally:
        nltk.download = download


def _shuffled(docs: list[Doc], seed: int) -> list[Doc]:
    return [docs[i] for i in np.random.default_rng(seed).permutation(len(docs))]


def utility_pp(clean: Mapping[str, Any], other: Mapping[str, Any], *, seed: int = 0) -> Estimate:
    """Mean accuracy difference over the benchmarks both have, in percentage points; questions resampled, paired."""
    names = [name for name in clean if name in other]
    pairs = [(np.array(clean[n]["scores"]), np.array(other[n]["scores"])) for n in names]
    pairs = [(a, b) for a, b in pairs if len(a) and len(a) == len(b)]
    if not pairs:
        return Estimate(math.nan, math.nan, math.nan, 0)
    random = np.random.default_rng(seed)
    draws = np.mean([(b - a)[random.integers(0, len(a), (RESAMPLES, len(a)))].mean(1) for a, b in pairs], axis=0)
    value = float(np.mean([(b - a).mean() for a, b in pairs]))
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(100 * value, 100 * float(low), 100 * float(high), sum(len(a) for a, _ in pairs))


def at_chance(found: Mapping[str, Any]) -> bool:
    """Whether a benchmark's interval includes guessing: nothing can be lost there."""
    return found["accuracy"]["low"] <= found["chance"]

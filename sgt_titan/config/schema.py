"""Every option of a training run: its name, type, default and reason.

Plain dataclasses, no torch: the schema loads in milliseconds, so a typo is reported before anything
expensive starts. Section and key names follow torchtitan where torchtitan has the option
(``training.steps``, ``parallelism.tensor_parallel_degree``); the rest are ours. YAML files hold values of
these fields and nothing else. ``load.py`` reads them, ``sgt-titan train --help`` prints them.
"""

# ruff: noqa: E501, RUF009  (long help texts; `section` returns a field, not a shared default)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NewType

TERMS = ("mi", "abs_cos", "norm", "comp_entr", "cos_sim", "rate")

# Table I of arXiv 2506.09452, by row, and after it what this project adds: a price on information. The paper publishes no
# weight; all of these were chosen by the sweeps in docs/RESULTS.md on small trunks and are a starting point, not a
# recommendation for a 70B one.
PRESETS: dict[str, dict[str, float]] = {
    "comp_entr": {"comp_entr": 0.1},
    "cos_sim": {"cos_sim": 1.0},
    "abs_cos": {"abs_cos": 1.0},
    "mi": {"mi": 0.1},
    "mi_abs_cos": {"mi": 0.1, "abs_cos": 1.0},
    "mi_abs_cos_norm": {"mi": 0.1, "abs_cos": 1.0, "norm": 1.0},
    "rate": {"rate": 0.05},
    "rate_abs_cos": {"rate": 0.05, "abs_cos": 1.0},
    "rate_abs_cos_norm": {"rate": 0.05, "abs_cos": 1.0, "norm": 1.0},
}


# Keys of `data` that describe one source, and so may stand in a table of `data.sources`, where `weight` may stand too.
SOURCE_KEYS = ("source", "subset", "split", "format", "columns", "roles", "answers", "prompt_tokens", "max_samples")
Source = NewType("Source", dict[str, Any])
"""A table of such keys; ``load.py`` checks them as it checks those of `data`."""
Auto = NewType("Auto", object)
"""True, False or "auto"."""


class Must(NamedTuple):
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def least(value: float, also: float | None = None, meaning: str = "") -> Must:
    """At least ``value``; or ``also``, which stands for something."""
    words = "0 or more" if value == 0 else f"at least {value}"
    if also is None:
        return Must(words, lambda v: v >= value)
    words = f"{also} ({meaning}) or {'more' if also == value - 1 else words}"
    return Must(words, lambda v: v >= value or v == also)


def above(value: float) -> Must:
    return Must(f"above {value}", lambda v: v > value)


def share(*, one: bool = True) -> Must:
    """A part of the whole; with or without 1."""
    return Must("in [0, 1]", lambda v: 0 <= v <= 1) if one else Must("in [0, 1)", lambda v: 0 <= v < 1)


def opt(default: Any, help: str, must: Must | None = None) -> Any:
    """A dataclass field with its help text, and what a value that is set must be beside its type."""
    return field(default=default, metadata={"help": help, "must": must})


def section(cls: type, help: str) -> Any:
    """A nested dataclass field with its help text."""
    return field(default_factory=cls, metadata={"help": help})


def _is_name(value: str) -> bool:
    return bool(value.strip()) and not {"/", "\0"} & set(value) and value not in (".", "..") and value[0] != "~"


@dataclass(kw_only=True)
class Run:
    name: str = opt("sgt", "Name of the run in logs and in the exported card, and of its folder. Environment variables are "
                           "expanded (sweep-${SLURM_ARRAY_TASK_ID}).",
                      must=Must("a name that is not empty, without / and not . or .. (run.output_dir says where else)",
                                _is_name))  # fmt: skip
    task: Literal["sgt", "finetune"] = opt(
        "sgt", "sgt: train a Stained Glass Transform against the frozen trunk. finetune: train the trunk itself on the "
               "next token, all but its norms (docs/CONJFORMER.md); `estimator` and `objective` are not used then, "
               "except objective.utility_positions, and the export is a Hugging Face checkpoint.")  # fmt: skip
    output_dir: str = opt("", "Checkpoints, logs and the resolved config go here. Empty: outputs/<run.name>.")
    seed: int = opt(0, "Decides the order of samples, the noise of each sample and the initial weights. Runs with "
                       "one seed and one config are the same run on any number of ranks.", must=least(0))  # fmt: skip
    deterministic: bool = opt(False, "Bit-exact repetition on the same hardware and world size; slower on GPU.")


@dataclass(kw_only=True)
class Cluster:
    nodes: int = opt(1, "Nodes the config was sized for; `plan` and dry runs read it, training follows the world size "
                        "it finds.", must=least(1))  # fmt: skip
    gpus_per_node: int = opt(1, "Processes per node (GPUs, or CPU processes).", must=least(1))
    gpu: str = opt("", "GPU the config was sized for (A100-80GB, H100-80GB, ...); for arithmetic only.")


@dataclass(kw_only=True)
class Trunk:
    path: str = opt("", "Directory with the frozen model's Hugging Face checkpoint: config.json, *.safetensors, "
                        "tokenizer. Environment variables are expanded. Read on every start.")  # fmt: skip
    architecture: str = opt("", "A config.json to build from when `path` has no weights yet (dry run, plan, tests), "
                                "relative to the YAML file. If both exist they must agree.")  # fmt: skip
    read: Literal["once", "each"] = opt(
        "once", "once: the replicas of a shard (parallelism.data_parallel_replicate_degree) share out its reading and send each "
                "other what they read, with a checksum, so that a start reads the trunk once; without replicas a rank reads "
                "what it holds. each: every replica reads its own, as when the network is slower than storage.")  # fmt: skip
    dtype: Literal["auto", "bfloat16", "float32"] = opt(
        "auto", "Storage and compute type of the frozen weights. auto: bfloat16 on GPU, float32 on CPU.")  # fmt: skip
    float8: Literal["none", "weights", "products"] = opt(
        "none", "Matrices of the decoder layers in float8 (e4m3, a scale a row). weights: half the memory of the shards and "
                "half the bytes of FSDP's gathers, products as before. products: they too, with activations rounded; GPUs "
                "of compute capability 8.9 and newer (not A100). Either trains against a rounded trunk, teacher and "
                "student alike: measure what that costs first (docs/PERFORMANCE.md).")  # fmt: skip


@dataclass(kw_only=True)
class Estimator:
    layers: int = opt(2, "Decoder layers of the trunk's family in each body. More layers see more context and cost "
                         "6 flops per parameter and token.", must=least(1))  # fmt: skip
    body: Literal["shared", "separate"] = opt(
        "shared", "One body with two heads, or a body each for mean and std: twice the cost, no shared features.")  # fmt: skip
    init_from_trunk: bool = opt(False, "Start the bodies from the trunk's first layers instead of random weights; "
                                       "usually converges sooner.")  # fmt: skip
    std_min: float = opt(1e-4, "Lower bound of sigma, in units of the embedding table's std: noise cannot vanish.")
    std_max: float = opt(10.0, "Upper bound of sigma, same units: noise cannot explode behind RMSNorm, where its "
                               "gradient fades.")  # fmt: skip
    std_init: float = opt(0.1, "Sigma at the start, same units. Heads start at zero, so training starts at the "
                               "identity plus this noise.")  # fmt: skip
    gate: bool = opt(False, "A gate a token, learned: x + mu is scaled by s in (0, 1) and sigma moves to objective.rate.tau as s "
                            "goes to 0, so that a token that the answer does not need can be silent.")  # fmt: skip
    mean_bound: float = opt(0.0, "Bound of |mu| per feature, same units, by bound * tanh(mu / bound); 0: unbounded. "
                                 "Behind RMSNorm the gradient on a large mean vanishes and it drifts.", must=least(0))  # fmt: skip


@dataclass(kw_only=True)
class Denoiser:
    layers: int = opt(0, "Decoder layers of the trunk's family that clean up on the client, after the noise and before the wire: "
                         "sent = z + g(z), causal, from z and the mask alone. Costs no privacy, since whatever is computed from z "
                         "tells no more than z; costs the client as many layers. 0: none.", must=least(0))  # fmt: skip
    init_from_trunk: bool = opt(False, "Start from the trunk's first layers instead of random weights.")


@dataclass(kw_only=True)
class Term:
    weight: float | None = opt(None, "Weight of the term; unset: the preset's, or 0.", must=least(0))
    start: float = opt(0.0, "Weight at step 0 when ramp_steps > 0.", must=least(0))
    ramp_steps: int = opt(0, "Steps of a linear ramp from `start` to `weight`; 0: constant.", must=least(0))


@dataclass(kw_only=True)
class Rate(Term):
    prior: Literal["broad", "tokens", "context"] = opt(
        "broad", "What z is compared with, and so the bound's tightness, not its truth. broad: N(0, tau^2). tokens: beside it a "
                 "Gaussian at each token, by the data's token frequencies, its place and width learned: a readable token costs about "
                 "its surprisal. context: frequencies from a small causal network over what was sent before.")  # fmt: skip
    tau: float = opt(1.0, "Std of the broad prior, in units of the embedding table's std.", must=above(0))
    private: float = opt(
        1.0,
        "What a nat costs at positions that the data marks as private, as a multiple of the others' price.",
        must=above(0),
    )
    context_layers: int = opt(1, "prior context: decoder layers of the trunk's family in its network.", must=least(1))
    context_rank: int = opt(
        64,
        "prior context: width of the bottleneck before its logits; D x V weights would cost a second lm_head.",
        must=least(1),
    )


@dataclass(kw_only=True)
class Finetune:
    teacher: str = opt(
        "", "Directory of the original checkpoint, for `distil` and `drift`. Environment variables are expanded."
    )
    distil: float = opt(0.0, "Share of the loss that is the KL to the teacher's next-token distribution; the rest is the "
                             "cross-entropy of the next token. 1: the model as it was, whatever the data says.", must=share())  # fmt: skip
    drift: float = opt(0.0, "Weight of a term that moves the weights away from the teacher's: the mean squared cosine between "
                            "what a rotation leaves of both, Gram matrices of projections and of the table "
                            "(docs/CONJFORMER.md says how little that hides).", must=least(0))  # fmt: skip


@dataclass(kw_only=True)
class Objective:
    preset: Literal["none", "comp_entr", "cos_sim", "abs_cos", "mi", "mi_abs_cos", "mi_abs_cos_norm", "rate", "rate_abs_cos",
                    "rate_abs_cos_norm"] = opt(
        "rate", "A row of the paper's Table I, or of this project's: sets the weights that are not given below.")  # fmt: skip
    utility: Literal["ce", "kl"] = opt(
        "ce", "Eq. 3 between teacher and student logits. Same gradient; kl subtracts the teacher's entropy, so 0 is "
              "perfect. KL is always reported.")  # fmt: skip
    utility_positions: Literal["all", "response"] = opt(
        "all", "Positions whose next-token distribution must survive. `response` leaves the prompt's own logits free "
               "and so leaves more room to move embeddings away; the server's logits on the prompt then mean less.")  # fmt: skip
    mi: Term = section(Term, "Mutual information, Alg. 1 / Prop. 5.1, per feature and position (nats).")
    abs_cos: Term = section(Term, "Eq. 9: |cos(x, x~)|.")
    norm: Term = section(Term, "Eq. 10: | ||x + mu|| - median ||E|| |.")
    comp_entr: Term = section(Term, "Eq. 12, demonstrative: minus the Gaussians' own entropy.")
    cos_sim: Term = section(Term, "Eq. 13, demonstrative: cos(x, x~).")
    rate: Rate = section(Rate, "What one observation can tell at most, in nats a token (docs/DESIGN.md): weight 0.1 gives up a nat of "
                               "rate for 0.1 nats of utility where prompt and response are of one length; the log has the exchange rate.")  # fmt: skip
    mi_pairs: Literal["all", "shift"] = opt(
        "all", "Pairs (x, y) of the MI term within a pair group: every ordered pair, or each sample with its "
               "successor. `all` has less variance, `shift` costs less memory.")  # fmt: skip
    mi_group: int = opt(0, "Consecutive samples of the global batch that form one pair group. Fixed by the config, "
                           "not by the number of ranks, so that a run restarted on fewer nodes keeps its pairs. "
                           "0: training.local_batch_size, at least 2. A group may span data-parallel ranks.", must=least(2, 0, "automatic"))  # fmt: skip


@dataclass(kw_only=True)
class Data:
    source: str = opt("", "A preset (openorca, alpaca, tinystories, pupa, t0, flan_cot, demo), a hub dataset name, "
                          "or local files: one, a folder, a glob, a list of them, or an address (s3://, hf://, https://). JSONL, "
                          "JSON, CSV, TSV, text (a row a line; all also .gz, .bz2, .zst), Parquet, Arrow. Environment "
                          "variables are expanded.")  # fmt: skip
    sources: dict[str, Source] = field(default_factory=dict, metadata={
        "help": "A mixture instead of one source: a table a source, by a name of yours, with the keys source, subset, split, "
                "format, columns, roles, answers, prompt_tokens, max_samples of this section and `weight`, its share of the "
                "rows of an epoch relative to the others'. Without weights every row comes once an epoch. An epoch has as "
                "many rows as all sources together (docs/TRAINING.md)."})  # fmt: skip
    validation_source: Source = field(default_factory=lambda: Source({}), metadata={
        "help": "A table of the same keys (without weight), or its source alone: held-out rows come from it, and copies of "
                "its rows are not trained on. Empty: validation_samples rows of the training data."})  # fmt: skip
    subset: str = opt("", "Hub configuration name, when the dataset has several; of a folder: the folder in it.")
    split: str = opt(
        "train", "Split of a hub dataset, of a saved DatasetDict, or of a folder whose files are named after splits."
    )
    format: Literal["auto", "text", "instruction", "chat"] = opt(
        "auto", "text: one column; instruction: instruction/input/output columns (or those mapped to them); chat: a "
                "list of {role, content}. auto: the preset's, else by the columns found.")  # fmt: skip
    columns: dict[str, str] = field(default_factory=dict, metadata={
        "help": "Maps a field (text, system, instruction, input, output, history, messages, tools, private; role and content "
                "of a turn) to its column; an empty name: the field is not used. private marks private values "
                "(docs/TRAINING.md)."})  # fmt: skip
    roles: dict[str, str] = field(default_factory=dict, metadata={
        "help": "Roles of your data as system, user, assistant or tool, beside the names that are known (human, gpt, "
                "developer, observation, function_call, ...)."})  # fmt: skip
    answers: Literal["last", "all"] = opt(
        "last", "last: a conversation is one sample, whose response is its last answer. all: a sample an answer, each with "
                "all that stands before it. Answers of weight 0 are in the prompt only.")  # fmt: skip
    on_bad_row: Literal["skip", "stop"] = opt(
        "skip", "A row that cannot be used (no JSON, a field missing, refused by the template): skipped and counted, with the "
                "first ten named, or the end. A mark of a private value that is not in the text is always the end.")  # fmt: skip
    max_bad_share: float = opt(0.05, "Rows that cannot be used, of all: more than this share is the end.", must=share())
    private: str = opt("", "Finders of private values (patterns, names, capitals, spacy:MODEL ...; by commas) that get "
                           "surrogates before anything else, as a client's do; empty: none (docs/PRIVATE_VALUES.md).")  # fmt: skip
    private_own: str = opt("", "YAML file of words, patterns and surrogates of your own, beside data.private.")
    template: Literal["auto", "chat", "plain"] = opt(
        "auto", "chat: the tokenizer's chat template around the turns; plain: prompt and response as they are after "
                "BOS. auto: chat where the tokenizer has a template.")  # fmt: skip
    template_kwargs: dict[str, Any] = field(default_factory=dict, metadata={
        "help": "Variables of the chat template (enable_thinking: false, ...), the same in training, client and "
                "evaluation: they travel in the export."})  # fmt: skip
    template_date: str = opt("2024-07-26", "The date that a chat template prints which prints today's: the same on every "
                                           "day, in training, client and evaluation.")  # fmt: skip
    prompt_tokens: int = opt(0, "format text: how many leading tokens are the prompt, the rest being the response; "
                                "0: the whole text is prompt.", must=least(0))  # fmt: skip
    obfuscate: Literal["prompt", "all"] = opt(
        "prompt", "Content tokens that are obfuscated. Generated tokens are always clean at inference, because the "
                  "server embeds them itself; `all` is for trunks used without generation.")  # fmt: skip
    obfuscate_template: bool = opt(False, "Also obfuscate template and special tokens of the prompt.")
    truncation: Literal["drop", "right", "left"] = opt(
        "right", "Samples longer than training.seq_len: dropped, or cut at the right (end of the response) or at the "
                 "left (start of the prompt).")  # fmt: skip
    min_prompt_tokens: int = opt(1, "Samples with fewer obfuscatable tokens are skipped (and counted).", must=least(0))
    packing: bool = opt(False, "Several samples in one row with document-masked attention (GPU). Without it each row "
                               "is one right-padded sample.")  # fmt: skip
    max_samples: int = opt(0, "Use only this many samples; 0: all.", must=least(0))
    validation_samples: int = opt(256, "Samples held out from training (chosen by hash of the row), for the probe "
                                       "and for the before/after table.", must=least(0))  # fmt: skip
    cache_dir: str = opt("", "Tokenized cache, shared by runs. Empty: <output_dir>/../.cache/data.")

    @property
    def called(self) -> str:
        """What is trained on, in a word or a few, for messages."""
        return self.source or ", ".join(self.sources)

    def tables(self) -> list[tuple[str, dict[str, Any]]]:
        """Key and table of every source that has one."""
        own = [("data.validation_source", self.validation_source)] if self.validation_source else []
        return [*((f"data.sources.{name}", table) for name, table in self.sources.items()), *own]


@dataclass(kw_only=True)
class TeacherCache:
    top_k: int = opt(0, "Store this many of the teacher's most probable tokens, and the mass of all others, when a sample "
                        "is first met, and read them when it is met again: a third less work from the second epoch on. "
                        "The vocabulary's size is exact; less changes the objective a little (docs/PERFORMANCE.md). 0: "
                        "off.", must=least(0))  # fmt: skip
    dir: str = opt("", "Where, on storage that all ranks share; as confidential as the data. Empty: in data.cache_dir.")


@dataclass(kw_only=True)
class Training:
    steps: int = opt(0, "Optimizer steps; 0: from `epochs`.", must=least(1, 0, "from epochs"))
    epochs: float = opt(1.0, "Passes over the data when `steps` is 0.")
    seq_len: int = opt(512, "Tokens per row.", must=least(2))
    local_batch_size: int = opt(4, "Rows per data-parallel rank in one forward pass.", must=least(1))
    global_batch_size: int = opt(-1, "Rows per optimizer step over all ranks and accumulation steps; -1: no "
                                     "accumulation. Keep it when the world size changes.", must=least(1, -1, "no accumulation"))  # fmt: skip
    loss_chunk_tokens: int = opt(0, "Tokens whose logits exist at a time; the value of the loss does not depend on it. 0: "
                                    "as many as have 64 Mi logits on a rank, 2 Mi on a CPU. Smaller saves memory, much "
                                    "smaller costs time.", must=least(0))  # fmt: skip
    max_norm: float = opt(1.0, "Gradient norm above which gradients are scaled down.", must=above(0))
    max_nonfinite_steps: int = opt(10, "A step with a non-finite loss or gradient is skipped on all ranks; this many "
                                       "in a row end the run.", must=least(1))  # fmt: skip
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = opt(
        "auto", "Compute type of the estimator, whose weights and optimizer stay in float32. auto: as trunk.dtype.")  # fmt: skip


@dataclass(kw_only=True)
class Optimizer:
    lr: float = opt(1e-3, "Peak learning rate of AdamW.", must=above(0))
    beta1: float = opt(0.9, "AdamW beta1.", must=share(one=False))
    beta2: float = opt(0.95, "AdamW beta2.", must=share(one=False))
    eps: float = opt(1e-8, "AdamW epsilon.", must=above(0))
    weight_decay: float = opt(0.01, "Decay of the bodies' matrices; norms and heads are never decayed, since zero "
                                    "heads mean no protection.", must=least(0))  # fmt: skip


@dataclass(kw_only=True)
class LRScheduler:
    warmup_steps: int = opt(50, "Linear warmup.", must=least(0))
    decay_ratio: float | None = opt(
        None, "Share of the run spent decaying; unset: decay starts after the warmup.", must=share()
    )
    decay_type: Literal["linear", "sqrt", "cosine"] = opt("cosine", "Shape of the decay.")
    min_lr_factor: float = opt(0.1, "Final learning rate as a share of the peak.", must=share())


@dataclass(kw_only=True)
class Parallelism:
    data_parallel_replicate_degree: int = opt(1, "HSDP: copies of the sharded weights (often the number of islands "
                                                 "with fast links); -1: what the other degrees leave.", must=least(1, -1, "what is left"))  # fmt: skip
    data_parallel_shard_degree: int = opt(
        -1, "FSDP2 shards; -1: what the other degrees leave.", must=least(1, -1, "what is left")
    )
    tensor_parallel_degree: int = opt(1, "Tensor parallelism, inside a node.", must=least(1))
    enable_sequence_parallel: bool = opt(True, "Activations between blocks sharded over the sequence under TP.")
    expert_parallel_degree: int = opt(1, "Expert parallelism of MoE trunks.", must=least(1))
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = opt(
        "default", "Free gathered weights after each layer's forward (less memory) or keep them (fewer gathers).")  # fmt: skip


@dataclass(kw_only=True)
class ActivationCheckpoint:
    mode: Literal["none", "selective", "full"] = opt(
        "none", "Recompute the student's activations in the backward pass: nothing, cheap operations, or whole "
                "layers (+2N flops a token). The teacher is never recomputed.")  # fmt: skip


@dataclass(kw_only=True)
class Compile:
    enable: Auto = opt(False, "torch.compile every block and the loss. The first step takes longer, half a minute on a CPU; the "
                              "others less. `auto`: after a few steps, where those that are left earn it back; the log says so.")  # fmt: skip


@dataclass(kw_only=True)
class Checkpoint:
    interval: int = opt(500, "Steps between checkpoints; the last step is always saved.", must=least(1))
    keep_latest: int = opt(
        3,
        "Committed checkpoints to keep; 0: all.",
        must=Must(
            "0 (all) or at least 2, since with 1 the only checkpoint is lost when a save is interrupted",
            lambda v: v == 0 or v >= 2,
        ),
    )
    asynchronous: bool = opt(True, "Write checkpoints while training goes on; false: wait for each.")
    accept_changes: bool = opt(False, "Go on from a checkpoint although trunk, data, objective or another option that "
                                      "decides what is learned has changed.")  # fmt: skip


@dataclass(kw_only=True)
class Metrics:
    log_every: int = opt(10, "Steps between log lines and TensorBoard points.", must=least(1))
    tensorboard: bool = opt(True, "Write TensorBoard events to <output_dir>/tb: one curve over all attempts.")
    wandb: bool = opt(False, "Also log to Weights & Biases (WANDB_* variables), all attempts as one run. Refused without its "
                             "package or a key.")  # fmt: skip
    probe_every: int = opt(100, "Steps between nearest-neighbour probes on held-out samples; 0: never.", must=least(0))
    probe_samples: int = opt(
        32, "Held-out samples in a probe, rounded up to whole pair groups (objective.mi_group).", must=least(1)
    )
    progress: bool = opt(True, "A live progress line with ETA on a terminal.")


@dataclass(kw_only=True)
class Comm:
    init_timeout_seconds: int = opt(600, "Timeout of collectives until the first step is done.", must=least(1))
    train_timeout_seconds: int = opt(300, "Timeout of collectives afterwards: a hung rank ends the job.", must=least(1))


@dataclass(kw_only=True)
class Export:
    at_end: bool = opt(True, "Export to <output_dir>/export when training completes.")
    embeddings: bool = opt(True, "Ship the embedding table in the export, so that a client needs nothing else.")
    dtype: Literal["float32", "bfloat16"] = opt("float32", "Type of the exported weights.")


@dataclass(kw_only=True)
class Config:
    """A whole run. ``docs/CONFIG.md`` is printed from this class."""

    run: Run = section(Run, "Identity of the run.")
    cluster: Cluster = section(Cluster, "Hardware the config was sized for.")
    trunk: Trunk = section(Trunk, "The frozen model.")
    estimator: Estimator = section(Estimator, "The trainable Stained Glass Transform (METHOD: a short trunk).")
    denoiser: Denoiser = section(Denoiser, "Cleaning up on the client, after the noise.")
    objective: Objective = section(Objective, "Utility and obfuscation losses (Eq. 3 and 11).")
    finetune: Finetune = section(Finetune, "The loss of run.task finetune.")
    data: Data = section(Data, "Samples, and which of their tokens are obfuscated.")
    teacher_cache: TeacherCache = section(TeacherCache, "The teacher's output on disk, for runs of several epochs.")
    training: Training = section(Training, "Batch, length, duration.")
    optimizer: Optimizer = section(Optimizer, "AdamW.")
    lr_scheduler: LRScheduler = section(LRScheduler, "Learning rate over the run.")
    parallelism: Parallelism = section(Parallelism, "How ranks share the work.")
    activation_checkpoint: ActivationCheckpoint = section(ActivationCheckpoint, "Memory for compute.")
    compile: Compile = section(Compile, "torch.compile.")
    checkpoint: Checkpoint = section(Checkpoint, "Saving and resuming.")
    metrics: Metrics = section(Metrics, "What is measured while training.")
    comm: Comm = section(Comm, "Collective timeouts.")
    export: Export = section(Export, "The result.")

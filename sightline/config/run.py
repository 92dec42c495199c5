"""What a run is made of: frozen dataclasses whose fields are the command line and whose docstrings are its help.

A value is checked once, in `__post_init__`; nothing edits a config later. The model's own config lives with the model
(`sightline.models`); `Run` only carries it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

from sightline.config.renamed import RenamedFields
from sightline.numbers import check_divisible

Model = TypeVar("Model")


def _positive(owner: str, **values: int | float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{owner}.{name} must be greater than 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class DataConfig(RenamedFields):
    """Where the text comes from and how it is packed into rows."""

    source: str = "python-stdlib"
    """`python-stdlib` is the source of this Python's own standard library.
    Else a file or folder of .txt, .md, .py or .jsonl, or `hf:NAME`, a Hugging Face dataset (needs the extra `hf`).
    `synthetic-images` is drawings and their captions, for models that see."""
    text_field: str = "text"
    """The field that holds the text in .jsonl files and Hugging Face datasets."""
    tokenizer: Path | None = None
    """A `tokenizer.json` to use.
    Without one, a byte-level BPE with the model's vocabulary is trained on the source and kept with the run."""
    packing: Literal["stream", "best_fit"] = "stream"
    """`stream` fills rows in order and carries a document over into the next row.
    `best_fit` cuts documents only where they are longer than a row, and pads what stays free."""
    validation_fraction: float = 0.05
    """Share of the documents held out for validation."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(f"data.validation-fraction must be at least 0 and under 1, got {self.validation_fraction}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how wide, and in which precision."""

    steps: int = 1000
    """Optimizer steps."""
    sequence_length: int = 2048
    """Tokens of a row (S)."""
    global_batch_size: int = 8
    """Rows an optimizer step."""
    micro_batch_size: int = 8
    """Rows a forward; global-batch-size / micro-batch-size forwards accumulate into one step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward; weights and optimizer stay in float32.
    bfloat16 (autocast) is for GPUs: most CPUs compute it several times slower than float32."""
    deterministic: bool = False
    """Only deterministic algorithms: slower on a GPU, the same bits on every run."""
    compile: bool = False
    """Compile every layer by torch.compile: faster on a GPU after a first step of minutes; no gain on a CPU."""
    loss: Literal["token_mean", "document_mean"] = "token_mean"
    """`token_mean` is cross-entropy, the mean over all tokens with a label.
    `document_mean` is the mean over documents of the mean over their tokens: each counts the same, however long."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward computes again instead of keeping it from the forward.
    `selective` keeps the results of matrix products and attention alone, `full` only what comes into a layer."""
    recompute_every: int = 1
    """Every n-th layer recomputes; 1 is all of them."""

    def __post_init__(self) -> None:
        _positive("training", steps=self.steps, global_batch_size=self.global_batch_size)
        _positive("training", micro_batch_size=self.micro_batch_size, recompute_every=self.recompute_every)
        if self.sequence_length < 2:
            raise ValueError(
                "training.sequence-length must be at least 2 (one token to see, one to predict), "
                f"got {self.sequence_length}"
            )
        batch, micro = self.global_batch_size, self.micro_batch_size
        check_divisible("training.global-batch-size", batch, "training.micro-batch-size", micro, "micro-batch sizes")


SCHEDULES = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many processes share what. replicate x shard x context x tensor x pipeline is the number of processes.

    Started by `torchrun --nproc-per-node N -m sightline train ...`; one process needs none of this.
    """

    replicate: int = 1
    """Copies of the (sharded) model, each with other rows."""
    shard: int = -1
    """Processes that share weights, gradients and moments, each with other rows (FSDP).
    -1 is all processes that the other degrees leave."""
    context: int = 1
    """Processes that share each row: its tokens, and the weights too, as with shard."""
    tensor: int = 1
    """Processes that share each layer's matrices, heads and vocabulary, and between these the tokens."""
    pipeline: int = 1
    """Processes in a row, each with some of the layers."""
    expert: int = 1
    """Processes that share the experts of a layer; they are taken out of shard x context and need no more processes."""
    pipeline_schedule: SCHEDULES = "1F1B"
    """The order in which pipeline stages work on microbatches.
    Interleaved1F1B, LoopedBFS and InterleavedZeroBubble give each process several stages, ZBVZeroBubble and DualPipeV
    two."""
    context_order: Literal["balanced", "contiguous", "headtail", "roundrobin"] = "balanced"
    """Which tokens of a row each process of `context` has. `balanced` gives all the same work under the run's masks."""
    offload: bool = False
    """Keep sharded weights, gradients and moments in the CPU's memory: slower, for models that do not fit otherwise."""
    timeout: int = 600
    """Seconds after which a process that waits for another one gives up and names it."""

    def __post_init__(self) -> None:
        for name in ("replicate", "context", "tensor", "pipeline", "expert", "timeout"):
            _positive("parallel", **{name: getattr(self, name)})
        if self.shard < 1 and self.shard != -1:
            raise ValueError(
                f"parallel.shard must be at least 1, or -1 for all processes the other degrees leave, got {self.shard}"
            )


OPTIMIZER_STATE = {"adamw": (2, 2), "muon": (1, 2)}
"""Numbers of state that an optimizer keeps for each number of a layer's matrix, and for each of any other parameter."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(RenamedFields):
    """The optimizer, its gradient clipping and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalizes the updates of the layers' matrices and leaves embedding, output projection, norms and
    biases to AdamW; its updates are as large as AdamW's, so learning rate and weight decay serve both."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    momentum: float = 0.95
    """Decay of Muon's momentum."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings; norms, biases and whatever else is no matrix are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """After the warm-up: half a cosine, a straight line, or constant with a linear end (warm-up-stable-decay)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0 to its peak."""
    decay_ratio: float = 0.2
    """Last share of the steps in which `wsd` decays."""
    min_lr_ratio: float = 0.1
    """Learning rate of the last step as a share of the peak."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZER_STATE:
            raise ValueError(f"optimizer.name must be one of {', '.join(OPTIMIZER_STATE)}, got {self.name!r}")
        _positive("optimizer", learning_rate=self.learning_rate, eps=self.eps, max_grad_norm=self.max_grad_norm)
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup-steps must be at least 0, got {self.warmup_steps}")
        for name, value in (("decay-ratio", self.decay_ratio), ("min-lr-ratio", self.min_lr_ratio)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"optimizer.{name} must lie between 0 and 1, got {value}")
        for beta in self.betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"optimizer.betas must lie in [0, 1), got {self.betas}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"optimizer.momentum must lie in [0, 1), got {self.momentum}")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight-decay must be at least 0, got {self.weight_decay}")


class BackendName(str):
    """`auto`, or the name of a backend in `sightline.attention`; the command line knows its options by this type."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The kernel that honours the masks."""

    backend: str | BackendName = "auto"
    """`auto` chooses by device, dtype and mask, and the log says what it chose and why. `tiled` trains on a CPU, `flex`
    and `varlen` on CUDA, `sdpa` anywhere; `reference` is the slow truth."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Loss on held-out documents."""

    every: int = 100
    """Steps between validations, and one after the last step; 0 is never."""
    rows: int = 16
    """Rows of a validation, the same ones every time."""

    def __post_init__(self) -> None:
        _positive("validation", rows=self.rows)
        if self.every < 0:
            raise ValueError(f"validation.every must be at least 0, got {self.every}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept so that a run can go on."""

    every: int = 500
    """Steps between checkpoints; one is always written at the end and on SIGTERM or Ctrl-C, and with 0 only then."""
    keep: int = 2
    """Newest checkpoints kept."""
    resume: str = "auto"
    """`auto` continues from the newest checkpoint of the output directory where there is one.
    `never` starts anew in an empty directory; a path names the checkpoint, or the run, to continue from."""
    asynchronous: bool = False
    """Write checkpoints while the next steps are taken, instead of making them wait for the disk.
    Until one is written, the CPU's memory holds a copy of each process's weights and moments."""
    export: bool = False
    """At the end, also write the model as a Hugging Face directory that transformers loads: hf/step-N.
    `sightline convert` does the same for any checkpoint later."""

    def __post_init__(self) -> None:
        _positive("checkpoint", keep=self.keep)
        if self.every < 0:
            raise ValueError(f"checkpoint.every must be at least 0, got {self.every}")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written down beside metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str | None = None
    """Weights & Biases project to log to (needs the extra `wandb`)."""
    sample_prompt: str = "def "
    """Prompt of the text generated at the end of the run."""
    sample_tokens: int = 120
    """Tokens of that text; 0 is none."""


@dataclass(frozen=True, kw_only=True)
class Run(Generic[Model]):
    """Everything that decides a run. A recipe is one of these."""

    model: Model
    """The model's own config: its sizes."""
    model_from: Path | None = None
    """A Hugging Face directory (config.json, safetensors) whose weights the run begins with.
    Its config decides the sizes of the model, and its tokenizer is the run's where data.tokenizer names no other."""
    output_dir: Path = Path("runs/default")
    """Where the run is kept. The same command on the same directory continues where it stopped."""
    seed: int = 0
    """Decides initial weights and the order of documents."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

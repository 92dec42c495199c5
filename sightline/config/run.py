"""The config of a run: frozen dataclasses whose fields are command-line options and whose docstrings are their help.

`__post_init__` validates a config; nothing modifies it afterwards. Model configs are defined with the models
(`sightline.models`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

from sightline.config.checks import check_not_negative, check_positive, check_seed, check_text, check_values
from sightline.config.renamed import RenamedFields

Model = TypeVar("Model")


@dataclass(frozen=True, kw_only=True)
class DataConfig(RenamedFields):
    """Source of the documents, and how they are packed into rows."""

    source: str = "python-stdlib"
    """Source of the documents: `python-stdlib`, `synthetic-images`, `hf:NAME` or a path.
    `python-stdlib` is the source code of the standard library of the running Python.
    `synthetic-images` is generated images with captions, for vision-language models.
    `hf:NAME` is the train split of a Hugging Face dataset (needs the extra `data`).
    A path is a .txt, .md, .py or .jsonl file, or a folder of such files."""
    text_field: str = "text"
    """Name of the text field in .jsonl files and Hugging Face datasets."""
    tokenizer: Path | None = None
    """Tokenizer to load: a `tokenizer.json`, or a folder that contains one.
    By default, a byte-level BPE tokenizer is trained on the source, with the model's vocabulary size."""
    packing: Literal["stream", "best_fit"] = "stream"
    """How documents are packed into rows.
    `stream` concatenates documents and splits them at row boundaries, without padding.
    `best_fit` splits only documents longer than a row, and pads rows."""
    validation_fraction: float = 0.05
    """Fraction of the documents held out for validation."""
    epochs: int | None = None
    """Number of epochs to train, instead of --training.steps; each has every training document once.
    The last step is padded. Without it, the run has --training.steps steps and repeats the documents as needed."""
    cache_dir: Path | None = None
    """Directory in which the tokens of the documents are kept for later runs.
    By default, `sightline` in the user's cache directory ($XDG_CACHE_HOME or ~/.cache)."""

    def __post_init__(self) -> None:
        check_values(self, "data")
        if not self.source:
            raise ValueError(
                "data.source is empty; expected `python-stdlib`, `synthetic-images`, `hf:NAME` or a path: use "
                "--data.source PATH"
            )
        if self.epochs is not None:
            check_positive("data", self, "epochs")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(
                f"data.validation-fraction must be at least 0 and less than 1, got {self.validation_fraction}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training length, batch size, precision, loss and activation checkpointing."""

    steps: int = 1000
    """Number of optimizer steps. --data.epochs sets it from the number of documents."""
    sequence_length: int = 2048
    """Tokens per row (S)."""
    global_batch_size: int = 8
    """Rows per optimizer step, over all data-parallel ranks."""
    micro_batch_size: int = 8
    """Rows per forward pass on each rank, at most; a rank with fewer rows per step uses all of them.
    The other rows of a step are gradient accumulation steps, or the micro-batches of a pipeline schedule."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type; `auto` selects CUDA if available."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward; weights and optimizer state are float32.
    bfloat16 (autocast) is for GPUs: most CPUs compute it several times slower than float32."""
    deterministic: bool = False
    """Use only deterministic algorithms: runs are bitwise reproducible, but slower on a GPU."""
    compile: bool = False
    """Compile each layer with torch.compile: faster on GPUs, no gain on CPUs.
    The first step takes minutes."""
    loss: Literal["token_mean", "document_mean"] = "token_mean"
    """Reduction of the cross-entropy loss.
    `token_mean` is the mean over all tokens with a label.
    `document_mean` first takes the mean within each document, so that all documents have the same weight."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: which activations the backward recomputes.
    `selective` saves only the outputs of matrix products and attention, `full` only the input of each layer."""
    recompute_every: int = 1
    """Apply activation checkpointing to every n-th layer; 1 means all layers."""

    def __post_init__(self) -> None:
        check_values(self, "training")
        check_positive("training", self, "steps", "global_batch_size", "micro_batch_size", "recompute_every")
        if self.sequence_length < 2:
            raise ValueError(
                f"training.sequence-length must be at least 2 (one input token, one label), got {self.sequence_length}"
            )

    def rows_per_forward(self, rows: int) -> int:
        """Return the rows of each forward pass on a rank that has `rows` rows per step."""
        return min(self.micro_batch_size, rows)


SCHEDULES = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]


LONGEST_TIMEOUT = 7 * 24 * 60 * 60
"""Longest `parallel.timeout` in seconds. Parts of PyTorch count milliseconds in 32 bits, which is 24 days."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism degrees. replicate x shard x context x tensor x pipeline must equal the number of ranks.

    Start several ranks with `torchrun --nproc-per-node N -m sightline train ...`; a single process needs no options.
    """

    replicate: int = 1
    """Data-parallel replicate degree: number of model replicas, as in DDP and HSDP."""
    shard: int = -1
    """Data-parallel shard degree (FSDP): ranks that shard weights, gradients and optimizer state.
    -1 uses all ranks that the other degrees leave."""
    context: int = 1
    """Context parallel degree: ranks that split the tokens of each row.
    Weights, gradients and optimizer state are sharded across these ranks too."""
    tensor: int = 1
    """Tensor parallel degree: ranks that split weight matrices, heads and vocabulary.
    Between these layers, the tokens are split instead (sequence parallelism)."""
    pipeline: int = 1
    """Pipeline parallel degree: ranks across which the layers are split into stages."""
    expert: int = 1
    """Expert parallel degree: ranks that split the experts of each MoE layer.
    It reuses the ranks of shard x context, so it does not change the number of ranks."""
    pipeline_schedule: SCHEDULES = "1F1B"
    """Pipeline schedule.
    Interleaved1F1B, LoopedBFS and InterleavedZeroBubble place several stages on each rank.
    ZBVZeroBubble and DualPipeV place two stages on each rank."""
    context_order: Literal["balanced", "contiguous", "headtail", "roundrobin"] = "balanced"
    """How context parallelism assigns the tokens of a row to ranks.
    `balanced` equalizes the attention work of all ranks under the masks of the run."""
    context_balance: float = 1.05
    """Attention work that a rank may have in the order `balanced`, as a multiple of the mean, at least 1.
    Ranks receive fewer keys if it is greater; `sightline plan` shows how many."""
    offload: bool = False
    """Offload sharded weights, gradients and optimizer state to CPU memory: slower, for models that do not fit."""
    timeout: int = 600
    """Seconds that a rank waits for another rank before it aborts and names the missing rank."""

    def __post_init__(self) -> None:
        check_values(self, "parallel")
        check_positive("parallel", self, "replicate", "context", "tensor", "pipeline", "expert", "timeout")
        if self.timeout > LONGEST_TIMEOUT:
            raise ValueError(
                f"parallel.timeout must be at most {LONGEST_TIMEOUT} seconds (one week), got {self.timeout}"
            )
        if self.context_balance < 1:
            raise ValueError(
                "parallel.context-balance must be at least 1, the work of all ranks being equal, got "
                f"{self.context_balance}; the default is 1.05"
            )
        if self.shard < 1 and self.shard != -1:
            raise ValueError(
                f"parallel.shard must be at least 1, or -1 for all ranks that the other degrees leave, got {self.shard}"
            )


OPTIMIZER_STATE = {"adamw": (2, 2), "muon": (1, 2)}
"""Optimizer state values per element of a weight matrix of a layer, and per element of any other parameter."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(RenamedFields):
    """Optimizer, gradient clipping and learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer: `adamw`, or `muon` for the weight matrices of the layers.
    `muon` uses AdamW for the embedding, the output projection, norms and biases.
    Its updates are scaled to the size of AdamW's, so the same learning rate and weight decay apply."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's running averages of the gradient and of its square."""
    eps: float = 1e-8
    """Term added to the denominator of AdamW's update for numerical stability."""
    momentum: float = 0.95
    """Momentum of Muon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, applied to matrices and embeddings only."""
    max_grad_norm: float = 1.0
    """Maximum global gradient norm; larger gradients are scaled down to it."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Learning-rate schedule after warm-up.
    `cosine` and `linear` decay over all remaining steps; `wsd` (warmup-stable-decay) first stays at the peak."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0 to its peak."""
    decay_ratio: float = 0.2
    """Fraction of the steps, at the end of the run, in which `wsd` decays."""
    min_lr_ratio: float = 0.1
    """Learning rate of the last step as a fraction of the peak."""

    def __post_init__(self) -> None:
        check_values(self, "optimizer")
        check_positive("optimizer", self, "learning_rate", "eps", "max_grad_norm")
        check_not_negative("optimizer", self, "warmup_steps", "weight_decay")
        for name, value in (("decay-ratio", self.decay_ratio), ("min-lr-ratio", self.min_lr_ratio)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"optimizer.{name} must be between 0 and 1, got {value}")
        for beta in self.betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"optimizer.betas must be in [0, 1), got {self.betas}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"optimizer.momentum must be in [0, 1), got {self.momentum}")


class BackendName(str):
    """`auto`, or the name of a backend in `sightline.attention`. The command line finds its choices by this type."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention kernel."""

    backend: str | BackendName = "auto"
    """Attention backend.
    `auto` selects by device, dtype and mask, and logs its choice with the reason.
    `flex` and `varlen` run on CUDA, `native` and `tiled` on CPUs, `sdpa` on both.
    `reference` is slow, for comparisons."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Loss on held-out documents."""

    every: int = 100
    """Validate every n steps and after the last step; 0 disables validation."""
    rows: int = 16
    """Rows per validation; every validation uses the same rows."""

    def __post_init__(self) -> None:
        check_values(self, "validation")
        check_positive("validation", self, "rows")
        check_not_negative("validation", self, "every")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints and export."""

    every: int = 500
    """Save a checkpoint every n steps; 0 saves only at the end of the run.
    The end of a run, SIGTERM and Ctrl-C always save one."""
    keep: int = 2
    """Number of checkpoints to keep; older ones are deleted, except the newest that was verified at a start."""
    resume: str = "auto"
    """Checkpoint to resume from: `auto`, `never` or a path.
    `auto` resumes from the newest checkpoint in the output directory, or starts a new run if there is none.
    `never` starts a new run and needs an empty output directory. A path is a checkpoint or a run directory."""
    verify: bool = True
    """Verify the checksums of a checkpoint before resuming from it, with the work shared between ranks.
    `auto` passes over a damaged checkpoint, renames it and resumes from the one before; a path refuses damage."""
    asynchronous: bool = False
    """Write checkpoints in the background while training continues.
    Each rank keeps a copy of its weights and optimizer state in CPU memory until the checkpoint is written."""
    export: bool = False
    """At the end of the run, export the model to hf/step-N, a Hugging Face directory for transformers.
    `sightline convert` exports any checkpoint."""

    def __post_init__(self) -> None:
        check_values(self, "checkpoint")
        check_positive("checkpoint", self, "keep")
        check_not_negative("checkpoint", self, "every")
        if not self.resume:
            raise ValueError(
                "checkpoint.resume is empty; expected `auto`, `never` or the path of a checkpoint or a run directory: "
                "use --checkpoint.resume auto"
            )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging in addition to metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Weights & Biases project to log to (needs the extra `wandb`)."""
    sample_prompt: str = "def "
    """Prompt of the sample text generated at the end of the run."""
    sample_tokens: int = 120
    """Maximum number of tokens of the sample text; 0 generates none."""

    def __post_init__(self) -> None:
        check_values(self, "logging")
        check_not_negative("logging", self, "sample_tokens")
        if self.wandb == "":
            raise ValueError(
                "logging.wandb is empty; expected the name of a Weights & Biases project: --logging.wandb NAME"
            )
        check_text("logging.sample-prompt", self.sample_prompt)


@dataclass(frozen=True, kw_only=True)
class Run(Generic[Model]):
    """Complete configuration of a run. A recipe is a `Run`."""

    model: Model
    """Model architecture."""
    model_from: Path | None = None
    """Pretrained weights to start from: a Hugging Face directory, or the name of a model on the Hub: Qwen/Qwen3-0.6B.
    Its config.json sets the model architecture. Its tokenizer is used unless --data.tokenizer is given."""
    output_dir: Path = Path("runs/default")
    """Directory of the run. The same command with the same directory resumes an interrupted run."""
    seed: int = 0
    """Random seed of the initial weights and of the order of documents."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        check_values(self.model, "model")

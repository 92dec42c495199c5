"""The trainer: runs a training run from its config to the final summary."""

from __future__ import annotations

import math
import shlex
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sightline.batch import Batch
from sightline.config import Run
from sightline.data import (
    Batches,
    DataLoader,
    Documents,
    open_loader,
    open_validation,
    split_documents,
    train_tokenizer,
)
from sightline.errors import NonFiniteLoss, RunFailed, Stopped
from sightline.generation import SamplingConfig, generate
from sightline.masks import named_masks
from sightline.models import family_of
from sightline.models.hf.directory import read_pretrained
from sightline.models.hf.files import holds_weights
from sightline.models.hf.source import find_pretrained
from sightline.parallel.apply import build_parallel
from sightline.parallel.host import HostGroup
from sightline.parallel.launch import distributed_session, record_step, wait_for_device
from sightline.parallel.mesh import Mesh
from sightline.training.checkpoint import (
    TOKENIZER,
    CannotSave,
    Progress,
    load_checkpoint,
    tensors,
)
from sightline.training.checkpoint_directory import find_latest
from sightline.training.device import choose_device, make_reproducible
from sightline.training.export import export_checkpoint
from sightline.training.flops import find_peak
from sightline.training.metrics import Metrics
from sightline.training.optimizer import build_optimizer
from sightline.training.report import (
    family_option,
    log_data,
    log_kernels,
    log_model,
    log_summary,
    plot_batch_masks,
    plot_losses,
)
from sightline.training.resume import acquire_start
from sightline.training.run_directory import RunDirectory, settings
from sightline.training.same_on_all_ranks import check_same
from sightline.training.saver import Saver
from sightline.training.schedule import learning_rate
from sightline.training.setup import check_start, open_files, read_documents
from sightline.training.signals import StopRequest
from sightline.training.step import StepResult, train_step, validate
from sightline.training.terminal import Terminal


def train(run: Run, terminal: Terminal | None = None, *, batches: Batches | None = None) -> Path:
    """Train a run and return its output directory. Calling it again with the same directory resumes the run.

    terminal  terminal for the log; default: standard output
    batches   your own batches instead of `run.data.source`: an iterable of `Batch`, one per optimizer step, or a
              function of (rank, world) that returns the iterable of a data-parallel rank. An iterable with `state_dict`
              and `load_state_dict` resumes exactly. No batches are held out, and the run must name the tokenizer.

    Raises:
        ValueError: if the run is invalid or cannot be resumed.
        Stopped: after a signal; see `sightline.errors`.
        RunFailed: if the run cannot continue.
    """
    if run.model_from and find_latest(RunDirectory(run.output_dir).checkpoints) is None:
        find_pretrained(run.model_from, (family_of(run.model),))  # a download may take longer than parallel.timeout
    with distributed_session(run.parallel, choose_device(run.training)) as device, ExitStack() as opened:
        Trainer(run, device, terminal or Terminal(), opened, batches).train()
    return run.output_dir


@dataclass(frozen=True)
class PendingStep:
    """A step that was launched on the device and may not be finished."""

    step: int
    started: float
    epoch: float | None
    learning_rate: float
    result: StepResult


class Trainer:
    """Runs one training run. Resources that it opens are closed with the exit stack `opened`."""

    stop_requested = False  # whether a rank had received a stop signal when the newest step that was read ended
    masks_are_plotted = False
    last_read = 0.0  # time when it was read

    def __init__(
        self, run: Run, device: torch.device, terminal: Terminal, opened: ExitStack, batches: Batches | None = None
    ) -> None:
        self.run, self.device, self.host = run, device, HostGroup()
        kernel = check_start(run, device, self.host)
        run_settings = settings(run, kernel)
        self.mesh = mesh = Mesh(run.parallel, device)
        self.terminal = terminal = terminal if mesh.rank == 0 else Terminal(Console(quiet=True))
        self.start_time = time.perf_counter()
        make_reproducible(run.seed, run.training.deterministic)
        self.directory = RunDirectory(run.output_dir)
        start, changes = acquire_start(self.directory, run.checkpoint, run_settings, self.host, opened)
        training, held_out, pretrained = self.read_data(start, batches)
        # Rank 0 chooses by the option again, to log why; the others use what it uses.
        backend = run.attention.backend if mesh.rank == 0 or kernel is None else kernel
        self.model = build_parallel(run.model, run.training, mesh, attention_backend=backend)
        if pretrained:
            read_pretrained(self.model.full_model, pretrained, self.model.state_dict)
        self.optimizer = build_optimizer(self.model, run.optimizer)
        self.open_batches(training, held_out, batches, opened)
        self.peak = find_peak(device, run.training.dtype)
        run_files, checkpoints = self.directory.kept_with_checkpoints, self.directory.checkpoints
        self.saver = opened.enter_context(closing(Saver(checkpoints, run_files, run.checkpoint, terminal.warn, mesh)))
        if run.checkpoint.verify:
            self.saver.verified = start
        self.step = self.first_step = self.resume_from(start) if start else 0
        self.steps = run.training.steps if self.loader.steps is None else self.loader.steps

        self.metrics: Metrics | None = None  # rank 0 writes for all
        if mesh.rank == 0:
            self.directory.write_config(run_settings)
            metrics = Metrics(self.directory.path, run.logging, self.step, run_settings)
            self.metrics = opened.enter_context(closing(metrics))
            self.saver.before_save = metrics.file.sync
        self.reads_immediately = device.type == "cpu"  # a CPU step is finished when it returns
        terminal.table({"epoch": self.loader.describe()})
        log_model(terminal, run.training, self.model, run.model_from, self.peak)
        for change in changes:
            terminal.warn(change)
        if self.step >= self.steps:
            terminal.log(f"all {self.steps} steps are done (now at step {self.step}): nothing left to train")

    def read_data(self, start: Path | None, batches: Batches | None) -> tuple[Documents, Documents, Path | None]:
        """Open or train the tokenizer; return training and held-out documents, and the pretrained model to read."""
        run, host = self.run, self.host
        pretrained = find_pretrained(run.model_from, (family_of(run.model),)) if run.model_from and not start else None
        path, vocab_size = start / TOKENIZER if start else run.data.tokenizer or pretrained, run.model.vocab_size
        tokenizer = host.from_rank_zero(lambda: open_files(run, path, pretrained))
        documents = Documents.from_texts([], source="your batches")
        if batches is None:
            documents = read_documents(run.data, host)
        training, held_out = split_documents(documents, run.data.validation_fraction if documents else 0)
        log_data(self.terminal, run.output_dir, documents, held_out, path, vocab_size, start)
        source = start or (None if run.data.tokenizer else pretrained)
        self.tokenizer = host.from_rank_zero(
            lambda: self.directory.keep_tokenizer(tokenizer or train_tokenizer(training, vocab_size), source)
        )
        check_same(host, {"data": training.digest, "tokenizer": self.tokenizer.fingerprint})
        return training, held_out, pretrained

    def open_batches(
        self, training: Documents, held_out: Documents, batches: Batches | None, opened: ExitStack
    ) -> None:
        """Open the training and the validation batches."""
        run, tokenizer = self.run, self.tokenizer
        shared: dict[str, Any] = {
            "images": self.model.full_model.image_sizes,
            "rank": self.mesh.index("data"),
            "world": self.mesh.size("data"),
        }

        def open_training() -> DataLoader:
            return open_loader(run.data, run.training, training, tokenizer, batches=batches, seed=run.seed, **shared)

        loader = self.host.first_of_each_machine(open_training) if batches is None else open_training()
        self.loader = opened.enter_context(closing(loader))
        self.validation = open_validation(run.data, run.training, run.validation, held_out, tokenizer, **shared)

    def train(self) -> None:
        """Train until the last step or the first signal."""
        steps = self.steps
        with StopRequest() as stop, self.terminal.progress(self.step, steps):
            pending: PendingStep | None = None
            while self.step < steps and not self.stop_requested:
                launched = self.launch_step(stop)
                if pending:
                    self.write(self.read(pending))  # while the device computes the next step
                pending = launched
                if self.reads_immediately or self.validation_is_due() or self.saver.is_due(self.step):
                    self.finish(pending)
                    pending = None
            if pending:
                self.finish(pending)
            self.saver.save_last(*self.checkpoint_state())
        if self.mesh.rank == 0:
            plot_losses(self.terminal, self.directory, self.run.data.source)
        if self.step < steps:
            signal = self.host.broadcast(max(self.host.gather(stop.received or 0), default=0))
            raise Stopped(signal, self.step, self.saver.latest())
        if self.run.checkpoint.export:
            self.export()
        self.write_sample()
        if self.mesh.rank == 0:
            seconds = time.perf_counter() - self.start_time
            more_text = f"{family_option(self.run.model)} --prompt {shlex.quote(self.run.logging.sample_prompt)}"
            log_summary(self.terminal, self.directory, more_text, seconds)

    def launch_step(self, stop: StopRequest) -> PendingStep:
        """Launch the next step on the device, without waiting for its result."""
        record_step(self.step)
        started = time.perf_counter()
        batch = next(self.loader)
        if not self.masks_are_plotted and self.mesh.rank == 0:
            self.plot_masks(batch)
            started = time.perf_counter()
        self.step += 1
        rate = learning_rate(self.step, self.run.optimizer, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = train_step(
            self.model,
            self.optimizer,
            batch,
            self.tokenizer,
            micro_batch_size=self.run.training.micro_batch_size,
            max_grad_norm=self.run.optimizer.max_grad_norm,
            stop=stop,
        )
        if self.step == self.first_step + 1:
            log_kernels(self.terminal, self.model.attention_kernels)
        return PendingStep(self.step, started, self.loader.epoch, rate, result)

    def plot_masks(self, batch: Batch) -> None:
        """Plot the masks of the first batch, and again those of the first one with several documents in a row."""
        last_document, row = (int(value) for value in batch.document_ids.amax(1).max(0))
        is_first = self.step == self.first_step
        if is_first and self.directory.mask_plot.exists():
            self.masks_are_plotted = True  # by an earlier start
        elif is_first or last_document > 0:
            masks = named_masks(self.model.get_attention_masks(batch, self.tokenizer))
            plot_batch_masks(self.terminal, self.directory, masks, row)
            self.masks_are_plotted = last_document > 0

    def read(self, pending: PendingStep) -> dict[str, Any]:
        """Return the metrics of a step, after waiting for the device.

        All ranks read the same number of stop requests of the same step, so they stop after the same step.

        Raises:
            NonFiniteLoss: if the loss or the gradient norm is not finite.
        """
        result = pending.result
        wait_for_device(self.device)
        sums, grad_norm = result.sums.read(), result.grad_norm.item()
        self.stop_requested = self.stop_requested or sums["stop_requests"] > 0
        loss, tokens = sums["loss"], round(sums["tokens"])
        now = time.perf_counter()
        seconds = now - max(pending.started, self.last_read)
        self.last_read = now
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteLoss(pending.step, loss, grad_norm, self.saver.latest())
        flops = self.model.full_model.flops_per_token() * tokens + sums["attention_flops"]
        return {
            "step": pending.step,
            **({} if pending.epoch is None else {"epoch": pending.epoch}),
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": pending.learning_rate,
            "tokens": tokens,
            "packing_fill": tokens / sums["padded_tokens"],
            "visible_pairs": round(sums["visible_pairs"]),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / (self.peak.flops * self.mesh.world),
            **{name: value.item() for name, value in result.model_metrics.items()},
        }

    def finish(self, pending: PendingStep) -> None:
        """Wait for a step, write its metrics, and validate and save if due."""
        row = self.read(pending)
        if self.validation_is_due():
            row["validation_loss"] = validate(self.model, self.validation, self.tokenizer)
        self.write(row)
        self.saver.check()
        if self.saver.is_due(self.step):
            self.saver.save(*self.checkpoint_state())

    def write(self, row: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write(row)
        self.terminal.step(row)

    def validation_is_due(self) -> bool:
        """Whether validation is due after the current step."""
        every = self.run.validation.every
        return bool(self.validation) and (self.step % every == 0 or self.step == self.steps)

    def checkpoint_state(self) -> tuple[dict[str, Any], Progress]:
        """Return the tensors and the progress for a checkpoint of the current step."""
        return tensors(self.model, self.optimizer, self.device), Progress(self.step, self.loader.state_dict())

    def resume_from(self, checkpoint: Path) -> int:
        """Load tensors, random number state and loader state. Returns the step of the checkpoint."""
        state = tensors(self.model, self.optimizer, self.device)
        progress = load_checkpoint(checkpoint, state, self.device, self.mesh, self.host)
        warning = self.loader.load_state_dict(progress.loader)
        if warning:
            self.terminal.warn(warning)
        return progress.step

    def export(self) -> None:
        """Export the trained model in Hugging Face format, unless it exists.

        Raises:
            RunFailed: if it cannot be written.
        """
        checkpoint = self.host.from_rank_zero(self.saver.latest)
        assert checkpoint is not None, "a finished run has a checkpoint"
        output = self.directory.exported / checkpoint.name
        if self.host.from_rank_zero(lambda: holds_weights(output)):
            return
        try:
            export_checkpoint(checkpoint, output, host=self.host)
        except CannotSave as error:
            paths = shlex.join([str(checkpoint), str(output)])
            command = f"sightline convert {paths}{family_option(self.run.model)}"
            raise RunFailed(f"{error}. Free some space, then run: {command}") from error
        self.terminal.log(f"exported for transformers: {output}")

    def write_sample(self) -> None:
        """Generate a text sample."""
        logging = self.run.logging
        if logging.sample_tokens:
            sampling = SamplingConfig(max_new_tokens=logging.sample_tokens, seed=self.run.seed)
            text = generate(self.model.generation_model, self.tokenizer, logging.sample_prompt, sampling)
            self.terminal.sample(logging.sample_prompt, text)

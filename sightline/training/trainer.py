"""A training run, from its config to its report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sightline.config import Run
from sightline.data import load_documents, split_documents
from sightline.generation import SamplingConfig, generate
from sightline.masks import named_masks
from sightline.models.hf.directory import read_pretrained
from sightline.models.hf.files import holds_weights
from sightline.parallel.apply import build_parallel, check_rows
from sightline.parallel.launch import joined, meet
from sightline.parallel.mesh import Mesh
from sightline.training.checkpoint import (
    CannotSave,
    Progress,
    find_latest,
    load_checkpoint,
    remove_partial,
    tensors,
)
from sightline.training.errors import NonFiniteLoss, RunFailed, SaveFailed, Stopped
from sightline.training.export import export_checkpoint
from sightline.training.flops import find_peak
from sightline.training.metrics import Metrics
from sightline.training.optimizer import build_optimizer, learning_rate
from sightline.training.report import (
    announce_data,
    announce_kernels,
    announce_model,
    draw_first_masks,
    draw_losses,
    tell_end,
)
from sightline.training.resume import check_continues, find_start
from sightline.training.run_directory import RunDirectory, settings
from sightline.training.saver import Saver
from sightline.training.setup import choose_device, get_tokenizer, make_reproducible, open_loader, open_validation
from sightline.training.signals import StopRequest
from sightline.training.step import StepResult, train_step
from sightline.training.terminal import Terminal
from sightline.training.validation import validate


def train(run: Run, terminal: Terminal | None = None) -> None:
    """Train what `run` describes and leave its directory full.

    Errors: ValueError for what cannot be trained or continued; Stopped after a signal; RunFailed when it cannot go on.
    """
    with joined(run.parallel, choose_device(run.training)) as device, ExitStack() as opened:
        Trainer(run, device, terminal or Terminal(), opened).train()


@dataclass(frozen=True)
class Taken:
    """A step that the device has been given; its numbers may still be on their way."""

    step: int
    started: float
    learning_rate: float
    result: StepResult


class Trainer:
    """One run, from its config to its report. What it opens is closed with `opened`."""

    def __init__(self, run: Run, device: torch.device, terminal: Terminal, opened: ExitStack) -> None:
        self.run, self.device = run, device
        self.mesh = mesh = Mesh(run.parallel, device)
        self.terminal = terminal = terminal if mesh.rank == 0 else Terminal(Console(quiet=True))
        self.began = time.perf_counter()
        check_rows(run.training, mesh)
        make_reproducible(run)
        self.directory = RunDirectory(run.output_dir)
        start, changes = mesh.from_first(lambda: self.begin(opened))

        documents = load_documents(run.data)
        training, held_out = split_documents(documents, run.data.validation_share)
        announce_data(terminal, run, documents, held_out, start)
        self.tokenizer = mesh.from_first(lambda: get_tokenizer(run, training, start))
        self.model = build_parallel(run, mesh)
        if run.model_from and not start:
            read_pretrained(self.model.whole, run.model_from, self.model.state_dict())
        self.optimizer = build_optimizer(self.model, run.optimizer)
        data_rank, data_ranks = mesh.index("data"), mesh.size("data")
        self.loader = opened.enter_context(
            closing(open_loader(run, training, self.tokenizer, rank=data_rank, world=data_ranks))
        )
        self.validation = open_validation(run, held_out, self.tokenizer, rank=data_rank, world=data_ranks)
        self.peak = find_peak(device, run.training.dtype)
        saver = Saver(
            self.directory.checkpoints,
            self.directory.kept_with_checkpoints,
            keep=run.checkpoint.keep,
            asynchronous=run.checkpoint.asynchronous,
        )
        self.saver = opened.enter_context(closing(saver))
        self.step = self.first_step = self.continue_from(start) if start else 0

        self.metrics: Metrics | None = None  # rank 0 writes for all
        if mesh.rank == 0:
            self.directory.write(run, self.tokenizer)
            metrics = Metrics(self.directory.path, run.logging, self.step, settings(run))
            self.metrics = opened.enter_context(closing(metrics))
        self.last_read = 0.0
        self.reads_at_once = device.type == "cpu"  # there a step has its numbers when it returns
        announce_model(terminal, run, self.model, self.peak)
        for change in changes:
            terminal.warn(change)
        if self.step >= run.training.steps:
            terminal.say(f"all {run.training.steps} steps are done (now at {self.step}): nothing is left to train")

    def begin(self, opened: ExitStack) -> tuple[Path | None, list[str]]:
        """Take the directory; the checkpoint to continue from, and what has changed since it."""
        start = find_start(self.run, self.directory)
        changes = check_continues(start, self.run) if start else []
        opened.enter_context(self.directory.lock())
        remove_partial(self.directory.checkpoints)
        return start, changes

    def train(self) -> None:
        """Step by step to the last one, or to the first signal."""
        steps = self.run.training.steps
        with StopRequest() as stop, self.terminal.progress(self.step, steps):
            waiting: Taken | None = None
            while self.step < steps and not self.stops(stop):
                taken = self.take_step()
                if waiting:
                    self.write(self.read(waiting))  # while the device works on the step just given to it
                waiting = taken
                if self.reads_at_once or self.validates() or self.saves():
                    self.finish(waiting)
                    waiting = None
            if waiting:
                self.finish(waiting)
            self.save(at_the_end=True)
        if self.mesh.rank == 0:
            draw_losses(self.terminal, self.run, self.directory)
        if stop.received is not None and self.step < steps:
            raise Stopped(stop.received, self.step, self.last_checkpoint())
        if self.run.checkpoint.export:
            self.export()
        self.write_sample()
        if self.mesh.rank == 0:
            tell_end(self.terminal, self.run, self.directory, time.perf_counter() - self.began)

    def stops(self, stop: StopRequest) -> bool:
        """Whether a signal came, to this process or to any other: all leave after the same step."""
        received = meet(self.step, stop.received)
        if received is not None:  # else one may have come in the meantime: the next step will see it
            stop.received = received
        return received is not None

    def take_step(self) -> Taken:
        """Give the next step to the device. Nothing here waits for its result."""
        started = time.perf_counter()
        batch = next(self.loader)
        if self.step == self.first_step and self.mesh.rank == 0:
            masks = named_masks(self.model.get_attention_masks(batch, self.tokenizer))
            draw_first_masks(self.terminal, self.directory, masks)
            started = time.perf_counter()
        self.step += 1
        rate = learning_rate(self.step, self.run.optimizer, self.run.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = train_step(
            self.model,
            self.optimizer,
            batch,
            self.tokenizer,
            micro_batch_size=self.run.training.micro_batch_size,
            max_grad_norm=self.run.optimizer.max_grad_norm,
        )
        if self.step == self.first_step + 1:
            announce_kernels(self.terminal, self.model.kernels)
        return Taken(self.step, started, rate, result)

    def read(self, taken: Taken) -> dict[str, Any]:
        """The row of a step. Waits for the device to have taken it.

        Errors: NonFiniteLoss.
        """
        result = taken.result
        sums, grad_norm = result.read(), result.grad_norm.item()
        loss, tokens = sums["loss"], round(sums["tokens"])
        now = time.perf_counter()
        seconds = now - max(taken.started, self.last_read)
        self.last_read = now
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteLoss(taken.step, loss, grad_norm, self.last_checkpoint())
        flops = self.model.flops_per_token() * tokens + sums["attention_flops"]
        return {
            "step": taken.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": taken.learning_rate,
            "tokens": tokens,
            "packing_fill": tokens / sums["places"],
            "visible_pairs": round(sums["visible_pairs"]),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / (self.peak.flops * self.mesh.world),
            **{name: value.item() for name, value in result.of_model.items()},
        }

    def finish(self, taken: Taken) -> None:
        """Wait for a step, note it, and validate and save where that is due after it."""
        row = self.read(taken)
        if self.validates():
            row["validation_loss"] = validate(self.model, self.validation, self.tokenizer)
        self.write(row)
        self.tell_of_saves(self.saver.check)
        if self.saves():
            self.save()

    def write(self, row: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write(row)
        self.terminal.step(row)

    def validates(self) -> bool:
        """Whether validation is due after the step just taken."""
        every = self.run.validation.every
        return bool(self.validation) and (self.step % every == 0 or self.step == self.run.training.steps)

    def saves(self) -> bool:
        """Whether a checkpoint is due after the step just taken; the one at the end comes by itself."""
        every = self.run.checkpoint.every
        return every > 0 and self.step % every == 0

    def save(self, at_the_end: bool = False) -> None:
        """Write a checkpoint of the step just taken, unless there is one.

        Errors: SaveFailed at the end; before that a full disk is a warning, and the run goes on.
        """
        self.tell_of_saves(self.saver.wait)
        if self.saver.newest == self.step:
            return
        try:
            self.saver.save(
                tensors(self.model, self.optimizer, self.device),
                Progress(self.step, self.loader.state_dict()),
                before=self.sync_metrics,
            )
            if at_the_end:
                self.saver.wait()
        except CannotSave as error:
            if at_the_end:
                raise SaveFailed(self.step, str(error), self.last_checkpoint()) from error
            self.warn_of(error)

    def sync_metrics(self) -> None:
        if self.metrics:
            self.metrics.sync()

    def tell_of_saves(self, outcome: Callable[[], None]) -> None:
        """Warn where `outcome` of the saver is that a checkpoint written beside the steps was not."""
        try:
            outcome()
        except CannotSave as error:
            self.warn_of(error)

    def warn_of(self, error: CannotSave) -> None:
        latest = self.last_checkpoint()
        self.terminal.warn(
            f"the checkpoint of step {self.saver.begun} could not be written: {error}. The run goes on; "
            + (f"{latest} is intact" if latest else "there is no earlier checkpoint")
        )

    def continue_from(self, checkpoint: Path) -> int:
        """Load everything that decides the steps to come; returns the step it was saved after."""
        state = tensors(self.model, self.optimizer, self.device)
        progress = load_checkpoint(checkpoint, state, self.device, self.saver.group)
        self.loader.load_state_dict(progress.loader)
        return progress.step

    def export(self) -> None:
        """The trained model for transformers, unless it is there.

        Errors: RunFailed.
        """
        checkpoint = self.mesh.from_first(self.last_checkpoint)
        assert checkpoint is not None, "a run that came to its end has saved"
        output = self.directory.exported / checkpoint.name
        if self.mesh.from_first(lambda: holds_weights(output)):
            return
        try:
            export_checkpoint(checkpoint, output, group=self.saver.group)
        except CannotSave as error:
            raise RunFailed(f"{error}. Make room, then: sightline convert {checkpoint} {output}") from error
        self.terminal.say(f"exported for transformers: {output}")

    def last_checkpoint(self) -> Path | None:
        return find_latest(self.directory.checkpoints)

    def write_sample(self) -> None:
        """A piece of text, to see what the model has learnt."""
        logging = self.run.logging
        if logging.sample_tokens:
            text = generate(
                self.model.speaker,
                self.tokenizer,
                logging.sample_prompt,
                SamplingConfig(max_new_tokens=logging.sample_tokens, seed=self.run.seed),
            )
            self.terminal.sample(logging.sample_prompt, text)

"""ContextParallelTrainer: transformers' Trainer, with packed rows divided among the ranks of a group."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from sightline.hf.context import context_parallel


class ContextParallelTrainer(Trainer):
    """Trainer in which each `context_parallel_size` neighboring ranks share their rows.

    The model must be enabled by `sightline.hf.enable`, and the collator give position_ids and documents, as
    `sightline.hf.PackedCollator` does. Everything else is the Trainer's: losses, weights, gradient norms and numbers of
    steps are those of a Trainer with one rank for each group. DDP and FSDP2 average gradients over all ranks and the
    Trainer multiplies the loss by their number, so that they add up. A trainer derived from Trainer works as well:
    `class Packed(ContextParallelTrainer, SFTTrainer)`.

    It does not use `accelerate.ParallelismConfig(cp_size=...)`, which removes the masks of attention layers.

    Raises:
        ValueError: if the ranks cannot be divided into groups, or an option needs all tokens of a row.
    """

    def __init__(self, *args: Any, context_parallel_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_parallel_size = context_parallel_size
        self._check_options()
        ranks = dist.get_world_size()
        mesh = init_device_mesh(self.args.device.type, (ranks // context_parallel_size, context_parallel_size))
        self.context_group = mesh.get_group(1)

    def _check_options(self) -> None:
        size, ranks = self.context_parallel_size, dist.get_world_size() if dist.is_initialized() else 1
        if size < 2 or ranks % size:
            raise ValueError(
                f"context_parallel_size must be at least 2 and divide the number of processes, got {size} and {ranks} "
                f"processes; start a multiple of {max(size, 2)} processes with torchrun or accelerate launch"
            )
        config = getattr(self.accelerator, "parallelism_config", None)
        if config is not None and config.non_data_parallel_size > 1:
            raise ValueError(
                f"ContextParallelTrainer makes its own groups, but accelerate has {config}; use it without "
                "parallelism_config"
            )
        options = {
            "label_smoothing_factor": self.args.label_smoothing_factor,
            "compute_loss_func": self.compute_loss_func,
            "compute_metrics": self.compute_metrics,
            "include_num_input_tokens_seen": self.args.include_num_input_tokens_seen not in (False, "no"),
        }
        if used := [name for name, value in options.items() if value]:
            raise ValueError(
                f"{', '.join(used)} would receive a part of each row's tokens, or count each row once for each rank; "
                "expected none of them with context parallelism"
            )
        if not self.model_accepts_loss_kwargs:
            raise ValueError(
                f"{type(self.model).__name__} takes no num_items_in_batch: it would divide its loss by the labels of "
                "one rank; use a model of transformers that passes its keyword arguments to the loss"
            )

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self._load_same_rows(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        return self._load_same_rows(super().get_eval_dataloader(*args, **kwargs))

    def _load_same_rows(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """Let all ranks of a group load the same rows."""
        sampler = loader.batch_sampler
        if not isinstance(sampler, BatchSamplerShard):
            raise ValueError(
                f"context parallelism needs a data set with a length, whose batches accelerate divides by index, got "
                f"{type(loader.dataset).__name__} in a {type(loader).__name__}; convert the stream to a Dataset"
            )
        sampler.num_processes = dist.get_world_size() // self.context_parallel_size
        sampler.process_index = dist.get_rank() // self.context_parallel_size
        sampler.even_batches &= sampler.num_processes > 1  # one group needs no copies of rows to fill its last batch
        return loader

    def get_total_train_batch_size(self, args: Any) -> int:
        return super().get_total_train_batch_size(args) // self.context_parallel_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(inputs) // self.context_parallel_size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return a loss whose mean over all ranks is that of the rows."""
        with context_parallel(model, self.context_group, inputs) as local:
            labels = local.pop("num_items_in_batch", None)
            if labels is None:
                raise ValueError(f"ContextParallelTrainer needs labels or shift_labels, got {sorted(inputs)}")
            if num_items_in_batch is None:
                average = self.args.average_tokens_across_devices
                num_items_in_batch = self.accelerator.gather(labels).sum() if average else labels
            # The Trainer has counted the labels of each row once for each rank of a group.
            count = num_items_in_batch / self.context_parallel_size
            return super().compute_loss(model, local, return_outputs, count)  # type: ignore[arg-type]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate with one loss for each row, although each rank of a group returns it."""
        groups = dist.get_world_size() // self.context_parallel_size
        self.gather_function = lambda losses: self.accelerator.gather_for_metrics(losses)[: len(losses) * groups]
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss of the rows of all ranks. Logits are refused: each rank has those of its own tokens."""
        if not prediction_loss_only:
            raise ValueError("context parallelism evaluates losses only: each rank has the logits of its own tokens")
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        return self.accelerator.reduce(loss, "mean"), None, None

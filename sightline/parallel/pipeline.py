"""Pipeline parallelism: models whose layers are split into stages, run by torch.distributed.pipelining.

All data of a batch (masks, positions, labels, images) are tensors with B as the first dim, or pytrees of such tensors.
The schedules split them along B together with the tokens and pass each stage the part of its current micro-batch, so
every stage computes micro-batch i with the mask of micro-batch i.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from sightline.layers import LayerCache, routers_of
from sightline.models.decoder import Decoder, Masks
from sightline.parallel.mesh import Mesh
from sightline.parallel.parallel_model import Inputs, ParallelModel, reshard
from sightline.parallel.pipeline_stages import stage_owners, stages_of


class PipelinedModel(ParallelModel):
    """A model split into pipeline stages, of which this rank has one or two; see `build_local_stages`.

    micro_batch_size  rows of a micro-batch. `forward_backward` takes all rows of a step at once; `count_microbatches`
                      checks that the schedule supports their number
    """

    def __init__(
        self, mesh: Mesh, full_model: Decoder, stages: list[Decoder], *, dtype: str = "float32", micro_batch_size: int
    ) -> None:
        super().__init__(mesh, full_model, stages, dtype=dtype)
        self.micro_batch_size = micro_batch_size
        self.stage_owners = stage_owners(mesh.parallel)
        self.local_stages = dict(zip(stages_of(mesh.parallel, mesh.index("pipeline")), stages, strict=True))
        self.scale: float | Tensor = 1.0  # the argument of the current forward_backward
        self._schedules: dict[torch.Size, Any] = {}  # by the shape of the rows, which determines the buffers

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Dtype of the hidden states sent between stages: bfloat16 if FSDP gathers the weights in bfloat16, else
        float32, since autocast keeps the residual stream in float32."""
        narrow = self.dtype == "bfloat16" and isinstance(self.stages[0], FSDPModule)
        return torch.bfloat16 if narrow else torch.float32

    def rows_per_call(self, rows: int, micro_batch_size: int) -> int:
        return rows

    def forward_backward(self, inputs: Inputs, scale: float | Tensor, *, last: bool = True) -> Tensor:
        """See `ParallelModel.forward_backward`. Runs the schedule; returns 0 on ranks without the last stage."""
        assert last, "a pipeline takes all rows of a step in one call"
        self.scale = scale
        losses: list[Tensor] = []
        schedule = self._schedule(inputs["tokens"].shape)
        others = {name: value for name, value in inputs.items() if name != "tokens"}
        schedule.step(inputs["tokens"], target=inputs["labels"], losses=losses, return_outputs=False, **others)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.mesh.device)

    def _schedule(self, shape: torch.Size) -> Any:
        """Return the schedule for rows of shape [B, S], which fixes the shape of the hidden states between stages."""
        if shape not in self._schedules:
            rows, length = shape
            assert rows % self.micro_batch_size == 0, "rows are split into equal micro-batches"
            tokens = torch.empty(self.micro_batch_size, length, dtype=torch.int64, device="meta")
            stages = [Stage(self, index, tokens) for index in self.local_stages]
            self._schedules[shape] = get_schedule_class(self.mesh.parallel.pipeline_schedule)(
                stages if len(stages) > 1 else stages[0],
                rows // self.micro_batch_size,
                loss_fn=lambda loss, labels: loss,  # the last stage has already computed the scaled loss
                scale_grads=False,
            )
        return self._schedules[shape]

    @torch.no_grad()
    def evaluate(self, inputs: Inputs) -> Tensor:
        """Return the sum of the losses of these rows as one micro-batch; 0 on ranks without the last stage.

        A rank returns as soon as its own stages are done, while later stages still compute.
        """
        with self.autocast():
            loss = self.run_stages(**inputs)
        return torch.zeros((), device=self.mesh.device) if loss is None else loss

    def run_stages(self, tokens: Tensor, **inputs: Any) -> Tensor | None:
        """Run a forward through all stages; return the output on the rank of the last stage, None on other ranks.

        The forward of torch.distributed.pipelining requires the micro-batches of the schedule and does not support the
        V-shaped schedules.
        """
        h = tokens
        shape = (*tokens.shape, self.full_model.config.hidden_size)
        group = self.mesh.group("pipeline")
        for index, stage in self.local_stages.items():
            if index > 0 and index - 1 not in self.local_stages:
                h = torch.empty(shape, dtype=self.hidden_dtype, device=self.mesh.device)
                dist.recv(h, group=group, group_src=self.stage_owners[index - 1])
            h = stage(h, **inputs)
            reshard(stage)
            if index == len(self.stage_owners) - 1:
                return h
            h = h.to(self.hidden_dtype)
            if index + 1 not in self.local_stages:
                dist.send(h, group=group, group_dst=self.stage_owners[index + 1])
        return None

    @property
    def generation_model(self) -> PipelineGenerationModel:
        return PipelineGenerationModel(self)


class Stage(PipelineStage):
    """A stage for PyTorch's schedules.

    The shapes of inputs and outputs are given. Otherwise PyTorch would infer them by an extra forward, in which routers
    would count the tokens of the first micro-batch twice.
    """

    def __init__(self, model: PipelinedModel, index: int, tokens: Tensor) -> None:
        """`tokens` [B, S] of one micro-batch, on the meta device, gives the shapes."""
        shape = (*tokens.shape, model.full_model.config.hidden_size)
        hidden = torch.empty(shape, dtype=model.hidden_dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        stages = len(model.stage_owners)
        super().__init__(
            model.local_stages[index],
            index,
            stages,
            model.mesh.device,
            input_args=tokens if index == 0 else hidden,
            output_args=loss if index == stages - 1 else hidden,
            group=model.mesh.group("pipeline"),
        )
        self.model = model

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the stage's forward under autocast; the backward and other micro-batches must not be under it."""
        with self.model.autocast():
            out = super().forward_maybe_with_nosync(*args, **kwargs)
        if self.is_last:
            return out * self.model.scale
        return attach_aux_losses(out.to(self.model.hidden_dtype), self.submod, self.model.scale)


def attach_aux_losses(h: Tensor, stage: Any, scale: float | Tensor) -> Tensor:
    """Return the output of a stage without a head, with the gradients of its routers' auxiliary losses attached.

    The decoder's head adds auxiliary losses to the token loss. Other stages have no loss, so the backward of `h` adds
    their gradients.
    """
    losses = [router.aux_loss for router in routers_of(stage).values() if router.aux_loss is not None]
    return _AttachLosses.apply(h, scale * stage.aux_loss_scale, *losses) if losses and torch.is_grad_enabled() else h


class _AttachLosses(torch.autograd.Function):
    """Identity of h whose backward also gives each loss the gradient `scale`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, scale: float | Tensor, *losses: Tensor) -> Tensor:
        ctx.scales = [torch.ones_like(loss) * scale for loss in losses]
        return h.clone()  # schedules detach outputs in place to free the graph, which fails for views

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        return grad, None, *ctx.scales


class PipelineGenerationModel:
    """A pipelined model for `generate`. All ranks call it with the same inputs and get the same logits."""

    def __init__(self, model: PipelinedModel) -> None:
        self.model = model
        self.suppress_tokens, self.layers = model.full_model.suppress_tokens, model.full_model.layers

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.stages[0].parameters()

    def get_attention_masks(self, batch: Any, tokenizer: object = None) -> Masks:
        return self.model.get_attention_masks(batch, tokenizer)

    def new_cache(self) -> dict[str, LayerCache]:
        """Return empty caches for the local layers."""
        return {name: cache for stage in self.model.stages for name, cache in stage.new_cache().items()}

    def __call__(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """Return the logits of the last token, float32 [B, 1, V], on every rank; generation reads no others."""
        pipeline, config = self.model, self.model.full_model.config
        logits = pipeline.run_stages(tokens, **inputs)
        if logits is None:
            last = torch.empty(len(tokens), 1, config.vocab_size, device=tokens.device)
        else:
            last = logits[:, -1:].float().contiguous()
        dist.broadcast(last, group=pipeline.mesh.group("pipeline"), group_src=pipeline.stage_owners[-1])
        return last

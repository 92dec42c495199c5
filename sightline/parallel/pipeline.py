"""Pipeline parallelism: a model whose layers lie on several processes, run by torch.distributed.pipelining.

Everything about a batch that is data (masks, positions, labels, images) is a tensor with B first or a pytree of them.
The schedules cut it along B with the tokens and hand each stage the part of the microbatch it works on, so the mask of
microbatch i is the mask of microbatch i at every stage.
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
    """A model of which this process has some stages; see `build_local_stages`.

    micro_batch_size  rows of a microbatch. All rows of a step come at once, and `count_microbatches` has said that the
                      schedule takes that many
    """

    def __init__(
        self, mesh: Mesh, full_model: Decoder, stages: list[Decoder], *, dtype: str = "float32", micro_batch_size: int
    ) -> None:
        super().__init__(mesh, full_model, stages, dtype=dtype)
        self.micro_batch_size = micro_batch_size
        self.stage_owners = stage_owners(mesh.parallel)
        self.local_stages = dict(zip(stages_of(mesh.parallel, mesh.index("pipeline")), stages, strict=True))
        self.scale = 1.0  # of the forward_backward that is running
        self._schedules: dict[torch.Size, Any] = {}  # by the shape of the rows: it decides the buffers

    @property
    def hidden_dtype(self) -> torch.dtype:
        """What passes between stages. Autocast leaves the sum of the layers in float32; weights that FSDP gathers in
        bfloat16 do not."""
        narrow = self.dtype == "bfloat16" and isinstance(self.stages[0], FSDPModule)
        return torch.bfloat16 if narrow else torch.float32

    def rows_per_call(self, rows: int, micro_batch_size: int) -> int:
        return rows

    def forward_backward(self, inputs: Inputs, scale: float, *, last: bool = True) -> Tensor:
        """As in every ParallelModel, by the schedule; 0 on the processes without the last stage."""
        assert last, "a pipeline takes all rows of a step in one call"
        self.scale = scale
        losses: list[Tensor] = []
        schedule = self._schedule(inputs["tokens"].shape)
        others = {name: value for name, value in inputs.items() if name != "tokens"}
        schedule.step(inputs["tokens"], target=inputs["labels"], losses=losses, return_outputs=False, **others)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.mesh.device)

    def _schedule(self, shape: torch.Size) -> Any:
        """The schedule for rows [B, S], whose stages exchange hidden states of one shape."""
        if shape not in self._schedules:
            rows, length = shape
            assert rows % self.micro_batch_size == 0, "rows are cut into equal microbatches"
            tokens = torch.empty(self.micro_batch_size, length, dtype=torch.int64, device="meta")
            stages = [Stage(self, index, tokens) for index in self.local_stages]
            self._schedules[shape] = get_schedule_class(self.mesh.parallel.pipeline_schedule)(
                stages if len(stages) > 1 else stages[0],
                rows // self.micro_batch_size,
                loss_fn=lambda loss, labels: loss,  # the last stage knew the labels and has scaled it
                scale_grads=False,
            )
        return self._schedules[shape]

    @torch.no_grad()
    def evaluate(self, inputs: Inputs) -> Tensor:
        """The sum of the losses of these rows, as one microbatch; 0 on the processes without the last stage.

        A process goes on to the next call while later stages still work on this one.
        """
        with self.autocast():
            loss = self.run_stages(**inputs)
        return torch.zeros((), device=self.mesh.device) if loss is None else loss

    def run_stages(self, tokens: Tensor, **inputs: Any) -> Tensor | None:
        """The forward of all rows from stage to stage: what the last one returns to its process, None to the others.

        torch.distributed.pipelining has this for as many rows as a schedule takes, and not for the V-shaped ones.
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
    """A stage as the schedules run it.

    What comes in and goes out is stated. Otherwise PyTorch would find it out by a forward of its own, in which routers
    would count the tokens of the first microbatch once more.
    """

    def __init__(self, model: PipelinedModel, index: int, tokens: Tensor) -> None:
        """tokens: of a microbatch, on the meta device."""
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
        """The stage's forward alone, so that neither the backward nor other microbatches are under its autocast."""
        with self.model.autocast():
            out = super().forward_maybe_with_nosync(*args, **kwargs)
        if self.is_last:
            return out * self.model.scale
        return attach_aux_losses(out.to(self.model.hidden_dtype), self.submod, self.model.scale)


def attach_aux_losses(h: Tensor, stage: Any, scale: float) -> Tensor:
    """The hidden states that leave a stage without a head, and with them the gradients of its routers' own losses.

    The decoder's head joins these losses with that of the tokens; here no loss is at hand, but a gradient comes by.
    """
    losses = [router.aux_loss for router in routers_of(stage).values() if router.aux_loss is not None]
    return _WithLosses.apply(h, scale * stage.aux_loss_scale, *losses) if losses and torch.is_grad_enabled() else h


class _WithLosses(torch.autograd.Function):
    """h as it is; its backward begins those of the losses, each with the gradient `scale`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, scale: float, *losses: Tensor) -> Tensor:
        ctx.scales = [torch.full_like(loss, scale) for loss in losses]
        return h.clone()  # a view could not be detached, which the schedules do to free the graph

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        return grad, None, *ctx.scales


class PipelineGenerationModel:
    """A pipelined model as `generate` takes it: every process calls it with the same and gets the same."""

    def __init__(self, model: PipelinedModel) -> None:
        self.model = model
        self.suppress_tokens, self.layers = model.full_model.suppress_tokens, model.full_model.layers

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.stages[0].parameters()

    def get_attention_masks(self, batch: Any, tokenizer: object = None) -> Masks:
        return self.model.get_attention_masks(batch, tokenizer)

    def new_cache(self) -> dict[str, LayerCache]:
        """Of the layers that are here."""
        return {name: cache for stage in self.model.stages for name, cache in stage.new_cache().items()}

    def __call__(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """Logits of the last token alone, float32 [B, 1, V]: all that generation reads, and all that travels."""
        pipeline, config = self.model, self.model.full_model.config
        logits = pipeline.run_stages(tokens, **inputs)
        if logits is None:
            last = torch.empty(len(tokens), 1, config.vocab_size, device=tokens.device)
        else:
            last = logits[:, -1:].float().contiguous()
        dist.broadcast(last, group=pipeline.mesh.group("pipeline"), group_src=pipeline.stage_owners[-1])
        return last

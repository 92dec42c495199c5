"""Runs of a module on one batch, which measure what outputs owe to inputs that are hidden from them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sightline.verify.influence import Trial
from sightline.verify.torch_private import is_compiled

TOKEN_NAMES = ("input_ids", "tokens", "inputs_embeds")
SEED = 0  # of dropout and of the weights of a gradient


class Untestable(ValueError):
    """A leakage test that cannot be made, because of the batch or the module; says nothing about leaks."""


@dataclass(frozen=True)
class Dependence:
    """How much the outputs of a trial depend on its hidden inputs.

    gradient    largest gradient of the outputs by a hidden input, relative to the largest by any input; exactly 0 if
                they do not depend; None if the module has no embedding of the tokens that could be differentiated
    change      largest change of an output when all hidden inputs change, relative to the largest change of the others
    bound       changes up to here are rounding
    any_change  whether any output changed; the trial shows nothing about a module that ignores its tokens
    source      (row, token) of the hidden input with the largest gradient
    target      (row, token) of the output with the largest change
    """

    gradient: float | None
    change: float
    bound: float
    any_change: bool
    source: tuple[int, int]
    target: tuple[int, int]

    @property
    def leaks(self) -> bool:
        return bool(self.gradient) or not self.change <= self.bound


@dataclass
class Record:
    """One run: the embedded tokens, which are leaves of the graph, the module's output, and the recorded tensor.

    All are [B, S, ...]; None if there is none.
    """

    embedded: list[Tensor]
    output: Tensor | None = None
    value: Tensor | None = None


class Probe:
    """A module and one batch of its keyword arguments.

    tokens     name of the argument with the tokens, int [B, S], or their embeddings, float [B, S, W]
    fixed_ids  token ids that are neither changed nor put in the place of another token
    """

    def __init__(
        self, module: nn.Module, inputs: Mapping[str, Any], tokens: str | None, fixed_ids: Collection[int]
    ) -> None:
        names = [tokens] if tokens else [name for name in TOKEN_NAMES if isinstance(inputs.get(name), Tensor)]
        if not names or not isinstance(inputs.get(names[0]), Tensor) or inputs[names[0]].dim() < 2:
            raise Untestable(
                f"found no tokens [B, S] in the batch, which has {', '.join(inputs)}; expected one of "
                f"{', '.join(TOKEN_NAMES)}, or the argument's name as tokens="
            )
        self.module, self.inputs, self.name = module, dict(inputs), names[0]
        self.tokens: Tensor = inputs[self.name]
        self.shape = self.tokens.shape[:2]
        self.fixed = torch.isin(self.tokens, torch.tensor(sorted(fixed_ids), dtype=torch.int64).to(self.tokens))

    def measure(self, trial: Trial, name: str = "", *, argument: bool = False) -> Dependence | None:
        """Return how much the output of a submodule at the trial's outputs depends on the hidden inputs.

        None if the submodule has no floating-point output [B, S, ...]. Two forwards and one backward.

        name      qualified name of the submodule; "": the module itself
        argument  measure the first floating-point argument of the submodule instead of its output
        """
        kept, changed = self.run(self.tokens, name, argument), self.run(self.change_tokens(trial), name, argument)
        if kept.value is None or changed.value is None:
            return None
        outputs, hidden = (mask.to(kept.value.device) for mask in (trial.outputs, trial.hidden))
        difference = (kept.value.detach() - changed.value.detach()).abs().flatten(2).amax(dim=2).double()
        if not name and not difference[outputs].isfinite().all():
            raise Untestable(
                "the module's outputs are not finite, so a leakage test cannot compare them; expected finite outputs "
                "for every token that is no padding: check weights and masks"
            )
        gradient, source = gradient_by(kept, outputs, hidden)
        wrong = difference.masked_fill(~outputs, 0.0)
        largest = float(difference.masked_fill(outputs, 0.0).nan_to_num(0.0).max())
        change = float(wrong.max()) / max(largest, 1e-30)
        bound = max(1e-4, 16 * torch.finfo(kept.value.dtype).eps)
        return Dependence(gradient, change, bound, largest > 0 or change > 0, source, location(wrong))

    def run(self, tokens: Tensor, name: str, argument: bool) -> Record:
        """Run the module once and record the output, or the first argument, of the first call of a submodule."""
        record = Record([])
        with ExitStack() as stack:
            if tokens.is_floating_point():
                record.embedded.append(tokens.detach().clone().requires_grad_())
                tokens = record.embedded[0].clone()
            for module in self.module.modules():
                if isinstance(module, nn.Embedding):
                    hook = module.register_forward_hook(lambda _m, args, out: self._embed(record, tokens, args, out))
                    stack.callback(hook.remove)
            hook = self._record(record, self.module.get_submodule(name), argument)
            stack.callback(hook.remove)
            torch.manual_seed(SEED)
            record.output = find_tensor(self.module(**{**self.inputs, self.name: tokens}), self.shape)
        return record

    def _embed(self, record: Record, tokens: Tensor, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        ids = args[0] if args else None
        if (
            not isinstance(ids, Tensor)
            or ids.shape != tokens.shape
            or not torch.equal(ids.masked_fill(self.fixed, 0), tokens.masked_fill(self.fixed, 0))
        ):
            return None
        record.embedded.append(out.detach().requires_grad_())
        return record.embedded[-1].clone()  # modules may change their input in place

    def _record(self, record: Record, module: nn.Module, argument: bool) -> Any:
        def keep(value: Any) -> None:
            if record.value is None:
                record.value = find_tensor(value, self.shape)

        if argument:
            return module.register_forward_pre_hook(lambda _m, args, kwargs: keep((args, kwargs)), with_kwargs=True)
        return module.register_forward_hook(lambda _m, _args, out: keep(out))

    def change_tokens(self, trial: Trial) -> Tensor:
        """Return the tokens with every hidden one replaced: an id by another id of the batch, an embedding by noise."""
        hidden = trial.hidden.to(self.tokens.device)
        if self.tokens.is_floating_point():
            generator = torch.Generator().manual_seed(SEED)
            noise = torch.randn(self.tokens.shape, generator=generator).to(self.tokens)
            return torch.where(hidden[..., None], noise, self.tokens)
        ids = self.tokens[~self.fixed].unique()
        if len(ids) < 2:
            raise Untestable(
                f"the batch has {len(ids)} different tokens that may be changed, expected at least two: {ids.tolist()}"
            )
        index = torch.searchsorted(ids, self.tokens.contiguous())
        return torch.where(hidden & ~self.fixed, ids[(index + 1) % len(ids)], self.tokens)

    def called(self) -> list[str]:
        """Return the submodules with a floating-point output [B, S, ...], in the order in which they are called."""
        found: dict[str, bool] = {}

        def begin(name: str) -> None:
            found.setdefault(name, False)

        def end(name: str, out: Any) -> None:
            found[name] |= find_tensor(out, self.shape) is not None

        with ExitStack() as stack:
            for name, module in self.module.named_modules():
                hook = module.register_forward_pre_hook(lambda _m, _args, name=name: begin(name))
                stack.callback(hook.remove)
                hook = module.register_forward_hook(lambda _m, _args, out, name=name: end(name, out))
                stack.callback(hook.remove)
            self.run(self.tokens, "", False)
        return [name for name, has_tensor in found.items() if name and has_tensor]


def gradient_by(record: Record, outputs: Tensor, hidden: Tensor) -> tuple[float | None, tuple[int, int]]:
    """Return the relative gradient of a random sum of the outputs by hidden inputs, and the input with the largest.

    Raises:
        Untestable: if recomputation forbids such gradients.
    """
    value, nowhere = record.value, (-1, -1)
    assert value is not None
    if not record.embedded:
        return None, nowhere
    if not value.requires_grad:
        return 0.0, nowhere
    generator = torch.Generator().manual_seed(SEED)
    rows = value.flatten(2)[outputs]
    by_token, by_channel = (torch.randn(size, generator=generator).to(rows) for size in rows.shape)
    total = by_token @ (rows @ by_channel)
    if record.output is not None and record.output is not value:
        total = total + 0 * record.output.sum()  # FSDP gathers weights when a gradient reaches the output of a module
    try:
        gradients = torch.autograd.grad(total, record.embedded, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise Untestable(
            "recomputation with use_reentrant=True allows no gradients of chosen tensors; test the module in eval(), "
            "or with use_reentrant=False"
        ) from error
    size = sum(g.double().abs().flatten(2).amax(dim=2) for g in gradients if g is not None)
    if not isinstance(size, Tensor):
        return 0.0, nowhere
    of_hidden = size.masked_fill(~hidden, 0.0)
    return float(of_hidden.max()) / max(float(size.max()), 1e-300), location(of_hidden)


def location(values: Tensor) -> tuple[int, int]:
    """Return (row, token) of the largest value [B, S]."""
    row, token = divmod(int(values.argmax()), values.shape[1])
    return row, token


def find_tensor(value: Any, shape: torch.Size) -> Tensor | None:
    """Return the first floating-point tensor [B, S, ...] in a tensor, tuple, dict or output of transformers."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.dim() > 2 and value.shape[:2] == shape else None
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for item in values if (found := find_tensor(item, shape)) is not None), None)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Run the block with gradients and without compiled code, which skips hooks; restore random numbers and buffers.

    FSDP2 leaves parameters gathered after a forward that no backward follows. They are sharded again, since an
    optimizer that is made next would otherwise update copies of them.
    """
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager") if is_compiled(module) else nullcontext(),
        ):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

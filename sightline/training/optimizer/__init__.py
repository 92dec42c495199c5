"""Optimizers: a file each, a line in `OPTIMIZERS`, and name and state in `config/run.py`, which `plan` reads too.

The trainer knows no more of them than `Optimizer` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from sightline import config
from sightline.layers.base import HasModules, ParameterInfo, parameter_info
from sightline.training.optimizer.adamw import AdamW
from sightline.training.optimizer.muon import Muon


class Optimizer(Protocol):
    """An optimizer of all parameters of a model, or of the part of one that this process has."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The learning rate of a step is written into `lr` of each group before `step()`."""
        ...

    @property
    def state(self) -> Any:
        """Tensors by name, for each parameter. They exist from the start, so that a checkpoint has one shape whether a
        step was taken or not."""
        ...

    found_inf: Tensor | None
    """A scalar on the device, set before `step()`: where it is not 0, the step leaves parameters and state as they are.
    Nobody reads it, so nobody waits for the loss to know whether to step. torch.amp.GradScaler has the same switch."""

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


OPTIMIZERS: dict[str, Callable[[list[ParameterInfo], config.OptimizerConfig], Optimizer]] = {
    "adamw": AdamW,
    "muon": Muon,
}
"""By their name in the config."""


def build_optimizer(model: HasModules, options: config.OptimizerConfig) -> Optimizer:
    """The optimizer that the options name, over every trained parameter once.

    Raises:
        ValueError: a module of the model does not state which of its parameters are matrices, or the optimizer cannot
            serve parameters that lie as these do.
    """
    return OPTIMIZERS[options.name](parameter_info(model), options)


def optimizer_state(model: HasModules, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """State by parameter name. Options (learning rate, decay) belong to the config and are not among them."""
    return {name: optimizer.state[p] for name, p, _ in parameter_info(model)}

"""Optimizers. Each has a file, an entry in `OPTIMIZERS`, and its options and state size in `config/run.py`.

The trainer uses only the protocol `Optimizer`. `sightline plan` reads the state size from the config.
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
    """An optimizer for the parameters of a model, or of the part of a model on this rank."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups; the trainer sets `lr` of each group before `step()`."""
        ...

    @property
    def state(self) -> Any:
        """State tensors by name for each parameter. The constructor creates them, so that checkpoints have the same
        tensors before and after the first step."""
        ...

    found_inf: Tensor | None
    """Scalar on the device, set before `step()`: if it is not 0, the step changes neither parameters nor state. The
    host does not read it, so there is no synchronization. torch.amp.GradScaler uses the same attribute."""

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


OPTIMIZERS: dict[str, Callable[[list[ParameterInfo], config.OptimizerConfig], Optimizer]] = {
    "adamw": AdamW,
    "muon": Muon,
}
"""Optimizer classes by their name in the config."""


def build_optimizer(model: HasModules, options: config.OptimizerConfig) -> Optimizer:
    """Build the optimizer named in the options for all trainable parameters of the model.

    Raises:
        ValueError: if a module does not declare which of its parameters are matrices, or if the optimizer does not
            support the placement of the parameters.
    """
    return OPTIMIZERS[options.name](parameter_info(model), options)


def optimizer_state(model: HasModules, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the state by parameter name, without options such as the learning rate, which come from the config."""
    return {name: optimizer.state[p] for name, p, _ in parameter_info(model)}

"""Every change that parallelism makes to a module from outside, and the way to take it back.

A module around another would change the names of its parameters, so modules are changed in place. Each keeps a record
of its changes, which `undo` reads backwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sightline.models.weight_init import is_initializing

View = Callable[[Tensor], Tensor]
AXES = {"tensor", "expert"}
"""The axes that cut what a layer computes with. FSDP cuts it once more, but not while the layer runs."""
_RECORD = "_changes"


def undo(module: nn.Module) -> None:
    """Give a module and all modules in it back their class, their `forward`, their attributes and their hooks.

    Parameters stay as `replace_parameter` has left them: they may hold weights by now. FSDP has its own record of what
    it changes, on top of these changes, so they are taken back before it is applied or not at all.
    """
    assert not any(isinstance(part, FSDPModule) for part in module.modules()), "FSDP's changes stay"
    for part in module.modules():
        changes = vars(part).pop(_RECORD, None)
        if changes is not None:
            changes.close()


def _changes(module: nn.Module) -> ExitStack:
    """The record of a module's changes: how to take back each, the last one first."""
    return vars(module).setdefault(_RECORD, ExitStack())


def replace_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Set `module.name`, a method or a plain value."""
    if name in vars(module):
        _changes(module).callback(setattr, module, name, vars(module)[name])
    else:
        _changes(module).callback(delattr, module, name)
    setattr(module, name, value)


def replace_forward(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let `module.forward` be `wrap` of what it was."""
    replace_attribute(module, "forward", wrap(module.forward))


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether a module computes by another `forward` than its class's."""
    return "forward" in vars(module)


def before_forward(module: nn.Module, change: Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]) -> None:
    """Let `change` decide the positional arguments of the module's forward: a hook."""
    _changes(module).callback(module.register_forward_pre_hook(change).remove)


def after_forward(module: nn.Module, change: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> None:
    """Let `change` decide what the module's forward returns: a hook."""
    _changes(module).callback(module.register_forward_hook(change).remove)


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put another tensor in a parameter's place, under its name. `undo` leaves it there."""
    old = module._parameters[name]  # and not get_parameter, which returns what `expose_local_parameters` shows
    assert old is not None
    module.register_parameter(name, nn.Parameter(value, requires_grad=old.requires_grad))


def identity_view(part: Tensor) -> Tensor:
    """The view of a cut parameter: the gradient of the part is that of no other."""
    return part


def expose_local_parameters(module: nn.Module, **views: View) -> None:
    """`module.NAME` becomes `views[NAME]` of this process's part of the DTensor that the parameter NAME is.

    Outside, a parameter is a DTensor: FSDP, the optimizer and checkpoints know from it which part this process holds.
    In a layer it is the plain tensor of that part, so that everything a layer calls is as on one process. The parameter
    itself stays where it is: `named_parameters`, `state_dict` and what FSDP makes of them do not notice.

    A view says nothing of the mesh, to which another parallelism may add an axis. Called again, it changes the views of
    these names. `module.NAME` is the parameter itself while weights are drawn, and where FSDP has cut it once more.
    """
    # Not by hooks around the module's forward: the weight of the output projection is read outside of it.
    _changes(module).callback(setattr, module, "__class__", type(module))
    module.__class__ = _local_class(type(module), tuple(views.items()))  # type: ignore[assignment,arg-type]


@functools.cache
def _local_class(kind: type, views: tuple[tuple[str, View], ...]) -> type:
    """The class of such modules: the same for all layers, so that what is compiled for one serves the next."""

    def reader(name: str, view: View) -> property:
        def read(self: nn.Module) -> Tensor:
            parameter: Any = self._parameters[name]
            if is_initializing() or not AXES.issuperset(parameter.device_mesh.mesh_dim_names):
                return parameter
            return view(parameter.to_local())

        return property(read)

    return type(kind.__name__, (kind,), {name: reader(name, view) for name, view in views})

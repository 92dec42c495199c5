"""In-place patches of modules, which every parallelism uses, and their reversal.

A wrapper module would change the names of the parameters, so modules are patched in place. Each patched module has a
record of its patches, which `undo` reverts in reverse order.
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
"""Axes whose shards a layer computes with. FSDP shards the weights further, but gathers them for each forward."""
_RECORD = "_changes"


def undo(module: nn.Module) -> None:
    """Restore the class, `forward`, attributes and hooks of a module and its submodules.

    Parameters stay as set by `replace_parameter`, since they may hold weights by now. FSDP wraps the patched modules
    and cannot be reverted, so patches can only be reverted before FSDP is applied.
    """
    assert not any(isinstance(part, FSDPModule) for part in module.modules()), "patches below FSDP cannot be reverted"
    for part in module.modules():
        changes = vars(part).pop(_RECORD, None)
        if changes is not None:
            changes.close()


def _changes(module: nn.Module) -> ExitStack:
    """Return the record of a module's patches, whose callbacks revert the last one first."""
    return vars(module).setdefault(_RECORD, ExitStack())


def replace_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Set `module.name`, a method or a value, until `undo`."""
    if name in vars(module):
        _changes(module).callback(setattr, module, name, vars(module)[name])
    else:
        _changes(module).callback(delattr, module, name)
    setattr(module, name, value)


def replace_forward(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `module.forward` by `wrap(module.forward)`."""
    replace_attribute(module, "forward", wrap(module.forward))


def forward_is_replaced(module: nn.Module) -> bool:
    """Return whether `replace_forward` has replaced the forward of a module."""
    return "forward" in vars(module)


def before_forward(module: nn.Module, change: Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]) -> None:
    """Register a forward pre-hook: `change` returns the positional arguments of the module's forward."""
    _changes(module).callback(module.register_forward_pre_hook(change).remove)


def after_forward(module: nn.Module, change: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> None:
    """Register a forward hook: `change` returns the output of the module's forward."""
    _changes(module).callback(module.register_forward_hook(change).remove)


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by another tensor under the same name. `undo` does not revert this."""
    old = module._parameters[name]  # get_parameter would return the view of `expose_local_parameters`
    assert old is not None
    module.register_parameter(name, nn.Parameter(value, requires_grad=old.requires_grad))


def identity_view(part: Tensor) -> Tensor:
    """Return the local shard unchanged: the view of a sharded parameter, whose gradient needs no reduction."""
    return part


def expose_local_parameters(module: nn.Module, **views: View) -> None:
    """Make `module.NAME` return `views[NAME](local shard)` instead of the DTensor parameter NAME.

    Outside the layer, a parameter is a DTensor, which tells FSDP, the optimizer and checkpoints which shard this rank
    stores. Inside, it is a plain tensor, so that a layer's code is the same as on one rank. The registered parameter
    does not change, so `named_parameters`, `state_dict` and FSDP still use the DTensor.

    Views do not depend on the mesh, since another parallelism may add an axis to it. A second call replaces the views
    of the names given. `module.NAME` is the DTensor itself while weights are initialized and while FSDP has it sharded.
    """
    # A property and not a forward hook, since the weight of the output projection is read outside its forward.
    _changes(module).callback(setattr, module, "__class__", type(module))
    module.__class__ = _local_class(type(module), tuple(views.items()))  # type: ignore[assignment,arg-type]


@functools.cache
def _local_class(kind: type, views: tuple[tuple[str, View], ...]) -> type:
    """Return the subclass with these views; cached, so that all layers have one class and share a compiled graph."""

    def reader(name: str, view: View) -> property:
        def read(self: nn.Module) -> Tensor:
            parameter: Any = self._parameters[name]
            if is_initializing() or not AXES.issuperset(parameter.device_mesh.mesh_dim_names):
                return parameter
            return view(parameter.to_local())

        return property(read)

    return type(kind.__name__, (kind,), {name: reader(name, view) for name, view in views})

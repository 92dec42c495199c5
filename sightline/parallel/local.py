"""Parameters that are cut between processes, as the layers see them.

Outside, a parameter is a DTensor: FSDP, the optimizer and checkpoints know from it which part this process holds. In a
layer it is the plain tensor of that part, so that everything a layer calls is as on one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sightline.models.drawing import is_drawing

View = Callable[[Tensor], Tensor]
AXES = {"tensor", "expert"}
"""The axes that cut what a layer computes with. FSDP cuts it once more, but not while the layer runs."""


def as_it_is(part: Tensor) -> Tensor:
    """The view of a cut parameter: the gradient of the part is that of no other."""
    return part


def show_local(module: nn.Module, **views: View) -> None:
    """`module.NAME` becomes `views[NAME]` of this process's part of the DTensor that the parameter NAME is.

    The parameter itself stays where it is: `named_parameters`, `state_dict` and what FSDP makes of them do not notice.
    A view says nothing of the mesh, to which another parallelism may add an axis. Called again, it changes the views of
    these names. `module.NAME` is the parameter itself while weights are drawn, and where FSDP has cut it once more.
    """

    # Not by hooks around the module's forward: the weight of the output projection is read outside of it.
    module.__class__ = _showing(type(module), tuple(views.items()))  # type: ignore[assignment,arg-type]


@functools.cache
def _showing(kind: type, views: tuple[tuple[str, View], ...]) -> type:
    """The class of such modules: the same for all layers, so that what is compiled for one serves the next."""

    def reader(name: str, view: View) -> property:
        def read(self: nn.Module) -> Tensor:
            parameter: Any = self._parameters[name]
            if is_drawing() or not AXES.issuperset(parameter.device_mesh.mesh_dim_names):
                return parameter
            return view(parameter.to_local())

        return property(read)

    return type(kind.__name__, (kind,), {name: reader(name, view) for name, view in views})

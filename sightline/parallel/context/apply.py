"""Context parallelism as it is applied to a model."""

from __future__ import annotations

from torch import Tensor

from sightline.layers import routers_of
from sightline.models.decoder import Decoder
from sightline.parallel.context.exchange import ContextExchange
from sightline.parallel.mesh import Mesh
from sightline.parallel.patch import replace_attribute


def apply_context(model: Decoder, mesh: Mesh) -> None:
    """Let the layers fetch the keys that their tokens see from the processes of `context`, and the loss sum over them.

    Routers' auxiliary losses weigh the scores of this process's tokens by the choices of the whole rows, so that their
    gradients add up to what one process would compute.
    """
    if mesh.size("context") == 1:
        return
    replace_attribute(model, "exchanges", ContextExchange(mesh.group("context")))
    replace_attribute(model, "row_group", mesh.group("context"))

    def choices_of_rows(counts: Tensor) -> Tensor:
        return mesh.sum(counts.clone(), "context")

    for router in routers_of(model).values():
        replace_attribute(router, "choices_of_rows", choices_of_rows)

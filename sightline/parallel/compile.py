"""torch.compile, layer by layer: layers of one class share what is compiled for the first."""

from __future__ import annotations

import torch

from sightline.models.decoder import Decoder, Layer


def apply_compile(model: Decoder, *, backend: str = "inductor") -> None:
    """Compile the decoder's layers in place, when everything has been applied that changes what a layer computes.

    What a mask shows is data, so a new layout of documents compiles nothing. What still does, once each: another length
    of rows, training and validation, a router's first forward of a step and its later ones. Not compiled, so a layer
    is cut there into several graphs:

    attention tile by tile, the products of experts one by one    both only on a CPU, or in float32
    the journey of tokens to their experts                        wherever experts lie on several processes

    A layer that is recomputed is compiled as one graph or not at all: where one of these is in it, it runs as it is.
    """
    # When a compiled layer is computed again in the backward, its router has counted already.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for module in model.modules():
        if isinstance(module, Layer):
            module.compile(backend=backend)

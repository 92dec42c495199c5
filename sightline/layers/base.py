"""What a layer states about itself: its matrices, its arithmetic, how it shards, how it reads a row.

MFU, the optimizers, tensor and context parallelism and the pipeline split read these facts; nobody guesses them from a
shape or a name. A module with parameters of its own lists in the class attribute `MATRICES` those that multiply a
token: of stacked weights [E, out, in] each [out, in] is a matrix. All other parameters are norms, biases and the like.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import nn

from sightline.layers.cache import KeyValueCache


class TensorParallelLayer(nn.Module):
    """A layer that is a sum over its heads or channels, which processes can deal out among themselves.

    Each process takes all tokens and the parts of the weights that it holds; the sum over the processes of what their
    `forward` returns is what the whole layer would return. So nothing in `forward` may count heads or channels but by
    the shapes of the weights.
    """

    SHARD_DIMS: ClassVar[dict[str, int]] = {}
    """The weights that are cut, by their own name or their module's, and the dim in which they are. All others are
    whole on every process."""
    PARTIAL_SUMS: ClassVar[tuple[str, ...]] = ()
    """The whole weights that are added to what is returned: each process adds its share of them."""

    def tensor_parallel_units(self) -> dict[str, int]:
        """What is dealt out and not cut any further, and how many of it there are: `{"key/value heads": 8}`."""
        raise NotImplementedError

    def flops_per_token(self) -> float:
        """See the function of this name; layers override it whose work is not that of all their matrices."""
        return _flops_of_matrices(self)


class AttentionLayer(TensorParallelLayer):
    """A layer whose queries attend to keys under a mask."""

    def new_cache(self) -> KeyValueCache:
        """An empty cache for generation."""
        return KeyValueCache()

    def flops_per_pair(self) -> float:
        """Forward and backward FLOPs of one visible (query, key) pair: 6 a channel of q k and 6 of p v in each head.

        Both take 2 forward and twice that backward (PaLM's convention, arXiv 2204.02311: what a kernel recomputes in
        its backward does not count).
        """
        raise NotImplementedError

    def kernel_requirements(self) -> dict[str, Any]:
        """What the attention kernel must offer: fields of `sightline.attention.KernelRequirements`."""
        raise NotImplementedError

    def num_kv_heads(self) -> int:
        """Groups of query heads that share keys and values."""
        raise NotImplementedError


class RecurrentLayer(TensorParallelLayer):
    """A layer that walks along whole rows and reads in its mask where documents begin.

    Processes that share rows give it some of its heads for all tokens of a row.
    """

    def context_parallel_heads(self) -> int:
        """Heads that processes can deal out."""
        raise NotImplementedError


class OutputProjection(nn.Linear):
    """The matrix from hidden states to logits, without bias: a row for each token of the vocabulary."""


class Role(Enum):
    """What a parameter is to its layer."""

    MATRIX = auto()
    """One matrix [out, in] that multiplies a token, or a stack of them [E, out, in]."""
    VOCABULARY = auto()
    """Embedding or output projection: a row for each token of the vocabulary."""
    OTHER = auto()
    """Norms, biases, sinks, convolutions, learned positions, ..."""

    @property
    def decays(self) -> bool:
        """Whether weight decay applies to it."""
        return self is not Role.OTHER


class ParameterInfo(NamedTuple):
    """A parameter of a model, its name and its role."""

    name: str
    parameter: nn.Parameter
    role: Role


class HasModules(Protocol):
    """A model, or the part of one that this process has."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...


def parameter_info(model: HasModules) -> list[ParameterInfo]:
    """The trained parameters in the order of `named_parameters()`, each once. Raises as `matrices_of`."""
    found: dict[int, ParameterInfo] = {}
    for prefix, module in model.named_modules():
        matrices = matrices_of(module, prefix)
        vocabulary = isinstance(module, nn.Embedding | OutputProjection)
        for own_name, p in module.named_parameters(recurse=False):
            role = Role.MATRIX if own_name in matrices else Role.OTHER
            if vocabulary and own_name == "weight":
                role = Role.VOCABULARY
            if p.requires_grad:
                found.setdefault(id(p), ParameterInfo(f"{prefix}.{own_name}".lstrip("."), p, role))
    return list(found.values())


def matrices_of(module: nn.Module, name: str = "") -> tuple[str, ...]:
    """Names of a module's own parameters that multiply a token.

    Raises:
        ValueError: it has parameters of its own and does not state which of them are matrices.
    """
    if isinstance(module, nn.Linear):
        return ("weight",)
    if isinstance(module, nn.Embedding | nn.LayerNorm | nn.RMSNorm):
        return ()
    stated = getattr(type(module), "MATRICES", None)
    if stated is None:
        own = [own_name for own_name, _ in module.named_parameters(recurse=False)]
        if own:
            raise ValueError(
                f"{name or 'the module'} ({type(module).__name__}) has the parameters {', '.join(own)} and does not "
                f"state which of them are matrices; expected the class attribute MATRICES, as MATRICES = ({own[0]!r},) "
                "or MATRICES = () for none"
            )
    return stated or ()


def flops_per_token(module: nn.Module) -> float:
    """Forward and backward FLOPs of one token in the matrix products of a module; attention scores are not counted.

    6 a number of each matrix that the token meets: 2 forward, 4 backward. An embedding is looked up, which counts 0.
    """
    return module.flops_per_token() if isinstance(module, TensorParallelLayer) else _flops_of_matrices(module)


def _flops_of_matrices(module: nn.Module) -> float:
    matrices = matrices_of(module)
    own = sum(p.numel() for name, p in module.named_parameters(recurse=False) if name in matrices)
    return 6.0 * own + sum(flops_per_token(child) for child in module.children())


def attention_layers(module: nn.Module) -> list[AttentionLayer]:
    """The attention layers of a module, in order."""
    return [part for part in module.modules() if isinstance(part, AttentionLayer)]

"""Logits of an output head that are computed in chunks of tokens, when they are used."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.batch import IGNORE
from sightline.layers.loss import CHUNK_SIZE, Transform, linear_cross_entropy, losses_to_grads, transformed
from sightline.torch_private import disable_compiler

# Names of functions, methods and attributes of tensors, by how ChunkedLogits computes them.
METADATA = {"dim", "element_size", "is_floating_point", "ndim", "ndimension", "nelement", "numel", "shape", "size"}
OF_HIDDEN = {"device", "get_device", "is_cpu", "is_cuda", "is_meta", "layout"}
ELEMENTWISE = {"add", "clamp", "div", "mul", "multiply", "neg", "sub", "tanh", "true_divide"}
OPERATORS = ("__add__", "__mul__", "__neg__", "__radd__", "__rmul__", "__rsub__", "__sub__", "__truediv__")
OTHER_OPERATORS = ("__ge__", "__gt__", "__le__", "__lt__", "__matmul__", "__pow__", "__rtruediv__")
DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
RESHAPES = {"clone", "contiguous", "flatten", "reshape", "squeeze", "unsqueeze", "view"}
REDUCTIONS = {"amax", "argmax", "logsumexp"}


class ChunkedLogits:
    """The logits [..., V] of all tokens, as hidden states and weight until they are used, in place of a tensor.

    torch's functions find `__torch_function__`. These compute the logits of one chunk of tokens at a time:

    - cross-entropy with int64 labels, forward and backward (`linear_cross_entropy`)
    - elementwise functions with numbers, such as soft caps and scales, and other dtypes: recorded for later
    - selections of tokens: slices, masks, `view`, `split`, iteration
    - `argmax` over the vocabulary, and `amax` and `logsumexp` under `no_grad`

    Everything else computes the logits of all tokens, with a warning if they are more than one chunk, and keeps them:
    a function in place then changes the values that later functions read.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        functions: tuple[Transform, ...] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        """Hold the operands of the product in the dtype that it is computed in.

        hidden     [..., W]
        weight     [V, W]
        bias       [V]
        functions  elementwise functions, applied to the product in float32 or float64
        dtype      dtype of the logits; the default is that of `hidden`
        """
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.functions, self.dtype = functions, dtype or hidden.dtype
        self.requires_grad = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        self._version = weight._version
        self._value: Tensor | None = None

    @classmethod
    @disable_compiler
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls) and args[0]._value is None:
            result = args[0]._in_chunks(func, args[1:], kwargs)
            if result is not NotImplemented:
                return result
        values = [x.materialize(func.__name__) if isinstance(x, cls) else x for x in (*args, *kwargs.values())]
        return func(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"'ChunkedLogits' object has no attribute '{name}'")
        if name in OF_HIDDEN:
            return getattr(self.hidden, name)
        if name in METADATA:
            return getattr(self._metadata(), name)
        method = getattr(Tensor, name)
        if not callable(method):
            return getattr(self.materialize(name), name)
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self.__torch_function__(Tensor.__getitem__, (), (self, key))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.materialize("__setitem__")[key] = value

    def __len__(self) -> int:
        return len(self.hidden)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"ChunkedLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def materialize(self, name: str = "materialize") -> Tensor:
        """Return the logits of all tokens [..., V], with a warning that names the function which needs them.

        Raises:
            RuntimeError: if the weight has changed or was freed since the forward.
        """
        if self._value is None:
            if self.numel() > CHUNK_SIZE * len(self.weight):
                warnings.warn(
                    f"'{name}' needs the logits of all tokens, so the fused loss saves neither time nor memory here; "
                    "compute it in a forward without labels, or call sightline.hf.enable(model, fused_loss=False)",
                    stacklevel=2,
                )
            self._value = self._compute(self.hidden)
        return self._value

    def _compute(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of tokens with `hidden` [..., W]."""
        if self.weight._version != self._version or self.weight.untyped_storage().size() == 0:
            raise RuntimeError(
                "the weight of the output head has changed since the forward that returned these logits; read them "
                "before backward() and optimizer.step()"
            )
        product = F.linear(hidden, self.weight, self.bias)
        return self._transform(product.to(torch.promote_types(product.dtype, torch.float32))).to(self.dtype)

    def _transform(self, product: Tensor) -> Tensor:
        return functools.reduce(lambda value, function: function(value), self.functions, product)

    def _metadata(self) -> Tensor:
        return torch.empty(*self.hidden.shape[:-1], len(self.weight), dtype=self.dtype, device="meta")

    def _replace(self, **changes: Any) -> ChunkedLogits:
        fields = {name: getattr(self, name) for name in ("hidden", "weight", "bias", "functions", "dtype")}
        return ChunkedLogits(**(fields | changes))

    def _in_chunks(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a function that needs no logits of all tokens, or NotImplemented."""
        name = func.__name__
        if name in METADATA:
            return func(self._metadata(), *args, **kwargs)
        if name in DTYPES:
            return self._replace(dtype=DTYPES[name])
        if name in ELEMENTWISE or name in OPERATORS:
            if all(isinstance(value, int | float | None) for value in (*args, *kwargs.values())):
                return self._replace(functions=(*self.functions, lambda logits: func(logits, *args, **kwargs)))
            return NotImplemented
        if name in RESHAPES:
            return self._reshape(func, args, kwargs)
        if name in REDUCTIONS:
            return self._reduce(func, *args, **kwargs)
        own: dict[str, Callable[..., Any]] = {
            "__getitem__": self._select,
            "cross_entropy": self._cross_entropy,
            "detach": self._detach,
            "split": self._split,
            "to": self._to,
        }
        return own[name](*args, **kwargs) if name in own else NotImplemented

    def _reshape(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shape = func(self._metadata(), *args, **kwargs).shape
        if not shape or shape[-1] != len(self.weight):
            return NotImplemented
        return self._replace(hidden=self.hidden.reshape(*shape[:-1], self.hidden.shape[-1]))

    def _select(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        whole = bool(keys) and isinstance(keys[-1], slice) and keys[-1] == slice(None)
        ndims = [0 if k is None or k is Ellipsis else k.ndim if _is_mask(k) else 1 for k in keys]
        ellipsis = any(k is Ellipsis for k in keys[:-1])
        reaches_vocabulary = sum(ndims) >= self.ndim or (ellipsis and keys[-1] is not Ellipsis)
        return NotImplemented if reaches_vocabulary and not whole else self._replace(hidden=self.hidden[key])

    def _split(self, split_size: Any, dim: int = 0) -> Any:
        if dim % self.ndim == self.ndim - 1:
            return NotImplemented
        return tuple(self._replace(hidden=part) for part in self.hidden.split(split_size, dim))

    def _to(self, *args: Any, **kwargs: Any) -> Any:
        moved = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        return self._replace(dtype=moved.dtype) if moved.device == self.device else NotImplemented

    def _detach(self) -> ChunkedLogits:
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def _reduce(self, func: Callable[..., Any], dim: Any = None, keepdim: bool = False, **others: Any) -> Any:
        needs_gradients = func.__name__ != "argmax" and torch.is_grad_enabled()
        if dim not in (-1, self.ndim - 1) or needs_gradients or others:
            return NotImplemented
        tokens = self.hidden.detach().reshape(-1, self.hidden.shape[-1])
        with torch.no_grad():
            values = torch.cat([func(self._compute(chunk), -1) for chunk in tokens.split(CHUNK_SIZE)])
        return values.view(*self.shape[:-1], *([1] if keepdim else []))

    def _cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = IGNORE,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        plain = weight is None and size_average is None and reduce is None and label_smoothing == 0
        if not plain or self.ndim != 2 or target.ndim != 1 or ignore_index != IGNORE or reduction == "none":
            return NotImplemented
        gradients = transformed(self._transform) if self.functions else losses_to_grads
        loss = linear_cross_entropy(self.hidden, self.weight, target, bias=self.bias, losses_to_grads=gradients)
        if reduction == "mean":
            count = (target != IGNORE).sum().to(loss.device)
            loss = torch.where(count > 0, loss / count.clamp(min=1), math.nan)
        return loss.to(self.dtype)


def _is_mask(key: Any) -> bool:
    return isinstance(key, Tensor) and key.dtype == torch.bool


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)
    return lambda self, *args: self.__torch_function__(function, (), (self, *args))


for _name in (*OPERATORS, *OTHER_OPERATORS):
    setattr(ChunkedLogits, _name, _operator(_name))

"""Time of a training step by group of operators, forward and backward together.

A range of the profiler marks each module and function of a group while the forward runs. An operator of the backward
has the sequence number of the operator of the forward that it differentiates, and so belongs to the same group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile, record_function

from sightline.layers import Linear, RMSNorm, SwiGLU
from sightline.layers import attention as attention_layer
from sightline.models.decoder import Decoder
from sightline.training import step as training_step
from sightline.training.optimizer import AdamW

GROUPS = ("attention", "linear", "loss", "norm", "rope", "swiglu", "optimizer", "other")
PREFIX = "group: "
BACKWARD = "autograd::engine::evaluate_function"
PATCHED: tuple[tuple[Any, str, str], ...] = (
    (attention_layer, "attend", "attention"),
    (attention_layer, "rotate", "rope"),
    (Decoder, "head", "loss"),
    (Linear, "forward", "linear"),
    (RMSNorm, "forward", "norm"),
    (SwiGLU, "forward", "swiglu"),
    (training_step, "clip_gradients", "optimizer"),
    (AdamW, "step", "optimizer"),
)
"""Object, attribute and group. In nested ranges the inner one counts: the linear layers of a SwiGLU are `linear`."""


def profile_groups(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Mean seconds of a step by group. The time of Python between operators counts for the group that it is in."""
    with marked(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            with record_function(PREFIX + "other"):
                step()
    events = sorted(profiler.events() or [], key=lambda event: event.time_range.start)
    forward = forward_groups(events)
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        group = group_of(event, forward)
        if group is not None:
            seconds[group] += event.self_cpu_time_total / 1e6 / steps
    return seconds


@contextmanager
def marked() -> Iterator[None]:
    """Mark the functions of PATCHED with ranges of the profiler."""
    with ExitStack() as stack:
        for owner, name, group in PATCHED:
            stack.enter_context(patch.object(owner, name, in_range(group, getattr(owner, name))))
        yield


def in_range(group: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        with record_function(PREFIX + group):
            return function(*arguments, **options)

    return run


def forward_groups(events: Sequence[Any]) -> dict[int, str]:
    """Return the group of each operator of the forward by its sequence number. Events are in the order of their start.

    Operators that make no autograd node leave the number to the next operator, so the last event of a number made it.
    """
    return {event.sequence_nr: group for event in events if (group := range_of(event)) and event.sequence_nr >= 0}


def range_of(event: Any) -> str | None:
    """Group of the innermost range around an event; None in the backward."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if event.name.startswith(BACKWARD):
            return None
        event = event.cpu_parent
    return None


def group_of(event: Any, forward: dict[int, str]) -> str | None:
    """Group of an event of the forward or the backward; None outside the step.

    forward  group of the operator of the forward by sequence number
    """
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if event.name.startswith(BACKWARD):
            return forward.get(event.sequence_nr, "other")
        event = event.cpu_parent
    return None

"""Leakage test of any module: whether outputs depend on tokens that the attention masks hide from them, and where."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from sightline.batch import Batch
from sightline.masks import named_masks
from sightline.verify.influence import Influence, Masks, Trial, plan_trials
from sightline.verify.probe import Dependence, Probe, Untestable, unchanged

KINDS = {
    "embedding": r"embed|wte|wpe",
    "head": r"head\b|^output\b",
    "recurrent layer": r"linear_attn|delta|mamba|ssm|recurrent|rwkv|retention",
    "convolution": r"conv",
    "attention": r"attn|attention",
    "experts": r"expert|moe|router",
    "norm": r"norm|ln_",
    "mlp": r"mlp|feed_forward|dense",
    "layer": r"layer|block",
}
"""Plain words for modules, with the pattern of the attribute or the class that each is found by."""


MANY = 8
"""Children of a module, above which they are layers that follow each other; fewer may be parallel branches."""


@dataclass(frozen=True)
class LeakReport:
    """Result of a leakage test.

    leaks      whether any tested output depends on an input that is hidden from it
    gradient   largest relative gradient by a hidden input, exactly 0 without a leak; None: it could not be computed
    change     largest relative change of an output when inputs hidden from it change
    layer      qualified name of the module in which the leak begins; None without a leak; "" if in no submodule
    kind       plain word for it: attention, recurrent layer, mlp, ...
    source     (row, token) of the hidden input with the largest gradient; None without a leak
    target     (row, token) of the output that changes most; None without a leak
    documents  number of documents in the batch
    trials     number of trials, and how many there would be
    """

    leaks: bool
    gradient: float | None
    change: float
    layer: str | None
    kind: str | None
    source: tuple[int, int] | None
    target: tuple[int, int] | None
    documents: int
    trials: tuple[int, int]

    def __str__(self) -> str:
        gradient = "not computed" if self.gradient is None else f"{self.gradient:.3g}"
        size = f"change {self.change:.3g}, gradient {gradient} (relative)"
        tested = f"{self.documents} documents, {self.trials[0]} of {self.trials[1]} trials"
        if not self.leaks:
            return f"no leak: {size}; {tested}"
        assert self.source is not None and self.target is not None
        where = f"{self.layer} ({self.kind})" if self.layer else "the module itself, in no submodule"
        row, token = self.target
        source = "" if self.source == (-1, -1) else f", for example on token {self.source[1]} of row {self.source[0]}"
        return (
            f"leak: outputs depend on hidden tokens, {size}, from {where} on; "
            f"token {token} of row {row} changes most{source}; {tested}"
        )


def leaks(
    module: nn.Module,
    batch: Batch | Mapping[str, Any],
    masks: Masks,
    *,
    tokens: str | None = None,
    fixed_ids: Collection[int] = (),
    tokens_per_document: int | None = 2,
    max_trials: int | None = None,
) -> LeakReport:
    """Test whether an output of a module depends on an input that the masks hide from it.

    Two measurements must agree that it does not. The gradient of the outputs by the embeddings of hidden tokens must be
    exactly 0: masked attention multiplies by 0. The change of the outputs when the hidden tokens change must be
    rounding, at most 1e-4 (in bfloat16 and float16: 16 epsilons) of the change elsewhere: experts then compute batches
    of other sizes, whose sums differ in the last digits. The second finds what has no gradient, such as a selection of
    keys or a router with a limited capacity.

    The module runs in its mode, training or evaluation, with one seed. Its gradients, buffers, hooks and the state of
    the random numbers are restored. Its exceptions are raised. With several ranks, give all of them the same batch.

    batch                keyword arguments of the module; or a Batch, and the module is one of Sightline's decoders
    masks                the tokens that each token may attend to; a list has the masks of the layers in order
    tokens               name of the argument with the tokens, int [B, S], or their embeddings, float [B, S, W]
    fixed_ids            ids of tokens that are never changed, such as the placeholders of images
    tokens_per_document  output tokens in each document that are tested inside of their document; None: all. Between
                         documents, all tokens are tested.
    max_trials           upper limit of the trials of two forwards and one backward; None: no limit

    Raises:
        Untestable: if the batch has no tokens, masks and batch have different shapes, the outputs are not finite or
            ignore the tokens, or recomputation forbids the gradients. It is a ValueError.
    """
    if isinstance(batch, Batch):
        batch = {
            "tokens": batch.tokens, "positions": batch.positions, "attention_masks": named_masks(masks), **batch.extra
        }  # fmt: skip
    with unchanged(module):
        probe, influence = Probe(module, batch, tokens, fixed_ids), Influence(masks)
        if influence.union.shape[:2] != tuple(probe.shape):
            raise Untestable(
                f"the tokens are {tuple(probe.shape)}, but the masks are {influence.union}; expected one B and S"
            )
        trials, documents = plan_trials(influence, tokens_per_document)
        found = [measure(probe, trial) for trial in trials[:max_trials]]
        if found and not any(one.any_change for one in found):
            raise Untestable("no output changes with any token, so a leakage test shows nothing; check the weights")
        index = next((index for index, one in enumerate(found) if one.leaks), None)
        layer = None if index is None else find_layer(probe, trials[index])
    leaking = None if index is None else found[index]
    gradients = [one.gradient for one in found if one.gradient is not None]
    return LeakReport(
        leaks=leaking is not None,
        gradient=max(gradients, default=None if found else 0.0),
        change=max((one.change for one in found), default=0.0),
        layer=layer,
        kind=None if layer is None else kind_of(layer, module),
        source=None if leaking is None else leaking.source,
        target=None if leaking is None else leaking.target,
        documents=documents,
        trials=(len(found), len(trials)),
    )


def measure(probe: Probe, trial: Trial) -> Dependence:
    """Measure the output of the module itself.

    Raises:
        Untestable: if it is no floating-point tensor [B, S, ...] and contains none, or is not finite.
    """
    dependence = probe.measure(trial)
    if dependence is None:
        rows, length = probe.shape
        raise Untestable(
            f"the module returned no floating-point tensor [{rows}, {length}, ...]; expected one output per token"
        )
    return dependence


def find_layer(probe: Probe, trial: Trial) -> str:
    """Return the name of the module in which a leak begins: its arguments do not leak, its output does.

    The search goes from the module down: among the submodules that a module calls, it looks for the first with an
    output that leaks. It bisects long lists of layers: after a leak into the residual stream, all later layers leak.
    """

    @cache
    def output_leaks(name: str) -> bool:
        dependence = probe.measure(trial, name)
        return dependence is not None and dependence.leaks

    called, module = probe.called(), ""
    parents = {name: parent_of(name, set(called)) for name in called}
    while True:
        children = [name for name in called if parents[name] == module]
        first = bisect_left(children, True, key=output_leaks) if len(children) > MANY else 0
        index = next((i for i in range(first, len(children)) if output_leaks(children[i])), None)
        if index is None:
            return module
        argument = probe.measure(trial, children[index], argument=True)
        if argument is not None and argument.leaks:
            return module  # the leak begins between the calls of its submodules
        module = children[index]


def parent_of(name: str, called: Set[str]) -> str:
    """Return the innermost of the called modules that contains a submodule; "": none."""
    parent = name.rpartition(".")[0]
    while parent and parent not in called:
        parent = parent.rpartition(".")[0]
    return parent


def kind_of(name: str, module: nn.Module) -> str:
    """Return a plain word for a submodule."""
    words = f"{name.rpartition('.')[2]} {type(module.get_submodule(name)).__name__}".lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, words)), "module")

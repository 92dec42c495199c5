"""Leakage test of a model of transformers: which calls let documents of a packed row depend on each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sightline.hf.calls import CALLS, measure_call, name_of, random_call, transformers_model
from sightline.hf.documents import find_documents
from sightline.hf.enable import is_enabled
from sightline.hf.forward import ADDED
from sightline.masks import AttentionMask, document
from sightline.verify import LeakReport, Untestable

OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "loss_weights")
"""Keys of a batch that are no arguments of a leakage test: logits are tested."""


@dataclass(frozen=True)
class CallReport:
    """Result of one call: the report of the leakage test, or the message with which the model refused the call."""

    call: str
    arguments: str
    report: LeakReport | None
    refused: str | None

    @property
    def verdict(self) -> str:
        return "refused" if self.report is None else "leaks" if self.report.leaks else "no leak"


@dataclass(frozen=True)
class ModelReport:
    """Results of all calls of a model.

    model      its class
    attention  its attention implementation
    enabled    whether `sightline.hf.enable` has prepared it
    """

    model: str
    attention: str
    enabled: bool
    calls: Sequence[CallReport]

    @property
    def leaks(self) -> bool:
        """Whether any call leaks."""
        return self.leaking is not None

    @property
    def layer(self) -> str | None:
        """Qualified name of the module in which the leak of the first leaking call begins; None if none leaks."""
        return None if self.leaking is None or self.leaking.report is None else self.leaking.report.layer

    @property
    def leaking(self) -> CallReport | None:
        """The first call that leaks, None if none does."""
        return next((one for one in self.calls if one.report is not None and one.report.leaks), None)

    @property
    def summary(self) -> str:
        """One line: the model and how many calls leak."""
        verdicts = [one.verdict for one in self.calls]
        counts = f"{verdicts.count('leaks')} of {len(verdicts)} calls leak, {verdicts.count('refused')} refused"
        return f"{self.model}, attention {self.attention}{', enabled' if self.enabled else ''}: {counts}"

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return name, verdict, change, gradient and the layer where a leak begins (or the refusal) of each call."""
        return [
            (one.call, one.verdict, *(
                ("", "", one.refused or "") if (report := one.report) is None else (
                    f"{report.change:.2g}",
                    "-" if report.gradient is None else f"{report.gradient:.2g}",
                    f"{report.layer or 'the model itself'} ({report.kind})" if report.leaks else "",
                )
            ))
            for one in self.calls
        ]  # fmt: skip

    def __str__(self) -> str:
        lines = [("call", "verdict", "change", "gradient", "from layer"), *self.rows()]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        table = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[4]]) for line in lines
        ]
        return "\n".join([self.summary, *(line.rstrip() for line in table)])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values of JSON."""
        return {
            "model": self.model,
            "attention": self.attention,
            "enabled": self.enabled,
            "leaks": self.leaks,
            "layer": self.layer,
            "calls": [asdict(one) | {"verdict": one.verdict} for one in self.calls],
        }


def leaks(
    model: nn.Module, batch: Mapping[str, Any] | None = None, *, calls: Collection[str] | None = None
) -> ModelReport:
    """Test which calls of a model let outputs depend on tokens of other documents, in the mode that it is in.

    The model may have any attention implementation, be enabled or not, and be wrapped. A call that raises is listed as
    refused, with the message. Only dependence between documents is tested: within a document, the model decides.

    batch  arguments of one call, such as the batch of a collator, tested instead of small random rows. Its own fields
           state the documents: document_lengths, document_ids, seq_idx, cu_seq_lens_q, position_ids, attention_mask, or
           attention_masks, which say all
    calls  names of CALLS; None: all that apply to the model

    Raises:
        ValueError: if there is no model of transformers, a call is unknown, the batch states no documents, or nothing
            can be said about leaks because the outputs are not finite or cannot be differentiated.
    """
    inner = transformers_model(model)
    if batch is not None:
        masks, inputs = _masks_of(batch), {name: value for name, value in batch.items() if name not in OF_THE_LOSS}
        tested = {"batch": (", ".join(inputs), inputs, masks)}
    else:
        tested = {}
        for name in _choose_calls(inner, model, calls):
            inputs = random_call(inner, name)
            tested[name] = (CALLS[name], inputs, document(inputs.pop("documents")))
    reports = [_test(model, inner, name, *call) for name, call in tested.items()]
    attention = inner.config.get_text_config(decoder=True)._attn_implementation
    return ModelReport(name_of(inner), str(attention), is_enabled(model), reports)


def check_calls(names: Collection[str]) -> None:
    """Check that all are names of calls.

    Raises:
        ValueError: if one is not; the message lists the calls.
    """
    if unknown := sorted(set(names) - set(CALLS)):
        raise ValueError(f"unknown calls {', '.join(unknown)}; the calls are: {', '.join(CALLS)}")


def _choose_calls(inner: PreTrainedModel, model: nn.Module, chosen: Collection[str] | None) -> list[str]:
    check_calls(chosen or ())
    absent = set() if is_enabled(model) else {"document_ids"}
    if not _has_mrope(inner):
        absent |= {"mrope_3", "mrope_4"}
    return [name for name in CALLS if (name in chosen if chosen is not None else name not in absent)]


def _has_mrope(inner: PreTrainedModel) -> bool:
    """Return whether a model takes three positions for each token: in older versions only the configuration says so."""
    rope = getattr(inner.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return "mrope_section" in rope or any(hasattr(module, "mrope_section") for module in inner.modules())


def _masks_of(batch: Mapping[str, Any]) -> AttentionMask | dict[str, AttentionMask]:
    """Return the masks that a batch states."""
    if (masks := batch.get("attention_masks")) is not None:
        return masks if isinstance(masks, AttentionMask) else dict(masks)
    tokens = next((batch[name] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None), None)
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        raise ValueError(f"the batch has no input_ids [B, S], only {', '.join(batch)}")
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "position_ids", "attention_mask", *ADDED)
    stated = {name: batch[name] for name in names if batch.get(name) is not None}
    documents = find_documents((tokens.shape[0], tokens.shape[1]), **stated)
    if documents is None:
        raise ValueError(
            f"the batch states no documents, only {', '.join(batch)}; expected position_ids or document_ids"
        )
    return documents.mask


def _test(
    model: nn.Module, inner: PreTrainedModel, name: str, arguments: str, inputs: dict[str, Any], masks: Any
) -> CallReport:
    try:
        return CallReport(name, arguments, measure_call(model, inner, inputs, masks), None)
    except (torch.OutOfMemoryError, Untestable):
        raise
    except Exception as error:  # of any model, of any version
        message = " ".join(str(error).split())
        return CallReport(name, arguments, None, message if isinstance(error, ValueError) else f"{error!r:.300}")

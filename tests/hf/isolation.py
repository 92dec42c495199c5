"""Comparison of packed rows with each document alone, for one model of transformers and every kind of call."""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import sightline
import sightline.hf
from tests.support.hf_models import document_ids, packed_rows, quiet, tiny_model

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, and of gradients, relative to the largest element."""
LAYOUTS = ((21, 17, 26), (5, 30, 29))
PADDED = ("left padding", "generate")

Call = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """Outcome of one call.

    verdict   right
              refused: by an error of sightline
              ignored: the class ignores attn_implementation, the result is that of eager attention
              unsupported: eager attention raises an error too, or is wrong with padding
              rounding: documents are isolated, but the model amplifies rounding errors, with sdpa too
              error: any other error
              LEAK: a document depends on another one
              WRONG: the result differs for another reason
    error     largest difference of the logits from those of each document alone, relative to the largest logit
    gradient  the same for the gradients of the parameters; None where they are not compared
    reason    message of the error
    """

    verdict: str
    error: float | None = None
    gradient: float | None = None
    reason: str = ""


@dataclass
class Row:
    """Outcomes of one class: {call: outcome} without and with `enable`, and how stock attention does.

    stock  {call: largest change of a logit in documents 2 and 3 when a token of document 1 changes}, or an error
    """

    model: str
    cls: str
    stock: dict[str, float | str] = field(default_factory=dict)
    name_alone: dict[str, Outcome] = field(default_factory=dict)
    enabled: dict[str, Outcome] = field(default_factory=dict)
    refused: str = ""
    not_built: str = ""
    seconds: float = 0.0

    def verdict(self) -> str:
        """Return the verdict on packed calls: equal, refused, equal or refused (by call), isolated, or a fault."""
        if self.not_built:
            return "not built"
        found = {o.verdict for outcomes in (self.name_alone, self.enabled) for o in outcomes.values()}
        for fault in ("LEAK", "WRONG", "error"):
            if fault in found:
                return fault
        if self.refused:
            return "refused"
        packed = {o.verdict for name, o in self.enabled.items() if name not in PADDED} - {"unsupported"}
        if packed <= {"right", "refused"}:
            return {("refused",): "refused", ("right",): "equal"}.get(tuple(packed), "equal or refused")
        return "isolated"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict()}


class Packed:
    """Packed rows for the models of one class, and their reference: eager attention on each document alone.

    build  returns the same weights with a given attention implementation
    """

    def __init__(self, build: Callable[[str], PreTrainedModel]) -> None:
        self.eager = build("eager")
        self.takes_positions = "position_ids" in inspect.signature(type(self.eager).forward).parameters
        self.vocabulary = min(self.eager.config.get_text_config(decoder=True).vocab_size, 128)
        self.start = self._first_position()
        self.rounding = self._rounding(build)
        self._references: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}

    def _first_position(self) -> int:
        """Return the position of a document's first token if none are given: 0, but 2 in RoBERTa."""
        tokens = packed_rows((12,), vocabulary=self.vocabulary)["input_ids"]
        default = logits_of(self.eager, {"input_ids": tokens, "use_cache": False})
        for start in range(3) if self.takes_positions else ():
            positions = torch.arange(start, start + 12)[None]
            given = logits_of(self.eager, {"input_ids": tokens, "position_ids": positions, "use_cache": False})
            if relative(given, default) < TOLERANCE:
                return start
        return 0

    def _rounding(self, build: Callable[[str], PreTrainedModel]) -> float:
        """Return how far sdpa is from eager attention on one document: how much the model amplifies rounding errors."""
        call = {"input_ids": packed_rows((21,), vocabulary=self.vocabulary)["input_ids"], "use_cache": False}
        try:
            return relative(logits_of(build("sdpa"), call), logits_of(self.eager, call))
        except ValueError:  # the class has no sdpa
            return 0.0

    def calls(self) -> dict[str, tuple[Call, Sequence[Sequence[int]]]]:
        """Return the arguments of each call of packed rows, with the lengths of its documents."""
        first, rows = LAYOUTS[:1], packed_rows(*LAYOUTS, vocabulary=self.vocabulary)
        rows["position_ids"] += self.start
        row = {name: value[:1] for name, value in rows.items()}
        running = {"input_ids": row["input_ids"], "position_ids": torch.arange(64)[None] + self.start}
        cumulative = torch.tensor([0, *LAYOUTS[0]]).cumsum(0).to(torch.int32)
        starts = {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative, "max_length_q": 26, "max_length_k": 26}
        return {
            "default": (row, first),
            "use_cache=False": ({**row, "use_cache": False}, first),
            "all-ones mask": ({**row, "attention_mask": torch.ones_like(row["input_ids"])}, first),
            "cu_seq_lens": ({"input_ids": row["input_ids"], "use_cache": False, **starts}, first),
            "two rows": (rows, LAYOUTS),
            "document_ids": ({**running, "document_ids": document_ids(*first)}, first),
        }

    def reference(
        self, call: Call, layouts: Sequence[Sequence[int]], gradients: bool, enabled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits and the gradients of each document alone, with the positions that the call gives it.

        Without positions, those of a model run on over the row; an enabled one counts them in each document.
        """
        tokens = call["input_ids"]
        in_document = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in layouts])
        default = in_document if enabled else torch.arange(tokens.shape[1])[None]
        positions = call.get("position_ids", default + self.start)
        key = (tokens.shape, int(positions.max()), gradients)
        if key not in self._references:
            self._references[key] = self._each_alone(tokens, positions, layouts, gradients)
        return self._references[key]

    def _each_alone(
        self, tokens: Tensor, positions: Tensor, layouts: Sequence[Sequence[int]], gradients: bool
    ) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(gradients):
            rows = [
                torch.cat([self._alone(t, p) for t, p in zip(row.split(n), at.split(n), strict=True)], dim=1)
                for row, at, n in zip(tokens, positions.expand_as(tokens), map(list, layouts), strict=True)
            ]
            logits = torch.cat(rows)
            return logits.detach(), gradients_of(self.eager, logits) if gradients else None

    def _alone(self, tokens: Tensor, positions: Tensor) -> Tensor:
        given = {"position_ids": positions[None]} if self.takes_positions else {}
        return self.eager(input_ids=tokens[None], use_cache=False, **given).logits.float()

    def leak(self, model: PreTrainedModel, call: Call, layouts: Sequence[Sequence[int]]) -> float:
        """Return the largest change of a logit in later documents when a token of the first document changes."""
        (first, *_), tokens = layouts[0], call["input_ids"].clone()
        tokens[0, first // 2] = 4 + (int(tokens[0, first // 2]) - 3) % (self.vocabulary - 12)
        logits = logits_of(model, call)
        changed = logits_of(model, {**call, "input_ids": tokens})
        return float((logits - changed)[0, first:].abs().max())


def logits_of(model: PreTrainedModel, call: Call) -> Tensor:
    with torch.no_grad():
        return model(**call).logits.float()


def gradients_of(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Return the gradients of all parameters, concatenated, of a weighted sum of the logits."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) / logits.numel() ** 0.5
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def relative(came: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected element."""
    return float((came - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def check_call(
    rows: Packed,
    model: PreTrainedModel,
    call: Call,
    layouts: Sequence[Sequence[int]],
    gradients: bool = False,
    enabled: bool = False,
) -> Outcome:
    """Run a call of packed rows, and compare it with each document alone."""
    logits, gradient = rows.reference(call, layouts, gradients, enabled)
    with torch.set_grad_enabled(gradients):
        came = model(**call).logits.float()
        moved = relative(gradients_of(model, came), gradient) if gradient is not None else None
    error = relative(came.detach(), logits)
    if error <= TOLERANCE and (moved is None or moved <= TOLERANCE):
        return Outcome("right", error, moved)
    if not enabled and came.equal(logits_of(rows.eager, call)):
        return Outcome("ignored", error, moved)
    leak = rows.leak(model, call, layouts) / float(logits.abs().max())
    if leak > max(TOLERANCE, 3 * rows.rounding):
        return Outcome("LEAK", error, moved)
    return Outcome("rounding" if error < 3 * rows.rounding else "WRONG", error, moved)


def left_padded(rows: Packed) -> Call:
    tokens = packed_rows((24,), vocabulary=rows.vocabulary)["input_ids"].view(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def check_padding(rows: Packed, model: PreTrainedModel) -> Outcome:
    """Compare a left-padded batch with eager attention, if that equals each row alone."""
    call = left_padded(rows)
    real = call["attention_mask"].bool()
    if rows.takes_positions:
        call["position_ids"] = (real.cumsum(1) - 1).clamp(min=0) + rows.start
    expected, tolerance = logits_of(rows.eager, call)[real], max(TOLERANCE, 3 * rows.rounding)
    error = relative(logits_of(model, call)[real], expected)
    if error <= tolerance:
        return Outcome("right", error)
    alone = [
        logits_of(rows.eager, {"input_ids": row[kept][None]})[0]
        for row, kept in zip(call["input_ids"], real, strict=True)
    ]
    wrong = relative(expected, torch.cat(alone)) > tolerance
    return Outcome("unsupported" if wrong else "WRONG", error, reason="eager attention is wrong, too" if wrong else "")


def check_generation(rows: Packed, model: PreTrainedModel) -> Outcome:
    """Compare the tokens that a left-padded batch generates with those of eager attention."""
    return Outcome("right" if generate(rows, model).equal(generate(rows, rows.eager)) else "WRONG")


def generate(rows: Packed, model: PreTrainedModel) -> Tensor:
    model.generation_config.eos_token_id = None
    call = left_padded(rows)
    return model.generate(
        call["input_ids"], attention_mask=call["attention_mask"], max_new_tokens=4, do_sample=False, pad_token_id=0
    )


def attempt(run: Callable[[], Outcome], eager: Callable[[], Any]) -> Outcome:
    """Return the outcome of a call, or of its error; a call that `eager` cannot make either is not supported."""
    try:
        return run()
    except Exception as error:
        refused = is_refusal(error)
        reason = f"{error}" if refused else f"{type(error).__name__}: {error}"
    try:
        eager()
    except Exception:
        return Outcome("unsupported", reason=reason)
    return Outcome("refused" if refused else "error", reason=reason)


def is_refusal(error: Exception) -> bool:
    """Return whether sightline has raised the error, on purpose."""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, ValueError) and last.is_relative_to(Path(sightline.__file__).parent)


def check_calls(rows: Packed, model: PreTrainedModel, enabled: bool) -> dict[str, Outcome]:
    """Return the outcome of each call; gradients are compared in the default one."""
    outcomes = {}
    for name, (call, layouts) in rows.calls().items():
        if name == "document_ids" and not enabled:
            continue
        known = {key: value for key, value in call.items() if key != "document_ids"}
        gradients = name == "default"
        outcomes[name] = attempt(
            partial(check_call, rows, model, call, layouts, gradients, enabled),
            partial(check_call, rows, rows.eager, known, layouts, gradients),
        )
    outcomes["left padding"] = attempt(partial(check_padding, rows, model), partial(check_padding, rows, rows.eager))
    if model.can_generate():
        outcomes["generate"] = attempt(partial(check_generation, rows, model), partial(generate, rows, rows.eager))
    return outcomes


def stock_leaks(rows: Packed, build: Callable[[str], PreTrainedModel]) -> dict[str, float | str]:
    """Return how much stock attention leaks: eager as called by default, and sdpa in the two calls that matter."""
    calls, leaks = rows.calls(), {}
    for implementation, name in (("eager", "default"), ("sdpa", "use_cache=False"), ("sdpa", "all-ones mask")):
        try:
            model = rows.eager if implementation == "eager" else build(implementation)
            leaks[f"{implementation}, {name}"] = rows.leak(model, *calls[name])
        except Exception as error:
            leaks[f"{implementation}, {name}"] = f"{type(error).__name__}: {error}"
    return leaks


def check_class(model_type: str, cls: str) -> Row:
    """Build a class and check each call without `enable`, then with it."""
    row, began = Row(model_type, cls), time.perf_counter()

    def build(implementation: str) -> PreTrainedModel:
        return tiny_model(model_type, attn_implementation=implementation)

    with quiet():
        try:
            rows = Packed(build)
        except Exception as error:
            row.not_built = f"{type(error).__name__}: {error}"
            return row
        row.stock = stock_leaks(rows, build)
        try:
            row.name_alone = check_calls(rows, build("sightline"), enabled=False)
        except Exception as error:
            row.name_alone = {"attn_implementation": Outcome("unsupported", reason=f"{type(error).__name__}: {error}")}
        try:
            row.enabled = check_calls(rows, sightline.hf.enable(build("eager")), enabled=True)
        except ValueError as error:
            row.refused = str(error)
    row.seconds = time.perf_counter() - began
    return row

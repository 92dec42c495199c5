"""torch.compile: masks are lowered before the model runs, so layouts neither break nor add graphs."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import sightline.hf
from tests.support.hf_models import document_ids, packed_rows, tiny_model

LAYOUTS = [(21, 17, 26), (5, 5, 54), (30, 34), (64,), (1, 2, 3, 58), (40, 20, 4)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_layouts_share_graphs(family: str) -> None:
    model = sightline.hf.enable(tiny_model(family)).train()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    graphs = set()
    for layout in LAYOUTS:
        rows = packed_rows(layout)
        arguments = {**rows, "document_ids": document_ids(layout), "labels": rows["input_ids"]}
        results = []
        for run in (model, compiled):
            model.zero_grad()
            output = run(**arguments)
            output.loss.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            results.append([output.logits.detach(), *gradients])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1 and graphs.pop() <= 2
    around = ("_enter", "_mark_cache", "leave_forward")
    breaks = [reason for reason in counters["graph_break"] if not any(name in reason for name in around)]
    assert not breaks, "graphs break before and after the model only"


def test_compiled_model_without_enable_is_refused() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("sightline")
    with pytest.raises(Exception, match=r"call sightline\.hf\.enable\(model\) before torch\.compile"):
        torch.compile(model, backend="eager")(**packed_rows((30, 34)))


def test_another_batch_and_another_length_are_right() -> None:
    model = sightline.hf.enable(tiny_model("qwen3"))
    compiled = torch.compile(model, backend="eager")
    for layouts in ([(30, 34)], [(20, 20), (1, 39)], [(64, 64)]):
        with torch.no_grad():
            assert torch.equal(compiled(**packed_rows(*layouts)).logits, model(**packed_rows(*layouts)).logits)


def test_rules_of_one_type_that_differ_are_refused() -> None:
    model = sightline.hf.enable(tiny_model("gpt_oss"))
    model(**packed_rows((30, 34)))
    layers = [module for module in model.modules() if hasattr(module, "sightline_note")]
    rule = layers[0].sightline_note.rule
    layers[0].sightline_note = layers[0].sightline_note._replace(rule=type(rule)((rule, rule)))
    with pytest.raises(ValueError, match="layers of type sliding_attention have different masks"):
        torch.compile(model, backend="eager")(**packed_rows((30, 34)))

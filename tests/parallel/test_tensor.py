"""Layers shared by several processes: losses, logits and gradients are those of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sightline import Batch
from sightline.config import ParallelConfig
from sightline.generation import SamplingConfig, generate
from sightline.layers import (
    GatedDeltaNet,
    GroupedQueryAttention,
    MoE,
    MultiHeadLatentAttention,
    SwiGLU,
    TensorParallelLayer,
)
from sightline.models import VLMConfig, build_skeleton, config_of, init_model_weights
from sightline.models.qwen3_next import GatedAttention
from sightline.models.weight_init import fill_parameter
from sightline.parallel.compile import apply_compile
from sightline.parallel.mesh import Mesh
from sightline.parallel.shard import apply_shard
from sightline.parallel.tensor import apply_tensor, check_degree
from tests.support.processes import on_processes

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "llama3-debug": {"tied_embeddings": True},
    "llama4-debug": {},
    "qwen3-debug": {},
    "qwen3-debug-moe": {},
    "deepseek_v3-debug": {"mtp_loss_weight": 0.3},
    "gpt_oss-debug": {},
    "qwen3_next-debug": {},
    "vlm-debug": {},
}
LENGTH = 44


def packed() -> Batch:
    """Two rows of 44 tokens with different documents, one of them partly padding."""
    generator = torch.Generator().manual_seed(1)
    lengths = [30, 1, 20, 9, 17]
    documents = [torch.randint(500, (n,), generator=generator).tolist() for n in lengths]
    return Batch.from_documents(documents, length=LENGTH)


def rows_of(config: Any, dtype: torch.dtype) -> Batch:
    """The same rows, for a model that sees with an image of four tokens in each."""
    batch = packed()
    if not isinstance(config, VLMConfig):
        return batch
    batch.tokens[:, 3:7] = config.image_token_id
    batch.labels[:, 2:6] = -100
    generator = torch.Generator().manual_seed(2)
    patches = torch.randn(2, 20, config.vision.patch_channels, generator=generator, dtype=dtype)
    grid = torch.tensor([[[4, 4], [0, 0]], [[2, 8], [0, 0]]])
    return replace(batch, extra={"patches": patches, "patch_grid": grid})


def build(config: Any, mesh: Mesh | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """The same model on every mesh; no weight is 0 or 1."""
    model = build_skeleton(config).to(dtype)
    if mesh is not None:
        apply_tensor(model, mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    init_model_weights(model)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
        before = whole_of(parameter.detach())
        fill_parameter(parameter, lambda whole, before=before, noise=noise: whole.copy_(before + 0.1 * noise))
    return model


def whole_of(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def run(model: Any, batch: Batch, *, labels: bool) -> Tensor:
    return model(
        batch.tokens,
        attention_masks=model.get_attention_masks(batch),
        positions=batch.positions,
        labels=batch.labels if labels else None,
        **batch.extra,
    )


def learn(model: Any, batch: Batch, mesh: Mesh | None = None) -> dict[str, Tensor]:
    """Loss, whole gradients, what the routers have counted, and without gradients logits and loss; a row a forward."""
    result = {"loss": torch.zeros((), dtype=torch.float64)}
    for row in range(len(batch.tokens)):
        loss = run(model, batch[row : row + 1], labels=True)
        loss.backward()
        result["loss"] += loss.detach()
    gradients = {name: whole_of(parameter.grad) for name, parameter in model.named_parameters()}
    result |= {**gradients, "gradient norm": torch.nn.utils.get_total_norm(gradients.values())}
    with torch.no_grad():
        result["logits"] = run(model, batch, labels=False)
        result["evaluated"] = run(model, batch, labels=True)
    if mesh is not None:
        mesh.all_reduce(result["loss"], "loss"), mesh.all_reduce(result["evaluated"], "loss")
        return result | model.finish_step(lambda total: mesh.all_reduce(total, "loss"))
    return result | model.finish_step()


def differences(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The greatest difference of each, as a share of its greatest number. What is below 1e-6 is rounding: keys that no
    rotation turns have no gradient but that for a bias."""
    assert got.keys() == expected.keys()
    scales = {name: value.abs().max().clamp(min=1e-6) for name, value in expected.items()}
    return {name: float((got[name] - value).abs().max() / scales[name]) for name, value in expected.items()}


def learn_together(
    rank: int, names: list[str], degrees: dict[str, int], dtype: torch.dtype, sizes: dict[str, int]
) -> dict[str, dict[str, float]]:
    """For each model, how far this process is from one that is alone."""
    mesh = Mesh(ParallelConfig(**degrees), CPU)
    found = {}
    for name in names:
        known = vars(config_of(name))
        config = replace(config_of(name), **MODELS[name], **{k: v for k, v in sizes.items() if k in known})
        batch = rows_of(config, dtype)
        model = build(config, mesh, dtype)
        shapes = {name: parameter.shape for name, parameter in build_skeleton(config).named_parameters()}
        assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
        if mesh.size("loss") > 1:
            apply_shard(model, mesh, dtype="float32")
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        share = 2 // mesh.size("data")
        own = slice(mesh.index("data") * share, (mesh.index("data") + 1) * share)
        expected = learn(build(config, dtype=dtype), batch)
        expected["logits"] = expected["logits"][own]
        found[name] = differences(learn(model, batch[own], mesh), expected)
    return found


def assert_close(found: list[dict[str, dict[str, float]]], tolerance: float) -> None:
    for of_process in found:
        for model, shares in of_process.items():
            assert max(shares.values()) < tolerance, (model, {n: d for n, d in shares.items() if d >= tolerance})


def test_two_processes_compute_what_one_computes() -> None:
    """In float64, where nothing but a mistake makes a difference."""
    assert_close(on_processes(2, learn_together, list(MODELS), {"tensor": 2}, torch.float64, {}), 1e-9)


@pytest.mark.slow
def test_in_float32_loss_and_gradient_norm_are_those_of_one_process() -> None:
    found = on_processes(2, learn_together, list(MODELS), {"tensor": 2}, torch.float32, {})
    numbers = ("loss", "evaluated", "logits", "gradient norm")
    assert_close([{m: {n: shares[n] for n in numbers} for m, shares in of_one.items()} for of_one in found], 1e-5)


@pytest.mark.slow
def test_four_processes_compute_what_one_computes() -> None:
    sizes = {"num_heads": 4, "num_kv_heads": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 8}
    assert_close(on_processes(4, learn_together, list(MODELS), {"tensor": 4}, torch.float64, sizes), 1e-9)


def test_with_shared_weights() -> None:
    names = ["gpt_oss-debug"]
    assert_close(on_processes(4, learn_together, names, {"shard": 2, "tensor": 2}, torch.float64, {}), 1e-9)


@pytest.mark.slow
def test_with_shared_weights_of_every_family() -> None:
    degrees = {"shard": 2, "tensor": 2}
    assert_close(on_processes(4, learn_together, list(MODELS), degrees, torch.float64, {}), 1e-9)


class Numbers:
    """A tokenizer whose text is the token ids."""

    eos_id = -1

    def encode_prompt(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def speak(rank: int, names: list[str]) -> list[str]:
    """What each model says, on several processes or alone."""
    mesh = Mesh(ParallelConfig(tensor=2), CPU) if torch.distributed.is_initialized() else None
    models = [build(replace(config_of(name), **MODELS[name]), mesh) for name in names]
    return [generate(model, Numbers(), "3 1 4 1 5", SamplingConfig(max_new_tokens=9, seed=1)) for model in models]


def test_processes_say_together_what_one_says() -> None:
    """Prompts and single tokens, which no degree divides."""
    names = ["llama3-debug", "deepseek_v3-debug", "qwen3_next-debug"]
    alone = speak(0, names)
    assert all(len(set(text.split())) > 4 for text in alone)
    assert on_processes(2, speak, names) == [alone, alone]


def train_in(rank: int, length: int) -> str:
    """What training rows of a length says."""
    model = build(config_of("llama3-debug"), Mesh(ParallelConfig(tensor=2), CPU))
    batch = Batch.from_documents([list(range(1, length + 1))], length=length)
    with pytest.raises(ValueError) as error:
        run(model, batch, labels=True)
    return str(error.value)


def test_a_row_that_cannot_be_shared_is_refused() -> None:
    assert on_processes(2, train_in, 7)[1] == (
        "parallel.tensor 2 does not divide the 7 tokens of a row, which it shares between the layers; use 6 or 8 "
        "tokens (with parallel.context, of each of its processes), or parallel.tensor 1 or 7"
    )


@pytest.mark.parametrize(
    ("name", "degree", "words"),
    [
        ("llama3-debug", 4, "4 does not divide the 2 key/value heads of Llama3; use parallel.tensor 2"),
        ("llama3-debug", 3, "the 512 tokens of the vocabulary nor the 2 key/value heads nor .* use parallel.tensor 2"),
        ("deepseek_v3-debug", 8, "8 does not divide the 4 heads of DeepseekV3; use parallel.tensor 4"),
        ("gpt_oss-120b", 16, "16 does not divide the 8 key/value heads of GptOss; use parallel.tensor 8"),
        ("qwen3_next-debug", 4, "2 key heads of a recurrent layer nor the 2 key/value heads of Qwen3Next"),
        ("vlm-debug", 4, "4 does not divide the 2 key/value heads of VLM; use parallel.tensor 2"),
    ],
)
def test_a_degree_that_does_not_fit_is_refused(name: str, degree: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_degree(build_skeleton(name), degree)


def test_every_name_of_a_plan_is_that_of_a_weight() -> None:
    """A misspelt one would leave its weight whole, and every result right."""
    missed: dict[type, set[str]] = {}
    for name, changes in MODELS.items():
        for layer in build_skeleton(replace(config_of(name), **changes)).modules():
            if isinstance(layer, TensorParallelLayer):
                weights = [weight for weight, _ in layer.named_parameters()]
                for kind in type(layer).__mro__:
                    keys = {*vars(kind).get("SHARD_DIMS", ()), *vars(kind).get("PARTIAL_SUMS", ())}
                    still = {key for key in keys if not any(f"{w}.".startswith(f"{key}.") for w in weights)}
                    missed[kind] = missed.get(kind, keys) & still
    missed[GatedAttention].discard("sinks")  # gated attention has none
    assert not any(missed.values()), missed
    assert missed.keys() >= {GroupedQueryAttention, MultiHeadLatentAttention, GatedDeltaNet, SwiGLU, MoE}


def compile_layers(rank: int, layers: int) -> tuple[float, int]:
    """The greatest difference that compiling makes to a gradient, and the graphs it takes."""
    torch._dynamo.reset()
    config, mesh = replace(config_of("llama3-debug"), num_layers=layers), Mesh(ParallelConfig(tensor=2), CPU)
    eager, compiled = build(config, mesh), build(config, mesh)
    apply_compile(compiled, backend="eager")
    found = differences(learn(compiled, packed()), learn(eager, packed()))
    return max(found.values()), torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_one_compiled_layer_serves_all() -> None:
    """They are of one class: see `expose_local_parameters`."""
    (of_two, graphs), (of_four, graphs_of_four) = (on_processes(2, compile_layers, layers)[0] for layers in (2, 4))
    assert max(of_two, of_four) < 1e-9
    assert graphs_of_four == graphs > 0


def held(rank: int) -> tuple[int, int]:
    """Numbers of the weights of this process, and of all."""
    model = build_skeleton("qwen3-30b-a3b")
    whole = sum(parameter.numel() for parameter in model.parameters())
    apply_tensor(model, Mesh(ParallelConfig(tensor=2), CPU))
    return sum(parameter.to_local().numel() for parameter in model.parameters()), whole


def test_a_process_holds_its_part_of_the_weights() -> None:
    """Whole are only norms and routers."""
    (part, whole), other = on_processes(2, held)
    assert other == (part, whole) and whole == 30_532_122_624
    assert part / whole == pytest.approx(0.5, abs=0.001)

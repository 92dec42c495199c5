"""Tensor parallelism: losses, logits and gradients equal those of one process."""

from __future__ import annotations

import math
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
from sightline.parallel.mesh import Degrees, Mesh
from sightline.parallel.shard import apply_shard
from sightline.parallel.tensor import apply_tensor, check_tensor
from tests.support.processes import run_on_ranks

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
    """Return two rows of 44 tokens with different documents, one of them partly padding."""
    generator = torch.Generator().manual_seed(1)
    lengths = [30, 1, 20, 9, 17]
    documents = [torch.randint(500, (n,), generator=generator).tolist() for n in lengths]
    return Batch.from_documents(documents, length=LENGTH)


def rows_of(config: Any, dtype: torch.dtype) -> Batch:
    """Return the rows of `packed`; for a VLM, each with an image of four tokens."""
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
    """Return the same model on every mesh; no weight is 0 or 1."""
    model = build_skeleton(config).to(dtype)
    if mesh is not None:
        apply_tensor(model, mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    init_model_weights(model)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
        before = full_tensor(parameter.detach())
        fill_parameter(parameter, lambda full, before=before, noise=noise: full.copy_(before + 0.1 * noise))
    return model


def full_tensor(value: Tensor) -> Tensor:
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
    """Return loss, full gradients and router scalars, one row per forward, and logits and loss under `no_grad`."""
    result = {"loss": torch.zeros((), dtype=torch.float64)}
    for row in range(len(batch.tokens)):
        loss = run(model, batch[row : row + 1], labels=True)
        loss.backward()
        result["loss"] += loss.detach()
    gradients = {name: full_tensor(parameter.grad) for name, parameter in model.named_parameters()}
    result |= {**gradients, "gradient norm": torch.nn.utils.get_total_norm(gradients.values())}
    with torch.no_grad():
        result["logits"] = run(model, batch, labels=False)
        result["evaluated"] = run(model, batch, labels=True)
    if mesh is not None:
        mesh.all_reduce(result["loss"], "loss"), mesh.all_reduce(result["evaluated"], "loss")
        return result | model.finish_step(lambda total: mesh.all_reduce(total, "loss"))
    return result | model.finish_step()


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the greatest difference of each tensor, relative to its greatest absolute value, at least 1e-6: the true
    gradient of a bias of unrotated keys is 0, so its values are rounding errors."""
    assert actual.keys() == expected.keys()
    scales = {name: value.abs().max().clamp(min=1e-6) for name, value in expected.items()}
    return {name: float((actual[name] - value).abs().max() / scales[name]) for name, value in expected.items()}


def compare_with_one_process(
    rank: int, names: list[str], degrees: dict[str, int], dtype: torch.dtype, sizes: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Return the differences between this rank's results and those of one process, by model."""
    mesh = Mesh(ParallelConfig(**degrees), CPU)
    found = {}
    for name in names:
        fields = vars(config_of(name))
        config = replace(config_of(name), **MODELS[name], **{k: v for k, v in sizes.items() if k in fields})
        batch = rows_of(config, dtype)
        model = build(config, mesh, dtype)
        shapes = {name: parameter.shape for name, parameter in build_skeleton(config).named_parameters()}
        assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
        if mesh.size("loss") > 1:
            apply_shard(model, mesh, dtype="float32")
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        share = 2 // mesh.size("data")
        local_rows = slice(mesh.index("data") * share, (mesh.index("data") + 1) * share)
        expected = learn(build(config, dtype=dtype), batch)
        expected["logits"] = expected["logits"][local_rows]
        found[name] = differences(learn(model, batch[local_rows], mesh), expected)
    return found


def assert_close(found: list[dict[str, dict[str, float]]], tolerance: float) -> None:
    for by_model in found:
        for model, errors in by_model.items():
            assert max(errors.values()) < tolerance, (model, {n: e for n, e in errors.items() if e >= tolerance})


def test_two_ranks_equal_one() -> None:
    """In float64, so that rounding cannot hide an error."""
    assert_close(run_on_ranks(2, compare_with_one_process, list(MODELS), {"tensor": 2}, torch.float64, {}), 1e-9)


@pytest.mark.slow
def test_two_ranks_equal_one_in_float32() -> None:
    found = run_on_ranks(2, compare_with_one_process, list(MODELS), {"tensor": 2}, torch.float32, {})
    numbers = ("loss", "evaluated", "logits", "gradient norm")
    assert_close([{m: {n: errors[n] for n in numbers} for m, errors in models.items()} for models in found], 1e-5)


@pytest.mark.slow
def test_four_ranks_equal_one() -> None:
    sizes = {"num_heads": 4, "num_kv_heads": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 8}
    assert_close(run_on_ranks(4, compare_with_one_process, list(MODELS), {"tensor": 4}, torch.float64, sizes), 1e-9)


def test_with_fsdp() -> None:
    names = ["gpt_oss-debug"]
    assert_close(run_on_ranks(4, compare_with_one_process, names, {"shard": 2, "tensor": 2}, torch.float64, {}), 1e-9)


@pytest.mark.slow
def test_every_family_with_fsdp() -> None:
    degrees = {"shard": 2, "tensor": 2}
    assert_close(run_on_ranks(4, compare_with_one_process, list(MODELS), degrees, torch.float64, {}), 1e-9)


class Numbers:
    """A tokenizer whose text is the list of token ids."""

    eos_id = -1

    def encode_prompt(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def generate_texts(rank: int, names: list[str]) -> list[str]:
    """Return a text from each model, on a mesh if the process group is initialized."""
    mesh = Mesh(ParallelConfig(tensor=2), CPU) if torch.distributed.is_initialized() else None
    models = [build(replace(config_of(name), **MODELS[name]), mesh) for name in names]
    return [generate(model, Numbers(), "3 1 4 1 5", SamplingConfig(max_new_tokens=9, seed=1)) for model in models]


def test_generation_equals_one_process() -> None:
    """The degree does not divide the length of the prompt nor that of single tokens."""
    names = ["llama3-debug", "deepseek_v3-debug", "qwen3_next-debug"]
    expected = generate_texts(0, names)
    assert all(len(set(text.split())) > 4 for text in expected)
    assert run_on_ranks(2, generate_texts, names) == [expected, expected]


@pytest.mark.parametrize(
    ("degrees", "length", "words"),
    [
        ({"tensor": 2}, 7, "2 does not divide the 7 tokens of a row, which .*--training.sequence-length 6 or 8, or"),
        (
            {"tensor": 2, "context": 3},
            21,
            "2 does not divide the 7 tokens .* 3 ranks of parallel.context has.* 18 or 24",
        ),
    ],
)
def test_row_length_must_be_divisible(degrees: dict[str, int], length: int, words: str) -> None:
    with pytest.raises(ValueError, match=rf"parallel.tensor {words}.*parallel.tensor 1$"):
        check_tensor(
            build_skeleton("llama3-debug"), Degrees(ParallelConfig(**degrees), math.prod(degrees.values())), length
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
def test_degree_must_divide_the_vocabulary_and_all_units(name: str, degree: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_tensor(build_skeleton(name), Degrees(ParallelConfig(tensor=degree), degree), 48)


def test_all_names_in_shard_dims_and_partial_sums_exist() -> None:
    """A misspelled name would leave its weight replicated without changing any result."""
    unmatched: dict[type, set[str]] = {}
    for name, changes in MODELS.items():
        for layer in build_skeleton(replace(config_of(name), **changes)).modules():
            if isinstance(layer, TensorParallelLayer):
                weights = [weight for weight, _ in layer.named_parameters()]
                for kind in type(layer).__mro__:
                    keys = {*vars(kind).get("SHARD_DIMS", ()), *vars(kind).get("PARTIAL_SUMS", ())}
                    unmatched_here = {key for key in keys if not any(f"{w}.".startswith(f"{key}.") for w in weights)}
                    unmatched[kind] = unmatched.get(kind, keys) & unmatched_here
    unmatched[GatedAttention].discard("sinks")  # gated attention has no sinks
    assert not any(unmatched.values()), unmatched
    assert unmatched.keys() >= {GroupedQueryAttention, MultiHeadLatentAttention, GatedDeltaNet, SwiGLU, MoE}


def compile_layers(rank: int, layers: int) -> tuple[float, int]:
    """Return the greatest difference between compiled and eager results, and the number of compiled graphs."""
    torch._dynamo.reset()
    config, mesh = replace(config_of("llama3-debug"), num_layers=layers), Mesh(ParallelConfig(tensor=2), CPU)
    eager, compiled = build(config, mesh), build(config, mesh)
    apply_compile(compiled, backend="eager")
    found = differences(learn(compiled, packed()), learn(eager, packed()))
    return max(found.values()), torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_layers_share_a_compiled_graph() -> None:
    """All layers have one class: see `expose_local_parameters`."""
    (of_two, graphs), (of_four, graphs_of_four) = (run_on_ranks(2, compile_layers, layers)[0] for layers in (2, 4))
    assert max(of_two, of_four) < 1e-9
    assert graphs_of_four == graphs > 0


def count_weights(rank: int) -> tuple[int, int]:
    """Return the number of elements in this rank's weights and in the full weights."""
    model = build_skeleton("qwen3-30b-a3b")
    full = sum(parameter.numel() for parameter in model.parameters())
    apply_tensor(model, Mesh(ParallelConfig(tensor=2), CPU))
    return sum(parameter.to_local().numel() for parameter in model.parameters()), full


def test_each_rank_stores_half_of_the_weights() -> None:
    """Only norms and routers are replicated."""
    (local, full), other = run_on_ranks(2, count_weights)
    assert other == (local, full) and full == 30_532_122_624
    assert local / full == pytest.approx(0.5, abs=0.001)

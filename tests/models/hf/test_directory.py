import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.fsdp import fully_shard

from sightline.models import FAMILIES, MODELS, Family, build_model, load_pretrained, save_pretrained
from sightline.models.hf.directory import read_pretrained
from sightline.models.hf.format import HuggingFace, Weight, group_weights
from sightline.models.hf.source import find_family, read_model_config
from sightline.models.llama3 import LLAMA3

DEBUG = [name for name in MODELS if "-debug" in name]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build_model("llama3-debug")


@pytest.fixture
def directory(model: Any, tmp_path: Path) -> Path:
    """A saved model in several files, so that a test can damage one of them."""
    save_pretrained(model, tmp_path / "hf", max_shard_bytes=200_000)
    return tmp_path / "hf"


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", DEBUG)
def test_save_and_load_round_trip(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(name)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn_like(tensor))
    save_pretrained(model, tmp_path)
    back = load_pretrained(tmp_path)
    assert same(model.state_dict(), back.state_dict())
    assert type(back) is type(model)
    assert dataclasses.asdict(back.config) == {
        **dataclasses.asdict(model.config),
        **({"head_dim": model.config.resolved_head_dim} if hasattr(model.config, "resolved_head_dim") else {}),
    }


def test_every_family_has_a_debug_preset_and_a_format() -> None:
    built = {type(build_model(name)) for name in DEBUG}
    assert built == {family.model for family in FAMILIES if family.hf} and len(built) == len(FAMILIES)


def test_shard_sizes_and_index(model: Any, directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(directory.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i:05}-of-00003.safetensors" for i in range(1, 4)]
    sizes = []
    for file in files:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            assert names and {index["weight_map"][name] for name in names} == {file.name}
            assert opened.metadata() == {"format": "pt"}
            sizes.append(sum(opened.get_tensor(name).nbytes for name in names))
    assert index["metadata"]["total_size"] == sum(sizes) == 4 * sum(p.numel() for p in model.parameters())
    assert max(sizes) <= 200_000
    assert same(load_pretrained(directory).state_dict(), model.state_dict())


def test_tensor_larger_than_max_shard_bytes_gets_its_own_file(model: Any, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(model.state_dict())


def test_dtypes(model: Any, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    half = load_pretrained(tmp_path)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    wide = load_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.output.weight, model.output.weight.bfloat16().float())


def test_load_passes_the_attention_backend(directory: Path) -> None:
    assert load_pretrained(directory, attention_backend="reference").attention_backend == "reference"


def test_tied_embeddings_are_saved_once_and_a_copy_is_ignored(tmp_path: Path) -> None:
    config = dataclasses.replace(MODELS["llama3-debug"], tied_embeddings=True)
    model = build_model(config)
    save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # as some published files have it
    safetensors.torch.save_file(tensors, file)
    assert same(load_pretrained(tmp_path).state_dict(), model.state_dict())


def test_tokenizer_and_generation_config_are_copied(model: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "README.md", "model.bin"):
        (source / name).write_text(name)
    (source / "config.json").write_text('{"eos_token_id": [7, 8], "hidden_size": 9, "max_position_embeddings": 99}')
    save_pretrained(model, tmp_path / "hf", source=source, config_fields={"eos_token_id": 1, "bos_token_id": 2})
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    kept = {"tokenizer.json", "generation_config.json", "chat_template.jinja"}
    assert names == {"config.json", "model.safetensors", *kept}
    assert all((tmp_path / "hf" / name).read_text() == name for name in kept)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["max_position_embeddings"]) == ([7, 8], 2, 99)
    assert config["hidden_size"] == 64


def change_tensors(directory: Path, change: Any) -> None:
    """Apply `change(tensors)` and rewrite all files as one."""
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink()
    change(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors")


def test_first_invalid_tensor_is_named(model: Any, directory: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    for file, change, message in (
        ("missing", lambda t: t.pop(name), rf"lack {name}; expected the tensors"),
        ("two", lambda t: [t.pop(name), t.pop("model.norm.weight")], rf"lack {name} \(and 1 more\)"),
        ("more", lambda t: t.update(extra=torch.ones(1)), "have the unexpected extra; expected"),
        ("shape", lambda t: t.update({name: torch.ones(3, 4)}), rf"{name} in .* has shape \(3, 4\); .*\(32, 64\)"),
        ("older", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}), None),
    ):
        copy = tmp_path / file
        save_pretrained(model, copy, max_shard_bytes=200_000)
        change_tensors(copy, change)
        if message is None:
            assert same(load_pretrained(copy).state_dict(), model.state_dict())
            continue
        with pytest.raises(ValueError, match=message):
            load_pretrained(copy)


def test_failed_load_changes_nothing(model: Any, directory: Path) -> None:
    other = build_model("llama3-debug")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    change_tensors(directory, lambda t: t.update({"lm_head.weight": torch.ones(1, 1)}))
    with pytest.raises(ValueError, match=r"lm_head.weight in .* has shape \(1, 1\); expected \(512, 64\)"):
        read_pretrained(other, directory)
    assert same(other.state_dict(), before)


def edit_config(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= fields
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json does not exist; expected a Hugging Face directory"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON .*; it is damaged"),
        (lambda d: edit_config(d, architectures="absent"), "is not the config of a Hugging Face model"),
        (
            lambda d: edit_config(d, architectures=["Gpt2"]),
            r"contains a Gpt2, which is not supported.*--family package\.module:NAME",
        ),
        (lambda d: edit_config(d, hidden_size="absent"), "has no field 'hidden_size', which LlamaForCausalLM needs"),
        (lambda d: edit_config(d, quantization_config={"quant_method": "fp8"}), r"are quantized \(fp8\); expected"),
        (lambda d: edit_config(d, dtype="int3"), "config.json has dtype 'int3'; expected float32"),
        (lambda d: (d / "model-00002-of-00003.safetensors").unlink(), "is incomplete: .* lists model-00002-of-00003"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "index.json is damaged"),
        (
            lambda d: [file.unlink() for file in d.glob("model*")],
            "contains no weights; expected model.safetensors, or .*index.json and its files: download it again",
        ),
        (
            lambda d: (d / "model-00003-of-00003.safetensors").write_bytes(b"short"),
            "model-00003-of-00003.safetensors cannot be read .*truncated",
        ),
    ],
)
def test_damaged_directory_raises(directory: Path, damage: Any, message: str) -> None:
    damage(directory)
    with pytest.raises(ValueError, match=message):
        load_pretrained(directory)


def test_truncated_file_raises(directory: Path) -> None:
    file = directory / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model-00001-of-.* cannot be read"):
        load_pretrained(directory)


def test_unsupported_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the supported architectures are: LlamaForCausalLM, .*Qwen3ForCausalLM"):
        find_family({"architectures": ["Other"]}, tmp_path, FAMILIES)


def test_existing_weights_are_not_overwritten(model: Any, directory: Path) -> None:
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(ValueError, match="already contains model weights; choose another directory"):
        save_pretrained(model, directory)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    with pytest.raises(ValueError, match="cannot save a Linear as a Hugging Face directory; expected one of Llama3, "):
        save_pretrained(torch.nn.Linear(1, 1), directory / "other")
    with pytest.raises(ValueError, match="max-shard-bytes must be at least 1, got 0"):
        save_pretrained(model, directory / "other", max_shard_bytes=0)


def test_saving_a_sharded_model_raises(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(
            ValueError, match=r"embedding.weight is a DTensor, .* Save a checkpoint instead: sightline convert"
        ):
            save_pretrained(fully_shard(build_model("llama3-debug")), tmp_path)
    finally:
        dist.destroy_process_group()
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_no_files(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        safetensors.torch.save_file(tensors, path, metadata)

    monkeypatch.setattr("sightline.models.hf.files.save_file", save_file)
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(
        OSError, match=r"could not write the model to .*No space left on device; all its files were removed"
    ):
        save_pretrained(model, tmp_path, max_shard_bytes=200_000)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    monkeypatch.undo()
    save_pretrained(model, tmp_path)
    assert same(load_pretrained(tmp_path).state_dict(), model.state_dict())


MEASURE = """
    import re, sys
    from pathlib import Path
    from sightline.models import load_pretrained, save_pretrained

    def peak():
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

    load_pretrained(sys.argv[1])
    before = peak()
    model = load_pretrained(sys.argv[3])
    if sys.argv[2] == "save":
        save_pretrained(model, sys.argv[4], max_shard_bytes=10_000_000)
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc/self/status")
@pytest.mark.parametrize("action", ["load", "save"])
def test_peak_memory_is_the_model_and_one_file(action: str, tmp_path: Path) -> None:
    """A model of 120 MiB in files of 10 MB: all files in memory at once would double the peak."""
    small = build_model("llama3-debug")
    save_pretrained(small, tmp_path / "small")
    config = dataclasses.replace(
        MODELS["llama3-debug"], hidden_size=512, intermediate_size=2048, num_layers=8, vocab_size=512
    )
    model = build_model(config)
    size = sum(p.nbytes for p in model.parameters()) / 1024
    assert size > 120_000
    save_pretrained(model, tmp_path / "large", max_shard_bytes=10_000_000)
    arguments = [tmp_path / "small", action, tmp_path / "large", tmp_path / "again"]
    script = [sys.executable, "-c", textwrap.dedent(MEASURE), *map(str, arguments)]
    grown = int(subprocess.run(script, check=True, capture_output=True, text=True).stdout)
    assert size - 5_000 < grown < size + 40_000


def test_weights_must_cover_the_model(model: Any) -> None:
    weights = [weight for weight in LLAMA3.hf.weights(model.config) if weight.ours != "norm.weight"]
    with pytest.raises(AssertionError, match=r"do not cover \['norm.weight'\]"):
        group_weights(model, weights)


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    size: int


class Toy(torch.nn.Module):
    def __init__(self, config: ToyConfig, attention_backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.gate = torch.nn.Parameter(torch.empty(2, 1, config.size))  # two experts of [1, 3]
        self.even = torch.nn.Parameter(torch.empty(2))
        self.odd = torch.nn.Parameter(torch.empty(2))
        self.register_buffer("rotated", torch.empty(4))

    def check_backend(self, device: torch.device, dtype: torch.dtype, *, training: bool) -> None:
        """Accept every backend: the model has no attention."""


TOY = Family(
    name="toy",
    model=Toy,  # type: ignore[arg-type]
    config=ToyConfig,
    hf=HuggingFace(
        architectures=("Toy",),
        config_from_hf=lambda hf: {"size": hf["hidden_size"]},
        config_to_hf=lambda config: {"architectures": ["Toy"], "hidden_size": config.size},
        weights=lambda config: [
            *(Weight(f"experts.{e}", "gate", of_ours=lambda t, e=e: t[e].T) for e in range(2)),
            Weight("mixed", "even", of_theirs=lambda t: t[::2], shape=(4,)),
            Weight("mixed", "odd", of_theirs=lambda t: t[1::2], shape=(4,)),
            Weight(
                "pairs",
                "rotated",
                of_theirs=lambda t: t.unflatten(0, (2, 2)).T,
                of_ours=lambda t: t.unflatten(0, (2, 2)),
                shape=(4,),
            ),
        ],
    ),
)


def test_views_convert_tensors_in_both_directions(tmp_path: Path) -> None:
    """The three examples of format.py's docstring, by literals, with a family from outside the package."""
    toy = Toy(ToyConfig(3))
    with torch.no_grad():
        toy.gate.copy_(torch.arange(6.0).view(2, 1, 3))
        toy.even.copy_(torch.tensor([10.0, 12.0]))
        toy.odd.copy_(torch.tensor([11.0, 13.0]))
        toy.rotated.copy_(torch.tensor([0.0, 2.0, 1.0, 3.0]))
    save_pretrained(toy, tmp_path, dtype=torch.bfloat16)
    theirs = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in theirs.items()} == {
        "experts.0": [[0], [1], [2]],
        "experts.1": [[3], [4], [5]],
        "mixed": [10, 11, 12, 13],
        "pairs": [0, 1, 2, 3],
    }
    assert theirs["mixed"].dtype == torch.bfloat16 and theirs["pairs"].dtype == torch.float32  # a buffer
    back = load_pretrained(tmp_path, dtype=torch.float32, family=TOY)
    assert same(toy.state_dict(), back.state_dict())
    with pytest.raises(
        ValueError, match="contains a Toy, which is not supported; the supported architectures are: Llama"
    ):
        load_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="contains a Toy, which is not supported; the supported architectures are: Llama"
    ):
        read_pretrained(build_model("llama3-debug"), tmp_path)


def test_read_model_config_takes_a_path(directory: Path) -> None:
    assert read_model_config(directory).hidden_size == 64

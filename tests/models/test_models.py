import pytest
import torch

from sightline.models import MODELS, Llama3Config, build_model, build_skeleton, config_of, init_model_weights


def test_names_and_published_parameter_counts_of_llama3() -> None:
    """The other families have this test in their own files."""
    counts = {}
    for name in [name for name in MODELS if name.startswith("llama3-")]:
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in build_model(name).parameters())
    assert counts == {
        "llama3-debug": 139_584,
        "llama3-tiny": 8_547_584,
        "llama3-1b": 1_235_814_400,
        "llama3-3b": 3_212_749_824,
        "llama3-8b": 8_030_261_248,
        "llama3-70b": 70_553_706_496,
        "llama3-405b": 405_853_388_800,
    }


def test_unknown_model_name_raises() -> None:
    with pytest.raises(ValueError, match="unknown model 'llama3-9b'; the models are: llama3-debug, llama3-tiny, "):
        config_of("llama3-9b")
    with pytest.raises(ValueError, match="unknown model 'gpt'"):
        build_model("gpt")


def test_build_model_takes_a_config() -> None:
    config = Llama3Config(
        vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24
    )
    assert build_model(config, attention_backend="reference").attention_backend == "reference"
    assert build_model(config).config is config


def test_initialized_skeleton_equals_built_model() -> None:
    torch.manual_seed(3)
    direct = build_model("llama3-debug")
    model = build_skeleton("llama3-debug")
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    init_model_weights(model)
    assert all(
        torch.equal(a, b) for a, b in zip(direct.state_dict().values(), model.state_dict().values(), strict=True)
    )
    init_model_weights(model)
    assert not torch.equal(direct.embedding.weight, model.embedding.weight)


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("-debug")])
def test_initial_weight_depends_only_on_its_name(name: str) -> None:
    torch.manual_seed(3)
    full = build_model(name)
    stage = build_skeleton(name)
    stage.embedding = None
    del stage.layers["0"]
    stage.to_empty(device="cpu")
    torch.manual_seed(3)
    init_model_weights(stage)
    expected = full.state_dict()
    for key, value in stage.state_dict().items():
        assert torch.equal(value, expected[key]), key
    random = {key: value for key, value in expected.items() if value.unique().numel() > 1 and value.numel() > 2}
    assert len({float(value.sum()) for value in random.values()}) == len(random)  # no two weights are equal

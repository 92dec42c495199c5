"""Lookup of model families by config, inside and outside the package."""

import sys
import types
from dataclasses import dataclass

import pytest

from sightline.models import FAMILIES, MODELS, Family, Llama3, Llama3Config, build_model, family_of, save_pretrained
from sightline.models.families import named_family, reference_of


@dataclass(frozen=True, kw_only=True)
class MineConfig(Llama3Config):
    """Config of another family with the fields of Llama 3."""


@dataclass(frozen=True, kw_only=True)
class NoFamilyConfig(Llama3Config):
    """Config class that no family uses."""


class Mine(Llama3):
    pass


MINE = Family(name="llama3", model=Mine, config=MineConfig)  # names need not be unique
SMALL = MineConfig(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24)


@pytest.mark.parametrize("name", MODELS)
def test_every_named_config_has_one_family(name: str) -> None:
    family = family_of(MODELS[name])
    assert sum(known.config is type(MODELS[name]) for known in FAMILIES) == 1
    assert name.startswith(f"{family.name}-") and reference_of(MODELS[name]) == family.name
    assert named_family(family.name) is family


def test_external_family_is_found_in_the_module_of_its_config() -> None:
    assert family_of(SMALL) is MINE
    assert type(build_model(SMALL)) is Mine and build_model(SMALL).config is SMALL
    reference = reference_of(SMALL)
    assert reference == f"{__name__}:MINE" and named_family(reference) is MINE


def test_config_without_family_raises(tmp_path) -> None:
    for config, kind in ((NoFamilyConfig(), "NoFamilyConfig"), ("llama3", "builtins.str"), (None, "NoneType")):
        message = rf"{kind} is not the config class of a model family; expected a config of llama3, llama4.*Family\("
        with pytest.raises(ValueError, match=message):
            family_of(config)
    with pytest.raises(ValueError, match="the family llama3 has no Hugging Face format, so a Mine cannot be saved"):
        save_pretrained(build_model(SMALL), tmp_path)


def test_family_lookup_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the named module, nor anything that a module imports lazily in `__getattr__`."""

    class Lazy(types.ModuleType):
        def __getattr__(self, name: str) -> Family:
            raise AssertionError(f"{name} was accessed")

    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    before = set(sys.modules)
    for reference in ("lazy:FAMILY", "this:FAMILY", "antigravity:x", "sightline:Batch", "llama9", "", ":", "torch:nn"):
        assert named_family(reference) is None
    assert set(sys.modules) == before and "this" not in before

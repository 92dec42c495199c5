"""Families in the package and outside of it, found by the config of a model."""

import sys
import types
from dataclasses import dataclass

import pytest

from sightline.models import FAMILIES, MODELS, Family, Llama3, Llama3Config, build_model, family_of, save_pretrained
from sightline.models.families import named_family, reference_of


@dataclass(frozen=True, kw_only=True)
class MineConfig(Llama3Config):
    """A config of another family, though all its fields are Llama's."""


@dataclass(frozen=True, kw_only=True)
class HomelessConfig(Llama3Config):
    """A config of no family."""


class Mine(Llama3):
    pass


MINE = Family(name="llama3", model=Mine, config=MineConfig)  # a name that another family has does not matter
SMALL = MineConfig(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24)


@pytest.mark.parametrize("name", MODELS)
def test_every_named_config_is_of_one_family(name: str) -> None:
    family = family_of(MODELS[name])
    assert sum(known.config is type(MODELS[name]) for known in FAMILIES) == 1
    assert name.startswith(f"{family.name}-") and reference_of(MODELS[name]) == family.name
    assert named_family(family.name) is family


def test_a_family_from_outside_is_found_where_its_config_is_defined() -> None:
    assert family_of(SMALL) is MINE
    assert type(build_model(SMALL)) is Mine and build_model(SMALL).config is SMALL
    reference = reference_of(SMALL)
    assert reference == f"{__name__}:MINE" and named_family(reference) is MINE


def test_a_config_of_no_family_is_refused(tmp_path) -> None:
    for config, kind in ((HomelessConfig(), "HomelessConfig"), ("llama3", "builtins.str"), (None, "NoneType")):
        told = rf"{kind} is the config of no family. A family is a value .* llama3, llama4"
        with pytest.raises(ValueError, match=told):
            family_of(config)
    with pytest.raises(ValueError, match="the family llama3 has no Hugging Face format, so a Mine cannot be saved"):
        save_pretrained(build_model(SMALL), tmp_path)


def test_a_reference_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a module that is not imported, nor what a module would import for a name it does not have yet."""

    class Lazy(types.ModuleType):
        def __getattr__(self, name: str) -> Family:
            raise AssertionError(f"{name} was asked for")

    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    before = set(sys.modules)
    for reference in ("lazy:FAMILY", "this:FAMILY", "antigravity:x", "sightline:Batch", "llama9", "", ":", "torch:nn"):
        assert named_family(reference) is None
    assert set(sys.modules) == before and "this" not in before

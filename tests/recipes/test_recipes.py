"""Recipe lookup, and training with every recipe that fits a laptop."""

import asyncio
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sightline.config import CheckpointConfig, LoggingConfig, Run, ValidationConfig
from sightline.data import SYNTHETIC_IMAGES
from sightline.models import MODELS
from sightline.models.llama3 import LLAMA3
from sightline.recipes import RECIPES, get_family, get_recipe
from sightline.training.metrics import read_metrics
from tests.support.small_runs import train_quietly

TINY = [name for name in RECIPES if "-tiny" in name]
STEPS = 30


def losses_of(recipe: Run, directory: Path, **training: int) -> list[float]:
    """Train 30 steps of a recipe on a few files of Python's library, without validation and checkpoints."""
    source = str(Path(asyncio.__file__).parent)
    run = replace(
        recipe,
        output_dir=directory,
        data=recipe.data if recipe.data.source == SYNTHETIC_IMAGES else replace(recipe.data, source=source),
        training=replace(recipe.training, steps=STEPS, device="cpu", **training),
        validation=ValidationConfig(every=0),
        checkpoint=CheckpointConfig(every=0),
        logging=LoggingConfig(tensorboard=False, sample_tokens=0),
    )
    train_quietly(run)
    losses = [row["loss"] for row in read_metrics(directory / "metrics.jsonl")]
    shutil.rmtree(directory)  # the final checkpoint has 200 MB
    assert len(losses) == STEPS
    return losses


def test_every_model_has_a_recipe_and_every_family_a_tiny_one() -> None:
    assert RECIPES.keys() == MODELS.keys()
    assert {name.split("-")[0] for name in TINY} == {name.split("-")[0] for name in MODELS}
    assert all(recipe.model == MODELS[name] for name, recipe in RECIPES.items())


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """User modules in the current directory."""
    package = tmp_path / "mine_of_recipes"
    package.mkdir()
    (package / "runs.py").write_text(
        "from sightline.recipes import RECIPES\nfrom sightline.models.llama3 import LLAMA3\n"
        "SHORT = RECIPES['llama3-debug']\nLONG = RECIPES['llama3-tiny']\nother = 3\n"
    )
    (package / "broken.py").write_text("import no_such_library")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))


def test_user_recipe(mine: None) -> None:
    assert get_recipe("mine_of_recipes.runs:SHORT") is RECIPES["llama3-debug"]
    assert get_family("mine_of_recipes.runs:SHORT") is get_family("mine_of_recipes.runs:LLAMA3") is LLAMA3


@pytest.mark.parametrize(
    ("get", "name", "message"),
    [
        (get_recipe, "llama3-9b", "unknown recipe 'llama3-9b'; the recipes are: llama3-debug, .* package.module:NAME"),
        (get_recipe, "mine_of_recipes.runs:NONE", "does not exist; expected a Run; .* defines SHORT, LONG"),
        (get_recipe, "mine_of_recipes.runs:other", "has type int; expected a Run; .* defines SHORT, LONG"),
        (get_family, "mine_of_recipes.runs:other", "expected a Family or Run; .* defines LLAMA3, SHORT, LONG"),
        (get_recipe, "mine_of_recipes.nothing:RUN", "cannot import mine_of_recipes.nothing .*No module named"),
        (get_recipe, "mine_of_recipes.broken:RUN", "cannot import mine_of_recipes.broken .*no_such_library"),
        (get_recipe, "mine_of_recipes/runs.py:SHORT", "is not of the form package.module:NAME"),
        (get_recipe, "mine_of_recipes.runs:", "is not of the form package.module:NAME"),
    ],
)
def test_unknown_recipe_raises(mine: None, get: Callable, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get(name)


@pytest.mark.parametrize("name", TINY)
def test_loss_falls_in_30_steps_of_short_rows(name: str, tmp_path: Path) -> None:
    losses = losses_of(RECIPES[name], tmp_path / "run", sequence_length=128, global_batch_size=1, micro_batch_size=1)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_loss_falls_in_30_steps(name: str, tmp_path: Path) -> None:
    losses = losses_of(RECIPES[name], tmp_path / "run")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

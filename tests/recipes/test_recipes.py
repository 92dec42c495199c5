"""Every recipe of a laptop's size trains."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sightline.config import Checkpoint, Logging, Run, Validation
from sightline.data import SYNTHETIC_IMAGES
from sightline.models import MODELS
from sightline.recipes import RECIPES
from sightline.training.metrics import read_metrics
from tests.support.small_runs import train_quietly

TINY = [name for name in RECIPES if "-tiny" in name]
STEPS = 30


def losses_of(recipe: Run, directory: Path, **training: int) -> list[float]:
    """Thirty steps of a recipe, on a few files of Python's library in place of all, and without what surrounds them."""
    few = str(Path(asyncio.__file__).parent)
    run = replace(
        recipe,
        output_dir=directory,
        data=recipe.data if recipe.data.source == SYNTHETIC_IMAGES else replace(recipe.data, source=few),
        training=replace(recipe.training, steps=STEPS, device="cpu", **training),
        validation=Validation(every=0),
        checkpoint=Checkpoint(every=0),
        logging=Logging(tensorboard=False, sample_tokens=0),
    )
    train_quietly(run)
    losses = [row["loss"] for row in read_metrics(directory / "metrics.jsonl")]
    shutil.rmtree(directory)  # the checkpoint at the end is 200 MB
    assert len(losses) == STEPS
    return losses


def test_every_model_has_a_recipe_and_every_family_a_tiny_one() -> None:
    assert RECIPES.keys() == MODELS.keys()
    assert {name.split("-")[0] for name in TINY} == {name.split("-")[0] for name in MODELS}
    assert all(recipe.model == MODELS[name] for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", TINY)
def test_thirty_steps_of_short_rows_lower_the_loss(name: str, tmp_path: Path) -> None:
    losses = losses_of(RECIPES[name], tmp_path / "run", sequence_length=128, global_batch_size=1, micro_batch_size=1)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_thirty_steps_lower_the_loss(name: str, tmp_path: Path) -> None:
    losses = losses_of(RECIPES[name], tmp_path / "run")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

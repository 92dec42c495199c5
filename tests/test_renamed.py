"""Nobody is cut off: names of 0.2 are accepted with a warning that gives the new one, and runs of 0.2 continue."""

import dataclasses
import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import sightline.config
from sightline.batch import Batch
from sightline.cli.train import parse
from sightline.config import DataConfig, OptimizerConfig
from sightline.config.renamed import RENAMED, old_names
from sightline.data import IterableLoader, Loader
from sightline.layers.vision import VisionConfig
from sightline.models import FAMILIES, DeepseekV3Config, Llama3Config, Qwen3NextConfig
from sightline.training.metrics import read_metrics
from sightline.training.run_directory import load_config
from sightline.training.terminal import Terminal
from sightline.training.trainer import train

CONFIGS = [*(family.config for family in FAMILIES), VisionConfig, DataConfig, OptimizerConfig]
OLD_RUN = Path(__file__).parent / "fixtures" / "runs" / "deepseek_v3.tar.xz"
OLD_BATCHES = OLD_RUN.with_name("deepseek_v3_batches.json")


def renamed_fields() -> list[tuple[type, str, str]]:
    return [(kind, old, new) for kind in CONFIGS for old, new in old_names(kind).items()]


@pytest.mark.parametrize(("kind", "old", "new"), renamed_fields(), ids=str)
def test_an_old_field_name_is_accepted_with_a_warning(kind: type, old: str, new: str) -> None:
    value = getattr(kind(), new)
    with pytest.warns(FutureWarning, match=rf"{kind.__name__}\.{old} is now called {new}; .*removed in version 0\.4"):
        config = kind(**{old: value})
    assert config == kind(**{new: value})
    with pytest.warns(FutureWarning, match=new):
        assert getattr(config, old) == value
    with pytest.warns(FutureWarning, match=new):
        assert dataclasses.replace(config, **{old: value}) == config


def test_every_old_name_belongs_to_a_config() -> None:
    accepted = {(old, new) for _, old, new in renamed_fields()}
    assert accepted == set(RENAMED)
    assert old_names(Qwen3NextConfig)["value_size"] == "linear_value_head_dim"
    assert old_names(DeepseekV3Config)["value_size"] == "v_head_dim"


def test_a_config_of_another_package_accepts_them_too() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(Llama3Config):
        window: int = 7  # its own field, not the old name of another

    with pytest.warns(FutureWarning, match=r"Mine\.width is now called hidden_size"):
        assert Mine(width=64).hidden_size == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Mine(window=3).window == 3


def test_an_unknown_field_is_still_an_error() -> None:
    with pytest.raises(TypeError, match="widht"):
        Llama3Config(widht=64)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="'Llama3Config' object has no attribute 'widht'"):
        Llama3Config().widht  # noqa: B018


@pytest.mark.parametrize(
    ("recipe", "options", "section", "field", "value"),
    [
        ("llama3-debug", ["--model.width", "32"], "model", "hidden_size", 32),
        ("llama3-debug", ["--model.kv_heads=4"], "model", "num_kv_heads", 4),
        ("deepseek_v3-debug", ["--model.prediction-weight", "0.5"], "model", "mtp_loss_weight", 0.5),
        ("qwen3_next-debug", ["--model.value-size", "8"], "model", "linear_value_head_dim", 8),
        ("llama3-debug", ["--data.validation-share", "0.2"], "data", "validation_fraction", 0.2),
        ("llama3-debug", ["--optimizer.final-share", "0.3"], "optimizer", "min_lr_ratio", 0.3),
    ],
)
def test_an_old_option_is_accepted_with_a_warning(
    recipe: str, options: list[str], section: str, field: str, value: Any, capsys: pytest.CaptureFixture
) -> None:
    run = parse([recipe, *options])
    assert getattr(getattr(run, section), field) == value
    name = options[0].partition("=")[0].replace("_", "-")
    new = f"--{section}.{field}".replace("_", "-")
    assert (
        f"warning: {name} is now called {new}; the old name will be removed in version 0.4" in capsys.readouterr().err
    )


def test_an_old_option_of_a_nested_config(capsys: pytest.CaptureFixture) -> None:
    assert parse(["vlm-debug", "--model.vision.side", "8"]).model.vision.position_grid_size == 8
    assert "--model.vision.side is now called --model.vision.position-grid-size" in capsys.readouterr().err


def test_a_value_is_not_taken_for_an_option(capsys: pytest.CaptureFixture) -> None:
    run = parse(["llama3-debug", "--logging.sample-prompt", "model.width=", "--model.hidden-size", "32"])
    assert run.logging.sample_prompt == "model.width=" and run.model.hidden_size == 32
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["Data", "Training", "Parallel", "Optimizer", "Attention", "Validation", "Checkpoint"])
def test_old_names_of_sections(name: str) -> None:
    with pytest.warns(FutureWarning, match=f"sightline.config.{name} is now called {name}Config"):
        assert getattr(sightline.config, name) is getattr(sightline.config, f"{name}Config")
    with pytest.raises(AttributeError, match="Model"):
        sightline.config.Model  # noqa: B018


def extract(directory: Path) -> Path:
    with tarfile.open(OLD_RUN) as file:
        file.extractall(directory, filter="data")
    return directory / "run"


def test_the_config_of_an_old_run_is_read_without_a_warning(tmp_path: Path) -> None:
    """The file is a record of what was asked for then; its owner has nothing to change."""
    directory = extract(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = load_config(directory / "config.json")
    assert run.model.hidden_size == 16 and run.model.mtp_loss_weight == 0.3 and run.model.v_head_dim == 8
    assert run.data.validation_fraction == 0.1
    assert run.optimizer.decay_ratio == 0.5 and run.optimizer.min_lr_ratio == 0.2


def test_a_run_of_0_2_0_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its directory, started by 0.2.0 and stopped after step 2.

    The order of documents has changed since, which a warning says. Here, steps 3 and 4 get the batches of 0.2.0; the
    archive's expected.json holds the losses that 0.2.0 computed on them.
    """
    stored = json.loads(OLD_BATCHES.read_text())
    batches = [Batch(**{name: torch.tensor(values) for name, values in batch.items()}) for batch in stored]
    monkeypatch.setattr(Loader, "build", lambda loader, rows, plan_rows: batches[min(rows[0] // 2 - 2, 1)])
    directory = extract(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = load_config(directory / "config.json")
    output = io.StringIO()
    train(run, Terminal(Console(file=output, width=400)))
    assert output.getvalue().count("warning: the checkpoint was written by an older version") == 1
    rows = read_metrics(directory / "metrics.jsonl")
    expected = json.loads((tmp_path / "expected.json").read_text())
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, old in zip(rows[2:], expected[2:], strict=True):
        assert row["loss"] == pytest.approx(old["loss"], rel=1e-6)
        assert row["mtp_loss"] == pytest.approx(old["prediction_loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(old["grad_norm"], rel=1e-5)
    assert json.loads((directory / "config.json").read_text())["model"]["hidden_size"] == 16


def test_loader_state_of_user_batches_of_0_2_resumes() -> None:
    """The state of the batches themselves does not change."""

    class WithState(list):
        state_dict = dict
        loaded: dict[str, int]

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.loaded = state

    batches = WithState([Batch.from_documents([[1, 2, 3]], length=4)])
    loader = IterableLoader(batches, rows=1, sequence_length=4)
    identity = loader.state_dict()["identity"]
    loader.load_state_dict({"identity": identity, "step": 5, "lanes": {"0": {"place": 7}}})
    assert batches.loaded == {"place": 7} and loader.state_dict()["step"] == 5

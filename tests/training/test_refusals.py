"""Invalid runs raise errors, and the run directory keeps everything."""

import dataclasses
import math
import resource
from pathlib import Path

import pytest
import torch

from sightline.config import OptimizerConfig
from sightline.data import Documents, load_tokenizer, train_tokenizer
from sightline.errors import NonFiniteLoss, SaveFailed
from sightline.training import saver
from sightline.training.checkpoint_directory import list_checkpoints
from sightline.training.loading import load
from sightline.training.resume import check_continues
from sightline.training.run_directory import recorded_kernel, settings
from tests.support.small_runs import MODEL, STEPS, rows_of, small_run, train_quietly, write_corpus


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("source") / "texts")


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory) -> Path:
    """A finished run of 4 steps with checkpoints of step 3 and 4, which the tests do not modify."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    train_quietly(small_run(directory, source, training__steps=4))
    return directory


def everything_in(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


CHANGES = {
    "model.num_layers": ({"model": dataclasses.replace(MODEL, num_layers=3)}, "3, expected 2", "--model.num-layers 2"),
    "model.intermediate_size": (
        {"model": dataclasses.replace(MODEL, intermediate_size=96)},
        "96, expected 64",
        "--model.intermediate-size 64",
    ),
    "model.tied_embeddings": (
        {"model": dataclasses.replace(MODEL, tied_embeddings=True)},
        "True, expected False",
        "--model.no-tied-embeddings",
    ),
    "model_from": ({"model_from": Path("hf")}, "'hf', expected None", "(no --model-from)"),
    "seed": ({"seed": 5}, "5, expected 0", "--seed 0"),
    "data.packing": ({"data__packing": "best_fit"}, "'best_fit', expected 'stream'", "--data.packing stream"),
    "data.validation_fraction": (
        {"data__validation_fraction": 0.2},
        "0.2, expected 0.1",
        "--data.validation-fraction 0.1",
    ),
    "training.sequence_length": ({"training__sequence_length": 32}, "32, expected 48", "--training.sequence-length 48"),
    "training.global_batch_size": (
        {"training__global_batch_size": 4},
        "4, expected 2",
        "--training.global-batch-size 2",
    ),
    "optimizer.name": ({"optimizer__name": "muon"}, "'muon', expected 'adamw'", "--optimizer.name adamw"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_another_run_is_not_continued(field, source, finished) -> None:
    changes, values, option = CHANGES[field]
    before = everything_in(finished)
    with pytest.raises(ValueError) as error:
        train_quietly(small_run(finished, source, training__steps=6, **changes))
    assert "cannot continue from" in str(error.value)
    assert f"{field} is {values}" in str(error.value)
    assert option in str(error.value)
    assert "another --output-dir" in str(error.value)
    assert everything_in(finished) == before


def test_allowed_changes_are_logged(source, finished) -> None:
    run = small_run(
        finished, source, training__micro_batch_size=2, optimizer__learning_rate=1e-4, checkpoint__every=7,
        logging__sample_prompt="x", validation__rows=1, training__deterministic=True, training__steps=9,
    )  # fmt: skip
    checkpoint = finished / "checkpoints" / "step-4"
    assert [line.split(" is now ")[0] for line in check_continues(checkpoint, settings(run))] == [
        "optimizer.learning_rate",
        "training.deterministic",
        "training.micro_batch_size",
        "training.steps",
        "validation.rows",
    ]


def test_another_attention_kernel_is_logged(source, finished) -> None:
    checkpoint, run = finished / "checkpoints" / "step-4", small_run(finished, source, training__steps=4)
    used = recorded_kernel(checkpoint / "config.json")
    assert used in ("native", "tiled")
    assert check_continues(checkpoint, settings(run, used)) == []
    assert check_continues(checkpoint, settings(run)) == [], "a run on another device records no kernel"
    assert check_continues(checkpoint, settings(run, "reference")) == [
        f"attention_kernel is now 'reference', was {used!r}: the same numbers up to rounding"
    ]


def test_never_refuses_a_directory_that_is_not_empty(source, finished, tmp_path) -> None:
    before = everything_in(finished)
    with pytest.raises(ValueError, match=r"is not empty and checkpoint.resume is 'never'.*--output-dir"):
        train_quietly(small_run(finished, source, checkpoint__resume="never"))
    assert everything_in(finished) == before
    train_quietly(small_run(tmp_path / "new", source, checkpoint__resume="never", training__steps=1))


def test_a_path_that_is_no_checkpoint_is_refused(source, finished, tmp_path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        train_quietly(small_run(tmp_path / "run", source, checkpoint__resume="nowhere"))
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no manifest\.json"):
        train_quietly(small_run(tmp_path / "run", source, checkpoint__resume=str(source)))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_older_than_the_run_is_refused(source, finished) -> None:
    before = everything_in(finished)
    older = finished / "checkpoints" / "step-3"
    with pytest.raises(ValueError, match=r"step-3 is of step 3, but .* already has step 4\..*resume from there"):
        train_quietly(small_run(finished, source, checkpoint__resume=str(older)))
    assert everything_in(finished) == before


def test_the_directory_of_something_else_is_refused(source, tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is not the config of a run"):
        train_quietly(small_run(tmp_path, source))
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


def test_other_documents_are_refused(source, tmp_path) -> None:
    texts = write_corpus(tmp_path / "texts")
    run = small_run(tmp_path / "run", texts, training__steps=2)
    train_quietly(run)
    (texts / "new.txt").write_text("one more")
    with pytest.raises(ValueError, match="another number of training documents"):
        train_quietly(dataclasses.replace(run, training=dataclasses.replace(run.training, steps=3)))


def test_a_tokenizer_too_large_for_the_model_is_refused(source, tmp_path) -> None:
    train_tokenizer(Documents.from_texts(["some text " * 50] * 3), 400).save(tmp_path / "tokenizer.json")
    large = load_tokenizer(tmp_path).vocab_size
    run = small_run(
        tmp_path / "run", source, data__tokenizer=tmp_path / "tokenizer.json",
        model=dataclasses.replace(MODEL, vocab_size=large - 1),
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=rf"has {large} tokens, but the vocabulary of the model has only {large - 1}.*--model.vocab"
    ):
        train_quietly(run)


def test_cuda_without_a_device_is_refused(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"training\.device is 'cuda'.*--training.device cpu"):
        train_quietly(small_run(tmp_path / "run", source, training__device="cuda"))


def test_a_non_finite_loss_ends_the_run(source, tmp_path) -> None:
    """The learning rate makes the weights infinite in step 4, the first step after the warm-up."""
    run = small_run(tmp_path / "run", source)
    train_quietly(dataclasses.replace(run, training=dataclasses.replace(run.training, steps=3)))
    weights = load(tmp_path / "run", device="cpu").model.state_dict()
    wild = dataclasses.replace(run, optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=2))
    with pytest.raises(NonFiniteLoss) as error:
        train_quietly(wild)
    step = error.value.step
    assert 4 < step <= STEPS
    assert not (math.isfinite(error.value.loss) and math.isfinite(error.value.grad_norm))
    assert f"step {step}: loss" in str(error.value)
    assert "step-3" in str(error.value) and "--optimizer.learning-rate" in str(error.value)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, step))
    assert error.value.exit_code == 1
    kept = load(tmp_path / "run" / "checkpoints" / "step-3", device="cpu").model.state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in weights.items())
    assert "continued from step-" in train_quietly(run), "a better learning rate goes on"


@pytest.fixture
def small_files_only():
    """A file size limit of 100 kB acts like a full disk: a checkpoint does not fit, the metrics do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if on else soft, hard))

    yield limit
    limit(False)


BESIDE = pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "beside the steps"])


@BESIDE
def test_a_temporarily_full_disk_costs_one_checkpoint(
    asynchronous, source, tmp_path, monkeypatch, small_files_only
) -> None:
    save, saved = saver.save_checkpoint, []

    def save_on_a_full_disk(*args, **kwargs):
        saved.append(args[1].step)
        small_files_only(args[1].step == 6)
        try:
            return save(*args, **kwargs)
        finally:
            small_files_only(False)

    monkeypatch.setattr(saver, "save_checkpoint", save_on_a_full_disk)
    output = train_quietly(small_run(tmp_path / "run", source, checkpoint__asynchronous=asynchronous))
    assert saved == [3, 6, 8]
    assert "warning: the checkpoint of step 6 could not be written" in output and "step-3 is intact" in output
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-3", "step-8"]


@BESIDE
def test_a_full_disk_at_the_end_keeps_the_old_checkpoint(
    asynchronous, source, tmp_path, monkeypatch, small_files_only
) -> None:
    save = saver.save_checkpoint

    def save_on_a_full_disk(*args, **kwargs):
        small_files_only(args[1].step > 3)
        try:
            return save(*args, **kwargs)
        finally:
            small_files_only(False)

    monkeypatch.setattr(saver, "save_checkpoint", save_on_a_full_disk)
    with pytest.raises(SaveFailed, match=r"checkpoint of step 8 could not be written: .*step-3 is intact") as error:
        train_quietly(small_run(tmp_path / "run", source, checkpoint__asynchronous=asynchronous))
    assert error.value.exit_code == 1
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-3"]
    monkeypatch.undo()
    assert "continued from step-" in train_quietly(small_run(tmp_path / "run", source))
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, STEPS + 1))

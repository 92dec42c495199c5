"""Benchmarks on a CPU: their contestants compute the same, and their commands run in small."""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import attention, masks, memory, step_profile, timing, training_step
from benchmarks.plain_model import PlainModel
from benchmarks.step_profile import GROUPS, profile_groups
from sightline.masks import AttentionMask
from sightline.models import build_model
from sightline.native import why_missing
from sightline.torch_private import HAS_ONEDNN_LINEAR


@pytest.fixture(autouse=True)
def results_and_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    threads = torch.get_num_threads()
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    yield
    torch.set_num_threads(threads)


def test_neighborhood_equals_its_mask_mod() -> None:
    lines, width = 9, 11

    def mask_mod(b, h, q, k):
        y, x = (q // width).clamp(3, lines - 4), (q % width).clamp(3, width - 4)
        return ((k // width - y).abs() <= 3) & ((k % width - x).abs() <= 3)

    expected = AttentionMask.from_mask_mod(mask_mod, 1, lines * width, lines * width)
    assert attention.neighborhood(lines * width, width).equal(expected)
    assert attention.neighborhood(lines * width + 5, width).visible_pairs() == expected.visible_pairs()


def test_scattered_mask() -> None:
    mask = masks.scattered(64, 8)
    assert mask.intervals == 8 and int(mask.visible_pairs()) == 64 * 8
    assert not torch.equal(mask.start[0, 0], mask.start[0, 1])
    with pytest.raises(SystemExit, match="at most 32"):
        masks.scattered(64, 33)


def test_masks_of_the_table() -> None:
    table = attention.masks(1024)
    dense = {name: mask.to_dense()[0] for name, mask in table.items()}
    empty = torch.arange(1024) % 3 == 0
    assert not dense["every third row empty"][empty].any()
    assert torch.equal(dense["every third row empty"][~empty], dense["one document"][~empty])
    assert dense["documents, 64 tokens"].sum() == 16 * 64 * 65 // 2
    assert dense["images in text"][0, :60].all() and not dense["images in text"][0, 60:].any()
    assert table["shared prefix, 8 responses"].intervals == 2


def test_the_batched_call_equals_attention_over_documents_of_equal_size() -> None:
    options = attention.parse(["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--backends", "reference"])
    bench = attention.Bench(options, 128)
    (run,) = bench.attention(attention.masks(128)[attention.BATCHED], ["reference"]).values()
    run()
    expected = [x.grad.clone() for x in (bench.q, bench.k, bench.v) if x.grad is not None]
    (q, k, v), batched = bench.batched(64)
    batched()
    for leaf, grad in zip((q, k, v), expected, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2), grad)


def test_attention_in_small(tmp_path: Path) -> None:
    only = ["--only", "64 tokens", "neighborhood"]
    attention.main(
        ["--lengths", "512", "--heads", "2", "--head-dim", "16", "--rounds", "1", "--threads", "2", "--dense", *only]
    )
    (file,) = tmp_path.glob("attention-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["mask"] for row in rows] == ["documents, 64 tokens", "neighborhood 7 x 7"]
    assert rows[0]["tiled of limit"] > 0 and rows[0]["tiled speedup of 2 threads"] > 0
    best = next(key for key in rows[0] if key.startswith("batched / ")).removeprefix("batched / ")
    assert rows[0][f"dense / {best}"] > 0 and f"batched / {best}" not in rows[1]


def test_unusable_backends_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("varlen", "fastest"):
        with pytest.raises(SystemExit):
            attention.parse(["--backends", name])
        assert f"cannot time {name}" in (error := capsys.readouterr().err) and "tiled" in error


def test_plain_model_equals_ours_with_a_dense_mask_and_with_a_loop_over_documents() -> None:
    torch.manual_seed(0)
    ours = build_model("llama3-debug")
    model = PlainModel(ours.config)
    model.copy_weights(ours)
    batch = timing.packed_rows(900, ours.config.vocab_size, seed=3)
    assert batch.document_ids.max() >= 2
    with torch.no_grad():
        attention_masks = ours.get_attention_masks(batch)
        expected = ours(batch.tokens, attention_masks=attention_masks, positions=batch.positions)
        for form in ("dense mask", "document loop"):
            torch.testing.assert_close(model(batch, form), expected, rtol=1e-4, atol=1e-4)
        assert (model(batch, "leaky causal") - expected).abs().max() > 0.1


def test_lognormal_rows_have_labels_inside_documents_only() -> None:
    batch = timing.packed_rows(2048, 100, seed=0, rows=2)
    ids, labels = batch.document_ids, batch.labels
    last = torch.ones_like(ids, dtype=torch.bool)
    last[:, :-1] = ids[:, 1:] != ids[:, :-1]
    assert (labels[last] == -100).all() and (labels[~last] >= 0).all()
    assert torch.equal(labels[0][~last[0]], batch.tokens[0].roll(-1)[~last[0]])


def test_profile_covers_the_step() -> None:
    step = training_step.ours(256, 1, "lognormal")
    step()
    seconds = profile_groups(step, 1)
    assert set(seconds) == set(GROUPS) and all(value > 0 for value in seconds.values())
    total = sum(seconds.values())
    assert seconds["linear"] > seconds["norm"] and seconds["other"] < 0.3 * total


def test_profile_finds_the_group_of_every_backward_operator() -> None:
    step = training_step.ours(256, 1, "lognormal")
    with step_profile.marked(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    forward = step_profile.forward_groups(events)
    groups: dict[str, list[str | None]] = {}
    for event in events:
        if event.name.startswith(step_profile.BACKWARD):
            groups.setdefault(event.name.split(": ")[1], []).append(step_profile.group_of(event, forward))
    linear = "_OneDnnLinearBackward" if HAS_ONEDNN_LINEAR else "MmBackward0"
    assert groups[linear] == ["linear"] * 7 * 6 and groups["_RotateBackward"] == ["rope"] * 2 * 6
    norm = "PowBackward0" if why_missing() else "GeneratedBackwardFor_sightline_rms_norm_defaultBackward"
    assert groups[norm] == ["norm"] * 13 and groups["SiluBackward0"] == ["swiglu"] * 6
    assert sum(group == "attention" for found in groups.values() for group in found) >= 6
    assert "loss" in {group for found in groups.values() for group in found}


@pytest.mark.slow
def test_memory_and_training_step_in_small(tmp_path: Path) -> None:
    memory.main(["--length", "2048", "--only", "one document", "--backend", "tiled"])
    rows = json.loads((tmp_path / "memory-tiled.json").read_text())["rows"]
    assert [row["mask"] for row in rows] == [memory.PLAIN, "one document"] and all(row["mib"] > 0 for row in rows)
    training_step.main(["--lengths", "256", "--threads", "1", "--rounds", "1", "--rows", "lognormal"])
    rows = json.loads((tmp_path / "training-step-lognormal-1t.json").read_text())["rows"]
    assert [row["contestant"] for row in rows] == ["ours", "dense mask", "leaky causal", "document loop"]
    training_step.main(["--profile", "--lengths", "256", "--threads", "1", "--rows", "lognormal"])
    (row,) = json.loads((tmp_path / "training-step-profile-lognormal-1t.json").read_text())["rows"]
    assert row["attention"] > 0

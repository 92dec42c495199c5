"""Where models are split_stages, which process has which stage, and which numbers of microbatches are refused."""

from dataclasses import replace
from typing import Any

import pytest

from sightline.config import ParallelConfig, TrainingConfig
from sightline.models import MODELS, build_skeleton
from sightline.parallel.pipeline_stages import (
    check_pipeline_support,
    count_microbatches,
    count_stages,
    extract_stage,
    split_stages,
    stage_owners,
    stages_of,
)


def sizes(name: str, stages: int) -> list[int]:
    ranges = split_stages(build_skeleton(name), stages)
    assert [layer for layers in ranges for layer in layers] == list(range(MODELS[name].layers))
    return [len(layers) for layers in ranges]


def test_the_last_stage_has_fewer_layers_for_its_head() -> None:
    # The head of Llama 3 8B is 128,256 x 4096 = 525M, a layer 218M: the head is worth 2.4 layers, of 34.4 together.
    assert sizes("llama3-8b", 2) == [17, 15]
    assert sizes("llama3-8b", 4) == [8, 9, 9, 6]
    assert sizes("llama3-8b", 8) == [4, 4, 4, 4, 4, 5, 5, 2]
    # That of 405B is worth 0.66 of 126 layers.
    assert sizes("llama3-405b", 2) == [63, 63]
    # Every stage has a layer, also where the head alone is more than the others have: 8.4 layers of 36.
    assert sizes("gpt_oss-120b", 8) == [5, 5, 5, 5, 5, 5, 5, 1]
    # The vision encoder stands before the first layer.
    assert sizes("vlm-1.7b", 4) == [1, 6, 7, 2]


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"5 pipeline stages need as many layers, and the model has 4; .*at most 4"):
        split_stages(build_skeleton(replace(MODELS["llama3-debug"], num_layers=4)), 5)


@pytest.mark.parametrize(
    ("schedule", "placed"),
    [
        ("1F1B", [0, 1, 2]),
        ("GPipe", [0, 1, 2]),
        ("Interleaved1F1B", [0, 1, 2, 0, 1, 2]),
        ("LoopedBFS", [0, 1, 2, 0, 1, 2]),
        ("InterleavedZeroBubble", [0, 1, 2, 0, 1, 2]),
        ("ZBVZeroBubble", [0, 1, 2, 2, 1, 0]),
        ("DualPipeV", [0, 1, 2, 2, 1, 0]),
    ],
)
def test_which_process_has_which_stage(schedule: Any, placed: list[int]) -> None:
    parallel = ParallelConfig(pipeline=3, pipeline_schedule=schedule)
    assert stage_owners(parallel) == placed
    assert count_stages(parallel) == len(placed)
    assert [placed[stage] for stage in stages_of(parallel, 1)] == [1] * (len(placed) // 3)


def test_stages_are_the_model_with_parts_removed() -> None:
    whole = build_skeleton(MODELS["vlm-debug"])
    names = {name: p.shape for name, p in whole.named_parameters()}
    stages = [
        extract_stage(whole, range(1), first=True, last=False),
        extract_stage(whole, range(1, 2), first=False, last=True),
    ]
    parts = [{name: p.shape for name, p in stage.named_parameters()} for stage in stages]
    assert parts[0] | parts[1] == names
    assert not parts[0].keys() & parts[1].keys()
    assert {name.split(".")[0] for name in parts[0]} == {"embedding", "vision", "projector", "layers"}
    assert {name.split(".")[0] for name in parts[1]} == {"norm", "output", "layers"}
    assert len(whole.layers) == 2


def test_models_whose_ends_cannot_be_parted_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--model.no-tied-embeddings"):
        check_pipeline_support(build_skeleton(replace(MODELS["llama3-debug"], tied_embeddings=True)))
    with pytest.raises(ValueError, match=r"model.mtp-loss-weight is 0.1, .*--model.mtp-loss-weight None"):
        check_pipeline_support(build_skeleton(replace(MODELS["deepseek_v3-debug"], mtp_loss_weight=0.1)))
    check_pipeline_support(build_skeleton("deepseek_v3-debug"))


@pytest.mark.parametrize(
    ("schedule", "pipeline", "rows", "size", "microbatches"),
    [
        ("GPipe", 4, 3, 3, 1),
        ("1F1B", 4, 8, 2, 4),
        ("LoopedBFS", 4, 6, 2, 3),
        ("Interleaved1F1B", 4, 10, 1, 10),  # two rounds of five
        ("InterleavedZeroBubble", 4, 7, 1, 7),
        ("ZBVZeroBubble", 4, 5, 1, 5),
        ("DualPipeV", 4, 16, 2, 8),
    ],
)
def test_microbatches(schedule: Any, pipeline: int, rows: int, size: int, microbatches: int) -> None:
    parallel = ParallelConfig(pipeline=pipeline, pipeline_schedule=schedule)
    training = TrainingConfig(global_batch_size=rows, micro_batch_size=size)
    assert count_microbatches(parallel, training, rows) == microbatches


@pytest.mark.parametrize(
    ("schedule", "pipeline", "rows", "size", "words"),
    [
        ("1F1B", 4, 8, 4, "8 rows of a process into 2 microbatches, but 1F1B on 4 processes takes at least 4 .* 2$"),
        ("1F1B", 4, 8, 3, "into unequal microbatches, .*use --training.micro-batch-size 2$"),
        ("1F1B", 4, 3, 1, "into 3 microbatches, .*use --training.global-batch-size 8$"),
        ("DualPipeV", 4, 16, 4, "4 microbatches, .*takes at least 8 .*use --training.micro-batch-size 2$"),
        ("Interleaved1F1B", 4, 18, 2, "9 microbatches, .*a multiple of 4 always; use .*-size 3$"),
        (
            "InterleavedZeroBubble",
            2,
            9,
            1,
            "9 microbatches, .*a multiple of 2 always; use .*-size 3$",
        ),
    ],
)
def test_microbatches_that_do_not_fit_are_refused(
    schedule: Any, pipeline: int, rows: int, size: int, words: str
) -> None:
    parallel = ParallelConfig(pipeline=pipeline, pipeline_schedule=schedule)
    training = TrainingConfig(global_batch_size=2 * rows * size, micro_batch_size=size)
    with pytest.raises(ValueError, match=words):
        count_microbatches(parallel, training, rows)


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
@pytest.mark.parametrize(
    ("came", "words"),
    [
        ({"compile": True}, r"under training.compile cannot; use --training.no-compile, or"),
        ({"recompute": "selective"}, r"under training.recompute selective cannot; use --training.recompute full, or"),
    ],
)
def test_what_allows_one_backward_is_refused_where_there_are_two(schedule: Any, came: Any, words: str) -> None:
    training = TrainingConfig(global_batch_size=8, micro_batch_size=1, **came)
    with pytest.raises(ValueError, match=words):
        count_microbatches(ParallelConfig(pipeline=2, pipeline_schedule=schedule), training, 8)
    assert count_microbatches(ParallelConfig(pipeline=2, pipeline_schedule="LoopedBFS"), training, 8) == 8

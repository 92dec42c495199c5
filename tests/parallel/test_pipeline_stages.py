"""How models are split into stages, which rank has which stage, and which micro-batch counts are valid."""

from dataclasses import replace
from typing import Any

import pytest

from sightline.config import ParallelConfig, TrainingConfig
from sightline.models import MODELS, build_skeleton
from sightline.parallel.pipeline_stages import (
    check_pipeline,
    count_microbatches,
    count_stages,
    extract_stage,
    split_stages,
    stage_owners,
    stages_of,
)


def sizes(name: str, stages: int) -> list[int]:
    ranges = split_stages(build_skeleton(name), stages)
    assert [layer for layers in ranges for layer in layers] == list(range(MODELS[name].num_layers))
    return [len(layers) for layers in ranges]


def test_last_stage_has_fewer_layers_because_of_its_head() -> None:
    # The head of Llama 3 8B is 128,256 x 4096 = 525M, a layer 218M: the head counts as 2.4 layers, 34.4 in total.
    assert sizes("llama3-8b", 2) == [17, 15]
    assert sizes("llama3-8b", 4) == [8, 9, 9, 6]
    assert sizes("llama3-8b", 8) == [4, 4, 4, 4, 4, 5, 5, 2]
    # The head of 405B counts as 0.66 layers, and there are 126.
    assert sizes("llama3-405b", 2) == [63, 63]
    # Every stage has a layer, even if the head alone exceeds the work of other stages: it counts as 8.4 of 36 layers.
    assert sizes("gpt_oss-120b", 8) == [5, 5, 5, 5, 5, 5, 5, 1]
    # The vision encoder is on the first stage.
    assert sizes("vlm-1.7b", 4) == [1, 6, 7, 2]


def test_more_stages_than_layers_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"5 pipeline stages need at least 5 layers, but the model has 4; use at most 4"
    ):
        check_pipeline(build_skeleton(replace(MODELS["llama3-debug"], num_layers=4)), ParallelConfig(pipeline=5))


@pytest.mark.parametrize(
    ("schedule", "owners"),
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
def test_stage_owners(schedule: Any, owners: list[int]) -> None:
    parallel = ParallelConfig(pipeline=3, pipeline_schedule=schedule)
    assert stage_owners(parallel) == owners
    assert count_stages(parallel) == len(owners)
    assert [owners[stage] for stage in stages_of(parallel, 1)] == [1] * (len(owners) // 3)


def test_stages_partition_the_parameters_of_the_model() -> None:
    full_model = build_skeleton(MODELS["vlm-debug"])
    names = {name: p.shape for name, p in full_model.named_parameters()}
    stages = [
        extract_stage(full_model, range(1), first=True, last=False),
        extract_stage(full_model, range(1, 2), first=False, last=True),
    ]
    parts = [{name: p.shape for name, p in stage.named_parameters()} for stage in stages]
    assert parts[0] | parts[1] == names
    assert not parts[0].keys() & parts[1].keys()
    assert {name.split(".")[0] for name in parts[0]} == {"embedding", "vision", "projector", "layers"}
    assert {name.split(".")[0] for name in parts[1]} == {"norm", "output", "layers"}
    assert len(full_model.layers) == 2


def test_models_that_need_embedding_and_head_on_one_stage() -> None:
    two = ParallelConfig(pipeline=2)
    with pytest.raises(ValueError, match=r"--model.no-tied-embeddings"):
        check_pipeline(build_skeleton(replace(MODELS["llama3-debug"], tied_embeddings=True)), two)
    with pytest.raises(ValueError, match=r"model.mtp-loss-weight is 0.1, .*--model.mtp-loss-weight None"):
        check_pipeline(build_skeleton(replace(MODELS["deepseek_v3-debug"], mtp_loss_weight=0.1)), two)
    check_pipeline(build_skeleton("deepseek_v3-debug"), two)


@pytest.mark.parametrize(
    ("schedule", "pipeline", "rows", "size", "microbatches"),
    [
        ("GPipe", 4, 3, 3, 1),
        ("GPipe", 4, 3, 8, 1),
        ("1F1B", 4, 8, 2, 4),
        ("LoopedBFS", 4, 6, 2, 3),
        ("Interleaved1F1B", 4, 10, 1, 10),  # two rounds of five
        ("InterleavedZeroBubble", 4, 7, 1, 7),
        ("ZBVZeroBubble", 4, 5, 1, 5),
        ("DualPipeV", 4, 16, 2, 8),
    ],
)
def test_count_microbatches(schedule: Any, pipeline: int, rows: int, size: int, microbatches: int) -> None:
    parallel = ParallelConfig(pipeline=pipeline, pipeline_schedule=schedule)
    training = TrainingConfig(global_batch_size=rows, micro_batch_size=size)
    assert count_microbatches(parallel, training, rows) == microbatches


@pytest.mark.parametrize(
    ("schedule", "pipeline", "rows", "size", "words"),
    [
        (
            "1F1B",
            4,
            8,
            4,
            "8 rows of a data rank into 2 micro-batches, but 1F1B on 4 pipeline ranks requires at least 4 .* 2$",
        ),
        ("1F1B", 4, 8, 16, "size 16 splits the 8 rows of a data rank into 1 micro-batch, .*micro-batch-size 2$"),
        ("1F1B", 4, 8, 3, "into unequal micro-batches, .*use --training.micro-batch-size 2$"),
        ("1F1B", 4, 3, 1, "into 3 micro-batches, .*use --training.global-batch-size 8$"),
        ("DualPipeV", 4, 16, 4, "4 micro-batches, .*requires at least 8 .*use --training.micro-batch-size 2$"),
        ("Interleaved1F1B", 4, 18, 2, "9 micro-batches, .*any multiple of 4 is valid.; use .*-size 3$"),
        ("InterleavedZeroBubble", 2, 9, 1, "9 micro-batches, .*any multiple of 2 is valid.; use .*-size 3$"),
    ],
)
def test_invalid_microbatch_counts(schedule: Any, pipeline: int, rows: int, size: int, words: str) -> None:
    parallel = ParallelConfig(pipeline=pipeline, pipeline_schedule=schedule)
    training = TrainingConfig(global_batch_size=2 * rows * size, micro_batch_size=size)
    with pytest.raises(ValueError, match=words):
        count_microbatches(parallel, training, rows)


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compile": True}, r"which training.compile does not support; use --training.no-compile, or"),
        (
            {"recompute": "selective"},
            r"which training.recompute selective does not support; use --training.recompute full, or",
        ),
    ],
)
def test_options_that_do_not_support_split_backward(schedule: Any, options: Any, words: str) -> None:
    training = TrainingConfig(global_batch_size=8, micro_batch_size=1, **options)
    with pytest.raises(ValueError, match=words):
        count_microbatches(ParallelConfig(pipeline=2, pipeline_schedule=schedule), training, 8)
    assert count_microbatches(ParallelConfig(pipeline=2, pipeline_schedule="LoopedBFS"), training, 8) == 8

"""`sightline generate` from Hugging Face directories and with images; test_processes.py tests it on runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sightline
from sightline import generation
from sightline.cli import generate
from sightline.data import Tokenizer, pack_patches, train_tokenizer
from sightline.data.synthetic_images import caption_documents, render
from sightline.generation import SamplingConfig
from sightline.models import build_model, load_pretrained, save_pretrained

IMAGE_TOKEN = 511  # image_token_id of vlm-debug; one image token is 8 x 8 pixels


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(caption_documents(), 300)


@pytest.fixture(scope="module", params=["llama3", "vlm"])
def directory(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(request.param, tokenizer, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def vlm_directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("vlm", tokenizer, tmp_path_factory.mktemp("vlm-only"))


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two image files of 1 x 2 and 2 x 1 image tokens."""
    folder, rng = tmp_path_factory.mktemp("drawings"), np.random.default_rng(0)
    paths = []
    for caption, height, width in (("a large red circle on white", 8, 16), ("a small blue cross on black", 16, 8)):
        paths.append(folder / f"{height}x{width}.png")
        Image.fromarray(render(caption, height, width, rng)).save(paths[-1])
    return paths


def write_model(family: str, tokenizer: Tokenizer, directory: Path) -> Path:
    torch.manual_seed(0)
    save_pretrained(build_model(f"{family}-debug"), directory)
    tokenizer.save(directory / "tokenizer.json")
    return directory


def generated_text(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    generate.main([*map(str, arguments), "--max-new-tokens", "8", "--device", "cpu"])
    return capsys.readouterr().out


def test_generate_from_a_hugging_face_directory(directory: Path, tokenizer: Tokenizer, capsys) -> None:
    model = load_pretrained(directory)
    expected = generation.generate(model, tokenizer, "a small", SamplingConfig(max_new_tokens=8, seed=2))
    assert generated_text(capsys, directory, "--prompt", "a small", "--seed", 2) == f"a small{expected}\n"


def test_half_precision_weights_are_loaded_as_float32_on_a_cpu(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_pretrained(build_model("llama3-debug"), tmp_path, dtype=torch.bfloat16)
    tokenizer.save(tmp_path / "tokenizer.json")
    model, _ = sightline.load(tmp_path, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and not model.training


def test_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    save_pretrained(build_model("llama3-debug"), tmp_path)
    with pytest.raises(ValueError, match="no tokenizer at"):
        generate.main([str(tmp_path)])


def test_images_are_placed_at_their_placeholders(
    vlm_directory: Path, tokenizer: Tokenizer, drawings: list[Path], capsys: pytest.CaptureFixture
) -> None:
    """Compare with tokens and patches assembled by hand: `[bos] image " a" image image " the"`."""
    text = [tokenizer.encode_prompt(part)[1:] for part in ("a", "the")]
    ids = [tokenizer.bos_id, *[IMAGE_TOKEN] * 2, *text[0], *[IMAGE_TOKEN] * 2, *text[1]]
    extra = pack_patches([[np.asarray(Image.open(path)) for path in drawings]], 4)
    assert extra["patch_grid"].tolist() == [[[2, 4], [4, 2]]]
    expected = generation.generate(
        load_pretrained(vlm_directory), tokenizer, ids, SamplingConfig(max_new_tokens=8), extra=extra
    )
    options = [option for path in drawings for option in ("--image", path)]
    assert (
        generated_text(capsys, vlm_directory, *options, "--prompt", "<image>a<image>the")
        == f"<image>a<image>the{expected}\n"
    )
    other = generated_text(capsys, vlm_directory, *options[2:], *options[:2], "--prompt", "<image>a<image>the")
    assert other != f"<image>a<image>the{expected}\n", "the order of the images makes no difference"


def test_number_of_images_must_match_the_placeholders(vlm_directory: Path, drawings: list[Path]) -> None:
    for prompt, given, counts in (
        ("a", 1, "0 times, .* given 1"),
        ("<image>a", 2, "1 times, .* given 2"),
        ("<image>", 0, "1 times, .* given 0"),
    ):
        options = [option for path in drawings[:given] for option in ("--image", str(path))]
        with pytest.raises(
            ValueError, match=rf"the prompt '{prompt}' contains <image> {counts} times; write <image> at"
        ):
            generate.main([str(vlm_directory), "--prompt", prompt, *options])


def test_text_model_refuses_images(tokenizer: Tokenizer, drawings: list[Path], tmp_path: Path) -> None:
    write_model("llama3", tokenizer, tmp_path)
    with pytest.raises(
        ValueError, match=r"--image .*8x16.png: a Llama3 model takes text only; use a model of the family vlm"
    ):
        generate.main([str(tmp_path), "--prompt", "<image>a", "--image", str(drawings[0])])
    assert generate.read_prompt("<image>a", [], build_model("llama3-debug").config, tokenizer) == ("<image>a", {})


def test_file_that_is_not_an_image_is_refused(vlm_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot read an image from .*notes.png"):
        generate.main([str(vlm_directory), "--prompt", "<image>a", "--image", str(tmp_path / "notes.png")])


def test_several_prompts_are_continued_together(
    directory: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Prompts of the command line come first, then those of the file; prompt i has seed + i."""
    (tmp_path / "prompts.txt").write_text("the large\n\n  \na\n")
    model, texts = load_pretrained(directory), ["a small", "red", "the large", "a"]
    alone = [
        generation.generate(model, tokenizer, text, SamplingConfig(max_new_tokens=8, seed=2 + i))
        for i, text in enumerate(texts)
    ]
    options = ["--prompt", texts[0], "--prompt", texts[1], "--prompt-file", tmp_path / "prompts.txt", "--seed", 2]
    output = generated_text(capsys, directory, *options)
    assert output == "".join(f"{text}{generated}\n\n" for text, generated in zip(texts, alone, strict=True))


def test_images_go_to_the_prompts_in_order(
    vlm_directory: Path, tokenizer: Tokenizer, drawings: list[Path], capsys: pytest.CaptureFixture
) -> None:
    prompts = ["<image>a", "the", "red<image>"]
    options = [option for prompt in prompts for option in ("--prompt", prompt)]
    images = [option for path in drawings for option in ("--image", path)]
    output = generated_text(capsys, vlm_directory, *options, *images, "--temperature", 0)
    alone = [
        generated_text(capsys, vlm_directory, "--prompt", prompt, *image, "--temperature", 0)
        for prompt, image in zip(prompts, (images[:2], [], images[2:]), strict=True)
    ]
    assert output == "".join(f"{text}\n" for text in alone)
    with pytest.raises(ValueError, match=r"'red' contains <image> 0 times, but --image was given 1 times"):
        generated_text(capsys, vlm_directory, "--prompt", "<image>a", "--prompt", "red", *images)


def test_bad_prompt_files_are_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, text in (("empty.txt", "has no prompt"), ("latin.txt", "expected a UTF-8"), ("none.txt", "No such file")):
        with pytest.raises(ValueError, match=rf"--prompt-file .*{name}.*{text}"):
            generate.main([str(directory), "--prompt-file", str(tmp_path / name)])

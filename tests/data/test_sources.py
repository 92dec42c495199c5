"""Sources: which files are read and in which order, which texts are skipped, and errors."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from sightline.config import DataConfig
from sightline.data import Documents, load_documents, sources


def write(root: Path, **files: str | bytes) -> Path:
    """Write files, whose names have `__` instead of / and `_DOT_` instead of a dot."""
    for name, content in files.items():
        path = root / name.replace("_DOT_", ".").replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def load(source: Path | str, **options: str) -> Documents:
    return load_documents(DataConfig(source=str(source), **options))


def test_folder_is_read_recursively_and_sorted(tmp_path: Path) -> None:
    write(
        tmp_path,
        b_DOT_txt="b",
        a__z_DOT_md="a/z",
        a__b__c_DOT_PY="a/b/c",
        c_DOT_jsonl='{"text": "line 1"}\n\n{"text": "line\u2028three", "x": 1}\n',
        picture_DOT_png=b"\x89",
        _DOT_hidden_DOT_txt="hidden",
        _DOT_git__inner_DOT_txt="hidden",
    )
    documents = load(tmp_path)
    assert list(documents) == ["a/b/c", "a/z", "b", "line 1", "line\u2028three"]
    assert len(documents) == 5
    assert documents.lengths.tolist() == [5, 3, 1, 6, 10]
    assert documents.describe() == f"5 documents, 25 characters from {tmp_path}"


def test_single_file(tmp_path: Path) -> None:
    write(tmp_path, a_DOT_txt="one", b_DOT_txt="two", c_DOT_jsonl='{"body": "x"}\n{"body": "y"}')
    assert list(load(tmp_path / "a.txt")) == ["one"]
    assert list(load(tmp_path / "c.jsonl", text_field="body")) == ["x", "y"]


def test_only_the_byte_order_mark_is_removed(tmp_path: Path) -> None:
    write(tmp_path, a_DOT_txt=b"\xef\xbb\xbf\tone\r\ntwo \n\n")
    assert load(tmp_path)[0] == "\tone\r\ntwo \n\n"


def test_skipped_texts_are_counted_and_described(tmp_path: Path) -> None:
    write(
        tmp_path,
        bad_DOT_txt=b"caf\xe9",
        bad2_DOT_jsonl=b'{"text": "good"}\n{"text": "caf\xe9"}',
        empty_DOT_py="",
        blank_DOT_md=" \n\t ",
        lines_DOT_jsonl='{"text": "kept"}\n{"text": ""}\n{"text": "\\ud800"}',
    )
    documents = load(tmp_path)
    assert list(documents) == ["kept"]
    assert documents.skipped == {
        "not UTF-8": ["bad.txt", "bad2.jsonl", "lines.jsonl line 3"],
        "empty": ["blank.md", "empty.py", "lines.jsonl line 2"],
    }
    assert documents.describe() == (
        f"1 documents, 4 characters from {tmp_path}; skipped 3 not UTF-8 (bad.txt, bad2.jsonl, lines.jsonl line 3), "
        "3 empty (blank.md, empty.py, lines.jsonl line 2)"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "half', r"c\.jsonl line 2 is not JSON .*expected one object per line"),
        ('["text"]', r"c\.jsonl line 2 is a JSON list, expected an object"),
        (
            '{"body": "x", "id": 3}',
            r"line 2 has no text in the field 'text', only body \(str\), id \(int\).*text-field",
        ),
        ('{"text": 3}', r"line 2 has no text in the field 'text', only text \(int\)"),
        ("{}", r"line 2 has no text in the field 'text', only no fields"),
    ],
)
def test_invalid_line_raises_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, c_DOT_jsonl=f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_missing_source_and_missing_text_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere' does not exist: expected `python-stdlib`, a file or folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"contains no text.*\.jsonl, \.md, \.py, \.txt"):
        load(tmp_path)
    write(tmp_path, a_DOT_log="text", b_DOT_txt=" ")
    with pytest.raises(ValueError, match=r"contains no text.*\.txt and are not hidden; skipped 1 empty \(b\.txt\)"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"a\.log contains no text"):
        load(tmp_path / "a.log")


def test_standard_library_without_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path,
        os_DOT_py="os",
        json__decoder_DOT_py="decoder",
        LICENSE_DOT_txt="license",
        test__test_os_DOT_py="no",
        lib2to3__tests__data_DOT_py="no",
        **{"site-packages__torch_DOT_py": "no", "idlelib__run_DOT_py": "no", "json____pycache___DOT_py": "x"},
    )
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = load("python-stdlib")
    assert "no" not in list(documents) and "license" not in list(documents)
    assert {"decoder", "os"} <= set(documents)


def test_standard_library_of_the_running_python() -> None:
    documents = load("python-stdlib")
    assert len(documents) > 300
    assert documents.characters > 4_000_000
    texts = set(documents)
    assert Path(json.__file__).read_text() in texts
    assert Path(pytest.__file__).read_text() not in texts


def test_dataset_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:some/name needs the package `datasets`: pip install 'sightline\[data\]'"):
        load("hf:some/name")


@pytest.mark.skipif(sources.datasets is None, reason="needs the extra `data`")
def test_dataset_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [{"body": text, "id": index} for index, text in enumerate(["one", "", None, "  ", "four", "é"])]
    folder = write(tmp_path / "set", train_DOT_jsonl="\n".join(map(json.dumps, lines)))
    documents = load(f"hf:{folder}", text_field="body")
    assert list(documents) == documents.read(np.arange(3)) == ["one", "four", "é"]
    assert documents.digest == Documents.from_texts(["one", "four", "é"]).digest
    assert documents.lengths.tolist() == [3, 4, 1]
    assert documents.skipped == {"empty": ["row 1", "row 2", "row 3"]}
    with pytest.raises(ValueError, match=r"no text in the field 'id', only body \(string\), id \(int64\)"):
        load(f"hf:{folder}", text_field="id")
    with pytest.raises(ValueError, match="no text in the field 'text'"):
        load(f"hf:{folder}")
    with pytest.raises(ValueError, match="does not exist"):
        load(f"hf:{tmp_path / 'nowhere'}")

"""Token ids from texts, JSONL files and nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensortap.errors import ConfigError
from tensortap_hf.command.samples import read


class Words:
    """A tokenizer: a word is its length."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def ids(found: Any) -> list[list[int]]:
    return [sample[0].tolist() for sample in found.ids]


def test_a_text_is_cut_into_samples_of_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "a bb ccc dddd eeeee ffffff ggggggg")
    found = read(path, 10, 3, Words(), 100)
    assert ids(found) == [[1, 2, 3], [4, 5, 6]]
    assert found.tokens == "tokenizer"
    assert ids(read(path, 1, 3, Words(), 100)) == [[1, 2, 3]]


def test_a_short_text_is_one_sample(tmp_path: Path) -> None:
    assert ids(read(write(tmp_path, "a.txt", "a bb"), 10, 3, Words(), 100)) == [[1, 2]]


def test_lines_of_jsonl_keep_their_own_lengths(tmp_path: Path) -> None:
    lines = ['"a bb ccc dddd"', '{"text": "eeeee"}', "", '{"text": "a a", "id": 7}']
    found = read(write(tmp_path, "a.jsonl", "\n".join(lines)), 10, 3, Words(), 100)
    assert ids(found) == [[1, 2, 3], [5], [1, 1]]
    assert found.lengths == [3, 1, 2]
    assert [tuple(sample.shape) for sample in found.ids] == [(1, 3), (1, 1), (1, 2)]


def test_token_ids_may_be_given_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", json.dumps({"input_ids": [3, 1, 2]}))
    found = read(path, 10, 2, None, 100)
    assert (ids(found), found.tokens) == ([[3, 1]], "ids")


def test_without_a_tokenizer_bytes_stand_in(tmp_path: Path) -> None:
    found = read(write(tmp_path, "a.txt", "aä"), 10, 8, None, 256)
    assert (ids(found), found.tokens) == ([[0x61, 0xC3, 0xA4]], "bytes")
    assert ids(read(write(tmp_path, "a.txt", "aä"), 10, 8, None, 100)) == [[97, 95, 64]]


def test_without_data_ids_are_random_and_the_same_again() -> None:
    found = read(None, 3, 5, None, 50)
    assert found.tokens == "random"
    assert found.lengths == [5, 5, 5]
    assert ids(found) == ids(read(None, 3, 5, Words(), 50))
    assert ids(found) != ids(read(None, 3, 5, None, 50, seed=1))
    assert max(max(sample) for sample in ids(found)) < 50


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "", "holds no text"),
        ("a.jsonl", "\n\n", "holds no text"),
        ("a.jsonl", "{", r"a\.jsonl, line 1 is no JSON"),
        ("a.jsonl", '"fine"\n" "', r"line 2 becomes no token ids"),
        ("a.jsonl", '"fine"\n[1]', r"line 2 is neither a string"),
        ("a.jsonl", '{"input_ids": [1, -1]}', "neither a string"),
        ("a.jsonl", '{"input_ids": [1, 100]}', "token id 100, and the vocabulary ends at 99"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(write(tmp_path, name, text), 10, 8, Words(), 100)


def test_files_that_are_none_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "none.txt", 1, 8, None, 100)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        read(tmp_path / "binary", 1, 8, None, 300)

"""A folder that is written whole: it replaces the older one, or leaves it as it was."""

from __future__ import annotations

import pytest

from tensortap.store.disk import whole_folder


def filled(path, text):
    path.mkdir()
    (path / "file").write_text(text)


def test_a_new_folder_takes_the_place_of_the_older_one(tmp_path):
    filled(tmp_path / "run", "older")
    filled(tmp_path / ".run.partial", "left behind by a process that was killed")
    with whole_folder(tmp_path / "run") as partial:
        assert not partial.exists()
        filled(partial, "new")
        assert (tmp_path / "run" / "file").read_text() == "older"
    assert (tmp_path / "run" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failure_leaves_the_older_one_and_nothing_else(tmp_path):
    filled(tmp_path / "run", "older")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "run") as partial:
        filled(partial, "half")
        raise KeyboardInterrupt
    assert (tmp_path / "run" / "file").read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

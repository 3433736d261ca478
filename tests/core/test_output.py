"""Output directories: what is refused, and what a whole result replaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_fair.core.output import check_output, fresh, partial_path, settle


def test_only_a_new_or_an_empty_directory_is_written(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    (tmp_path / "empty" / "x").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        check_output(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a file"):
        check_output(tmp_path / "empty" / "x")


def test_a_result_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    folder = partial_path(tmp_path / "out")
    assert folder == tmp_path / "out.partial"
    (folder / "left").mkdir(parents=True)
    assert fresh(folder) == folder
    assert list(folder.iterdir()) == []
    assert fresh(tmp_path / "a" / "b").is_dir()  # parents are made
    (folder / "x").write_text("whole")
    (tmp_path / "out").mkdir()  # an empty one may stand there
    settle(folder, tmp_path / "out")
    assert (tmp_path / "out" / "x").read_text() == "whole"
    assert not folder.exists()
    settle(fresh(folder), tmp_path / "other")
    assert (tmp_path / "other").is_dir()

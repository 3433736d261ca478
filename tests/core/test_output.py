"""Output directories: what is refused, and what a whole result replaces."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from moe_fair.core.output import (
    Place,
    check_output,
    claim,
    find_place,
    fresh,
    partial_path,
    settle,
    write_named,
    write_whole,
)


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


@pytest.mark.parametrize("name", ["out", "a/b/out"])
def test_what_is_claimed_is_this_runs_alone(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    with claim(out) as place:
        assert place == Place(out)
        assert [p.name for p in out.parent.iterdir()] == ["out.lock"]
        with pytest.raises(ValueError, match=f"by process {os.getpid()} on "), claim(out):
            pass
    assert list(tmp_path.iterdir()) == []  # neither the lock nor folders made for it
    with pytest.raises(ZeroDivisionError), claim(out) as place:
        1 / (len(list(fresh(place.partial).iterdir())))
    assert [p.name for p in out.parent.iterdir()] == ["out.partial"]


def test_links_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for link, target in (("there", "disk"), ("not-yet", "disk/new"), ("deep", "disk/a/b")):
        (tmp_path / link).symlink_to(target)
        with claim(tmp_path / link) as place:
            assert place == Place(tmp_path / target)
            settle(fresh(place.partial), place.path)
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / link).is_dir()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match="circle: its links lead in a circle"):
        find_place(tmp_path / "circle")


def test_the_folder_of_the_command_is_worked_inside_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lost+found").mkdir()  # as in the root of a file system
    with claim(Path(".")) as place:
        assert place == Place(tmp_path, inside=True)
        assert (tmp_path / "moe_fair.lock").is_file()
        folder = fresh(place.partial)
        (folder / "config.json").touch()
        (folder / "moe_fair").mkdir()
        settle(folder, place.path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "lost+found", "moe_fair"]
    with pytest.raises(ValueError, match="is not empty"), claim(Path(".")):
        pass


def test_a_result_that_was_moved_up_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two names: what makes it load comes last, and the next run moves the rest."""
    monkeypatch.chdir(tmp_path)
    names = ["config.json", "model.safetensors", "moe_fair", "recipe.yaml"]
    rename, moved = Path.rename, []

    def killed(self: Path, target: Path) -> Path:
        if self.parent.name == "moe_fair.whole" and len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(self.name)
        return rename(self, target)

    folder = fresh(tmp_path / "moe_fair.partial")
    for name in names:
        (folder / name).touch()
    with monkeypatch.context() as m:
        m.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            settle(folder, tmp_path)
    assert moved == ["moe_fair.partial", "model.safetensors"]
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(ValueError, match="is not empty"), claim(Path(".")):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_name_that_cannot_be_given_says_where_the_result_lies(tmp_path: Path) -> None:
    with claim(tmp_path / "out") as place:
        folder = fresh(place.partial)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").touch()  # somebody else's
        with pytest.raises(OSError, match=r"not empty.*whole and lies in .*out.partial"):
            settle(folder, place.path)
    assert folder.is_dir()


@pytest.mark.parametrize("kind", ["partial", "calibrating", "pruning", "lock"])
def test_what_is_in_the_way(tmp_path: Path, kind: str) -> None:
    """Files and links where a run keeps something: refused, and left as they are."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").touch()
    sibling = tmp_path / f"out.{kind}"

    def refused(what: str) -> None:
        said = f"out.{kind} is {what} and in the way"
        with pytest.raises(ValueError, match=said), claim(tmp_path / "out"):
            pass
        assert os.path.lexists(sibling)

    for target in ("data", "data/x", "nowhere"):
        sibling.symlink_to(target)
        refused("a link")
        sibling.unlink()
    if kind == "lock":
        sibling.mkdir()
        refused("a folder")
    else:
        sibling.touch()
        refused("a file")
    assert (tmp_path / "data" / "x").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", sibling.name]


def test_a_link_in_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "out.calibrating" / "repair").mkdir(parents=True)
    (tmp_path / "out.calibrating" / "repair" / "chunk").symlink_to(tmp_path / "data")
    said = "chunk is a link, which no run leaves there"
    with pytest.raises(ValueError, match=said), claim(tmp_path / "out"):
        pass
    (tmp_path / "out.partial").symlink_to(tmp_path / "data")
    fresh(tmp_path / "out.partial")
    assert (tmp_path / "data").is_dir()  # only the link is gone
    assert not (tmp_path / "out.partial").is_symlink()


def test_a_parent_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = "file is a file; give a path in a directory"
    with pytest.raises(ValueError, match=said), claim(tmp_path / "file" / "a" / "out"):
        pass


def test_results_are_added_to_a_folder_by_one_run(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with claim(tmp_path, new=False):
        assert tmp_path.with_name(f"{tmp_path.name}.lock").is_file()
        with pytest.raises(ValueError, match="is being written by"), claim(tmp_path, new=False):
            pass
    assert not tmp_path.with_name(f"{tmp_path.name}.lock").exists()


def test_text_files_are_written_whole_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("data")
    (tmp_path / "link").symlink_to("data")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "data").read_text() == "data"
    assert not (tmp_path / "link").is_symlink()
    partial = tmp_path / f"file.{os.getpid()}.partial"
    partial.symlink_to("data")
    write_whole(tmp_path / "file", "new")
    assert (tmp_path / "data").read_text() == "data"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "file", "folder", "link"]


def test_what_a_user_names_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for link in ("a", "b"):
        (tmp_path / link).symlink_to(f"disk/{link}")
    (tmp_path / "disk" / "a").write_text("before")
    for name in ("a", "b", "c"):
        write_named(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    assert (tmp_path / "disk" / "b").read_text() == "b"
    assert (tmp_path / "a").is_symlink()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_named(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_standard_output_by_its_name(tmp_path: Path) -> None:
    """Where it goes to a file, that file is not replaced: what is printed next goes there too."""
    code = (
        "from pathlib import Path; from moe_fair.core.output import write_named; "
        "write_named(Path('/dev/stdout'), 'plan\\n'); print('table')"
    )
    with (tmp_path / "file").open("w") as f:
        subprocess.run([sys.executable, "-c", code], stdout=f, check=True)
    assert (tmp_path / "file").read_text() == "plan\ntable\n"
    piped = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert piped.stdout == b"plan\ntable\n"


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from tempfile import TemporaryDirectory
from moe_fair.core.output import claim, find_place, fresh, settle
find_place(Path("."))  # all modules are loaded while they can be read
if os.geteuid() == 0:
    os.setuid(65534)
with claim(Path(sys.argv[1])) as place:
    (fresh(place.partial) / "x").touch()
    settle(place.partial, place.path)
"""


def test_a_folder_in_one_that_is_not_writable() -> None:
    """As an administrator gives it: it is all that the user may write to."""
    with TemporaryDirectory() as name:
        parent = Path(name)
        (parent / "given").mkdir()
        (parent / "given").chmod(0o777)
        parent.chmod(0o555)
        command = [sys.executable, "-c", UNPRIVILEGED]
        subprocess.run([*command, str(parent / "given")], check=True)
        assert [p.name for p in (parent / "given").iterdir()] == ["x"]
        new = subprocess.run([*command, str(parent / "new")], capture_output=True, text=True)
        assert new.stderr.endswith(f"{parent} is not writable; write elsewhere\n")
        parent.chmod(0o755)

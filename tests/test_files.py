"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.files import ABANDONED, atomic_file, atomic_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_thing_and_nothing_else(tmp_path, problem):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("old")
    shown = ConfigError if isinstance(problem, OSError) else KeyboardInterrupt
    with pytest.raises(shown) as error, atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("ne")
        raise problem
    if shown is ConfigError:
        told = f"{tmp_path / 'file'}: cannot be written (No space left on device)"
        assert str(error.value) == f"{told}; allowed: a writable folder"
    with pytest.raises(shown), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "b").write_text("new")
        raise problem
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["a"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "a").read_text() == "old"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("a", "b"):
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / content).write_text("")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["b"]


def test_what_killed_processes_left_is_removed_and_what_live_ones_write_is_not(tmp_path):
    for name, age in ((".writing-killed", ABANDONED + 60), (".writing-alive", 60)):
        (tmp_path / name / "new").mkdir(parents=True)
        stamp = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (stamp, stamp))
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("")
    assert names(tmp_path) == [".writing-alive", "file"]


def test_what_reads_results_does_not_wait_for_torch():
    code = "import sys, fusion_bench_intervmerge.results; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

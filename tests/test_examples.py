"""Every example runs, at the smallest size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_command import compose, in_process

from fusion_bench_intervmerge.cli import main as report

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# name -> arguments, and a line that it ends with
SCRIPTS = {
    "train_and_deploy.py": (
        ["--pool=clip-vit-tiny_TA8", "--steps=3", "--images=16"],
        "dropped digits",
    ),
    "own_experts.py": (["--steps=3", "--expert-steps=3", "--images=64"], "  corners"),
    "own_function.py": (["--steps=3"], "read back: scale, 6,144 extra parameters"),
}
SHELL = {
    "compare.sh": ["clip-vit-tiny_TA8", "method.seeds=[0]", "fast_dev_run=true"],
    "save_and_load.sh": ["clip-vit-tiny_TA8", "digits", "fast_dev_run=true"],
}
# Stands for a command on the PATH, and writes down what it was given.
RECORDER = """#!/bin/sh
for word in "$(basename "$0")" "$@"; do printf '%s\\0' "$word" >> "$RECORD"; done
echo >> "$RECORD"
"""


def run(command, cwd, **environment):
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_no_example_is_forgotten():
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    # test_hub.py, test_serving.py
    elsewhere = {"push_and_classify.sh", "classify.py", "serve.py", "serve.html", "notebook.ipynb"}
    assert names == {*SCRIPTS, *SHELL, "study.sh", *elsewhere}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The Python examples one after the other in one process: the imports are most of its time."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "notebook.py").write_text(notebook())
    code = (
        "import runpy, sys\n"
        f"for name, (arguments, _) in {SCRIPTS!r}.items():\n"
        f"    sys.argv = [name, *arguments]\n"
        "    print('EXAMPLE', name)\n"
        f"    runpy.run_path({str(EXAMPLES)!r} + '/' + name, run_name='__main__')\n"
        "print('EXAMPLE notebook')\n"
        "runpy.run_path('notebook.py')\n"
    )
    output = run([sys.executable, "-c", code], folder, MPLBACKEND="agg")
    return {part.partition("\n")[0]: part for part in output.split("EXAMPLE ")[1:]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_python_example(name, shown):
    assert f"\n{SCRIPTS[name][1]}" in shown[name], shown[name]


def notebook():
    """The code of the notebook's cells, on a smaller pool and fewer images."""
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    smaller = {
        "mini_TA8": "tiny_TA8",
        "TESTED = 256": "TESTED = 24",
        '"images": 256': '"images": 8',
    }
    for words, less in smaller.items():
        assert words in code
        code = code.replace(words, less)
    return code


def test_the_notebook(shown):
    assert "(8, 64) 12,384 extra parameters" in shown["notebook"], shown["notebook"]


def commands(name, arguments, folder):
    """What a shell example calls: the shell's own work for real, its commands written down."""
    for command in ("fusion_bench", "intervmerge", "uv"):
        (folder / command).write_text(RECORDER)
        (folder / command).chmod(0o755)
    run(
        ["bash", str(EXAMPLES / name), *arguments],
        folder,
        PATH=f"{folder}:{os.environ['PATH']}",
        RECORD=str(folder / "record"),
        RUN=str(folder / "run" / "log"),
    )
    return [line.split("\0") for line in (folder / "record").read_text().split("\0\n")[:-1]]


@pytest.mark.parametrize("name", SHELL)
def test_a_shell_example(name, tmp_path):
    """The commands that it gives run in this process."""
    for command, *words in commands(name, SHELL[name], tmp_path):
        if command == "intervmerge":
            assert report(words) == 0
            continue
        (log_dir,) = (Path(w.partition("=")[2]) for w in words if w.startswith("path.log_dir="))
        in_process(*words, folder=log_dir.parent)
        if "method=intervmerge" not in words:  # which has no task pool here
            assert (log_dir.parent / "log" / "program_report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "outputs/studies/clip-vit-mini_TA8/tokens"),
        (["[blocks,quick]"], "outputs/studies/quick/clip-vit-mini_TA8/blocks"),
        (["data", "clip-vit-b32_TA8", "method.steps=1"], "outputs/studies/clip-vit-b32_TA8/data"),
    ],
)
def test_the_study_example(arguments, folder, tmp_path):
    """test_studies.py runs such commands; here they are composed, and report where runs lie."""
    (command, *words), report_words = commands("study.sh", arguments, tmp_path)
    assert command == "fusion_bench" and report_words == ["intervmerge", "report", folder]
    config = compose(*words, return_hydra_config=True)
    assert config.hydra.sweep.dir == folder

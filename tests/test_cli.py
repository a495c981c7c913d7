"""The ``intervmerge`` command's own words; its subcommands are tested where their rooms are."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fusion_bench_intervmerge.cli import main


def test_help_needs_neither_torch_nor_fusionbench():
    code = (
        "import sys\n"
        "from fusion_bench_intervmerge.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(*sorted({'torch', 'transformers', 'fusion_bench'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "export" in done.stdout
    assert done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["exprot", "folder"], "there is no command exprot; did you mean export?"),
        (["xyz"], "there is no command xyz"),
        (["export", "folder", "--dtpye", "fp16"], "no argument --dtpye; did you mean --dtype?"),
        (["export", "folder", "--clases=x"], "no argument --clases=x; did you mean --classes?"),
        (["push", "folder", "me/x", "--no-onx"], "no argument --no-onx; did you mean --no-onnx?"),
        (["push", "folder", "me/x", "more"], "there is no argument more"),
    ],
)
def test_a_mistyped_word(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)

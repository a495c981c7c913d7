"""The report's page in a real browser: it sorts, follows the system's colours, fits a phone."""

from __future__ import annotations

import html
import re
import subprocess
from pathlib import Path

import pytest
import synthetic_runs as synthetic
from browser import CHROMIUM

from fusion_bench_intervmerge.report.page import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium to open the page in")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = synthetic.comparison(tmp_path_factory.mktemp("run") / "compared")
    return (write_report([run]) / "report.html").read_text()


def browse(text: str, folder: Path, script: str, *flags: str) -> tuple[str, str]:
    """Run a script in the page; what it writes with ``say``, and the console."""
    file = folder / "page.html"
    say = "const say = (t) => { const p = document.createElement('output'); p.id = 'said';"
    say += "p.textContent = t; document.body.append(p); };"
    file.write_text(text.replace("</body>", f"<script>{say}{script}</script></body>"))
    command = [
        CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0", *flags,
        "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = re.search(r'<output id="said">(.*?)</output>', done.stdout, re.DOTALL)
    assert said is not None, done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return html.unescape(said[1]), console


def test_a_header_sorts_down_up_and_back(page: str, tmp_path: Path) -> None:
    methods = "[...document.querySelectorAll('.results tbody th')].map(h => h.textContent)"
    order = "[...document.querySelectorAll('.results thead th')].map(h => h.ariaSort)"
    click = "document.querySelectorAll('.results thead button')[{}].click();"
    note = f"said.push({methods}.join(', ') + ' | ' + {order}.slice(1).join(' '));"
    steps = [click.format(0) + note] * 3 + [click.format(2) * 2 + note]
    said, console = browse(
        page, tmp_path, f"const said = []; {''.join(steps)} say(said.join('\\n'));"
    )
    down, up, back, parameters = (line.split(" | ") for line in said.splitlines())
    assert down[0] == (
        "Experts, IntervMerge r=4, IntervMerge r=1, Surgery r=16, Task Arithmetic, Pretrained"
    )
    assert up[0] == ", ".join(reversed(down[0].split(", ")))
    assert back[0] == (
        "Pretrained, Task Arithmetic, Surgery r=16, IntervMerge r=1, IntervMerge r=4, Experts"
    )
    assert [line[1].split()[0] for line in (down, up, back)] == ["descending", "ascending", "none"]
    assert set(down[1].split()[1:]) == {"none"}
    # ascending; what has no value stays last
    assert parameters[0] == (
        "Task Arithmetic, IntervMerge r=1, Surgery r=16, IntervMerge r=4, Pretrained, Experts"
    )
    assert console == ""


def test_figures_and_page_follow_the_systems_colours(page: str, tmp_path: Path) -> None:
    colour = "getComputedStyle(document.querySelector('{}')).{}"
    what = [colour.format("body", "backgroundColor"), colour.format("figure svg", "color")]
    said = []
    for mode in (1, 0):
        (tmp_path / str(mode)).mkdir()
        flag = f"--blink-settings=preferredColorScheme={mode}"
        said.append(browse(page, tmp_path / str(mode), f"say([{','.join(what)}].join('|'))", flag))
    assert said == [
        ("rgb(245, 246, 248)|rgb(28, 33, 39)", ""),
        ("rgb(15, 18, 21)|rgb(232, 235, 238)", ""),
    ]


def test_a_phone_scrolls_tables_and_figures_and_not_the_page(page: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner.html"
    # files may not look into each other: the framed page measures itself and tells its frame
    measure = (
        "<script>addEventListener('load', () => {"
        "const wide = (s) => { const e = document.querySelector(s);"
        " return e.scrollWidth > e.clientWidth; };"
        "parent.postMessage(['html', '.scroll', 'figure'].map(wide).join(' '), '*'); });"
        "</script></body>"
    )
    inner.write_text(page.replace("</body>", measure))
    frame = f'<iframe src="{inner.as_uri()}" width="375" height="700"></iframe>'
    listen = "addEventListener('message', (e) => say(e.data));"
    said, _ = browse(f"{frame}</body>", tmp_path, listen, "--virtual-time-budget=4000")
    assert said == "false true true"

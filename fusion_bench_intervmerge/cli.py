"""The ``intervmerge`` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from . import __version__
from .config import ArtifactError, ConfigError

DTYPES = ("fp32", "fp16", "int8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``intervmerge``; by default the process's.

    Returns:
        The exit code: 0, or 2 for bad input, which one line on stderr explains.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = _parsers()
    if words and not words[0].startswith("-") and words[0] not in commands:
        parser.error(_unknown("command", words[0], commands))
    options, unknown = parser.parse_known_args(words)
    if unknown:
        command = commands[options.command]
        known = re.findall(r"(?<![\w-])--[a-z][a-z-]*", command.format_help())
        command.error(_unknown("argument", unknown[0], known))
    try:
        options.run(options)
    except (ConfigError, ArtifactError) as error:
        print(f"intervmerge: {error}", file=sys.stderr)
        return 2
    return 0


def _unknown(noun: str, word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.partition("=")[0], list(known), n=1)
    return f"there is no {noun} {word}" + (f"; did you mean {near[0]}?" if near else "")


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of its subcommands by name."""
    parser = argparse.ArgumentParser(
        prog="intervmerge", description="Reports of finished runs, and saved models for elsewhere."
    )
    parser.add_argument("--version", action="version", version=__version__)
    group = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = (
        "Write tables, figures and one self-contained HTML page about runs of `fusion_bench "
        "method=intervmerge/compare` and `method=intervmerge`."
    )
    short = "tables, figures and one HTML page"
    report = group.add_parser("report", help=short, description=text)
    report.set_defaults(run=_report)
    add = report.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder")
    add("--to", metavar="FOLDER", help="default: report, in the first run's folder")
    text = "report this merging method only, by its name in the run; may be given several times"
    add("--base", action="append", default=[], metavar="NAME", help=text)
    add("--title", default="IntervMerge report", help="of the page")

    text = (
        "Write a saved model as one graph that takes images and task indices, and that runs "
        "without this package."
    )
    short = "a saved model as one ONNX or torch.export file"
    export = group.add_parser("export", help=short, description=text)
    export.set_defaults(run=_export)
    add = export.add_argument
    add("model", metavar="FOLDER", help="a saved model's folder, or its hub id")
    add("--to", choices=("onnx", "torch"), default="onnx", help="default: onnx")
    add("--tasks", nargs="+", metavar="TASK", help="default: all, in their order")
    add("--fold", action="store_true", help="fold the edits first")
    text = "of the weights; int8 stores the encoder's matrices in 8 bits (ONNX). Default: fp32"
    add("--dtype", choices=DTYPES, default="fp32", help=text)
    add("--logits", action="store_true", help="logits of the tasks' class names as well")
    text = (
        'JSON: {"task": {"names": [...], "templates": ["a photo of a {}."]}}, and --logits; '
        "default: what the model knows of its tasks"
    )
    add("--classes", metavar="FILE", help=text)
    text = (
        "for --logits: folder or id of the CLIP whose text tower reads the names; default: the "
        "one that the experts started from"
    )
    add("--clip", metavar="CLIP", help=text)
    add("--to-file", metavar="FILE", help="default: FOLDER.onnx or FOLDER.pt2, beside the folder")

    text = (
        "Put a saved model on the hub (or on the one that HF_ENDPOINT names), with a model card, "
        "its image processor, and an ONNX graph of it."
    )
    short = "a saved model to the Hugging Face hub"
    push = group.add_parser("push", help=short, description=text)
    push.set_defaults(run=_push)
    add = push.add_argument
    add("model", metavar="FOLDER", help="a saved model's folder")
    add("repo", metavar="OWNER/MODEL", help="created if it does not exist")
    text = "the run's folder, whose accuracies the card shows"
    add("--run", dest="results", metavar="RUN", help=text)
    add("--private", action="store_true", default=None, help="if it is created")
    add("--no-onnx", dest="onnx", action="store_false", help="leave out the graph")
    add("--dtype", choices=DTYPES, default="fp32", help="of the graph's weights")

    text = (
        "Compare what runs of `fusion_bench +experiment=published` found, on any machine, with the "
        "published numbers."
    )
    short = "a run's accuracies beside the published ones"
    published = group.add_parser("published", help=short, description=text)
    published.set_defaults(run=_published)
    published.add_argument("files", nargs="+", metavar="FILE", help="a run's published.json")
    return parser, {"report": report, "export": export, "push": push, "published": published}


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being done, behind a spinner on a terminal; nothing in a log file."""
    with Console(stderr=True).status("loading") as status:
        yield lambda step: status.update(step)


def _report(options: argparse.Namespace) -> None:
    from .report.page import write_report

    console = Console()
    folder = write_report(options.runs, options.to, options.base, options.title, console)
    # soft_wrap: a path that is broken over lines cannot be copied
    console.print(f"The report is in {folder / 'report.html'}", soft_wrap=True, highlight=False)


def _export(options: argparse.Namespace) -> None:
    with _progress() as tell:
        from .deploy.export import SUFFIXES, export
        from .deploy.heads import known_heads, read_classes
        from .model.model import InterventionModel

        model = InterventionModel.from_pretrained(options.model)
        heads, names = None, None
        if options.logits or options.classes:
            tell("reading the class names")
            classes = None if options.classes is None else read_classes(options.classes)
            heads, names = known_heads(model, options.tasks, classes, options.clip)
        folder = Path(options.model).absolute()
        beside = folder.parent if folder.exists() else Path()
        file = Path(options.to_file or beside / f"{folder.name}{SUFFIXES[options.to]}")
        if file.is_dir():  # said now, not after the export
            raise ConfigError("--to-file", f"{file} is a folder", "a file")
        settings = {name: getattr(options, name) for name in ("to", "tasks", "fold", "dtype")}
        file = export(model, file, **settings, heads=heads, classes=names, tell=tell)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, {options.dtype}")
    tasks = options.tasks or model.tasks
    console.print(f"task: {', '.join(f'{index} {task}' for index, task in enumerate(tasks))}")
    if model.router is not None:
        console.print("The router is not in the file: name the task of each image.")


def _push(options: argparse.Namespace) -> None:
    with _progress() as tell:
        from .deploy.push import push, read_results
        from .model.model import InterventionModel

        model = InterventionModel.from_pretrained(Path(options.model))
        if options.results is not None:
            model.metadata["results"] = read_results(Path(options.results), model.tasks)
        settings = {name: getattr(options, name) for name in ("onnx", "dtype", "private")}
        address = push(model, options.repo, **settings, tell=tell)
    Console(soft_wrap=True, highlight=False).print(f"{options.repo}: {address}")


def _published(options: argparse.Namespace) -> None:
    from .report.published import read_found, show

    for found in map(read_found, options.files):
        show(found, Console(highlight=False))


if __name__ == "__main__":
    sys.exit(main())

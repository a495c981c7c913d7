"""``intervmerge push``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add the command to a parser's."""
    push = commands.add_parser(
        "push",
        help="a saved model to the Hugging Face hub",
        description="Put a saved model on the hub (or on the one that HF_ENDPOINT names), with a "
        "model card, its image processor, and an ONNX graph of it.",
    )
    push.add_argument("model", metavar="FOLDER", help="a saved model's folder")
    push.add_argument("repo", metavar="OWNER/MODEL", help="it is made where it is missing")
    push.add_argument(
        "--run",
        dest="results",
        metavar="RUN",
        help="the run's folder, whose accuracies the card shows",
    )
    push.add_argument("--private", action="store_true", default=None, help="if it is made")
    push.add_argument("--no-onnx", dest="onnx", action="store_false", help="leave out the graph")
    push.add_argument(
        "--dtype", choices=("fp32", "fp16", "int8"), default="fp32", help="of the graph's weights"
    )
    push.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Push the model."""
    from ..model.model import InterventionModel
    from .push import push, read_results

    model = InterventionModel.from_pretrained(Path(options.model))
    if options.results is not None:
        model.metadata["results"] = read_results(Path(options.results), model.tasks)
    address = push(
        model, options.repo, onnx=options.onnx, dtype=options.dtype, private=options.private
    )
    Console(soft_wrap=True, highlight=False).print(f"{options.repo}: {address}")

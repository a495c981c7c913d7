"""What the methods write of their models into a run's results."""

from __future__ import annotations

from collections.abc import Mapping

from hydra.core.hydra_config import HydraConfig

from ..config import Json, checked
from ..distillation.loop import Distillation
from ..model.model import InterventionModel
from ..results import Images, Result
from .settings import MethodSettings


def images_used(settings: MethodSettings, steps: int, solved: bool) -> Images:
    """Which images a method's edits are found on.

    Args:
        settings: the method's.
        steps: that it really takes.
        solved: whether it solves any edits.
    """
    data = settings.data
    return Images(
        split=data.split,
        fraction=data.fraction,
        at_most=data.images,
        solved=solved,
        steps=steps,
        batch_size=data.batch_size if steps else None,
        seed=settings.seed,
        # accuracies are measured on the test split
        transductive=data.split == "test",
    )


def repaired(
    model: InterventionModel,
    done: Distillation,
    images: list[Images],
    settings: Json,
    **more: object,
) -> Result:
    """What is known of a repaired model.

    Args:
        model: the model.
        done: its training.
        images: what its edits were found on, the last of them now.
        settings: its method's, as plain values.
        more: other fields of ``Result``.
    """
    return _repair(
        model,
        settings,
        images=images,
        images_seen={task: len(seen) for task, seen in done.images.items()},
        resumed_at=done.resumed_at,
        final_loss=float(done.losses[-1].mean()) if len(done.losses) else None,
        losses=done.by_task(),
        seed=images[-1].seed,
        **more,
    )


def saved(model: InterventionModel, base: str, method: str) -> Result:
    """What a saved model remembers of itself.

    Args:
        model: the model.
        base, method: what to call its merge and its repair.
    """
    settings, images = model.metadata.get("method") or {}, remembered_images(model)
    return _repair(model, settings, images=images, seed=model.seed, base=base, method=method)


def remembered_images(model: InterventionModel) -> list[Images]:
    """The images that a saved model's edits were found on, as far as it tells."""
    known = model.metadata.get("images")
    # a sentence stands for images that are not known, of a model that was made in Python
    kept = [one for one in known if not isinstance(one, str)] if isinstance(known, list) else []
    return [checked(Images, one, "images") for one in kept]


def method_name(result: Result) -> str:
    """What the method is called on the command line, with its size: ``intervmerge_r4``."""
    name = _choices().get("method", "intervmerge").replace("/", "_")
    if result.budget is not None:
        return f"{name}_b{result.budget}"
    return name if result.rank is None else f"{name}_r{result.rank}"


def base_name(base: object) -> str:
    """What a base method is called on the command line; in Python, the name of its class."""
    if chosen := _choices().get("method@method.base"):
        return str(chosen).replace("/", "_")
    given = base.get("_target_") or base.get("name") if isinstance(base, Mapping) else None
    return str(given or type(base).__name__).rpartition(".")[2]


def _choices() -> dict[str, str]:
    """Which config of each group was chosen, where Hydra composed them."""
    if not HydraConfig.initialized():
        return {}
    return {key: str(name) for key, name in HydraConfig.get().runtime.choices.items() if name}


def _repair(model: InterventionModel, settings: Json, **more: object) -> Result:
    extra, budget = model.extra_parameters(), settings.get("budget")
    places = (blocks for sites in model.ranks().values() for blocks in sites.values())
    ranks = {rank for blocks in places for rank in blocks.values()}
    known: Json = {
        "budget": budget,
        "rank": ranks.pop() if budget is None and len(ranks) == 1 else None,
        "settings": dict(settings),
        "extra_parameters": extra["total"],
        "extra_parameters_folded": extra["folded"],
        "extra_parameters_by_task": extra["per_task"],
        "bytes": extra["bytes"] + 4 * extra.get("router", 0),
        "labels": 0,
        "passes": 1.0,
        "needs_task": model.router is None,
    }
    return Result(kind="repair", **known | more)

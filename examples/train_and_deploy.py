"""From a pool of experts to a model that serves many tasks, in Python.

Merges the pool's experts but the last by Task Arithmetic, repairs the merge without labels, saves
and loads it, encodes one batch with images of several tasks, folds the edits, and at the end adds
the task of the last expert, as if it had come later.

    python examples/train_and_deploy.py                # the embedded pool: no download
    python examples/train_and_deploy.py --pool clip-vit-b32_TA8 --steps 1000

On the embedded pool it takes about a minute on one CPU core.
"""

from __future__ import annotations

import argparse
from functools import partial

import fusion_bench_config
import torch
from fusion_bench.utils import instantiate
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from fusion_bench.utils.instantiate_utils import set_print_function_call_permeanent
from torch.utils.data import DataLoader, Subset

from fusion_bench_intervmerge.distillation.loop import distill
from fusion_bench_intervmerge.fusion.pools import ExpertPool
from fusion_bench_intervmerge.merging import mix
from fusion_bench_intervmerge.model.model import InterventionModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", default="clip-vit-mini_TA8", help="name of a model pool")
    parser.add_argument("--steps", type=int, default=200, help="of training, a task")
    parser.add_argument("--rank", type=int, default=4, help="of the edits")
    parser.add_argument("--images", type=int, default=256, help="of a task, to look at")
    parser.add_argument("--save-to", default="outputs/train_and_deploy", help="folder")
    options = parser.parse_args()

    set_print_function_call_permeanent(False)  # FusionBench would print all it instantiates
    config = initialize_hydra_config(
        "fabric_model_fusion", [f"modelpool={options.pool}"], fusion_bench_config.__path__[0]
    )
    pool = ExpertPool(instantiate(config.modelpool))
    *tasks, late = pool.tasks
    images = {task: pool.images(task, "test") for task in pool.tasks}
    experts = {task: partial(pool.tower, task) for task in pool.tasks}

    # Merge: theta0 + 0.3 * the sum of the task vectors.
    merged = pool.tower("_pretrained_")
    mix(merged, (experts[task]() for task in tasks), torch.full((len(tasks),), 0.3))

    # Repair: edits after the self-attention of every block, trained to match the experts' features.
    model = InterventionModel(merged, tasks, {"attention": {"rank": options.rank}})
    repair = partial(distill, model, steps=options.steps)
    repair({task: experts[task] for task in tasks}, {task: images[task] for task in tasks})
    model.save_pretrained(options.save_to)
    print(f"saved in {options.save_to}: {model.extra_parameters()['total']:,} extra parameters")

    # Later, elsewhere: nothing is needed but that folder.
    model = InterventionModel.from_pretrained(options.save_to)
    sample = {
        task: next(iter(DataLoader(Subset(data, range(options.images)), options.images)))
        for task, data in images.items()
    }
    print(f"accuracy on {options.images} images a task: merged, then repaired")
    for task in tasks:
        pixels, labels = sample[task]
        right = [
            (pool.head(task)(features).argmax(dim=-1) == labels).float().mean()
            for features in (encode(model, pixels), encode(model, pixels, task))
        ]
        print(f"  {task:12} {right[0]:6.1%} {right[1]:6.1%}")

    # One forward pass for images of many tasks.
    batch = torch.stack([sample[task][0][0] for task in tasks])
    together = encode(model, batch, tasks)
    apart = [encode(model, sample[task][0][:1], task) for task in tasks]
    print(f"mixed batch against one task at a time: {distance(together, torch.cat(apart)):.1e}")

    # Fold for inference: less to compute, the same features.
    folded = model.fold()
    print(f"folded against trained: {distance(encode(folded, batch, tasks), together):.1e}")

    # One more task: the merged encoder and the other tasks' edits stay as they are.
    model.add_task(late)
    distill(model, {late: experts[late]}, {late: images[late]}, steps=options.steps)
    print(f"added {late}; the others' features moved by "
          f"{distance(encode(model, batch, tasks), together):.1e}")  # fmt: skip
    model.drop_task(tasks[0])
    print(f"dropped {tasks[0]}; the model has: {', '.join(model.tasks)}")


@torch.no_grad()
def encode(model: InterventionModel, images: torch.Tensor, task=None) -> torch.Tensor:
    return model.encode(images, task)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest feature."""
    return float((one - other).abs().max() / other.abs().max())


if __name__ == "__main__":
    main()

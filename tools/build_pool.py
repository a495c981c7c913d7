"""Build an embedded pool of any seed: draw its images, pre-train a CLIP, fine-tune eight experts.

    python tools/build_pool.py clip-vit-tiny_TA8 FOLDER --seed 1
    fusion_bench ... modelpool=clip-vit-tiny_TA8 taskpool=clip-vit-tiny_TA8 modelpool.folder=FOLDER

The seed decides images, initial weights and batches. The build may be stopped at any time: finished
images, the pretrained encoder and finished experts stay in ``FOLDER.building``, and the next start
takes them up. With ``--ship`` the pool becomes the one in the package.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from recipes import RECIPES, Collection, Recipe
from safetensors.torch import save
from tokenizer import write_tokenizer
from training import make_expert, pretrain, save_whole
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from fusion_bench_intervmerge.tinyclip import pools
from fusion_bench_intervmerge.tinyclip.material import DIGESTS, sha256
from fusion_bench_intervmerge.tinyclip.pools import POOLS, Pool, describe, load_images
from fusion_bench_intervmerge.tinyclip.tasks import SIZE


def build(pool: Pool, recipe: Recipe, seed: int, folder: Path) -> None:
    """Build a pool into a folder, or what is left to do of it."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.building")
    unfinished.mkdir(parents=True, exist_ok=True)
    for part in unfinished.rglob("*.part"):
        shutil.rmtree(part)
    describe(unfinished, pool, seed, recipe.images)
    for task in pool.tasks:
        for split in recipe.images:
            load_images(unfinished, task, split)
    if not (unfinished / "pretrained").is_dir():
        print("pre-training", flush=True)
        make_pretrained(pool, recipe, seed, unfinished)
    missing = [task for task in pool.tasks if not (unfinished / "experts" / task).is_dir()]
    workers = min(len(os.sched_getaffinity(0)), len(missing) or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        jobs = [
            executor.submit(make_expert, unfinished, pool.name, task, recipe.finetuning, seed)
            for task in missing
        ]
        for job in as_completed(jobs):
            print("expert:", job.result(), flush=True)
    unfinished.rename(folder)


def make_pretrained(pool: Pool, recipe: Recipe, seed: int, folder: Path) -> None:
    """Write ``pretrained/``: a CLIPModel and its processor."""
    if recipe.pictures is None:
        collections = [
            Collection(*load_images(folder, name, "train"), task.all_captions())
            for name, task in pool.tasks.items()
        ]
    else:
        from mini_pretraining import collections as mini_collections

        collections = list(mini_collections(seed, recipe.pictures))
    texts = [text for part in collections for names in part.captions for text in names]
    processor = pools.make_processor(*write_tokenizer(folder / "tokenizer", texts))
    processor.save_pretrained(folder / "pretrained.part")
    # One thread: matrices this small gain little from more, and another number rounds differently.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = CLIPModel(clip_config(recipe, len(processor.tokenizer)))
        pretrain(model, processor.tokenizer, collections, recipe.pretraining, seed)
    finally:
        torch.set_num_threads(threads)
    save_whole(model, folder / "pretrained")
    shutil.rmtree(folder / "tokenizer")


def clip_config(recipe: Recipe, vocabulary: int) -> CLIPConfig:
    """Both towers; all that OpenCLIP's ``CustomTextCLIP`` can hold as well."""
    common = {
        "hidden_size": recipe.width,
        "intermediate_size": 4 * recipe.width,
        "num_attention_heads": recipe.width // recipe.head_width,
        "projection_dim": recipe.features,
        "hidden_act": "gelu",
    }
    text = {
        "num_hidden_layers": recipe.text_blocks,
        "vocab_size": vocabulary,
        "max_position_embeddings": pools.CONTEXT,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    vision = {
        "num_hidden_layers": recipe.blocks,
        "image_size": SIZE,
        "patch_size": recipe.patch_size,
    }
    return CLIPConfig(
        text_config=common | text,
        vision_config=common | vision,
        projection_dim=recipe.features,
    )


def pack(pool: Pool, folder: Path, target: Path) -> None:
    """Write what ships of a pool: its tokenizer, and its weights in half precision."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    model = CLIPModel.from_pretrained(folder / "pretrained")
    pretrained = {name: value.detach() for name, value in model.named_parameters()}
    tensors = {f"pretrained/{name}": value.half() for name, value in pretrained.items()}
    for task in pool.tasks:
        expert = CLIPVisionModel.from_pretrained(folder / "experts" / task)
        for name, value in expert.named_parameters():
            tensors[f"{task}/{name}"] = (value.detach() - pretrained[name]).half()
    (target / "weights.safetensors").write_bytes(save(tensors))
    for name in ("vocab.json", "merges.txt", "config.json"):
        shutil.copy(folder / "pretrained" / name, target / name)
    digests = {path.name: sha256(path) for path in sorted(target.iterdir())}
    (target / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool", choices=POOLS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ship", action="store_true", help="make it the package's own")
    options = parser.parse_args()
    pool = POOLS[options.pool]
    build(pool, RECIPES[pool.name], options.seed, options.folder.absolute())
    if options.ship:
        pack(pool, options.folder, pools.WEIGHTS / pool.name)


if __name__ == "__main__":
    main()

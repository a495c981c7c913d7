"""The OpenCLIP pools: the task-vectors paper's checkpoints, and evaluation that names the task."""

from __future__ import annotations

import io
import os
import pickle
import sys
import types
import typing
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import compose
from open_clip.transform import _convert_to_rgb
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms as T

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.encoders import as_tower
from fusion_bench_intervmerge.encoders.openclip import MEAN, STD, OpenCLIPTower
from fusion_bench_intervmerge.fusion.openclip import checkpoints
from fusion_bench_intervmerge.fusion.openclip.checkpoints import (
    ImageEncoder,
    load_encoder,
    load_head,
    named_spec,
    save_encoder,
)
from fusion_bench_intervmerge.fusion.openclip.pools import (
    OpenCLIPVisionModelPool,
    OpenCLIPVisionModelTaskPool,
)
from fusion_bench_intervmerge.model.model import InterventionModel

# isort: split
# after our package, which makes these importable before Python 3.12
from fusion_bench.method import TaskArithmeticAlgorithm
from fusion_bench.models.open_clip import ClassificationHead
from fusion_bench.taskpool.openclip_vision.openclip_taskpool import (
    OpenCLIPVisionModelTaskPool as HostTaskPool,
)

SPEC = {
    "image_size": 32,
    "patch_size": 16,
    "width": 64,
    "layers": 2,
    "heads": 1,
    "mlp_ratio": 4.0,
    "output_dim": 16,
    "quick_gelu": True,
    "mean": MEAN,
    "std": STD,
}


def make_encoder(seed: int = 0) -> ImageEncoder:
    torch.manual_seed(seed)
    return ImageEncoder(OpenCLIPTower.from_spec(SPEC))


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return make_encoder()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# -- modules as open_clip 2.0.2 and the paper's code had them ------------------------------------


class OldClasses:
    """The old classes, found under their old names inside ``with``, and nowhere afterwards."""

    def __init__(self):
        names = ["QuickGELU", "ResidualAttentionBlock", "Transformer", "VisualTransformer", "CLIP"]
        bases = {name: ("open_clip.model", nn.Module) for name in names}
        bases |= {"LayerNorm": ("open_clip.model", nn.LayerNorm)}
        bases |= {"ImageEncoder": ("src.modeling", nn.Module)}
        bases |= {"ClassificationHead": ("src.modeling", nn.Linear)}
        for name, (module, base) in bases.items():
            setattr(self, name, type(name, (base,), {"__module__": module}))

    def __enter__(self):
        self.hidden = {name: sys.modules.get(name) for name in ("src", "src.modeling")}
        self.hidden["open_clip.model"] = sys.modules["open_clip.model"]
        for name in self.hidden:
            sys.modules[name] = types.ModuleType(name)
        for cls in vars(self).values():
            if isinstance(cls, type):
                setattr(sys.modules[cls.__module__], cls.__name__, cls)
        return self

    def __exit__(self, *_):
        for name, module in self.hidden.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module

    def block(self, width: int) -> nn.Module:
        block = self.ResidualAttentionBlock()
        block.ln_1, block.ln_2 = self.LayerNorm(width), self.LayerNorm(width)
        block.attn, block.ln_attn = nn.MultiheadAttention(width, 1), nn.Identity()
        steps = {
            "c_fc": nn.Linear(width, 4 * width),
            "ln": nn.Identity(),
            "gelu": self.QuickGELU(),
            "c_proj": nn.Linear(4 * width, width),
        }
        block.mlp = nn.Sequential(OrderedDict(steps))
        return block

    def encoder(self, like: ImageEncoder) -> nn.Module:
        """The paper's ``ImageEncoder`` with that encoder's weights, text leftovers included."""
        new = like.model.visual
        width = new.conv1.out_channels
        visual = self.VisualTransformer()
        visual.image_size, visual.grid_size = (32, 32), (2, 2)
        visual.conv1 = nn.Conv2d(3, width, 16, stride=16, bias=False)
        for name in ("class_embedding", "positional_embedding", "proj"):
            setattr(visual, name, nn.Parameter(getattr(new, name).detach().clone()))
        visual.ln_pre, visual.ln_post = self.LayerNorm(width), self.LayerNorm(width)
        visual.transformer = self.Transformer()
        visual.transformer.width, visual.transformer.grad_checkpointing = width, False
        visual.transformer.resblocks = nn.ModuleList(
            self.block(width) for _ in new.transformer.resblocks
        )
        visual.load_state_dict(new.state_dict())

        old = self.ImageEncoder()
        old.model = self.CLIP()
        old.model.context_length, old.model.vocab_size = 7, 11
        old.model.visual = visual
        old.model.token_embedding = nn.Embedding(11, 16)
        old.model.positional_embedding = nn.Parameter(torch.zeros(7, 16))
        old.model.ln_final = self.LayerNorm(16)
        old.model.text_projection = nn.Parameter(torch.zeros(16, 16))
        old.model.logit_scale = nn.Parameter(torch.ones([]))
        old.model.register_buffer("attn_mask", torch.zeros(7, 7), persistent=False)
        last = [_convert_to_rgb, T.ToTensor(), T.Normalize(MEAN, STD)]
        bicubic = T.InterpolationMode.BICUBIC
        old.train_preprocess = T.Compose([T.RandomResizedCrop(32, interpolation=bicubic), *last])
        old.val_preprocess = T.Compose([T.Resize(32, bicubic), T.CenterCrop(32), *last])
        old.cache_dir = None
        return old.eval()

    def head(self, weight: torch.Tensor, normalize: bool = True) -> nn.Module:
        head = self.ClassificationHead(weight.shape[1], weight.shape[0])
        head.weight, head.normalize = nn.Parameter(weight), normalize
        return head


def legacy(saved, path):
    torch.save(saved, path, _use_new_zipfile_serialization=False)


WRITERS = {
    "whole module": torch.save,
    "state dict": lambda old, path: torch.save(old.state_dict(), path),
    "state dict of before 1.6": lambda old, path: legacy(old.state_dict(), path),
    "state dict of open_clip's model": lambda old, path: torch.save(old.model.state_dict(), path),
    "safetensors": lambda old, path: save_file(old.state_dict(), path),
}


def write_old(encoder: ImageEncoder, folder: Path, how: str = "whole module") -> Path:
    path = folder / ("finetuned.safetensors" if how == "safetensors" else "finetuned.pt")
    with OldClasses() as old:
        WRITERS[how](old.encoder(encoder), path)
    return path


@pytest.mark.parametrize("how", WRITERS)
def test_every_format_gives_the_same_encoder(how, encoder, images, tmp_path, monkeypatch):
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
    named = {"ViT-T-16": {"embed_dim": 16, "vision_cfg": vision}}
    monkeypatch.setattr("open_clip.get_model_config", named.get)
    path = write_old(encoder, tmp_path, how)
    for model_name in (None, "ViT-T-16"):
        loaded = load_encoder(path, model_name)
        assert torch.equal(loaded(images), encoder(images))
        assert loaded.state_dict().keys() == encoder.state_dict().keys()  # the vision tower alone


def test_reading_draws_no_random_numbers_and_takes_the_allow_list_back(encoder, tmp_path):
    path = write_old(encoder, tmp_path)
    random, allowed = torch.get_rng_state(), set(torch.serialization.get_safe_globals())
    load_encoder(path)
    assert torch.equal(torch.get_rng_state(), random)
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize("normalize", [True, False])
def test_an_old_head_is_read(normalize, tmp_path):
    weight = torch.randn(5, 16)
    with OldClasses() as old:
        module = old.head(weight, normalize)
        torch.save(module, tmp_path / "head.pt")
    head = load_head(tmp_path / "head.pt")
    assert isinstance(head, ClassificationHead) and head.normalize is normalize
    assert torch.equal(head.weight, weight) and torch.equal(head.bias, module.bias)


class Attack:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def in_a_module(attack, path):
    """Among the attributes of a sound module of the paper's."""
    with OldClasses() as old:
        module = old.head(torch.randn(5, 16))
        module.attack = attack
        torch.save(module, path)


def dumped(content, path):
    path.write_bytes(pickle.dumps(content))


ATTACKS = {
    "in the file": (torch.save, "posix.system"),
    "of before 1.6": (legacy, "posix.system"),
    "in a module": (in_a_module, "posix.system"),
    "by pickle.dump": (dumped, ""),
    "builtins": (lambda _, path: torch.save({"weight": eval}, path), "eval"),
    "another class": (lambda _, path: torch.save(Fraction(1, 2), path), "fractions.Fraction"),
}


@pytest.mark.parametrize("how", ATTACKS)
@pytest.mark.parametrize("load", [load_encoder, load_head])
def test_a_file_that_asks_for_more_is_refused_and_runs_nothing(how, load, tmp_path):
    path, trace = tmp_path / "finetuned.pt", tmp_path / "trace"
    write, name = ATTACKS[how]
    write(Attack(trace), path)
    with pytest.raises(ConfigError) as refusal:
        load(path, where="modelpool.models.mnist")
    message = str(refusal.value)
    assert message.startswith(f"modelpool.models.mnist: {path} cannot be read")
    assert "\n" not in message and not trace.exists()
    assert not name or f"asks for {name}, which does not belong in a checkpoint" in message


def test_a_module_by_pickle_dump_is_refused_with_the_way_to_convert_it(encoder, tmp_path):
    path = tmp_path / "finetuned.pt"
    with OldClasses() as old:
        path.write_bytes(pickle.dumps(old.encoder(encoder), protocol=3))
    with pytest.raises(ConfigError, match=r"written by pickle\.dump.*torch\.save\(pickle\.load"):
        load_encoder(path)


def saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.pt", b"PK\x03\x04 and then nothing"),
        ("broken.pt", b"not a pickle"),
        ("broken.pt", b""),
        ("broken.safetensors", b"not safetensors"),
        ("numbers.pt", saved({"a": 1})),
        ("matrix.pt", saved(torch.ones(2, 2))),
        ("whole_numbers.pt", saved({"weight": torch.ones(3, 4, dtype=torch.int64)})),
        ("empty.pt", saved({"model.visual.conv1.weight": torch.ones(0, 3, 8, 8)})),
        ("cut.pt", saved({"weight": torch.ones(30, 40)})[:-700]),
    ],
)
def test_broken_files_give_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    for load in (load_encoder, load_head):
        with pytest.raises(ConfigError, match=name) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["[]", "null", "[" * 3000, '{"width": 64}', '{"layers": 1e308}'])
def test_a_header_that_lies_is_refused(spec, encoder, tmp_path):
    save_file(encoder.state_dict(), tmp_path / "lie.safetensors", {"spec": spec})
    with pytest.raises(ConfigError, match="does not hold a"):
        load_encoder(tmp_path / "lie.safetensors")


def test_another_architecture_than_named_is_refused(encoder, tmp_path):
    path = write_old(encoder, tmp_path, "state dict")
    with pytest.raises(ConfigError, match=r"finetuned\.pt does not hold a ViT-B-32 \(.*lacks"):
        load_encoder(path, "ViT-B-32")


# OpenAI's published vision towers
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("ViT-B-32", 87_849_216), ("ViT-B-16", 86_192_640), ("ViT-L-14", 303_966_208)],
)
def test_named_architectures_are_openais(name, parameters):
    with torch.device("meta"):
        built = ImageEncoder(OpenCLIPTower.from_spec(named_spec(name, "model_name")))
    assert sum(p.numel() for p in built.parameters()) == parameters
    assert type(built.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    spec = as_tower(built).spec()
    fitting = checkpoints.fitting_spec(as_tower(built).weights())
    assert spec == fitting == named_spec(name, "model_name")


def test_unknown_architectures_are_refused():
    for name in ("ViT-X-99", "RN50"):
        with pytest.raises(ConfigError, match=f"model_name: no vision transformer is .*{name}"):
            named_spec(name, "model_name")


def test_a_saved_encoder_knows_its_sizes(tmp_path, images):
    torch.manual_seed(0)
    odd = SPEC | {"heads": 4, "quick_gelu": False, "mean": [0.5] * 3, "std": [0.25] * 3}
    encoder = ImageEncoder(OpenCLIPTower.from_spec(odd))
    save_encoder(encoder, tmp_path / "merged")
    loaded = load_encoder(tmp_path / "merged.safetensors")
    assert torch.equal(loaded(images), encoder(images))
    assert as_tower(loaded).spec() == as_tower(encoder).spec()


# -- the model pool ------------------------------------------------------------------------------


def test_the_pool_loads_whatever_stands_under_a_name(encoder, images, tmp_path, monkeypatch):
    path = str(write_old(encoder, tmp_path))
    monkeypatch.setattr(checkpoints, "named_spec", lambda name, where: SPEC)
    pool = OpenCLIPVisionModelPool(
        {
            "a_path": path,
            "paper": {"model_name": "ViT-T-16", "pickle_path": path},
            "weights": {"model_name": "ViT-T-16", "state_dict_path": path},
            "target": {"_target_": f"{__name__}.make_encoder", "seed": 0},
        }
    )
    for name in [*pool.model_names, path]:
        assert torch.equal(pool.load_model(name)(images), encoder(images))
    live = OpenCLIPVisionModelPool({"_pretrained_": encoder})
    assert live.load_model("_pretrained_") is encoder
    assert live.test_processor is encoder.val_preprocess
    assert live.train_processor is encoder.train_preprocess


def test_missing_files_are_named_with_their_config_key(encoder):
    models = {"svhn": {"model_name": "ViT-B-32", "pickle_path": "gone.pt"}, "a": "gone.pt"}
    pool = OpenCLIPVisionModelPool(models, classification_heads={"svhn": "gone.pt"})
    for load, name, where in (
        (pool.load_model, "svhn", "models.svhn.pickle_path"),
        (pool.load_model, "a", "models.a"),
        (pool.load_classification_head, "svhn", "classification_heads.svhn"),
    ):
        with pytest.raises(ConfigError) as error:
            load(name)
        assert str(error.value).startswith(f"modelpool.{where}: no file gone.pt; ")
        assert "modelpool=openclip-vit-mini_TA8, which needs no download" in str(error.value)
    pool = OpenCLIPVisionModelPool({"svhn": {"model_name": "ViT-B-32", "paht": "x"}})
    with pytest.raises(ConfigError, match=r"modelpool\.models\.svhn: no encoder is described by"):
        pool.load_model("svhn")


def test_fusionbenchs_methods_merge_the_pool(images, tmp_path):
    names = {"_pretrained_": 0, "mnist": 1, "svhn": 2}
    target = f"{__name__}.make_encoder"
    pool = OpenCLIPVisionModelPool(
        {name: {"_target_": target, "seed": seed} for name, seed in names.items()}
    )
    merged = TaskArithmeticAlgorithm(scaling_factor=0.5).run(pool)
    _, one, two = (make_encoder(seed).state_dict() for seed in names.values())
    for name, tensor in merged.state_dict().items():  # half of both task vectors
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)

    torch.testing.assert_close(as_tower(merged).features(images), merged(images))
    pool.save_model(merged, str(tmp_path / "merged.safetensors"))
    later = OpenCLIPVisionModelPool({"_merged_": str(tmp_path / "merged.safetensors")})
    assert torch.equal(later.load_model("_merged_")(images), merged(images))


def test_a_repaired_model_is_saved_as_its_artifact(repaired, tmp_path):
    OpenCLIPVisionModelPool({"a": nn.Identity()}).save_model(repaired, str(tmp_path / "artifact"))
    assert InterventionModel.from_pretrained(tmp_path / "artifact").tasks == repaired.tasks


# -- the task pool -------------------------------------------------------------------------------

TASKS = {"mnist": 3, "svhn": 4}


@pytest.fixture
def repaired() -> InterventionModel:
    model = InterventionModel(
        as_tower(make_encoder()), list(TASKS), {"attention": {"function": "noreft", "rank": 2}}
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.edits.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_dataset(classes: int, count: int = 10) -> list[dict]:
    rng = np.random.default_rng(classes)
    pixels = rng.integers(0, 256, (count, 40, 36, 3), dtype=np.uint8)
    return [{"image": Image.fromarray(p), "label": int(rng.integers(classes))} for p in pixels]


def make_task_pool(kind: type, **changes) -> HostTaskPool:
    torch.manual_seed(7)
    heads = {
        task: ClassificationHead(normalize=True, weights=10 * torch.randn(classes, 16))
        for task, classes in TASKS.items()
    }
    arguments = {
        "test_datasets": {task: make_dataset(classes) for task, classes in TASKS.items()},
        "classification_heads": heads,
        "dataloader_kwargs": {"batch_size": 4},
    }
    return kind(**(arguments | changes))


def accuracy_and_loss(features, task_pool, task):
    """By hand: all of a task's images in one batch, through the head."""
    labels = torch.tensor([item["label"] for item in task_pool._test_datasets[task]])
    logits = task_pool._classifier_heads[task].cpu()(features)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none").split(4)
    loss = sum(batch.mean() for batch in losses) / len(losses)  # FusionBench averages the batches
    return (logits.argmax(-1) == labels).float().mean().item(), loss.item()


@torch.no_grad()
def test_each_task_is_evaluated_with_its_own_edits(repaired):
    pool = make_task_pool(OpenCLIPVisionModelTaskPool)
    pool.names = {id(repaired): "edited"}
    report = pool.evaluate(repaired)
    repaired.cpu()  # the pool has moved it to the GPU, where there is one
    for task in TASKS:
        items = [repaired.val_preprocess(i["image"]) for i in pool._test_datasets[task]]
        edited = repaired.encode(torch.stack(items), task)
        accuracy, loss = accuracy_and_loss(edited, pool, task)
        assert report[task]["accuracy"] == pytest.approx(accuracy)
        assert report[task]["loss"] == pytest.approx(loss, rel=1e-5)
        merged = accuracy_and_loss(repaired.encode(torch.stack(items)), pool, task)
        assert report[task]["loss"] != pytest.approx(merged[1], rel=1e-3)
        assert pool._answers.right("edited", task).mean() == pytest.approx(accuracy)
    assert report["model_info"]["trainable_params"] == repaired.extra_parameters()["total"]


def test_the_stock_task_pool_is_refused_by_a_repaired_model(repaired, encoder):
    pool = make_task_pool(HostTaskPool)
    pool._program = types.SimpleNamespace(modelpool=OpenCLIPVisionModelPool({"a": encoder}))
    with pytest.raises(ValueError, match="no task is named"):
        pool.evaluate(repaired)


def test_a_plain_encoder_is_evaluated_as_in_the_stock_task_pool(encoder):
    stock = make_task_pool(HostTaskPool)
    stock._program = types.SimpleNamespace(modelpool=OpenCLIPVisionModelPool({"a": encoder}))
    assert make_task_pool(OpenCLIPVisionModelTaskPool).evaluate(encoder) == stock.evaluate(encoder)


def test_a_task_without_edits_is_evaluated_as_merged_and_marked(repaired):
    repaired.drop_task("svhn")
    pool = make_task_pool(OpenCLIPVisionModelTaskPool)
    report = pool.evaluate(repaired)
    merged = pool.evaluate(as_tower(make_encoder()).library_model())
    assert report["svhn"] == pytest.approx(merged["svhn"] | {"unseen": True}, rel=1e-5)
    assert "unseen" not in report["mnist"] and report["mnist"] != merged["mnist"]


def test_a_dataset_without_a_head_is_refused(encoder):
    pool = make_task_pool(OpenCLIPVisionModelTaskPool, classification_heads={})
    with pytest.raises(ConfigError, match=r"taskpool\.classification_heads\.mnist: there is a da"):
        pool.evaluate(encoder)


def test_heads_are_read_from_the_papers_files(encoder, tmp_path):
    expected = make_task_pool(OpenCLIPVisionModelTaskPool)
    with OldClasses() as old:
        for task, head in expected._classifier_heads.items():
            module = old.head(head.weight.detach())
            nn.init.zeros_(module.bias)
            torch.save(module, tmp_path / f"head_{task}.pt")
    paths = {task: str(tmp_path / f"head_{task}.pt") for task in TASKS}
    pool = make_task_pool(OpenCLIPVisionModelTaskPool, classification_heads=paths)
    assert pool.evaluate(encoder) == expected.evaluate(encoder)


# -- configs -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="typing has it from Python 3.12 on")
def test_typing_is_left_as_it_was():
    assert not hasattr(typing, "override")


def test_the_configs_extend_fusionbenchs():
    pools = [f"{pool}=openclip-vit-b16_TA8" for pool in ("modelpool", "taskpool")]
    config = compose(*pools, "modelpool.model_dir=/somewhere")
    ours = "fusion_bench_intervmerge.fusion.openclip.OpenCLIPVision"
    assert config.modelpool._target_ == f"{ours}ModelPool"
    assert config.taskpool._target_ == f"{ours}ModelTaskPool"
    assert len(config.modelpool.models) == 9 and len(config.taskpool.test_datasets) == 8
    assert config.taskpool.classification_heads.dtd.startswith("/somewhere/ViT-B-")
    assert config.taskpool.classification_heads == config.modelpool.classification_heads


# -- the embedded pool --------------------------------------------------------------------------


def test_the_embedded_pool_is_the_hugging_face_one_in_openclips_form():
    from fusion_bench.models.hf_clip import HFCLIPClassifier

    from fusion_bench_intervmerge.fusion.embedded import openclip as embedded
    from fusion_bench_intervmerge.fusion.embedded.pool import EmbeddedCLIPVisionModelPool
    from fusion_bench_intervmerge.tinyclip.tasks import TASKS

    theirs, ours = EmbeddedCLIPVisionModelPool(), embedded.EmbeddedOpenCLIPVisionModelPool()
    assert ours.all_model_names == theirs.all_model_names
    assert ours.test_dataset_names == theirs.test_dataset_names
    task = ours.model_names[0]
    pictures = [ours.load_test_dataset(task)[index]["image"] for index in range(16)]
    pixels = theirs.load_processor()(images=pictures, return_tensors="pt")["pixel_values"]
    for name in ("_pretrained_", task):
        encoder = ours.load_model(name)
        prepared = torch.stack([encoder.val_preprocess(picture) for picture in pictures])
        torch.testing.assert_close(prepared, pixels, rtol=0, atol=1e-6)

        classifier = HFCLIPClassifier(embedded.load_clip(), embedded.load_processor())
        info = TASKS[task]
        classifier.set_classification_task(list(info.classnames), info.templates)
        classifier.clip_model.vision_model = theirs.load_model(name)
        with torch.no_grad():
            logits = ours.load_classification_head(task)(encoder(prepared))
            torch.testing.assert_close(logits, classifier(pixels), rtol=1e-4, atol=1e-4)

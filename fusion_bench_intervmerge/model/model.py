"""The merged encoder with its per-task edits."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from ..config import Json, check_task_name
from ..encoders.base import VisionTower, check_fit
from ..interventions.config import InterventionConfig, read_interventions
from ..interventions.edits import Edits, Stacked
from ..interventions.functions import Function
from ..interventions.placement import Placement
from ..interventions.sites import SITES
from . import artifact
from .artifact import Storage, pack, unpack
from .artifact import size as stored_size
from .hub import local_folder, one_line
from .passes import check_reading, encode_routed, route
from .router import Router
from .routes import Route, Told

_ROUTES: Told[Route] = Told("routes")
_LEFT_OUT: Told[tuple[str, int]] = Told("left_out")


class InterventionModel(nn.Module, ModelHubMixin):
    """A frozen merged encoder and, for each task, edits of its representations.

    Without a task it is the merged encoder, bit for bit. The tasks' edits are modules of their own:
    one can be trained, added or dropped without touching another.

    Args:
        tower: the merged encoder; the model takes it over and freezes it.
        tasks: names of the tasks.
        interventions: site -> settings (or a mapping of them).
        seed: the edits of a task start from (seed, task name) alone, whatever tasks stand beside.

    Raises:
        ConfigError: settings that do not fit the encoder, or a bad or repeated task name.
    """

    def __init__(
        self,
        tower: VisionTower,
        tasks: Sequence[str],
        interventions: Mapping[str, InterventionConfig | Mapping[str, object]],
        seed: int = 0,
    ):
        super().__init__()
        self.tower = tower.requires_grad_(False).eval()
        self.interventions = read_interventions(interventions)
        self.seed = seed
        self.placements = {
            site: Placement.fit(
                config,
                width=tower.width if SITES[site].has_tokens else tower.projection_dim,
                num_blocks=tower.num_blocks,
                num_tokens=tower.num_tokens,
                prefix_tokens=tower.prefix_tokens,
                site=SITES[site],
                where=f"interventions.{site}",
            )
            for site, config in self.interventions.items()
        }
        self.edits = nn.ModuleDict()
        self.metadata: Json = {}
        self.router: Router | None = None
        self.storage: Storage = "float32"
        # What the hooks on the tower know their model by: a shallow copy shares it with the tower,
        # a deep copy has its own on both.
        self._key = object()
        for site, placement in self.placements.items():
            for block in placement.blocks:
                hook = partial(_edit, self._key, site, block)
                tower.tap(site, block).register_forward_hook(hook)
        for task in tasks:
            self.add_task(task)

    # -- what a user calls -------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """The tasks that the model has edits for."""
        return list(self.edits)

    def encode(self, images: Tensor, task: str | Sequence[str] | None = None) -> Tensor:
        """Image features of the repaired encoder.

        Args:
            images: (batch, 3, image_size, image_size).
            task: the task of all images, or a list with the task of each image, in one forward
                pass; ``auto``: the router finds the task of each image. ``None`` gives the merged
                encoder's features, and so does ``auto`` for images of no known task.

        Returns:
            (batch, projection_dim), after the visual projection, not normalised.

        Raises:
            ValueError: a task without edits, a list of another length than the batch, or ``auto``
                without a router.
        """
        if task == "auto":
            return encode_routed(self, images)
        with self.for_task(task, len(images)):
            return self.tower.features(images)

    def route(self, images: Tensor) -> list[str | None]:
        """The task of each image, as the router tells it; ``fit_router`` gives a model one.

        Args:
            images: (batch, 3, image_size, image_size).

        Returns:
            A task for each image; None for images of no known task, if the router has a threshold.

        Raises:
            ValueError: the model has no router.
        """
        return route(self, images)

    def add_task(self, task: str) -> None:
        """Give a task edits at their starting values; ``distill`` trains them.

        Sites whose ``init`` is ``regression`` have no edits until ``solve`` finds them. A router
        knows the task after ``fit_router(model, {task: images})``.
        """
        check_task_name(task, self.tasks)
        ranks = {
            site: of if self.interventions[site].init != "regression" else {}
            for site, of in self._same_ranks().items()
        }
        edits = Edits(self.interventions, self.placements, ranks, self.seed, task)
        self.edits[task] = edits.to(self.tower.device)

    def edits_of(self, task: str) -> Edits:
        """A task's edits; ValueError if the model has no such task."""
        self.check_task(task)
        return cast(Edits, self.edits[task])

    def check_task(self, task: str) -> None:
        """Raise ValueError unless the model has edits for the task."""
        if task not in self.edits:
            raise ValueError(f"no edits for task {task!r}; the model has: {', '.join(self.tasks)}")

    def set_rank(self, task: str, site: str, block: int, rank: int) -> Function | None:
        """Replace one edit by a fresh one of another rank, at its published start; 0: no edit."""
        function = self.edits_of(task).set_rank(site, block, rank)
        return None if function is None else function.to(self.tower.device)

    def ranks(self) -> dict[str, dict[str, dict[int, int]]]:
        """Task -> site -> block -> rank of its edit; blocks without an edit are left out."""
        return {
            task: {
                site: {int(block): rank for block, rank in of.items()}
                for site, of in self.edits_of(task).ranks().items()
            }
            for task in self.tasks
        }

    def drop_task(self, task: str) -> None:
        """Remove a task's edits; the other tasks' features stay what they are."""
        self.check_task(task)
        del self.edits[task]
        if self.router is not None:
            self.router.drop(task)

    def fold(self) -> InterventionModel:
        """A copy in the form that needs least at inference; outputs are unchanged.

        R'b becomes one vector, W1 - W2 one matrix (eq 3.4, Table 7).
        """
        folded = copy.deepcopy(self)
        folded.storage = "float32"  # fewer bits of other tensors would be other edits
        for task in folded.tasks:
            edits = folded.edits_of(task)
            for site, block, function in list(edits.places()):
                form = function.folded()
                edits.put(site, block, form)
                config = self.interventions[site].to_dict() | {"function": form.name}
                folded.interventions[site] = InterventionConfig.read(config)
        return folded

    def store_as(self, storage: Storage) -> None:
        """Round the edits to a type that takes fewer bytes, in which they are saved.

        Args:
            storage: ``float32``, ``float16``, or ``int8`` with a scale a row.

        Raises:
            ValueError: a number too large for half precision.
        """
        for task in self.tasks:
            edits = self.edits_of(task)
            edits.load(unpack(pack(edits.tensors(), storage)))
        self.storage = storage

    def extra_parameters(self) -> Json:
        """What inference needs beyond one merged model.

        Returns:
            Of the edits: ``total`` over all tasks as trained, ``per_task``, ``folded``: the total
            after ``fold``, and ``bytes``, as saved. ``router``: how many numbers the router has,
            if there is one.
        """
        edits = {task: self.edits_of(task) for task in self.tasks}
        per_task = {task: _count(of) for task, of in edits.items()}
        counts: Json = {
            "total": sum(per_task.values()),
            "per_task": per_task,
            "folded": sum(_count(f.folded()) for of in edits.values() for _, _, f in of.places()),
            "bytes": sum(stored_size(of.tensors(), self.storage) for of in edits.values()),
        }
        return counts if self.router is None else counts | {"router": self.router.count()}

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | Path,
        *,
        config: object = None,
        model_card_kwargs: Mapping[str, str] | None = None,
    ) -> None:
        """Write the artifact: plain files, safetensors and JSON, whole or not at all.

        Args:
            folder: where to; a saved model there is replaced.
            config: not used; ``huggingface_hub`` gives it.
            model_card_kwargs: ``name``, the model's name on the model card; the folder's name if
                not given.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        artifact.write(self, Path(folder), (model_card_kwargs or {}).get("name"))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, **hub: object
    ) -> InterventionModel:
        """Read an artifact.

        Args:
            folder: a folder, or an id on the hub, ``owner/model``.
            hub: for the hub: ``revision``, ``token``, ``cache_dir``, ``force_download``,
                ``local_files_only``.

        Raises:
            ArtifactError: what does not fit, in one line.
        """
        saved = artifact.read(local_folder(folder, **hub))
        config = saved.config
        with artifact.misfits_in(folder):
            model = cls(saved.tower, [], config.interventions, config.seed)
            for task, tensors in saved.edits.items():
                ranks = model._same_ranks() if config.ranks is None else config.ranks.get(task, {})
                with torch.device("meta"):  # no memory is taken before the sizes are known to fit
                    edits = Edits(model.interventions, model.placements, ranks, model.seed, task)
                check_fit(edits.tensors(), tensors, f"interventions/{task}.safetensors")
                model.edits[task] = edits.to_empty(device=model.device)
                edits.load(tensors)
            if saved.router is not None:
                check_reading(model, saved.router)
        model.metadata, model.router = saved.metadata, saved.router
        model.storage = config.storage
        return model

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Put the artifact on the hub; ``intervmerge push`` adds what other programs need.

        Args:
            repo_id: ``owner/model``; it is created if it does not exist.
            options: as ``huggingface_hub.ModelHubMixin.push_to_hub`` takes them.

        Returns:
            The address of the commit.

        Raises:
            ArtifactError: the hub refuses, or is not reached.
        """
        with one_line(f"{repo_id}: not pushed"):
            card = {"name": repo_id}
            commit: Any = super().push_to_hub(repo_id, model_card_kwargs=card, **options)
            return str(commit.commit_url)

    def to_clip_model(self, task: str, clip: Any = None) -> Any:
        """One task's encoder as an ordinary CLIP; see ``fusion_bench_intervmerge.clip``.

        Args:
            task: whose edits to build in.
            clip: the pretrained CLIP, whose text tower it takes: an id, a folder or a model; by
                default the one in ``metadata``.

        Returns:
            transformers' ``CLIPModel`` for a Hugging Face encoder, ``open_clip``'s for the other.

        Raises:
            ValueError: the model has no such task.
            ConfigError: no CLIP is known, it is not found, or its encoder has another shape.
        """
        from ..deploy.clip import to_clip_model

        return to_clip_model(self, task, clip)

    def unequal_ranks(self) -> dict[str, dict[str, dict[str, int]]] | None:
        """Task -> site -> block -> rank, where they are not all as the settings say; else None."""
        found, same = {t: self.edits_of(t).ranks() for t in self.tasks}, self._same_ranks()
        return None if all(ranks == same for ranks in found.values()) else found

    def _same_ranks(self) -> dict[str, dict[str, int]]:
        """Site -> block -> the rank of its settings."""
        return {
            site: {str(block): config.rank for block in self.placements[site].blocks}
            for site, config in self.interventions.items()
        }

    # -- the task of a forward pass ----------------------------------------------------------------

    def for_task(
        self, task: str | Sequence[str] | None, batch: int | None = None
    ) -> AbstractContextManager[None]:
        """Apply a task's edits in every forward pass inside; ``None``: the merged encoder.

        It holds for the running thread alone.
        """
        route = Route.of(self.apply_edit, task, batch, self.tower.device)
        for name in route.tasks:
            self.check_task(name)
        return _ROUTES.saying(self._key, route)

    def without_edit(self, site: str, block: int) -> AbstractContextManager[None]:
        """Leave one place unedited in every forward pass inside, for all tasks.

        Args:
            site, block: where; block 0 at the site ``output``.
        """
        return _LEFT_OUT.saying(self._key, (site, block))

    @property
    def _route(self) -> Route | None:
        return _ROUTES.get(self._key)

    def apply_edit(self, site: str, block: int, z: Tensor) -> Tensor:
        """A site's tensor, edited for the tasks of the running forward pass; z is left alone."""
        route, place = self._route, (site, block)
        if route is None or not route.tasks or place == _LEFT_OUT.get(self._key):
            return z
        functions = [self.edits_of(task).at(site, block) for task in route.tasks]
        if all(function is None for function in functions):
            return z
        if len(functions) > 1 and place not in route.stacked:
            route.stacked[place] = Stacked(functions, route.ids)
        edit = route.stacked[place] if len(functions) > 1 else functions[0]
        return self.placements[site].apply(z, block, edit)  # type: ignore[arg-type]

    # -- as a module -------------------------------------------------------------------------------

    def forward(self, pixel_values: Tensor, *args: Any, task: Any = None, **kwargs: Any) -> Any:
        """The output of the tower's own forward pass, for a task.

        Args:
            pixel_values: images (batch, 3, image_size, image_size).
            task: as in ``encode``; it may be left out inside ``for_task``.

        Raises:
            ValueError: no task is named, or the edits come after what the tower returns.
        """
        if task is not None:
            with self.for_task(task, len(pixel_values)):
                return self.forward(pixel_values, *args, **kwargs)
        route = self._route
        if route is None:
            raise ValueError(
                "no task is named: use encode(images, task), and in FusionBench one of our task "
                "pools; for_task(None) is the merged encoder"
            )
        if route.tasks and "output" in self.placements and not self.tower.gives_features:
            raise ValueError(
                "edits at the site 'output' come after the visual projection, which this "
                "output comes before; use encode(images, task) for image features"
            )
        return self.tower(pixel_values, *args, **kwargs)

    @property
    def task_is_known(self) -> bool:
        """Whether the running code is inside ``for_task``."""
        return self._route is not None

    @property
    def config(self) -> object:
        """The tower's own configuration."""
        return getattr(self.tower, "config", None)

    @property
    def device(self) -> torch.device:
        return self.tower.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tower.dtype

    @property
    def train_preprocess(self) -> object:
        """The images' preprocessing, of towers that have one (OpenCLIP)."""
        return self.tower.train_preprocess

    @property
    def val_preprocess(self) -> object:
        return self.tower.val_preprocess


def _edit(key: object, site: str, block: int, tap: nn.Module, args: object, z: Tensor) -> Tensor:
    """A forward hook on a tap."""
    route = _ROUTES.get(key)
    return z if route is None else route.apply(site, block, z)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

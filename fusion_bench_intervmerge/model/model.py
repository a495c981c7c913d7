"""The merged encoder with its per-task edits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from ..config import Json, check_task_name
from ..encoders.base import VisionTower, check_fit
from ..interventions.config import InterventionConfig, read_interventions
from ..interventions.edits import Edits, edit_together
from ..interventions.placement import Placement
from .artifact import Artifact, Storage, misfits_in, pack, size, unpack
from .card import model_card
from .hub import hub_errors, local_folder
from .prefix import Prefix, prefix_of
from .router import Router, rows_of

# of all images, or of each; None: the merged encoder
Tasks: TypeAlias = "str | Sequence[str | None] | None"
# what FusionBench asks of a model, and the tower has
_OF_THE_TOWER = ("config", "device", "dtype", "train_preprocess", "val_preprocess")
# A task may be called like a method of torch's modules (``train``), a module in them may not.
_NAME = "task {}"


@dataclass(frozen=True)
class Route:
    """Whose edits a forward pass applies, and to which images.

    Everything in it may be traced: ``torch.compile`` and ``torch.export`` go through ``apply``, and
    ``ids`` may be an input of the graph.

    Attributes:
        edits: one per task that occurs in the batch, None for the merged encoder.
        placements: by site.
        ids: for each image the index of its task's edits, (batch,), whole numbers. None: there is
            one task, or the images come in equal groups, one per task and in their order.
        without: a site and a block that stay unedited.
    """

    edits: Sequence[Edits | None]
    placements: Mapping[str, Placement]
    ids: Tensor | None = None
    without: tuple[str, int] | None = None

    def apply(self, site: str, block: int, z: Tensor) -> Tensor:
        """A site's tensor (batch, tokens, width), edited; z itself is left alone."""
        functions = [None if edits is None else edits.at(site, block) for edits in self.edits]
        if self.without == (site, block) or all(function is None for function in functions):
            return z
        edit = functions[0] if len(functions) == 1 else partial(edit_together, functions, self.ids)
        assert edit is not None
        return self.placements[site].apply(z, block, edit)


# What the running code encodes for, by the edits of its models; threads have their own.
_ROUTES: ContextVar[Mapping[nn.Module, Route]] = ContextVar("routes", default=MappingProxyType({}))


def _edit(
    edits: nn.Module, site: str, block: int, tap: nn.Module, args: object, z: Tensor
) -> Tensor:
    """A forward hook on a tap: apply the route of the model with these edits."""
    route = _ROUTES.get().get(edits)
    return z if route is None else route.apply(site, block, z)


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
        self.placements = tower.placements(self.interventions)
        self.edits = nn.ModuleDict()
        self.metadata: Json = {}
        self.router: Router | None = None
        self.storage: Storage = "float32"
        for site, placement in self.placements.items():
            for block in placement.blocks:
                hook = partial(_edit, self.edits, site, block)
                tower.tap(site, block).register_forward_hook(hook)
        for task in tasks:
            self.add_task(task)

    # -- what a user calls -------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """The tasks that the model has edits for."""
        return [name.removeprefix(_NAME.format("")) for name in self.edits]

    def encode(self, images: Tensor, task: Tasks = None) -> Tensor:
        """Image features of the repaired encoder.

        Args:
            images: (batch, 3, image_size, image_size).
            task: the task of all images, or a list with the task of each image, in one forward
                pass; ``auto``: the router finds the task of each image, None for one of no known
                task. ``None`` gives the merged encoder's features.

        Returns:
            (batch, projection_dim), after the visual projection, not normalised.

        Raises:
            ValueError: a task without edits, a list of another length than the batch, or ``auto``
                without a router.
        """
        if task == "auto":  # what no edit reaches is computed once
            prefix, router = self.prefix(), self._known_router()
            with self.for_task(None):
                start = prefix.of(images)
                tasks = router(self._rows(prefix, images, start))
            with self.for_task(tasks):
                return prefix.features(start)
        with self.for_task(task, len(images)):
            return self.tower.features(images)

    @torch.no_grad()
    def route(self, images: Tensor) -> list[str | None]:
        """The task of each image (batch, 3, image_size, image_size), as the router sees it.

        None is an image of no known task, if the router has a threshold. ``fit_router`` gives a
        model a router; ValueError if it has none.
        """
        return self._known_router()(self.router_rows(images))

    def add_task(self, task: str) -> None:
        """Give a task edits at their starting values; ``distill`` trains them.

        Sites whose ``init`` is ``regression`` have no edits until ``solve`` finds them. A router
        knows the task after ``fit_router(model, {task: images})``.
        """
        check_task_name(task, self.tasks)
        ranks = {
            site: by_block if self.interventions[site].init != "regression" else {}
            for site, by_block in self._equal_ranks().items()
        }
        edits = Edits(self.interventions, self.placements, ranks, self.seed, task)
        self.edits[_NAME.format(task)] = edits.to(self.tower.device)

    def drop_task(self, task: str) -> None:
        """Remove a task's edits; the other tasks' features stay what they are."""
        self.edits_of(task)
        del self.edits[_NAME.format(task)]
        if self.router is not None:
            self.router.drop(task)

    def edits_of(self, task: str) -> Edits:
        """A task's edits; ValueError if the model has no such task."""
        if task not in self.tasks:
            raise ValueError(f"no edits for task {task!r}; the model has: {', '.join(self.tasks)}")
        return cast(Edits, self.edits[_NAME.format(task)])

    def ranks(self) -> dict[str, dict[str, dict[str, int]]]:
        """Task -> site -> block -> rank of its edit; blocks without an edit are left out."""
        return {task: self.edits_of(task).ranks() for task in self.tasks}

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

        ``int8`` has a scale per row. ValueError: a number too large for half precision.
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
        by_task = {task: self.edits_of(task) for task in self.tasks}
        per_task = {task: _count(edits) for task, edits in by_task.items()}
        functions = [f for edits in by_task.values() for _, _, f in edits.places()]
        counts: Json = {
            "total": sum(per_task.values()),
            "per_task": per_task,
            "folded": sum(_count(function.folded()) for function in functions),
            "bytes": sum(size(edits.tensors(), self.storage) for edits in by_task.values()),
        }
        return counts if self.router is None else counts | {"router": self.router.count()}

    # -- as files ----------------------------------------------------------------------------------

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
            model_card_kwargs: ``name``, for the model card; by default the folder's.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        ranks, equal = self.ranks(), self._equal_ranks()
        saved = Artifact(
            tower=self.tower,
            interventions={site: config.to_dict() for site, config in self.interventions.items()},
            seed=self.seed,
            edits={task: self.edits_of(task).tensors() for task in self.tasks},
            ranks=None if all(own == equal for own in ranks.values()) else ranks,
            metadata=self.metadata,
            router=self.router,
            storage=self.storage,
        )
        name = (model_card_kwargs or {}).get("name", Path(folder).name)
        saved.write(Path(folder), model_card(name, saved, self.extra_parameters()))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, **hub: object
    ) -> InterventionModel:
        """Read an artifact from a folder, or by its id on the hub, ``owner/model``.

        ``hub`` may have ``revision``, ``token``, ``cache_dir``, ``force_download`` and
        ``local_files_only``.

        Raises:
            ArtifactError: what does not fit, in one line.
        """
        with misfits_in(folder):
            saved = Artifact.read(local_folder(folder, **hub))
            model = cls(saved.tower, [], saved.interventions, saved.seed)
            model.metadata, model.storage = saved.metadata, saved.storage
            for task, tensors in saved.edits.items():
                ranks = model._equal_ranks() if saved.ranks is None else saved.ranks.get(task, {})
                with torch.device("meta"):  # starting values are not drawn
                    edits = Edits(model.interventions, model.placements, ranks, model.seed, task)
                check_fit(edits.tensors(), tensors, f"interventions/{task}.safetensors")
                model.edits[_NAME.format(task)] = edits.to_empty(device=model.device)
                edits.load(tensors)
            if (router := saved.router) is not None:
                side = model.tower.image_size
                blank = torch.zeros(1, 3, side, side, device=model.device, dtype=model.dtype)
                given, read = model.router_rows(blank).shape[1], len(router.reading.mean)
                if given != read:
                    problem = f"reads {read} numbers per image, the encoder gives {given}"
                    raise ValueError(f"router.safetensors: {problem}")
                model.router = router
        return model

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Put the artifact on the hub as ``owner/model``; the address of the commit.

        Options are those of ``huggingface_hub.ModelHubMixin.push_to_hub``. ``intervmerge push``
        adds what other programs need.

        Raises:
            ArtifactError: the hub refuses, or is not reached.
        """
        with hub_errors(f"{repo_id}: not pushed"):
            card = {"name": repo_id}
            commit: Any = super().push_to_hub(repo_id, model_card_kwargs=card, **options)
            return str(commit.commit_url)

    def _equal_ranks(self) -> dict[str, dict[str, int]]:
        """Site -> block -> the rank that its settings give every block."""
        return {
            site: {str(block): config.rank for block in self.placements[site].blocks}
            for site, config in self.interventions.items()
        }

    # -- the task of a forward pass ----------------------------------------------------------------

    @contextmanager
    def for_task(
        self,
        task: Tasks,
        batch: int | None = None,
        without: tuple[str, int] | None = None,
    ) -> Iterator[None]:
        """Apply a task's edits in every forward pass inside; it holds for the running thread alone.

        Args:
            task: the task of all images, or one task per image; ``None``: the merged encoder.
            batch: the number of images, if it is known.
            without: a site and a block that stay unedited; block 0 at the site ``output``.

        Raises:
            ValueError: a task without edits, or another number of tasks than of images.
        """
        if task is None or isinstance(task, str):
            tasks: list[str | None] = [task]
            ids = None
        else:
            if batch is not None and len(task) != batch:
                raise ValueError(
                    f"{len(task)} tasks are named for {batch} images; expected one task per image"
                )
            tasks = list(dict.fromkeys(task))
            order = {name: index for index, name in enumerate(tasks)}
            ids = torch.tensor([order[name] for name in task])
            groups = torch.arange(len(tasks)).repeat_interleave(len(ids) // max(1, len(tasks)))
            ids = None if torch.equal(ids, groups) else ids.to(self.device)
        with self.for_tasks(tasks, ids, without):
            yield

    @contextmanager
    def for_tasks(
        self,
        tasks: Sequence[str | None],
        ids: Tensor | None,
        without: tuple[str, int] | None = None,
    ) -> Iterator[None]:
        """Apply several tasks' edits in every forward pass inside, as a ``Route`` says.

        ``torch.export.export(strict=False)`` can trace a forward pass in it.

        Args:
            tasks: names of tasks, each once; None for the merged encoder.
            ids: for each image the index of its task in ``tasks``, (batch,), int64, on the model's
                device; None: the images come in equal groups, one per task.
            without: as in ``for_task``.

        Raises:
            ValueError: a task without edits.
        """
        edits = [None if task is None else self.edits_of(task) for task in tasks]
        route = Route(edits, self.placements, ids, without)
        token = _ROUTES.set({**_ROUTES.get(), self.edits: route})
        try:
            yield
        finally:
            _ROUTES.reset(token)

    @property
    def task_is_known(self) -> bool:
        """Whether the running code is inside ``for_task``."""
        return self.edits in _ROUTES.get()

    def prefix(self, *, moving: bool = False, blocks: bool = False) -> Prefix:
        """The part of a forward pass that no edit reaches; arguments as of ``prefix_of``."""
        return prefix_of(self.tower, self.placements, moving=moving, blocks=blocks)

    def router_rows(self, images: Tensor) -> Tensor:
        """What a router reads of images: (batch, dims), float64, on the CPU."""
        prefix = self.prefix()
        with self.for_task(None):
            return self._rows(prefix, images, prefix.of(images))

    def _rows(self, prefix: Prefix, images: Tensor, start: Tensor) -> Tensor:
        tokens = self.tower.num_tokens, self.tower.prefix_tokens
        return torch.cat([rows_of(part, *tokens) for part in prefix.read(images, start)], dim=1)

    def _known_router(self) -> Router:
        if self.router is None or not self.router.tasks:
            raise ValueError(
                "the model has no router that would tell tasks; fit_router(model, images), or "
                "method.router=gaussian before it is saved, gives it one"
            )
        return self.router

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
        route = _ROUTES.get().get(self.edits)
        if route is None:
            raise ValueError(
                "no task is named: use encode(images, task), and in FusionBench one of our task "
                "pools; for_task(None) is the merged encoder"
            )
        edited = any(edits is not None for edits in route.edits)
        if edited and "output" in self.placements and not self.tower.gives_features:
            raise ValueError(
                "edits at the site 'output' come after the visual projection, which this "
                "output comes before; use encode(images, task) for image features"
            )
        return self.tower(pixel_values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_TOWER:
            return getattr(self.tower, name)
        return super().__getattr__(name)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

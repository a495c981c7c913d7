"""The merged encoder with its per-task edits."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from . import artifact
from .encoders import VisionTower
from .encoders.base import check_fit
from .hub.names import local_folder, one_line
from .interventions import (
    Function,
    InterventionConfig,
    Placement,
    build_function,
    read_interventions,
)
from .routing.reading import rows_of
from .task_names import check_task_name

if TYPE_CHECKING:
    from .routing import Router


@dataclass
class _Route:
    """Whose edits the running forward pass applies.

    Attributes:
        model: the model that has them; a shallow copy shares its hooks.
        tasks: the tasks that occur in the batch.
        ids: for each image the index of its task in ``tasks``; None when there is one task, and
            when the tasks follow one another in equal groups of images.
    """

    model: InterventionModel
    tasks: list[str]
    ids: Tensor | None = None
    gathered: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)


# What a forward pass is told beside its images, by ``InterventionModel._hooks``. It belongs to the
# running code and not to the model, so that threads may encode for different tasks at once.
T = TypeVar("T")
_ROUTES: ContextVar[Mapping[object, _Route]] = ContextVar("routes", default=MappingProxyType({}))
_LEFT_OUT: ContextVar[Mapping[object, tuple[str, int]]] = ContextVar(
    "left_out", default=MappingProxyType({})
)


@contextmanager
def _told(variable: ContextVar[Mapping[object, T]], hooks: object, value: T) -> Iterator[None]:
    """One model's entry in a context variable, for the code inside."""
    token = variable.set({**variable.get(), hooks: value})
    try:
        yield
    finally:
        variable.reset(token)


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
        interventions: Mapping[str, InterventionConfig | Mapping[str, Any]],
        seed: int = 0,
    ):
        super().__init__()
        self.tower = tower.requires_grad_(False).eval()
        self.interventions = read_interventions(interventions)
        self.seed = seed
        self.placements = {
            site: Placement.fit(
                config,
                width=tower.projection_dim if site == "output" else tower.width,
                num_blocks=tower.num_blocks,
                num_tokens=tower.num_tokens,
                output=site == "output",
                where=f"interventions.{site}",
            )
            for site, config in self.interventions.items()
        }
        self.edits: Any = nn.ModuleDict()
        self.metadata: dict[str, Any] = {}
        self.router: Router | None = None
        # What the hooks on the tower know their model by: a shallow copy shares it with the tower,
        # a deep copy has its own on both.
        self._hooks = object()
        self._hook_sites()
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
            task: the task of all images, or one task an image, in one forward pass; ``auto`` lets
                the router tell each image's, in the same pass. ``None`` gives the merged encoder's
                features, and so does ``auto`` for images of no known task.

        Returns:
            (batch, projection_dim), after the visual projection, not normalised.

        Raises:
            ValueError: a task the model has no edits for, not one task an image, or ``auto`` and
                there is no router.
        """
        if isinstance(task, str) and task == "auto":
            return self._encode_routed(images)
        with self.for_task(task, len(images)):
            return self.tower.features(images)

    @torch.no_grad()
    def route(self, images: Tensor) -> list[str | None]:
        """The task of each image, as the router tells it; ``fit_router`` gives a model one.

        Args:
            images: (batch, 3, image_size, image_size).

        Returns:
            A name an image; None, where the router has a threshold, for images of no known task.

        Raises:
            ValueError: the model has no router.
        """
        return self._route_prefix(self.prefix(images))

    def _route_prefix(self, prefix: Tensor) -> list[str | None]:
        if self.router is None or not self.router.tasks:
            raise ValueError(
                "the model has no router that would tell tasks; fit_router(model, images), or "
                "method.router=gaussian before it is saved, gives it one"
            )
        return self.router(rows_of(prefix, self.tower.num_tokens))

    def _encode_routed(self, images: Tensor) -> Tensor:
        prefix = self.prefix(images)
        tasks = self._route_prefix(prefix)
        known = torch.tensor([task is not None for task in tasks], device=prefix.device)
        if known.all():
            with self.for_task([task for task in tasks if task is not None], len(images)):
                return self.features_after(prefix)
        with self.for_task(None):
            merged = self.features_after(prefix[~known])
        features = merged.new_empty(len(images), merged.shape[1])
        features[~known] = merged
        if known.any():
            with self.for_task([task for task in tasks if task is not None]):
                features[known] = self.features_after(prefix[known])
        return features

    def add_task(self, task: str) -> None:
        """Give a task edits at their starting values; ``distill`` trains them.

        Where ``init`` is ``regression`` there are none until ``solve`` finds them. A router knows
        the task after ``fit_router(model, {task: images})``.
        """
        check_task_name(task, self.tasks)
        ranks = {
            # What is solved in closed form has no start: it is not there before.
            site: of if self.interventions[site].init != "regression" else {}
            for site, of in self._same_ranks().items()
        }
        self.edits[task] = self._new_edits(task, ranks).to(self.tower.device)

    def _new_edits(self, task: str, ranks: Mapping[str, Mapping[str, int]]) -> nn.ModuleDict:
        """Edits at their starting values: site -> block -> rank; a block left out has none."""
        digest = hashlib.sha256(f"{self.seed} {task}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        sites = nn.ModuleDict()
        for site, config in self.interventions.items():
            init = "reference" if config.init == "regression" else config.init
            of = ranks.get(site, {})
            blocks = [str(b) for b in self.placements[site].blocks if str(b) in of]
            sites[site] = nn.ModuleDict(
                {block: self._build(site, of[block], init, generator) for block in blocks}
            )
        return sites

    def set_rank(self, task: str, site: str, block: int, rank: int) -> Function | None:
        """Replace one edit by a fresh one of another rank; the other edits stay.

        Args:
            task, site, block: which edit.
            rank: 1 to the width of the part, or 0: no edit there.

        Returns:
            The new edit, at its published start; None at rank 0.

        Raises:
            ValueError: a task, site or block that is not edited, or a rank that does not fit.
        """
        self.check_task(task)
        if site not in self.placements or block not in self.placements[site].blocks:
            raise ValueError(f"block {block} is not edited at the site {site!r}")
        blocks = self.edits[task][site]
        if str(block) in blocks:
            del blocks[str(block)]
        if rank == 0:
            return None
        function = self._build(site, rank, "reference", torch.Generator().manual_seed(0))
        blocks[str(block)] = function.to(self.tower.device)
        return function

    def ranks(self) -> dict[str, dict[str, dict[int, int]]]:
        """Task -> site -> block -> rank of its edit; blocks without an edit are left out."""
        return {
            task: {
                site: {int(block): function.rank for block, function in blocks.items()}
                for site, blocks in sites.items()
            }
            for task, sites in self.edits.items()
        }

    def _build(self, site: str, rank: int, init: str, generator: torch.Generator) -> Function:
        config, placement = self.interventions[site], self.placements[site]
        return build_function(
            config.function,
            placement.width,
            rank,
            copies=placement.copies,
            activation=config.activation,
            init=init,
            generator=generator,
            where=f"interventions.{site}",
        )

    def drop_task(self, task: str) -> None:
        """Remove a task's edits; the other tasks' features stay what they are."""
        self.check_task(task)
        del self.edits[task]
        if self.router is not None:
            self.router.drop(task)

    def fold(self) -> InterventionModel:
        """The same model in the form that needs least at inference; outputs are unchanged.

        R'b becomes one vector, W1 - W2 one matrix (eq 3.4, Table 7).
        """
        folded = copy.deepcopy(self)
        for task in folded.tasks:
            for site, blocks in folded.edits[task].items():
                for block, function in blocks.items():
                    blocks[block] = function.folded()
                    config = self.interventions[site].to_dict() | {"function": blocks[block].name}
                    folded.interventions[site] = InterventionConfig.from_mapping(config)
        return folded

    def extra_parameters(self) -> dict[str, Any]:
        """What inference needs beyond one merged model.

        Returns:
            ``total`` over all tasks as trained, ``per_task``, and ``folded``: the total after
            ``fold``. These are the edits'; ``router``: how many numbers the router is, if any.
        """
        per_task = {task: _count(edits) for task, edits in self.edits.items()}
        folded = sum(_count(f.folded()) for f in self._functions())
        counts = {"total": sum(per_task.values()), "per_task": per_task, "folded": folded}
        return counts if self.router is None else counts | {"router": self.router.count()}

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | Path,
        *,
        config: Any = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the artifact: plain files, safetensors and JSON, whole or not at all.

        Args:
            folder: where to; a finished model there is replaced.
            config: given by ``huggingface_hub``, and not used: the artifact has its own.
            model_card_kwargs: ``name``, what the model card calls the model, the folder's name
                where it is not given.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        edits = {task: _tensors(edits) for task, edits in self.edits.items()}
        artifact.write(
            artifact.Artifact(
                self.tower,
                self.interventions,
                self.seed,
                edits,
                self._unequal_ranks(),
                self.extra_parameters(),
                self.metadata,
                self.router,
            ),
            Path(folder),
            (model_card_kwargs or {}).get("name"),
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, **hub: Any
    ) -> InterventionModel:
        """Read an artifact.

        Args:
            folder: where it lies, or its id on the hub, ``owner/model``.
            hub: for the hub: ``revision``, ``token``, ``cache_dir``, ``force_download``,
                ``local_files_only``.

        Raises:
            ArtifactError: what does not fit, in one line.
        """
        saved = artifact.read(local_folder(folder, **hub))
        try:
            model = cls(saved.tower, [], saved.interventions, saved.seed)
            for task, tensors in saved.edits.items():
                ranks = model._same_ranks() if saved.ranks is None else saved.ranks.get(task, {})
                with torch.device("meta"):  # no memory is taken before the sizes are known to fit
                    edits = model._new_edits(task, ranks)
                check_fit(_tensors(edits), tensors, f"interventions/{task}.safetensors")
                model.edits[task] = edits.to_empty(device=model.device)
                _load(model.edits[task], tensors)
            if saved.router is not None:
                _check_reading(model, saved.router)
        except artifact.MISFITS as error:
            raise artifact.misfit(folder, error) from None
        model.metadata, model.router = saved.metadata, saved.router
        return model

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Put the artifact on the hub; ``intervmerge push`` adds what other programs need.

        Args:
            repo_id: ``owner/model``; it is made where it is missing.
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
            clip: the CLIP that the experts started from, whose text tower it takes: an id, a folder
                or a model; by default the one in ``metadata``.

        Returns:
            transformers' ``CLIPModel`` for a Hugging Face encoder, ``open_clip``'s for the other.

        Raises:
            ValueError: the model has no such task.
            ConfigError: no CLIP is known, it is not found, or its encoder has another shape.
        """
        from .clip import to_clip_model

        return to_clip_model(self, task, clip)

    def _unequal_ranks(self) -> dict[str, dict[str, dict[str, int]]] | None:
        """``ranks``, where they are not all as the settings say."""
        found = {
            task: {site: {str(b): r for b, r in of.items()} for site, of in sites.items()}
            for task, sites in self.ranks().items()
        }
        same = self._same_ranks()
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

        It holds for the running thread alone; a thread that is started inside knows no task.
        """
        return _told(_ROUTES, self._hooks, self._make_route(task, batch))

    def without_edit(self, site: str, block: int) -> AbstractContextManager[None]:
        """Leave one edit out in every forward pass inside, for all tasks; the others stay.

        Args:
            site: an edited site.
            block: an edited block there; 0 at the site ``output``.
        """
        return _told(_LEFT_OUT, self._hooks, (site, block))

    @property
    def _route(self) -> _Route | None:
        return _ROUTES.get().get(self._hooks)

    def _make_route(self, task: str | Sequence[str] | None, batch: int | None) -> _Route:
        if task is None:
            return _Route(self, [])
        if isinstance(task, str):
            self.check_task(task)
            return _Route(self, [task])
        if batch is not None and len(task) != batch:
            raise ValueError(
                f"{len(task)} tasks are named for {batch} images; one an image is needed"
            )
        tasks = list(dict.fromkeys(task))
        for name in tasks:
            self.check_task(name)
        if len(tasks) == 1:
            return _Route(self, tasks)
        order = {name: index for index, name in enumerate(tasks)}
        ids = torch.tensor([order[name] for name in task])
        if torch.equal(ids, torch.arange(len(tasks)).repeat_interleave(len(ids) // len(tasks))):
            return _Route(self, tasks)
        return _Route(self, tasks, ids.to(self.tower.device))

    def check_task(self, task: str) -> None:
        if task not in self.edits:
            raise ValueError(f"no edits for task {task!r}; the model has: {', '.join(self.tasks)}")

    # -- edits in the forward pass -----------------------------------------------------------------

    def _hook_sites(self) -> None:
        for site, placement in self.placements.items():
            for block in placement.blocks:
                module = self.tower.site(site, block)
                module.register_forward_hook(partial(_after_site, self._hooks, site, block))

    def apply_edit(self, site: str, block: int, z: Tensor) -> Tensor:
        """Edit a site's tensor in place, for the tasks of the running forward pass."""
        route, placement = self._route, self.placements.get(site)
        if route is None or not route.tasks or placement is None or block not in placement.parts:
            return z
        if (site, block) == _LEFT_OUT.get().get(self._hooks):
            return z
        found = [self.edit_at(task, site, block) for task in route.tasks]
        functions = [function for function in found if function is not None]
        if not functions:
            return z
        if len(found) == 1:
            return placement.apply(z, block, functions[0])
        if (site, block) not in route.gathered:
            route.gathered[site, block] = stacked(found, route.ids)
        tensors = functions[0].prepared(route.gathered[site, block], z.dtype)

        def edit(vectors: Tensor) -> Tensor:
            # one leading entry a set of tensors: an image, or all images of a task
            grouped = vectors if route.ids is not None else vectors.unflatten(0, (len(found), -1))
            if placement.copies is not None:
                grouped = grouped.unsqueeze(-2)
            elif route.ids is None:
                grouped = grouped.flatten(1, 2)
            return functions[0].edit(grouped, **tensors).reshape(vectors.shape)

        if route.ids is None and placement.copies is not None:
            tensors = {name: tensor.unsqueeze(1) for name, tensor in tensors.items()}
        return placement.apply(z, block, edit)

    def edit_at(self, task: str, site: str, block: int) -> Function | None:
        """A task's edit at a place; None where it has none."""
        blocks = self.edits[task][site]
        return blocks[str(block)] if str(block) in blocks else None  # noqa: SIM401 (a ModuleDict)

    def _functions(self) -> Iterator[Function]:
        for edits in self.edits.values():
            for blocks in edits.values():
                yield from blocks.values()

    @property
    def first_block(self) -> int:
        """The first block with an edit; ``num_blocks`` when only the output is edited."""
        edited = [p.blocks[0] for site, p in self.placements.items() if site != "output"]
        return min(edited, default=self.tower.num_blocks)

    def _class_token_alone(self, block: int) -> bool:
        """Whether no edit in a block touches its patch tokens."""
        return all(
            block not in p.blocks or p.class_token_only
            for site, p in self.placements.items()
            if site != "output"
        )

    @torch.no_grad()
    def prefix(self, images: Tensor) -> Tensor:
        """What no edit reaches, the same for every task; ``features_after`` goes on from it.

        Args:
            images: (batch, 3, image_size, image_size).

        Returns:
            Where only the output is edited, the image features. Otherwise the states that enter the
            first edited block, (batch, num_tokens, width); or, where the edits of that block leave
            the patch tokens alone, side by side the class token that enters it, the class token's
            self-attention output there, and the patch tokens that leave it,
            (batch, 1 + num_tokens, width). Nothing reads those of the last block, where the first
            two are all, (batch, 2, width).
        """
        tower, first = self.tower, self.first_block
        with self.for_task(None):
            if first == tower.num_blocks:
                return tower.features_by_class_token(images)
            states = tower.embed(images)
            for block in range(first):
                states = tower.run_block(block, states)
            if not self._class_token_alone(first):
                return states
            if first == tower.num_blocks - 1:
                return torch.cat([states[:, :1], tower.attend(first, states)], dim=1)
            # Caught on its way: ``attend`` would compute all keys and values a second time.
            attended: list[Tensor] = []
            hook = tower.site("attention", first).register_forward_hook(
                lambda module, args, output: attended.append(
                    tower.site_tensor(output)[:, :1].clone()
                )
            )
            try:
                patches = tower.run_block(first, states)[:, 1:]
            finally:
                hook.remove()
            return torch.cat([states[:, :1], attended[0], patches], dim=1)

    def features_after(self, prefix: Tensor) -> Tensor:
        """Image features from a ``prefix``, inside ``for_task``."""
        tower, first = self.tower, self.first_block
        if first == tower.num_blocks:
            return tower.output(prefix.clone())
        if not self._class_token_alone(first):
            return self.features_from(prefix, first)
        state, z, patches = prefix.split([1, 1, prefix.shape[1] - 2], dim=1)
        state = tower.finish(first, state, z.clone(), self.apply_edit)
        return self.features_from(torch.cat([state, patches], dim=1), first + 1)

    def features_from(
        self,
        states: Tensor,
        start: int,
        after_block: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Image features from the states that enter block ``start``, inside ``for_task``.

        Args:
            states: (batch, num_tokens, width).
            start: the first block to run.
            after_block: called with each block's index and output states; then every block works
                on all tokens.
        """
        last = self.tower.num_blocks - 1
        for block in range(start, self.tower.num_blocks):
            if block == last and after_block is None and self._class_token_alone(last):
                states = self.tower.run_block_for_class_token(block, states, self.apply_edit)
            else:
                states = self.tower.run_block(block, states)
            if after_block is not None:
                after_block(block, states)
        return self.tower.readout(states)

    # -- as a module -------------------------------------------------------------------------------

    def forward(self, pixel_values: Tensor, *args: Any, task: Any = None, **kwargs: Any) -> Any:
        """The output of the tower's own forward pass, for a task.

        Args:
            pixel_values: images (batch, 3, image_size, image_size).
            task: as in ``encode``; it may be left out inside ``for_task``.

        Raises:
            ValueError: no task is named, or edits come behind what the tower gives.
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
    def config(self) -> Any:
        """The tower's own configuration."""
        return getattr(self.tower, "config", None)

    @property
    def device(self) -> torch.device:
        return self.tower.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tower.dtype

    @property
    def train_preprocess(self) -> Any:
        """The images' preprocessing, where the tower carries one (OpenCLIP)."""
        return self.tower.train_preprocess

    @property
    def val_preprocess(self) -> Any:
        """The images' preprocessing, where the tower carries one (OpenCLIP)."""
        return self.tower.val_preprocess


def _after_site(
    hooks: object, site: str, block: int, module: nn.Module, args: Any, output: Any
) -> None:
    route = _ROUTES.get().get(hooks)
    if route is not None and route.tasks:
        route.model.apply_edit(site, block, route.model.tower.site_tensor(output))


def _tensors(edits: Any) -> dict[str, Tensor]:
    """The tensors of a task's formulas, named ``<site>.<block>.<tensor>``."""
    return {
        f"{site}.{block}.{name}": tensor
        for site, blocks in edits.items()
        for block, function in blocks.items()
        for name, tensor in function.tensors().items()
    }


def _load(edits: Any, tensors: Mapping[str, Tensor]) -> None:
    """Take over what ``_tensors`` gave."""
    for site, blocks in edits.items():
        for block, function in blocks.items():
            names = function.tensors()
            function.load({name: tensors[f"{site}.{block}.{name}"] for name in names})


def _check_reading(model: InterventionModel, router: Router) -> None:
    """Raise ValueError unless the router reads what this encoder's ``prefix`` gives."""
    tower, first = model.tower, model.first_block
    shape: tuple[int, ...] = (1, tower.projection_dim)
    if first < tower.num_blocks:
        alone = model._class_token_alone(first)
        tokens = 2 if alone and first == tower.num_blocks - 1 else tower.num_tokens + alone
        shape = (1, tokens, tower.width)
    needed = rows_of(torch.empty(shape), tower.num_tokens).shape[1]
    if len(router.reading.mean) != needed:
        raise ValueError(
            f"router.safetensors: reads {len(router.reading.mean)} numbers an image, the encoder "
            f"gives {needed}"
        )


def stacked(functions: Sequence[Function | None], ids: Tensor | None = None) -> dict[str, Tensor]:
    """The functions' tensors side by side: a set a task, or one an image where ``ids`` names it.

    Ranks may differ, and a task may have no edit: rows of zeros take part in no formula.
    """
    by_task = [{} if function is None else function.tensors() for function in functions]
    largest = max((t for t in by_task if t), key=lambda t: sum(x.numel() for x in t.values()))
    stacked = {
        name: torch.stack([_padded(tensors.get(name), tensor) for tensors in by_task])
        for name, tensor in largest.items()
    }
    return stacked if ids is None else {name: tensor[ids] for name, tensor in stacked.items()}


def _padded(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor with zeros behind it in every dimension, up to another's shape."""
    if tensor is None:
        return torch.zeros_like(like)
    if tensor.shape == like.shape:
        return tensor
    missing = [large - own for large, own in zip(like.shape, tensor.shape, strict=True)]
    return F.pad(tensor, [n for count in reversed(missing) for n in (0, count)])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""Adds the config packages of FusionBench's plugins to the search path of ``fusion_bench``.

A distribution becomes a plugin by an entry point of the group ``fusion_bench.plugins`` whose value
is the name of its config package::

    [project.entry-points."fusion_bench.plugins"]
    mine = "my_package_config"

Hydra imports this module at every start of every Hydra application, so it imports nothing else and
acts only where FusionBench is the one that runs.
"""

from __future__ import annotations

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

HOST_CONFIG = "fusion_bench_config"


class FusionBenchPlugins(SearchPathPlugin):
    """Appends every registered config package, and FusionBench's own.

    FusionBench takes a folder ``./config`` of the current directory for its primary config. Where
    one exists (in a plugin's own repository, say) its real configs would be out of reach.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        paths = [element.path or "" for element in search_path.get_path()]
        if "fusion_bench.scripts.cli" not in sys.modules and not any(
            path.rstrip("/").endswith(HOST_CONFIG) for path in paths
        ):
            return
        from importlib.metadata import entry_points

        _store_configs()
        for plugin in entry_points(group="fusion_bench.plugins"):
            search_path.append(provider=plugin.name, path=f"pkg://{plugin.value}")
        search_path.append(provider="fusion_bench", path=f"pkg://{HOST_CONFIG}")


# A method's settings are checked by its class, which says what was meant by a mistyped one. So they
# are open to Hydra: `method.KEY=VALUE` needs no `+` for a key that a preset does not list. What is
# below these keys are other methods' settings, which Hydra checks.
SETTINGS = {"repair": ["base"], "saved": []}


def _store_configs() -> None:
    """Store ``settings/NAME``, last in the defaults of a method's config, and Hydra's callback.

    The settings hold nothing but OmegaConf's flags, which YAML cannot express.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import DictConfig

    store = ConfigStore.instance()
    for name, closed in SETTINGS.items():
        content = {key: DictConfig({}, flags={"struct": True}) for key in closed}
        store.store(group="settings", name=name, node=DictConfig(content, flags={"struct": False}))
    hydra = store.load("hydra/config.yaml")
    target = "hydra_plugins.intervmerge_before_runs.BeforeRuns"
    hydra.node.callbacks["intervmerge"] = {"_target_": target}
    store.store(group="hydra", name="config", node=hydra.node, provider=hydra.provider)

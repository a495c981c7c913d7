"""pyproject.toml has the rest; it cannot say "all packages, and ./config as one more"."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["fusion_bench_intervmerge*"]),
        "fusion_bench_intervmerge_config",
        "hydra_plugins",
    ]
)

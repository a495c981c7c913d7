"""Builds an embedded pool anew from its recipe: ``python -m fusion_bench_intervmerge.tinyclip``."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import shipped
from .build import ensure_pool
from .pools import POOLS, Pool


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fusion_bench_intervmerge.tinyclip", description=main.__doc__
    )
    parser.add_argument("pool", choices=POOLS)
    parser.add_argument("folder", type=Path, help="where the pool's own folder is made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ship", action="store_true", help="make it what the package ships")
    options = parser.parse_args()
    folder = ensure_pool(options.seed, options.pool, options.folder, train=True)
    print(folder)
    if options.ship:
        print(shipped.pack(Pool.named(options.pool, options.seed), folder))


if __name__ == "__main__":
    main()

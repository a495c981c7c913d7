"""A form of edit of your own: one class, and every site, token, part and artifact takes it.

Defines ``scale``, z * (1 + s) with one factor an entry, and repairs a merge with it.

    python examples/own_function.py                    # the embedded pool: no download
    python examples/own_function.py --pool clip-vit-b32_TA8 --steps 1000

On the embedded pool it takes about a minute on one CPU core. To have the form on the command
line as well, put the class into a file of its name beside ``interventions/functions/noreft.py``.
"""

from __future__ import annotations

import argparse
import tempfile

import fusion_bench_config
import torch
from fusion_bench.utils import instantiate
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from fusion_bench.utils.instantiate_utils import set_print_function_call_permeanent
from torch import Tensor, nn

from fusion_bench_intervmerge.fusion.algorithm import IntervMergeAlgorithm
from fusion_bench_intervmerge.interventions.functions import Function
from fusion_bench_intervmerge.model.model import InterventionModel


class Scale(Function):
    """z * (1 + s). s: (k); the rank plays no part."""

    name = "scale"

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        self.s = nn.Parameter(self._uniform(self.width, bound=0.0, generator=generator))

    def edit(self, z: Tensor, s: Tensor) -> Tensor:
        return z * (1 + s.unsqueeze(-2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", default="clip-vit-mini_TA8", help="name of a model pool")
    parser.add_argument("--steps", type=int, default=200, help="of training, a task")
    options = parser.parse_args()

    set_print_function_call_permeanent(False)  # FusionBench would print all it instantiates
    config = initialize_hydra_config(
        "fabric_model_fusion",
        ["method=intervmerge", f"modelpool={options.pool}"],
        fusion_bench_config.__path__[0],
    )
    pool = instantiate(config.modelpool)

    with tempfile.TemporaryDirectory() as folder:
        method = IntervMergeAlgorithm(
            {"attention": {"function": "scale"}},
            base=config.method.base,
            steps=options.steps,
            save_to=folder + "/scaled",
        )
        method.run(pool)
        model = InterventionModel.from_pretrained(folder + "/scaled")
    print(f"read back: {model.interventions['attention'].function}, ", end="")
    print(f"{model.extra_parameters()['total']:,} extra parameters")


if __name__ == "__main__":
    main()

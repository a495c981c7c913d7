#!/usr/bin/env bash
# Ask a question of many runs, and write the report.
#
#     examples/study.sh                                  # which tokens to edit, on the embedded pool
#     examples/study.sh blocks
#     examples/study.sh '[functions,quick]'              # in a minute or two, to see that it runs
#     examples/study.sh ranks clip-vit-b32_TA8 method.steps=1000 hydra/launcher=joblib
#
# The first word is the study (docs/studies.md), the second the pool, the others go to fusion_bench.
# On the embedded pool and two CPU cores a study takes a quarter of an hour to an hour. Stopped, it
# goes on where it was with the same command.
set -euo pipefail
study=${1:-tokens}
pool=${2:-clip-vit-mini_TA8}
name=${study#[}
quick=$([[ $study == *quick* ]] && echo quick/ || true)

fusion_bench "+experiment=$study" modelpool="$pool" taskpool="$pool" "${@:3}"
intervmerge report "outputs/studies/$quick$pool/${name%%,*}"

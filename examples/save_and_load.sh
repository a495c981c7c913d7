#!/usr/bin/env bash
# Train and save a model, then evaluate the saved one without one of its tasks.
#
#     examples/save_and_load.sh                          # the embedded pool
#     examples/save_and_load.sh clip-vit-b32_TA8 mnist method.steps=1000
#
# The words are the pool, the task to drop, and what goes to the training, of 200 steps a task unless
# told otherwise. On the embedded pool that training takes half a minute on one CPU core; starting
# the command twice and evaluating come on top.
set -euo pipefail
pool=${1:-clip-vit-mini_TA8}
dropped=${2:-digits}
run=${RUN:-outputs/save_and_load}
quiet=(print_config=false print_function_call=false)

fusion_bench method=intervmerge modelpool="$pool" "method.save_to='{log_dir}/intervmerge'" \
  method.steps=200 path.log_dir="$run" "${quiet[@]}" "${@:3}"
fusion_bench method=intervmerge/load method.path="$run/intervmerge" method.drop="[$dropped]" \
  method.fold=true modelpool="$pool" taskpool="$pool" "~taskpool.test_datasets.$dropped" \
  path.log_dir="$run/loaded" "${quiet[@]}"

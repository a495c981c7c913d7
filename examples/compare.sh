#!/usr/bin/env bash
# Compare repairs of one merge, and write the report.
#
#     examples/compare.sh                                # the embedded pool, three seeds
#     examples/compare.sh clip-vit-b32_TA8 method.steps=1000
#
# The first word is the pool, the others go to fusion_bench. On the embedded pool it takes
# six minutes on two CPU cores.
set -euo pipefail
pool=${1:-clip-vit-mini_TA8}
run=${RUN:-outputs/compare}

fusion_bench method=intervmerge/compare modelpool="$pool" taskpool="$pool" \
  path.log_dir="$run" print_config=false print_function_call=false "${@:2}"
intervmerge report "$run" --to "$run/report"

#!/usr/bin/env bash
# Train, push to a hub, and classify in a fresh environment without this package and without torch.
#
#     examples/push_and_classify.sh OWNER/MODEL TASK IMAGE...
#
# Pushing needs a token (`hf auth login`, or HF_TOKEN); HF_ENDPOINT names another hub than
# huggingface.co. STEPS is how long to train; on the embedded pool 200 steps take half a minute.
set -euo pipefail
repo=$1 run=${RUN:-outputs/push_and_classify} pool=clip-vit-mini_TA8

fusion_bench method=intervmerge modelpool=$pool taskpool=$pool method.steps="${STEPS:-200}" \
  "method.save_to='{log_dir}/intervmerge'" path.log_dir="$run"
intervmerge push "$run/intervmerge" "$repo" --run "$run"
uv run --no-project --isolated --with transformers,onnxruntime,pillow \
  "$(dirname "$0")/classify.py" "$@"

#!/usr/bin/env bash
# What needs one GPU for 12 minutes at most: cost and memory at ViT-B/32's and L/14's size, random
# weights, fp32 and bf16. Results: OUT/NAME.json, each with the card's name, and OUT/log.txt.
#
#     benchmarks/gpu.sh OUT                          # the package installed; no download
#     SIZES=tiny LIMIT=300 MINUTES=60 benchmarks/gpu.sh OUT   # a trial of all of it on a CPU
#
# What is there is not measured again: a second call goes on. A measurement that fails or takes more
# than LIMIT seconds is named, and the others go on; after MINUTES none is begun.
set -uo pipefail
cd "$(dirname "$0")"
out=$(realpath -m "${1:?where the results go}") sizes=${SIZES:-b32 l14} python=${PYTHON:-python}
limit=${LIMIT:-75} end=$((60 * ${MINUTES:-12} - ${LIMIT:-75}))
mkdir -p "$out"

measure() { # NAME SCRIPT WORD...
  [[ ! -e $out/$1.json && $SECONDS -lt $end ]] || return 0
  echo "== $1" | tee -a "$out/log.txt"
  timeout "$limit" "$python" "$2" "${@:3}" --json "$out/$1.part" >>"$out/log.txt" 2>&1 &&
    mv "$out/$1.part" "$out/$1.json" || echo "   failed: see $out/log.txt"
}

for type in fp32 bf16; do
  bf16=()
  [[ $type == fp32 ]] || bf16=(--bf16)
  for size in $sizes; do
    at=(--size "$size" "${bf16[@]}")
    measure "distillation_${size}_$type" distillation.py "${at[@]}" --steps 4 --turns 2 --memory
    measure "solving_${size}_$type" solving.py "${at[@]}" --turns 2
    measure "calibration_${size}_$type" solving.py "${at[@]}" --turns 2 --calibrate
    measure "serving_${size}_$type" serving.py "${at[@]}"
  done
done
for size in $sizes; do
  measure "compiled_${size}_bf16" distillation.py --size "$size" --bf16 --steps 20 --turns 2 --compile
  measure "budget_${size}_fp32" solving.py --size "$size" --turns 2 --budget 1000000
done
# shellcheck disable=SC2086
measure real_sizes real_sizes.py --sizes $sizes --families huggingface --presets surgery_v2

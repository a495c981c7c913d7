#!/usr/bin/env bash
# What needs one GPU for 12 minutes at most: cost and memory at ViT-B/32's and L/14's size, random
# weights, fp32 and bf16. Results: OUT/NAME.json, each with the card's name, and OUT/log.txt.
#
#     benchmarks/gpu.sh OUT              # the repository's package installed; no download
#     SIZES=tiny benchmarks/gpu.sh OUT   # a trial of all of it on a CPU, minutes
#
# A result that is there is not measured again; a measurement that fails or takes more than LIMIT
# seconds is named, and the others go on.
set -uo pipefail
cd "$(dirname "$0")"
out=$(realpath -m "${1:?where the results go}") sizes=${SIZES:-b32 l14} limit=${LIMIT:-75}
python=${PYTHON:-python}
mkdir -p "$out"

measure() { # NAME SCRIPT WORD...
  [[ -e $out/$1.json ]] && return
  echo "== $1" | tee -a "$out/log.txt"
  timeout "$limit" "$python" "$2" "${@:3}" --json "$out/$1.part" >>"$out/log.txt" 2>&1 &&
    mv "$out/$1.part" "$out/$1.json" || echo "   failed: see $out/log.txt"
}

for size in $sizes; do # what matters most first
  for type in fp32 bf16; do
    bf16=()
    [[ $type == fp32 ]] || bf16=(--bf16)
    at=(--size "$size" "${bf16[@]}")
    measure "distillation_${size}_$type" distillation.py "${at[@]}" --steps 4 --turns 2 --memory
    measure "compiled_${size}_$type" distillation.py "${at[@]}" --steps 4 --turns 2 --compile
    measure "solving_${size}_$type" solving.py "${at[@]}" --turns 2
    measure "budget_${size}_$type" solving.py "${at[@]}" --turns 2 --budget 1000000
    measure "calibration_${size}_$type" solving.py "${at[@]}" --turns 2 --calibration
    measure "serving_${size}_$type" serving.py "${at[@]}"
  done
done
measure real_sizes real_sizes.py --sizes $sizes --families huggingface --presets surgery_v2

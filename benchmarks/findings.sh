#!/usr/bin/env bash
# Runs all studies and comparisons that docs/evidence.md shows of an embedded pool, and puts the
# numbers and pictures into docs/figures.
#
#     benchmarks/findings.sh                         # clip-vit-mini_TA8, into docs/figures/studies
#     benchmarks/findings.sh clip-vit-tiny_TA8 tiny  # into docs/figures/tiny
#
# Some 460 runs of the studies and 200 repairs of the comparisons; on two cores most of a working day.
# Stopped, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
pool=${1:-clip-vit-mini_TA8} to=docs/figures/${2:-studies} out=outputs/findings/${1:-clip-vit-mini_TA8}
pools=(modelpool="$pool" taskpool="$pool")
mkdir -p "$to"

compare() { # NAME METHOD WORD...: a comparison, unless it is there
  local run=$out/$1
  [[ -e $run/program_report.json ]] || fusion_bench method="intervmerge/$2" "${pools[@]}" \
    path.log_dir="$run" print_config=false print_function_call=false "${@:3}"
  intervmerge report "$run" --to "$run/report"
  cp "$run/report/table.csv" "$to/$1.csv"
}

for study in tokens blocks single_blocks parts part_size budgets ranks functions data parameters \
  closed_form steps images; do
  run=outputs/studies/$pool/$study own=()
  if [[ $study == single_blocks && $pool == clip-vit-tiny_TA8 ]]; then # it has six of them
    own=('method.interventions.attention.blocks=[0],[1],[2],[3],[4],[5]')
  fi
  fusion_bench "+experiment=[$study,on_joblib]" "${pools[@]}" "${own[@]}"
  cp "$run/study.csv" "$to/$study.csv"
  cp "$run/study.png" "$to/$study.png"
  [[ ! -e $run/study_2.png ]] || cp "$run/study_2.png" "$to/${study}_by_task.png"
done

compare table1 compare_all
compare five_merges compare_closed_form
compare three_merges_held_out compare_closed_form 'method.data={split: train, images: 128}' \
  '~method.bases.adamerging' '~method.bases.adamerging_task' '~method.coefficients.adamerging' \
  '~method.coefficients.adamerging_task' '~method.methods.all_tokens_r4' \
  '~method.methods.closed_form_refined_rank_4'
compare why compare method.analyses=all 'method.seeds=[0]'
for seed in 1 2; do # an analysis looks at a method's first seed
  compare "why_$seed" compare 'method.analyses=[bias,stitching]' "method.seeds=[$seed]"
done
cp "$out"/why/report/{bias_by_block,stitching,contributions}.png "$to"

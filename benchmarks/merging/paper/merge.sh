#!/usr/bin/env bash
# NOT RUN HERE: see README.md in this folder.
set -euo pipefail
base=meta-llama/Llama-2-13b-hf
declare -A experts=(
  [instruct]=WizardLMTeam/WizardLM-13B-V1.2
  [math]=vanillaOVO/WizardMath-13B-V1.0
  [code]=layoric/llama-2-13b-code-alpaca
)
work=${1:?usage: merge.sh WORK, with WORK/instruct.jsonl, WORK/math.jsonl and WORK/code.jsonl: contrast prompts of each expert}
given=()
for name in "${!experts[@]}"; do
  weightpatch run "$base" "${experts[$name]}" --prompts "$work/$name.jsonl" --units heads,kvs,mlps \
    --dtype bfloat16 --device-map auto --until localize --out "$work/$name-run"
  given+=(--expert "${experts[$name]}=$work/$name-run:0.8")
done
for policy in uniform soft owner anchors streams; do
  weightpatch merge "$base" "${given[@]}" --policy "$policy" --dtype bfloat16 --out "$work/$policy"
  lm_eval --model hf --model_args "pretrained=$work/$policy,dtype=bfloat16" --batch_size auto \
    --tasks ifeval,minerva_math,mmlu --output_path "$work/$policy-lm-eval"
  HF_ALLOW_CODE_EVAL=1 lm_eval --model hf --model_args "pretrained=$work/$policy,dtype=bfloat16" --batch_size auto \
    --tasks humaneval,mbpp --confirm_run_unsafe_code --output_path "$work/$policy-lm-eval-code"
done

#!/usr/bin/env bash
# Every run of the paper by recipe, one after another, with one model.
#   TRAIN=train.jsonl bash every_recipe.sh qwen3_8b_base [more options of OpenRLHF]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=${1:?name an experiment: qwen3_8b_base, qwen3_14b_base or qwen2_5_7b}
shift
# Loss magnitude is left out: at rollout time it is the same for every token of a response.
for recipe in $(python -c 'import tokenweights as tw; print(*(name for name in tw.recipe_names() \
    if tw.recipe(name).signal != "loss_magnitude"))'); do
  bash "$here/paper.sh" "$model" "$recipe" "$@"
done

#!/usr/bin/env bash
# Every run of the paper by recipe, one after another, with one adapter and one model.
#   bash integrations/every_recipe.sh verl qwen3_8b_base [more options of the trainer]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
adapter=${1:?name an adapter: verl or openrlhf}
experiment=${2:?name an experiment: qwen3_8b_base, qwen3_14b_base or qwen2_5_7b}
shift 2
# Loss magnitude is left out: at rollout time it is the same for every token of a response.
for recipe in $(python -c 'import tokenweights as tw; print(*(name for name in tw.recipe_names() \
    if tw.recipe(name).signal != "loss_magnitude"))'); do
  bash "$here/$adapter/examples/paper.sh" "$experiment" "$recipe" "$@"
done

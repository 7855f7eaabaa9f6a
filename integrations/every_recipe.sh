#!/usr/bin/env bash
# Every run of the paper by recipe, one after another, with one adapter and one model.
#   bash integrations/every_recipe.sh verl qwen3_8b_base [more options of the trainer]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
adapter=${1:?name an adapter: verl or openrlhf}
experiment=${2:?name an experiment: qwen3_8b_base, qwen3_14b_base or qwen2_5_7b}
shift 2
case $experiment in
  qwen3_8b_base) layers=36 ;;
  qwen3_14b_base) layers=40 ;;
  *) layers=28 ;;
esac
# Left out are loss magnitude, which at rollout time is the same for every token of a response, and
# layers that the model does not have.
for recipe in $(python -c 'import sys, tokenweights as tw; print(*(name \
    for name in tw.recipe_names(source="paper") if "token_loss" not in tw.recipe(name).columns \
    and max(tw.recipe(name).layers or (0,)) < int(sys.argv[1])))' "$layers"); do
  bash "$here/$adapter/examples/paper.sh" "$experiment" "$recipe" "$@"
done

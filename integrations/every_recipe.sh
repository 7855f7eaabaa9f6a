#!/usr/bin/env bash
# Every run of the paper that an experiment has, by recipe, one after another, with one adapter.
#   bash integrations/every_recipe.sh verl qwen3_8b_base [more options of the trainer]
# With DRY_RUN=1 it prints what it would start, and starts nothing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
adapter=${1:?name an adapter: verl or openrlhf}
experiment=${2:?name an experiment: qwen3_8b_base, qwen3_8b_base_selective, qwen3_14b_base or qwen2_5_7b}
shift 2
# Left out are the controls by loss magnitude (F.3): at rollout time it is the same for every token of
# a response. On Qwen3-8B-Base low2high reads layer 20.
case $experiment in
  *_selective) # 3, G.1 and F
    recipes="full random20 bernoulli20 anchor20 explorer20 anchor20_all_tokens
      explorer20_all_tokens front20 back20 predictive_low20 predictive_high20 type_matched20
      position_matched20"
    ;;
  qwen3_8b_base) # 5 and K
    recipes="full low2high low2high_layer8 low2high_layer31 high2low static_anchor static_explorer
      predictive_high20"
    ;;
  *) recipes="full low2high" ;; # K.4
esac
for recipe in $recipes; do
  bash "$here/$adapter/examples/paper.sh" "$experiment" "$recipe" "$@"
done

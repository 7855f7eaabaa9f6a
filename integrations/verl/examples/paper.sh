#!/usr/bin/env bash
# One experiment of the paper, on a Ray cluster that is up: run it on the head node.
#   bash paper.sh qwen3_8b_base low2high [KEY=VALUE...]
#   bash paper.sh qwen3_8b_base_selective anchor20 [KEY=VALUE...]
# With DRY_RUN=1 it prints what it would start, and starts nothing.
set -euo pipefail
experiment=${1:?name an experiment: qwen3_8b_base, qwen3_8b_base_selective, qwen3_14b_base or qwen2_5_7b}
recipe=${2:?name a recipe, for example low2high}
shift 2
command=(
  python -m tokenweights_verl.train "+experiment=$experiment" "token_weights.recipe=$recipe"
  +ray_kwargs.ray_init.address=auto "$@"
)
if [[ ${DRY_RUN:-} ]]; then printf '%q ' "${command[@]}" && echo && exit; fi
exec "${command[@]}"

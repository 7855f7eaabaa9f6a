#!/usr/bin/env bash
# One experiment of the paper, on a Ray cluster that is up: run it on the head node.
#   bash paper.sh qwen3_8b_base low2high [KEY=VALUE...]
set -euo pipefail
model=${1:?name an experiment: qwen3_8b_base, qwen3_14b_base or qwen2_5_7b}
recipe=${2:?name a recipe, for example low2high}
shift 2
python -m tokenweights_verl.train "+experiment=$model" "token_weights.recipe=$recipe" \
  +ray_kwargs.ray_init.address=auto "$@"

#!/usr/bin/env bash
# The paper's hard masks, one after another: a fifth of the tokens of each response, and controls.
# Settings are those of qwen3_8b_low2high.sh. The paper trains these on 40 % of its data.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
for recipe in full random20 anchor20 explorer20; do
  OUTPUT="${OUTPUT_ROOT:-runs}/qwen3-8b-$recipe" "$here/qwen3_8b_low2high.sh" "$recipe" "$@"
done

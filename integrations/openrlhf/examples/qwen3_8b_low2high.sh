#!/usr/bin/env bash
# Low2High on Qwen3-8B-Base, one node of eight GPUs: the paper's settings with OpenRLHF.
#
#   examples/qwen3_8b_low2high.sh [RECIPE] [more options of OpenRLHF]
#
# TRAIN is a JSONL file with `input`, a question that asks for a boxed answer, and `answer`. The
# paper trains on DeepScaleR and MATH with VeRL on FSDP; here it is OpenRLHF on ZeRO-3.
#
# The paper states: the model, bf16, gradient checkpointing, GRPO advantages, no KL term, no entropy
# bonus, 8 rollouts a prompt, temperature 1, top-p 0.95, layer 20, the reward, all tokens in the
# denominator. Everything marked "ours" it does not print, at least not in the text we had.
# This script has not been run at this size by us.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${TRAIN:?Set TRAIN to a JSONL file with the columns input and answer.}"
: "${OUTPUT:=runs/qwen3-8b-${1:-low2high}}"
recipe=${1:-low2high}
shift || true
mkdir -p "$OUTPUT"

options=(
  # Token weights. temperature 1 and 100 steps of warm-up: ours.
  --tokenweights.recipe "{\"name\": \"$recipe\", \"layers\": [20], \"temperature\": 1.0, \"warmup_steps\": 100}"

  # Model and memory. The engines share the GPUs with the policy: ours.
  --actor.model_name_or_path "${MODEL:-Qwen/Qwen3-8B-Base}"
  --actor.num_nodes 1 --actor.num_gpus_per_node 8
  --actor.gradient_checkpointing_enable
  --ds.zero_stage 3 --ds.param_dtype bf16 --ds.packing_samples --ds.enable_sleep
  --train.colocate_all
  --vllm.num_engines 8 --vllm.tensor_parallel_size 1
  --vllm.gpu_memory_utilization 0.6 --vllm.enable_sleep --vllm.sync_backend nccl

  # Advantages and loss.
  --algo.advantage.estimator group_norm
  --algo.kl.init_coef 0
  --actor.loss_agg_mode token-mean
  --actor.eps_clip_low_high 0.2 0.28 # ours: DAPO's stock values

  # Rollouts. Batch sizes and lengths: ours.
  --rollout.n_samples_per_prompt 8 --rollout.temperature 1.0 --rollout.top_p 0.95
  --rollout.batch_size 128 --train.batch_size 1024
  --train.dynamic_batch_enable --train.max_tokens_per_gpu 16384
  --data.max_len 9216 --rollout.max_new_tokens 8192

  # The reward: 1, -1, or -2 without a box. Buffer and factor of the overlong penalty: ours.
  --reward.remote_url "$here/boxed_reward.py"
  --reward.overlong_buffer_len 2048 --reward.overlong_penalty_factor 1.0

  # Optimizer: ours.
  --actor.adam.lr 1e-6 --actor.lr_scheduler constant_with_warmup --actor.lr_warmup_ratio 0.03

  --data.prompt_dataset "$TRAIN" --data.input_key input --data.label_key answer
  --data.apply_chat_template --train.num_episodes 1 # ours
  --ckpt.output_dir "$OUTPUT/policy" --ckpt.path "$OUTPUT/checkpoints"
  --ckpt.save_steps 50 --ckpt.load_enable # started again, it goes on
  --logger.tensorboard_dir "$OUTPUT/board"
)
case $recipe in
  full | random20 | front20 | back20 | predictive_*) ;; # no attention entropy to record
  *) options+=(--tokenweights.token_records "$OUTPUT/tokens.jsonl") ;;
esac
exec python -m tokenweights_openrlhf.train "${options[@]}" "$@"

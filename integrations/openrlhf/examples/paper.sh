#!/usr/bin/env bash
# One experiment of the paper with OpenRLHF, on a Ray cluster that is up: run it on the head node.
#
#   TRAIN=train.jsonl bash paper.sh qwen3_8b_base low2high [more options of OpenRLHF]
#
# TRAIN is a JSONL file with `input`, a question that asks for a boxed answer, and `answer`, on a
# file system that all nodes see. NODES is the number of nodes of eight GPUs, 4 by default: ours.
#
# The paper trains on DeepScaleR and MATH with VeRL on FSDP; here it is OpenRLHF on ZeRO-3. It
# states: the models, bf16, gradient checkpointing, GRPO advantages, no KL term, no entropy bonus,
# 8 rollouts a prompt, temperature 1, top-p 0.95, the reward, the recipes' denominators. Everything
# marked "ours" it does not print, at least not in the text we had.
# This script has not been run at this size by us.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
experiment=${1:?name an experiment: qwen3_8b_base, qwen3_14b_base or qwen2_5_7b}
recipe=${2:?name a recipe, for example low2high}
shift 2
: "${TRAIN:?Set TRAIN to a JSONL file with the columns input and answer.}"
: "${OUTPUT:=runs/$experiment-$recipe}"
: "${NODES:=4}"
engine_gpus=1 # ours
case $experiment in
  qwen3_8b_base) model=Qwen/Qwen3-8B-Base ;;
  qwen3_14b_base) model=Qwen/Qwen3-14B-Base engine_gpus=2 ;; # ours
  qwen2_5_7b) model=Qwen/Qwen2.5-7B ;;
  *) echo "paper.sh: no experiment named $experiment; try qwen3_8b_base" >&2 && exit 2 ;;
esac

options=(
  # Token weights: temperature 1 and 100 steps of warm-up are the recipe's own, and ours.
  --tokenweights.recipe "$recipe" --tokenweights.metrics_file "$OUTPUT/metrics.jsonl"

  # Model and memory. The engines share the GPUs with the policy: ours.
  --actor.model_name_or_path "${MODEL:-$model}" # MODEL: a copy on disk
  --actor.num_nodes "$NODES" --actor.num_gpus_per_node 8
  --actor.gradient_checkpointing_enable
  --ds.zero_stage 3 --ds.param_dtype bf16 --ds.packing_samples --ds.enable_sleep
  --train.colocate_all
  --vllm.num_engines "$((NODES * 8 / engine_gpus))" --vllm.tensor_parallel_size "$engine_gpus"
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
  *anchor* | *explorer* | *low2high* | *high2low* | *_matched20*) # attention entropy to record
    options+=(--tokenweights.token_records "$OUTPUT/tokens.jsonl")
    ;;
  *sampler_ratio* | *second_moment*) # asks the engines for log-probabilities; a clip to 1 is none
    options+=(
      --algo.advantage.is_correction_level token --algo.advantage.is_correction_mode clip
      --algo.advantage.is_correction_threshold 1 1
    )
    ;;
esac
exec python -m tokenweights_openrlhf.train "${options[@]}" "$@"

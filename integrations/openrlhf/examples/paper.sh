#!/usr/bin/env bash
# One experiment of the paper with OpenRLHF, on a Ray cluster that is up: run it on the head node.
#
#   bash paper.sh qwen3_8b_base low2high [more options of OpenRLHF]
#   bash paper.sh qwen3_8b_base_selective anchor20 [more options of OpenRLHF]
#
# With DRY_RUN=1 it prints what it would start, and starts nothing. Of the environment it takes DATA,
# the folder that integrations/prepare_data.py has written on a file system that all nodes see; MODEL,
# a copy of the model on disk; NODES of eight GPUs; OUTPUT; and PROMPTS, the number of training
# questions, which it counts if it is not given.
#
# Every value says where it is from, as in the VeRL adapter's paper.yaml: "paper", "DAPO" or "ours".
# docs/experiments.md compares each with VeRL's. The paper trains with VeRL on FSDP, here it is
# OpenRLHF on ZeRO-3. This script has not been run at this size by us.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
experiment=${1:?name an experiment: qwen3_8b_base, qwen3_8b_base_selective, qwen3_14b_base or qwen2_5_7b}
recipe=${2:?name a recipe, for example low2high}
shift 2
: "${DATA:=data}" "${OUTPUT:=runs/$experiment-$recipe}"
engine_gpus=1 # ours
case $experiment in
  qwen3_8b_base | qwen3_8b_base_selective) model=Qwen/Qwen3-8B-Base ;; # paper B.2
  qwen3_14b_base) model=Qwen/Qwen3-14B-Base engine_gpus=2 ;; # paper K.4; GPUs: ours
  qwen2_5_7b) model=Qwen/Qwen2.5-7B ;; # paper K.4
  *) echo "paper.sh: no experiment named $experiment; try qwen3_8b_base" >&2 && exit 2 ;;
esac
case $experiment in
  *_selective) folder=$DATA/selective nodes=2 episodes=5 ;; # paper B.1, B.10; ours
  *) folder=$DATA nodes=4 episodes=3 ;; # paper B.3, B.10; ours
esac
: "${NODES:=$nodes}"
train=("$folder/deepscaler.parquet" "$folder/simplerl_qwen.parquet") # paper B.3
benchmarks=$folder/aime_2024.parquet,$folder/olympiadbench.parquet # paper 5 and M
benchmarks+=,$folder/minerva.parquet,$folder/math.parquet
if [[ ! ${PROMPTS:-} ]]; then
  for file in "${train[@]}"; do
    [[ -e $file ]] && continue
    echo "paper.sh: no $file. Run integrations/prepare_data.py, or set PROMPTS." >&2 && exit 2
  done
  PROMPTS=$(python -c 'import sys; from pyarrow.parquet import read_metadata; print(sum( \
    read_metadata(file).num_rows for file in sys.argv[1:]))' "${train[@]}")
fi

options=(
  # Token weights: temperature 1 and 100 steps of warm-up are the recipe's own, and ours.
  --tokenweights.recipe "$recipe"
  --tokenweights.metrics_file "$OUTPUT/metrics.jsonl" # ours

  # Data.
  --data.prompt_dataset "$(IFS=, && echo "${train[*]}")"
  --data.input_key prompt # paper B.3
  --data.label_key answer --data.apply_chat_template # ours
  --data.max_len 22528 # DAPO: 2048 for the prompt, 20480 for the response
  --train.seed 42      # ours

  # Rollouts.
  --rollout.batch_size 512          # DAPO
  --rollout.n_samples_per_prompt 8  # paper, table 8
  --rollout.temperature 1.0         # paper, table 8
  --rollout.top_p 0.95              # paper, table 8
  --rollout.max_new_tokens 20480    # DAPO

  # The reward: 1, -1, or -2 without a box.
  --reward.remote_url "$here/boxed_reward.py" # paper B.4
  --reward.overlong_buffer_len 4096           # DAPO
  --reward.overlong_penalty_factor 1.0        # DAPO

  # Advantages and loss.
  --algo.advantage.estimator group_norm # paper B.5
  --algo.kl.init_coef 0                 # paper B.5
  --actor.loss_agg_mode token-mean      # DAPO
  --actor.eps_clip_low_high 0.2 0.28    # DAPO
  --actor.dual_clip 10.0                # DAPO

  # Updates: 16 for each rollout batch, of 32 prompts and 8 responses.
  --train.batch_size 256                     # DAPO
  --train.max_epochs 1                       # DAPO
  --train.num_episodes "$episodes"
  --actor.adam.lr 1e-6                       # DAPO
  --actor.adam.betas 0.9 0.999               # DAPO
  --actor.adam.weight_decay 0.1              # DAPO
  --actor.max_norm 1.0                       # DAPO
  --actor.lr_scheduler constant_with_warmup  # DAPO
  # 10 rollout batches of warm-up, as a share of all: DAPO.
  --actor.lr_warmup_ratio "$(awk "BEGIN { print 10 * 512 / ($PROMPTS * $episodes) }")"

  # Evaluation.
  --eval.dataset "$benchmarks"
  --eval.steps 20               # ours
  --eval.n_samples_per_prompt 8 # paper, table 8
  --eval.temperature 1.0        # paper, table 8

  # Model and memory. The engines share the GPUs with the policy: ours.
  --actor.model_name_or_path "${MODEL:-$model}"
  --actor.num_nodes "$NODES" --actor.num_gpus_per_node 8 # paper B.10
  --actor.gradient_checkpointing_enable                  # paper B.2
  --ds.param_dtype bf16                                  # paper B.2
  --ds.packing_samples                                   # paper B.2
  --ds.zero_stage 3 --ds.enable_sleep --train.colocate_all
  # One response at a time, in random order: dynamic batches would sort a rollout batch by length, and
  # its first updates would see its longest and shortest responses only.
  --train.micro_batch_size 1 --rollout.micro_batch_size 1
  --vllm.num_engines "$((NODES * 8 / engine_gpus))" --vllm.tensor_parallel_size "$engine_gpus"
  --vllm.gpu_memory_utilization 0.6 --vllm.enable_sleep --vllm.sync_backend nccl

  # Checkpoints and log: ours. Started again, it goes on.
  --ckpt.output_dir "$OUTPUT/policy" --ckpt.path "$OUTPUT/checkpoints"
  --ckpt.save_steps 50 --ckpt.max_num 2 --ckpt.load_enable
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
command=(python -m tokenweights_openrlhf.train "${options[@]}" "$@")
if [[ ${DRY_RUN:-} ]]; then printf '%q ' "${command[@]}" && echo && exit; fi
exec "${command[@]}"

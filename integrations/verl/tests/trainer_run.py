"""VeRL's real `main_ppo` on the embedded policy, on CPUs.

Usage: python trainer_run.py FOLDER STEPS RANKS [OVERRIDE...]
"""

import json
import string
import sys
from pathlib import Path

import pandas
from tokenweights_lab import load_policy, load_tokenizer, problems

PROMPTS, SAMPLES = 8, 8
FLOAT32 = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"


def prepare(folder: Path):
    """The embedded policy with the tokens VeRL asks a Qwen tokenizer for, and the task."""
    model = folder / "model"
    if not model.exists():
        load_policy().save_pretrained(model)
        tokenizer = load_tokenizer()
        # Asked for, also in messages that only their difference is taken of; never used.
        tokenizer.add_tokens(["<|im_end|>", *(set(string.printable) - {*tokenizer.get_vocab()})])
        tokenizer.save_pretrained(model)
        for split, count in (("train", 2000), ("easy", 8)):
            rows = [
                {
                    "data_source": "running_total",
                    "prompt": [{"role": "user", "content": problem.prompt}],
                    "reward_model": {"style": "rule", "ground_truth": problem.answer},
                    "extra_info": {"index": index},
                }
                for index, problem in enumerate(problems(split, count, seed=0))
                if len(problem.terms) <= 7
            ]
            pandas.DataFrame(rows).to_parquet(folder / f"{split}.parquet")


def overrides(folder: Path, steps: int, ranks: int):
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    single = {
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "easy.parquet",
        "data.train_batch_size": PROMPTS,
        "data.max_prompt_length": 64,
        "data.max_response_length": 46,
        "data.dataloader_num_workers": 0,
        "data.shuffle": False,
        "actor_rollout_ref.model.path": folder / "model",
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        f"{actor}.strategy": "fsdp2",
        f"{actor}.optim.lr": 2e-4,
        f"{actor}.optim.lr_warmup_steps": 0,
        f"{actor}.ppo_mini_batch_size": PROMPTS,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": 4096,
        f"{actor}.use_torch_compile": False,
        f"{actor}.clip_ratio_low": 0.2,
        f"{actor}.clip_ratio_high": 0.28,
        f"{actor}.fsdp_config.use_torch_compile": False,
        f"+{actor}.fsdp_config.mixed_precision": FLOAT32,
        f"{rollout}.name": "transformers",
        f"{rollout}.n": SAMPLES,
        f"{rollout}.top_p": 0.95,
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.free_cache_engine": False,
        f"{rollout}.calculate_log_probs": False,
        f"{rollout}.max_num_seqs": 1_000_000,  # all are answered at once, see cpu_rollout.py
        f"{rollout}.log_prob_use_dynamic_bsz": True,
        f"{rollout}.log_prob_max_token_len_per_gpu": 4096,
        f"{rollout}.agent.num_workers": 1,
        "algorithm.adv_estimator": "grpo",
        "reward.custom_reward_function.path": "pkg://tokenweights_verl.reward",
        "reward.custom_reward_function.name": "boxed_match",
        "reward.num_workers": 1,
        "trainer.device": "cpu",
        "trainer.n_gpus_per_node": ranks,
        "trainer.nnodes": 1,
        "trainer.total_training_steps": steps,
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.logger": "[file]",
        "trainer.project_name": "cpu",
        "trainer.experiment_name": "run",
        "trainer.default_local_dir": folder / "checkpoints",
        "trainer.resume_mode": "auto",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "ray_kwargs.ray_init.num_cpus": 16,
        "+ray_kwargs.ray_init.num_gpus": ranks,
        "+ray_kwargs.ray_init.include_dashboard": False,
        "+ray_kwargs.ray_init.object_store_memory": 200_000_000,
        "hydra.run.dir": folder / "hydra",
    }
    return [f"{key}={value}" for key, value in single.items()]


def main(folder, steps, ranks, *more):
    prepare(Path(folder))
    from tokenweights_verl import train

    sys.argv = ["train", *overrides(Path(folder), int(steps), int(ranks)), *more]
    train.main()
    print(json.dumps({"done": True}))


if __name__ == "__main__":
    main(*sys.argv[1:])

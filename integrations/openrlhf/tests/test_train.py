"""The command of the adapter, from the command line to the saved policy."""

import json
import os
import subprocess
import sys

import cpu_process
import pytest
import tiny
from tokenweights_lab import policy_path, problems

RUN = """
import sys
import cpu_run
cpu_run.main(sys.argv[1:])
"""


def command_line(folder, *options, steps, recipe="low2high", prompts=8, samples=8):
    rows = [{"input": p.prompt, "label": p.answer} for p in problems("train", prompts * steps)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        *("--tokenweights.recipe", recipe),
        *("--actor.model_name_or_path", str(policy_path()), "--actor.num_gpus_per_node", "1"),
        *("--data.prompt_dataset", str(folder / "prompts.jsonl"), "--data.label_key", "label"),
        *("--reward.remote_url", str(tiny.HERE.parent / "examples" / "boxed_reward.py")),
        *("--vllm.num_engines", "1", "--data.max_len", "160", "--rollout.max_new_tokens", "81"),
        *("--rollout.batch_size", str(prompts), "--rollout.n_samples_per_prompt", str(samples)),
        *("--train.batch_size", str(prompts * samples), "--train.micro_batch_size", "16"),
        *("--rollout.micro_batch_size", "16", "--rollout.top_p", "0.95"),
        *("--algo.advantage.estimator", "group_norm", "--algo.kl.init_coef", "0"),
        *("--actor.adam.lr", "2e-4", "--actor.lr_scheduler", "constant_with_warmup"),
        *("--actor.eps_clip_low_high", "0.2", "0.28", "--ds.attn_implementation", "sdpa"),
        *("--ckpt.output_dir", str(folder / "policy"), "--ckpt.path", str(folder / "checkpoints")),
        *("--logger.tensorboard_dir", str(folder / "board"), *options),
    ]


def run(folder, options, *, expect=0):
    """Runs the command in a process with a Ray of its own; returns what was logged, by name."""
    environment = os.environ | cpu_process.ENVIRONMENT
    environment["PYTHONPATH"] = os.pathsep.join(tiny.PYTHONPATH)
    result = subprocess.run(
        [sys.executable, "-c", RUN, *options],
        env=environment,
        timeout=400,
        capture_output=True,
        text=True,
    )
    assert result.returncode == expect, (result.stdout + result.stderr)[-6000:]
    return result


def logged(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in sorted((folder / "board").rglob("events.*")):
        events = EventAccumulator(str(path.parent))
        events.Reload()
        for name in events.Tags()["scalars"]:
            values = {event.step: event.value for event in events.Scalars(name)}
            found.setdefault(name.removeprefix("train/"), {}).update(values)
    return found


def test_low2high_raises_the_reward(tmp_path):
    options = command_line(tmp_path, "--tokenweights.token_records", str(tmp_path / "t"), steps=12)
    run(tmp_path, options)
    metrics = logged(tmp_path)
    rewards = list(metrics["rollout/reward_mean"].values())
    print(rewards)
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3
    high = metrics["token_weights/endpoint_high"]
    assert [high[step] for step in range(1, 13)] == pytest.approx([s / 100 for s in range(12)])
    assert (tmp_path / "policy" / "config.json").exists()

"""The command of the adapter, from the command line to the saved policy."""

import json
import os
import subprocess

import cpu_process
import pytest
import tiny
from cpu_run import IMPORTS
from tokenweights.report import run_from_directory
from tokenweights.report.records import read_metrics, read_token_records
from tokenweights_lab import policy_path, problems
from tokenweights_lab.forking import python_with

# Each command has a Ray of its own: several at once are too much for two cores.
pytestmark = pytest.mark.xdist_group("commands")


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
    python = python_with(*IMPORTS)
    result = subprocess.run(
        [python, str(tiny.HERE / "cpu_run.py"), python, *options],
        env=environment,
        timeout=400,
        capture_output=True,
        text=True,
    )
    if result.returncode != expect:
        pytest.fail((result.stdout + result.stderr)[-6000:], pytrace=False)
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


def test_low2high_raises_the_reward_and_a_stopped_run_goes_on(tmp_path):
    records, probed = tmp_path / "run" / "tokens.jsonl", tmp_path / "run" / "gradient.jsonl"
    options = (
        *("--ckpt.save_steps", "12", "--ckpt.load_enable"),
        *("--tokenweights.token_records", str(records), "--tokenweights.token_records_steps", "5"),
        *("--tokenweights.gradient_probe_steps", "10"),
        *("--tokenweights.gradient_probe_file", str(probed)),
        *("--tokenweights.metrics_file", str(records.with_name("metrics.jsonl"))),
    )
    run(tmp_path, command_line(tmp_path, *options, steps=12))
    metrics = logged(tmp_path)
    rewards = list(metrics["rollout/reward_mean"].values())
    assert len(rewards) == 12
    start = sum(rewards[:3]) / 3
    assert sum(rewards[-3:]) / 3 > start + 0.3
    high = metrics["token_weights/endpoint_high"]
    assert high == pytest.approx({step: (step - 1) / 100 for step in range(1, 13)})
    assert (tmp_path / "policy" / "config.json").exists()
    assert [made.step for made in read_token_records(records)] == [0] * 8 + [5] * 8 + [10] * 8
    steps = [line["step"] for line in read_metrics(records.with_name("metrics.jsonl"))]
    assert steps == list(range(1, 13))
    made = run_from_directory(records.parent)
    assert made.title == "low2high on prompts.jsonl" and made.settings["openrlhf"]
    lines = read_metrics(probed)
    assert [line["step"] for line in lines] == [1, 11]
    for line in lines:
        assert metrics["gradient/anchor_cosine"][line["step"]] == pytest.approx(
            line["gradient/anchor_cosine"], rel=1e-6
        )

    run(tmp_path, command_line(tmp_path, *options, steps=14))
    metrics = logged(tmp_path)
    high = metrics["token_weights/endpoint_high"]
    assert high == pytest.approx({step: (step - 1) / 100 for step in range(1, 15)})
    assert metrics["rollout/reward_mean"][13] > start + 0.3


@pytest.mark.versions
def test_the_asynchronous_ppo_trainer_weights_too(tmp_path):
    options = command_line(
        tmp_path,
        *("--train.async_enable", "--algo.advantage.estimator", "gae"),
        *("--critic.num_gpus_per_node", "1"),
        *("--rollout.micro_batch_size", "4", "--train.micro_batch_size", "4"),
        *("--tokenweights.gradient_probe_steps", "1"),
        steps=2,
        prompts=2,
        samples=4,
    )
    run(tmp_path, options)
    metrics = logged(tmp_path)
    assert metrics["token_weights/endpoint_high"] == pytest.approx({1: 0, 2: 0.01})
    assert all(0 < value < 1 for value in metrics["token_weights/weight_mean"].values())
    assert "critic_loss" in metrics
    assert all(value > 0 for value in metrics["gradient/full_norm"].values())
    assert sorted(metrics["gradient/full_norm"]) == [1, 2]

"""VeRL's real `main_ppo` with Ray, on the embedded policy: learning, records, resume, two ranks."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import tokenweights as tw
import torch
from cpu_platform import ENVIRONMENT, IMPORTS
from tokenweights.report import run_from_directory
from tokenweights.report.records import read_metrics, read_token_records
from tokenweights_lab import load_policy, load_tokenizer
from tokenweights_lab.forking import python_with

HERE = Path(__file__).parent
RECIPE = "token_weights.recipe={name: low2high, warmup_steps: 8}"
STEPS, STOP = 10, 6


def run(folder, steps, ranks, *more, recipe=RECIPE, modules="cpu_platform", timeout=1500):
    """The logged metrics of each step of a run in a process group and a Ray of its own."""
    ray = tempfile.mkdtemp(prefix="ray")  # short: Ray puts sockets below it
    python = python_with(*IMPORTS)
    forked = f"+ray_kwargs.ray_init.runtime_env.py_executable={python}"
    process = subprocess.Popen(
        [python, HERE / "trainer_run.py", folder, str(steps), str(ranks), recipe, forked, *more],
        env={
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join([str(folder), ENVIRONMENT["PYTHONPATH"]]),
            "VERL_USE_EXTERNAL_MODULES": modules,
            "RAY_TMPDIR": ray,
            "RAY_prestart_worker_first_driver": "0",
            "RAY_enable_worker_prestart": "0",
            "VERL_FILE_LOGGER_PATH": str(folder / f"metrics{steps}.jsonl"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=folder,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        shutil.rmtree(ray, ignore_errors=True)
    assert process.returncode == 0, output[-8000:]
    lines = (folder / f"metrics{steps}.jsonl").read_text().splitlines()
    return {line["step"]: line["data"] for line in map(json.loads, lines)}


@cache
def trained(ranks, folder, steps):
    """The metrics of each step, or the failure: a run that failed is not repeated."""
    written = (
        f"token_weights.token_records={folder / 'tokens.jsonl'}",
        f"token_weights.gradient_probe_file={folder / 'gradient.jsonl'}",
        "token_weights.gradient_probe_steps=8",
        "token_weights.metrics_file=run/metrics.jsonl",  # in the folder where the command runs
    )
    try:
        return run(
            folder, steps, ranks, *written, f"trainer.save_freq={STOP if steps == STOP else -1}"
        )
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return error


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}

    def of(ranks, steps=STEPS):
        # One rank ends early, and a second process goes on from the checkpoint.
        parts = [STOP, steps] if ranks == 1 and steps > STOP else [steps]
        metrics = {}
        for part in parts:
            found = trained(ranks, folders[ranks], part)
            if isinstance(found, Exception):
                pytest.fail(str(found))
            metrics |= found
        return folders[ranks], metrics

    return of


@pytest.mark.versions
def test_the_first_steps(runs):
    _, metrics = runs(1, STOP)
    assert sorted(metrics) == list(range(1, STOP + 1))
    for step, values in metrics.items():
        assert values["token_weights/endpoint_high"] == pytest.approx((step - 1) / 8)
        assert 0 < values["token_weights/weight_mean"] < 1
        # Once every response is right there is nothing to learn.
        assert (values["actor/grad_norm"] > 0) == (values["critic/advantages/max"] > 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_reward_goes_up(runs, ranks):
    _, metrics = runs(ranks)
    assert sorted(metrics) == list(range(1, STEPS + 1))
    rewards = [metrics[step]["critic/score/mean"] for step in sorted(metrics)]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4, rewards


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_metrics_file_has_every_step_also_over_a_resume(runs, ranks):
    folder, metrics = runs(ranks)
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        logged = metrics[line["step"]]
        for name in ("critic/score/mean", "token_weights/weight_mean", "actor/grad_norm"):
            assert line[name] == pytest.approx(logged[name])


def test_the_run_says_what_it_is(runs):
    folder, _ = runs(1)
    made = run_from_directory(folder / "run")
    assert made.title == "low2high on train.parquet"
    assert made.settings["model"] == str(folder / "model") and made.settings["verl"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_schedule_follows_the_steps_also_over_a_resume(runs, ranks):
    _, metrics = runs(ranks)
    for step, values in metrics.items():
        endpoints = tw.low_to_high(warmup_steps=8)(step - 1)
        assert values["token_weights/endpoint_low"] == pytest.approx(endpoints.low)
        assert values["token_weights/endpoint_high"] == pytest.approx(endpoints.high)


@pytest.mark.parametrize("ranks", [1, 2])
def test_records_hold_the_policys_own_entropies(runs, ranks):
    folder, _ = runs(ranks)
    records = [record for record in read_token_records(folder / "tokens.jsonl") if not record.step]
    assert records
    model, tokenizer = load_policy(attn_implementation="eager"), load_tokenizer()
    for record in records:
        prompt = tokenizer(record.prompt).input_ids
        ids = torch.tensor([[*prompt, *record.token_ids]])
        with torch.no_grad():
            output = model(ids, output_attentions=True)
        mean = output.attentions[record.layer][0].double().mean(0)
        visible = torch.arange(1, len(mean) + 1).double()
        entropy = -torch.special.xlogy(mean, mean).sum(-1) / visible.log().clamp(min=1e-300)
        found = torch.tensor(record.attention_entropy).double()
        # The row that decides a token is the one to its left.
        torch.testing.assert_close(found, entropy[len(prompt) - 1 : -1], atol=1e-5, rtol=0)
        log_probs = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        log_probs = log_probs.gather(1, torch.tensor(record.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(record.log_probs), log_probs, atol=1e-4, rtol=0)
        # At the first step weights fall with the entropy, from 1 to 0, by Eq. 26 and 27.
        order = found.argsort()
        weights = torch.tensor(record.weights)[order]
        assert (weights.diff() <= 1e-6).all() and 0 <= weights.min() and weights.max() <= 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_are_probed_every_few_steps(runs, ranks):
    folder, metrics = runs(ranks)
    series = read_metrics(folder / "gradient.jsonl")
    assert [line["step"] for line in series] == [1, 9]
    for line in series:
        assert sum(line[f"gradient/decile_{n}"] for n in range(10)) == pytest.approx(1, abs=1e-3)
        logged = metrics[line["step"]]
        assert {name: logged[name] for name in line if name != "step"}.items() <= line.items()
    assert not any("gradient/full_norm" in metrics[step] for step in (*range(2, 9), 10))

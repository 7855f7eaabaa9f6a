"""The asynchronous command: agents of several turns, responses that newer weights go on with."""

import json

import agent
import pytest
import recording
import reference
import test_train
import tokenweights as tw
import torch
from tokenweights_lab import policy_path

STEPS = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder, log and rollout batches of an asynchronous run, with a policy saved at every step."""
    folder = tmp_path_factory.mktemp("agent")
    rule = {"kind": "recording:Recorded", "folder": str(folder)}
    options = (
        *("--train.async_enable", "--train.partial_rollout_enable"),
        *("--algo.advantage.estimator", "gae", "--critic.num_gpus_per_node", "1"),
        *("--train.agent_func_path", agent.__file__),
        *("--algo.advantage.is_correction_level", "token"),
        *("--algo.advantage.is_correction_mode", "clip"),
        *("--algo.advantage.is_correction_threshold", "1", "1"),
        *("--ckpt.save_steps", "1", "--ckpt.save_hf", "--ckpt.disable_ds"),
        *("--rollout.micro_batch_size", "4", "--train.micro_batch_size", "4"),
        *("--train.batch_size", str(agent.PROMPTS * agent.SAMPLES)),
        *("--actor.lr_scheduler", "constant", "--actor.lr_warmup_ratio", "0"),
        *("--rollout.top_p", "1", "--tokenweights.gradient_probe_steps", "1"),
    )
    line = test_train.command_line(
        folder,
        *options,
        steps=STEPS,
        recipe=json.dumps({"signal": "attention_entropy", "rule": rule}),
        prompts=agent.PROMPTS,
        samples=agent.SAMPLES,
    )
    test_train.run(folder, line)
    files = [torch.load(folder / recording.FILE.format(step)) for step in range(STEPS)]
    return folder, test_train.logged(folder), files


def read(folder, step, rows):
    """Each row's columns from plain transformers in float64; every prompt begins with an `a`."""
    path = policy_path() if step == 0 else folder / "checkpoints" / f"global_step{step}_hf"
    responses = []
    for tokens, mask in zip(rows["token_ids"], rows["mask"], strict=True):
        ids, places = [2, *tokens.tolist()], (mask.nonzero().flatten() + 1).tolist()
        last = places[-1] + 1  # what comes later, padding among it, has no bearing
        ranges = [(place, place + 1) for place in places]
        responses.append({"observation_tokens": ids[:last], "action_ranges": ranges})
    return reference.read(path, responses, layer=2)[1]


def test_turns_are_there(trained):
    _, _, batches = trained
    for rows in batches:
        several = 0
        assert len(rows["mask"]) == agent.PROMPTS * agent.SAMPLES
        for mask in rows["mask"]:
            own = mask.nonzero().flatten()
            assert not mask[own[-1] + 1 :].any() and len(mask) > own[-1]
            several += int(own[-1] - own[0] + 1 > len(own))
        assert several


@pytest.mark.parametrize("step", range(STEPS))
def test_what_the_environment_wrote_weighs_nothing_and_weights_are_recomputed(trained, step):
    folder, metrics, batches = trained
    rows = batches[step]
    assert (rows["weights"][~rows["mask"]] == 0).all()
    with torch.no_grad():
        found = read(folder, step, rows)
    for name, column in (("log_probs", "log_probs"), ("predictive", "predictive_entropy")):
        for mask, row, wanted in zip(rows["mask"], rows[column], found, strict=True):
            assert row[mask].tolist() == pytest.approx([*map(float, wanted[name])], abs=2e-4)
    endpoints = tw.low_to_high(warmup_steps=100)(step)
    weights = reference.soft_weights(
        [row["attention"] for row in found], low=endpoints.low, high=endpoints.high
    )
    for mask, row, wanted in zip(rows["mask"], rows["weights"], weights, strict=True):
        assert row[mask].tolist() == pytest.approx(wanted, abs=1e-4)
    mean = float(rows["weights"][rows["mask"]].mean())
    assert metrics["token_weights/weight_mean"][step + 1] == pytest.approx(mean, rel=1e-5)


def test_newer_weights_go_on_where_a_response_was_cut(trained):
    _, _, (first, second) = trained
    apart = (first["sampler_log_probs"] - first["log_probs"]).abs()
    assert apart[first["mask"]].max() < 1e-3
    for mask, sampler, own in zip(
        second["mask"], second["sampler_log_probs"], second["log_probs"], strict=True
    ):
        apart = (sampler - own)[mask].abs()
        assert apart[agent.CUT + 1 :].max() < 1e-3
    apart = (second["sampler_log_probs"] - second["log_probs"]).abs()[second["mask"]]
    assert apart.max() > 1e-2


def test_policy_and_critic_train_and_are_probed(trained):
    _, metrics, _ = trained
    assert sorted(metrics["critic_loss"]) == [1, 2]
    assert sorted(metrics["gradient/full_norm"]) == [1, 2]
    assert all(value > 0 for value in metrics["gradient/full_norm"].values())

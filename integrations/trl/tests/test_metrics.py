"""Metrics, token records and denominators are what the weights of the rollout batch say."""

import copy
import math
from functools import partial

import pytest
import tiny
import torch
from datasets import Dataset
from ranks import repeatable
from tokenweights.report.records import read_token_records

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer
from tokenweights_trl.trainer import SOURCES

ENTROPY = {"entropy_mean", "entropy_std"}
SCORED = {"weight_mean", "effective_sample_size", "anchor_share", "explorer_share"} | {
    f"{group}{name}" for group in ("", "anchor_", "explorer_") for name in ENTROPY
}


class Recorder(TokenWeightsGRPOTrainer):
    def _weighted(self, output, columns):
        self.plain = output
        self.rollout_policy = copy.deepcopy(self.model.state_dict())
        self.weighted = super()._weighted(output, columns)
        return self.weighted

    def _batch(self, output, columns):
        batch = super()._batch(output, columns)
        self.scores = self.recipe.scores(batch)
        return batch


def trained(folder, **changes):
    trainer = tiny.trainer(Recorder, TokenWeightsGRPOConfig, folder, **changes)
    trainer.train()
    return trainer


def logged(trainer) -> list[dict[str, float]]:
    return [
        {
            name.removeprefix("token_weights/"): float(value)
            for name, value in entry.items()
            if name.startswith("token_weights/")
        }
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def test_metrics_describe_the_weights(tmp_path):
    trainer = trained(tmp_path, recipe={"name": "low2high", "warmup_steps": 4}, max_steps=2)
    first, last = logged(trainer)
    assert first.keys() == last.keys() == SCORED | {"endpoint_low", "endpoint_high"}
    assert (last["endpoint_low"], last["endpoint_high"]) == (0.75, 0.25)
    # The group's advantages are never 0 here, so the weights can be read back from the products.
    mask = trainer.plain["completion_mask"].bool()
    weights = trainer.weighted["advantages"] / trainer.plain["advantages"][:, None]
    weights = weights.double().where(mask, 0.0)
    anchors, explorers = [], []
    for row, length in enumerate(mask.sum(1).tolist()):
        order = trainer.scores[row, :length].sort(stable=True).indices.tolist()
        count = math.ceil(length / 5)
        anchors += [weights[row, token].item() for token in order[:count]]
        explorers += [weights[row, token].item() for token in order[-count:]]
    total = weights.sum().item()
    expected = {
        "weight_mean": total / mask.sum().item(),
        "effective_sample_size": total**2 / weights.square().sum().item() / mask.sum().item(),
        "anchor_share": sum(anchors) / total,
        "explorer_share": sum(explorers) / total,
        "entropy_mean": trainer.scores[mask].double().mean().item(),
        "entropy_std": trainer.scores[mask].double().std(correction=0).item(),
    }
    assert {name: last[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_anchor20_puts_all_weight_on_anchors(tmp_path):
    trainer = trained(tmp_path, recipe="anchor20")
    for metrics in logged(trainer):
        assert metrics["anchor_share"] == 1.0
        assert 0.0 <= metrics["explorer_share"] < 1.0  # not 0: a short response's tokens are both
        assert "endpoint_low" not in metrics


def test_a_batch_without_tokens_logs_no_metrics_and_moves_nothing(tmp_path):
    """No response ends within the limit, so all are masked."""
    trainer = trained(
        tmp_path,
        recipe="low2high",
        mask_truncated_completions=True,
        generation_kwargs={"suppress_tokens": [1]},
        max_completion_length=4,
    )
    assert all(metrics == {} for metrics in logged(trainer))
    assert (trainer.weighted["advantages"] == 0).all()
    before = torch.cat([p.flatten() for p in tiny.policy().parameters()])
    assert torch.equal(torch.cat([p.flatten() for p in trainer.model.parameters()]), before)


def test_bnpo_divides_by_the_selected_tokens_of_the_micro_batch(tmp_path):
    class Losses(TokenWeightsGRPOTrainer):
        homogeneous_loss = True
        seen = ()

        def _compute_loss(self, model, inputs):
            before = {name: value.clone() for name, value in inputs.items()}
            loss = super()._compute_loss(model, inputs)
            assert all(torch.equal(inputs[name], value) for name, value in before.items())
            self.seen += ((before, loss.item()),)
            return loss

    trainer = tiny.trainer(
        Losses,
        TokenWeightsGRPOConfig,
        tmp_path,
        recipe="anchor20",
        loss_type="bnpo",
        num_iterations=2,
        max_steps=2,
    )
    trainer.train()
    assert len(trainer.seen) == 4
    for inputs, loss in trainer.seen[:2]:  # before the first update the ratio is 1
        weights = inputs["token_weights"]
        expected = -inputs["advantages"].sum() / weights.sum() / 2
        assert weights.sum() < inputs["completion_mask"].sum()
        assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("accumulation", "steps_per_generation"), [(1, 1), (2, 1), (3, 2), (5, 2), (2, 4), (4, 2)]
)
def test_no_two_responses_of_a_run_share_a_sample_id(tmp_path, accumulation, steps_per_generation):
    """Four optimizer steps, several epochs: an epoch may end with a short accumulation window."""

    class Numbered(TokenWeightsGRPOTrainer):
        seen = ()

        def _sample_ids(self, rows, device):
            ids = super()._sample_ids(rows, device)
            self.seen += ((self.state.global_step, ids.tolist()),)
            return ids

    trainer = tiny.trainer(
        Numbered,
        TokenWeightsGRPOConfig,
        tmp_path,
        recipe="random20",
        gradient_accumulation_steps=accumulation,
        steps_per_generation=steps_per_generation,
        max_completion_length=2,
        max_steps=4,
        num_train_epochs=9,
    )
    trainer.train()
    ids = [number for _, rows in trainer.seen for number in rows]
    assert len(trainer.seen) >= 4 * accumulation // steps_per_generation - 4
    assert len(ids) == 4 * steps_per_generation * len(trainer.seen) == len(set(ids))
    if accumulation > steps_per_generation:
        steps = [step for step, _ in trainer.seen]
        assert len(set(steps)) < len(steps)  # the case is hard enough


def test_a_failed_rollout_leaves_nothing_behind(tmp_path):
    """The trainer is as before it: the next rollout and its scores are right."""
    trainer = tiny.trainer(Recorder, TokenWeightsGRPOConfig, tmp_path, recipe="low2high")
    trainer.model.train()
    inputs = [{"prompt": prompt} for prompt in tiny.PROMPTS]

    def broken(**_):
        raise RuntimeError("no reward")

    (reward,), trainer.reward_funcs = trainer.reward_funcs, [broken]
    before = vars(trainer).keys(), trainer.score_source, trainer._rollout
    with pytest.raises(RuntimeError, match="no reward"):
        trainer._generate_and_score_completions(inputs)
    assert (vars(trainer).keys(), trainer.score_source, trainer._rollout) == before
    trainer.reward_funcs = [reward]
    trainer._generate_and_score_completions(inputs)
    assert trainer.score_source == "generation"
    assert trainer.scores.shape == trainer.plain["completion_ids"].shape


def test_random_subsets_change_from_rollout_to_rollout(tmp_path):
    class Subsets(TokenWeightsGRPOTrainer):
        seen = ()

        def _weighted(self, output, columns):
            weighted = super()._weighted(output, columns)
            self.seen += ((weighted["advantages"] != 0)[:, :5],)
            return weighted

    trainer = tiny.trainer(
        Subsets, TokenWeightsGRPOConfig, tmp_path, recipe="random20", steps_per_generation=1
    )
    trainer.train()
    assert trainer.score_source == "none"
    assert len(trainer.seen) == 4  # two rollouts in each of two optimizer steps
    places = {tuple(map(tuple, subset.tolist())) for subset in trainer.seen}
    assert len(places) == 4


def test_token_records_hold_what_decided_the_weights(tmp_path):
    path = tmp_path / "tokens.jsonl"
    trainer = trained(
        tmp_path,
        recipe="low2high",
        token_records=str(path),
        token_records_steps=2,
        max_steps=3,
    )
    records = list(read_token_records(path))
    assert [record.step for record in records] == [0] * 4 + [2] * 4
    last = records[-4:]
    policy = tiny.policy()
    policy.load_state_dict(trainer.rollout_policy)
    for row, record in enumerate(last):
        length = int(trainer.plain["completion_mask"][row].sum())
        ids = trainer.plain["completion_ids"][row, :length].tolist()
        assert record.token_ids == tuple(ids)
        assert record.prompt in tiny.PROMPTS
        assert "".join(record.tokens[:-1]) in trainer.processing_class.decode(ids)
        assert record.attention_entropy == tuple(trainer.scores[row, :length].tolist())
        real = torch.cat([trainer.plain[f"{part}_mask"][row] for part in ("prompt", "completion")])
        whole = [trainer.plain[f"{part}_ids"][row] for part in ("prompt", "completion")]
        with torch.no_grad():
            logits = policy(torch.cat(whole)[real.bool()][None]).logits[0]
        logits = logits[-1 - length : -1].log_softmax(-1)
        entropy = -(logits.exp() * logits).sum(-1)
        log_probs = logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(record.predictive_entropy), entropy)
        torch.testing.assert_close(torch.tensor(record.log_probs), log_probs)
        order = trainer.scores[row, :length].sort(stable=True).indices.tolist()
        count = math.ceil(length / 5)
        labels = ["middle"] * length
        for token in order[-count:]:
            labels[token] = "explorer"
        for token in order[:count]:
            labels[token] = "anchor"
        assert record.group == tuple(labels)
        product = torch.tensor(record.weights) * torch.tensor(record.advantages)
        torch.testing.assert_close(product, trainer.weighted["advantages"][row, :length])
        assert (record.layer, record.alignment) == (2, "deciding")
    assert len({record.sample_id for record in records}) == len(records)


def scaled(completion_ids, factor=3.0, **_):
    return [factor * reward for reward in tiny.reward(completion_ids)]


@pytest.mark.parametrize(
    ("functions", "factor"),
    [
        ([tiny.reward, scaled], 1 + 0.5 * 3),
        # TRL keeps rewards by the function's name, those of the last one where names repeat.
        ([partial(scaled, factor=1.0), partial(scaled, factor=5.0)], None),
    ],
    ids=["names of their own", "one name"],
)
def test_records_have_the_rewards_of_all_functions_or_none(tmp_path, functions, factor):
    path = tmp_path / "tokens.jsonl"
    settings = {"recipe": "low2high", "token_records": str(path), "reward_weights": [1.0, 0.5]}
    trainer = TokenWeightsGRPOTrainer(
        tiny.policy(),
        functions,
        tiny.arguments(TokenWeightsGRPOConfig, tmp_path, max_steps=1, **settings),
        Dataset.from_dict({"prompt": tiny.PROMPTS}),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    records = list(read_token_records(path))
    expected = tiny.reward([list(record.token_ids) for record in records])
    if factor is None:
        assert [record.reward for record in records] == [None] * len(expected)
    else:
        expected = [factor * reward for reward in expected]
        assert [record.reward for record in records] == pytest.approx(expected)


def test_the_source_is_logged_once(tmp_path, caplog):
    with caplog.at_level("INFO", logger="tokenweights_trl"):
        trained(tmp_path, recipe="low2high", max_steps=2)
        trained(tmp_path, recipe={"name": "low2high", "alignment": "own"}, max_steps=2)
    lines = [r for r in caplog.records if r.name.startswith("tokenweights_trl")]
    assert [line.levelname for line in lines] == ["INFO", "WARNING"]
    assert SOURCES["generation"] in lines[0].message
    assert SOURCES["scoring_pass"] in lines[1].message


def test_evaluation_is_plain_and_changes_nothing(tmp_path):
    parameters = []
    for evaluated in ({}, {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2}):
        arguments = tiny.arguments(
            TokenWeightsGRPOConfig, tmp_path, recipe="low2high", **repeatable(4), **evaluated
        )
        prompts = Dataset.from_dict({"prompt": tiny.PROMPTS})
        trainer = TokenWeightsGRPOTrainer(
            tiny.policy(),
            tiny.reward,
            arguments,
            prompts,
            prompts.select(range(4)) if evaluated else None,
            processing_class=tiny.tokenizer(),
        )
        trainer.train()
        evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(evaluations) == (2 if evaluated else 0)
        assert not any("token_weights" in name for entry in evaluations for name in entry)
        weights = [e for e in trainer.state.log_history if "token_weights/weight_mean" in e]
        assert len(weights) == 2
        parameters.append([p.detach().clone() for p in trainer.model.parameters()])
    for without, with_evaluation in zip(*parameters, strict=True):
        assert torch.equal(without, with_evaluation)

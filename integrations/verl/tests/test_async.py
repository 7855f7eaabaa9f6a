"""The asynchronous trainers, with a tool in the middle of responses: every weight recomputed."""

from functools import cache
from pathlib import Path

import pytest
import tokenweights as tw
import torch
from omegaconf import OmegaConf
from test_trainer import run
from tokenweights.report.records import read_metrics
from tokenweights_lab import load_policy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

TOOL = Path(__file__).with_name("tool.py")
PROMPTS, SAMPLES, STEPS = 2, 4, 2
ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
# Reads all that a pass gives; and one whose denominator counts tokens, as no tool's may be.
SIGNALS = "{kind: mean_of, signals: [attention_entropy, predictive_entropy, surprisal]}"
RECIPES = {
    "colocate_async": f"{{rule: {{kind: damped}}, signal: {SIGNALS}}}",
    "separate_async": "{name: anchor20}",
}
SHARED = (
    f"{ACTOR}.ppo_mini_batch_size={PROMPTS}",
    f"{ACTOR}.checkpoint.save_contents=[model,hf_model]",
    f"{ROLLOUT}.n={SAMPLES}",
    f"{ROLLOUT}.max_num_seqs={PROMPTS * SAMPLES}",  # see cpu_rollout.py
    f"{ROLLOUT}.agent.default_agent_loop=tool_agent",
    f"{ROLLOUT}.multi_turn.enable=true",
    f"{ROLLOUT}.multi_turn.format=even",
    f"{ROLLOUT}.multi_turn.max_assistant_turns=2",
    f"{ROLLOUT}.multi_turn.function_tool_path={TOOL}",
    "data.max_response_length=120",
    f"reward.custom_reward_function.path={TOOL}",
    "reward.custom_reward_function.name=remainder",
    "token_weights.gradient_probe_steps=1",
    "token_weights.gradient_probe_file=gradient.jsonl",
    "trainer.save_freq=1",
)
OWN = {
    "colocate_async": (
        f"data.train_batch_size={PROMPTS}",
        "trainer.test_freq=1",
        "trainer.val_before_train=true",
        f"{ROLLOUT}.val_kwargs.temperature=0",
        f"{ACTOR}.fsdp_config.param_offload=true",
        f"{ACTOR}.fsdp_config.optimizer_offload=true",
    ),
    "separate_async": (
        f"data.train_batch_size={2 * PROMPTS}",
        "trainer.v1.separate_async.parameter_sync_step=2",
        f"{ROLLOUT}.checkpoint_engine.backend=gloo",
        f"{ROLLOUT}.nnodes=1",
        f"{ROLLOUT}.n_gpus_per_node=1",
        "++ray_kwargs.ray_init.num_gpus=2",
        "actor_rollout_ref.model.use_fused_kernels=true",
        "actor_rollout_ref.model.fused_kernel_options.impl_backend=torch",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function from a mode to the folder of its run, the metrics and the rollout batches."""

    @cache
    def found(mode):
        folder = tmp_path_factory.mktemp(mode)
        settings = [f"trainer.v1.trainer_mode=recording_{mode}", *SHARED, *OWN[mode]]
        recipe = f"token_weights.recipe={RECIPES[mode]}"
        try:
            metrics = run(
                folder, STEPS, 1, *settings, recipe=recipe, modules="cpu_platform,recording"
            )
        except AssertionError as error:
            return error  # a run that failed is not repeated
        updates = range(2 if mode == "separate_async" else 1)
        files = {
            (step, update): torch.load(folder / f"rollout{step}_{update}.pt", weights_only=False)
            for step in range(1, STEPS + 1)
            for update in updates
        }
        return folder, metrics, files

    def of(mode):
        result = found(mode)
        if isinstance(result, AssertionError):
            pytest.fail(str(result))
        return result

    return of


def policy(folder, step):
    """The policy that begins a step, with eager attention, in float64."""
    if step == 1:
        return load_policy(attn_implementation="eager").double()
    path = folder / "checkpoints" / f"global_step_{step - 1}" / "actor" / "huggingface"
    return AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float64
    )


def recomputed(model, rows):
    """A rollout batch from eager attention, full logits and the rewards of each group."""
    names = ("log_probs", "predictive_entropy", "attention", "advantages")
    columns = {name: [] for name in names}
    groups = [key.split("_")[0] for key in rows["keys"]]
    rewards = torch.stack([row.sum() for row in rows["rm_scores"]]).double()
    for place, (prompt, response) in enumerate(
        zip(rows["prompts"], rows["responses"], strict=True)
    ):
        first = len(prompt) - 1
        with torch.no_grad():
            output = model(torch.cat([prompt, response])[None], output_attentions=True)
        log_probs = output.logits[0, first:-1].log_softmax(-1)
        columns["log_probs"].append(log_probs.gather(-1, response[:, None])[:, 0])
        columns["predictive_entropy"].append(-(log_probs.exp() * log_probs).sum(-1))
        layers = []
        for attention in output.attentions:
            mean = attention[0].mean(0)[first:-1]
            visible = torch.arange(first, first + len(mean)).double() + 1
            layers.append(-torch.special.xlogy(mean, mean).sum(-1) / visible.log())
        columns["attention"].append(torch.stack(layers, 1))
        own = rewards[[group == groups[place] for group in groups]]
        advantage = (rewards[place] - own.mean()) / (own.std() + 1e-6)
        columns["advantages"].append(advantage.expand(len(response)))
    padded = {name: pad_sequence(values, batch_first=True) for name, values in columns.items()}
    attention = dict(enumerate(padded.pop("attention").unbind(-1)))
    ids, masks = (
        pad_sequence(rows[name], batch_first=True) for name in ("responses", "response_mask")
    )
    return tw.RolloutBatch(
        mask=masks.bool(),
        sample_ids=torch.arange(len(ids)),
        prompt_ids=torch.tensor([groups.index(group) for group in groups]),
        token_ids=ids,
        attention=attention,
        **padded,
    )


@pytest.mark.parametrize("mode", RECIPES)
def test_what_a_tool_wrote_weighs_nothing(runs, mode):
    _, _, batches = runs(mode)
    called = 0
    for rows in batches.values():
        for mask, product in zip(rows["response_mask"], rows["advantages"], strict=True):
            inside = mask == 0
            assert (product[inside] == 0).all() and mask[0] == mask[-1] == 1
            called += bool(inside.any())
    assert 0 < called < sum(len(rows["keys"]) for rows in batches.values())


@pytest.mark.parametrize("mode", RECIPES)
def test_products_are_those_of_eager_attention_and_the_policy_that_begins_a_step(runs, mode):
    """Also in later updates of a step, for which VeRL brings that policy back."""
    folder, metrics, batches = runs(mode)
    recipe = tw.recipe(OmegaConf.to_container(OmegaConf.create(RECIPES[mode]))).placed(4)
    means = {step: [] for step in range(1, STEPS + 1)}
    for (step, _), rows in batches.items():
        batch = recomputed(policy(folder, step), rows)
        rollout = recipe.weighted(batch, step=step - 1)
        means[step].append(float(rollout.weights[batch.mask].mean()))
        products = batch.advantages * rollout.weights * rollout.scale
        assert (products != 0).any()
        for field, expected in (
            ("old_log_probs", batch.log_probs),
            ("entropy", batch.predictive_entropy),
            ("advantages", products),
        ):
            for place, found in enumerate(rows[field]):
                own = batch.mask[place, : len(found)]
                torch.testing.assert_close(
                    found[own].double(), expected[place, : len(found)][own], atol=2e-4, rtol=2e-3
                )
    for step, found in means.items():
        logged = metrics[step]["token_weights/weight_mean"]
        assert logged == pytest.approx(sum(found) / len(found), rel=1e-3)


def test_what_was_cut_short_goes_on_with_newer_weights(runs):
    _, metrics, batches = runs("colocate_async")
    spans = [(tag["min_global_steps"], tag["max_global_steps"]) for tag in batches[2, 0]["tags"]]
    assert (0, 1) in spans
    assert metrics[2]["training/off_policy/trajectory_spans/max"] == 2


def test_validation_during_training(runs):
    """It rolls out, too, and what it finds is no part of a rollout batch."""
    _, metrics, batches = runs("colocate_async")
    assert sorted(metrics) == list(range(STEPS + 1))
    for logged in metrics.values():
        assert "val-core/running_total/acc/mean@1" in logged
    for rows in batches.values():
        assert len(rows["keys"]) == PROMPTS * SAMPLES


@pytest.mark.parametrize("mode", RECIPES)
def test_the_policy_trains_and_is_probed(runs, mode):
    folder, metrics, _ = runs(mode)
    assert all(metrics[step]["actor/grad_norm"] > 0 for step in range(1, STEPS + 1))
    lines = read_metrics(folder / "gradient.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert sum(line[f"gradient/decile_{n}"] for n in range(10)) == pytest.approx(1, abs=1e-3)
    before, after = (policy(folder, step).state_dict() for step in (1, 2))
    assert any(not torch.equal(before[name], after[name]) for name in before)

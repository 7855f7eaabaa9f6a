"""Scores: the same from the generation, from a forward pass, and from eager attention matrices."""

import pytest
import tiny
import torch
from tokenweights import TokenWeightsError
from transformers import GPT2Config, GPT2LMHeadModel, Lfm2Config, Lfm2ForCausalLM

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer


class Recorder(TokenWeightsGRPOTrainer):
    def _batch(self, output, columns):
        batch = super()._batch(output, columns)
        self.seen = (output, self.recipe.scores(batch))
        return batch


def rollout(folder, model=None, prepare=lambda model: None, **changes):
    """One rollout batch of eight different prompts, and its scores."""
    trainer = tiny.trainer(
        Recorder, TokenWeightsGRPOConfig, folder, model=model, **{"recipe": "low2high", **changes}
    )
    trainer.model.train()
    prepare(trainer.model)
    torch.manual_seed(3)
    output = trainer._generate_and_score_completions([{"prompt": p} for p in tiny.PROMPTS])
    return trainer, output, trainer.seen[1]


def eager_entropy(model, output, layers, alignment="deciding"):
    eager = tiny.policy(attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    real = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    with torch.no_grad():
        outputs = eager(ids, attention_mask=real, output_attentions=True)
    total = 0.0
    for layer in layers:
        attention = outputs.attentions[layer].double().mean(1)
        total = total - torch.xlogy(attention, attention).sum(-1) / real.cumsum(-1).log()
    width = output["completion_ids"].shape[1]
    end = ids.shape[1] - (alignment == "deciding")
    return total[:, end - width : end] / len(layers)


@pytest.mark.parametrize("changes", [{}, {"pad_to_multiple_of": 8}], ids=["tight", "padded"])
@pytest.mark.parametrize("layers", [None, (1, 3)], ids=["middle layer", "two layers"])
def test_all_sources_agree(tmp_path, layers, changes):
    recipe = {"name": "low2high"} | ({"layers": layers} if layers else {})
    sources = {
        "generation": {"steps_per_generation": 2},
        "old_log_prob_pass": {"steps_per_generation": 4},
        "scoring_pass": {"steps_per_generation": 2},
    }
    rollouts = {}
    for source, steps in sources.items():
        if source == "scoring_pass":
            steps = steps | {"generation_kwargs": {"cache_implementation": "static"}}
        trainer, output, scores = rollout(tmp_path, recipe=recipe, **steps, **changes)
        assert trainer.score_source == source
        rollouts[source] = output, scores
        mask = output["completion_mask"].bool()
        expected = eager_entropy(trainer.model, output, layers or (2,))
        assert scores.shape == mask.shape
        assert (scores - expected)[mask].abs().max() <= 1e-5
        # The case is hard enough: prompts of several lengths, responses that end early.
        assert len(output["prompt_mask"].sum(1).unique()) > 2
        assert len(mask.sum(1).unique()) > 2
    first = rollouts["generation"][0]["completion_ids"]
    assert all(torch.equal(output["completion_ids"], first) for output, _ in rollouts.values())


def test_own_rows_come_from_a_scoring_pass(tmp_path):
    recipe = {"name": "low2high", "alignment": "own"}
    trainer, output, scores = rollout(tmp_path, recipe=recipe)
    assert trainer.score_source == "scoring_pass"
    mask = output["completion_mask"].bool()
    expected = eager_entropy(trainer.model, output, (2,), alignment="own")
    assert (scores - expected)[mask].abs().max() <= 1e-5


def test_a_sliding_window_that_drops_keys_needs_a_scoring_pass(tmp_path):
    """Both layers slide, so the cache holds fewer keys than the row had."""
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    trainer, _, scores = rollout(tmp_path, model=tiny.policy(**window))
    assert trainer.score_source == "scoring_pass"
    assert scores.isfinite().all()


def test_tokens_that_a_tool_wrote_count_nowhere(tmp_path):
    """A rollout function generates elsewhere, and says which tokens are the policy's."""
    ids = [[3, 4, 5, 6, 7, 1], [3, 4, 5, 1], [8, 9, 1], [10, 1]]
    own = [[1, 0, 0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1], [1, 1]]

    def rollout_func(prompts, trainer):
        prompt_ids = [tiny.tokenizer()(prompt).input_ids for prompt in prompts]
        log_probs = [[0.0] * len(row) for row in ids * 2]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": ids * 2,
            "logprobs": log_probs,
            "env_mask": own * 2,
        }

    trainer, output, scores = rollout(tmp_path, rollout_func=rollout_func)
    assert trainer.score_source == "scoring_pass"
    mask = output["tool_mask"].bool() & output["completion_mask"].bool()
    assert mask.sum() == 2 * sum(map(sum, own)) < output["completion_mask"].sum()
    assert (scores - eager_entropy(trainer.model, output, (2,)))[mask].abs().max() <= 1e-5
    assert (output["advantages"] == 0)[~mask].all()
    # At step 0 the lowest of the counted scores weighs 1, and the highest 0.
    low, high = scores[mask].min(), scores[mask].max()
    rescaled = torch.expm1(scores - low) / torch.expm1(high - low)
    plain = trainer.seen[0]["advantages"][:, None]
    expected = torch.where(mask, plain * (1 - rescaled), 0.0)
    torch.testing.assert_close(output["advantages"], expected)


@pytest.mark.parametrize("steps_per_generation", [2, 4])
def test_predictive_entropy_is_that_of_the_sampling_distribution(tmp_path, steps_per_generation):
    trainer, output, scores = rollout(
        tmp_path,
        recipe="predictive_low20",
        temperature=0.7,
        steps_per_generation=steps_per_generation,
    )
    source = "scoring_pass" if steps_per_generation == 2 else "old_log_prob_pass"
    assert trainer.score_source == source
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    real = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    with torch.no_grad():
        logits = trainer.model(ids, attention_mask=real).logits / 0.7
    expected = torch.distributions.Categorical(logits=logits).entropy()
    expected = expected[:, -1 - scores.shape[1] : -1]
    mask = output["completion_mask"].bool()
    assert (scores - expected)[mask].abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("steps_per_generation", "alignment", "source"),
    [
        (2, "deciding", "generation"),
        (2, "own", "scoring_pass"),
        (4, "deciding", "old_log_prob_pass"),
    ],
)
def test_the_reference_pass_is_not_mistaken_for_the_policy(
    tmp_path, steps_per_generation, alignment, source
):
    """With an adapter the reference runs on the policy's own modules, adapter switched off."""
    peft = pytest.importorskip("peft")

    def train_the_adapter(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".default." in name:
                    parameter += torch.full_like(parameter, 0.3)

    trainer, output, scores = rollout(
        tmp_path,
        model=peft.get_peft_model(tiny.policy(), peft.LoraConfig(r=4, task_type="CAUSAL_LM")),
        prepare=train_the_adapter,
        beta=0.1,
        steps_per_generation=steps_per_generation,
        recipe={"name": "low2high", "alignment": alignment},
    )
    assert trainer.score_source == source
    mask = output["completion_mask"].bool()
    policy = trainer.model.merge_and_unload()
    expected = eager_entropy(policy, output, (2,), alignment)
    assert (scores - expected)[mask].abs().max() <= 1e-5
    reference = eager_entropy(tiny.policy(), output, (2,), alignment)
    assert (scores - reference)[mask].abs().max() > 1e-3


def test_a_hybrid_model_is_probed_where_it_has_attention(tmp_path):
    """The middle layer is a convolution, so the nearest layer with attention is read."""
    settings = Lfm2Config(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv", "conv"],
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    trainer, output, scores = rollout(tmp_path, model=Lfm2ForCausalLM(settings))
    assert trainer.recipe.layers == (1,)
    assert trainer.score_source == "generation"
    mask = output["completion_mask"].bool()
    assert scores.shape == mask.shape
    assert scores[mask].std() > 0


@pytest.mark.parametrize("recipe", ["low2high", "predictive_low20"])
def test_learned_positions_are_scored_by_the_generation_or_refused(tmp_path, recipe):
    """TRL gives its passes over left-padded prompts no position ids, generation does."""

    def gpt2():
        torch.manual_seed(7)
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
        no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        settings = {"vocab_size": len(tiny.tokenizer()), "pad_token_id": 0, "eos_token_id": 1}
        return GPT2LMHeadModel(GPT2Config(initializer_range=0.2, **settings, **sizes, **no_dropout))

    if recipe == "low2high":
        trainer, output, scores = rollout(tmp_path, model=gpt2(), steps_per_generation=2)
        assert trainer.score_source == "generation"
        plain = gpt2().eval()
        plain.load_state_dict(trainer.model.state_dict())
        plain.set_attn_implementation("eager")
        for row, real in enumerate(output["completion_mask"].bool()):
            prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()]
            ids = torch.cat([prompt, output["completion_ids"][row][real]])[None]
            with torch.no_grad():
                weights = plain(ids, output_attentions=True).attentions[2].double().mean(1)[0]
            entropy = -torch.xlogy(weights, weights).sum(-1)
            entropy = (entropy / torch.arange(1, ids.shape[1] + 1).log())[len(prompt) - 1 : -1]
            assert (scores[row][real] - entropy).abs().max() <= 1e-5
    with pytest.raises(TokenWeightsError, match="learned positions"):
        rollout(tmp_path, model=gpt2(), steps_per_generation=4, recipe=recipe)

"""What cannot be right is refused by name, before training starts."""

import pytest
import tiny
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenweights import TokenWeightsError
from transformers import OPTConfig, OPTForCausalLM
from trl import GRPOConfig, GRPOTrainer

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer, TokenWeightsMixin

pytestmark = pytest.mark.versions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "expected `recipe` a recipe name or a dict, got None"),
        ({"recipe": "low2hihg"}, "Did you mean 'low2high'"),
        ({"recipe": {"name": "low2high", "warmup": 3}}, "Did you mean 'warmup_steps'"),
        ({"recipe": '{"name": "low2high"'}, "a name or valid JSON"),
        ({"recipe": "loss_low20"}, "loss_magnitude"),
        ({"importance_sampling_level": "sequence"}, "expected `importance_sampling_level` 'token'"),
        ({"loss_type": "ppo"}, "expected `loss_type` one of grpo, dapo"),
        ({"recipe": "anchor20", "loss_type": "grpo"}, "expected `loss_type` one of dapo, bnpo"),
        ({"recipe": "anchor20", "loss_type": "dr_grpo"}, "expected `loss_type` one of dapo, bnpo"),
        (
            {"recipe": {"name": "low2high", "denominator": "weight_sum"}, "loss_type": "sapo"},
            "divides by weight_sum",
        ),
        ({"recipe": "anchor20", "top_entropy_quantile": 0.2}, "expected `top_entropy_quantile`"),
        ({"token_records_steps": 0}, "expected `token_records_steps` >= 1"),
        ({"recipe": "random20", "token_records": "tokens.jsonl"}, "expected `token_records` None"),
    ],
    ids=str,
)
def test_the_configuration_refuses(tmp_path, changes, message):
    if changes:
        changes = {"recipe": "low2high", **changes}
    with pytest.raises(TokenWeightsError) as error:
        tiny.arguments(TokenWeightsGRPOConfig, tmp_path, **changes)
    assert message in str(error.value)


def make(folder, recipe="low2high", trainer_class=TokenWeightsGRPOTrainer, **changes):
    return tiny.trainer(trainer_class, TokenWeightsGRPOConfig, folder, recipe=recipe, **changes)


def test_an_unknown_layer_is_refused(tmp_path):
    with pytest.raises(TokenWeightsError, match=r"among the attention layers \[0, 1, 2, 3\]"):
        make(tmp_path, {"name": "low2high", "layers": (4,)})


def test_a_model_that_cannot_be_tapped_is_refused(tmp_path):
    class Closed(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for layer in self.model.model.layers:
                del layer.self_attn.layer_idx

    with pytest.raises(TokenWeightsError, match="attention interface"):
        make(tmp_path, trainer_class=type("Trainer", (TokenWeightsMixin, Closed), {}))


@pytest.mark.parametrize("tuning", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused_where_attention_is_read(tmp_path, tuning):
    def tuned():
        made = get_peft_model(tiny.policy(), tuning(task_type="CAUSAL_LM", num_virtual_tokens=3))
        return {"model": made, "gradient_checkpointing": False}

    message = f"without virtual tokens where attention is read, got one with a {tuning.__name__}"
    with pytest.raises(TokenWeightsError, match=message):
        make(tmp_path, **tuned())
    with pytest.raises(TokenWeightsError, match=message):
        make(tmp_path, "predictive_low20", gradient_probe_steps=1, **tuned())
    make(tmp_path, "predictive_low20", max_steps=1, **tuned()).train()


def test_a_plain_configuration_is_refused(tmp_path):
    with pytest.raises(TokenWeightsError, match="TokenWeightsGRPOConfig"):
        tiny.trainer(TokenWeightsGRPOTrainer, GRPOConfig, tmp_path)


def test_another_loss_is_refused_unless_it_says_what_it_is(tmp_path):
    class Own(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    class Behind(TokenWeightsMixin, Own):
        pass

    class Before(TokenWeightsGRPOTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    for kind, owner in ((Behind, "Own"), (Before, "Before")):
        with pytest.raises(TokenWeightsError, match=f"got that of {owner}. Set `homogeneous_loss"):
            tiny.trainer(kind, TokenWeightsGRPOConfig, tmp_path, recipe="low2high")
        declared = type("Declared", (kind,), {"homogeneous_loss": True})
        tiny.trainer(declared, TokenWeightsGRPOConfig, tmp_path, recipe="low2high")


def test_another_trl_is_refused(tmp_path):
    class Changed(GRPOTrainer):
        def _compute_loss(self, model, batch):
            return super()._compute_loss(model, batch)

    with pytest.raises(TokenWeightsError, match=r"trl>=1.16,<1.17"):
        make(tmp_path, trainer_class=type("Trainer", (TokenWeightsMixin, Changed), {}))


def test_a_recipe_that_needs_no_scores_needs_no_attention(tmp_path):
    settings = OPTConfig(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    trainer = make(tmp_path, "front20", model=OPTForCausalLM(settings), max_steps=1)
    trainer.train()
    assert trainer.score_source == "none"

"""Every named recipe trains, or is refused by name; and so does one of a user's own."""

import json
import sys

import pytest
import tiny
import tokenweights as tw
import torch
from datasets import Dataset
from tokenweights import TokenWeightsError
from tokenweights.recipes import rules, signals
from transformers import AutoModelForCausalLM

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer
from tokenweights_trl.train import main

# Read what an inference engine gives with the tokens: refused without vLLM.
WITH_SAMPLER = ("sampler_ratio_truncated", "sampler_ratio_band", "second_moment_drop")
# What a rollout batch of TRL does not have as it is set up here, and who reads it.
REFUSED = {
    "loss_low20": "loss_magnitude",
    "loss_high20": "loss_magnitude",
    "certainty_shaping": "`self_certainty`",
    **dict.fromkeys(WITH_SAMPLER, "`sampler_log_probs`"),
}
# Layers that the tiny model does not have.
LAYERS = {f"low2high_layer{layer}": {"layers": 1} for layer in (8, 20, 31)}

MODULE = """
from dataclasses import dataclass


@dataclass(frozen=True)
class Doubt:
    columns = ("log_probs", "predictive_entropy")

    def __call__(self, batch):
        return (-batch.log_probs - batch.predictive_entropy).clamp(min=0)


@dataclass(frozen=True)
class Doubted:
    gamma: float = 0.3

    def __call__(self, scores, batch, *, step, group=None):
        return 1 + self.gamma * scores
"""


class Recorder(TokenWeightsGRPOTrainer):
    seen = ()

    def _batch(self, output, columns):
        batch = super()._batch(output, columns)
        self.seen += (batch,)
        return batch


def trained(folder, **changes):
    trainer = tiny.trainer(Recorder, TokenWeightsGRPOConfig, folder, **{"max_steps": 2, **changes})
    trainer.train()
    return trainer


def sampled(prompts, trainer):
    """Completions as an engine gives them: log-probabilities near the policy's, one unknown."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    prompt_ids = [tiny.tokenizer()(prompt).input_ids for prompt in prompts]
    ids = [torch.randint(3, 20, (length,), generator=generator).tolist() for length in LENGTHS]
    log_probs = []
    for prompt, completion in zip(prompt_ids, ids, strict=True):
        own = exact_log_probs(trainer.model, prompt, completion)
        log_probs.append((own + 0.6 * torch.randn(len(own), generator=generator)).tolist())
    log_probs[0][1] = None
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": log_probs}


def exact_log_probs(model, prompt, completion):
    """One sequence alone, without padding."""
    ids = torch.tensor([*prompt, *completion])
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double()
    return logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[len(prompt) - 1 :, 0]


# Responses of several lengths.
LENGTHS = (6, 4, 5, 2, 6, 3, 6, 5)


def sampler_weights(name, ratio, advantages):
    """The rules, read again from their papers as loops over a flat list of tokens."""
    if name == "sampler_ratio_truncated":
        return [min(r, 2.0) for r in ratio]
    if name == "sampler_ratio_band":
        return [r if 0.5 <= r <= 5.0 else 0.0 for r in ratio]
    squares = [torch.tensor(r, dtype=torch.float64).log().item() ** 2 for r in ratio]
    pairs = zip(ratio, advantages, strict=True)
    looked_at = [n for n, (r, a) in enumerate(pairs) if (a > 0 and r > 1) or (a < 0 and r < 1)]
    looked_at.sort(key=lambda n: squares[n])
    while looked_at and sum(squares[n] for n in looked_at) / len(looked_at) > 0.04:
        squares[looked_at.pop()] = None
    return [0.0 if square is None else 1.0 for square in squares]


@pytest.mark.parametrize("steps_per_generation", [2, 4])
@pytest.mark.parametrize("name", WITH_SAMPLER)
def test_a_recipe_that_reads_the_sampler_trains(tmp_path, name, steps_per_generation):
    """TRL gives the same column with a rollout function as with vLLM, which needs a GPU."""

    class Sampled(Recorder):
        weights = ()

        def _weighted(self, output, columns):
            rows = [output["completion_mask"][n].bool() for n in range(len(LENGTHS))]
            before = [
                exact_log_probs(
                    self.model,
                    output["prompt_ids"][n][output["prompt_mask"][n].bool()].tolist(),
                    output["completion_ids"][n][row].tolist(),
                )
                for n, row in enumerate(rows)
            ]
            weighted = super()._weighted(output, columns)
            ratio, advantages, found = [], [], []
            for n, row in enumerate(rows):
                sampler = output["sampling_per_token_logps"][n][row].double()
                ratio += (before[n] - sampler).nan_to_num(nan=0.0).exp().tolist()
                plain = output["advantages"][n].item()
                advantages += [plain] * len(before[n])
                found += (weighted["advantages"][n][row] / plain).tolist()
            self.weights += ((found, sampler_weights(name, ratio, advantages)),)
            return weighted

    trainer = tiny.trainer(
        Sampled,
        TokenWeightsGRPOConfig,
        tmp_path,
        recipe="full",
        rollout_func=sampled,
        per_device_train_batch_size=8 // steps_per_generation,
        steps_per_generation=steps_per_generation,
        max_steps=4,
    )
    trainer.recipe = tw.recipe(name)
    trainer.train()
    source = "scoring_pass" if steps_per_generation == 2 else "old_log_prob_pass"
    assert trainer.score_source == source
    assert len(trainer.weights) >= 2
    for found, expected in trainer.weights:
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert len(set(expected)) > 1


@pytest.mark.parametrize("name", [name for name in tw.recipe_names() if name not in REFUSED])
def test_a_named_recipe_trains(tmp_path, name):
    trainer = trained(tmp_path, recipe={"name": name, **LAYERS.get(name, {})})
    logs = [log for log in trainer.state.log_history if "token_weights/weight_mean" in log]
    assert len(logs) == 2 and trainer.seen
    batch = trainer.seen[-1]
    assert set(trainer.recipe.columns) <= set(batch.filled)
    assert batch.prompt_ids.tolist() == (batch.sample_ids // trainer.num_generations).tolist()


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_that_trl_cannot_serve_is_refused(tmp_path, name):
    with pytest.raises(TokenWeightsError) as error:
        TokenWeightsGRPOConfig(str(tmp_path), recipe=name, use_cpu=True, bf16=False)
    assert REFUSED[name] in str(error.value)


def test_the_reference_is_a_column_where_there_is_one(tmp_path):
    made = tw.Recipe(
        signal=signals.ReferenceDivergence(), rule=tw.recipe("entropy_proportional").rule
    )
    with pytest.raises(TokenWeightsError, match="`reference_log_probs`"):
        TokenWeightsGRPOConfig(str(tmp_path), recipe=made, use_cpu=True, bf16=False)
    tiny.policy().save_pretrained(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    trainer = trained(tmp_path, model=model, recipe=made, beta=0.1)
    batch = trainer.seen[0]  # before any update the policy is the reference
    same = (batch.reference_log_probs - batch.log_probs)[batch.mask].abs().max()
    assert same < 1e-5


def test_the_ratio_to_the_sampler_is_not_corrected_twice(tmp_path):
    options = {"recipe": "sampler_ratio_band", "use_cpu": True, "bf16": False, "use_vllm": True}
    with pytest.raises(TokenWeightsError, match="`vllm_importance_sampling_correction` False"):
        TokenWeightsGRPOConfig(str(tmp_path), **options)
    made = TokenWeightsGRPOConfig(
        str(tmp_path), **options, vllm_importance_sampling_correction=False
    )
    assert made.token_recipe.name == "sampler_ratio_band"


def test_a_recipe_of_a_users_own_trains(tmp_path, monkeypatch):
    (tmp_path / "trl_rules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import trl_rules

    made = tw.Recipe(name="doubted", signal=trl_rules.Doubt(), rule=trl_rules.Doubted(0.5))
    text = '{"signal": "trl_rules:Doubt", "rule": {"kind": "trl_rules:Doubted", "gamma": 0.5}}'
    by_object, by_text = (
        trained(tmp_path / kind, recipe=choice, save_steps=1)
        for kind, choice in (("object", made), ("text", text))
    )
    assert by_object.score_source == by_text.score_source == "scoring_pass"
    for one, other in zip(by_object.seen, by_text.seen, strict=True):
        assert torch.equal(one.log_probs, other.log_probs)
    for name, one in by_object.model.state_dict().items():
        assert torch.equal(one, by_text.model.state_dict()[name])
    assert '"kind": "trl_rules:Doubted"' in by_object.args.to_json_string()
    del sys.modules["trl_rules"]


def scripted(scores, batch, *, step, group=None):
    return 1 + batch.mask.float()


@pytest.mark.parametrize("part", ["script", "nested", "lambda"])
def test_arguments_with_a_recipe_object_are_written_and_saved(tmp_path, monkeypatch, part):
    """A part of a script has a name but no import, and one inside of a function has neither."""

    def nested(scores, batch, *, step, group=None):
        return 1 + batch.mask.float()

    monkeypatch.setattr(scripted, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "scripted", scripted, raising=False)
    unnamed = lambda scores, batch, *, step, group=None: 1 + batch.mask.float()  # noqa: E731
    rule = {"script": scripted, "nested": nested, "lambda": unnamed}[part]
    made = tw.Recipe(name="mine", signal=signals.Surprisal(), rule=rule)
    trainer = trained(tmp_path, recipe=made, max_steps=1, save_strategy="steps", save_steps=1)
    for text in (trainer.args.to_json_string(), str(trainer.args)):
        assert "mine" in text
    assert "surprisal" in json.loads(trainer.args.to_json_string())["recipe"]
    assert trainer.args.recipe is made  # to write it down changes nothing
    path = tmp_path / "checkpoint-1" / "training_args.bin"
    saved = torch.load(path, weights_only=False)
    assert type(saved) is TokenWeightsGRPOConfig and saved.max_steps == 1
    if part == "script":  # by name, as pickle does
        assert saved.recipe == made
    else:
        assert saved.recipe == made.describe()


def test_saved_arguments_hold_a_recipe_of_this_library(tmp_path):
    made = tw.Recipe(signal=signals.Surprisal(), rule=rules.Top(fraction=0.5))
    arguments = tiny.arguments(TokenWeightsGRPOConfig, tmp_path, recipe=made)
    torch.save(arguments, tmp_path / "arguments.bin")
    loaded = torch.load(tmp_path / "arguments.bin", weights_only=False)
    assert loaded.token_recipe == made
    assert tw.recipe(json.loads(arguments.to_json_string())["recipe"]) == made


def test_the_command_line_takes_an_import_path_and_refuses_a_misspelt_one(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "trl_line_rules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    tiny.policy().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    Dataset.from_dict({"prompt": tiny.PROMPTS, "answer": ["1"] * len(tiny.PROMPTS)}).to_json(
        tmp_path / "rows.jsonl"
    )
    options = (
        "--per_device_train_batch_size 4 --num_generations 4 --max_completion_length 4 --use_cpu "
        "--max_steps 2 --bf16 false --report_to none --save_strategy no --disable_tqdm true"
    )

    def train(rule, model):
        recipe = {"signal": "trl_line_rules:Doubt", "rule": {"kind": rule, "gamma": 0.5}}
        paths = {"model": model, "dataset": "rows.jsonl", "output_dir": "out"}
        named = [word for name, at in paths.items() for word in (f"--{name}", str(tmp_path / at))]
        main([*named, "--recipe", json.dumps(recipe), *options.split()])

    with pytest.raises(SystemExit) as stop:  # the model is not there either: it comes later
        train("trl_line_rules:Doubtd", "no model")
    assert stop.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert "Did you mean 'Doubted'" in line
    train("trl_line_rules:Doubted", "model")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    sys.modules.pop("trl_line_rules")


def test_a_misspelt_path_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "trl_rules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    choice = {"signal": "trl_rules:Doubt", "rule": "trl_rules:Doubtd"}
    with pytest.raises(TokenWeightsError, match="Did you mean 'Doubted'"):
        TokenWeightsGRPOConfig(str(tmp_path), recipe=choice, use_cpu=True, bf16=False)
    sys.modules.pop("trl_rules", None)

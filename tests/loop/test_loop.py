"""The loop of `integrations/loop`: its engine against passes of one row, and every recipe."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import tokenweights as tw
from tokenweights.report import inspected_records, run_from_directory

lab = pytest.importorskip("tokenweights_lab")

FOLDER = Path(__file__).parents[2] / "integrations" / "loop"
# Recipes that name layers which the embedded policy does not have, or read what no rollout has.
REFUSED = {
    **{f"low2high_layer{layer}": f"got {layer}" for layer in (8, 20, 31)},
    **{name: "nothing to rank" for name in ("loss_low20", "loss_high20")},
}


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


engine = loaded("engine")
loop = loaded("loop")


@pytest.fixture(scope="module")
def policy():
    return lab.load_policy(), lab.load_tokenizer()


@pytest.fixture(scope="module")
def responses(policy):
    torch.manual_seed(0)
    prompts = [p.prompt for p in lab.problems("train", 3)]
    return engine.sampled(*policy, prompts, longest=40)


def test_the_likeliest_tokens_are_those_of_generate(policy):
    model, tokenizer = policy
    prompts = [p.prompt for p in lab.problems("train", 4)]
    found = engine.sampled(model, tokenizer, prompts, longest=30, temperature=1e-4)
    expected = lab.completions(model, tokenizer, prompts, max_new_tokens=30, temperature=0.0)
    assert found.texts == [row[0] for row in expected]


def test_the_mask_ends_with_the_end_of_a_response(policy, responses):
    end = policy[1].eos_token_id
    for tokens, mask in zip(responses.tokens, responses.mask, strict=True):
        count = int(mask.sum())
        assert mask[:count].all()
        ends = (tokens == end).nonzero()[:, 0].tolist()
        assert count == (ends[0] + 1 if ends else len(tokens))


def test_columns_are_those_of_each_sequence_alone(policy, responses):
    model, tokenizer = policy
    recipe = tw.recipe("low2high").on_model(model)
    read = engine.columns(model, responses, recipe)
    (layer,) = recipe.layers
    for row in range(len(responses.ids)):
        ids = responses.ids[row][responses.real[row]]
        count = int(responses.mask[row].sum())
        (alone,) = inspected_records(
            model, ids, prompt_length=len(ids) - count, decode=tokenizer.decode, layers=[layer]
        )
        for name, expected in (
            ("log_probs", alone.log_probs),
            ("predictive_entropy", alone.predictive_entropy),
        ):
            torch.testing.assert_close(
                read[name][row, :count], torch.tensor(expected), atol=1e-4, rtol=1e-4
            )
        scores = read["attention"][layer][row, :count]
        expected = torch.tensor(alone.attention_entropy)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", tw.recipe_names())
def test_every_recipe_trains_or_is_refused_by_name(name, tmp_path):
    options = {"steps": 1, "folder": tmp_path, "prompts": 2, "samples": 4}
    if name in REFUSED:
        with pytest.raises(tw.TokenWeightsError, match=REFUSED[name]):
            loop.train(name, **options)
        return
    before = lab.load_policy().state_dict()
    after = loop.train(name, **options).state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any((after[key] != before[key]).any() for key in before)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["step"] == 0 and "token_weights/weight_mean" in line


def test_the_policy_learns(tmp_path):
    loop.train("low2high", steps=12, folder=tmp_path, prompts=8, rate=3e-4)
    rewards = [line["reward"] for line in run_from_directory(tmp_path).metrics]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.6


def test_the_loop_is_sixty_lines():
    # Without docstrings, comments, blank lines, imports and the command line.
    source = (FOLDER / "loop.py").read_text().partition("def train")[2].partition("if __name__")[0]
    lines = [line.strip() for line in source.splitlines()]
    assert len([line for line in lines if line and not line.startswith(("#", '"""'))]) <= 60

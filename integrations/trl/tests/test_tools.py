"""Multi-turn generation with a real tool: what the tool wrote counts nowhere, on any layout."""

import pytest
import tokenweights as tw
import tools_run
import torch
from ranks import outcome
from test_recipes import LAYERS, REFUSED

# It reads all that a pass gives, so that its batch serves every other recipe.
FIRST = {
    "rule": {"kind": "damped"},
    "signal": {
        "kind": "mean_of",
        "signals": ["attention_entropy", "predictive_entropy", "surprisal"],
    },
}
# Those that read columns of attention have a test of their own.
ENTROPIES = [name for name in tw.recipe_names() if (r := tw.recipe(name)).attention == r.entropy]
NAMES = [name for name in ENTROPIES if name not in REFUSED]
RECIPES = [FIRST, *({"name": name, **LAYERS.get(name, {})} for name in NAMES)]


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """The rollout batch on one rank, and on two."""
    folder = tmp_path_factory.mktemp("tools")
    asked = {"recipes": RECIPES, "environment": False}
    return [outcome("tools_run.py", ranks, folder / f"{ranks}.json", asked) for ranks in (1, 2)]


@pytest.fixture(scope="module")
def batches(rollouts):
    return [recomputed(rows) for rows in rollouts]


def recomputed(rows):
    """A batch of the same rows, each from eager attention and full logits of its own."""
    model = tools_run.policy(attn_implementation="eager").double()
    columns = {name: [] for name in ("log_probs", "predictive_entropy", "attention")}
    for row in rows:
        ids, start = torch.tensor([row["prompt"] + row["tokens"]]), len(row["prompt"]) - 1
        with torch.no_grad():
            output = model(ids, output_attentions=True)
        log_probs = output.logits[0, start:-1].log_softmax(-1)
        drawn = log_probs.gather(-1, ids[0, start + 1 :, None])[:, 0]
        columns["log_probs"].append(drawn)
        columns["predictive_entropy"].append(-(log_probs.exp() * log_probs).sum(-1))
        layers = []
        for attention in output.attentions:
            mean = attention[0].mean(0)[start:-1]
            reach = torch.arange(start, start + len(mean)) + 1.0
            layers.append(-torch.special.xlogy(mean, mean).sum(-1) / reach.log())
        columns["attention"].append(torch.stack(layers, 1))
    padded = {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        for name, values in columns.items()
    }
    attention = dict(enumerate(padded.pop("attention").unbind(-1)))
    own, tokens = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True)
        for key in ("own", "tokens")
    )
    return tw.RolloutBatch(
        mask=own.bool(),
        sample_ids=torch.arange(len(rows)),
        prompt_ids=torch.arange(len(rows)) // len(tools_run.CALLING),
        token_ids=tokens,
        advantages=torch.tensor([[row["advantage"]] for row in rows]),
        attention=attention,
        **padded,
    )


def test_a_tool_was_called_in_the_middle_of_responses(rollouts):
    for rows in rollouts:
        assert len(rows) == 8
        for place, row in enumerate(rows):
            text = tools_run.tokenizer().decode(row["tokens"])
            called = tools_run.CALLING[place % 4]
            assert ("<tool_response>" in text) == called == (0 in row["own"])
            assert row["own"][0] == row["own"][-1] == 1
            assert not called or f"<tool_response>\n{place % 4 + 7}\n" in text


def test_what_the_tool_wrote_weighs_nothing(rollouts):
    for rows in rollouts:
        for row in rows:
            theirs = ~torch.tensor(row["own"]).bool()
            weights = torch.tensor([row["products"], *row["weights"]])
            assert (weights[:, theirs] == 0).all() and (weights[:, ~theirs] != 0).any()


def test_two_ranks_roll_out_and_weigh_as_one_does(rollouts):
    for one, two in zip(*rollouts, strict=True):
        assert [one[key] for key in ("prompt", "tokens", "own")] == [
            two[key] for key in ("prompt", "tokens", "own")
        ]
        for key in ("advantage", "products", "weights"):
            found, expected = torch.tensor(two[key]), torch.tensor(one[key])
            torch.testing.assert_close(found, expected, atol=3e-5, rtol=3e-4)


def test_the_method_of_an_environment_is_a_tool(rollouts, tmp_path):
    asked = {"recipes": RECIPES, "environment": True}
    assert outcome("tools_run.py", 1, tmp_path / "1.json", asked) == rollouts[0]


@pytest.mark.parametrize("place", range(len(RECIPES)), ids=["first", *NAMES])
def test_weights_are_those_of_eager_attention_and_full_logits(rollouts, batches, place):
    """To the rounding of float32, which a rescaling by extrema makes larger."""
    recipe = tw.recipe(RECIPES[place]).placed(2)
    for rows, batch in zip(rollouts, batches, strict=True):
        made = recipe.weighted(batch, step=0)
        for row, weights in zip(rows, made.weights, strict=True):
            found = torch.tensor(row["weights"][place])
            torch.testing.assert_close(found, weights[: len(found)], atol=3e-5, rtol=3e-4)
            if place == 0:
                products = (row["advantage"] * weights * made.scale)[: len(found)]
                found = torch.tensor(row["products"])
                torch.testing.assert_close(found, products, atol=3e-5, rtol=3e-4)

"""The rollout batch: shapes, numbers of responses and prompts, and parts of it."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, on_ranks

import tokenweights as tw
from tokenweights import Recipe, RolloutBatch, TokenWeightsError
from tokenweights.recipes import combine, field, rules, signals

MASK = torch.tensor([[True, False], [True, True], [False, False]])


def test_numbers_that_nobody_gave_are_none():
    batch = RolloutBatch(mask=MASK)
    assert batch.sample_ids is None and batch.prompt_ids is None and batch.filled == ("mask",)
    assert RolloutBatch(mask=MASK, sample_ids=torch.tensor([5, 6, 7])).prompt_ids is None


def test_columns_are_detached_and_masks_of_integers_taken():
    batch = RolloutBatch(mask=MASK.long(), log_probs=torch.zeros(3, 2, requires_grad=True))
    assert batch.mask.dtype == torch.bool and not batch.log_probs.requires_grad


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"log_probs": torch.zeros(3, 3)}, "`RolloutBatch`: expected `log_probs`"),
        ({"advantages": torch.zeros(3)}, "expected `advantages`"),
        ({"rewards": torch.zeros(3, 1)}, "expected `rewards`"),
        ({"attention": {1: torch.zeros(2, 2)}}, "expected `attention`"),
        ({"token_ids": torch.zeros(3, 2)}, "expected `token_ids`"),
    ],
)
def test_a_wrong_shape_is_refused_by_name(columns, words):
    with pytest.raises(TokenWeightsError) as error:
        RolloutBatch(mask=MASK, **columns)
    assert words in str(error.value)


def test_rows_are_a_batch():
    batch = RolloutBatch(
        mask=MASK,
        prompt_ids=torch.tensor([1, 1, 2]),
        advantages=torch.tensor([[1.0], [2.0], [3.0]]),
        attention={4: torch.arange(6.0).view(3, 2)},
    )
    part = batch.rows([2, 0])
    assert part.sample_ids.tolist() == [2, 0] and part.prompt_ids.tolist() == [2, 1]
    assert part.advantages.tolist() == [[3.0], [1.0]]
    assert part.attention[4].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert batch.rows([]).mask.shape == (0, 2)


def test_what_is_missing_is_named():
    batch = RolloutBatch(mask=MASK, rewards=torch.zeros(3))
    batch.require(["rewards", "mask"], caller="rule")
    with pytest.raises(TokenWeightsError, match=r"`rule`: expected `advantages` given"):
        batch.require(["advantages"], caller="rule")


def test_rows_keep_the_numbers_that_draws_take():
    """Row numbers where none are given; of a rank's rows of a larger batch nothing is made up."""
    made, batch = tw.recipe("random20"), RolloutBatch(mask=torch.ones(3, 40).bool())
    whole = made.weighted(batch, step=0).weights
    assert torch.equal(made.weighted(batch.rows([2, 0]), step=0).weights, whole[[2, 0]])
    assert batch.rows([2, 0]).prompt_ids is None


# Who needs which numbers.

SURPRISAL = signals.Surprisal()
DRAWN = {
    "random20": "random",
    "bernoulli20": "bernoulli",
    "type_matched20": "type_matched",
    "position_matched20": "position_matched",
    "random_credit40": "random_credit",
    "covariance_drop": "random_drop",
}
RANKED = {"predictive_high20_batch": "top", "second_moment_drop": "second_moment"}
OF_PROMPTS = {
    "perplexity_shaping": tw.recipe("perplexity_shaping"),
    "certainty_shaping": tw.recipe("certainty_shaping"),
    "top": Recipe(signal=SURPRISAL, rule=rules.Top(scope="prompt")),
    "bottom": Recipe(signal=SURPRISAL, rule=rules.Bottom(scope="prompt")),
    "quantile": Recipe(signal=SURPRISAL, rule=field.AboveQuantile(scope="prompt")),
    "inside": Recipe(
        signal=SURPRISAL,
        rule=combine.Gate(rule=rules.Top(scope="prompt"), when=combine.Steps(start=9)),
    ),
    "own signal": Recipe(rule=combine.On(signal=SURPRISAL, rule=rules.Top(scope="prompt"))),
}
NUMBERLESS = ["full", "low2high", "anchor20", "front20", "entropy_proportional"]
NUMBERLESS += ["predictive_above80_batch", "entropy_change_damped", "preplan_anchor40"]
READ = {name for each in tw.recipe_names() for name in tw.recipe(each).placed(36).readings}


def drawn(**numbers):
    """Two prompts of two responses each."""
    generator = torch.Generator().manual_seed(0)
    column = torch.rand(4, 30, generator=generator)
    return RolloutBatch(
        mask=torch.ones(4, 30).bool(),
        token_ids=torch.arange(120).view(4, 30) % 5,
        advantages=torch.tensor([[2.0], [-1.0], [1.0], [-2.0]]),
        log_probs=-4 * column,
        sampler_log_probs=-4 * column.flip(1),
        predictive_entropy=column,
        self_certainty=column,
        attention=dict.fromkeys(READ, column),
        **numbers,
    )


NUMBERS = {"sample_ids": torch.tensor([7, 3, 9, 4]), "prompt_ids": torch.tensor([1, 1, 2, 2])}


def refusal(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except TokenWeightsError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("name", OF_PROMPTS)
def test_one_rank_refuses_a_prompt_that_nobody_named(name):
    made = OF_PROMPTS[name].placed(36)
    told = refusal(made.weighted, drawn(sample_ids=NUMBERS["sample_ids"]), step=0)
    assert "expected `prompt_ids` given for the scope 'prompt', got None" in told
    assert "Pass `RolloutBatch(prompt_ids=...)`" in told
    without = drawn(prompt_ids=NUMBERS["prompt_ids"])
    assert torch.equal(
        made.weighted(without, step=0).weights, made.weighted(drawn(**NUMBERS), step=0).weights
    )


@pytest.mark.parametrize("name", [*DRAWN, *RANKED])
def test_one_rank_takes_row_numbers_for_samples(name):
    made, rows = tw.recipe(name).placed(36), torch.arange(4)
    given = made.weighted(drawn(sample_ids=rows), step=0).weights
    assert torch.equal(made.weighted(drawn(), step=0).weights, given)


def test_row_numbers_draw_the_same_places_at_every_step():
    """The draw depends on seed, number and position alone, which `sample_ids` says."""
    made = tw.recipe("random20")
    first, second = (made.weighted(drawn(), step=step).weights for step in (0, 1))
    assert torch.equal(first, second)
    other = drawn(sample_ids=torch.arange(4) + 4)
    assert not torch.equal(made.weighted(other, step=1).weights, first)


def refusals(rank, size):
    """What a rank of two is told where its rows have no numbers."""
    world, rows = dist.group.WORLD, [2 * rank, 2 * rank + 1]
    numbers = {name: values[rows] for name, values in NUMBERS.items()}
    own = dataclasses.replace(drawn().rows(rows), sample_ids=None)
    found = {}
    for name in (*DRAWN, *RANKED, *NUMBERLESS):
        made, shared = tw.recipe(name).placed(36), dataclasses.replace(own, group=world)
        found[name] = refusal(made.weighted, own, step=0, group=world)
        assert refusal(made.weighted, shared, step=0) == found[name]
        assert refusal(made.rule, made.scores(shared), shared, step=0, group=world) == found[name]
        numbered = dataclasses.replace(own, sample_ids=numbers["sample_ids"])
        assert refusal(made.weighted, numbered, step=0, group=world) == "accepted"
    for name, made in OF_PROMPTS.items():
        without = dataclasses.replace(own, sample_ids=numbers["sample_ids"])
        found[name] = refusal(made.placed(36).weighted, without, step=0, group=world)
        both = dataclasses.replace(own, **numbers)
        assert refusal(made.placed(36).weighted, both, step=0, group=world) == "accepted"
    mask = torch.ones(2, 30).bool()
    made = tw.recipe("random20")
    found["token_weights"] = refusal(made.token_weights, None, mask, step=0, group=world)
    found["weighted_rollout"] = refusal(tw.weighted_rollout, made, None, mask, step=0, group=world)
    # What one rank lacks is refused on both, also where the rule communicates before it draws.
    late = Recipe(
        signal=SURPRISAL,
        rule=combine.Product(rules=(field.Mapped(normalise="mean"), rules.Random())),
    )
    lacking = dataclasses.replace(own, sample_ids=None if rank else numbers["sample_ids"])
    found["one lacks"] = refusal(late.weighted, lacking, step=0, group=world)
    return found


def test_ranks_make_up_no_numbers():
    for found in on_ranks(refusals, 2):
        for name, kind in (*DRAWN.items(), *RANKED.items()):
            told = found.pop(name)
            assert told.startswith(f"`{kind}`: expected `sample_ids` given where several ranks")
            assert "Pass `RolloutBatch(sample_ids=...)`" in told
        for name in OF_PROMPTS:
            assert "expected `prompt_ids` given for the scope 'prompt'" in found.pop(name)
        for name in ("token_weights", "weighted_rollout", "one lacks"):
            assert "`random`: expected `sample_ids` given where several" in found.pop(name)
        assert found == dict.fromkeys(NUMBERLESS, "accepted")


def alone(rank, size):
    own = drawn(group=dist.group.WORLD)
    return tw.recipe("random20").weighted(own, step=0).weights


def test_a_group_of_one_takes_row_numbers():
    with Ranks(1) as ranks:
        (weights,) = ranks(alone)
    assert torch.equal(weights, tw.recipe("random20").weighted(drawn(), step=0).weights)

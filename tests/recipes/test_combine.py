"""Parts made of parts: by hand, and the same over ranks that alone would decide otherwise."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from tokenweights import Recipe, RolloutBatch, TokenWeightsError
from tokenweights.recipes import combine, field, rules, signals

ENTROPY, SURPRISAL = signals.PredictiveEntropy(), signals.Surprisal()
# Three responses, of 3, 2 and 0 valid tokens; what is off the mask is NaN.
MASK = torch.tensor([[True, True, True, False], [False, True, True, False], [False] * 4])
NAN = math.nan


def batch(**changed):
    columns = {
        "predictive_entropy": torch.tensor([[0.1, 0.4, 0.2, NAN], [NAN, 0.3, 0.6, NAN], [NAN] * 4]),
        "log_probs": torch.tensor([[-3.0, -1.0, -2.0, NAN], [NAN, -5.0, -4.0, NAN], [NAN] * 4]),
        "advantages": torch.tensor([[1.0, -1.0, 0.0, NAN], [NAN, 2.0, -2.0, NAN], [NAN] * 4]),
    }
    return RolloutBatch(mask=MASK, **(columns | changed))


def weights_of(rule, signal=ENTROPY, *, step=0, given=None):
    scored = signal if combine.needs_scores(rule) else None
    made = Recipe(rule=rule, signal=scored)
    weights = made.weighted(batch() if given is None else given, step=step).weights
    assert not weights[~MASK].any()
    return weights[MASK].tolist()


HIGH = field.Within(low=0.3, high=9.0)
TOP = rules.Top(fraction=0.4, scope="batch", inside=3.0, outside=0.5)


def test_by_sign_takes_each_rule_where_it_holds_and_one_elsewhere():
    made = combine.BySign(positive=HIGH, negative=TOP)
    # Signs + - 0 + -; the highest two of all five tokens are the second and the last.
    assert weights_of(made) == pytest.approx([0, 3, 1, 1, 3])
    assert weights_of(combine.BySign(positive=TOP, negative=HIGH)) == pytest.approx(
        [0.5, 1, 1, 0.5, 1]
    )


def test_by_sign_takes_one_advantage_for_a_response():
    given = batch(advantages=torch.tensor([[0.0], [-1.0], [NAN]]))
    made = combine.BySign(positive=TOP, negative=TOP)
    assert weights_of(made, given=given) == [1, 1, 1, 0.5, 3]


def test_a_sign_narrows_what_a_rule_inside_ranks():
    one = dataclasses.replace(TOP, sign="positive", fraction=0.5)
    other = dataclasses.replace(TOP, sign="negative", fraction=0.5)
    assert weights_of(combine.BySign(positive=one, negative=other)) == [0.5, 0.5, 1, 3, 3]


def test_by_sign_and_its_kin_need_scores_where_a_part_does():
    free, scored = rules.Front(fraction=0.5), HIGH
    assert not combine.BySign(positive=free, negative=free).scored
    assert combine.BySign(positive=free, negative=scored).scored
    assert not combine.Product(rules=(free, free)).scored
    assert combine.Product(rules=(free, scored)).scored
    when = combine.Steps(stop=1)
    assert not combine.Gate(rule=free, when=when).scored
    assert combine.Gate(rule=free, when=when, otherwise=scored).scored
    assert not combine.On(signal=ENTROPY, rule=scored).scored


def test_a_product_multiplies():
    front = rules.Front(fraction=0.7)  # the first two, and the first one
    assert weights_of(combine.Product(rules=(front,)), None) == [1, 1, 0, 1, 0]
    assert weights_of(combine.Product(rules=(front, TOP, TOP))) == [0.25, 9, 0, 0.25, 0]


def test_a_rule_on_a_signal_of_its_own():
    own = combine.On(signal=SURPRISAL, rule=TOP)  # 3, 1, 2, 5, 4
    assert weights_of(own) == [0.5, 0.5, 0.5, 3, 3]
    assert weights_of(combine.Product(rules=(own, HIGH))) == [0, 0.5, 0, 3, 3]
    made = Recipe(rule=own)
    assert made.columns == ("log_probs",)
    with pytest.raises(TokenWeightsError, match="expected `log_probs` given"):
        made.weighted(RolloutBatch(mask=MASK), step=0)


@pytest.mark.parametrize(
    ("below", "above", "holds"),
    [
        (0.33, None, True),
        (0.31, None, False),
        (None, 0.31, True),
        (None, 0.33, False),
        (0.33, 0.31, True),
        (0.33, 0.325, False),
        (0.315, 0.31, False),
    ],
)
def test_a_gate_on_the_mean_of_the_batch(below, above, holds):
    """Of the five tokens the mean entropy is 0.32."""
    when = combine.BatchMean(signal=ENTROPY, below=below, above=above)
    assert when(batch(), step=0) is holds
    assert (weights_of(combine.Gate(rule=HIGH, when=when)) == [0, 1, 0, 1, 1]) is holds
    assert (weights_of(combine.Gate(rule=HIGH, when=when)) == [1] * 5) is not holds
    other = combine.Gate(rule=HIGH, when=when, otherwise=TOP)
    assert (weights_of(other) == [0.5, 3, 0.5, 0.5, 3]) is not holds


def test_a_mean_at_the_bound_is_not_beyond_it():
    given = batch(predictive_entropy=torch.where(MASK, 0.25, NAN))
    for bound in ({"below": 0.25}, {"above": 0.25}):
        assert not combine.BatchMean(signal=ENTROPY, **bound)(given, step=0)


def test_no_token_has_no_mean():
    nothing = RolloutBatch(mask=torch.zeros(2, 3).bool(), predictive_entropy=torch.zeros(2, 3))
    for bound in ({"below": 9.0}, {"above": -9.0}):
        assert not combine.BatchMean(signal=ENTROPY, **bound)(nothing, step=0)


@pytest.mark.parametrize(
    ("steps", "holding"),
    [
        (combine.Steps(), range(9)),
        (combine.Steps(start=3), range(3, 9)),
        (combine.Steps(stop=2), range(2)),
        (combine.Steps(start=2, stop=4), range(2, 4)),
        (combine.Steps(start=4, stop=4), range(0)),
    ],
)
def test_a_gate_on_the_step(steps, holding):
    made = combine.Gate(rule=HIGH, when=steps)
    for step in range(9):
        assert (weights_of(made, step=step) != [1] * 5) == (step in holding)


def test_ranks_within_the_response_and_their_mean():
    ranked = combine.Ranked(signal=ENTROPY)
    scores = Recipe(rule=HIGH, signal=ranked).scores(batch())
    assert scores[MASK].tolist() == [0, 1, 0.5, 0, 1]
    alone = RolloutBatch(mask=torch.ones(1, 1).bool(), predictive_entropy=torch.ones(1, 1))
    assert ranked(alone).tolist() == [[0]]
    tied = RolloutBatch(mask=torch.ones(1, 3).bool(), predictive_entropy=torch.ones(1, 3))
    assert ranked(tied).tolist() == [[0, 0.5, 1]]
    other = combine.Ranked(signal=SURPRISAL)  # 1, 0, 0.5, 1, 0
    mean = combine.MeanOf(signals=(ranked, other))
    assert mean(batch())[MASK].tolist() == [0.5, 0.5, 0.5, 0.5, 0.5]
    mean = combine.MeanOf(signals=(ENTROPY, SURPRISAL, SURPRISAL))
    want = [(0.1 + 6) / 3, (0.4 + 2) / 3, (0.2 + 4) / 3, (0.3 + 10) / 3, (0.6 + 8) / 3]
    assert mean(batch())[MASK].tolist() == pytest.approx(want)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: combine.Product(rules=()), "`rules` not empty"),
        (lambda: combine.MeanOf(signals=()), "`signals` not empty"),
        (lambda: combine.BatchMean(signal=ENTROPY), "`below` given, or `above`"),
        (lambda: combine.BatchMean(signal=ENTROPY, below=NAN), "`below` finite"),
        (lambda: combine.BySign(positive="top", negative=TOP), "`positive` of type"),
    ],
)
def test_parts_that_say_nothing_are_refused(made, words):
    with pytest.raises(TokenWeightsError, match=words):
        made()


@pytest.mark.parametrize(
    "made",
    [
        combine.Gate(rule=HIGH, when=combine.BatchMean(signal=SURPRISAL, above=1.0)),
        combine.Gate(rule=HIGH, when=combine.BatchMean(signal=SURPRISAL, below=1.0)),
        combine.Product(rules=(HIGH, combine.On(signal=SURPRISAL, rule=HIGH))),
    ],
)
@pytest.mark.parametrize("value", [NAN, -math.inf])
def test_an_inner_signal_is_finite(made, value):
    log_probs = batch().log_probs.clone()
    log_probs[1, 2] = value
    with pytest.raises(TokenWeightsError, match=r"`surprisal`: expected `scores` finite"):
        weights_of(made, given=batch(log_probs=log_probs))


# Ranks: the first has few tokens of high entropy and A > 0, the second many of low entropy, A < 0.

ROWS = 4
WIDE = torch.arange(10).expand(ROWS, 10) < torch.tensor([[2], [1], [10], [7]])


def whole():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(ROWS, 10, generator=generator) / 20
    level = torch.tensor([[0.8], [0.9], [0.1], [0.2]])
    return RolloutBatch(
        mask=WIDE,
        sample_ids=torch.tensor([4, 1, 3, 0]),
        prompt_ids=torch.tensor([1, 2, 2, 1]),
        predictive_entropy=level + noise,
        log_probs=-torch.rand(ROWS, 10, generator=generator),
        advantages=torch.tensor([[1.0], [2.0], [-1.0], [-0.5]]),
    )


SHARE = rules.Top(fraction=0.3, scope="batch", inside=2.0, outside=0.5)
CLOSED = combine.BatchMean(signal=ENTROPY, above=0.3)
OPEN = combine.BatchMean(signal=ENTROPY, below=0.3)
BETWEEN = combine.BatchMean(signal=ENTROPY, below=0.3, above=0.2)
OVER_RANKS = {
    "open": combine.Gate(rule=SHARE, when=OPEN),
    "between": combine.Gate(rule=SHARE, when=BETWEEN),
    "closed": combine.Gate(rule=SHARE, when=CLOSED, otherwise=rules.Bottom(scope="batch")),
    "steps": combine.Gate(rule=SHARE, when=combine.Steps(start=7)),
    "sign": combine.BySign(
        positive=dataclasses.replace(SHARE, sign="positive"),
        negative=field.AboveQuantile(quantile=0.5, scope="prompt"),
    ),
    "product": combine.Product(rules=(SHARE, combine.On(signal=SURPRISAL, rule=SHARE))),
    "on": combine.On(signal=combine.Ranked(signal=SURPRISAL), rule=SHARE),
    "nested": combine.Gate(
        rule=combine.BySign(positive=SHARE, negative=combine.Gate(rule=SHARE, when=OPEN)), when=OPEN
    ),
}


def outcomes(given):
    found = {}
    for name, rule in OVER_RANKS.items():
        made = Recipe(rule=rule, signal=ENTROPY if combine.needs_scores(rule) else None)
        found[name] = made.weighted(given, step=7).weights
    conditions = [when(given, step=7, group=given.group) for when in (OPEN, CLOSED, BETWEEN)]
    return found, conditions


def outcomes_of_a_rank(rank, size):
    own = whole().rows(range(2 * rank, 2 * rank + 2))
    alone = outcomes(own)[1]
    found, conditions = outcomes(dataclasses.replace(own, group=dist.group.WORLD))
    return found, conditions, alone


def test_ranks_decide_together():
    want, conditions = outcomes(whole())
    assert conditions == [True, False, True]
    parts = on_ranks(outcomes_of_a_rank, 2)
    assert [alone for *_, alone in parts] == [[False, True, False], [True, False, False]]
    for _, together, _ in parts:
        assert together == conditions
    for name, weights in want.items():
        assert torch.equal(torch.cat([found[name] for found, *_ in parts]), weights), name
        assert not torch.equal(weights, WIDE.float()), name

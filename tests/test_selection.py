"""Selections against a Python sort of (score, sample id, ordinal), in one process and on ranks."""

import math
from fractions import Fraction
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import Ranks
from strategies import FLOATS, layouts, sample_ids, scored_masks, values

import tokenweights as tw
from tokenweights import TokenWeightsError

SCOPES = ("response", "prompt", "batch")
SIDES = ("top", "bottom")
SIGNS = ("any", "positive", "negative")
FRACTIONS = st.sampled_from([0.0, 0.1, 0.2, 1 / 3, 0.5, 0.7, 0.9, 1.0])


# The reference: candidates of each set, in order.


def candidates(case):
    """For each set, sorted (score, sample id, ordinal, row, column) of its candidates."""
    scores, mask, options = case
    sign, advantages = options["sign"], options["advantages"].expand(mask.shape)
    keys = {
        "response": range(len(mask)),
        "prompt": options["prompt_ids"].tolist(),
        "batch": [0] * len(mask),
    }[options["scope"]]
    found = {key: [] for key in keys}
    for row, key in enumerate(keys):
        places = mask[row].nonzero().flatten().tolist()
        for ordinal, column in enumerate(places):
            advantage = advantages[row, column].item()
            if sign == "any" or (advantage > 0 if sign == "positive" else advantage < 0):
                score = scores[row, column].item() + 0.0  # -0.0 is 0.0
                number = options["sample_ids"][row].item()
                found[key].append((score, number, ordinal, row, column))
    return {key: sorted(tokens) for key, tokens in found.items()}


def marked(case, taken):
    """The mask of what `taken` takes of each set, as so many tokens from a side."""
    chosen = torch.zeros_like(case[1])
    for tokens in candidates(case).values():
        for *_, row, column in taken(tokens):
            chosen[row, column] = True
    return chosen


def from_side(tokens, side, count):
    return tokens[:count] if side == "bottom" else tokens[len(tokens) - count :]


def expected_selection(case, side, **rule):
    (name, value), *_ = rule.items()

    def taken(tokens):
        if name == "threshold":
            kept = [t for t in tokens if (t[0] >= value if side == "top" else t[0] <= value)]
            return kept
        share = Fraction(value).limit_denominator(1000)
        number = math.ceil(share * len(tokens)) if name == "fraction" else min(value, len(tokens))
        return from_side(tokens, side, number)

    return marked(case, taken)


def units(value, largest):
    """Whole units of 2**-30 of the power of two above the largest, rounded half to even."""
    return round(Fraction(value) * 2**30 / Fraction(2) ** math.frexp(largest)[1])


def expected_within(case, side, *, total=None, mean=None):
    def taken(tokens):
        if not tokens:
            return []
        largest = max(abs(token[0]) for token in tokens)
        budget = Fraction(total if mean is None else mean)
        budget = math.floor(budget * 2**30 / Fraction(2) ** math.frexp(largest)[1])
        best, mass = 0, 0
        for number, token in enumerate(tokens if side == "bottom" else tokens[::-1], start=1):
            mass += units(token[0], largest)
            if mass <= budget * (1 if mean is None else number):
                best = number
        return from_side(tokens, side, best)

    return marked(case, taken)


def expected_quantile(case, fraction):
    found = torch.full((len(case[1]), 1), torch.nan, dtype=torch.float64)
    sets = candidates(case)
    for row in range(len(case[1])):
        scope = case[2]["scope"]
        key = {"response": row, "prompt": case[2]["prompt_ids"][row].item(), "batch": 0}[scope]
        ordered = [Fraction(token[0]) for token in sets[key]]
        if ordered and (scope == "batch" or case[1][row].any()):
            at = (len(ordered) - 1) * fraction
            low, share = ordered[math.floor(at)], Fraction(at - math.floor(at))
            found[row] = float(low + (ordered[math.ceil(at)] - low) * share)
    return found


@st.composite
def cases(draw, max_batch=5, max_token=9):
    """Scores, their mask, and what says where each token belongs; scores of both signs."""
    scores, mask = draw(scored_masks(max_batch, max_token, dtypes=FLOATS))
    if draw(st.booleans()):
        scores = -scores
    elif draw(st.booleans()):  # near ties around zero, subnormal numbers among them
        scores = torch.where(mask, draw(values(mask.shape, scores.dtype)) - scores, torch.nan)
    kind = draw(st.sampled_from([1, mask.shape[1]]))
    numbers = st.lists(
        st.integers(-1, 1), min_size=len(mask) * kind, max_size=len(mask) * kind
    ).map(lambda drawn: torch.tensor(drawn, dtype=torch.float32).view(len(mask), kind))
    prompts = st.lists(st.integers(-1, 2), min_size=len(mask), max_size=len(mask))
    return scores, mask, {
        "scope": draw(st.sampled_from(SCOPES)),
        "sign": draw(st.sampled_from(SIGNS)),
        "advantages": draw(numbers),
        "prompt_ids": torch.tensor(draw(prompts), dtype=torch.int64),
        "sample_ids": draw(sample_ids(len(mask))),
    }  # fmt: skip


@st.composite
def rules(draw):
    """One of the ways to say how many tokens."""
    return draw(
        st.one_of(
            FRACTIONS.map(lambda drawn: {"fraction": drawn}),
            st.integers(0, 12).map(lambda drawn: {"count": drawn}),
            st.sampled_from([0.0, 0.25, 0.5, -0.5, math.inf]).map(lambda x: {"threshold": x}),
        )
    )


@st.composite
def budgets(draw):
    numbers = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 1.75, 3.0, 1e-300, math.inf])
    side, budget = draw(st.sampled_from(SIDES)), draw(numbers | st.floats(0, 5))
    if side == "top" or draw(st.booleans()):
        return {"side": side, "total": budget}
    return {"side": "bottom", "mean": draw(st.sampled_from([1, -1])) * budget / 2}


def selected(case, **rule):
    return tw.select(case[0], case[1], **case[2], **rule)


def within(case, **budget):
    scores, mask, options = case
    return tw.select_within(scores, mask, **options, **budget)


def quantile(case, fraction):
    options = {name: value for name, value in case[2].items() if name != "sample_ids"}
    return tw.score_quantile(case[0], case[1], fraction=fraction, **options)


def summable(case, budget):
    """The case with scores that are not negative, if the budget is of a sum."""
    scores, mask, options = case
    return (scores.abs() if "total" in budget else scores), mask, options


def finite_budget(budget):
    return all(not isinstance(value, float) or math.isfinite(value) for value in budget.values())


# By hand.

SCORES = torch.tensor([[0.9, 0.1, 0.5, torch.nan], [0.5, 0.7, 0.5, 0.2]])
MASK = torch.tensor([[True, True, True, False], [True] * 4])


def places(chosen):
    return [tuple(place) for place in chosen.nonzero().tolist()]


def test_by_hand():
    batch = {"scope": "batch", "sample_ids": torch.tensor([5, -5])}
    # In order: 0.1, 0.2, three times 0.5 (sample -5 has two of them, before sample 5), 0.7, 0.9.
    bottom = {"side": "bottom", **batch}
    assert places(tw.select(SCORES, MASK, count=2, **bottom)) == [(0, 1), (1, 3)]
    assert places(tw.select(SCORES, MASK, count=3, **bottom)) == [(0, 1), (1, 0), (1, 3)]
    assert places(tw.select(SCORES, MASK, count=4, **bottom)) == [(0, 1), (1, 0), (1, 2), (1, 3)]
    assert places(tw.select(SCORES, MASK, count=3, **batch)) == [(0, 0), (0, 2), (1, 1)]
    # 0.3 of 7 tokens is 2.1, and so 3 of them.
    assert places(tw.select(SCORES, MASK, fraction=0.3, **batch)) == [(0, 0), (0, 2), (1, 1)]
    assert places(tw.select(SCORES, MASK, threshold=0.5, side="bottom")) == [
        (0, 1), (0, 2), (1, 0), (1, 2), (1, 3)
    ]  # fmt: skip
    assert places(tw.select(SCORES, MASK, threshold=0.6)) == [(0, 0), (1, 1)]


def test_a_sign_narrows_and_counts_candidates():
    advantages = torch.tensor([[1.0], [-2.0]])
    options = {"scope": "batch", "advantages": advantages, "fraction": 0.5}
    positive = tw.select(SCORES, MASK, sign="positive", **options)
    assert places(positive) == [(0, 0), (0, 2)]  # 2 of 3
    assert places(tw.select(SCORES, MASK, sign="negative", **options)) == [(1, 1), (1, 2)]


def test_within_by_hand():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    for options, count in [
        ({"total": 0}, 0), ({"total": 2.99}, 1), ({"total": 3}, 2), ({"total": 10}, 4),
        ({"mean": 0.5}, 0), ({"mean": 1.5}, 2), ({"mean": 1.99}, 2), ({"mean": 2.5}, 4),
        ({"mean": math.inf}, 4), ({"total": math.inf}, 4),
    ]:  # fmt: skip
        chosen = tw.select_within(scores, mask, **options)
        assert chosen.tolist() == [[place < count for place in range(4)]], options
    chosen = tw.select_within(scores, mask, total=7.5, side="top")
    assert chosen.tolist() == [[False, False, True, True]]


def test_a_trust_region_of_second_moments():
    """M2PO keeps the longest ascending run of squared log-ratios of mean at most 0.04."""
    log_ratios = torch.tensor([[0.0, 0.1, -0.3, 1.0, -0.2, 0.4]])
    squares = log_ratios**2
    kept = tw.select_within(squares, torch.ones(1, 6, dtype=torch.bool), mean=0.04)
    # Means of 0, 0.01, 0.04, 0.09, 0.16 and 1 are 0, 0.005, 0.0167, 0.035, 0.06, 0.217.
    assert kept.tolist() == [[True, True, True, False, True, False]]


def test_quantiles_by_hand():
    by_response = tw.score_quantile(SCORES, MASK, fraction=0.5)
    torch.testing.assert_close(by_response, torch.tensor([[0.5], [0.5]]))
    of_batch = tw.score_quantile(SCORES, MASK, fraction=0.75, scope="batch")
    torch.testing.assert_close(of_batch, torch.tensor([[0.6], [0.6]]))  # between 0.5 and 0.7
    none = tw.score_quantile(SCORES, MASK & False, fraction=0.75, scope="batch")
    assert none.isnan().all() and none.shape == (2, 1)


def test_a_prompt_without_candidates_has_no_quantile():
    options = {"scope": "prompt", "prompt_ids": torch.tensor([1, 2])}
    advantages = torch.tensor([[1.0], [-1.0]])
    found = tw.score_quantile(
        SCORES, MASK, fraction=0.0, sign="positive", advantages=advantages, **options
    )
    torch.testing.assert_close(found, torch.tensor([[0.1], [torch.nan]]), equal_nan=True)


# Agreement with the reference.


@given(cases(), st.sampled_from(SIDES), rules())
def test_selections_agree_with_a_python_sort(case, side, rule):
    assert torch.equal(selected(case, side=side, **rule), expected_selection(case, side, **rule))


@given(cases(), budgets())
def test_budgets_agree_with_exact_sums(case, budget):
    case = summable(case, budget)
    if finite_budget(budget):
        assert torch.equal(within(case, **budget), expected_within(case, **budget))
    else:
        keeps = next(value for value in budget.values() if isinstance(value, float)) > 0
        assert torch.equal(within(case, **budget), selected(case, fraction=float(keeps)))


@given(cases(), st.floats(0, 1) | FRACTIONS)
def test_quantiles_agree_with_exact_order_statistics(case, fraction):
    found, expected = quantile(case, fraction), expected_quantile(case, fraction)
    double = case[0].dtype == torch.float64
    assert found.dtype == (torch.float64 if double else torch.float32)
    tolerance = {"rtol": 1e-12, "atol": 1e-15} if double else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(found.double(), expected, **tolerance, equal_nan=True)


@given(scored_masks(dtypes=FLOATS), st.floats(0, 1))
def test_quantiles_agree_with_torch(case, fraction):
    scores, mask = case
    found = tw.score_quantile(scores, mask, fraction=fraction)
    for row in range(len(mask)):
        if mask[row].any():
            expected = scores[row][mask[row]].double().quantile(fraction)
            torch.testing.assert_close(found[row, 0].double(), expected, rtol=1e-6, atol=1e-7)


@given(scored_masks(dtypes=FLOATS), FRACTIONS)
def test_within_a_response_it_is_the_fraction_of_the_partition(case, fraction):
    scores, mask = case
    for side, function in (("top", tw.top_fraction), ("bottom", tw.bottom_fraction)):
        chosen = tw.select(scores, mask, side=side, fraction=fraction)
        assert torch.equal(chosen, function(scores, mask, fraction=fraction))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_whole_range_of_a_type(dtype):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    ladder = [
        info.min,
        -1.0,
        -info.tiny,
        -tiny,
        0.0,
        tiny,
        info.tiny,
        1.0,
        1.0 + info.eps,
        info.max,
    ]
    scores = torch.tensor([ladder[::-1]], dtype=dtype)
    mask = torch.ones_like(scores, dtype=torch.bool)
    for count in range(11):
        chosen = tw.select(scores, mask, count=count, side="bottom")
        assert chosen.tolist() == [[place >= 10 - count for place in range(10)]]
        at = tw.score_quantile(scores, mask, fraction=min(count, 9) / 9)
        assert at.item() == pytest.approx(ladder[min(count, 9)], rel=1e-5)
    exact = tw.select_within(scores.abs(), mask, total=0.0)
    assert (exact.sum() >= 1) and not exact[0, 0]


def test_negative_zero_ties_with_zero():
    scores = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    chosen = tw.select(scores, mask, count=1, side="bottom")
    assert chosen.tolist() == [[True, False, False, False]]


def test_rows_longer_than_a_chunk(monkeypatch):
    monkeypatch.setattr("tokenweights.selection.BLOCK_TOKENS", 8)
    monkeypatch.setattr("tokenweights.selection.CHUNK_TOKENS", 100)  # two rows at a time
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 4, (3, 50), generator=generator) / 4
    mask = torch.rand(3, 50, generator=generator) < 0.8
    options = {
        "sign": "any",
        "advantages": torch.zeros(3, 1),
        "prompt_ids": torch.tensor([1, 0, 1]),
    }
    options["sample_ids"] = torch.tensor([3, 1, 2])
    for scope in SCOPES:
        case = scores, mask, {"scope": scope, **options}
        for side in SIDES:
            for count in (0, 7, 13, 31):
                chosen = selected(case, side=side, count=count)
                assert torch.equal(chosen, expected_selection(case, side, count=count))
            chosen = within(case, side=side, total=9.5)
            assert torch.equal(chosen, expected_within(case, side, total=9.5))
        found = quantile(case, 0.3).double()
        torch.testing.assert_close(found, expected_quantile(case, 0.3))


# Layouts.


@given(st.data(), cases(), st.sampled_from(SIDES), rules(), budgets())
def test_rows_and_padding_do_not_matter(data, case, side, rule, budget):
    layout = data.draw(layouts(len(case[1])))
    scores, mask, options = case
    kind = "batch" if options["advantages"].shape[1] != mask.shape[1] else "batch token"
    kind = "batch" if options["advantages"].shape[1] == 1 and mask.shape[1] != 1 else kind
    moved = (
        layout.moved(scores, "batch token"),
        layout.moved(mask, "batch token"),
        options
        | {name: layout.moved(options[name], "batch") for name in ("prompt_ids", "sample_ids")}
        | {"advantages": layout.moved(options["advantages"], kind)},
    )

    def restored(found):
        return layout.restored(found, "batch token")

    assert torch.equal(
        restored(selected(moved, side=side, **rule)), selected(case, side=side, **rule)
    )
    summed, moved_summed = summable(case, budget), summable(moved, budget)
    assert torch.equal(restored(within(moved_summed, **budget)), within(summed, **budget))
    torch.testing.assert_close(
        layout.restored(quantile(moved, 0.4), "batch"), quantile(case, 0.4),
        rtol=0, atol=0, equal_nan=True,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request):
    with Ranks(request.param) as pool:
        yield pool


@pytest.fixture(scope="module")
def two_ranks():
    with Ranks(2) as pool:
        yield pool


def local(counts, group):
    """A merge that leaves out what the other ranks have."""
    return counts


class CountedBytes:
    """Counts what is handed to the collectives that histograms and counts travel by."""

    def __enter__(self):
        self.bytes, self.reduce, self.gather = 0, dist.all_reduce, dist.all_gather

        def all_reduce(tensor, *arguments, **options):
            self.bytes += tensor.nbytes
            return self.reduce(tensor, *arguments, **options)

        def all_gather(received, tensor, *arguments, **options):
            self.bytes += tensor.nbytes
            return self.gather(received, tensor, *arguments, **options)

        dist.all_reduce, dist.all_gather = all_reduce, all_gather
        return self

    def __exit__(self, *_):
        dist.all_reduce, dist.all_gather = self.reduce, self.gather


def of_owner(case, rows):
    scores, mask, options = case
    of_rows = {name: options[name][rows] for name in ("advantages", "prompt_ids", "sample_ids")}
    return scores[rows], mask[rows], options | of_rows


def spread(rank, size, case, owners, side, rule, budget, mutated=False):
    """This rank's rows, what is chosen of them, and the bytes of `select`."""
    rows = [row for row, owner in enumerate(owners[: len(case[1])]) if owner % size == rank]
    scores, mask, options = of_owner(case, rows)
    case = scores, mask, options | {"group": dist.group.WORLD}
    merge = local if mutated else tw.selection._summed
    with mock.patch("tokenweights.selection._summed", merge):
        with CountedBytes() as counted:
            chosen = selected(case, side=side, **rule)
        kept = within(summable(case, budget), **budget)
        return rows, chosen, kept, quantile(case, 0.4), counted.bytes


def whole(parts, number, like):
    found = torch.empty(like.shape, dtype=like.dtype)
    for part in parts:
        found[part[0]] = part[number]
    return found


def in_one_process(case, side, rule, budget):
    chosen = selected(case, side=side, **rule)
    return chosen, within(summable(case, budget), **budget), quantile(case, 0.4)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=cases(),
    owners=st.lists(st.integers(0, 2), min_size=5, max_size=5),  # the last of four has no row
    side=st.sampled_from(SIDES),
    rule=rules(),
    budget=budgets(),
)
def test_ranks_choose_the_same_tokens_as_one_process(ranks, case, owners, side, rule, budget):
    parts = ranks(spread, case, owners, side, rule, budget)
    for number, expected in enumerate(in_one_process(case, side, rule, budget), start=1):
        found = whole(parts, number, expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def tied_case(dtype, scope, seed=0):
    """Few different scores, so that every cut goes through a tie."""
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randint(0, 3, (5, 12), generator=generator) / 4).to(dtype)
    mask = torch.rand(5, 12, generator=generator) < 0.9
    options = {
        "scope": scope,
        "sign": "any",
        "advantages": torch.zeros(5, 1),
        "prompt_ids": torch.tensor([3, 9, 3, 9, 3]),
        "sample_ids": torch.tensor([-7, 2**40, 0, 5, -(2**63)]),
    }
    return scores, mask, options


RULE, BUDGET = {"fraction": 0.37}, {"total": 4.0, "side": "top"}
OWNERS = [0, 1, 1, 0, 1]


@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_a_local_merge_is_noticed(two_ranks, scope):
    scores, *rest = tied_case(torch.float32, scope)
    case = scores + torch.tensor([OWNERS]).T / 4, *rest  # the ranks' scores lie differently
    expected = in_one_process(case, "top", RULE, BUDGET)
    for mutated in (False, True):
        parts = two_ranks(spread, case, OWNERS, "top", RULE, BUDGET, mutated)
        for number, want in enumerate(expected, start=1):
            assert torch.equal(whole(parts, number, want), want) == (not mutated)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("ties", [True, False])
def test_bytes_of_a_batch(two_ranks, dtype, ties):
    case = tied_case(dtype, "batch")
    rule = RULE
    if not ties:  # all of them, so that no tie is split
        rule = {"fraction": 1.0}
    said = tw.selection_bytes(dtype=dtype, ties=ties)
    assert said <= 64 * 1024
    for *_, counted in two_ranks(spread, case, OWNERS, "top", rule, BUDGET):
        assert counted == said
    larger = tuple(tensor.repeat(1, 50) for tensor in case[:2]) + case[2:]
    for *_, counted in two_ranks(spread, larger, OWNERS, "top", rule, BUDGET):
        assert counted == said


def bytes_within(rank, size, case):
    scores, mask, options = of_owner(case, [row for row in range(5) if OWNERS[row] == rank])
    with CountedBytes() as counted:
        within((scores, mask, options | {"group": dist.group.WORLD}), **BUDGET)
    return counted.bytes


def test_bytes_of_a_budget_stay_below_64_kib(two_ranks):
    found = two_ranks(bytes_within, tied_case(torch.float64, "batch"))
    assert found[0] == found[1] and 32 * 1024 < found[0] <= 64 * 1024


def found(call):
    try:
        return call()
    except TokenWeightsError as error:
        return str(error)


def refused(rank, size):
    scores, mask = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    group = dist.group.WORLD
    same = {"sample_ids": torch.tensor([7]), "scope": "batch", "group": group}
    return [
        found(lambda: tw.select(scores, mask, count=2, **same)),
        found(lambda: tw.select_within(scores + 1, mask, total=2, **same)),
        found(lambda: tw.select(scores, mask, count=2, scope="batch", group=group)),
        found(lambda: tw.select(scores, mask, count=2 + rank, **same)),
        # No tie is split: nothing has to be told apart.
        found(lambda: tw.select(scores, mask, count=8, **same)).tolist(),
        found(lambda: tw.select(scores + rank, mask, count=4, **same)).tolist(),
    ]


def test_what_ranks_cannot_decide_is_refused_on_all(two_ranks):
    answers = two_ranks(refused)
    for duplicate, within_budget, missing, different, every, half in answers:
        assert "`sample_ids` different where scores tie at the cut" in duplicate
        assert "`sample_ids` different where scores tie at the cut" in within_budget
        assert "2 responses of number 7" in duplicate
        assert "`sample_ids` given for the scope 'batch'" in missing
        assert "whose ranks all make the same call" in different
        assert every == [[True] * 4] and half in ([[True] * 4], [[False] * 4])
    assert answers[0][5] != answers[1][5]


# What is refused.


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("select", {}, "`fraction` alone, or `count` or `threshold`"),
        ("select", {"count": 1, "fraction": 0.5}, "`fraction` alone, or `count`"),
        ("select", {"count": -1}, "`count` >= 0"),
        ("select", {"fraction": 1.5}, r"`fraction` in \[0, 1\]"),
        ("select", {"threshold": math.nan}, "`threshold` a number"),
        ("select", {"count": 1, "scope": "prompt"}, "`prompt_ids` given"),
        ("select", {"count": 1, "sign": "positive"}, "`advantages` given"),
        ("select", {"count": 1, "scores": SCORES / 0}, "`scores` finite"),
        ("select_within", {}, "`total` alone, or `mean`"),
        ("select_within", {"total": -1.0}, "`total` >= 0"),
        ("select_within", {"total": math.nan}, "`total` >= 0"),
        ("select_within", {"mean": math.nan}, "`mean` a number"),
        ("select_within", {"mean": 0.5, "side": "top"}, "`side` 'bottom'"),
        ("select_within", {"total": 0.5, "scores": SCORES - 0.3}, "`scores` >= 0"),
        ("score_quantile", {"fraction": -0.5}, r"`fraction` in \[0, 1\]"),
        ("score_quantile", {"fraction": 0.5, "scope": "prompt"}, "`prompt_ids` given"),
    ],
)
def test_bad_arguments_are_refused(function, options, words):
    arguments = {"scores": SCORES, "mask": MASK} | options
    with pytest.raises(TokenWeightsError, match=f"`{function}`: expected {words}"):
        getattr(tw, function)(**arguments)


def test_a_score_that_is_not_finite_is_named_by_its_place():
    scores, advantages = torch.zeros(2, 2, 3)
    scores[1, 2] = advantages[1, 1] = torch.nan
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TokenWeightsError, match=r"`scores` finite .* nan at index \(1, 2\)"):
        tw.select(scores, mask, count=1)
    scores[1, 2] = 0.0
    with pytest.raises(TokenWeightsError, match=r"`advantages` finite .* at index \(1, 1\)"):
        tw.select(scores, mask, count=1, sign="positive", advantages=advantages)


def test_equal_sample_ids_that_tie_in_one_process():
    mask = torch.ones(2, 2, dtype=torch.bool)
    same = {"sample_ids": torch.tensor([4, 4]), "scope": "batch"}
    with pytest.raises(TokenWeightsError, match="2 responses of number 4"):
        tw.select(torch.zeros(2, 2), mask, count=1, **same)
    assert tw.select(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), mask, count=1, **same).sum() == 1
    by_prompt = same | {"scope": "prompt", "prompt_ids": torch.tensor([1, 2])}
    assert tw.select(torch.zeros(2, 2), mask, count=1, **by_prompt).sum() == 2


def test_bytes_are_of_floats():
    with pytest.raises(TokenWeightsError, match="`dtype` a float"):
        tw.selection_bytes(dtype=torch.int64)

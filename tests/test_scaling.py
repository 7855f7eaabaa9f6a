import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from strategies import FLOATS, layouts, scored_masks

import tokenweights as tw
from tokenweights import TokenWeightsError

SCALES = {"mean_one": tw.mean_one, "z_scores": tw.z_scores, "min_max": tw.min_max}
NEUTRAL = {"mean_one": 1.0, "z_scores": 0.0, "min_max": 0.5}
SCOPES = ["response", "prompt", "batch"]
ALL = torch.ones(1, 4, dtype=torch.bool)


def plain(name, scores, mask, scope, prompt_ids, advantages, sign, per):
    """The definitions token by token, in extended precision where the machine has it."""
    epsilon = torch.finfo(torch.promote_types(scores.dtype, torch.float32)).eps
    scores, mask, advantages = scores.double().numpy(), mask.numpy(), advantages.numpy()
    keys = {"response": range(len(mask)), "prompt": prompt_ids.tolist(), "batch": [0] * len(mask)}
    result = np.zeros(mask.shape)
    for row, key in enumerate(keys[scope]):
        sample, largest = [], 0.0
        for other, its in enumerate(keys[scope]):
            wanted = {"any": mask, "positive": advantages > 0, "negative": advantages < 0}[sign]
            values = scores[other][mask[other] & wanted[other]].astype(np.longdouble)
            if its == key and values.size:
                equal = (values == values[0]).all()
                mean = values[0] if equal else values.mean()
                sample += [mean] if per == "response" else list(values)
                largest = max(largest, np.abs(values).max())
        x, sample = scores[row].astype(np.longdouble), np.array(sample, dtype=np.longdouble)
        if per == "response" and name != "mean_one" and sample.size:
            tied = np.ptp(sample) <= 8 * epsilon * largest
            sample = np.full_like(sample, sample[0]) if tied else sample
        with np.errstate(all="ignore"):
            if not sample.size or ((sample == sample[0]).all() and name != "mean_one"):
                mapped = np.full(x.shape, NEUTRAL[name])
            elif name == "mean_one":
                mapped = x / sample.mean() if sample.max() > 0 else np.ones(x.shape)
            elif name == "z_scores":
                mapped = (x - sample.mean()) / sample.std()
            else:
                mapped = (x - sample.min()) / (sample.max() - sample.min())
            limit = np.finfo(np.float32).max
            result[row] = np.where(mask[row], np.clip(mapped, -limit, limit), 0)
    return result


def test_scales_by_hand():
    scores = torch.tensor([[1.0, 1.0, 3.0, 3.0], [6.0, 6.0, 6.0, math.nan]])
    mask = ~scores.isnan()
    one = tw.mean_one(scores, mask, scope="response")
    assert one.tolist() == [[0.5, 0.5, 1.5, 1.5], [1.0, 1.0, 1.0, 0.0]]
    z = tw.z_scores(scores, mask, scope="response")
    assert z.tolist() == [[-1.0, -1.0, 1.0, 1.0], [0.0] * 4]
    unit = tw.min_max(scores, mask, scope="response")
    assert unit.tolist() == [[0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.0]]
    # Over the batch the mean is 26 / 7; over responses that count once it is (2 + 6) / 2.
    torch.testing.assert_close(tw.mean_one(scores, mask)[0, 0], torch.tensor(7 / 26))
    assert tw.mean_one(scores, mask, per="response")[1].tolist() == [1.5, 1.5, 1.5, 0.0]
    # The responses' means are 2 and 6, whatever their lengths: 4 in the middle, 2 apart.
    z = tw.z_scores(scores, mask, per="response")
    assert z.tolist() == [[-1.5, -1.5, -0.5, -0.5], [1.0, 1.0, 1.0, 0.0]]


def test_prompts_and_signs_by_hand():
    scores = torch.tensor([[1.0, 2.0], [3.0, 6.0], [10.0, 30.0]])
    mask, prompt_ids = torch.ones(3, 2, dtype=torch.bool), torch.tensor([7, 7, -(2**60)])
    options = {"scope": "prompt", "prompt_ids": prompt_ids}
    one = tw.mean_one(scores, mask, **options)
    torch.testing.assert_close(one, scores / torch.tensor([[3.0], [3.0], [20.0]]))
    advantages = torch.tensor([[1.0], [-1.0], [0.0]])
    one = tw.mean_one(scores, mask, advantages=advantages, sign="positive", **options)
    # Only the first response has the sign; the other to its prompt is mapped by the same mean.
    torch.testing.assert_close(one[:2], scores[:2] / 1.5)
    assert one[2].tolist() == [1.0, 1.0]
    unit = tw.min_max(scores, mask, advantages=advantages, sign="positive", **options)
    assert unit.tolist() == [[0.0, 1.0], [2.0, 5.0], [0.5, 0.5]]


@pytest.mark.parametrize("name", SCALES)
@given(case=scored_masks(dtypes=FLOATS), data=st.data())
def test_scales_agree_with_numpy(name, case, data):
    scores, mask = case
    ids = data.draw(st.lists(st.integers(0, 1), min_size=len(mask), max_size=len(mask)))
    signs = st.sampled_from([-0.5, 0.0, 2.0])
    drawn = data.draw(st.lists(signs, min_size=len(mask), max_size=len(mask)))
    advantages = torch.tensor(drawn, dtype=torch.float64).view(-1, 1)
    if data.draw(st.booleans()):  # of each token: every second one has the other sign
        advantages = advantages * (1 - 2 * (torch.arange(mask.shape[1]) % 2))
    options = {
        "scope": data.draw(st.sampled_from(SCOPES)),
        "prompt_ids": torch.tensor(ids, dtype=torch.int64),
        "advantages": advantages,
        "sign": data.draw(st.sampled_from(["any", "positive", "negative"])),
        "per": data.draw(st.sampled_from(["token", "response"])),
    }
    scaled = SCALES[name](scores, mask, **options)
    assert scaled.dtype == torch.promote_types(scores.dtype, torch.float32)
    assert scaled.isfinite().all() and (scaled[~mask] == 0).all()
    options["advantages"] = advantages.expand(mask.shape)
    expected = plain(name, scores, mask, **options)
    if scaled.dtype == torch.float32:
        expected = expected.astype(np.float32)
    same = np.isclose(scaled.numpy(), expected, rtol=1e-5, atol=1e-6)
    # Far outside of the sample, float64 may have reached further than float32's largest.
    assert (same | (np.abs(expected) >= np.finfo(np.float32).max)).all()


@given(scored_masks(dtypes=FLOATS))
def test_moments_and_bounds_of_what_is_scaled(case):
    scores, mask = case
    count = int(mask.sum())
    one, z, unit = (scale(scores, mask).double()[mask] for scale in SCALES.values())
    if count:
        assert one.mean().item() == pytest.approx(1) and (one >= 0).all()
        assert z.mean().item() == pytest.approx(0, abs=1e-5)
        assert (z.abs() <= math.sqrt(count - 1) * (1 + 1e-6)).all()
        assert (z == 0).all() or z.square().mean().item() == pytest.approx(1, rel=1e-5)
        assert unit.min() >= 0 and unit.max() <= 1
        assert (unit == 0.5).all() or (unit.min() == 0 and unit.max() == 1)


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 1e6 + 0.3, 1e-310, 0.0, 1.7e308])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("per", ["token", "response"])
@pytest.mark.parametrize("name", SCALES)
def test_equal_scores_leave_no_rounding_residue(name, per, scope, constant):
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4, [True] + [False] * 6, [False] * 7])
    scores = torch.full((4, 7), constant, dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, 1])
    scaled = SCALES[name](scores, mask, scope=scope, per=per, prompt_ids=ids)
    assert (scaled[mask] == NEUTRAL[name]).all() and (scaled[~mask] == 0).all()


@st.composite
def tied_responses(draw):
    """Responses of the same tokens, in any order and at any columns, twice over or not."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    number = st.floats(-1, 1, width=32) | st.sampled_from([0.1, 0.2, 0.3, 0.7, 1 / 3])
    tokens = draw(st.lists(number, min_size=1, max_size=6))
    scale = draw(st.sampled_from([1.0, 1e-30, 1e20]))
    rows, count = [], draw(st.integers(2, 4))
    for _ in range(count):
        order = draw(st.permutations(tokens * draw(st.integers(1, 3))))
        before = draw(st.integers(0, 5))
        rows.append([math.nan] * before + [token * scale for token in order])
    width = max(map(len, rows)) + draw(st.integers(0, 3))
    rows = [row + [math.nan] * (width - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", ["z_scores", "min_max"])
@given(scores=tied_responses())
def test_responses_of_the_same_tokens_are_equal_on_any_layout(name, scores):
    mask, ids = ~scores.isnan(), torch.zeros(len(scores), dtype=torch.long)
    for scope in ("prompt", "batch"):
        scaled = SCALES[name](scores, mask, scope=scope, prompt_ids=ids, per="response")
        assert (scaled[mask] == NEUTRAL[name]).all()


def test_means_that_tie_but_for_rounding_are_equal_scores():
    # In float32 and in float64 the mean of 0.1 and 0.3 is not quite 0.2.
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor([[0.1, 0.3], [0.2, 0.2]], dtype=dtype)
        mask = torch.ones(2, 2, dtype=torch.bool)
        assert tw.z_scores(scores, mask, per="response").tolist() == [[0.0, 0.0]] * 2
        assert tw.min_max(scores, mask, per="response").tolist() == [[0.5, 0.5]] * 2
        # A hundredth of a percent is no rounding.
        scores[1] *= 1.0001
        assert tw.z_scores(scores, mask, per="response")[1].tolist() == pytest.approx([1, 1], 1e-2)


@given(scored_masks(dtypes=[torch.float32, torch.float64]), st.data())
def test_scores_of_responses_are_the_same_on_any_layout(case, data):
    """Tokens move to other columns, and a score that is constant over each stays in its bounds."""
    scores, mask = case
    width = 2 * mask.shape[1] + 1
    columns = torch.tensor(
        [data.draw(st.permutations(range(width)))[: mask.shape[1]] for _ in mask],
        dtype=torch.long,
    ).view(mask.shape)
    moved = scores.new_full((len(mask), width), math.nan).scatter(1, columns, scores)
    elsewhere = torch.zeros(moved.shape, dtype=torch.bool).scatter(1, columns, mask)
    constant = torch.where(mask, scores[:, :1].nan_to_num(), 0.0)
    for name, scale in SCALES.items():
        whole = scale(scores, mask, per="response")
        again = scale(moved, elsewhere, per="response").gather(1, columns)
        assert torch.equal(again, whole), name
    z = tw.z_scores(constant, mask, per="response").double()
    count = max(int(mask.any(-1).sum()), 1)
    assert (z.abs() <= math.sqrt(count - 1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", SCALES)
def test_one_token_and_no_token(name):
    lone = torch.tensor([[False, True], [False, False]])
    scores = torch.tensor([[math.nan, 0.7], [math.inf, -math.inf]])
    assert SCALES[name](scores, lone, scope="response").tolist() == [[0, NEUTRAL[name]], [0, 0]]
    for shape in ((0, 3), (2, 0), (0, 0)):
        empty = torch.zeros(shape)
        ids = torch.zeros(shape[0], dtype=torch.long)
        for scope in SCOPES:
            for per in ("token", "response"):
                options = {"scope": scope, "per": per, "prompt_ids": ids}
                assert SCALES[name](empty, empty.bool(), **options).shape == shape
    ids = torch.tensor([3, 4])  # no prompt has a token
    nothing = SCALES[name](scores, lone & False, scope="prompt", prompt_ids=ids)
    assert (nothing == 0).all()


@pytest.mark.parametrize("offset", [1e6, -1e6, 1e12])
@pytest.mark.parametrize("scope", ["batch", "response"])
def test_a_large_offset_costs_no_digits(offset, scope):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(50, 200, generator=generator, dtype=torch.float64)
    mask = torch.rand(50, 200, generator=generator) < 0.8
    z = tw.z_scores(noise + offset, mask, scope=scope)
    tolerance = 16 * abs(offset) * torch.finfo(torch.float64).eps
    torch.testing.assert_close(
        z, tw.z_scores(noise, mask, scope=scope), atol=tolerance, rtol=tolerance
    )


def test_one_score_far_from_many():
    scores = torch.full((100, 1000), 1e6, dtype=torch.float64)
    scores += torch.linspace(0, 1e-3, 1000, dtype=torch.float64)
    scores[0, 0] = 0.0
    z = tw.z_scores(scores, torch.ones(100, 1000, dtype=torch.bool)).numpy()
    wide = scores.numpy().astype(np.longdouble)
    expected = ((wide - wide.mean()) / wide.std()).astype(np.float64)
    np.testing.assert_allclose(z, expected, rtol=1e-6, atol=1e-9)


def test_scores_at_the_end_of_their_type():
    top = torch.finfo(torch.float64).max
    scores = torch.tensor([[-top, top, 0.0, 0.0]], dtype=torch.float64)
    assert tw.min_max(scores, ALL).tolist() == [[0.0, 1.0, 0.5, 0.5]]
    root = math.sqrt(2)
    z = tw.z_scores(scores, ALL)
    torch.testing.assert_close(z, torch.tensor([[-root, root, 0, 0]], dtype=torch.float64))
    scores = torch.tensor([[top, top, 0.0, top]], dtype=torch.float64)
    torch.testing.assert_close(tw.mean_one(scores, ALL), (scores > 0).double() * 4 / 3)
    halves = torch.full((1, 4), 60000.0, dtype=torch.float16)
    halves[0, 0] = 0
    assert tw.mean_one(halves, ALL).tolist()[0] == pytest.approx([0, 4 / 3, 4 / 3, 4 / 3])
    tiny = torch.tensor([[0.0, 5e-324, 5e-324, 0.0]], dtype=torch.float64)
    assert tw.z_scores(tiny, ALL).tolist() == [[-1.0, 1.0, 1.0, -1.0]]
    # A token of the other sign far outside of the extrema stays finite.
    scores = torch.tensor([[0.0, 1e-30, 0.0, 1e30]])
    signs = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    far = tw.min_max(scores, ALL, advantages=signs, sign="positive")
    assert far[0, 3] == torch.finfo(torch.float32).max


@pytest.mark.parametrize("name", SCALES)
@given(case=scored_masks(), data=st.data())
def test_order_of_rows_and_padding_do_not_show(name, case, data):
    scores, mask = case
    layout = data.draw(layouts(len(mask)))
    ids = torch.arange(len(mask)) % 2
    for scope in SCOPES:
        whole = SCALES[name](scores, mask, scope=scope, prompt_ids=ids)
        moved = SCALES[name](
            layout.moved(scores, "batch token"),
            layout.moved(mask, "batch token"),
            scope=scope,
            prompt_ids=layout.moved(ids, "batch") - 5,
        )
        restored = layout.restored(moved, "batch token")
        torch.testing.assert_close(restored, whole, rtol=1e-12, atol=1e-12)


def test_results_are_detached_and_inputs_left_alone():
    scores = torch.rand(1, 4, requires_grad=True)
    before = scores.detach().clone()
    assert not any(scale(scores, ALL).requires_grad for scale in SCALES.values())
    assert not tw.bounded_map(scores).requires_grad and torch.equal(scores.detach(), before)


def test_chunks_of_rows_make_no_difference(monkeypatch):
    scores, mask = torch.rand(9, 7, dtype=torch.float64), torch.rand(9, 7) < 0.7
    options = {"prompt_ids": torch.arange(9) % 4, "scope": "prompt", "per": "response"}
    whole = [scale(scores, mask, **options) for scale in SCALES.values()]
    monkeypatch.setattr("tokenweights.masked.CHUNK_TOKENS", 14)
    parts = [scale(scores, mask, **options) for scale in SCALES.values()]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tw.bounded_map(scores, slope=2.0), 2 * scores)


# Rows of each rank: uneven, and one rank without a row, one with a row without a token.
ROWS = {
    1: [range(0, 6)],
    2: [range(0, 5), range(5, 6)],
    4: [range(0, 2), range(2, 2), range(2, 3), range(3, 6)],
}


def whole_batch():
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(6, 9, generator=generator) * 0.1 + 1000
    mask = torch.rand(6, 9, generator=generator) < 0.7
    mask[2] = False  # the only row of a rank
    advantages = torch.randn(6, 1, generator=generator)
    return scores.masked_fill(~mask, math.nan), mask, advantages, torch.tensor([4, 9, 77, 9, 4, 4])


def every_scale(rows, group):
    scores, mask, advantages, ids = (each[list(rows)] for each in whole_batch())
    flat = torch.where(mask, 0.1, torch.nan).double()
    return [
        scale(given, mask, scope=scope, prompt_ids=ids, advantages=advantages, sign=sign, per=per,
              group=group)
        for scale in SCALES.values()
        for given in (scores, flat)
        for scope in SCOPES
        for sign in ("any", "positive", "negative")
        for per in ("token", "response")
    ]  # fmt: skip


def scaled_on(rank, size):
    return every_scale(ROWS[size][rank], dist.group.WORLD)


@pytest.mark.parametrize("size", ROWS)
def test_ranks_scale_as_one_process_does(size):
    whole = every_scale(range(6), None)
    with Ranks(size) as ranks:
        parts = ranks(scaled_on)
    for place, expected in enumerate(whole):
        joined = torch.cat([part[place] for part in parts])
        # Equal scores give the same bits, whatever the ranks.
        bound = 0 if place // 18 % 2 else 2e-5
        torch.testing.assert_close(joined, expected, rtol=bound, atol=bound)


def test_bounded_maps_by_hand():
    values = torch.tensor([[-2.0, 0.0, 1.0, math.nan]])
    line = tw.bounded_map(values, slope=-0.5, offset=0.25, scale=2.0, high=2.0)
    np.testing.assert_equal(line.numpy(), [[2.0, 0.5, 0.0, math.nan]])
    power = tw.bounded_map(values, shape="exponential", slope=math.log(2), scale=3.0, low=1.0)
    np.testing.assert_allclose(power.numpy(), [[1.0, 3.0, 6.0, math.nan]], rtol=1e-6)
    step = tw.bounded_map(values, shape="sigmoid", slope=math.log(3), scale=2.0, high=1.25)
    np.testing.assert_allclose(step.numpy(), [[0.2, 1.0, 1.25, math.nan]], rtol=1e-6)


@given(
    scored_masks(dtypes=FLOATS),
    st.sampled_from(["linear", "exponential", "sigmoid"]),
    st.floats(-20, 20),
    st.floats(-5, 5),
    st.floats(-3, 3),
    st.floats(-4, 0),
    st.none() | st.floats(0, 4),
)
def test_bounded_maps_agree_with_numpy(case, shape, slope, offset, scale, low, high):
    values, mask = case
    options = {"slope": slope, "offset": offset, "scale": scale, "low": low, "high": high}
    mapped = tw.bounded_map(values, shape=shape, **options)
    assert mapped.dtype == torch.promote_types(values.dtype, torch.float32)
    line = slope * values.double().numpy()[mask.numpy()] + offset
    with np.errstate(over="ignore"):
        forms = {"linear": line, "exponential": np.exp(line), "sigmoid": 1 / (1 + np.exp(-line))}
    expected = np.clip(scale * forms[shape], low, np.inf if high is None else high)
    np.testing.assert_allclose(mapped[mask].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", ["linear", "exponential", "sigmoid"])
@pytest.mark.parametrize("scale", [0.0, 1e300, -1e300])
@pytest.mark.parametrize("slope", [0.0, 1e300, -1e300])
def test_bounded_maps_of_the_widest_values_are_finite(shape, slope, scale, dtype):
    top = torch.finfo(dtype).max
    values = torch.tensor([[-math.inf, -top, 0.0, top, math.inf]], dtype=dtype)
    options = {"shape": shape, "slope": slope, "scale": scale, "low": -math.inf}
    assert tw.bounded_map(values, **options).isfinite().all()


ONE = torch.tensor([[1.0, 2.0, 3.0, 4.0]])


@pytest.mark.parametrize(
    "make",
    [
        lambda: tw.mean_one(-ONE, ALL),
        lambda: tw.z_scores(ONE * math.nan, ALL),
        lambda: tw.min_max(ONE * math.inf, ALL),
        lambda: tw.z_scores(ONE, ALL, scope="prompt"),
        lambda: tw.z_scores(ONE, ALL, sign="negative"),
        lambda: tw.z_scores(ONE, ALL, sign="negative", advantages=ONE * math.nan),
        lambda: tw.z_scores(ONE, ALL, scope="rollout"),
        lambda: tw.z_scores(ONE, ALL, per="row"),
        lambda: tw.bounded_map(ONE, shape="tanh"),
        lambda: tw.bounded_map(ONE, low=1.0, high=0.5),
        lambda: tw.bounded_map(ONE, low=math.nan),
        lambda: tw.bounded_map(ONE, slope=math.inf),
        lambda: tw.bounded_map(ONE, scale=math.nan),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(TokenWeightsError, match="expected"):
        make()

"""The exactness contract: the same batch gives the same weights, loss and gradients on any layout.

Every layout below runs the library's own path from queries and keys to parameter gradients and is
compared with one process that holds the whole batch right-padded. A token is scored by its row of
attention, entropy or distance, or by its column. `test_a_local_merge_is_noticed` and its like
replace each merge by a local statistic and expect the comparison to fail.
"""

import functools
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import tokenweights as tw

FEATURES, HEADS, KV_HEADS, DIM = 6, 4, 2, 4
RECIPES = {
    "low2high": {"name": "low2high", "temperature": 0.3},
    "literal": {"name": "low2high", "form": "literal", "eps": 1e-2},
    "mass": {"name": "high2low", "match_mass": True},
    "anchor20": {"name": "anchor20"},
    "random20": {"name": "random20"},
    "weight_sum": {"name": "static_explorer", "denominator": "weight_sum"},
}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
STEP = 30


@dataclass(frozen=True)
class Sample:
    """One prompt and response: a feature vector for each of its tokens."""

    number: int
    features: Tensor
    prompt_length: int
    advantage: float

    @property
    def response_length(self) -> int:
        return len(self.features) - self.prompt_length


def samples(seed: int, lengths: list[tuple[int, int]], dtype: torch.dtype) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Sample(
            number,
            torch.randn(prompt + response, FEATURES, generator=generator, dtype=dtype),
            prompt,
            float(torch.randn((), generator=generator)),
        )
        for number, (prompt, response) in enumerate(lengths)
    ]


@dataclass(frozen=True)
class Reading:
    """What is read of attention: `entropy`, `distance`, or what is `received` from responses."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, form: str, *values: Tensor, asked: Tensor, **known: Any) -> Tensor:
        """The reading by one form of the library's function; `asked` is True at response tokens."""
        rows = {"rows": asked} if self.kind == "received" else {}
        return getattr(tw, form.format(self.kind))(*values, **rows, **self.options, **known)

    def aligned(self, values: Tensor, **where: Any) -> Tensor:
        """Values of positions as values of the response tokens that they score."""
        align = tw.align_to_decision if self.kind == "entropy" else tw.align_to_own
        return align(values, **where)


ENTROPY = Reading("entropy")
READINGS = {
    "entropy": ENTROPY,
    "distance": Reading("distance", {"bound": 3}),
    "received": Reading("received"),
    "received soon": Reading("received", {"horizon": (1, 3), "reduction": "sum", "heads": (0, 3)}),
    "largest received": Reading("received", {"horizon": (1, None), "reduction": "max"}),
}


class Policy(torch.nn.Module):
    """Queries and keys for the probe, log-probabilities for the loss."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(7)

        def matrix(width: int) -> Tensor:
            return torch.randn(FEATURES, width, generator=generator, dtype=dtype)

        self.query, self.key = matrix(HEADS * DIM), matrix(KV_HEADS * DIM)
        self.hidden = torch.nn.Parameter(matrix(5))
        self.output = torch.nn.Parameter(torch.randn(5, generator=generator, dtype=dtype))

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        query = (features @ self.query).unflatten(-1, (HEADS, DIM))
        return query, (features @ self.key).unflatten(-1, (KV_HEADS, DIM))

    def log_probs(self, features: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid((features @ self.hidden).tanh() @ self.output)


@dataclass(frozen=True)
class Rows:
    """Response-aligned rows of some samples, whatever layout they came from."""

    scores: Tensor
    mask: Tensor
    log_probs: Tensor
    advantages: Tensor
    numbers: Tensor


def right_padded(policy: Policy, batch: list[Sample], reading: Reading) -> Rows:
    features, key_mask = padded([s.features for s in batch])
    query, key = (heads.transpose(1, 2) for heads in policy.heads(features))
    read = reading("attention_{}", query, key, asked=answers(batch), key_mask=key_mask)
    return rows(batch, decided(batch, read, reading), decided(batch, policy.log_probs(features)))


def answers(batch: list[Sample]) -> Tensor:
    """True at the response tokens of right-padded sequences."""
    places = [torch.arange(len(s.features)) >= s.prompt_length for s in batch]
    return padded(places)[0]


def decided(batch: list[Sample], values: Tensor, reading: Reading = ENTROPY) -> Tensor:
    """The values of right-padded sequences at the positions that score the response tokens."""
    return reading.aligned(
        values,
        response_length=max(s.response_length for s in batch),
        prompt_length=torch.tensor([s.prompt_length for s in batch]),
    )


def left_padded(policy: Policy, batch: list[Sample], reading: Reading) -> Rows:
    """Prompts end, and responses start, in the same column of every row, as trainers have it."""
    prompt = max(s.prompt_length for s in batch)
    width = max(s.response_length for s in batch)
    features = torch.full((len(batch), prompt + width, FEATURES), torch.nan)
    features = features.to(batch[0].features.dtype)
    for row, sample in enumerate(batch):
        start = prompt - sample.prompt_length
        features[row, start : start + len(sample.features)] = sample.features
    key_mask = ~features.isnan().any(-1)
    query, key = (heads.transpose(1, 2) for heads in policy.heads(features))
    # The queries of the response and the one before.
    asked = key_mask[:, -width - 1 :].clone()
    asked[:, 0] = False
    read = reading("attention_{}", query[:, :, -width - 1 :], key, asked=asked, key_mask=key_mask)
    # Padding must not poison the gradient either, so the policy never sees it.
    log_probs = policy.log_probs(torch.where(key_mask[..., None], features, 0.0))
    own = reading.aligned(read, response_length=width)
    return rows(batch, own, tw.align_to_decision(log_probs, response_length=width))


def packed(policy: Policy, batch: list[Sample], reading: Reading) -> Rows:
    """Sequences in one row, which the position numbers tell apart."""
    features = torch.cat([s.features for s in batch])
    numbers = torch.cat([torch.arange(len(s.features)) for s in batch])
    read = reading("packed_{}", *policy.heads(features), numbers, asked=in_one_row(batch))
    return taken_apart(batch, read, policy.log_probs(features), reading)


def cut(policy: Policy, batch: list[Sample], reading: Reading) -> Rows:
    """Sequences in one row, which their bounds tell apart."""
    if reading.kind == "distance":  # is given position numbers only
        return packed(policy, batch, reading)
    features = torch.cat([s.features for s in batch])
    bounds = torch.tensor([0, *(len(s.features) for s in batch)]).cumsum(0)
    edges = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    read = reading("attention_{}_varlen", *policy.heads(features), asked=in_one_row(batch), **edges)
    return taken_apart(batch, read, policy.log_probs(features), reading)


def in_one_row(batch: list[Sample]) -> Tensor:
    """True at the response tokens of packed sequences."""
    return torch.cat([torch.arange(len(s.features)) >= s.prompt_length for s in batch])


def taken_apart(batch: list[Sample], read: Tensor, log_probs: Tensor, reading: Reading) -> Rows:
    """Rows of the response tokens of packed sequences."""
    lengths = [len(s.features) for s in batch]
    read, log_probs = (padded(values.split(lengths))[0] for values in (read, log_probs))
    return rows(batch, decided(batch, read, reading), decided(batch, log_probs))


LAYOUTS = {"right": right_padded, "left": left_padded, "packed": packed, "cut": cut}


def padded(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    mask = pad_sequence([torch.ones(len(p), dtype=torch.bool) for p in parts], batch_first=True)
    return pad_sequence(parts, batch_first=True), mask


def rows(batch: list[Sample], scores: Tensor, log_probs: Tensor) -> Rows:
    lengths = torch.tensor([s.response_length for s in batch])[:, None]
    mask = torch.arange(scores.shape[1]) < lengths
    # Whatever stands under the mask must not matter.
    return Rows(
        torch.where(mask, scores, torch.nan),
        mask,
        log_probs,
        torch.tensor([s.advantage for s in batch], dtype=log_probs.dtype)[:, None],
        torch.tensor([s.number for s in batch]),
    )


def no_rows(policy: Policy, dtype: torch.dtype) -> Rows:
    """A rank without a single response still has to enter every collective."""
    nothing = torch.zeros(0, 3, dtype=dtype)
    log_probs = policy.log_probs(torch.zeros(0, 3, FEATURES, dtype=dtype))
    return Rows(
        nothing, nothing.bool(), log_probs, nothing[:, :1], torch.zeros(0, dtype=torch.long)
    )


def token_loss(own: Rows, weights: Tensor) -> Tensor:
    old = own.log_probs.detach() - 0.1
    advantages = own.advantages * weights
    return tw.clipped_surrogate_loss(own.log_probs, old, advantages, mask=own.mask)


def outcome(
    policy: Policy,
    own: Rows,
    recipe: tw.Recipe,
    *,
    group: dist.ProcessGroup | None = None,
    mine: Tensor | None = None,
    micro_batch: int | None = None,
) -> tuple[dict[int, Tensor], Tensor, list[Tensor], Tensor, float]:
    """Weights by sample; this rank's share of loss, gradients and absolute loss; scores' range."""
    scores = None if recipe.signal is None else own.scores
    weights = recipe.token_weights(scores, own.mask, step=STEP, sample_ids=own.numbers, group=group)
    count = tw.loss_denominator(own.mask, weights, denominator=recipe.denominator, group=group)
    counted = own.mask if mine is None else own.mask & mine
    losses = token_loss(own, weights)
    step = micro_batch or max(len(losses), 1)
    loss = sum(
        (
            tw.weighted_token_mean(losses[at : at + step], counted[at : at + step], count=count)
            for at in range(0, len(losses), step)
        ),
        losses.sum() * 0,
    )
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    by_sample = {
        int(number): row[valid]
        for number, row, valid in zip(own.numbers, weights, own.mask, strict=True)
    }
    absolute = tw.weighted_token_mean(losses.abs(), counted, count=count)
    valid = own.scores[own.mask]
    spread = float(valid.max() - valid.min()) if valid.numel() else 0.0
    return by_sample, loss.detach(), list(gradients), absolute.detach(), spread


def expected(batch: list[Sample], recipe: tw.Recipe, dtype: torch.dtype, reading: Reading):
    policy = Policy(dtype)
    return outcome(policy, right_padded(policy, batch, reading), recipe)


def agree(got, want, dtype: torch.dtype) -> bool:
    """Whether weights and gradients agree relative to their largest entry, the loss to its terms.

    Terms of both signs cancel in the loss, and how far rounding then goes depends on their size.
    Scores are float32, and a rule may stretch their range to [0, 1], and their rounding with it.
    """
    *_, absolute, spread = want
    tolerance = TOLERANCE[dtype] / min(max(spread, 1e-3), 1.0)
    if float((got[1] - want[1]).abs()) > tolerance * max(float(absolute), 1e-3):
        return False
    pairs = [tuple(torch.cat([weights[n] for n in want[0]]) for weights in (got[0], want[0]))]
    pairs += zip(got[2], want[2], strict=True)
    for one, other in pairs:
        scale = max(float(other.abs().max()), 1e-3) if other.numel() else 1.0
        if other.numel() and float((one - other).abs().max()) > tolerance * scale:
            return False
    return True


def merged(parts):
    """The whole batch's outcome from those of its parts."""
    weights = {number: row for part in parts for number, row in part[0].items()}
    return (
        weights,
        sum(part[1] for part in parts),
        [sum(gradients) for gradients in zip(*(part[2] for part in parts), strict=True)],
        sum(part[3] for part in parts),
        max(part[4] for part in parts),
    )


LENGTHS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 7)), min_size=1, max_size=6).filter(
    lambda lengths: sum(response for _, response in lengths) > 1
)
SEEDS = st.integers(0, 10_000)
DTYPES = st.sampled_from([torch.float64, torch.float32])
NAMES = st.sampled_from(sorted(RECIPES))
each_reading = pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS.keys())


@each_reading
@given(
    seed=SEEDS,
    lengths=LENGTHS,
    dtype=DTYPES,
    name=NAMES,
    layout=st.sampled_from(sorted(LAYOUTS)),
    turn=st.integers(0, 5),
)
def test_padding_packing_and_order_of_rows(reading, seed, lengths, dtype, name, layout, turn):
    batch, recipe, policy = samples(seed, lengths, dtype), tw.recipe(RECIPES[name]), Policy(dtype)
    turned = batch[turn:] + batch[:turn]
    got = outcome(policy, LAYOUTS[layout](policy, turned, reading), recipe)
    assert agree(got, expected(batch, recipe, dtype, reading), dtype)


@each_reading
@given(seed=SEEDS, lengths=LENGTHS, dtype=DTYPES, name=NAMES, size=st.integers(1, 6))
def test_micro_batch_splits(reading, seed, lengths, dtype, name, size):
    batch, recipe, policy = samples(seed, lengths, dtype), tw.recipe(RECIPES[name]), Policy(dtype)
    got = outcome(policy, left_padded(policy, batch, reading), recipe, micro_batch=size)
    assert agree(got, expected(batch, recipe, dtype, reading), dtype)


@each_reading
@given(seed=SEEDS, lengths=LENGTHS, dtype=DTYPES, size=st.integers(1, 6))
def test_micro_batches_that_are_read_apart(reading, seed, lengths, dtype, size):
    """As a trainer's scoring pass does: each with as much padding as it needs."""
    batch, policy = samples(seed, lengths, dtype), Policy(dtype)
    whole = right_padded(policy, batch, reading)
    for start in range(0, len(batch), size):
        part = left_padded(policy, batch[start : start + size], reading)
        want = whole.scores[start : start + size, : part.scores.shape[1]]
        torch.testing.assert_close(part.scores[part.mask], want[part.mask], atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    with Ranks(request.param) as pool:
        yield pool


@pytest.fixture(scope="module")
def two_ranks():
    with Ranks(2) as pool:
        yield pool


def data_parallel(rank, size, batch, recipe, dtype, reading, layout, owners, mutation=None):
    with mutated(mutation):
        policy = Policy(dtype)
        own = [s for s in batch if owners[s.number] % size == rank]
        own_rows = LAYOUTS[layout](policy, own, reading) if own else no_rows(policy, dtype)
        return outcome(policy, own_rows, recipe, group=dist.group.WORLD)


@each_reading
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=SEEDS,
    lengths=LENGTHS,
    dtype=DTYPES,
    name=NAMES,
    layout=st.sampled_from(sorted(LAYOUTS)),
    owners=st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_data_parallel_ranks(ranks, reading, seed, lengths, dtype, name, layout, owners):
    # With owners 0, 1 and 2 the last of four ranks never has a response.
    batch, recipe = samples(seed, lengths, dtype), tw.recipe(RECIPES[name])
    parts = ranks(data_parallel, batch, recipe, dtype, reading, layout, owners)
    assert agree(merged(parts), expected(batch, recipe, dtype, reading), dtype)


def sequence_parallel(rank, size, batch, recipe, dtype, reading, style, mutation=None):
    """Contiguous shards as under Ulysses, or zigzag shards as under ring attention."""
    with mutated(mutation):
        policy = Policy(dtype)
        features, key_mask = padded([s.features for s in batch])
        blocks = torch.arange(features.shape[1]).tensor_split(2 * size if style == "ring" else size)
        own = torch.cat([blocks[rank], blocks[-1 - rank]]) if style == "ring" else blocks[rank]
        query, key = (heads.transpose(1, 2) for heads in policy.heads(features[:, own]))
        world = dist.group.WORLD
        known = {"asked": answers(batch)[:, own], "key_mask": key_mask[:, own], "group": world}
        read = reading("sequence_parallel_{}", query, key, own, **known)
        whole = tw.gathered(read, own, dim=1, group=world)
        log_probs = policy.log_probs(features)
        every = rows(batch, decided(batch, whole, reading), decided(batch, log_probs))
        # A rank's loss covers the tokens that its own positions decide.
        holds = torch.zeros(features.shape[:2]).index_fill_(1, own, 1.0)
        mine = decided(batch, holds) > 0
        return outcome(policy, every, recipe, mine=mine)


@each_reading
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=SEEDS,
    lengths=LENGTHS,
    dtype=DTYPES,
    name=NAMES,
    style=st.sampled_from(["ulysses", "ring"]),
)
def test_sequence_parallel_ranks(two_ranks, reading, seed, lengths, dtype, name, style):
    batch, recipe = samples(seed, lengths, dtype), tw.recipe(RECIPES[name])
    parts = two_ranks(sequence_parallel, batch, recipe, dtype, reading, style)
    assert agree(merged(parts), expected(batch, recipe, dtype, reading), dtype)


def sliced(rank, size, batch, recipe, dtype, reading, at, mutation=None):
    """Slices of a packed row, cut anywhere, also within a sequence."""
    with mutated(mutation):
        policy, world = Policy(dtype), dist.group.WORLD
        features = torch.cat([s.features for s in batch])
        numbers = torch.cat([torch.arange(len(s.features)) for s in batch])
        own = torch.arange(len(features)).tensor_split([at % (len(features) + 1)])[rank]
        known = {"asked": in_one_row(batch)[own], "group": world}
        read = reading("packed_{}", *policy.heads(features[own]), numbers[own], **known)
        whole = tw.gathered(read, own, dim=0, group=world)
        every = taken_apart(batch, whole, policy.log_probs(features), reading)
        holds = torch.zeros(len(features)).index_fill_(0, own, 1.0)
        mine = taken_apart(batch, holds, holds, ENTROPY).log_probs > 0
        return outcome(policy, every, recipe, mine=mine)


@each_reading
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=SEEDS, lengths=LENGTHS, dtype=DTYPES, name=NAMES, at=st.integers(0, 60))
def test_slices_of_a_packed_row(two_ranks, reading, seed, lengths, dtype, name, at):
    batch, recipe = samples(seed, lengths, dtype), tw.recipe(RECIPES[name])
    parts = two_ranks(sliced, batch, recipe, dtype, reading, at)
    assert agree(merged(parts), expected(batch, recipe, dtype, reading), dtype)


def tensor_parallel(rank, size, batch, recipe, dtype, reading, exchange, mutation=None):
    with mutated(mutation):
        policy = Policy(dtype)
        features, key_mask = padded([s.features for s in batch])
        query, key = (
            heads.transpose(1, 2).chunk(size, 1)[rank] for heads in policy.heads(features)
        )
        known = {"asked": answers(batch), "key_mask": key_mask, "group": dist.group.WORLD}
        choice = {"exchange": exchange} if reading.kind == "entropy" else {}
        read = reading("tensor_parallel_{}", query, key, **known, **choice)
        log_probs = policy.log_probs(features)
        every = rows(batch, decided(batch, read, reading), decided(batch, log_probs))
        return outcome(policy, every, recipe)


@each_reading
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=SEEDS,
    lengths=LENGTHS,
    dtype=DTYPES,
    name=NAMES,
    exchange=st.sampled_from(["rows", "distribution"]),
)
def test_tensor_parallel_ranks(two_ranks, reading, seed, lengths, dtype, name, exchange):
    batch, recipe = samples(seed, lengths, dtype), tw.recipe(RECIPES[name])
    want = expected(batch, recipe, dtype, reading)
    for got in two_ranks(tensor_parallel, batch, recipe, dtype, reading, exchange):
        assert agree(got, want, dtype)


@functools.cache
def grid():
    """This rank's groups among four: two that share the heads, two that share the tokens."""
    rank = dist.get_rank()
    by_heads, by_tokens = (
        [dist.new_group(pair) for pair in pairs] for pairs in (([0, 1], [2, 3]), ([0, 2], [1, 3]))
    )
    return by_heads[rank // 2], by_tokens[rank % 2]


def megatron(rank, size, batch, recipe, dtype, packed, mutation=None):
    """Tensor and context parallelism: half of the heads, and of each sequence two blocks of four.

    Sequences are padded to what zigzag deals out, or all of them to the same length.
    """
    with mutated(mutation):
        policy = Policy(dtype)
        heads, tokens = grid()
        longest = max(len(s.features) for s in batch)
        laid = [-(-(len(s.features) if packed else longest) // 4) * 4 for s in batch]
        bounds = torch.tensor([0, *laid]).cumsum(0)
        features = torch.full((sum(laid), FEATURES), torch.nan, dtype=dtype)
        own = []
        for sample, start, length in zip(batch, bounds.tolist(), laid, strict=False):
            features[start : start + len(sample.features)] = sample.features
            blocks = torch.arange(start, start + length).chunk(4)
            own += [blocks[rank // 2], blocks[3 - rank // 2]]
        own, mask = torch.cat(own), ~features.isnan().any(-1)
        query, key = (part.chunk(2, 1)[rank % 2] for part in policy.heads(features[own]))
        entropy = tw.sharded_entropy(
            query, key, own, bounds, token_group=tokens, head_group=heads, key_mask=mask[own]
        )
        whole = tw.gathered(entropy, own, dim=0, group=tokens)
        row = [
            whole[start : start + len(sample.features)]
            for sample, start in zip(batch, bounds.tolist(), strict=False)
        ]
        log_probs = policy.log_probs(padded([s.features for s in batch])[0])
        every = rows(batch, decided(batch, padded(row)[0]), decided(batch, log_probs))
        holds = torch.zeros(len(features)).index_fill_(0, own, 1.0)
        held = [
            holds[s : s + len(b.features)] for b, s in zip(batch, bounds.tolist(), strict=False)
        ]
        # Both ranks that share the heads hold the same tokens: one of them takes the loss.
        mine = (decided(batch, padded(held)[0]) > 0) & (rank % 2 == 0)
        return outcome(policy, every, recipe, mine=mine)


@pytest.fixture(scope="module")
def four_ranks():
    with Ranks(4) as pool:
        yield pool


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=SEEDS, lengths=LENGTHS, dtype=DTYPES, name=NAMES, packed=st.booleans())
def test_megatron_ranks(four_ranks, seed, lengths, dtype, name, packed):
    batch, recipe = samples(seed, lengths, dtype), tw.recipe(RECIPES[name])
    parts = four_ranks(megatron, batch, recipe, dtype, packed)
    assert agree(merged(parts), expected(batch, recipe, dtype, ENTROPY), dtype)


def local_sum(values, *, group=None):
    return values.detach().clone()


def local_extrema(minimum, maximum, *, group=None):
    return minimum, maximum


def local_largest(values, *, group=None):
    return values.clone()


def local_keys(values, positions, *, dim, group=None):
    """Other ranks' keys read as zeros."""
    size = int(tw.gathered(positions, positions, dim=0, group=group).shape[0])
    shape = list(values.shape)
    shape[dim] = size
    return values.new_zeros(shape).index_copy(dim, positions, values)


def own_block(owner, block, *, dim, group):
    """Other ranks' queries read as this one's."""
    return torch.cat([block] * group.size(), dim) if group.rank() == owner else None


def local_weights(owner, weights, group):
    return weights


def mutated(mutation):
    """The library with one merge replaced by a local statistic; unchanged for None."""
    if mutation is None:
        return nullcontext()
    module, name, local = mutation
    return mock.patch(f"tokenweights.{module}.{name}", local)


MUTATIONS = {
    "extrema": ("weights", "global_extrema", local_extrema, "low2high"),
    "softmax partition": ("weights", "global_sum", local_sum, "literal"),
    "mass": ("weights", "global_sum", local_sum, "mass"),
    "all-token count": ("losses", "global_sum", local_sum, "low2high"),
    "selected-token count": ("losses", "global_sum", local_sum, "anchor20"),
    "weight sum": ("losses", "global_sum", local_sum, "weight_sum"),
}
UNEVEN = [(2, 7), (3, 5), (1, 1), (4, 6), (2, 3)]


@pytest.mark.parametrize("merge", MUTATIONS)
def test_a_local_merge_is_noticed(two_ranks, merge):
    *mutation, name = MUTATIONS[merge]
    batch, recipe = samples(0, UNEVEN, torch.float64), tw.recipe(RECIPES[name])
    arguments = (batch, recipe, torch.float64, ENTROPY, "left", [0, 0, 0, 1, 1, 1])
    want = expected(batch, recipe, torch.float64, ENTROPY)
    assert agree(merged(two_ranks(data_parallel, *arguments)), want, torch.float64)
    parts = two_ranks(data_parallel, *arguments, tuple(mutation))
    assert not agree(merged(parts), want, torch.float64)


@each_reading
@pytest.mark.parametrize("style", ["ulysses", "ring"])
def test_keys_that_do_not_travel_are_noticed(two_ranks, style, reading):
    batch, recipe = samples(0, UNEVEN, torch.float64), tw.recipe(RECIPES["low2high"])
    mutation = ("attention.parallel", "gathered", local_keys)
    parts = two_ranks(sequence_parallel, batch, recipe, torch.float64, reading, style, mutation)
    want = expected(batch, recipe, torch.float64, reading)
    assert not agree(merged(parts), want, torch.float64)


SUMS = ("attention.received_parallel", "global_sum", local_sum)
LARGEST = ("attention.received_parallel", "largest_of", local_largest)
COLUMN_MERGES = {
    "received": SUMS, "received soon": SUMS, "largest received": LARGEST,
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMN_MERGES)
@pytest.mark.parametrize(
    ("layout", "how"),
    [
        pytest.param(sequence_parallel, "ulysses", id="ulysses"),
        pytest.param(sequence_parallel, "ring", id="ring"),
        pytest.param(sliced, 14, id="packed"),
        pytest.param(tensor_parallel, "rows", id="heads"),
    ],
)
def test_columns_that_are_not_merged_are_noticed(two_ranks, layout, how, name):
    reading, mutation = READINGS[name], COLUMN_MERGES[name]
    batch, recipe = samples(0, UNEVEN, torch.float64), tw.recipe(RECIPES["low2high"])
    want = expected(batch, recipe, torch.float64, reading)
    arguments = (batch, recipe, torch.float64, reading, how)
    for changed in (None, mutation):
        parts = two_ranks(layout, *arguments, changed)
        parts = parts if layout is tensor_parallel else [merged(parts)]
        assert all(agree(part, want, torch.float64) for part in parts) == (changed is None)


def test_distances_of_heads_that_are_not_merged_are_noticed(two_ranks):
    reading, mutation = READINGS["distance"], ("attention.distance_parallel", *SUMS[1:])
    batch, recipe = samples(0, UNEVEN, torch.float64), tw.recipe(RECIPES["low2high"])
    want = expected(batch, recipe, torch.float64, reading)
    parts = two_ranks(tensor_parallel, batch, recipe, torch.float64, reading, "rows", mutation)
    assert not any(agree(part, want, torch.float64) for part in parts)


@pytest.mark.parametrize("packed", [False, True])
def test_keys_and_queries_that_do_not_travel_are_noticed(four_ranks, packed):
    batch, recipe = samples(0, UNEVEN, torch.float64), tw.recipe(RECIPES["low2high"])
    want = expected(batch, recipe, torch.float64, ENTROPY)
    arguments = (batch, recipe, torch.float64, packed)
    assert agree(merged(four_ranks(megatron, *arguments)), want, torch.float64)
    for name, local in (("gathered", local_keys), ("gathered_on", own_block)):
        mutation = ("attention.sharded", name, local)
        parts = four_ranks(megatron, *arguments, mutation)
        assert not agree(merged(parts), want, torch.float64)


def test_weights_that_do_not_travel_are_noticed(two_ranks):
    batch, recipe = samples(0, UNEVEN, torch.float64), tw.recipe(RECIPES["low2high"])
    mutation = ("attention.parallel", "_summed_on", local_weights)
    want = expected(batch, recipe, torch.float64, ENTROPY)
    arguments = (batch, recipe, torch.float64, ENTROPY, "distribution", mutation)
    results = two_ranks(tensor_parallel, *arguments)
    assert not any(agree(got, want, torch.float64) for got in results)

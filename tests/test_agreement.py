"""What one rank of a group refuses is refused on all of them, with its rank named."""

import dataclasses
import functools
import inspect

import pytest
import torch
import torch.distributed as dist
from gradients import tiny_policy
from ranks import Ranks, on_ranks
from torch import nn

import tokenweights as tw
from tokenweights import AttentionStatistics
from tokenweights.capture import CapturedAttention
from tokenweights.distributed import agreed

SIZE = 3


@pytest.fixture(scope="module")
def ranks():
    with Ranks(SIZE, seconds=90) as pool:  # a busy machine takes 30 for the first DDP
        yield pool


def calls(rank, slice_number=0):
    """For each function with a group: itself, good arguments, and a change that is refused."""
    generator = torch.Generator().manual_seed(rank)
    rows = (0, 2, 1)[rank]
    scores, mask = torch.rand(rows, 6, generator=generator), torch.ones(rows, 6).bool()
    nan, negative, layers = scores * torch.nan, scores - 2, torch.stack([scores, 1 - scores])
    numbers = torch.arange(6).expand(rows, 6).clone()
    query, key = torch.randn(2, 1, 2, 4, 8, generator=generator)
    places = torch.arange(4) + 4 * slice_number
    statistics = AttentionStatistics(raw=scores, topk=scores, mean_distance=scores)
    ends, extrema = tw.Endpoints(0.5, 2.0), tw.score_extrema(torch.eye(2), torch.ones(2, 2).bool())
    unpacked = CapturedAttention(0, query, key, 1.0, window=None, softcap=None, sinks=None)
    packed = dataclasses.replace(unpacked, position_ids=torch.arange(4)[None])
    scored, weighted = {"scores": scores, "mask": mask}, {"weights": scores, "mask": mask}
    ranked = {**scored, "scope": "batch", "sample_ids": torch.arange(rows) + 9 * rank}
    pair = {"first": scores, "second": scores**2, "mask": mask}
    attended = {"query": query, "key": key}
    row = {"query": query[0].transpose(0, 1), "key": key[0].transpose(0, 1)}
    soft, hard = tw.recipe("low2high"), tw.recipe("anchor20")
    batch = tw.RolloutBatch(mask=mask, attention={0: scores})
    return {
        tw.global_sum: ({"values": torch.ones(3)}, {"values": torch.ones(4)}),
        tw.global_extrema: (
            {"minimum": torch.zeros(()), "maximum": torch.ones(())},
            {"minimum": torch.zeros(1)},
        ),
        tw.gathered: ({"values": query, "positions": places, "dim": 2}, {"positions": places[1:]}),
        tw.slice_positions: ({"count": 2}, {"count": -1}),
        tw.score_extrema: (scored, {"scores": nan}),
        tw.softmax_partition: ({**scored, "extrema": extrema}, {"temperature": -1.0}),
        tw.endpoint_weights: (
            {**scored, "endpoints": ends, "form": "literal"},
            {"scores": nan},
        ),
        tw.mean_one: (scored, {"scores": negative}),
        tw.z_scores: (
            {**scored, "scope": "prompt", "prompt_ids": numbers[:, 0]},
            {"prompt_ids": None},
        ),
        tw.min_max: (
            {**scored, "sign": "positive", "advantages": scores, "per": "response"},
            {"advantages": nan},
        ),
        tw.advantage_covariance: (
            {"log_probs": scores, "advantages": scores[:, :1], "mask": mask},
            {"advantages": nan[:, :1]},
        ),
        tw.match_mass: (weighted, {"weights": negative}),
        tw.weight_statistics: (weighted, {"bins": numbers + 20}),
        tw.loss_denominator: (weighted, {"weights": scores[:, :5]}),
        tw.quadrant_tokens: (
            {"token_ids": numbers, "quadrants": numbers // 2, "vocab_size": 6},
            {"token_ids": numbers + 9},
        ),
        tw.layer_agreement: ({"scores": layers, "mask": mask}, {"fraction": 2.0}),
        tw.subset_overlap: ({"subsets": [mask], "mask": mask}, {"subsets": []}),
        tw.partition_jaccard: (
            {"first": mask, "second": mask, "mask": mask},
            {"second": mask[:, :5]},
        ),
        tw.support_concentration: ({"statistics": statistics, "groups": [mask]}, {"groups": []}),
        tw.support_by_entropy: (
            {"statistics": statistics, "mask": mask},
            {"statistics": AttentionStatistics(raw=scores, topk=nan, mean_distance=scores)},
        ),
        tw.group_dynamics: ({"scores": scores, "groups": [mask]}, {"scores": nan}),
        tw.token_weight_metrics: ({**scored, "weights": scores}, {"weights": negative}),
        tw.rollout_statistics: ({"mask": mask, "rewards": scores[:, 0]}, {"rewards": nan[:, 0]}),
        tw.pearson_correlation: (pair, {"second": nan}),
        tw.rank_correlation: (pair, {"first": nan}),
        tw.score_moments: ({"scores": layers, "mask": mask}, {"scores": layers * torch.nan}),
        tw.select: ({**ranked, "count": 3}, {"scores": nan}),
        tw.select_within: ({**ranked, "total": 2.0}, {"scores": negative}),
        tw.score_quantile: ({**scored, "fraction": 0.3, "scope": "batch"}, {"fraction": 2.0}),
        tw.sequence_parallel_entropy: (
            {**attended, "positions": places},
            {"query": query * torch.nan},
        ),
        tw.packed_entropy: ({**row, "position_ids": torch.arange(4)}, {"top_k": 0}),
        tw.tensor_parallel_entropy: (attended, {"key": key * torch.nan}),
        tw.sequence_parallel_received: (
            {**attended, "positions": places},
            {"query": query * torch.nan},
        ),
        tw.packed_received: ({**row, "position_ids": torch.arange(4)}, {"horizon": (3, 1)}),
        tw.tensor_parallel_received: (attended, {"key": key * torch.nan}),
        tw.sequence_parallel_distance: (
            {**attended, "positions": places},
            {"query": query * torch.nan},
        ),
        tw.packed_distance: ({**row, "position_ids": torch.arange(4)}, {"bound": 0}),
        tw.tensor_parallel_distance: (attended, {"key": key * torch.nan}),
        soft.token_weights: ({**scored, "step": 3}, {"step": -1}),
        hard.token_weights: ({**scored, "step": 3}, {"scores": nan}),
        hard.denominator_scale: (weighted, {"weights": scores[:, :5]}),
        hard.scores: ({"batch": batch}, {"batch": tw.RolloutBatch(mask=mask)}),
        hard.weighted: ({"batch": batch, "step": 3}, {"step": -1}),
        tw.weighted_rollout: ({"recipe": hard, **scored, "step": 3}, {"scores": None}),
        CapturedAttention.packed_entropy: ({"self": packed}, {"self": unpacked}),
        CapturedAttention.distance: ({"self": packed}, {"bound": 0}),
        CapturedAttention.received: (
            {"self": packed, "asked": tw.Received()},
            {"asked": tw.Received(horizon=(3, 1))},
        ),
        tw.gradient_geometry: (
            {"subset": [torch.ones(2)], "full": [torch.ones(2)]},
            {"subset": [torch.ones(3)]},
        ),
        tw.group_projection_ratios: (
            {"projection_ratio": scores * 0 + 1 / 18, "groups": numbers, "mask": mask, "count": 6},
            {"groups": numbers - 1},
        ),
        **{
            type(record).over_ranks: ({"self": record}, {"self": other})
            for record, other in (
                (tw.score_moments(layers, mask), tw.score_moments(layers[:1], mask)),
                (tw.layer_agreement(layers, mask), tw.layer_agreement(layers[:1], mask)),
                (tw.group_dynamics(scores, [mask]), tw.group_dynamics(scores, [mask, mask])),
                (tw.subset_overlap([mask], mask), tw.subset_overlap([mask, mask], mask)),
                (
                    tw.support_concentration(statistics, [mask]),
                    tw.support_concentration(statistics, [mask, mask]),
                ),
                (
                    tw.quadrant_tokens(numbers, numbers // 2, vocab_size=6),
                    tw.quadrant_tokens(numbers, numbers // 2, vocab_size=7),
                ),
                (tw.rollout_statistics(mask, scores[:, 0]), tw.subset_overlap([mask, mask], mask)),
            )
        },
    }


@functools.cache
def pair():
    """The last two ranks, whose places in the group are not their global ranks."""
    return dist.new_group([1, 2])


def groups(rank):
    """Groups of this rank, each with the global rank that is going to refuse."""
    alone = pair()  # all ranks have to make it
    return [(dist.group.WORLD, 1)] + ([(alone, 2)] if rank else [])


def found(call):
    """What a call returns, or the message of its error."""
    try:
        return call(), None
    except Exception as error:
        return None, str(error)


def refused_on(rank, size, place):
    """Messages of this rank, by the rank that was given a bad argument; and if it can go on."""
    messages, goes_on = {}, []
    for group, refusing in groups(rank):
        function, (good, bad) = list(calls(rank, group.rank()).items())[place]
        changes = [bad, *({name: object()} for name in good)]
        first = function(**good, group=group)
        for number, change in enumerate(changes):
            arguments = good | (change if rank == refusing else {})
            _, messages[refusing, number] = found(lambda: function(**arguments, group=group))  # noqa: B023
        again = function(**good, group=group)
        goes_on.append(str(again) == str(first))
    return messages, all(goes_on)


@pytest.mark.parametrize("place", range(len(calls(0))), ids=[f.__qualname__ for f in calls(0)])
def test_what_one_rank_refuses_all_refuse_and_name_it(ranks, place):
    answers = ranks(refused_on, place)
    assert all(goes_on for _, goes_on in answers)
    for rank, (messages, _) in enumerate(answers):
        for (refusing, number), message in messages.items():
            own = answers[refusing][0][refusing, number]
            assert own is not None, f"{number} was not refused"
            if "make the same call" in own:  # nothing is wrong on any rank alone
                assert f"on global ranks [{refusing}]" in message
            elif rank == refusing:
                assert "global rank" not in message
            else:
                assert f"a refusal on global rank {refusing}: " in message
                assert own.removesuffix(".") in message


def test_no_function_with_a_group_is_missing_above():
    tested = {function.__qualname__ for function in calls(0)}
    # Tested below, since they run a model.
    tested |= {"token_alignment", "GradientProbe.__init__", "CaughtGradients.__init__"}
    tested |= {"RolloutBatch.__init__"}  # holds a group
    public = [getattr(tw, name) for name in tw.__all__]
    methods = [
        method
        for owner in public
        if inspect.isclass(owner)
        for _, method in inspect.getmembers(owner, inspect.isfunction)
    ]
    communicating = set()
    for function in filter(inspect.isfunction, public + methods):
        group = inspect.signature(function).parameters.get("group")
        if group is not None and "ProcessGroup" in str(group.annotation):
            communicating.add(function.__qualname__)
    assert communicating == tested


class Loss:
    """The losses of a rank's rows, which fail at one evaluation."""

    def __init__(self, rank, failing):
        self.batch, self.rows = tiny_policy.Batch(), (slice(0, 1), slice(1, 3), slice(3, 4))[rank]
        self.mask, self.deciles = self.batch.mask[self.rows], self.batch.deciles[self.rows]
        self.scores, self.ids = self.batch.scores[self.rows], torch.arange(4)[self.rows]
        self.model = nn.parallel.DistributedDataParallel(tiny_policy.policy())
        self.failing = failing

    def __call__(self):
        self.failing -= 1
        loss = self.batch.loss(self.model, self.rows)
        if self.failing == 0:
            raise RuntimeError("a loss that fails")
        return loss

    def alignment(self, **options):
        group = dist.group.WORLD
        return tw.token_alignment(self, self.model, mask=self.mask, group=group, **options)

    def geometry(self, **options):
        probe = tw.GradientProbe(self.model, group=dist.group.WORLD)
        return probe.geometry(self, self.deciles, **{"mask": self.mask, "count": 10} | options)

    def metrics(self, **options):
        probe = tw.GradientProbe(self.model, group=dist.group.WORLD)
        arguments = {"scores": self.scores, "mask": self.mask, "sample_ids": self.ids} | options
        return tw.GradientSeries().metrics(probe, self, **arguments)

    def caught(self, **options):
        model = self.model.module
        with tw.CaughtGradients(model, group=dist.group.WORLD) as caught:
            probe = tw.GradientProbe(
                model, group=caught.group, backward=caught.backward, gradients=caught.take
            )
            losses = [lambda: self.batch.loss(model, self.rows), self]
            mask = self.mask.repeat(2, 1)
            return probe.geometry(losses, self.deciles.repeat(2, 1), mask=mask, count=10)

    def backward(self, loss=None):
        with tw.CaughtGradients(self.model.module, group=dist.group.WORLD) as caught:
            caught.backward(
                self.batch.loss(self.model.module, self.rows).sum() if loss is None else loss
            )


PROBES = [
    *(("alignment", number, {}) for number in (1, 2, 3)),
    ("alignment", 0, {"tolerance": 2.0}),
    ("alignment", 0, {"pattern": "no such parameter"}),
    *(("geometry", number, {}) for number in (1, 3)),
    ("geometry", 0, {"count": 1}),
    ("geometry", 0, {"mask": "no mask"}),
    ("metrics", 0, {"scores": torch.full((2, 12), torch.nan)}),
    ("metrics", 5, {}),
    ("caught", 1, {}),
    ("caught", 2, {}),
    ("backward", 0, {"loss": torch.ones(())}),
]


def probed_on(rank, size, name, failing, options):
    loss = Loss(rank, failing if rank == 1 else 0)
    _, message = found(lambda: getattr(loss, name)(**(options if rank == 1 else {})))
    _, later = found(lambda: getattr(Loss(rank, 0), name)())
    return message, later


@pytest.mark.parametrize("name, failing, options", PROBES)
def test_a_probe_that_fails_on_one_rank_fails_on_all(ranks, name, failing, options):
    answers = ranks(probed_on, name, failing, options)
    assert [later for _, later in answers] == [None] * SIZE
    own = answers[1][0]
    for rank in (0, 2):
        assert "a refusal on global rank 1: " in answers[rank][0]
        assert own.removesuffix(".") in answers[rank][0]


def overflowing_on(rank, size, name):
    """Finite queries and keys of rank 1, whose scores are not."""
    query = torch.ones(1, 2, 6, 8) * (1e30 if rank == 1 else 1.0)
    options = {"group": dist.group.WORLD, "scale": 1e30 if rank == 1 else 1.0}
    if name == "sequence":
        places = torch.arange(6 * rank, 6 * rank + 6)
        return found(
            lambda: tw.sequence_parallel_entropy(query, torch.ones_like(query), places, **options)
        )[1]
    if name == "packed":
        row = query[0].transpose(0, 1)
        return found(
            lambda: tw.packed_entropy(row, torch.ones_like(row), torch.arange(6), **options)
        )[1]
    options |= {"exchange": name}
    return found(lambda: tw.tensor_parallel_entropy(query, query, **options))[1]


@pytest.mark.parametrize("name", ["sequence", "packed", "rows", "distribution"])
def test_scores_that_overflow_after_the_exchange_are_refused_on_all(ranks, name):
    for message in ranks(overflowing_on, name):
        assert "scaled inner products" in message


def different_calls_on(rank, size):
    scores, mask, world = torch.rand(2, 3), torch.ones(2, 3).bool(), dist.group.WORLD
    ends, odd = tw.Endpoints(0.0, 1.0), rank == 1
    extrema = tw.score_extrema(scores, mask)
    given = scores if odd else None
    return [
        found(call)[1]
        for call in (
            lambda: tw.endpoint_weights(
                scores, mask, ends, extrema=extrema if odd else None, group=world
            ),
            lambda: tw.token_weight_metrics(given, scores, mask, group=world),
            lambda: tw.global_sum(scores.double() if odd else scores, group=world),
            lambda: (tw.score_extrema if odd else tw.match_mass)(scores, mask, group=world),
        )
    ]


def test_ranks_that_call_differently_are_told_so(ranks):
    answers = ranks(different_calls_on)
    for messages in answers:
        for message in messages:
            assert "expected `group` whose ranks all make the same call" in message
            assert "on global ranks [1]" in message and "on global ranks [0, 2]" in message
    assert answers[0] == answers[2]


class CountedAgreements:
    """Counts the reductions of integers: every other one is of floats."""

    def __enter__(self):
        self.count, self.reduce = 0, dist.all_reduce

        def all_reduce(tensor, *arguments, **options):
            self.count += tensor.dtype == torch.int64
            return self.reduce(tensor, *arguments, **options)

        dist.all_reduce = all_reduce
        return self

    def __exit__(self, *_):
        dist.all_reduce = self.reduce


@agreed
def twice(*, group):
    """Communicates twice, and refuses nothing."""
    return tw.global_sum(tw.global_sum(torch.ones(1), group=group), group=group)


@agreed
def inner_first(failing, *, inner, group):
    """Agrees over its own group before the inner one communicates over another."""
    first = tw.score_extrema(torch.full((1, 1), failing), torch.ones(1, 1).bool(), group=inner)
    return first.minimum + tw.global_sum(torch.ones(()).double(), group=group)


def counted_on(rank, size):
    scores, mask, world = torch.rand(2, 3), torch.ones(2, 3).bool(), dist.group.WORLD
    own = [dist.new_group([each]) for each in range(size)][rank]
    extrema, ends = tw.score_extrema(scores, mask), tw.Endpoints(0.0, 1.0)
    counts = {}
    for name, call in {
        "one merge": lambda: tw.score_extrema(scores, mask, group=world),
        "two merges": lambda: tw.group_dynamics(scores, [mask], group=world),
        "three merges": lambda: tw.layer_agreement(scores[None], mask, group=world),
        "no merge": lambda: tw.endpoint_weights(scores, mask, ends, extrema=extrema, group=world),
        "nested": lambda: tw.endpoint_weights(scores, mask, ends, group=world),
        "own": lambda: twice(group=world),
        "no group": lambda: tw.score_extrema(scores, mask),
        "one rank": lambda: tw.score_extrema(scores, mask, group=own),
    }.items():
        with CountedAgreements() as counted:
            call()
        counts[name] = counted.count
    return counts


def test_one_agreement_for_each_call_that_has_company(ranks):
    ones = ["one merge", "two merges", "three merges", "no merge", "nested", "own"]
    expected = dict.fromkeys(ones, 1) | {"no group": 0, "one rank": 0}
    assert ranks(counted_on) == [expected] * SIZE


def two_groups_on(rank, size):
    world, alone, first = dist.group.WORLD, pair(), dist.new_group([0])
    inner = alone if rank else first
    failing = torch.nan if rank == 2 else float(rank)
    return (
        found(lambda: inner_first(failing, inner=inner, group=world))[1],
        found(lambda: inner_first(0.0, inner=inner, group=world)),
    )


def test_an_inner_group_waits_for_the_agreement_of_the_outer_one(ranks):
    answers = ranks(two_groups_on)
    for rank, (message, later) in enumerate(answers):
        assert ("a refusal on global rank 2" in message) == (rank != 2)
        assert later[1] is None


def compiled_on(rank, size):
    scores, mask = torch.rand(2, 3), torch.ones(2, 3).bool()
    function = lambda: tw.loss_denominator(mask, scores, group=dist.group.WORLD)  # noqa: E731
    return function(), torch.compile(function, backend="eager")()


def test_compiled_calls_merge_as_they_are():
    for eager, compiled in on_ranks(compiled_on, 2):  # compiling takes its time
        assert eager == compiled == 12


def waiting_on(rank, size):
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    return rank


def own_rank(rank, size):
    return rank


def test_a_rank_that_waits_for_ever_fails_the_test():
    with Ranks(2, seconds=1) as two:
        with pytest.raises(AssertionError, match=r"no answer from ranks \[0\] in 1 s"):
            two(waiting_on)
        assert two(own_rank) == [0, 1]

"""Every public function that takes tensors, on hostile ones.

Poison under a False mask changes no bit of a result; views of other tensors, other orders of rows,
more columns of padding and micro-batches change nothing but the rounding of sums.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    FLOATS,
    VIEWS,
    boundaries,
    edges,
    layouts,
    masks,
    poisoned,
    poisons,
    positions,
    read_by_recipes,
    sample_ids,
    splits,
)
from torch import Tensor

import tokenweights as tw

# What a batch holds. Rows are `batch`, columns under the mask are `token`; other axes stay put.
AXES = {
    "mask": "batch token",
    "some": "batch token",
    "scores": "batch token",
    "other": "batch token",
    "weights": "batch token",
    "token_loss": "batch token",
    "log_probs": "batch token",
    "old_log_probs": "batch token",
    "advantages": "batch token",
    "ratios": "batch token",
    "ids": "batch token",
    "bins": "batch token",
    "layers": "layers batch token",
    "heads": "batch heads token",
    "sizes": "batch heads token mass",
    "logits": "batch token vocab",
    "query": "batch heads token dim",
    "key": "batch kv_heads token dim",
    "attention": "batch heads token token",
    "sample_ids": "batch",
    "rewards": "batch",
    "lengths": "batch",
    "prompts": "batch",
    "rows": "batch position",
    "sinks": "heads",
    "packed_query": "total heads dim",
    "packed_key": "total kv_heads dim",
    "packed_positions": "total",
    "bounds": "boundary",
    "correct": "problem sample",
    "vector": "entry",
    "gradient": "entry entry",
    "number": "",
}
WIDTH = {"layers": 3, "heads": 4, "mass": 2, "vocab": 5, "dim": 4, "kv_heads": 2, "position": 6}
WIDTH |= {"total": 7, "boundary": 4, "problem": 2, "sample": 3, "entry": 10}
# Numbers are in [0, 1], unless a factor and an offset are given.
RANGES = {
    "token_loss": (4, -2),
    "log_probs": (-4, 0),
    "old_log_probs": (-4, 0),
    "advantages": (2, -1),
    "attention": (1, 0.5),
}
WHOLE = {"ids": (0, 5), "bins": (0, 10), "sizes": (1, 10), "lengths": (0, 12), "prompts": (1, 6)}
FIXED = {"packed_positions": positions([3, 1, 3]), "bounds": boundaries([3, 1, 3])}
# Read whole, since they say where things are.
NEVER_POISONED = {"mask", "prompts", "lengths", "sample_ids"}


class Batch:
    """Named tensors, each made when it is first read."""

    def __init__(self, make: Callable[[str], Tensor], origin: str):
        self.make, self.origin = make, origin

    def __getattr__(self, name: str) -> Tensor:
        if name not in AXES:
            raise AttributeError(name)
        setattr(self, name, self.make(name))
        return getattr(self, name)

    def __repr__(self) -> str:
        return f"Batch({self.origin})"

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> "Batch":
        """The batch with every tensor replaced."""
        return Batch(lambda name: change(name, getattr(self, name)), self.origin)

    def poisoned(self, poison: str | None) -> "Batch":
        """Poison, or zeros for None, wherever a tensor has no valid token."""

        def change(name: str, tensor: Tensor) -> Tensor:
            axes = AXES[name].split()
            if name in NEVER_POISONED or not {"batch", "token"} & {*axes} or "position" in axes:
                return tensor
            valid = self.valid(axes)
            return tensor * valid if poison is None else poisoned(tensor, valid, poison)

        return self.changed(change)

    def valid(self, axes: list[str]) -> Tensor:
        """Where a tensor of these axes is read, broadcast to its shape."""

        def along(dim: int, bits: Tensor) -> Tensor:
            shape = [1] * len(axes)
            shape[axes.index("batch")] = len(bits)
            if dim >= 0:
                shape[dim] = bits.shape[1]
            return bits.reshape(shape)

        tokens = [dim for dim, axis in enumerate(axes) if axis == "token"]
        valid = along(-1, self.mask.any(-1))
        for dim in tokens:
            valid = valid & along(dim, self.mask)
        if len(tokens) == 2:  # keys after their query are hidden as well
            valid = valid & torch.ones(self.mask.shape[1], self.mask.shape[1]).tril().bool()
        return valid


@st.composite
def batches(draw: st.DrawFn, *, exact: bool) -> Batch:
    """Batches whose numbers are at the edges of a type; or few eighths, so that sums are exact."""
    mask = draw(masks(max_token=9))
    ids, seed = draw(sample_ids(len(mask))), draw(st.integers(0, 2**31))
    return batch_of(mask, ids, seed, draw(st.sampled_from(FLOATS)), exact=exact)


def batch_of(mask: Tensor, ids: Tensor, seed: int, dtype: torch.dtype, *, exact: bool) -> Batch:
    eighths = [place / 8 for place in range(9)]
    numbers = torch.tensor(eighths if exact else edges(dtype) + eighths, dtype=torch.float64)
    sizes = WIDTH | {"batch": mask.shape[0], "token": mask.shape[1]}

    def whole(name: str, high: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + [*AXES].index(name))
        return torch.randint(
            high, [sizes[axis] for axis in AXES[name].split()], generator=generator
        )

    def make(name: str) -> Tensor:
        if name in FIXED:
            return FIXED[name]
        if name in WHOLE:
            low, high = WHOLE[name]
            return low + whole(name, high - low)
        if name in ("mask", "sample_ids"):
            return mask if name == "mask" else ids
        if name in ("some", "correct"):
            return whole(name, 2) > 0
        if name == "ratios":  # these sum to one
            return (mask / max(int(mask.sum()), 1)).double()
        factor, offset = RANGES.get(name, (1, 0))
        return factor * numbers.to(dtype)[whole(name, len(numbers))] + offset

    return Batch(make, f"{mask=}, {ids=}, {seed=}, {dtype=}")


class Case(NamedTuple):
    """A call, and the axes of all that it returns."""

    call: Callable[[Batch], Any]
    axes: str = "batch token"


def of_valid(result: Tensor, b: Batch) -> Tensor:
    """A result for each token of a function without a mask."""
    return torch.where(b.mask, result, 0)


def gradient(loss: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Of a loss, or of the sum of losses."""
    values = values.clone().requires_grad_()
    return torch.autograd.grad(loss(values).sum(), values)[0]


def statistics(b: Batch) -> tw.AttentionStatistics:
    return tw.AttentionStatistics(
        support_size=b.sizes, mean_distance=b.heads, local_mass=b.heads * 0.5
    )


def plain_statistics(b: Batch) -> tw.AttentionStatistics:
    return tw.AttentionStatistics(raw=b.scores, topk=b.other, local_mass=b.weights)


def surrogate(b: Batch, log_probs: Tensor) -> Tensor:
    return tw.clipped_surrogate_loss(log_probs, b.old_log_probs, b.advantages, mask=b.mask)


def bounded(b: Batch, log_probs: Tensor) -> Tensor:
    """Each token clipped at a bound of its own below and above."""
    return tw.clipped_surrogate_loss(
        log_probs,
        b.old_log_probs,
        b.advantages,
        clip_low=b.weights,
        clip_high=b.other,
        mask=b.mask,
    )


def soft(b: Batch, token_loss: Tensor) -> Tensor:
    return tw.gated_loss(token_loss, b.mask, b.weights, mode="soft").token_loss


def unclipped(b: Batch) -> Tensor:
    losses = tw.unclipped_losses(
        lambda rows: b.log_probs[rows], b.old_log_probs, b.advantages, b.mask, micro_batch_size=2
    )
    return torch.cat([b.weights[:0], *(loss() for loss in losses)])


def group_gradients(b: Batch) -> list[Tensor]:
    bias = torch.zeros(2, requires_grad=True)
    token_loss = b.token_loss + bias[0] + bias[1] * tw.relative_position(b.mask)
    found = tw.group_gradients(token_loss, b.bins, [bias], mask=b.mask)
    return [*found.total, *(part for parts in found.groups[:1] for part in parts)]


def sorted_ordinals(b: Batch) -> Tensor:
    """Which valid token comes at each rank, by its number among the valid ones."""
    order = tw.masked_order(b.scores, b.mask)
    found = torch.where(b.mask.gather(-1, order), b.mask.cumsum(-1).gather(-1, order), 0)
    return torch.nn.functional.pad(found, (0, 20 - found.shape[1]))  # as wide in every layout


def rollout_batch(b: Batch) -> tw.RolloutBatch:
    return tw.RolloutBatch(
        mask=b.mask,
        sample_ids=b.sample_ids,
        prompt_ids=b.lengths // 6,
        token_ids=b.ids,
        advantages=b.advantages,
        rewards=b.rewards,
        log_probs=b.log_probs,
        sampler_log_probs=b.old_log_probs,
        predictive_entropy=b.scores,
        self_certainty=b.other,
        token_loss=b.token_loss,
        attention=dict.fromkeys(read_by_recipes(), b.scores),
    )


def every_recipe(b: Batch) -> list[Tensor]:
    """Weights of all recipes; each is float32 and the scores' last bits do not matter."""
    batch = rollout_batch(b)
    recipes = [tw.recipe(name).placed(36) for name in tw.recipe_names()]
    return [made.weighted(batch, step=30).weights for made in recipes]


def some_recipes(b: Batch) -> list[Tensor]:
    """Weights from scores at hand, of recipes that read nothing else."""
    return [
        tw.weighted_rollout(
            made := tw.recipe(name),
            None if made.signal is None else b.scores,
            b.mask,
            step=30,
            sample_ids=b.sample_ids,
            token_groups=b.ids,
        ).weights
        for name in tw.recipe_names(source="paper")
    ]


def extrema(b: Batch) -> tw.ScoreExtrema:
    return tw.score_extrema(b.scores, b.mask)


def scaled(scale: Callable[..., Tensor], b: Batch) -> list[Tensor]:
    return [
        scale(b.scores, b.mask, scope=scope, prompt_ids=b.lengths // 6, per=per)
        for scope in ("prompt", "batch")
        for per in ("token", "response")
    ]


def alone(scale: Callable[..., Tensor], b: Batch) -> Tensor:
    return scale(b.other, b.mask, scope="response", advantages=b.advantages, sign="positive")


def scopes(b: Batch) -> list[dict[str, Any]]:
    """Options of the functions that rank tokens of a response, a prompt or the batch."""
    return [
        {"scope": "response"},
        {"scope": "prompt", "prompt_ids": b.prompts},
        {"scope": "batch", "sign": "negative", "advantages": b.advantages},
    ]


LOW, HIGH = tw.Endpoints(0.0, 1.0), tw.Endpoints(0.25, 2.0)
RECIPE = tw.recipe("low2high")

CASES = {
    "advantage_covariance": Case(
        lambda b: tw.advantage_covariance(b.log_probs, b.advantages, b.mask)
    ),
    "aggregate_loss": Case(
        lambda b: [
            tw.aggregate_loss(b.token_loss, b.mask, b.weights, mode=mode)
            for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
        ],
        "",
    ),
    "aggregate_loss gradient": Case(
        lambda b: gradient(
            lambda x: tw.aggregate_loss(x, b.mask, b.weights, mode="seq-mean-token-mean"),
            b.token_loss,
        )
    ),
    "align_to_decision": Case(
        lambda b: tw.align_to_decision(b.rows, response_length=4, prompt_length=b.prompts),
        "batch response",
    ),
    "align_to_own": Case(
        lambda b: tw.align_to_own(b.rows, response_length=4, prompt_length=b.prompts),
        "batch response",
    ),
    "attention_distance": Case(
        lambda b: [
            tw.attention_distance(b.query, b.key, bound=2, key_mask=b.mask, backend=backend)
            for backend in ("chunked", "reference")
        ]
    ),
    "attention_entropy": Case(
        lambda b: [
            tw.attention_entropy(b.query, b.key, key_mask=b.mask, sinks=b.sinks, backend=backend)
            for backend in ("chunked", "reference")
        ]
    ),
    "attention_entropy_from_weights": Case(
        lambda b: tw.attention_entropy_from_weights(b.attention, key_mask=b.mask)
    ),
    "attention_entropy_varlen": Case(
        lambda b: tw.attention_entropy_varlen(
            b.packed_query,
            b.packed_key,
            cu_seqlens_q=b.bounds,
            cu_seqlens_k=b.bounds,
        ),
        "total",
    ),
    "attention_received": Case(
        lambda b: [
            tw.attention_received(
                b.query, b.key, key_mask=b.mask, rows=b.some, sinks=b.sinks, **asked
            )
            for asked in (
                {"horizon": (1, 3)},
                {"reduction": "max", "backend": "reference"},
                {"reduction": "sum", "heads": [0, 3]},
            )
        ]
    ),
    "attention_received_varlen": Case(
        lambda b: tw.attention_received_varlen(
            b.packed_query, b.packed_key, cu_seqlens_q=b.bounds, cu_seqlens_k=b.bounds
        ),
        "total",
    ),
    "attention_statistics": Case(
        lambda b: tw.attention_statistics(b.query, b.key, key_mask=b.mask, sinks=b.sinks)
    ),
    "attention_weights": Case(
        lambda b: tw.attention_weights(b.query, b.key, key_mask=b.mask, sinks=b.sinks),
        "batch token token",
    ),
    "back_fraction": Case(lambda b: tw.back_fraction(b.mask, fraction=0.5)),
    "band_shares": Case(lambda b: tw.band_shares(b.vector + 0.125), "bands"),
    "bernoulli_subset": Case(
        lambda b: tw.bernoulli_subset(b.mask, probability=0.4, seed=7, sample_ids=b.sample_ids)
    ),
    "bootstrap_interval": Case(lambda b: tw.bootstrap_interval(b.vector, seed=3), ""),
    "bounded_map": Case(
        lambda b: [
            of_valid(tw.bounded_map(b.other, shape=shape, slope=-2.0, high=0.75), b)
            for shape in ("linear", "exponential", "sigmoid")
        ]
    ),
    "bottom_fraction": Case(lambda b: tw.bottom_fraction(b.scores, b.mask, fraction=0.5)),
    "gated_loss": Case(
        lambda b: [
            part
            for mode in ("drop", "detach", "soft")
            for kept in [tw.gated_loss(b.token_loss, b.mask, b.some, mode=mode)]
            for part in (kept.token_loss, kept.mask)
        ]
    ),
    "gated_loss gradient": Case(lambda b: gradient(lambda x: soft(b, x), b.token_loss)),
    "clipped_surrogate_loss": Case(lambda b: surrogate(b, b.log_probs)),
    "clipped_surrogate_loss gradient": Case(
        lambda b: gradient(lambda x: surrogate(b, x), b.log_probs)
    ),
    "clipped_surrogate_loss bounds": Case(lambda b: bounded(b, b.log_probs)),
    "clipped_surrogate_loss bounds gradient": Case(
        lambda b: gradient(lambda x: bounded(b, x), b.log_probs)
    ),
    "endpoint_weights": Case(
        lambda b: [
            tw.endpoint_weights(b.scores, b.mask, HIGH, form=form) for form in ("stable", "literal")
        ]
    ),
    "entropy_sensitivity": Case(
        lambda b: of_valid(tw.entropy_sensitivity(b.log_probs, b.scores, b.advantages), b)
    ),
    "extreme_tokens": Case(
        lambda b: b.scores[tuple(tw.extreme_tokens(b.scores, b.mask, count=3).T)], ""
    ),
    "first_tokens": Case(lambda b: tw.first_tokens(b.mask, count=2)),
    "front_fraction": Case(lambda b: tw.front_fraction(b.mask, fraction=0.5)),
    "gathered": Case(lambda b: tw.gathered(b.vector, torch.arange(10), dim=0), "entry"),
    "global_extrema": Case(lambda b: tw.global_extrema(b.number, b.number), ""),
    "global_sum": Case(lambda b: tw.global_sum(b.vector), "entry"),
    "gradient_geometry": Case(
        lambda b: tw.gradient_geometry([b.gradient, b.vector], [b.gradient + 1, b.vector + 1]), ""
    ),
    "group_dynamics": Case(lambda b: tw.group_dynamics(b.heads, [b.mask, b.mask & b.some]), ""),
    "group_gradients": Case(group_gradients, ""),
    "group_projection_ratios": Case(
        lambda b: [
            tw.group_projection_ratios(b.ratios, b.bins, b.mask, count=10)
            for _ in range(int(b.mask.any()))
        ],
        "",
    ),
    "head_classes": Case(lambda b: tw.head_classes(b.heads, b.mask) if b.mask.any() else (), ""),
    "importance_ratio": Case(lambda b: tw.importance_ratio(b.log_probs, b.old_log_probs, b.mask)),
    "layer_agreement": Case(lambda b: tw.layer_agreement(b.layers, b.mask), ""),
    "log_perplexity": Case(lambda b: tw.log_perplexity(b.log_probs, b.mask)),
    "loss_denominator": Case(
        lambda b: [
            tw.loss_denominator(b.mask, b.weights, denominator=name)
            for name in ("all_tokens", "selected_tokens", "weight_sum")
        ],
        "",
    ),
    "loss_magnitude": Case(lambda b: of_valid(tw.loss_magnitude(b.token_loss), b)),
    "masked_extrema": Case(lambda b: tw.masked_extrema(b.scores, b.mask), ""),
    "masked_mean": Case(lambda b: tw.masked_mean(b.scores, b.mask), ""),
    "masked_mean gradient": Case(lambda b: gradient(lambda x: tw.masked_mean(x, b.mask), b.scores)),
    "masked_order": Case(sorted_ordinals, "batch rank"),
    "masked_ranks": Case(lambda b: of_valid(tw.masked_ranks(b.scores, b.mask), b)),
    "masked_sum": Case(lambda b: tw.masked_sum(b.scores, b.mask), ""),
    "masked_sum gradient": Case(lambda b: gradient(lambda x: tw.masked_sum(x, b.mask), b.scores)),
    "match_mass": Case(lambda b: tw.match_mass(b.weights, b.mask)),
    "matched_random": Case(
        lambda b: tw.matched_random(b.some, b.mask, b.ids, seed=7, sample_ids=b.sample_ids)
    ),
    "mean_at_k": Case(lambda b: tw.mean_at_k(b.correct), ""),
    "mean_one": Case(lambda b: scaled(tw.mean_one, b)),
    "mean_one of a response": Case(lambda b: alone(tw.mean_one, b)),
    "median_quadrants": Case(lambda b: tw.median_quadrants(b.scores, b.other, b.mask)),
    "min_max": Case(lambda b: scaled(tw.min_max, b)),
    "min_max of a response": Case(lambda b: alone(tw.min_max, b)),
    "overlong_penalty": Case(
        lambda b: tw.overlong_penalty(b.lengths, max_length=10, buffer_length=4), "batch"
    ),
    "packed_distance": Case(
        lambda b: tw.packed_distance(b.packed_query, b.packed_key, b.packed_positions), "total"
    ),
    "packed_entropy": Case(
        lambda b: tw.packed_entropy(b.packed_query, b.packed_key, b.packed_positions), "total"
    ),
    "packed_received": Case(
        lambda b: tw.packed_received(b.packed_query, b.packed_key, b.packed_positions), "total"
    ),
    "partition_jaccard": Case(lambda b: tw.partition_jaccard(b.some, b.mask, b.mask), ""),
    "pass_at_k": Case(lambda b: tw.pass_at_k(b.correct, k=2), ""),
    "pearson_correlation": Case(lambda b: tw.pearson_correlation(b.scores, b.other, b.mask), ""),
    "predictive_entropy": Case(lambda b: of_valid(tw.predictive_entropy(b.logits), b)),
    "quadrant_tokens": Case(
        lambda b: tw.quadrant_tokens(b.ids, torch.where(b.mask, b.bins % 4, -1), vocab_size=5), ""
    ),
    "quantile_bins": Case(lambda b: tw.quantile_bins(b.scores, b.mask, bins=3)),
    "random_fraction": Case(
        lambda b: tw.random_fraction(b.mask, fraction=0.4, seed=7, sample_ids=b.sample_ids)
    ),
    "rank_correlation": Case(lambda b: tw.rank_correlation(b.scores, b.other, b.mask), ""),
    "reference_divergence": Case(
        lambda b: of_valid(tw.reference_divergence(b.log_probs, b.old_log_probs), b)
    ),
    "relative_position": Case(lambda b: tw.relative_position(b.mask)),
    "relative_surprisal": Case(
        lambda b: tw.relative_surprisal(b.log_probs, b.scores + 0.5, b.mask)
    ),
    "response_statistics": Case(
        lambda b: tw.response_statistics(
            tw.AttentionStatistics(raw=b.rows), response_length=1, prompt_length=b.prompts
        ),
        "batch response",
    ),
    "rollout_statistics": Case(lambda b: tw.rollout_statistics(b.mask, b.rewards), ""),
    "sampled_probability": Case(lambda b: of_valid(tw.sampled_probability(b.log_probs), b)),
    "score_extrema": Case(extrema, ""),
    "score_moments": Case(lambda b: tw.score_moments(b.layers, b.mask), ""),
    "self_certainty": Case(lambda b: of_valid(tw.self_certainty(b.logits), b)),
    "score_quantile": Case(
        lambda b: [
            tw.score_quantile(b.scores, b.mask, fraction=0.3, scope=scope, prompt_ids=b.prompts)
            for scope in ("response", "prompt", "batch")
        ],
        "batch quantile",
    ),
    "select": Case(
        lambda b: [
            tw.select(b.scores, b.mask, fraction=0.4, sample_ids=b.sample_ids, **options)
            for options in scopes(b)
        ]
    ),
    "select_within": Case(
        lambda b: [
            tw.select_within(b.scores, b.mask, sample_ids=b.sample_ids, **budget, **options)
            for budget in ({"mean": 0.3}, {"total": 2.0, "side": "top"})
            for options in scopes(b)
        ]
    ),
    "sequence_parallel_distance": Case(
        lambda b: tw.sequence_parallel_distance(
            b.query, b.key, torch.arange(b.mask.shape[1]), key_mask=b.mask
        )
    ),
    "sequence_parallel_entropy": Case(
        lambda b: tw.sequence_parallel_entropy(
            b.query, b.key, torch.arange(b.mask.shape[1]), key_mask=b.mask
        )
    ),
    "sharded_entropy": Case(
        lambda b: tw.sharded_entropy(
            b.packed_query, b.packed_key, torch.arange(len(b.packed_key)), b.bounds
        ),
        "total",
    ),
    "sequence_parallel_received": Case(
        lambda b: tw.sequence_parallel_received(
            b.query, b.key, torch.arange(b.mask.shape[1]), key_mask=b.mask, rows=b.some
        )
    ),
    "softmax_partition": Case(lambda b: tw.softmax_partition(b.scores, b.mask, extrema(b)), ""),
    "subset_overlap": Case(lambda b: tw.subset_overlap([b.some, b.mask], b.mask), ""),
    "subset_weights": Case(lambda b: tw.subset_weights(b.mask & b.some)),
    "support_by_entropy": Case(lambda b: tw.support_by_entropy(plain_statistics(b), b.mask), ""),
    "support_concentration": Case(
        lambda b: tw.support_concentration(statistics(b), [b.mask, b.mask & b.some]), ""
    ),
    "surprisal": Case(lambda b: of_valid(tw.surprisal(b.log_probs), b)),
    "tensor_parallel_distance": Case(
        lambda b: tw.tensor_parallel_distance(b.query, b.key, key_mask=b.mask, sinks=b.sinks)
    ),
    "tensor_parallel_entropy": Case(
        lambda b: tw.tensor_parallel_entropy(b.query, b.key, key_mask=b.mask, sinks=b.sinks)
    ),
    "tensor_parallel_received": Case(
        lambda b: tw.tensor_parallel_received(b.query, b.key, key_mask=b.mask, sinks=b.sinks)
    ),
    "token_weight_metrics": Case(
        lambda b: tw.token_weight_metrics(b.scores, b.weights, b.mask), ""
    ),
    "top_fraction": Case(lambda b: tw.top_fraction(b.scores, b.mask, fraction=0.5)),
    "unclipped_losses": Case(unclipped),
    "weight_statistics": Case(lambda b: tw.weight_statistics(b.weights, b.mask, bins=b.bins), ""),
    "weighted_rollout": Case(some_recipes),
    "weighted_token_mean": Case(
        lambda b: tw.weighted_token_mean(b.token_loss, b.mask, b.weights), ""
    ),
    "weighted_token_mean gradient": Case(
        lambda b: gradient(lambda x: tw.weighted_token_mean(x, b.mask, b.weights), b.token_loss)
    ),
    "z_scores": Case(lambda b: scaled(tw.z_scores, b)),
    "z_scores of a response": Case(lambda b: alone(tw.z_scores, b)),
    "Recipe.denominator_scale": Case(lambda b: RECIPE.denominator_scale(b.weights, b.mask), ""),
    "Recipe.token_weights": Case(
        lambda b: RECIPE.token_weights(b.scores, b.mask, step=30, sample_ids=b.sample_ids)
    ),
    "Recipe.weighted_scores": Case(every_recipe),
}
# A row's result depends on the others here: on their extrema, their mass or their number.
OF_THE_WHOLE_BATCH = {
    "Recipe.token_weights",
    "Recipe.weighted_scores",
    "advantage_covariance",
    "aggregate_loss gradient",
    "endpoint_weights",
    "masked_mean gradient",
    "match_mass",
    "mean_one",
    "min_max",
    "score_quantile",
    "select",
    "select_within",
    "weighted_rollout",
    "weighted_token_mean gradient",
    "z_scores",
}
# Functions of a model and of what it computes, whose suites have layouts of their own.
OF_A_MODEL = {
    "probe_head_classes",
    "CapturedAttention.distance",
    "CapturedAttention.entropy",
    "CapturedAttention.received",
    "CaughtGradients.backward",
    "GradientProbe.geometry",
    "GradientSeries.metrics",
    "token_alignment",
}


def public_functions() -> Iterator[tuple[str, Callable]]:
    for name in tw.__all__:
        value = getattr(tw, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for method, function in vars(value).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{name}.{method}", function


def takes_tensors(function: Callable) -> bool:
    hints = [each.annotation for each in inspect.signature(function).parameters.values()]
    return any("jaxtyping" in str(hint) or "Tensor" in str(hint) for hint in hints)


def test_every_public_function_of_tensors_has_a_case():
    found = {name for name, function in public_functions() if takes_tensors(function)}
    assert found == {name.partition(" ")[0] for name in CASES} | OF_A_MODEL


def tensors(result: Any) -> Iterator[Tensor]:
    """All numbers that a function returned."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, bool | int | float):
        yield torch.tensor(result, dtype=torch.float64)
    elif dataclasses.is_dataclass(result):
        yield from tensors(list(vars(result).values()))
    elif isinstance(result, Mapping):
        yield from tensors(list(result.values()))
    elif result is not None:
        for part in result:
            yield from tensors(part)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Equal but for rounding, a few dozen additions of numbers near one."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        bound = 64 * torch.finfo(one.dtype).eps if one.is_floating_point() else 0
        torch.testing.assert_close(one, other, atol=bound, rtol=bound, equal_nan=True)


# The tensors of a batch that a result has a gradient of; every other result is detached.
DIFFERENTIABLE = {
    "aggregate_loss": {"token_loss"},
    "align_to_decision": {"rows"},
    "align_to_own": {"rows"},
    "clipped_surrogate_loss": {"log_probs"},
    "clipped_surrogate_loss bounds": {"log_probs"},
    "gated_loss": {"token_loss"},
    "masked_extrema": {"scores"},
    "masked_mean": {"scores"},
    "masked_sum": {"scores"},
    "response_statistics": {"rows"},
    "unclipped_losses": {"log_probs"},
    "weighted_token_mean": {"token_loss"},
}
# What is read beside a function, to make its result one that a layout can be told from.
READ_BESIDE = {"extreme_tokens": {"scores"}, "unclipped_losses": {"weights"}}


@pytest.mark.parametrize("name", [name for name in CASES if "gradient" not in name])
def test_gradients_flow_where_they_are_said_to_and_nowhere_else(name):
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    batch = batch_of(mask, torch.arange(2), 0, torch.float32, exact=True)
    leaves: dict[str, Tensor] = {}

    def leaf(field: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves[field] = tensor.detach().clone().requires_grad_()
        return leaves[field]

    results = list(tensors(CASES[name].call(batch.changed(leaf))))
    moving = [result.sum() for result in results if result.requires_grad]
    reached = set()
    if moving:
        found = torch.autograd.grad(sum(moving), list(leaves.values()), allow_unused=True)
        reached = {field for field, part in zip(leaves, found, strict=True) if part is not None}
    assert reached - READ_BESIDE.get(name, set()) == DIFFERENTIABLE.get(name, set())


FEW = settings(max_examples=settings().max_examples // 10)  # there are many functions


@pytest.mark.parametrize("name", CASES)
@FEW
@given(batch=batches(exact=False), poison=poisons)
def test_poison_under_the_mask_changes_no_bit(name, batch, poison):
    clean = list(tensors(CASES[name].call(batch.poisoned(None))))
    hostile = list(tensors(CASES[name].call(batch.poisoned(poison))))
    for one, other in zip(hostile, clean, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
@FEW
@given(batch=batches(exact=True), poison=poisons, data=st.data())
def test_views_are_as_good_as_contiguous_tensors(name, batch, poison, data):
    batch = batch.poisoned(poison)
    view = VIEWS[data.draw(st.sampled_from(list(VIEWS)))]
    laid_out = batch.changed(lambda _, tensor: view(tensor) if tensor.dim() else tensor)
    result = list(tensors(CASES[name].call(laid_out)))
    assert_same(result, list(tensors(CASES[name].call(batch))))
    for field in AXES.keys() & vars(laid_out):  # and what was given is left as it was
        kept, given = getattr(laid_out, field), getattr(batch, field)
        torch.testing.assert_close(kept, given, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
@FEW
@given(batch=batches(exact=True), poison=poisons, data=st.data())
def test_order_of_rows_and_padding_do_not_show(name, batch, poison, data):
    batch = batch.poisoned(poison)
    case, layout = CASES[name], data.draw(layouts(len(batch.mask)))
    moved = case.call(batch.changed(lambda field, tensor: layout.moved(tensor, AXES[field])))
    result = [layout.restored(part, case.axes) for part in tensors(moved)]
    assert_same(result, list(tensors(case.call(batch))))


ROW_BY_ROW = [
    name
    for name, case in CASES.items()
    if case.axes.startswith("batch") and name not in OF_THE_WHOLE_BATCH
]


@pytest.mark.parametrize("name", ROW_BY_ROW)
@FEW
@given(batch=batches(exact=False), poison=poisons, data=st.data())
def test_micro_batches_give_the_rows_of_the_batch(name, batch, poison, data):
    batch, parts = batch.poisoned(poison), []
    for rows in data.draw(splits(len(batch.mask))):

        def taken(field: str, tensor: Tensor, rows: slice = rows) -> Tensor:
            dim = AXES[field].split().index("batch") if "batch" in AXES[field] else None
            return tensor if dim is None else tensor[(slice(None),) * dim + (rows,)]

        parts.append(list(tensors(CASES[name].call(batch.changed(taken)))))
    joined = [torch.cat(part) for part in zip(*parts, strict=True)]
    assert_same(joined, list(tensors(CASES[name].call(batch))))

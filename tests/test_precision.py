"""The process around a call changes nothing but its speed, and half precision only its input.

One table holds an example call of every public function that takes tensors. Each is repeated under
every default dtype, under autocast, in inference mode, on views of its inputs, on inputs that
require gradients and, where that is of use, compiled.
"""

import dataclasses
import functools
import inspect
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from strategies import read_by_recipes
from tiny_models import batch as token_batch
from tiny_models import tiny
from torch import Tensor, nn

import tokenweights as tw

HALF = (torch.float16, torch.bfloat16)
DENOMINATORS = ("all_tokens", "selected_tokens", "weight_sum")
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
KINDS = ("raw", "normalized", "topk", "fixed")
BACKENDS = ("chunked", "reference")


class Inputs:
    """The same small batch every time, in a dtype and a memory layout: `inputs.scores` and so on.

    Three responses with padding, a hole, and one without a token; NaN wherever the mask is False.
    """

    def __init__(
        self, dtype: torch.dtype = torch.float32, layout: Callable[[Tensor], Tensor] = torch.clone
    ) -> None:
        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        generator = torch.Generator().manual_seed(0)
        mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [0] * 7, [1, 1, 1, 1, 1, 1, 1]]).bool()
        weights = uniform(3, 7)
        values = {
            "mask": mask,
            "subset": mask & (uniform(3, 7) < 0.5),
            "groups": (uniform(3, 7) * 3).long(),
            "bins": (uniform(3, 7) * 4).long(),
            "sample_ids": torch.tensor([11, 5, 2**40]),
            "prompt_length": torch.tensor([2, 3, 1]),
            "lengths": torch.tensor([80, 95, 100, 130]),
            "correct": uniform(5, 4) < 0.4,
            "rewards": uniform(3),
            "decile_ratios": uniform(10),
            "scores": uniform(3, 7).masked_fill(~mask, math.nan),
            "other_scores": uniform(3, 7).masked_fill(~mask, math.nan),
            "token_loss": (uniform(3, 7) - 0.5).masked_fill(~mask, math.nan),
            "weights": (weights * (weights > 0.3)).masked_fill(~mask, math.nan),
            "log_probs": -uniform(3, 7).masked_fill(~mask, math.nan),
            "old_log_probs": -uniform(3, 7).masked_fill(~mask, math.nan),
            "advantages": uniform(3, 1) - 0.5,
            "layers": uniform(2, 3, 7).masked_fill(~mask, math.nan),
            "sequence": uniform(3, 10),
            "logits": (uniform(3, 7, 11) * 8).masked_fill(uniform(3, 7, 11) < 0.1, -math.inf),
            "query": uniform(2, 4, 9, 8) * 4 - 2,
            "key": uniform(2, 2, 9, 8) * 4 - 2,
            "sinks": uniform(4),
            "key_mask": torch.arange(9) >= torch.tensor([[0], [3]]),
            "position_ids": torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]),
            "boundaries": torch.tensor([0, 4, 9], dtype=torch.int32),
            "count": torch.tensor(200.0),
            "ratios": uniform(1, 7) / 3.5,
            "minimum": torch.tensor(0.2),
            "maximum": torch.tensor(0.9),
        }
        self._values = {
            name: layout(value.to(dtype) if value.is_floating_point() else value)
            for name, value in values.items()
        }

    def __getattr__(self, name: str) -> Tensor:
        return self._values[name]

    def attention(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("query", "key")}

    def packed(self) -> dict[str, Tensor]:
        return {"query": self.query[0].transpose(0, 1), "key": self.key[0].transpose(0, 1)}

    def statistics(self) -> tw.AttentionStatistics:
        return tw.attention_statistics(**self.attention(), top_k=3, fixed_k=3)


ENDS = tw.Endpoints(0.1, 1.7)


def regression() -> nn.Linear:
    model = nn.Linear(4, 1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype).view_as(parameter)
            )
    return model


def features(inputs: Inputs) -> Tensor:
    return inputs.logits[..., :4].double().clamp(min=-1)


def aligned(inputs: Inputs, method: str) -> tw.TokenAlignment:
    model = regression()
    loss = functools.partial(lambda: model(features(inputs))[..., 0].sin())
    return tw.token_alignment(loss, model, mask=inputs.mask, method=method)


def grouped(inputs: Inputs) -> tw.GroupGradients:
    model = regression()
    token_loss = model(features(inputs))[..., 0].sin()
    return tw.group_gradients(token_loss, inputs.groups, model.parameters(), mask=inputs.mask)


def captured(inputs: Inputs) -> list[Tensor]:
    ids, mask = token_batch()
    model = captured_model()
    with torch.no_grad(), tw.capture_attention(model, tw.attention_layers(model)) as capture:
        model(ids, attention_mask=mask.long())
    return [calls[0].entropy(key_mask=mask) for calls in capture.calls.values()]


@functools.cache
def captured_model() -> nn.Module:
    return tiny("llama")


def losses(inputs: Inputs) -> list[Tensor]:
    arguments = inputs.old_log_probs, inputs.advantages[:, 0], inputs.mask
    made = tw.unclipped_losses(lambda rows: inputs.log_probs[rows], *arguments, micro_batch_size=2)
    return [loss() for loss in made]


def ruled(inputs: Inputs, recipe: tw.Recipe, sample_ids: Tensor | None = None) -> Tensor:
    return recipe.token_weights(
        None if recipe.signal is None else inputs.scores,
        inputs.mask,
        step=30,
        sample_ids=sample_ids,
        token_groups=inputs.groups,
    )


# Recipes that need scores alone.
PAPER = tw.recipe_names(source="paper")


def rollout_batch(inputs: Inputs) -> tw.RolloutBatch:
    return tw.RolloutBatch(
        mask=inputs.mask,
        sample_ids=inputs.sample_ids,
        prompt_ids=inputs.sample_ids % 2,
        token_ids=inputs.groups,
        advantages=inputs.advantages,
        rewards=inputs.rewards,
        log_probs=inputs.log_probs,
        sampler_log_probs=inputs.old_log_probs,
        predictive_entropy=inputs.scores,
        self_certainty=inputs.other_scores,
        token_loss=inputs.token_loss,
        attention=dict.fromkeys(read_by_recipes(), inputs.scores),
    )


def scaled(scale: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    options = {"prompt_ids": inputs.sample_ids % 2, "advantages": inputs.advantages}
    return [
        scale(inputs.scores, inputs.mask, scope=scope, sign=sign, per=per, **options)
        for scope in ("response", "prompt", "batch")
        for sign in ("any", "negative")
        for per in ("token", "response")
    ]


CALLS: dict[str, Callable[[Inputs], Any]] = {
    "Recipe.denominator_scale": lambda i: [
        tw.recipe({"name": "full", "denominator": name}).denominator_scale(i.weights, i.mask)
        for name in DENOMINATORS
    ],
    "Recipe.token_weights": lambda i: [
        ruled(i, tw.recipe(name), sample_ids)
        for name in PAPER
        for sample_ids in (None, i.sample_ids)
    ],
    "Recipe.weighted_scores": lambda i: [
        tw.recipe(name).placed(36).weighted(rollout_batch(i), step=30).weights
        for name in tw.recipe_names()
    ],
    "advantage_covariance": lambda i: tw.advantage_covariance(i.log_probs, i.advantages, i.mask),
    "aggregate_loss": lambda i: [
        tw.aggregate_loss(i.token_loss, i.mask, i.weights, mode=mode, count=count)
        for mode in MODES
        for count in (None, 100003.0, 0.1, i.count)
    ],
    "align_to_decision": lambda i: [
        tw.align_to_decision(i.sequence, response_length=7, prompt_length=prompt_length)
        for prompt_length in (None, i.prompt_length)
    ],
    "align_to_own": lambda i: [
        tw.align_to_own(i.sequence, response_length=7, prompt_length=prompt_length)
        for prompt_length in (None, i.prompt_length)
    ],
    "attention_distance": lambda i: [
        tw.attention_distance(**i.attention(), bound=bound, backend=backend)
        for bound in (None, 3)
        for backend in BACKENDS
    ],
    "attention_entropy": lambda i: [
        tw.attention_entropy(
            **i.attention(), kind=kind, top_k=3, fixed_k=3, backend=backend, **options
        )
        for kind in KINDS
        for backend in BACKENDS
        for options in (
            {},
            {"key_mask": i.key_mask, "sinks": i.sinks, "softcap": 5.0, "window": 4},
        )
    ],
    "attention_entropy_from_weights": lambda i: [
        tw.attention_entropy_from_weights(
            tw.attention_weights(**i.attention())[:, None], kind=kind, top_k=3, fixed_k=3
        )
        for kind in KINDS
    ],
    "attention_entropy_varlen": lambda i: [
        tw.attention_entropy_varlen(
            **i.packed(), cu_seqlens_q=i.boundaries, cu_seqlens_k=i.boundaries, backend=backend
        )
        for backend in BACKENDS
    ],
    "attention_layers": lambda i: list(tw.attention_layers(captured_model())),
    "attention_received": lambda i: [
        tw.attention_received(
            **i.attention(), horizon=(1, 5), reduction=reduction, sinks=i.sinks, backend=backend
        )
        for reduction in ("mean", "sum", "max")
        for backend in BACKENDS
    ],
    "attention_received_varlen": lambda i: tw.attention_received_varlen(
        **i.packed(), cu_seqlens_q=i.boundaries, cu_seqlens_k=i.boundaries
    ),
    "attention_statistics": lambda i: [
        tw.attention_statistics(**i.attention(), top_k=3, fixed_k=3, backend=backend)
        for backend in BACKENDS
    ],
    "attention_weights": lambda i: tw.attention_weights(**i.attention(), key_mask=i.key_mask),
    "back_fraction": lambda i: tw.back_fraction(i.mask),
    "band_shares": lambda i: tw.band_shares(i.decile_ratios),
    "bernoulli_subset": lambda i: [
        tw.bernoulli_subset(i.mask, probability=0.4, seed=7, sample_ids=ids)
        for ids in (None, i.sample_ids)
    ],
    "bootstrap_interval": lambda i: tw.bootstrap_interval(i.rewards, resamples=50),
    "bottom_fraction": lambda i: tw.bottom_fraction(i.scores, i.mask),
    "bounded_map": lambda i: [
        tw.bounded_map(i.scores, shape=shape, slope=-2.0, offset=0.5, scale=0.7, high=0.6)
        for shape in ("linear", "exponential", "sigmoid")
    ],
    "capture_attention": captured,
    "gated_loss": lambda i: [
        tw.gated_loss(i.token_loss, i.mask, gate, mode=mode)
        for mode, gate in (
            ("drop", i.subset),
            ("detach", i.subset),
            ("soft", i.subset),
            ("soft", i.weights),
        )
    ],
    "clipped_surrogate_loss": lambda i: [
        tw.clipped_surrogate_loss(
            i.log_probs * 20, i.old_log_probs, i.advantages, dual_clip=dual_clip, mask=i.mask
        )
        for dual_clip in (None, 3.0)
    ],
    # A number beside a tensor must not be rounded to the default dtype.
    "clipped_surrogate_loss.bounds": lambda i: [
        tw.clipped_surrogate_loss(
            i.log_probs * 20, i.old_log_probs, i.advantages, mask=i.mask, **{bound: i.weights}
        )
        for bound in ("clip_low", "clip_high")
    ],
    "endpoint_weights": lambda i: [
        tw.endpoint_weights(i.scores, i.mask, ENDS, form=form, extrema=extrema)
        for form in ("stable", "literal")
        for extrema in (None, tw.score_extrema(i.scores, i.mask))
    ],
    "entropy_sensitivity": lambda i: tw.entropy_sensitivity(i.log_probs, i.scores, i.advantages),
    "extreme_tokens": lambda i: tw.extreme_tokens(i.scores, i.mask, count=3),
    "first_tokens": lambda i: tw.first_tokens(i.mask, count=2),
    "front_fraction": lambda i: tw.front_fraction(i.mask),
    "gathered": lambda i: tw.gathered(i.sequence, torch.arange(9, -1, -1), dim=1),
    "global_extrema": lambda i: tw.global_extrema(i.minimum, i.maximum),
    "global_sum": lambda i: tw.global_sum(i.weights),
    "gradient_geometry": lambda i: tw.gradient_geometry([i.sequence], [i.sequence.flip(-1)]),
    "group_dynamics": lambda i: tw.group_dynamics(i.scores, [i.mask, i.subset]),
    "group_gradients": grouped,
    "group_projection_ratios": lambda i: tw.group_projection_ratios(
        i.ratios, i.groups[2:], i.mask[2:], count=3, tolerance=0.5
    ),
    "head_classes": lambda i: tw.head_classes(
        tw.attention_distance(**i.attention(), heads="none"), i.key_mask
    ),
    "importance_ratio": lambda i: [
        tw.importance_ratio(i.log_probs, i.old_log_probs, mask) for mask in (None, i.mask)
    ],
    "layer_agreement": lambda i: tw.layer_agreement(i.layers, i.mask),
    "log_perplexity": lambda i: tw.log_perplexity(i.log_probs, i.mask),
    "loss_denominator": lambda i: [
        tw.loss_denominator(i.mask, i.weights, denominator=name) for name in DENOMINATORS
    ],
    "loss_magnitude": lambda i: tw.loss_magnitude(i.token_loss),
    "masked_extrema": lambda i: tw.masked_extrema(i.scores, i.mask),
    "masked_mean": lambda i: tw.masked_mean(i.scores, i.mask),
    "masked_order": lambda i: [tw.masked_order(x, i.mask) for x in (i.scores, i.groups)],
    "masked_ranks": lambda i: [tw.masked_ranks(x, i.mask) for x in (i.scores, i.groups)],
    "masked_sum": lambda i: tw.masked_sum(i.scores, i.mask),
    "match_mass": lambda i: [
        tw.match_mass(i.weights, i.mask, target=0.7, count=count, mass=mass)
        for count, mass in ((None, None), (100003, 0.1), (i.mask.sum(), i.count))
    ],
    "matched_random": lambda i: [
        tw.matched_random(i.subset, i.mask, i.groups, seed=7, sample_ids=ids)
        for ids in (None, i.sample_ids)
    ],
    "mean_at_k": lambda i: tw.mean_at_k(i.correct),
    "mean_one": lambda i: scaled(tw.mean_one, i),
    "median_quadrants": lambda i: tw.median_quadrants(i.scores, i.other_scores, i.mask),
    "min_max": lambda i: scaled(tw.min_max, i),
    "overlong_penalty": lambda i: tw.overlong_penalty(
        i.lengths, max_length=100, buffer_length=30, factor=0.7
    ),
    "packed_distance": lambda i: tw.packed_distance(**i.packed(), position_ids=i.position_ids),
    "packed_entropy": lambda i: tw.packed_entropy(**i.packed(), position_ids=i.position_ids),
    "packed_received": lambda i: tw.packed_received(**i.packed(), position_ids=i.position_ids),
    "partition_jaccard": lambda i: tw.partition_jaccard(i.subset, i.mask, i.mask),
    "pass_at_k": lambda i: tw.pass_at_k(i.correct, k=2),
    "pearson_correlation": lambda i: tw.pearson_correlation(i.scores, i.other_scores, i.mask),
    "predictive_entropy": lambda i: [
        tw.predictive_entropy(i.logits, chunk_tokens=size) for size in (3, 2048)
    ],
    "probe_head_classes": lambda i: tw.probe_head_classes(
        captured_model(), torch.arange(8)[None], torch.ones(1, 8, dtype=torch.bool), layers=(1,)
    ),
    "quadrant_tokens": lambda i: tw.quadrant_tokens(
        i.groups, i.bins.where(i.mask, -1), vocab_size=3
    ),
    "quantile_bins": lambda i: tw.quantile_bins(i.scores, i.mask, bins=3),
    "random_fraction": lambda i: [
        tw.random_fraction(i.mask, fraction=0.4, seed=7, sample_ids=ids)
        for ids in (None, i.sample_ids)
    ],
    "rank_correlation": lambda i: tw.rank_correlation(i.scores, i.other_scores, i.mask),
    "reference_divergence": lambda i: tw.reference_divergence(i.log_probs, i.old_log_probs),
    "relative_position": lambda i: tw.relative_position(i.mask),
    "relative_surprisal": lambda i: tw.relative_surprisal(i.log_probs, i.scores, i.mask),
    "response_statistics": lambda i: tw.response_statistics(i.statistics(), response_length=7),
    "rollout_statistics": lambda i: tw.rollout_statistics(i.mask, i.rewards),
    "sampled_probability": lambda i: tw.sampled_probability(i.log_probs),
    "score_extrema": lambda i: tw.score_extrema(i.scores, i.mask),
    "score_moments": lambda i: tw.score_moments(i.layers, i.mask),
    "score_quantile": lambda i: [
        tw.score_quantile(i.scores, i.mask, fraction=0.3, scope=scope)
        for scope in ("response", "batch")
    ],
    "select": lambda i: [
        tw.select(i.scores, i.mask, scope=scope, **rule)
        for scope in ("response", "batch")
        for rule in ({"fraction": 0.3}, {"count": 4}, {"threshold": 0.3})
    ],
    "select_within": lambda i: [
        tw.select_within(
            i.scores, i.mask, mean=0.3, scope="batch", sign="negative", advantages=i.advantages
        ),
        tw.select_within(i.scores, i.mask, total=1.3, side="top"),
    ],
    "selected_parameters": lambda i: list(tw.selected_parameters(regression()).values()),
    "self_certainty": lambda i: [
        tw.self_certainty(i.logits, chunk_tokens=size) for size in (3, 2048)
    ],
    "sequence_parallel_distance": lambda i: tw.sequence_parallel_distance(
        **i.attention(), positions=torch.arange(9), key_mask=i.key_mask
    ),
    "sequence_parallel_entropy": lambda i: tw.sequence_parallel_entropy(
        **i.attention(), positions=torch.arange(9), key_mask=i.key_mask
    ),
    "sharded_entropy": lambda i: tw.sharded_entropy(
        **i.packed(), positions=torch.arange(9), cu_seqlens=torch.tensor([0, 4, 9])
    ),
    "sequence_parallel_received": lambda i: tw.sequence_parallel_received(
        **i.attention(), positions=torch.arange(9), key_mask=i.key_mask
    ),
    "softmax_partition": lambda i: tw.softmax_partition(
        i.scores, i.mask, tw.score_extrema(i.scores, i.mask)
    ),
    "subset_overlap": lambda i: tw.subset_overlap([i.subset, i.mask], i.mask),
    "subset_weights": lambda i: tw.subset_weights(i.subset),
    "support_by_entropy": lambda i: tw.support_by_entropy(i.statistics(), i.key_mask, fraction=0.3),
    "support_concentration": lambda i: tw.support_concentration(i.statistics(), [i.key_mask]),
    "surprisal": lambda i: tw.surprisal(i.log_probs),
    "tensor_parallel_distance": lambda i: tw.tensor_parallel_distance(**i.attention(), bound=3),
    "tensor_parallel_entropy": lambda i: tw.tensor_parallel_entropy(**i.attention()),
    "tensor_parallel_received": lambda i: tw.tensor_parallel_received(**i.attention()),
    "token_alignment": lambda i: [aligned(i, method) for method in ("differences", "forward")],
    "token_weight_metrics": lambda i: tw.token_weight_metrics(i.scores, i.weights, i.mask),
    "top_fraction": lambda i: tw.top_fraction(i.scores, i.mask),
    "unclipped_losses": losses,
    "weight_statistics": lambda i: [
        tw.weight_statistics(i.weights, i.mask, bins=bins) for bins in (None, i.bins)
    ],
    "weighted_rollout": lambda i: tw.weighted_rollout(
        tw.recipe("low2high"), i.scores, i.mask, step=30
    ),
    "weighted_token_mean": lambda i: [
        tw.weighted_token_mean(i.token_loss, i.mask, weights, denominator=name, count=count)
        for weights in (None, i.weights)
        for name in DENOMINATORS
        for count in (None, 100003.0, 0.1, i.mask.sum())
    ],
    "z_scores": lambda i: scaled(tw.z_scores, i),
}

# What a model computes changes with autocast and half inputs, and gradients need a graph.
OF_A_MODEL = {"capture_attention", "group_gradients", "token_alignment"}
WITH_A_GRAPH = {"group_gradients", "token_alignment"}
# The compiler takes half a minute for a graph, so these stand for all: every rule of a recipe, the
# random ones above all, losses, and a reduction. The attention room loops over tiles; what returns
# Python numbers or walks over the modules of a model leaves the graph anyway.
COMPILED: dict[str, Callable[[Inputs], Any]] = {
    "aggregate_loss": lambda i: tw.aggregate_loss(
        i.token_loss, i.mask, i.weights, mode="seq-mean-token-mean", denominator="weight_sum"
    ),
    "clipped_surrogate_loss": CALLS["clipped_surrogate_loss"],
    "predictive_entropy": lambda i: tw.predictive_entropy(i.logits),
    **{
        kind: functools.partial(ruled, recipe=tw.recipe(name))
        for kind, name in {tw.recipe(name).rule.kind: name for name in PAPER}.items()
    },
}


def takes_tensors(function: Callable) -> bool:
    hints = [parameter.annotation for parameter in inspect.signature(function).parameters.values()]
    return any(word in str(hints) for word in ("Tensor", "Module", "AttentionStatistics"))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and number of a result, the properties of its dataclasses included."""
    if dataclasses.is_dataclass(value):
        names = [item.name for item in dataclasses.fields(value)]
        names += [name for name, of in vars(type(value)).items() if isinstance(of, property)]
        value = {name: getattr(value, name) for name in names}
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, f"{path}.{name}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def assert_same(got: Any, expected: Any, *, tolerance: float = 0.0) -> None:
    pairs = zip(leaves(got), leaves(expected), strict=True)
    for (path, value), (other_path, other) in pairs:
        assert path == other_path and type(value) is type(other)
        if isinstance(value, Tensor | float):
            torch.testing.assert_close(
                value, other, rtol=tolerance, atol=tolerance, equal_nan=True, msg=path_of(path)
            )
        else:
            assert value == other, path


def path_of(path: str) -> Callable[[str], str]:
    return lambda message: f"result{path}: {message}"


@functools.cache
def plain(name: str) -> Any:
    return CALLS[name](Inputs())


def test_the_table_has_a_call_of_every_public_function_that_takes_tensors():
    public = {name: getattr(tw, name) for name in tw.__all__}
    expected = {name for name, value in public.items() if inspect.isfunction(value)}
    expected = {name for name in expected if takes_tensors(public[name])}
    assert {name for name in CALLS if "." not in name} == expected


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(name, dtype):
    inputs, expected = Inputs(), plain(name)
    torch.set_default_dtype(dtype)
    try:
        got = CALLS[name](inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(got, expected)


@pytest.mark.parametrize("name", sorted(CALLS.keys() - OF_A_MODEL))
def test_autocast_changes_nothing(name):
    with torch.autocast("cpu", torch.bfloat16):
        got = CALLS[name](Inputs())
    assert_same(got, plain(name))


@pytest.mark.parametrize("name", sorted(CALLS.keys() - WITH_A_GRAPH))
def test_inference_mode_changes_nothing(name):
    with torch.inference_mode():
        got = CALLS[name](Inputs())
    assert_same(got, plain(name))


@pytest.mark.parametrize("name", CALLS)
def test_inputs_that_require_gradients_change_nothing(name):
    def layout(value: Tensor) -> Tensor:
        return value.clone().requires_grad_(value.is_floating_point())

    assert_same(CALLS[name](Inputs(layout=layout)), plain(name))


def strided(value: Tensor) -> Tensor:
    return value.repeat_interleave(2, -1)[..., ::2] if value.dim() else value


def transposed(value: Tensor) -> Tensor:
    return value.mT.contiguous().mT if value.dim() > 1 else value


def sliced(value: Tensor) -> Tensor:
    if not value.dim():
        return value
    beside = torch.full_like(value, math.nan if value.is_floating_point() else 1)
    return torch.cat([beside, value, beside], -1)[..., value.shape[-1] : -value.shape[-1]]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("layout", [strided, transposed, sliced])
def test_views_change_nothing(name, layout):
    assert_same(CALLS[name](Inputs(layout=layout)), plain(name), tolerance=2e-6)


@pytest.mark.parametrize("name", sorted(CALLS.keys() - OF_A_MODEL))
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_widened_before_it_adds_up(name, dtype):
    """The result is that of the same rounded input in float64; half only where that is exact."""
    wide = Inputs(dtype)
    wide._values = {
        key: value.double() if value.is_floating_point() else value
        for key, value in wide._values.items()
    }
    got, expected = CALLS[name](Inputs(dtype)), CALLS[name](wide)
    for (path, value), (_, other) in zip(leaves(got), leaves(expected), strict=True):
        if isinstance(value, Tensor | float):
            value, other = torch.as_tensor(value), torch.as_tensor(other)
            tolerance = 0.0 if value.dtype in HALF else 1e-5
            torch.testing.assert_close(
                value.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True,
                msg=path_of(path),
            )  # fmt: skip
        else:
            assert value == other, path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiling_changes_nothing():
    torch.compiler.reset()

    def calls(values: dict[str, Tensor]) -> dict[str, Any]:
        inputs = Inputs.__new__(Inputs)
        inputs._values = values
        return {name: call(inputs) for name, call in COMPILED.items()}

    values = Inputs()._values
    assert_same(torch.compile(calls)(values), calls(values), tolerance=2e-6)

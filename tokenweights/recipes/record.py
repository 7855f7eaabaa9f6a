"""The recipe: signal, rule, schedule and denominator of a run, in one frozen record."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenweights._errors import TokenWeightsError, invalid, nearest
from tokenweights._typing import typed
from tokenweights.attention import EntropyKind
from tokenweights.capture import (
    CapturedAttention,
    attention_layers,
    capture_attention,
    middle_layer,
)
from tokenweights.distributed import agreed
from tokenweights.losses import Denominator, loss_denominator
from tokenweights.masked import masked_ranks, sum_dtype
from tokenweights.partition import (
    MAX_BINS,
    back_fraction,
    bernoulli_subset,
    bottom_fraction,
    front_fraction,
    matched_random,
    quantile_bins,
    random_fraction,
    top_fraction,
)
from tokenweights.recipes.description import recipe_description
from tokenweights.schedules import (
    MAX_WEIGHT,
    Endpoints,
    Schedule,
    constant_schedule,
    cosine_schedule,
    linear_schedule,
    piecewise_schedule,
)
from tokenweights.signals import align_to_decision, align_to_own, relative_position
from tokenweights.weights import endpoint_weights, match_mass, subset_weights

Signal = Literal["none", "attention_entropy", "predictive_entropy", "loss_magnitude"]
Rule = Literal[
    "uniform",
    "endpoints",
    "bottom",
    "top",
    "front",
    "back",
    "random",
    "bernoulli",
    "type_matched",
    "position_matched",
]
ScheduleKind = Literal["constant", "linear", "cosine", "step"]
Alignment = Literal["deciding", "own"]
LayerReduction = Literal["mean", "rank_mean"]

# Below it the denominator "weight_sum" would need a scale that float32 cannot hold.
_MIN_WEIGHT = 1e-20
# Positions are counted in int64.
_MAX_POSITIONS = 2**63 - 1

_SCORED_RULES = ("endpoints", "bottom", "top", "type_matched", "position_matched")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the tokens of a rollout batch are weighted.

    Attributes:
        name: A label; the named recipes are listed by `recipe_names`.
        signal: What scores a token; `"none"` for rules that need no score.
        rule: `"uniform"`; `"endpoints"` for soft weights (Eq. 26-28); otherwise a hard subset.
        fraction: Share of each response a hard rule takes.
        matched_to: The subset, `"bottom"` or `"top"` by score, that a matched rule imitates.
        position_bins: Position bins of the position-matched rule.
        low: Weight at the lowest score, at the start and at the end of the schedule.
        high: Weight at the highest score, at the start and at the end of the schedule.
        schedule: `"linear"` (Eq. 29, 30), `"cosine"`, `"step"` (a jump at `warmup_steps`), or
            `"constant"` (the start values for good).
        warmup_steps: Length of the schedule. The paper's text does not give its value; 100 is ours.
        temperature: Of the softmax in Eq. 26. The paper's text does not give its value; 1 is ours.
        form: `"stable"`, or `"literal"` for Eq. 26 and 27 as printed.
        eps: Epsilon of the literal form. The paper's text does not give its value.
        layers: Attention layers that are probed; None for the middle layer.
        layer_reduction: How scores of several layers become one: their mean, or the mean of their
            ranks within the response, scaled to [0, 1].
        entropy_kind: `"normalized"` (Eq. 13), `"raw"` (Eq. 12), `"topk"` (Eq. 14) or `"fixed"`
            (Eq. 15).
        top_k: Positions of the top-k entropy.
        fixed_k: Positions of the fixed-K entropy.
        alignment: Whose attention scores a token: the row `"deciding"` it, or its `"own"`.
        denominator: What the loss divides by; see `loss_denominator`.
        match_mass: Rescale the weights of each rollout batch to mean 1.
        seed: Of the random rules.
    """

    name: str = "custom"
    signal: Signal = "attention_entropy"
    rule: Rule = "endpoints"
    fraction: float = 0.2
    matched_to: Literal["bottom", "top"] = "bottom"
    position_bins: int = 10
    low: tuple[float, float] = (1.0, 0.0)
    high: tuple[float, float] = (0.0, 1.0)
    schedule: ScheduleKind = "linear"
    warmup_steps: int = 100
    temperature: float = 1.0
    form: Literal["stable", "literal"] = "stable"
    eps: float = 1e-8
    layers: tuple[int, ...] | None = None
    layer_reduction: LayerReduction = "mean"
    entropy_kind: EntropyKind = "normalized"
    top_k: int = 256
    fixed_k: int = 256
    alignment: Alignment = "deciding"
    denominator: Denominator = "all_tokens"
    match_mass: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_type(item.name, item.type, getattr(self, item.name))
        _check(self, "fraction", 0 <= self.fraction <= 1, "in [0, 1]")
        _check(self, "warmup_steps", self.warmup_steps >= 0, ">= 0")
        _check(self, "temperature", 0 < self.temperature < math.inf, "positive and finite")
        _check(self, "eps", 0 < self.eps < math.inf, "positive and finite")
        _check(self, "position_bins", 1 <= self.position_bins <= MAX_BINS, f"in [1, {MAX_BINS}]")
        for name in ("top_k", "fixed_k"):
            _check(self, name, 1 <= getattr(self, name) <= _MAX_POSITIONS, "in [1, 2**63)")
        for name in ("low", "high"):
            pair = getattr(self, name)
            fits = len(pair) == 2 and all(
                value == 0 or _MIN_WEIGHT <= value <= MAX_WEIGHT for value in pair
            )
            condition = "two weights, at the start and at the end, each 0 or in [1e-20, 1e30]"
            _check(self, name, fits, condition)
        _check(self, "layers", self.layers is None or len(self.layers) > 0, "not empty")
        scored = self.rule in _SCORED_RULES
        _check(
            self,
            "signal",
            scored == (self.signal != "none"),
            f"{'other than' if scored else 'equal to'} 'none' with rule {self.rule!r}",
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, ready for JSON or YAML; `from_dict` takes them back.

        Returns:
            Field names to numbers, strings, booleans, None and lists.
        """
        fields = dataclasses.asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()
        }

    @staticmethod
    @typed
    def from_dict(values: Mapping[str, Any]) -> "Recipe":
        """A recipe from a mapping of its fields, such as `to_dict` gives.

        Fields that are left out take the defaults of `Recipe`, except `rule`, which has to be
        there. To change a few fields of a named recipe, pass the mapping to `recipe`.

        Args:
            values: Fields of `Recipe`; lists stand for tuples, and one number for one layer.

        Returns:
            The recipe.

        Raises:
            TokenWeightsError: If a key or a value is unknown; the nearest valid one is named.
        """
        require_known_keys(values)
        if "rule" not in values:
            raise invalid(
                "Recipe.from_dict",
                "values",
                "with a rule",
                sorted(values),
                "Pass the mapping to `recipe` to start from a named recipe.",
            )
        fields = {key: _frozen(value) for key, value in values.items()}
        if isinstance(fields.get("layers"), int):
            fields["layers"] = (fields["layers"],)
        return Recipe(**fields)

    def describe(self) -> str:
        """The recipe as a few lines of text, with the equations it stands for.

        Returns:
            Lines without a trailing newline.
        """
        return recipe_description(self)

    @typed
    def probe_layers(
        self, depth: int, *, available: Sequence[int] | None = None
    ) -> tuple[int, ...]:
        """The attention layers to probe in a model of `depth` layers.

        Args:
            depth: Number of layers.
            available: Indices of the layers that have attention, in ascending order, for hybrid
                models; all layers if None.

        Returns:
            Indices from 0, each once; empty if the signal is not attention. By default the middle
            layer, or the layer with attention that is nearest to it.

        Raises:
            TokenWeightsError: If a layer is not available.
        """
        if self.signal != "attention_entropy":
            return ()
        available = tuple(range(depth)) if available is None else tuple(available)
        if self.layers is None:
            middle = middle_layer(depth)
            nearest = sorted(available, key=lambda layer: abs(layer - middle))
            return tuple(nearest[:1])
        chosen = []
        for layer in self.layers:
            index = available[layer] if -len(available) <= layer < 0 else layer
            if index not in available:
                raise invalid(
                    "Recipe.probe_layers",
                    "layers",
                    f"among the attention layers {list(available)}",
                    layer,
                    "Layers count from 0; -1 is the last one with attention.",
                )
            chosen.append(index)
        return tuple(dict.fromkeys(chosen))  # -1 may name a layer that has been named

    @typed
    def model_layers(self, model: nn.Module) -> tuple[int, ...]:
        """The attention layers to probe in a model; see `probe_layers`.

        Args:
            model: A transformers model.

        Returns:
            Indices from 0; empty if the signal is not attention.

        Raises:
            TokenWeightsError: If the model has no layer that can be tapped, or not one of the
                recipe's.
        """
        if self.signal != "attention_entropy":
            return ()
        with capture_attention(model, ()):  # refuses a model without a layer it can tap
            available = tuple(attention_layers(model))
        config: Any = model.config
        depth = config.get_text_config().num_hidden_layers
        return self.probe_layers(depth, available=available)

    @agreed
    @typed
    def captured_entropy(
        self,
        captured: CapturedAttention,
        *,
        key_mask: Bool[Tensor, "batch key"] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Float[Tensor, "batch query"]:
        """The recipe's kind of entropy of each query of a captured attention call.

        Args:
            captured: The call.
            key_mask: True for real keys; None if there is no padding, or the rows are packed.
            group: Ranks that hold slices of a packed row; None if this is all.

        Returns:
            Entropies.
        """
        kind, top_k, fixed_k = self.entropy_kind, self.top_k, self.fixed_k
        if captured.position_ids is not None:
            return captured.packed_entropy(group=group, kind=kind, top_k=top_k, fixed_k=fixed_k)
        return captured.entropy(key_mask=key_mask, kind=kind, top_k=top_k, fixed_k=fixed_k)

    @typed
    def aligned(
        self, scores: Float[Tensor, "batch position"], *, response_length: int
    ) -> Float[Tensor, "batch token"]:
        """Scores of sequence positions as scores of response tokens, by the recipe's alignment.

        Args:
            scores: Scores of the last positions of sequences whose responses fill the last
                `response_length` columns.
            response_length: Width of the response part.

        Returns:
            One score for each response token.
        """
        align = align_to_decision if self.alignment == "deciding" else align_to_own
        return align(scores, response_length=response_length)

    @typed
    def merged_layers(
        self, scores: Sequence[Float[Tensor, "batch token"]], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token"]:
        """Scores of the probed layers as one score for each token, by `layer_reduction`.

        Args:
            scores: Scores of each probed layer.
            mask: True for valid response tokens.

        Returns:
            Their mean, or the mean of their within-response ranks over `T - 1`, of the dtype of
            the scores but float32 for half precision and for ranks.
        """
        if not scores:
            raise invalid(
                "Recipe.merged_layers", "scores", "of at least one layer", "none", "Probe a layer."
            )
        if self.layer_reduction == "rank_mean":
            last = (mask.sum(-1, keepdim=True) - 1).clamp(min=1)
            scores = [masked_ranks(layer, mask).float() / last for layer in scores]
        elif len(scores) == 1:
            return scores[0].to(sum_dtype(scores[0].dtype))
        layers = torch.stack(list(scores))
        return layers.mean(0, dtype=sum_dtype(layers.dtype))

    @typed
    def endpoints(self, step: int) -> Endpoints:
        """Weights of the lowest-scored and of the highest-scored token at a training step.

        Args:
            step: Training step, from 0.

        Returns:
            The endpoints; `Endpoints(1, 1)` for the uniform rule.

        Raises:
            TokenWeightsError: If `step` is negative or the rule is a hard one.
        """
        _require_step("Recipe.endpoints", step)
        if self.rule == "uniform":
            return Endpoints(1.0, 1.0)
        _check(self, "rule", self.rule == "endpoints", "'endpoints' for a recipe with endpoints")
        return Endpoints(_schedule(self, self.low)(step), _schedule(self, self.high)(step))

    @agreed
    @typed
    def token_weights(
        self,
        scores: Float[Tensor, "batch token"] | None,
        mask: Bool[Tensor, "batch token"],
        *,
        step: int,
        sample_ids: Int[Tensor, " batch"] | None = None,
        token_groups: Int[Tensor, "batch token"] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Float[Tensor, "batch token"]:
        """Weights of a rollout batch's tokens, >= 0, float32, detached.

        Args:
            scores: This rank's scores, or None if the recipe needs none.
            mask: True for valid response tokens.
            step: Training step, for the schedule.
            sample_ids: A number for each response that stays with it however the batch is laid
                out, for random rules; the row number if None.
            token_groups: Type of each token, for example its id, for the type-matched rule.
            group: The ranks that share the rollout batch. All of them have to call.

        Returns:
            Weights, 0 off the mask.

        Raises:
            TokenWeightsError: If scores or token groups are missing, a valid score is not finite,
                or the step is negative.
        """
        _require_step("Recipe.token_weights", step)
        if self.signal != "none" and scores is None:
            raise invalid(
                "Recipe.token_weights",
                "scores",
                f"given for the signal {self.signal!r}",
                None,
                "Pass one score for each response token.",
            )
        if self.rule == "uniform":
            weights = subset_weights(mask)
        elif self.rule == "endpoints":
            assert scores is not None
            weights = endpoint_weights(
                scores,
                mask,
                self.endpoints(step),
                temperature=self.temperature,
                form=self.form,
                eps=self.eps,
                group=group,
            )
        else:
            weights = subset_weights(self._subset(scores, mask, sample_ids, token_groups))
        return match_mass(weights, mask, group=group) if self.match_mass else weights

    @agreed
    @typed
    def denominator_scale(
        self,
        weights: Float[Tensor, "batch token"],
        mask: Bool[Tensor, "batch token"],
        *,
        group: dist.ProcessGroup | None = None,
    ) -> Float[Tensor, ""]:
        """The factor on the weights that turns an all-token mean into the recipe's mean.

        A trainer whose loss divides by the number of valid tokens divides by the recipe's
        denominator once the weights carry this factor.

        Args:
            weights: From `token_weights`.
            mask: True for valid response tokens.
            group: The ranks that share the batch. All of them have to call.

        Returns:
            1 for `"all_tokens"`; valid tokens over selected tokens, or over the sum of weights,
            otherwise, and 0 where that is 0.
        """
        if self.denominator == "all_tokens":
            return torch.ones((), dtype=torch.float32, device=weights.device)
        count = loss_denominator(mask, group=group)
        own = loss_denominator(mask, weights, denominator=self.denominator, group=group)
        return torch.where(own > 0, count / own.where(own > 0, 1), 0.0).float()

    def _subset(
        self,
        scores: Tensor | None,
        mask: Tensor,
        sample_ids: Tensor | None,
        token_groups: Tensor | None,
    ) -> Tensor:
        fraction, seed = self.fraction, self.seed
        if self.rule == "front":
            return front_fraction(mask, fraction=fraction)
        if self.rule == "back":
            return back_fraction(mask, fraction=fraction)
        if self.rule == "random":
            return random_fraction(mask, fraction=fraction, seed=seed, sample_ids=sample_ids)
        if self.rule == "bernoulli":
            return bernoulli_subset(mask, probability=fraction, seed=seed, sample_ids=sample_ids)
        assert scores is not None
        side = self.rule if self.rule in ("bottom", "top") else self.matched_to
        subset = (bottom_fraction if side == "bottom" else top_fraction)(
            scores, mask, fraction=fraction
        )
        if self.rule in ("bottom", "top"):
            return subset
        if self.rule == "position_matched":
            token_groups = quantile_bins(relative_position(mask), mask, bins=self.position_bins)
        if token_groups is None:
            raise invalid(
                "Recipe.token_weights",
                "token_groups",
                "given for the rule 'type_matched'",
                None,
                "Pass the token ids.",
            )
        return matched_random(subset, mask, token_groups, seed=seed, sample_ids=sample_ids)


def _schedule(made: Recipe, pair: tuple[float, float]) -> Schedule:
    start, end = pair
    if made.schedule == "constant":
        return constant_schedule(start)
    if made.schedule == "step":
        if made.warmup_steps == 0:
            return constant_schedule(end)
        return piecewise_schedule([start, end], [made.warmup_steps])
    make = linear_schedule if made.schedule == "linear" else cosine_schedule
    return make(start, end, made.warmup_steps)


def _require_step(function: str, step: int) -> None:
    if step < 0:
        raise invalid(function, "step", ">= 0", step, "Count training steps from 0.")


def _check(made: Recipe, field: str, fits: bool, condition: str) -> None:
    if not fits:
        raise invalid(
            f"recipe {made.name}",
            field,
            condition,
            repr(getattr(made, field)),
            "Change that field.",
        )


def _check_type(field: str, annotation: Any, value: Any) -> None:
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise unknown(field, value, get_args(annotation))
    elif not _fits(value, annotation):
        kind = annotation.__name__ if isinstance(annotation, type) else annotation
        raise invalid("recipe", field, f"of type {kind}", repr(value), "Change that field.")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of a field's type, every item of a tuple included."""
    if get_origin(annotation) is UnionType:
        return any(_fits(value, choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(annotation)[0]) for v in value)
    if annotation in (int, float):
        kinds = (int,) if annotation is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _frozen(value: Any) -> Any:
    """JSON and YAML have lists where a recipe has tuples."""
    return tuple(value) if isinstance(value, list) else value


def require_known_keys(values: Mapping[str, Any]) -> None:
    """Raise if a key is no field of `Recipe`, naming the nearest one."""
    known = [item.name for item in dataclasses.fields(Recipe)]
    for key in values:
        if key not in known:
            raise unknown("key", key, known)


def unknown(what: str, value: Any, known: Sequence[str]) -> TokenWeightsError:
    """An error for a value that is none of the known ones, naming the nearest of them."""
    near = nearest(value, known)
    hint = f"Did you mean {near!r}?" if near else f"Choose one of {', '.join(known)}."
    return invalid("recipe", what, "known", repr(value), hint)

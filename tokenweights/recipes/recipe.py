"""The recipe: signal, rule and denominator of a run, composed."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenweights._errors import TokenWeightsError, invalid
from tokenweights._typing import typed
from tokenweights.diagnostics import token_weight_metrics
from tokenweights.distributed import agreed
from tokenweights.losses import Denominator, loss_denominator
from tokenweights.masked import require_finite, require_weights, sum_dtype
from tokenweights.recipes.attention import AttentionEntropy, model_layers
from tokenweights.recipes.backward import AttentionColumns, AttentionReading
from tokenweights.recipes.batch import RolloutBatch
from tokenweights.recipes.combine import needs_scores
from tokenweights.recipes.description import recipe_description
from tokenweights.recipes.keys import placed_keys
from tokenweights.recipes.kinds import part_from, part_values
from tokenweights.recipes.parts import (
    Rule,
    Signal,
    columns_of,
    label,
    mapped_parts,
    parts_of,
    reader,
    require_numbers,
    unknown,
)
from tokenweights.recipes.rules import EndpointWeights
from tokenweights.recipes.signals import PredictiveEntropy
from tokenweights.schedules import MAX_WEIGHT
from tokenweights.weights import match_mass

# Where the fields and methods of a recipe went that had one flat record of all of them.
_OF_SIGNAL = ("layers", "layer_reduction", "entropy_kind", "top_k", "fixed_k", "alignment")
_OF_RULE = ("low", "high", "schedule", "warmup_steps", "temperature", "form", "eps", "fraction")
_OF_RULE = (*_OF_RULE, "matched_to", "position_bins", "seed", "endpoints")
MOVED: dict[str, str] = {
    **{name: "signal" for name in _OF_SIGNAL},
    **{name: "rule" for name in _OF_RULE},
    "aligned": "attention",
}
RENAMED = {
    "captured_entropy": "attention.captured",
    "merged_layers": "attention.merged",
    "probe_layers": "placed(depth).layers",
    "model_layers": "on_model(model).layers",
}


@dataclass(frozen=True)
class WeightedRollout:
    """Weights of a rollout batch's tokens, and what to log about them.

    Attributes:
        weights: Token weights, `batch token`, >= 0, 0 off the mask.
        scale: The factor on the weights that turns a mean over all valid tokens into the recipe's
            mean, see `Recipe.denominator_scale`.
        metrics: Those of `token_weight_metrics`, with `score` for `entropy` where the scores are
            none, and `endpoint_low` and `endpoint_high` for a soft recipe; empty if the batch has
            no valid token.
        scores: The scores behind the weights; None if the recipe has no signal.
    """

    weights: Float[Tensor, "batch token"]
    scale: Float[Tensor, ""]
    metrics: dict[str, float]
    scores: Float[Tensor, "batch token"] | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the tokens of a rollout batch are weighted: a signal scores them, a rule weighs them.

    Signal and rule are parts of `tokenweights.recipes.signals`, `rules`, `field` and `combine`, or
    any callables of yours with the signatures of `tokenweights.recipes.Signal` and `Rule`.

    Attributes:
        name: A label; the named recipes are listed by `recipe_names`.
        signal: What scores a token; None for rules that need no score.
        rule: What makes weights of scores.
        denominator: What the loss divides by; see `loss_denominator`.
        match_mass: Rescale the weights of each rollout batch to mean 1; not beside the denominator
            `"selected_tokens"`, which does that to a selection.

    Raises:
        TokenWeightsError: If a part is none, or they do not fit together.

    Example:
        >>> from tokenweights.recipes import rules, signals
        >>> made = Recipe(signal=signals.PredictiveEntropy(), rule=rules.Top(fraction=0.5))
        >>> batch = RolloutBatch(
        ...     mask=torch.ones(1, 4, dtype=torch.bool),
        ...     predictive_entropy=torch.tensor([[0.1, 2.0, 0.0, 1.0]]),
        ... )
        >>> made.weighted(batch, step=0).weights
        tensor([[0., 1., 0., 1.]])
    """

    name: str = "custom"
    signal: Signal | None = None
    rule: Rule
    denominator: Denominator = "all_tokens"
    match_mass: bool = False

    def __new__(cls, **fields: Any) -> "Recipe":
        """Refuses the fields of the flat record that a recipe once was, by name."""
        for key in fields:
            if key in MOVED:
                _raise_moved(key)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise self._invalid("name", "of type str")
        if self.denominator not in get_args(Denominator):
            raise unknown("recipe", "denominator", self.denominator, get_args(Denominator))
        if not isinstance(self.match_mass, bool):
            raise self._invalid("match_mass", "of type bool")
        if self.match_mass and self.denominator == "selected_tokens":
            condition = f"False with the denominator {self.denominator!r}"
            hint = "Both even out the share of selected tokens, and the step would grow: take one."
            raise invalid(f"recipe {self.name}", "match_mass", condition, True, hint)
        for role in ("rule", "signal"):
            part = getattr(self, role)
            if isinstance(part, str):
                hint = f"Pass the part itself, or `recipe({{{role!r}: {part!r}, ...}})`."
                raise invalid(f"recipe {self.name}", role, "a part, not its name", part, hint)
            if not (callable(part) and not isinstance(part, type)) and not (
                part is None and role == "signal"
            ):
                raise self._invalid(role, "callable")
        _ = self.columns  # raises where a part names one that there is not
        if needs_scores(self.rule) != (self.signal is not None):
            needs = "given" if self.signal is None else "None"
            hint = "The one scores tokens where the other needs no scores, or none where it does."
            if self.signal is None:
                hint += " A rule of yours that needs none says `scored = False`."
            got = f"{self.signal and label(self.signal)}"
            condition = f"{needs} with the rule {label(self.rule)!r}"
            raise invalid(f"recipe {self.name}", "signal", condition, got, hint)
        if len({part.statistic for part in self._entropies}) > 1:
            condition = "that reads one statistic of attention at one row"
            hint = "Its attention signals may differ in layers and their reduction only."
            raise invalid(f"recipe {self.name}", "signal", condition, "several", hint)
        if len({part.alignment for part in self._attention}) > 1:
            condition = "that reads attention at one row"
            hint = "Give its entropies the alignment `own`, as columns have it."
            raise invalid(f"recipe {self.name}", "signal", condition, "several", hint)

    def __getattr__(self, name: str) -> Any:
        if name in MOVED or name in RENAMED:
            _raise_moved(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _invalid(self, field: str, condition: str) -> Exception:
        got = repr(getattr(self, field))
        return invalid(f"recipe {self.name}", field, condition, got, "Change that field.")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that a batch has to have, beside those that every batch has."""
        return tuple(dict.fromkeys((*columns_of(self.signal), *columns_of(self.rule))))

    @property
    def _attention(self) -> tuple[AttentionEntropy | AttentionColumns, ...]:
        parts = (*parts_of(self.signal), *parts_of(self.rule))
        return tuple(
            part for part in parts if isinstance(part, AttentionEntropy | AttentionColumns)
        )

    @property
    def _entropies(self) -> tuple[AttentionEntropy, ...]:
        return tuple(part for part in self._attention if isinstance(part, AttentionEntropy))

    @property
    def attention(self) -> AttentionEntropy | AttentionReading | None:
        """What is read of a model's attention, of all layers together; None if nothing is."""
        if any(isinstance(part, AttentionColumns) for part in self._attention):
            return AttentionReading(self._attention)
        return self.entropy

    @property
    def entropy(self) -> AttentionEntropy | None:
        """The attention entropy that is read, of all layers together; None if none is."""
        if not self._entropies:
            return None
        first = self._entropies[0]
        layers: dict[int, None] = {}
        for part in self._entropies:
            if part.layers is None:
                return dataclasses.replace(first, layers=None)
            layers |= dict.fromkeys(part.layers)
        return dataclasses.replace(first, layers=tuple(layers))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that are read, once `on_model` or `placed` has named them; empty if none are."""
        return (self.attention.layers or ()) if self.attention else ()

    @property
    def readings(self) -> tuple[int | str, ...]:
        """Names of the columns of `RolloutBatch.attention` that are read, once layers have one."""
        return self.attention.names if self.attention else ()

    @typed
    def placed(self, depth: int, *, available: Sequence[int] | None = None) -> "Recipe":
        """The recipe with its attention layers numbered for a model of `depth` layers.

        Args:
            depth: Number of layers.
            available: Indices of the layers that have attention, in ascending order, for hybrid
                models; all layers if None.

        Returns:
            The recipe; as it is if it reads no attention.

        Raises:
            TokenWeightsError: If a layer is not available.
        """

        def change(part: Any) -> Any:
            if isinstance(part, AttentionEntropy | AttentionColumns):
                return part.placed(depth, available=available)
            return part

        signal, rule = mapped_parts(self.signal, change), mapped_parts(self.rule, change)
        return dataclasses.replace(self, signal=signal, rule=rule)

    @typed
    def on_model(self, model: nn.Module) -> "Recipe":
        """The recipe with its attention layers numbered for a model; see `placed`.

        Args:
            model: A transformers model.

        Returns:
            The recipe; as it is if it reads no attention.

        Raises:
            TokenWeightsError: If the model has no layer that can be tapped, or not one of the
                recipe's.
        """
        if not self._attention:
            return self
        depth, available = model_layers(model)
        return self.placed(depth, available=available)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, ready for JSON or YAML; `recipe` takes them back.

        Returns:
            `name`, `signal`, `rule`, `denominator` and `match_mass`; a part is a mapping of its
            `kind` and its fields.

        Raises:
            TokenWeightsError: If a part of yours has fields that are no plain values, or is defined
                where it cannot be imported.
        """
        return {
            "name": self.name,
            "signal": part_values(self.signal),
            "rule": part_values(self.rule),
            "denominator": self.denominator,
            "match_mass": self.match_mass,
        }

    @staticmethod
    @typed
    def from_dict(values: Mapping[str, Any]) -> "Recipe":
        """A recipe from a mapping such as `to_dict` gives.

        What is left out takes its default, except `rule`, which has to be there. A key that belongs
        to exactly one part may stand beside the parts. To change a named recipe, pass the mapping
        to `recipe`.

        Args:
            values: `rule`, and any of the other keys.

        Returns:
            The recipe.

        Raises:
            TokenWeightsError: If a key or a value is unknown; the nearest valid one is named.
        """
        if "rule" not in values:
            got, hint = sorted(values), "Pass the mapping to `recipe` to start from a named recipe."
            raise invalid("Recipe.from_dict", "values", "with a rule", got, hint)
        return recipe_from(None, values)

    def describe(self) -> str:
        """The recipe as a few lines of text, with the equations it stands for.

        Returns:
            Lines without a trailing newline.
        """
        return recipe_description(self)

    @agreed
    @typed
    def scores(
        self, batch: RolloutBatch, *, group: dist.ProcessGroup | None = None
    ) -> Float[Tensor, "batch token"] | None:
        """The signal's scores of a batch's tokens, detached; None if the recipe has no signal.

        Args:
            batch: This rank's rows.
            group: The ranks that share the rollout batch, if the batch does not name them.

        Returns:
            Scores.

        Raises:
            TokenWeightsError: If a column is missing, or the signal returns anything but a finite
                float for each valid token.
        """
        if self.signal is None:
            return None
        batch = _over(batch, group)
        _require_columns(batch, self.signal)
        scores = self.signal(batch)
        _require_tokens(label(self.signal), "scores", scores, batch.mask)
        require_finite(label(self.signal), "scores", scores, batch.mask)
        return scores

    @agreed
    @typed
    def weighted(
        self, batch: RolloutBatch, *, step: int, group: dist.ProcessGroup | None = None
    ) -> WeightedRollout:
        """Weights, denominator scale and metrics of a rollout batch, exact over ranks, detached.

        A trainer that multiplies its advantages by `weights * scale` and goes on as it is follows
        the recipe, if its loss is homogeneous in the advantage and divides by the number of valid
        tokens.

        Args:
            batch: This rank's rows, with the recipe's `columns`.
            step: Training step from 0, for schedules.
            group: The ranks that share the rollout batch, if the batch does not name them. All of
                them have to call.

        Returns:
            The record.

        Raises:
            TokenWeightsError: If a column is missing, the step is negative, or a part returns
                anything but finite numbers, and weights >= 0, for each valid token.
        """
        batch = _over(batch, group)
        return self._weighted(self.scores(batch), batch, step)

    @agreed
    @typed
    def weighted_scores(
        self, scores: Float[Tensor, "batch token"] | None, batch: RolloutBatch, *, step: int
    ) -> WeightedRollout:
        """As `weighted`, from scores at hand, whatever the signal.

        Args:
            scores: This rank's scores, or None if the recipe needs none.
            batch: This rank's rows, with the columns that the rule reads.
            step: Training step from 0, for schedules.

        Returns:
            The record.

        Raises:
            TokenWeightsError: As `weighted`, or if scores are missing, of another shape than the
                mask, or not finite.
        """
        self._require_scores("Recipe.weighted_scores", scores, batch.mask)
        return self._weighted(scores, batch, step)

    def _weighted(self, scores: Tensor | None, batch: RolloutBatch, step: int) -> WeightedRollout:
        """The record of scores that are finite."""
        group, weights = batch.group, self._token_weights(scores, batch, step)
        metrics = token_weight_metrics(scores, weights, batch.mask, group=group)
        if not isinstance(self.signal, AttentionEntropy | PredictiveEntropy):
            metrics = {name.replace("entropy", "score"): metrics[name] for name in metrics}
        if metrics and isinstance(self.rule, EndpointWeights):
            ends = self.rule.endpoints(step)
            metrics |= {"endpoint_low": ends.low, "endpoint_high": ends.high}
        scale = self.denominator_scale(weights, batch.mask, group=group)
        return WeightedRollout(weights, scale, metrics, scores)

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
        """Weights from scores at hand, whatever the signal: of a rule that reads nothing else.

        Args:
            scores: This rank's scores, or None if the recipe needs none.
            mask: True for valid response tokens.
            step: Training step, for the schedule.
            sample_ids: As in `RolloutBatch`, for random rules.
            token_groups: Type of each token, for example its id, for the type-matched rule.
            group: The ranks that share the rollout batch. All of them have to call.

        Returns:
            Weights, 0 off the mask.

        Raises:
            TokenWeightsError: If scores or token groups are missing, a valid score is not finite,
                or the step is negative.
        """
        self._require_scores("Recipe.token_weights", scores, mask)
        batch = RolloutBatch(mask=mask, sample_ids=sample_ids, token_ids=token_groups, group=group)
        return self._token_weights(scores, batch, step)

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
            weights: From `weighted`.
            mask: True for valid response tokens.
            group: The ranks that share the batch. All of them have to call.

        Returns:
            1 for `"all_tokens"`; valid tokens over selected tokens, or over the sum of weights,
            otherwise, and 0 where that is 0.

        Raises:
            TokenWeightsError: If the weights are so small that float32 cannot hold the factor.
        """
        if self.denominator == "all_tokens":
            return torch.ones((), dtype=torch.float32, device=weights.device)
        count = loss_denominator(mask, group=group)
        own = loss_denominator(mask, weights, denominator=self.denominator, group=group)
        scale = torch.where(own > 0, count / own.where(own > 0, 1), 0.0).float()
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(scale)):
            condition = "with a mean of 0, or of at least 3e-39, which its inverse can scale to 1"
            got, hint = (
                float(own / count),
                "Give the rule larger weights: their ratios are what counts.",
            )
            raise invalid("Recipe.denominator_scale", "weights", condition, f"{got:.3g}", hint)
        return scale

    def _require_scores(self, caller: str, scores: Tensor | None, mask: Tensor) -> None:
        """Raises, under the name that was called, unless scores at hand are there and finite."""
        hint = "Pass one score for each response token."
        if scores is None:
            if self.signal is not None:
                raise invalid(caller, "scores", "given for a recipe with a signal", None, hint)
            return
        if scores.shape != mask.shape:
            condition = f"of shape {tuple(mask.shape)} as the mask"
            raise invalid(caller, "scores", condition, tuple(scores.shape), hint)
        require_finite(caller, "scores", scores, mask)

    def _token_weights(self, scores: Tensor | None, batch: RolloutBatch, step: int) -> Tensor:
        if step < 0:
            raise invalid("Recipe", "step", ">= 0", step, "Count training steps from 0.")
        _require_columns(batch, self.rule)
        # Of all parts at once: one that is reached late would refuse after ranks have communicated.
        require_numbers(self.rule, batch, batch.group)
        weights = self.rule(scores, batch, step=step, group=batch.group)
        _require_tokens(label(self.rule), "weights", weights, batch.mask)
        require_weights(label(self.rule), weights, batch.mask)
        weights = torch.where(batch.mask, weights, 0.0)
        _require_room(label(self.rule), weights)
        weights = weights.float()
        return match_mass(weights, batch.mask, group=batch.group) if self.match_mass else weights


def recipe_from(base: Recipe | None, values: Mapping[str, Any]) -> Recipe:
    """A recipe with a mapping's changes, or of the mapping alone.

    Args:
        base: The recipe that is changed; None for a new one, which needs a rule.
        values: Fields of `Recipe`, and keys that belong to exactly one of its parts.

    Returns:
        The recipe.

    Raises:
        TokenWeightsError: If a key or a value is unknown; the nearest valid one is named.
    """
    own = [item.name for item in dataclasses.fields(Recipe)]
    values = _without_old_defaults(values)
    fields = {key: value for key, value in values.items() if key in own}
    loose = {key: value for key, value in values.items() if key not in own}
    for role in ("rule", "signal"):
        if role in fields:
            fields[role] = part_from(fields[role], role=role, base=base and getattr(base, role))
    made = {name: getattr(base, name) for name in own} if base else {}
    made |= fields
    if "signal" not in made or ("rule" in fields and "signal" not in fields):
        if not needs_scores(made["rule"]):
            made["signal"] = None
        elif made.get("signal") is None:
            made["signal"] = AttentionEntropy()
    for role in ("rule", "signal"):
        made[role] = part_from(made[role], role=role)
    made["rule"], made["signal"] = placed_keys(made["rule"], made["signal"], loose, own=own)
    return Recipe(**made)


# What `Recipe.to_dict` wrote when a recipe was one flat record, with the defaults it had.
_FLAT_DEFAULTS: dict[str, Any] = {
    "fraction": 0.2,
    "matched_to": "bottom",
    "position_bins": 10,
    "low": [1.0, 0.0],
    "high": [0.0, 1.0],
    "schedule": "linear",
    "warmup_steps": 100,
    "temperature": 1.0,
    "form": "stable",
    "eps": 1e-8,
    "layers": None,
    "layer_reduction": "mean",
    "entropy_kind": "normalized",
    "top_k": 256,
    "fixed_k": 256,
    "alignment": "deciding",
    "seed": 0,
}


def _without_old_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping without what a saved flat record says by default, of parts it does not have."""
    if not _FLAT_DEFAULTS.keys() <= values.keys():
        return dict(values)
    return {
        key: value
        for key, value in values.items()
        if key not in _FLAT_DEFAULTS or value != _FLAT_DEFAULTS[key]
    }


def _over(batch: RolloutBatch, group: dist.ProcessGroup | None) -> RolloutBatch:
    """The rows as a part of a batch that the ranks of a group share; as they are if None."""
    return batch if group is None else dataclasses.replace(batch, group=group)


def _require_columns(batch: RolloutBatch, part: Any) -> None:
    for name in columns_of(part):
        batch.require([name], caller=label(reader(part, name)))


def _require_tokens(function: str, what: str, values: Any, mask: Tensor) -> None:
    """Raises unless a part returned a float for each token, on the batch's device, detached."""
    hint = "A part returns one number for each token of the batch, detached."
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = f"{values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise invalid(function, what, "a float tensor from it", got, hint)
    if values.shape != mask.shape:
        condition, got = f"of shape {tuple(mask.shape)} from it", tuple(values.shape)
        raise invalid(function, what, condition, got, hint)
    if values.device != mask.device:
        raise invalid(function, what, f"on {mask.device} from it", values.device, hint)
    if values.requires_grad:
        raise invalid(function, what, "without a graph from it", "a tensor with a graph", hint)


def _require_room(function: str, weights: Tensor) -> None:
    """Raises where a weight is so large that float32 has no room for it times a scale."""
    if torch.compiler.is_compiling() or weights.numel() == 0:
        return
    largest = weights.amax().to(sum_dtype(weights.dtype))
    if bool(largest > MAX_WEIGHT):
        condition, hint = f"at most {MAX_WEIGHT:g} under a True mask", "Make the weights smaller."
        raise invalid(function, "weights", condition, largest.item(), hint)


def _raise_moved(name: str) -> NoReturn:
    owner = MOVED.get(name)
    new = f"{owner}.{name}" if owner else RENAMED[name]
    message = f"`Recipe`: `{name}` is now `recipe.{new}`."
    if owner in ("signal", "rule") and name != "endpoints":
        message += f" To make one, pass a mapping: `recipe({{'name': ..., {name!r}: ...}})`."
    raise MovedError(message)


class MovedError(TokenWeightsError, AttributeError):
    """A name that a recipe once had, with the one it has now."""

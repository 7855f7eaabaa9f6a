"""What a gradient probe logs during training: the geometry of one batch, again and again.

A trainer adapter carries tensors here and numbers to its log; everything between is this file.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenweights._errors import invalid, refused_by, require_state_keys
from tokenweights._typing import typed
from tokenweights.distributed import agreed, is_shared
from tokenweights.gradients.alignment import token_alignment
from tokenweights.gradients.dispersion import OnlineDispersion
from tokenweights.gradients.evaluation import TokenLoss
from tokenweights.gradients.probe import GradientProbe
from tokenweights.gradients.ratios import band_shares, group_projection_ratios
from tokenweights.losses import clipped_surrogate_loss
from tokenweights.partition import bottom_fraction, quantile_bins, random_fraction, top_fraction

SUBSETS = ("anchor", "explorer", "random")


class GradientSeries:
    r"""Metrics of the gradients of a probe batch, with the dispersion of cosines over the probes.

    The metrics, under the prefix `gradient/`:

    * `decile_0` ... `decile_9`: projection ratios of the score deciles (Eq. 6), which sum to one,
      below float32 up to rounding
    * `low_share`, `middle_share`, `high_share`: the bands of appendix J.1
    * `anchor_*`, `explorer_*`, `random_*`: `norm_ratio`, `cosine`, `projection_ratio` of the 20 %
      of lowest, highest and random score (Eq. 4-6); `cosine_std` and `cosine_cv` over the probes so
      far (J.2)
    * `full_norm`, `sum_error`: length of the full gradient; distance of the deciles' sum from one,
      where they come from differences before they were scaled to it

    Attributes:
        cosines: The dispersion of each subset's cosine.

    Example:
        >>> model, inputs = torch.nn.Linear(2, 1), torch.eye(2).expand(5, 2, 2)
        >>> mask = torch.ones(5, 2, dtype=torch.bool)
        >>> series = GradientSeries()
        >>> metrics = series.metrics(
        ...     GradientProbe(model),
        ...     lambda: model(inputs)[..., 0],
        ...     scores=torch.arange(10.0).reshape(5, 2),
        ...     mask=mask,
        ... )
        >>> round(sum(metrics[f"gradient/decile_{number}"] for number in range(10)), 3)
        1.0
    """

    def __init__(self) -> None:
        self.cosines = {subset: OnlineDispersion() for subset in SUBSETS}

    @agreed
    @typed
    def metrics(
        self,
        probe: GradientProbe,
        token_loss: TokenLoss | list[TokenLoss],
        *,
        scores: Float[Tensor, "batch token"],
        mask: Bool[Tensor, "batch token"],
        sample_ids: Int[Tensor, " batch"] | None = None,
        tolerance: float | None = None,
        autocast: torch.dtype | None = None,
    ) -> dict[str, float]:
        """The metrics of one probe.

        The deciles come from `token_alignment`: one backward pass and usually two forward passes.
        There is a backward pass for each decile instead where an engine keeps its parameters to
        itself, so that its probe has `gradients`, and below float32, which would round differences
        away.

        Args:
            probe: Knows the model, the group of ranks, and how gradients are reached.
            token_loss: As in `GradientProbe.geometry`.
            scores: Score of each token, such as its attention entropy.
            mask: True for valid response tokens.
            sample_ids: A number for each response that no other response of any rank has; the row
                number if None, which several ranks refuse.
            tolerance: Largest distance of the sum of the projection ratios from one. None takes
                1e-3, or where that is larger the distance of four neighbouring numbers at 1 in the
                model's precision: 0.03 in bfloat16.
            autocast: What the model computes in where its parameters have a higher precision.

        Returns:
            Finite numbers, the same on every rank: a subset without a gradient has no cosine. Where
            the full gradient is 0, `gradient/full_norm` alone.

        Raises:
            TokenWeightsError: If a valid score is not finite, the projection ratios do not sum to
                one, the model computes in float16, whose gradients need a scale, or responses of
                several ranks have no numbers.
        """
        if sample_ids is None and is_shared(probe.group):
            condition = "given where several ranks share the batch"
            hint = "Row numbers are alike on all of them: pass a number for each response."
            raise invalid("GradientSeries", "sample_ids", condition, None, hint)
        precision = _lowest_precision(probe.model, autocast)
        if precision == torch.float16:
            hint = "Gradients in float16 need a scale, and a probe has none."
            raise invalid("GradientSeries", "probe", "of a model above float16", precision, hint)
        rounding = torch.finfo(precision).eps
        tolerance = max(1e-3, 4 * rounding) if tolerance is None else tolerance
        by_backward = probe.gradients is not None or rounding > torch.finfo(torch.float32).eps
        with refused_by("GradientSeries"):
            deciles = quantile_bins(scores, mask, bins=10)
            subsets = [
                bottom_fraction(scores, mask),
                top_fraction(scores, mask),
                random_fraction(mask, fraction=0.2, seed=0, sample_ids=sample_ids),
            ]
            found = probe.geometry(token_loss, torch.stack(subsets), mask=mask, tolerance=tolerance)
            if found.full_norm == 0:
                return {"gradient/full_norm": 0.0}
            measured = _backward_ratios if by_backward else _difference_ratios
            ratios, sum_error = measured(probe, token_loss, deciles, mask, tolerance)
        shares = band_shares(ratios)
        metrics = {f"decile_{number}": float(ratio) for number, ratio in enumerate(ratios)}
        metrics |= {
            "low_share": shares.low,
            "middle_share": shares.middle,
            "high_share": shares.high,
            "full_norm": found.full_norm,
            "sum_error": sum_error,
        }
        for subset, geometry in zip(SUBSETS, found.groups, strict=True):
            metrics |= {f"{subset}_{name}": value for name, value in vars(geometry).items()}
            if math.isfinite(geometry.cosine):
                cosines = self.cosines[subset]
                cosines.update(geometry.cosine)
                metrics |= {f"{subset}_cosine_std": cosines.std, f"{subset}_cosine_cv": cosines.cv}
        return {f"gradient/{name}": v for name, v in metrics.items() if math.isfinite(v)}

    @typed
    def state_dict(self) -> dict[str, dict[str, float]]:
        """Everything needed to go on later.

        Returns:
            Plain numbers for each subset.
        """
        return {subset: cosines.state_dict() for subset, cosines in self.cosines.items()}

    @typed
    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Goes on where a saved series stopped.

        Args:
            state: From `state_dict`.

        Raises:
            TokenWeightsError: If the keys are others.
        """
        require_state_keys("GradientSeries", state, self.cosines)
        for subset, cosines in self.cosines.items():
            cosines.load_state_dict(state[subset])


def _lowest_precision(model: nn.Module, autocast: torch.dtype | None) -> torch.dtype:
    dtypes = {parameter.dtype for parameter in model.parameters()} | {autocast or torch.float32}
    return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)


def _backward_ratios(
    probe: GradientProbe, token_loss: Any, deciles: Tensor, mask: Tensor, tolerance: float
) -> tuple[Tensor, float]:
    """Ten projection ratios, and how far their sum is from one."""
    found = probe.geometry(token_loss, deciles, mask=mask, count=10, tolerance=tolerance)
    ratios = [geometry.projection_ratio for geometry in found.groups]
    return torch.tensor(ratios, dtype=torch.float64), abs(sum(ratios) - 1)


def _difference_ratios(
    probe: GradientProbe, token_loss: Any, deciles: Tensor, mask: Tensor, tolerance: float
) -> tuple[Tensor, float]:
    """Ten projection ratios, and how far their sum was from one before it was scaled."""
    alignment = token_alignment(
        token_loss,
        probe.model,
        mask=mask,
        tolerance=tolerance,
        pattern=probe.pattern,
        layers=probe.layers,
        group=probe.group,
    )
    ratios = group_projection_ratios(
        alignment.projection_ratio, deciles, mask, count=10, group=probe.group
    )
    return ratios, alignment.sum_error


@typed
def unclipped_losses(
    log_probs: Callable[[slice], Tensor],
    old_log_probs: Float[Tensor, "batch token"],
    advantages: Float[Tensor, " batch"] | Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    micro_batch_size: int,
) -> list[TokenLoss]:
    r"""Policy losses $-A_t \pi(t) / \pi_{old}(t)$ for a probe, a callable for each micro-batch.

    Without a clip, which a finite step may reach and beyond which it is flat.

    Args:
        log_probs: Log-probabilities of a slice of rows under the model's present parameters; the
            gradient flows here alone.
        old_log_probs: Those at the probe, where the ratio is 1.
        advantages: One for each response or each token.
        mask: True for valid response tokens.
        micro_batch_size: Rows of a micro-batch.

    Returns:
        What `GradientProbe.geometry` and `token_alignment` take.

    Raises:
        TokenWeightsError: If `micro_batch_size` is below 1.

    Example:
        >>> old, mask = torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool)
        >>> losses = unclipped_losses(
        ...     lambda rows: old[rows], old, torch.ones(3), mask, micro_batch_size=2
        ... )
        >>> [tuple(loss().shape) for loss in losses]
        [(2, 1), (1, 1)]
    """
    if micro_batch_size < 1:
        raise invalid("unclipped_losses", "micro_batch_size", ">= 1", micro_batch_size, "Try 8.")
    wide = advantages if advantages.dim() == 2 else advantages[:, None]

    def loss(rows: slice) -> Tensor:
        return clipped_surrogate_loss(
            log_probs(rows),
            old_log_probs[rows],
            wide[rows],
            clip_low=1.0,
            clip_high=math.inf,
            mask=mask[rows],
        )

    starts = range(0, len(mask), micro_batch_size)
    return [lambda rows=slice(start, start + micro_batch_size): loss(rows) for start in starts]

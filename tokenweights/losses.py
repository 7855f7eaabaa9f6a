"""Per-token policy losses and their weighted aggregation, with the denominator in plain sight."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.distributed import agreed, global_sum
from tokenweights.masked import (
    accumulator_dtype,
    batch_total,
    masked_sum,
    require_finite,
    require_weights,
    row_chunks,
    sum_dtype,
)

MAX_LOG_RATIO = 80.0

GateMode = Literal["drop", "detach", "soft"]
Denominator = Literal["all_tokens", "selected_tokens", "weight_sum"]
AggregationMode = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]


@typed
def clipped_surrogate_loss(
    log_probs: Float[Tensor, "batch token"],
    old_log_probs: Float[Tensor, "batch token"],
    advantages: Float[Tensor, "batch #token"],
    *,
    clip_low: float | Float[Tensor, "batch #token"] = 0.2,
    clip_high: float | Float[Tensor, "batch #token"] = 0.28,
    dual_clip: float | None = None,
    mask: Bool[Tensor, "batch token"] | None = None,
) -> Float[Tensor, "batch token"]:
    r"""The clipped surrogate of PPO and DAPO for each token, unreduced.

    $\ell_t = -\min(r_t A_t, \mathrm{clip}(r_t, 1 - \epsilon_{low}, 1 + \epsilon_{high}) A_t)$ with
    $r_t = \exp(\log\pi - \log\pi_{old})$. Weights >= 0 may multiply the advantages or the loss;
    both give the same. Log-ratios are bounded at 80 in size, short of overflow in float32, which
    half-precision inputs are widened to. With `dual_clip` $= c$, tokens of negative advantage are
    at most $-c A_t$.

    The gradient flows into `log_probs` alone: old log-probabilities, advantages and bounds are
    constants of the update, whatever they require. On the first pass over a batch `log_probs` may
    so be passed for both.

    Args:
        log_probs: Of the current policy; the gradient flows here.
        old_log_probs: Of the policy that generated the tokens; they carry no gradient.
        advantages: One for each token, or one for each response, `batch 1`; they carry no gradient.
        clip_low: $\epsilon_{low}$ in [0, 1], one for all, or one for each token or response, which
            carry no gradient; DAPO's stock value. 1 clips nothing, since a ratio is above 0.
        clip_high: $\epsilon_{high} \ge 0$, one or several as `clip_low`; DAPO's stock value.
            `math.inf` clips nothing. Without either bound the loss is $-r_t A_t$.
        dual_clip: $c > 1$, or None.
        mask: True for valid tokens. Losses elsewhere are 0, and so are their gradients, even where
            the inputs or the bounds are NaN.

    Returns:
        The loss of each token, of the inputs' dtype but float32 for half precision.

    Raises:
        TokenWeightsError: If a valid clip bound is negative or NaN, `clip_low` > 1 or
            `dual_clip` <= 1.

    Example:
        >>> new, old = torch.tensor([[0.5, 0.0]]), torch.zeros(1, 2)
        >>> clipped_surrogate_loss(new, old, torch.tensor([[1.0]]))
        tensor([[-1.2800, -1.0000]])
    """
    low = _clip_bound("clip_low", clip_low, mask, log_probs, most=1.0)
    high = _clip_bound("clip_high", clip_high, mask, log_probs, most=math.inf)
    if dual_clip is not None and not dual_clip > 1:
        raise invalid("clipped_surrogate_loss", "dual_clip", "> 1", dual_clip, "DAPO uses 10.")
    old_log_probs, advantages = old_log_probs.detach(), advantages.detach()
    if mask is not None:
        # Zeroing the inputs, not the loss: 0 * NaN would poison the gradient on the way back.
        log_probs, old_log_probs, advantages = (
            torch.where(mask, values, 0.0) for values in (log_probs, old_log_probs, advantages)
        )
    log_probs, old_log_probs, advantages = (
        values.to(sum_dtype(values.dtype)) for values in (log_probs, old_log_probs, advantages)
    )
    # Bounded where exp would overflow: 0 * inf would be NaN for a token of weight 0.
    ratio = (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = (end.to(ratio.dtype) if isinstance(end, Tensor) else end for end in (low, high))
    clipped = _clamped(ratio, 1 - low, 1 + high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def _clamped(values: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """The values within both ends, a number being the same beside a number and beside a tensor."""
    if not isinstance(high, Tensor) and high > torch.finfo(values.dtype).max:
        high = math.inf
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        return values.clamp(low, high)
    # `clamp` takes no mixture, and a tensor made of a number is of the default dtype unless told.
    low, high = (
        torch.as_tensor(end, dtype=values.dtype, device=values.device) for end in (low, high)
    )
    return values.clamp(low, high)


def _clip_bound(
    name: str, bound: float | Tensor, mask: Tensor | None, like: Tensor, *, most: float
) -> float | Tensor:
    """A distance from 1, checked where it counts and 0 elsewhere; detached."""
    hint = "It is a distance from 1: 0.2 clips ratios at 0.8 or at 1.2."
    condition = f"in [0, {most:g}]"
    if not isinstance(bound, Tensor):
        if not 0 <= bound <= most:
            raise invalid("clipped_surrogate_loss", name, condition, bound, hint)
        return bound
    bound = bound.detach().expand(like.shape)
    bound = bound if mask is None else torch.where(mask, bound, 0.0)
    if not torch.compiler.is_compiling() and not bool(((bound >= 0) & (bound <= most)).all()):
        got = bound[~((bound >= 0) & (bound <= most))][0].item()
        raise invalid("clipped_surrogate_loss", name, condition, got, hint)
    return bound


@dataclass(frozen=True)
class GatedLoss:
    """Token losses behind a gate, and the tokens that count.

    Attributes:
        token_loss: Unreduced losses, 0 off the mask.
        mask: True for the tokens that a mean over tokens counts.
    """

    token_loss: Float[Tensor, "batch token"]
    mask: Bool[Tensor, "batch token"]


@typed
def gated_loss(
    token_loss: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    gate: Bool[Tensor, "batch token"] | Float[Tensor, "batch token"],
    *,
    mode: GateMode = "drop",
) -> GatedLoss:
    """Token losses of which a gate takes tokens or gradients away; for `weighted_token_mean`.

    | mode | a token that the gate rejects |
    |---|---|
    | `drop` | leaves the loss and the count |
    | `detach` | keeps its loss and its place in the count, and gives no gradient |
    | `soft` | keeps both; its gradient is multiplied by the gate, any number >= 0 |

    Frameworks disagree on the count: with `drop` the other tokens weigh more, with the other two
    they weigh what they did. A mean over several micro-batches needs the `count` of all of them,
    from `loss_denominator` of the returned masks.

    Args:
        token_loss: Unreduced losses; the gradient flows here.
        mask: True for valid response tokens.
        gate: True for tokens that pass; for `soft` also a number for each token. It carries no
            gradient, and values off the mask never matter.
        mode: One of the modes above.

    Returns:
        The losses, of the dtype of `token_loss`, and the mask.

    Raises:
        TokenWeightsError: If the gate holds numbers and the mode is not `soft`, or a valid number
            is negative or not finite.

    Example:
        >>> token_loss = torch.tensor([[1.0, 3.0]], requires_grad=True)
        >>> mask, gate = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[True, False]])
        >>> for mode in ("drop", "detach", "soft"):
        ...     kept = gated_loss(token_loss, mask, gate, mode=mode)
        ...     loss = weighted_token_mean(kept.token_loss, kept.mask)
        ...     print(mode, loss.item(), *torch.autograd.grad(loss, token_loss))
        drop 1.0 tensor([[1., 0.]])
        detach 2.0 tensor([[0.5000, 0.0000]])
        soft 2.0 tensor([[0.5000, 0.0000]])
    """
    hard = gate.dtype == torch.bool
    if not hard and mode != "soft":
        hint = "Compare it with a bound first, or use the mode 'soft'."
        raise invalid("gated_loss", "gate", f"of booleans with the mode {mode!r}", gate.dtype, hint)
    loss = torch.where(mask, token_loss, 0.0)
    if mode == "drop":
        return GatedLoss(torch.where(gate, loss, 0.0), mask & gate)
    if hard:
        return GatedLoss(torch.where(gate, loss, loss.detach()), mask)
    require_finite("gated_loss", "gate", gate, mask)
    factor = torch.where(mask, gate.detach(), 0.0)
    if not torch.compiler.is_compiling() and bool((factor < 0).any()):
        hint = "It multiplies the gradient of a token."
        raise invalid("gated_loss", "gate", ">= 0", factor.min().item(), hint)
    return GatedLoss(_ScaledGradient.apply(loss, factor), mask)


class _ScaledGradient(torch.autograd.Function):
    """The values as they are, bit for bit; their gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        # Rounded once, after the product: a factor may be more than half precision holds.
        return (gradients[0] * ctx.saved_tensors[0]).to(gradients[0].dtype), None


@agreed
@typed
def loss_denominator(
    mask: Bool[Tensor, "batch token"],
    weights: Float[Tensor, "batch token"] | None = None,
    *,
    denominator: Denominator = "all_tokens",
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """What a weighted token mean divides by, over the whole batch; detached.

    Args:
        mask: True for valid response tokens.
        weights: Token weights; all 1 if None.
        denominator: `"all_tokens"`: the number of valid tokens (Eq. 7, 25). `"selected_tokens"`:
            the number of valid tokens with a weight above 0 (Eq. 24). `"weight_sum"`: the sum of
            the valid weights (Eq. 3, 17).
        group: The ranks that share the batch.

    Returns:
        A count or sum, the same on every rank.

    Example:
        >>> mask, weights = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0.0, 0.0, 0.5, 1.0]])
        >>> [
        ...     loss_denominator(mask, weights, denominator=name).item()
        ...     for name in ("all_tokens", "selected_tokens", "weight_sum")
        ... ]
        [4.0, 2.0, 1.5]
    """
    dtype = accumulator_dtype(mask.device)
    if weights is None or denominator == "all_tokens":
        own = mask.count_nonzero().to(dtype)  # a sum would first make integers of the mask
    elif denominator == "selected_tokens":
        own = (mask & (weights > 0)).count_nonzero().to(dtype)
    else:
        parts = (masked_sum(weights[rows].to(dtype), mask[rows]) for rows in row_chunks(mask.shape))
        own = torch.stack(list(parts)).sum()
    return global_sum(own, group=group)


@typed
def weighted_token_mean(
    token_loss: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    weights: Float[Tensor, "batch token"] | None = None,
    *,
    denominator: Denominator = "all_tokens",
    count: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
) -> Float[Tensor, ""]:
    r"""Weighted mean of the token losses, $\sum_t w_t \ell_t / D$.

    $D$ is the number of valid tokens (Eq. 7, 25), of selected tokens (Eq. 24) or the sum of weights
    (Eq. 3, 17). If the weights already sit in the advantages, leave `weights` out and keep
    `"all_tokens"`, or pass the `count` you mean. The gradient flows into `token_loss` alone.

    Args:
        token_loss: Unreduced losses; the gradient flows here.
        mask: True for valid response tokens.
        weights: Token weights >= 0, which carry no gradient; all 1 if None.
        denominator: See `loss_denominator`.
        count: The denominator of the whole batch, from `loss_denominator` over all its parts. With
            it the results of any micro-batches and ranks *sum* to the loss of the batch; where a
            trainer averages gradients over ranks, multiply by their number. It carries no gradient.

    Returns:
        A scalar of the dtype of `token_loss`, but float32 for half precision; 0, with zero
        gradients, if the denominator is 0.

    Raises:
        TokenWeightsError: If a valid weight is negative or not finite, or `count` is.

    Example:
        >>> token_loss, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> weights = torch.tensor([[0.0, 1.0]])
        >>> weighted_token_mean(token_loss, mask, weights)
        tensor(1.5000)
        >>> weighted_token_mean(token_loss, mask, weights, denominator="selected_tokens")
        tensor(3.)
    """
    return _token_mean("weighted_token_mean", token_loss, mask, weights, denominator, count)


@typed
def aggregate_loss(
    token_loss: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    weights: Float[Tensor, "batch token"] | None = None,
    *,
    mode: AggregationMode = "token-mean",
    denominator: Denominator = "all_tokens",
    count: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
    max_length: int | None = None,
) -> Float[Tensor, ""]:
    """Weighted loss of a batch under the field's aggregation modes.

    | mode | value |
    |---|---|
    | `token-mean` | all tokens alike: `weighted_token_mean` |
    | `seq-mean-token-sum` | sum within each response, mean over responses |
    | `seq-mean-token-mean` | mean within each response by `denominator`, mean over responses |
    | `seq-mean-token-sum-norm` | as `seq-mean-token-sum`, divided by `max_length` |

    Responses without a valid token do not count as responses. Everything adds up in float64. The
    gradient flows into `token_loss` alone.

    Args:
        token_loss: Unreduced losses; the gradient flows here.
        mask: True for valid response tokens.
        weights: Token weights >= 0, which carry no gradient; all 1 if None.
        mode: One of the modes above.
        denominator: What a mean over tokens divides by; see `loss_denominator`. The two sums take
            no mean over tokens and accept `"all_tokens"` only.
        count: The whole batch's outer denominator, so that micro-batches and ranks sum to its loss:
            `loss_denominator` for `token-mean`, the number of non-empty responses otherwise.
        max_length: Constant length that `seq-mean-token-sum-norm` divides by.

    Returns:
        A scalar as in `weighted_token_mean`; 0, with zero gradients, if the batch is empty.

    Raises:
        TokenWeightsError: If `mode` and the other arguments do not fit, or a valid weight or
            `count` is negative or not finite.

    Example:
        >>> token_loss = torch.tensor([[1.0, 3.0], [5.0, 0.0]])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> modes = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
        >>> [aggregate_loss(token_loss, mask, mode=mode).item() for mode in modes]
        [3.0, 3.5, 4.5]
    """
    if mode in ("seq-mean-token-sum", "seq-mean-token-sum-norm") and denominator != "all_tokens":
        raise invalid(
            "aggregate_loss",
            "denominator",
            f"'all_tokens' with mode {mode!r}, which takes no mean over tokens",
            repr(denominator),
            f"Use a mode with a token mean: one of {get_args(AggregationMode)}.",
        )
    if (mode == "seq-mean-token-sum-norm") != (max_length is not None):
        raise invalid(
            "aggregate_loss",
            "max_length",
            "given exactly for 'seq-mean-token-sum-norm'",
            f"{max_length} with mode {mode!r}",
            "Pass the longest response length of the run.",
        )
    if max_length is not None and not 1 <= max_length <= 2**53:
        hint = "It is a length in tokens."
        raise invalid("aggregate_loss", "max_length", "in [1, 2**53]", max_length, hint)
    if mode == "token-mean":
        return _token_mean("aggregate_loss", token_loss, mask, weights, denominator, count)
    if weights is not None:
        require_weights("aggregate_loss", weights, mask)
    responses = mask.any(-1).sum() if count is None else count
    divisors = batch_total("aggregate_loss", "count", responses, mask.device).expand(len(mask), 1)
    if mode == "seq-mean-token-mean":
        divisors = divisors * _response_denominators(mask, weights, denominator)
    elif max_length is not None:
        divisors = divisors * max_length
    return _weighted_sum(token_loss, mask, weights, divisors)


def _token_mean(
    function: str,
    token_loss: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    denominator: Denominator,
    count: Tensor | float | None,
) -> Tensor:
    if weights is not None:
        require_weights(function, weights, mask)
    if count is None:
        count = loss_denominator(mask, weights, denominator=denominator)
    total = batch_total(function, "count", count, mask.device)
    return _weighted_sum(token_loss, mask, weights, total.expand(len(mask), 1))


def _response_denominators(
    mask: Tensor, weights: Tensor | None, denominator: Denominator
) -> Tensor:
    """What the mean over the tokens of each response divides by, `batch 1`, detached."""
    if weights is None or denominator == "all_tokens":
        counted = mask
    elif denominator == "selected_tokens":
        counted = mask & (weights > 0)
    else:
        counted = torch.where(mask, weights.detach(), 0.0)
    return counted.sum(-1, keepdim=True, dtype=accumulator_dtype(mask.device))


def _weighted_sum(
    token_loss: Tensor, mask: Tensor, weights: Tensor | None, divisors: Tensor
) -> Tensor:
    """Sum of the valid losses times weights over the divisors of their rows, 0 where those are 0.

    Products and sums are float64: half precision overflows, and float32 loses small weights.
    """
    total = divisors.new_zeros(())
    for rows in row_chunks(mask.shape):
        part = torch.where(mask[rows], token_loss[rows], 0.0)
        if weights is None:
            part = part.sum(-1, keepdim=True, dtype=total.dtype)
            total = total + _quotient(part, divisors[rows]).sum()
        else:  # weights before losses: their ratio to a sum of weights is never too small
            weight = torch.where(mask[rows], weights[rows].detach(), 0.0).to(total.dtype)
            total = total + (part * _quotient(weight, divisors[rows])).sum()
    return total.to(sum_dtype(token_loss.dtype))


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, or 0 with zero gradients where the denominator is 0."""
    nothing = denominator == 0
    return torch.where(nothing, 0.0, numerator) / torch.where(nothing, 1.0, denominator)

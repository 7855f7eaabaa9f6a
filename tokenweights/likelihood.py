"""Signals read from log-probabilities: of the sampled tokens, and beside another policy's.

They are detached and float32; half-precision inputs are widened before anything is computed, and
float64 inputs are narrowed at the end only. Log-probabilities above 0, where rounding put them,
count as 0. Signals without a mask work token by token, so what is off a mask stays there.
"""

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._typing import typed
from tokenweights.distributed import agreed, global_sum
from tokenweights.losses import MAX_LOG_RATIO
from tokenweights.masked import accumulator_dtype, require_finite, row_chunks, sum_dtype

MIN_ENTROPY = 1e-6


@typed
def surprisal(log_probs: Float[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
    r"""Surprisal of each sampled token, `batch token`, in nats.

    $-\log p_t \ge 0$.

    Args:
        log_probs: Of the sampled tokens.

    Returns:
        Float32 surprisals.

    Example:
        >>> surprisal(torch.tensor([[0.5, 1.0]]).log())
        tensor([[0.6931, 0.0000]])
    """
    return _surprisal(log_probs).float()


@typed
def sampled_probability(log_probs: Float[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
    r"""Probability that the policy gave to each sampled token, `batch token`.

    $p_t = \exp(\log p_t)$, in [0, 1].

    Args:
        log_probs: Of the sampled tokens.

    Returns:
        Float32 probabilities.

    Example:
        >>> sampled_probability(torch.tensor([[-0.6931, 0.0]]))
        tensor([[0.5000, 1.0000]])
    """
    return _surprisal(log_probs).neg().exp().float()


@typed
def relative_surprisal(
    log_probs: Float[Tensor, "batch token"],
    entropy: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
) -> Float[Tensor, "batch token"]:
    r"""Surprisal of each token over the entropy it was drawn at, `batch token`, dimensionless.

    $-\log p_t / \max(H_t, 10^{-6})$, >= 0 and finite (arXiv 2606.31575). Its mean under the policy
    is 1: it is the surprisal in units of what was to be expected. The floor gives 0 to a certain
    token at entropy 0, and a large number to a surprising one.

    Args:
        log_probs: Of the sampled tokens, finite under the mask.
        entropy: $H_t$ in nats of the distribution that each token was drawn from, finite under
            the mask; see `predictive_entropy`.
        mask: True for valid response tokens.

    Returns:
        Float32 ratios, 0 off the mask.

    Raises:
        TokenWeightsError: If a valid input is not finite.

    Example:
        >>> log_probs, entropy = torch.tensor([[-2.0, 0.0]]), torch.tensor([[0.5, 0.0]])
        >>> relative_surprisal(log_probs, entropy, torch.ones(1, 2, dtype=torch.bool))
        tensor([[4., 0.]])
    """
    require_finite("relative_surprisal", "log_probs", log_probs, mask)
    require_finite("relative_surprisal", "entropy", entropy, mask)
    expected = entropy.detach().to(sum_dtype(entropy.dtype)).clamp(min=MIN_ENTROPY)
    ratio = (_surprisal(log_probs) / expected).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(mask, ratio, 0.0).float()


@agreed
@typed
def advantage_covariance(
    log_probs: Float[Tensor, "batch token"],
    advantages: Float[Tensor, "batch #token"],
    mask: Bool[Tensor, "batch token"],
    *,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "batch token"]:
    r"""Each token's part in the covariance of advantage and log-probability, `batch token`.

    $(A_t - \bar A)(\log p_t - \overline{\log p})$ with means over all valid tokens of the batch,
    taken in float64; in the unit of the advantages times nats, of any sign. Where it is large and
    positive an update lowers the entropy most: Clip-Cov and KL-Cov hold those tokens back (arXiv
    2505.22617).

    Args:
        log_probs: Of the sampled tokens, finite under the mask.
        advantages: One for each token, or one for each response, `batch 1`; finite under the mask.
        mask: True for valid response tokens.
        group: The ranks that share the batch.

    Returns:
        Float32 products, 0 off the mask; their mean over the batch is the covariance.

    Raises:
        TokenWeightsError: If a valid input is not finite.

    Example:
        >>> log_probs, advantages = torch.tensor([[-3.0, -1.0]]), torch.tensor([[-1.0, 1.0]])
        >>> advantage_covariance(log_probs, advantages, torch.ones(1, 2, dtype=torch.bool))
        tensor([[1., 1.]])
    """
    given = log_probs.detach(), advantages.detach().expand(mask.shape)
    for name, values in zip(("log_probs", "advantages"), given, strict=True):
        require_finite("advantage_covariance", name, values, mask)
    dtype = accumulator_dtype(mask.device)
    own = torch.zeros(3, dtype=dtype, device=mask.device)  # valid tokens, and both sums
    for rows in row_chunks(mask.shape):
        own[0] += mask[rows].sum()
        for place, values in enumerate(given, 1):
            own[place] += torch.where(mask[rows], values[rows].to(dtype), 0.0).sum()
    count, *totals = global_sum(own, group=group)
    covariance = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    for rows in row_chunks(mask.shape):
        first, second = (
            values[rows].to(dtype) - total / count.clamp(min=1)
            for values, total in zip(given, totals, strict=True)
        )
        covariance[rows] = torch.where(mask[rows], first * second, 0.0).float()
    return covariance


@typed
def importance_ratio(
    log_probs: Float[Tensor, "batch token"],
    other_log_probs: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"] | None = None,
) -> Float[Tensor, "batch token"]:
    r"""Probability of each token under one policy over that under another, `batch token`.

    $\exp(\log p_t - \log q_t) > 0$, for example of the trainer over the sampler. Log-ratios are
    bounded at 80 in size, as in `clipped_surrogate_loss`, so that the ratio is finite.

    Args:
        log_probs: $\log p$ of the sampled tokens.
        other_log_probs: $\log q$ of the same tokens.
        mask: True for valid response tokens; None for all.

    Returns:
        Float32 ratios, detached from both policies, 0 off the mask.

    Example:
        >>> importance_ratio(torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.25, 0.2]]).log())
        tensor([[2., 1.]])
    """
    ratio = _log_ratio(log_probs, other_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return (ratio if mask is None else torch.where(mask, ratio, 0.0)).float()


@typed
def reference_divergence(
    log_probs: Float[Tensor, "batch token"], reference_log_probs: Float[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    r"""Estimate from each sampled token of the divergence from a reference, `batch token`, in nats.

    $e^{d_t} - 1 - d_t \ge 0$ with $d_t = \log q_t - \log p_t$, known as k3: its mean under the
    policy $p$ is $\mathrm{KL}(p \| q)$, it is never negative and varies less than $-d_t$ (GRPO,
    arXiv 2402.03300). Exact to float32 for small $d$, where it is $d^2 / 2$; $d$ is bounded at 80.
    A signal carries no gradient: added to a loss, it would not pull the policy to its reference.

    Args:
        log_probs: $\log p$ of the sampled tokens under the policy.
        reference_log_probs: $\log q$ of the same tokens under the reference.

    Returns:
        Float32 estimates, detached from both policies.

    Example:
        >>> reference_divergence(torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[1.0, 0.2]]).log())
        tensor([[0.3069, 0.0000]])
    """
    apart = _log_ratio(reference_log_probs, log_probs).clamp(max=MAX_LOG_RATIO)
    # expm1(d) - d cancels for small d; there the series does not.
    series = apart.square() * (1 / 2 + apart * (1 / 6 + apart * (1 / 24 + apart / 120)))
    divergence = torch.where(apart.abs() < 0.03, series, (apart.expm1() - apart).clamp(min=0))
    return divergence.clamp(max=torch.finfo(torch.float32).max).float()


@typed
def log_perplexity(
    log_probs: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    r"""Mean surprisal of each response, at each of its tokens, `batch token`, in nats.

    $-\frac{1}{T} \sum_{u \le T} \log p_u \ge 0$, the logarithm of the response's perplexity. The
    sum is taken in float64.

    Args:
        log_probs: Of the sampled tokens, finite under the mask.
        mask: True for valid response tokens.

    Returns:
        Float32 values, 0 off the mask.

    Raises:
        TokenWeightsError: If a valid log-probability is not finite.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> log_perplexity(torch.tensor([[-1.0, -2.0, -9.0]]), mask)
        tensor([[1.5000, 1.5000, 0.0000]])
    """
    require_finite("log_perplexity", "log_probs", log_probs, mask)
    means = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    for rows in row_chunks(mask.shape):
        wide = _surprisal(log_probs[rows]).to(accumulator_dtype(mask.device))
        counts = mask[rows].sum(-1, keepdim=True).clamp(min=1)
        mean = torch.where(mask[rows], wide / counts, 0.0).sum(-1, keepdim=True)
        means[rows] = torch.where(mask[rows], mean, 0.0).float()
    return means


@typed
def entropy_sensitivity(
    log_probs: Float[Tensor, "batch token"],
    entropy: Float[Tensor, "batch token"],
    advantages: Float[Tensor, "batch #token"],
) -> Float[Tensor, "batch token"]:
    r"""How much an update on each token moves the entropy it was drawn at, `batch token`.

    $|A_t| \, (1 - p_t) \, |\log p_t + H_t| \ge 0$: to first order the size of the change of $H_t$
    under a policy gradient step, for $p$ the policy that sampled (STEER, arXiv 2510.10150). It is
    0 for certain tokens, and for tokens exactly as surprising as their entropy says.

    Args:
        log_probs: Of the sampled tokens.
        entropy: $H_t$ in nats of the distribution that each token was drawn from.
        advantages: One for each token, or one for each response, `batch 1`.

    Returns:
        Float32 magnitudes, in the unit of the advantages times nats.

    Example:
        >>> log_probs, entropy = torch.tensor([[0.5, 1.0]]).log(), torch.tensor([[1.0, 0.0]])
        >>> entropy_sensitivity(log_probs, entropy, torch.tensor([[-2.0]]))
        tensor([[0.3069, 0.0000]])
    """
    surprise = _surprisal(log_probs)
    gap = (entropy.detach().to(sum_dtype(entropy.dtype)) - surprise).abs()
    size = advantages.detach().to(sum_dtype(advantages.dtype)).abs()
    return (size * -surprise.neg().expm1() * gap).float()


def _surprisal(log_probs: Tensor) -> Tensor:
    """At least float32, and 0 rather than -0 or less."""
    return (0 - log_probs.detach().to(sum_dtype(log_probs.dtype))).clamp(min=0)


def _log_ratio(first: Tensor, second: Tensor) -> Tensor:
    dtype = sum_dtype(torch.promote_types(first.dtype, second.dtype))
    return first.detach().to(dtype) - second.detach().to(dtype)

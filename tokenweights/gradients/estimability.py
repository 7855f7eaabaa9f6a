"""What a uniformly random token subset costs: sparse estimability (Appendix C)."""

import math

from tokenweights._errors import invalid
from tokenweights._typing import typed


@typed
def expected_random_error(*, probability: float, tokens: int, mean_squared_norm: float) -> float:
    r"""Expected squared error of a random subset's gradient, $\frac{1 - p}{p T} \bar V$ (Eq. 9).

    Token gradients are fixed and each token is drawn with chance $p$; $\bar V$ is their mean
    squared norm. It does not hold for structured subsets, whose chances depend on the token.

    Args:
        probability: Chance $p$ of each token, in (0, 1].
        tokens: Number of tokens $T$.
        mean_squared_norm: $\bar V = \frac{1}{T} \sum_t \|g_t\|^2$.

    Returns:
        The expected squared distance from the full gradient, >= 0.

    Raises:
        TokenWeightsError: If an argument is out of range.

    Example:
        >>> expected_random_error(probability=0.2, tokens=1000, mean_squared_norm=50.0)
        0.2
    """
    return _random_error("expected_random_error", probability, tokens, mean_squared_norm)


@typed
def expected_random_cosine(
    *, probability: float, tokens: int, mean_squared_norm: float, full_squared_norm: float
) -> float:
    r"""Expected cosine of a random subset's gradient and the full one (Eq. 10).

    $1 / \sqrt{1 + (1 - p) \bar V / (p T \|g\|^2)}$; see `expected_random_error`.

    Args:
        probability: Chance $p$ of each token, in (0, 1].
        tokens: Number of tokens $T$.
        mean_squared_norm: $\bar V = \frac{1}{T} \sum_t \|g_t\|^2$.
        full_squared_norm: $\|g\|^2$ of the full gradient, > 0.

    Returns:
        A cosine in (0, 1].

    Raises:
        TokenWeightsError: If an argument is out of range.

    Example:
        >>> round(
        ...     expected_random_cosine(
        ...         probability=0.2, tokens=1000, mean_squared_norm=50.0, full_squared_norm=0.25
        ...     ),
        ...     4,
        ... )
        0.7454
    """
    error = _random_error("expected_random_cosine", probability, tokens, mean_squared_norm)
    if not 0 < full_squared_norm < math.inf:
        raise invalid(
            "expected_random_cosine",
            "full_squared_norm",
            "positive and finite",
            full_squared_norm,
            "A zero gradient has no direction.",
        )
    return 1 / math.sqrt(1 + error / full_squared_norm)


def _random_error(
    function: str, probability: float, tokens: int, mean_squared_norm: float
) -> float:
    if not 0 < probability <= 1:
        raise invalid(function, "probability", "in (0, 1]", probability, "Pass a chance.")
    if not 1 <= tokens < 2**63:
        raise invalid(function, "tokens", "in [1, 2^63)", tokens, "Pass the number of tokens.")
    if not 0 <= mean_squared_norm < math.inf:
        raise invalid(
            function, "mean_squared_norm", "finite and >= 0", mean_squared_norm, "Pass a mean."
        )
    return (1 - probability) * mean_squared_norm / (probability * tokens)

"""Rules of the field as recipes, named by what they do; `published` says what their papers do.

Where a paper's quantities are those of the current policy, the recipe takes them of the policy that
sampled the batch: there both agree, and the weights are the same on any layout.
"""

from tokenweights.recipes.combine import BatchMean, BySign, Gate
from tokenweights.recipes.field import (
    AboveQuantile,
    Bonus,
    Damped,
    Mapped,
    RandomDrop,
    RarePositives,
    SecondMoment,
    Within,
)
from tokenweights.recipes.parts import Rule, Signal
from tokenweights.recipes.preplan import PreplanAnchor, RandomCredit
from tokenweights.recipes.recipe import Recipe
from tokenweights.recipes.rules import Bottom, Top, Uniform
from tokenweights.recipes.signals import (
    Covariance,
    EntropySensitivity,
    LogPerplexity,
    PositionSigmoid,
    PredictiveEntropy,
    Probability,
    RelativeSurprisal,
    ResponseCertainty,
    SamplerRatio,
    Surprisal,
)

_ENTROPY = PredictiveEntropy()
_COLLAPSING = BatchMean(signal=_ENTROPY, below=0.3)


def _boosted(inside: float, side: str) -> Top:
    sign = "positive" if side == "positive" else "negative"
    return Top(fraction=0.1, scope="batch", sign=sign, inside=inside, outside=1.0)


def _quadrant(name: str, rule: Rule) -> Recipe:
    return Recipe(name=name, signal=_ENTROPY, rule=rule, denominator="selected_tokens")


def _credit(name: str, rule: Rule, signal: Signal | None = None) -> Recipe:
    return Recipe(name=name, signal=signal, rule=BySign(positive=rule, negative=Uniform()))


_MASK = Top(scope="batch")
_THRESHOLD = AboveQuantile(quantile=0.8)

RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="predictive_high20_batch", signal=_ENTROPY, rule=_MASK, denominator="selected_tokens"
    ),
    Recipe(name="predictive_high20_batch_all_tokens", signal=_ENTROPY, rule=_MASK),
    Recipe(
        name="predictive_above80_batch",
        signal=_ENTROPY,
        rule=_THRESHOLD,
        denominator="selected_tokens",
    ),
    Recipe(name="predictive_above80_batch_all_tokens", signal=_ENTROPY, rule=_THRESHOLD),
    Recipe(
        name="surprisal_boost10",
        signal=Surprisal(),
        rule=Gate(
            rule=BySign(positive=_boosted(1.1, "positive"), negative=Uniform()),
            when=_COLLAPSING,
        ),
    ),
    Recipe(
        name="surprisal_boost10_damp10",
        signal=Surprisal(),
        rule=Gate(
            rule=BySign(positive=_boosted(1.1, "positive"), negative=_boosted(0.9, "negative")),
            when=_COLLAPSING,
        ),
    ),
    Recipe(
        name="probability_weighted",
        signal=Probability(),
        rule=Mapped(slope=0.3, offset=0.7, high=1.0),
    ),
    Recipe(
        name="entropy_proportional",
        signal=_ENTROPY,
        rule=Mapped(normalise="mean", slope=0.1, offset=0.9),
    ),
    Recipe(
        name="covariance_drop",
        signal=Covariance(),
        rule=RandomDrop(low=1.0, high=5.0, fraction=2e-4),
    ),
    Recipe(name="entropy_bonus", signal=_ENTROPY, rule=Bonus(scale=0.4, share=2.0)),
    Recipe(
        name="position_bonus",
        signal=PositionSigmoid(steepness=15.0, middle=0.5),
        rule=Bonus(scale=0.1, share=2.0, towards="sign"),
    ),
    Recipe(
        name="perplexity_shaping",
        signal=LogPerplexity(),
        rule=BySign(
            positive=Mapped(
                normalise="deviation",
                scope="prompt",
                per="response",
                slope=-0.01,
                offset=1.0,
                low=0.8,
                high=1.2,
            ),
            negative=Mapped(
                normalise="deviation",
                scope="prompt",
                per="response",
                slope=0.01,
                offset=1.0,
                low=0.8,
                high=1.2,
            ),
        ),
    ),
    Recipe(
        name="certainty_shaping",
        signal=ResponseCertainty(),
        rule=BySign(
            positive=Mapped(
                normalise="deviation",
                scope="prompt",
                per="response",
                shape="exponential",
                slope=-0.25,
            ),
            negative=Mapped(
                normalise="deviation",
                scope="prompt",
                per="response",
                shape="exponential",
                slope=0.35,
            ),
        ),
    ),
    Recipe(
        name="relative_surprisal_band",
        signal=RelativeSurprisal(),
        rule=Within(low=0.1, high=3.0),
        denominator="selected_tokens",
    ),
    Recipe(
        name="sampler_ratio_truncated",
        signal=SamplerRatio(),
        rule=Mapped(high=2.0),
    ),
    Recipe(
        name="sampler_ratio_band",
        signal=SamplerRatio(),
        rule=Within(low=0.5, high=5.0, weight="score"),
    ),
    _quadrant("positive_high_entropy50", Top(fraction=0.5, sign="positive")),
    _quadrant("positive_low_entropy50", Bottom(fraction=0.5, sign="positive")),
    _quadrant("negative_high_entropy50", Top(fraction=0.5, sign="negative")),
    _quadrant("negative_low_entropy50", Bottom(fraction=0.5, sign="negative")),
    Recipe(
        name="rare_positives_drop",
        rule=RarePositives(),
        denominator="selected_tokens",
    ),
    Recipe(
        name="rare_positives_drop_older",
        rule=RarePositives(quantile=0.8, among="all"),
        denominator="selected_tokens",
    ),
    Recipe(name="second_moment_drop", rule=SecondMoment()),
    Recipe(name="entropy_change_damped", signal=EntropySensitivity(), rule=Damped()),
    _credit("preplan_anchor40", PreplanAnchor()),
    _credit("preplan40", PreplanAnchor(chosen="preplan")),
    _credit("future_anchor40", PreplanAnchor(chosen="anchors")),
    _credit("preplan_anchor40_coupled", PreplanAnchor(chosen="coupled")),
    _credit("random_credit40", RandomCredit()),
    _credit("entropy_credit40", Top(fraction=0.4, inside=1.5, outside=1.0), _ENTROPY),
)

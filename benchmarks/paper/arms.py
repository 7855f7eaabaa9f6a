"""The arms: every rule that is compared, as recipes of the library, at equal weight mass.

An arm's weights have mean 1 over the rollout batch, so that no arm has a larger step by its
weights' size alone: hard masks divide by the selected tokens, and soft weights match their mass.
Arms named `paper ...` keep the paper's own mass, whose mean moves with the schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenweights as tw

Spec = dict[str, Any] | str


@dataclass(frozen=True)
class Arm:
    """One rule.

    Attributes:
        name: As in tables.
        spec: What `tokenweights.recipe` takes, for a probe layer and a number of steps; None for a
            rule that this module's `training` builds itself, named in `special`.
        family: The table it stands in.
        special: `adaptive` for progress that waits while rewards fall; `alignment` for weights from
            every token's inner product with the gradient; `untrained` for the warm start itself.
        equal_mass: Whether its weights have mean 1.
    """

    name: str
    spec: Callable[[int, int], Spec]
    family: str
    special: str = ""
    equal_mass: bool = True

    def recipe(self, probe: int, steps: int) -> tw.Recipe:
        """The recipe for a task's probe layer and a run's number of steps."""
        return tw.recipe(self.spec(probe, steps))


def _named(name: str, **changes: Any) -> Callable[[int, int], Spec]:
    def spec(probe: int, steps: int) -> Spec:
        made = tw.recipe(name)
        own: dict[str, Any] = {"name": name}
        if made.entropy is not None:
            own["layers"] = (probe,)
        if "warmup_steps" in (made.to_dict()["rule"] or {}):
            own["warmup_steps"] = max(1, steps // 2)
        return own | changes

    return spec


def _hard(name: str, label: str = "", *, family: str, **changes: Any) -> Arm:
    return Arm(label or name, _named(name, **changes), family)


def _soft(name: str, label: str, *, family: str, mass: bool = True, **changes: Any) -> Arm:
    return Arm(label, _named(name, match_mass=mass, **changes), family, equal_mass=mass)


def _alignment(probe: int, steps: int) -> Spec:
    # Scores come from the gradient; the recipe's own signal is not asked.
    return {"rule": {"kind": "top"}, "signal": "surprisal", "denominator": "selected_tokens"}


def _ranked(probe: int, steps: int) -> Spec:
    signal = {"kind": "ranked", "signal": {"kind": "attention_entropy", "layers": (probe,)}}
    rule = {"kind": "endpoints", "warmup_steps": max(1, steps // 2)}
    return {"rule": rule, "signal": signal, "match_mass": True}


UNTRAINED = Arm("untrained", _named("full"), "selective", special="untrained")
SELECTIVE = (
    _hard("full", family="selective"),
    _hard("random20", family="selective"),
    _hard("bernoulli20", family="selective"),
    _hard("anchor20", family="selective"),
    _hard("explorer20", family="selective"),
    Arm("anchor20 all", _named("anchor20_all_tokens"), "selective", equal_mass=False),
    Arm("explorer20 all", _named("explorer20_all_tokens"), "selective", equal_mass=False),
)
CONTROLS = (
    _hard("front20", family="controls"),
    _hard("back20", family="controls"),
    _hard("predictive_low20", family="controls"),
    _hard("predictive_high20", family="controls"),
    _hard("type_matched20", "anchor types", family="controls"),
    _hard("position_matched20", "anchor places", family="controls"),
    _hard("type_matched20", "explorer types", family="controls", matched_to="top"),
    _hard("position_matched20", "explorer places", family="controls", matched_to="top"),
)
SOFT = (
    _soft("low2high", "low2high", family="soft"),
    _soft("high2low", "high2low", family="soft"),
    _soft("static_anchor", "static_anchor", family="soft"),
    _soft("static_explorer", "static_explorer", family="soft"),
    _soft("low2high", "paper low2high", family="soft", mass=False),
    _soft("high2low", "paper high2low", family="soft", mass=False),
    _soft("static_anchor", "paper static_anchor", family="soft", mass=False),
    _soft("static_explorer", "paper static_explorer", family="soft", mass=False),
    _soft("low2high", "low2high cosine", family="soft", schedule="cosine"),
    _soft("low2high", "low2high step", family="soft", schedule="step"),
    _soft("low2high", "low2high sharp", family="soft", temperature=0.1),
)
LAYERS = tuple(
    arm
    for layer in (0, 1, 3)  # layer 2 is the usual one
    for arm in (
        _hard("anchor20", f"anchor20 L{layer}", family="layers", layers=(layer,)),
        _hard("explorer20", f"explorer20 L{layer}", family="layers", layers=(layer,)),
        _soft("low2high", f"low2high L{layer}", family="layers", layers=(layer,)),
    )
)
# At equal mass they are the rules of the same name without the suffix.
_TWINS = ("predictive_high20_batch_all_tokens", "predictive_above80_batch_all_tokens")
_CONSTANT = ("sampler_ratio_truncated", "sampler_ratio_band")
FIELD = tuple(
    Arm(name, _named(name, match_mass=True, denominator="all_tokens"), "field")
    for name in tw.recipe_names(source="field")
    if name not in (*_TWINS, *_CONSTANT)
)
_RANK_MEAN = {"layers": (0, 1, 2, 3), "layer_reduction": "rank_mean"}
NEW = (
    Arm("adaptive low2high", _named("low2high", match_mass=True), "new", special="adaptive"),
    Arm("ranked low2high", _ranked, "new"),
    _soft("low2high", "low2high all layers", family="new", **_RANK_MEAN),
    _hard("anchor20", "anchor20 all layers", family="new", **_RANK_MEAN),
    _hard("explorer20", "explorer20 all layers", family="new", **_RANK_MEAN),
    Arm("alignment top20", _alignment, "new", special="alignment"),
)

ARMS = {arm.name: arm for arm in (UNTRAINED, *SELECTIVE, *CONTROLS, *SOFT, *LAYERS, *FIELD, *NEW)}

REFUSED = {
    "loss_low20, loss_high20": "at the one update of a rollout the ratio is 1, so |loss| is |A|, "
    "the same for all tokens of a response: there is nothing to rank",
    "sampler_ratio_truncated, sampler_ratio_band": "the policy samples itself, so the ratio of "
    "trainer to sampler is 1 and both are `full`",
    "low2high_layer8, _layer20, _layer31": "the policy has four layers; `low2high L0` to `L3` take "
    "their place",
}

# The arms of the second warm start and of the other tasks.
CORE = (
    "full",
    "random20",
    "anchor20",
    "explorer20",
    "low2high",
    "high2low",
    "static_anchor",
    "static_explorer",
    "paper low2high",
    "front20",
    "back20",
    "predictive_low20",
    "predictive_high20",
)

"""What papers say about the rules that the named recipes carry, and why some are none."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Published:
    """Where a rule of the field comes from, and where the recipe differs from it.

    Attributes:
        source: The paper, by its arXiv number.
        scope: Over which tokens it is published.
        here: Over which tokens the recipe takes them; None for the same, with the rollout batch for
            a mini-batch.
        when: Of which policy its quantities are published: `"rollout"`, the one that sampled the
            batch, or `"update"`, the current one at every inner step. Both agree at the first.
        notes: What else to know, such as defaults that are not the paper's.
    """

    source: str
    scope: str
    here: str | None = None
    when: Literal["rollout", "update"] = "update"
    notes: tuple[str, ...] = ()

    @property
    def own_scope(self) -> str:
        """Over which tokens the recipe takes what the paper takes over its scope."""
        wider = self.scope.replace("mini-batch", "rollout batch")
        return self.here or wider.replace("optimizer batch", "rollout batch")


# Rules of the field that no recipe can carry, because they are no weights >= 0 on advantages that
# are known when the batch is sampled, or because a trainer does not have what they read.
NO_WEIGHTS = {
    "fipo": "arXiv 2603.19835 sums log-ratios to the policy that sampled: at rollout time they are "
    "0, and every weight is 1",
    "lopti": "arXiv 2505.12929 updates twice on each mini-batch, first on improbable tokens",
    "gtpo": "arXiv 2508.04349 normalises shaped rewards apart for right and wrong responses, which "
    "turns signs over; `entropy_proportional` is the simplified form",
    "tr_grpo": "arXiv 2511.00066 in its public port clips weights to [1, 1.4] of a map that never "
    "exceeds 0.56: every weight is 1",
    "kl_cov": "arXiv 2505.22617 puts a divergence on tokens and clips nothing",
    "archer": "arXiv 2507.15778 gives classes of tokens their own clip ranges and divergences",
    "aspo": "arXiv 2510.06062 turns the ratio over inside the surrogate",
    "hapo": "arXiv 2509.16591 moves clip bounds and sampling temperature; 2604.11056 has that name "
    "too",
    "ce_gppo": "it scales gradients of clipped tokens by the current ratio",
    "erc": "it gates gradients by the current policy's entropy",
    "sapo": "it is a function of the current ratio",
    "cispo": "it is a function of the current ratio",
    "delta": "arXiv 2605.21467 reads hidden states of the last layer",
    "oar": "it needs forward passes of its own, with each token padded out",
    "hicra": "it needs to know which tokens plan",
    "sent": "arXiv 2512.04359 puts a divergence on tokens",
}

_ENTROPY_MASK = Published(
    source="arXiv 2506.01939",
    scope="mini-batch",
    notes=("The paper divides by all tokens, its released code by the selected ones.",),
)
_QUADRANT = Published(
    source="arXiv 2604.11056",
    scope="response",
    notes=("One of the four quadrants of its ablation, split at each response's median.",),
)
_PREPLAN = (
    "Without named heads all heads count. The paper has the 30% that look back least, and most:",
    "`probe_head_classes` and `with_head_classes`. Layers are five of the middle third.",
    "The paper reads the maps of an auxiliary model; here they are the policy's.",
)
_CONTROL = "A control of its ablation."

PUBLISHED: dict[str, Published] = {
    "predictive_high20_batch": _ENTROPY_MASK,
    "predictive_high20_batch_all_tokens": _ENTROPY_MASK,
    "predictive_above80_batch": _ENTROPY_MASK,
    "predictive_above80_batch_all_tokens": _ENTROPY_MASK,
    "surprisal_boost10": Published(
        source="arXiv 2606.19236, variant O1",
        scope="mini-batch by sign of A",
        notes=("It gates by the entropy of the batch before; here it is this batch's.",),
    ),
    "surprisal_boost10_damp10": Published(
        source="arXiv 2606.19236, variant C2",
        scope="mini-batch by sign of A",
        notes=("It gates by the entropy of the batch before; here it is this batch's.",),
    ),
    "probability_weighted": Published(
        source="arXiv 2505.12929, advantage reweighting", scope="token", when="rollout"
    ),
    "entropy_proportional": Published(
        source="arXiv 2508.04349",
        scope="prompt",
        here="rollout batch",
        notes=("The simplified form of a public port, with the mean over the batch.",),
    ),
    "covariance_drop": Published(
        source="arXiv 2505.22617, Clip-Cov",
        scope="mini-batch",
        notes=(
            "Tokens that the clip stops are no candidates there; at rollout the clip stops none.",
        ),
    ),
    "entropy_bonus": Published(
        source="arXiv 2506.14758",
        scope="token",
        notes=("A + min(alpha H, |A| / kappa); alpha 0.4 and kappa 2 have not been verified.",),
    ),
    "position_bonus": Published(source="arXiv 2508.02260", scope="response", when="rollout"),
    "perplexity_shaping": Published(source="arXiv 2508.02260", scope="prompt", when="rollout"),
    "certainty_shaping": Published(
        source="arXiv 2510.10649",
        scope="prompt",
        when="rollout",
        notes=(
            "The part for responses; that for tokens reads logits. The released code takes the",
            "deviation of a sample; here it is that of the prompt's responses, 0 for a lone one.",
        ),
    ),
    "relative_surprisal_band": Published(
        source="arXiv 2606.31575",
        scope="token",
        notes=("The interval is that of a public port, not the paper's.",),
    ),
    "sampler_ratio_truncated": Published(
        source="truncated importance sampling, as VeRL has it",
        scope="token",
        when="rollout",
        notes=("A trainer that corrects the ratio on its own would do it twice.",),
    ),
    "sampler_ratio_band": Published(
        source="IcePop, as VeRL has it",
        scope="token",
        when="rollout",
        notes=("A trainer that corrects the ratio on its own would do it twice.",),
    ),
    "positive_high_entropy50": _QUADRANT,
    "positive_low_entropy50": _QUADRANT,
    "negative_high_entropy50": _QUADRANT,
    "negative_low_entropy50": _QUADRANT,
    "rare_positives_drop": Published(source="arXiv 2602.15620v4", scope="mini-batch by sign of A"),
    "rare_positives_drop_older": Published(
        source="arXiv 2602.15620, before v4, as a summary has it", scope="mini-batch"
    ),
    "second_moment_drop": Published(
        source="arXiv 2510.01161, Algorithm 1",
        scope="optimizer batch",
        notes=("As two frameworks restate it; the released code clips instead.",),
    ),
    "entropy_change_damped": Published(
        source="arXiv 2510.10150",
        scope="mini-batch",
        notes=("As released; the largest change is that of the rollout batch.",),
    ),
    **{
        name: Published(
            source=f"arXiv 2510.13554, {what}", scope="response", when="rollout", notes=_PREPLAN
        )
        for name, what in (
            ("preplan_anchor40", "both sets"),
            ("preplan40", "the local set"),
            ("future_anchor40", "the global set"),
        )
    },
    "preplan_anchor40_coupled": Published(
        source="arXiv 2510.13554, the coupled variant",
        scope="response",
        when="rollout",
        notes=(
            *_PREPLAN,
            "What is near, the lower half by distance, and a share of 0.5 are not the paper's.",
        ),
    ),
    "random_credit40": Published(
        source="arXiv 2510.13554", scope="response", when="rollout", notes=(_CONTROL,)
    ),
    "entropy_credit40": Published(
        source="arXiv 2510.13554", scope="response", when="rollout", notes=(_CONTROL,)
    ),
}

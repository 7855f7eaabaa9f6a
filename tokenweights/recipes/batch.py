"""What a recipe sees of a rollout batch: one record of response-aligned columns."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.distributed import is_shared

# The columns that a batch has where a recipe asks for them, and what they hold, for messages.
ON_DEMAND = {
    "token_ids": "vocabulary index of each token",
    "advantages": "advantages before any weight",
    "rewards": "reward of each response",
    "log_probs": "log-probability of each token",
    "sampler_log_probs": "log-probability of each token as the inference engine gave it",
    "reference_log_probs": "log-probability of each token under the reference policy",
    "predictive_entropy": "entropy of each next-token distribution",
    "self_certainty": "divergence of each next-token distribution from the uniform one",
    "token_loss": "unreduced loss of each token",
    "attention": "attention entropy, or what else is read of it, of each token for each layer",
}
COLUMNS = ("mask", "sample_ids", "prompt_ids", *ON_DEMAND)


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutBatch:
    """The response tokens of a rollout batch, and what is known of each, one column for each fact.

    A trainer adapter fills the columns that a recipe asks for (`Recipe.columns`) and no others; in
    a loop of your own you do. Every column is of shape `batch token` unless it says otherwise, and
    of the policy that sampled the batch, before any update. Values under a False mask never matter.

    Attributes:
        mask: True for valid response tokens.
        sample_ids: A number for each response, ` batch`, that no other of the run has and that
            stays with it however the batch is laid out. Random draws depend on it: where one rank
            holds the batch row numbers stand for None, and draw the same places at every step.
            Rules that draw, or rank over responses, refuse None where several ranks share it.
        prompt_ids: A number for each response, ` batch`, equal for responses to one prompt; rules
            of the scope `"prompt"` refuse None.
        token_ids: Vocabulary index of each token.
        advantages: Before any weight; of shape `batch 1` where all tokens of a response share one.
        rewards: Reward of each response, ` batch`.
        log_probs: Log-probability of each sampled token under the policy that is being trained,
            nats.
        sampler_log_probs: The same as the inference engine gave it, nats.
        reference_log_probs: The same under the reference policy, nats.
        predictive_entropy: Entropy of the next-token distribution, nats (Eq. 19).
        self_certainty: Divergence of the next-token distribution from the uniform one, nats; see
            `self_certainty`.
        token_loss: Unreduced loss of each token.
        attention: Attention entropy of each token for each probed layer, by the number of the
            layer; nats or normalized, as the recipe's signal asks. Other statistics of attention by
            the name that their signal gives them, see `Recipe.readings`.
        group: The ranks that share the rollout batch; None if these rows are all of it.

    Raises:
        TokenWeightsError: If a column does not have the shape of the mask.

    Example:
        >>> batch = RolloutBatch(
        ...     mask=torch.ones(1, 3, dtype=torch.bool), log_probs=torch.zeros(1, 3)
        ... )
        >>> batch.filled
        ('mask', 'log_probs')
    """

    mask: Bool[Tensor, "batch token"]
    sample_ids: Int[Tensor, " batch"] | None = None
    prompt_ids: Int[Tensor, " batch"] | None = None
    token_ids: Int[Tensor, "batch token"] | None = None
    advantages: Float[Tensor, "batch #token"] | None = None
    rewards: Float[Tensor, " batch"] | None = None
    log_probs: Float[Tensor, "batch token"] | None = None
    sampler_log_probs: Float[Tensor, "batch token"] | None = None
    reference_log_probs: Float[Tensor, "batch token"] | None = None
    predictive_entropy: Float[Tensor, "batch token"] | None = None
    self_certainty: Float[Tensor, "batch token"] | None = None
    token_loss: Float[Tensor, "batch token"] | None = None
    attention: Mapping[int | str, Float[Tensor, "batch token"]] | None = None
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        for column in fields(self):
            value = getattr(self, column.name)
            if isinstance(value, Tensor):
                object.__setattr__(self, column.name, value.detach())
        if self.attention is not None:
            layers = {layer: scores.detach() for layer, scores in self.attention.items()}
            object.__setattr__(self, "attention", layers)

    @property
    def filled(self) -> tuple[str, ...]:
        """Names of the columns that are there."""
        return tuple(name for name in COLUMNS if getattr(self, name) is not None)

    @typed
    def require(self, columns: Iterable[str], *, caller: str) -> None:
        """Raises unless the columns are there.

        Args:
            columns: Names of columns.
            caller: Who needs them, for the message.

        Raises:
            TokenWeightsError: If one is unknown or missing.
        """
        for name in columns:
            if name not in self.filled:
                given = ", ".join(self.filled)
                hint = f"Pass `RolloutBatch({name}=...)`; the batch holds {given}."
                raise invalid(caller, name, "given", None, hint)

    @typed
    def rows(self, chosen: Sequence[int]) -> "RolloutBatch":
        """Some of the rows, as a batch of one rank.

        Args:
            chosen: Numbers of rows.

        Returns:
            The batch, with the row numbers for sample ids where this one is all of it and has none.
        """
        index = torch.tensor(list(chosen), dtype=torch.long, device=self.mask.device)
        columns = {name: getattr(self, name) for name in self.filled if name != "attention"}
        attention = {layer: scores[index] for layer, scores in (self.attention or {}).items()}
        taken = {name: column[index] for name, column in columns.items()}
        if self.sample_ids is None and not is_shared(self.group):
            taken["sample_ids"] = index
        return RolloutBatch(**taken, attention=attention or None)


# The shapes of the columns are checked, and what is plainly meant is taken, as in a function.
RolloutBatch.__init__ = typed(RolloutBatch.__init__)

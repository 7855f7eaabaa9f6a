"""Where the scores of a rollout batch come from: the pass for the old log-probabilities."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from openrlhf.models.ring_attn_utils import gather_and_pad_tensor
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
from tokenweights._errors import invalid
from tokenweights.capture import CapturedAttention, capture_attention
from tokenweights.recipes.attention import AttentionEntropy, model_layers
from tokenweights.recipes.backward import AttentionReading, joined_readings
from torch import Tensor, nn

# Where an experience holds columns of a rollout batch, and those that the policy's pass has.
COLUMNS = {
    "token_ids": "sequences",
    "advantages": "advantages",
    "rewards": "rewards",
    "log_probs": "action_log_probs",
    "sampler_log_probs": "rollout_log_probs",
    "reference_log_probs": "base_action_log_probs",
}
OF_A_PASS = ("attention", "predictive_entropy")
# Columns of a pass by their names; attention entropies by the number of their layer.
Columns = dict[str | int, Tensor]


def plain_class(actor_class: Any) -> Any:
    """The class that `ray.remote` made an actor class of, to derive from.

    Args:
        actor_class: A Ray actor class.

    Returns:
        The class.

    Raises:
        TokenWeightsError: If the installed Ray keeps it elsewhere.
    """
    found = getattr(getattr(actor_class, "__ray_metadata__", None), "modified_class", None)
    if not isinstance(found, type):
        condition = "an actor class with `__ray_metadata__.modified_class`"
        hint = "tokenweights-openrlhf is made for openrlhf>=0.11.2,<0.12 and the ray it pins."
        raise invalid("plain_class", "actor_class", condition, type(actor_class).__name__, hint)
    return found


class TokenWeightsPolicyActor(plain_class(PolicyModelActor)):
    """OpenRLHF's policy actor; its pass for the old log-probabilities leaves columns behind.

    Training, its batches and the weight synchronization are OpenRLHF's own. A pass keeps a number
    for each token and column until `take_columns` hands them over.
    """

    def init_model_from_pretrained(self, strategy: Any, *args: Any, **kwargs: Any) -> Any:
        """As OpenRLHF's; also chooses the layers that are read."""
        result = super().init_model_from_pretrained(strategy, *args, **kwargs)
        self._columns: list[Columns] = []
        self.attention: AttentionEntropy | AttentionReading | None = strategy.args.policy_attention
        if self.attention is not None:
            self.attention = self.attention.placed(**self.attention_layers())
        return result

    def forward(
        self, sequences: Tensor, action_mask: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        """As OpenRLHF's; also keeps what the recipe reads of the response tokens."""
        length, group = action_mask.shape[1], self.strategy.ring_attn_group
        attention: Any = nullcontext({})
        entropy = attention
        if self.attention is not None:
            attention = attention_scores(self.actor, attention_mask, self.attention, length, group)
        if self.strategy.args.policy_entropy:
            entropy = predictive_scores(self.actor, length)
        with attention as layers, entropy as entropies:
            log_probs = super().forward(sequences, action_mask, attention_mask, **kwargs)
        found = {**layers, **entropies}
        self._columns.append({name: values.cpu().float() for name, values in found.items()})
        return log_probs

    def take_columns(self) -> list[Columns]:
        """The columns of the passes since the last call, each `batch token`, in their order."""
        taken, self._columns = self._columns, []
        return taken

    def attention_layers(self) -> dict[str, Any]:
        """The policy's number of layers, and which of them have attention, for `Recipe.placed`."""
        return dict(zip(("depth", "available"), model_layers(self.actor.model.module), strict=True))


@contextmanager
def attention_scores(
    actor: Any, attended: Tensor, attention: Any, length: int, ring_group: Any = None
) -> Iterator[dict[int | str, Tensor]]:
    """A context in which one forward pass of an OpenRLHF `Actor` leaves attention entropies.

    Args:
        actor: The `Actor`; with `packing_samples` it takes the padding out of its batch, and over a
            ring each rank runs a slice.
        attended: True at real tokens of prompt and response, `batch position`.
        attention: What is read, an `AttentionEntropy` or `AttentionReading`, its layers numbered.
        length: Number of response positions, the last ones.
        ring_group: The ranks of the ring, or None.

    Yields:
        A mapping that on exit holds the attention entropy of each response token (nats, `batch
        token`) for each layer, or what else is read by its name.
    """
    packed, layers = bool(actor.packing_samples), attention.layers or ()

    def read(captured: CapturedAttention) -> dict[int | str, Tensor]:
        key_mask = None if packed else attended.bool().to(captured.key.device)
        return attention.readings(captured, key_mask=key_mask, group=ring_group)

    scores: dict[int | str, Tensor] = {}
    with capture_attention(actor.model, layers, packed=packed, reduce=read) as capture:
        yield scores
    for name, values in joined_readings(capture.calls).items():
        if packed:
            indices = attended.to(values.device).flatten().nonzero().flatten()
            pad = 0 if ring_group is None else -len(indices) % ring_group.size()
            values = gather_and_pad_tensor(values, ring_group, pad, indices, *attended.shape)
        scores[name] = attention.aligned(values, response_length=length)


@contextmanager
def predictive_scores(actor: nn.Module, length: int) -> Iterator[dict[str, Tensor]]:
    """A context in which one forward pass of an OpenRLHF `Actor` leaves predictive entropies.

    They are those of the sampling distribution, logits over the rollout temperature.

    Args:
        actor: The `Actor`.
        length: Number of response positions, the last ones.

    Yields:
        A mapping that on exit holds the entropies (nats, `batch token`) as `predictive_entropy`.
    """
    scores: dict[str, Tensor] = {}

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "return_output": True, "return_entropy": True}

    def take(module: nn.Module, args: Any, result: Any) -> Tensor:
        log_probs, output = result
        scores["predictive_entropy"] = output.entropy[:, -length:]
        return log_probs

    asking = actor.register_forward_pre_hook(ask, with_kwargs=True)
    with asking, actor.register_forward_hook(take):
        yield scores

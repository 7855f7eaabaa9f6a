"""Where the scores of a rollout batch come from: the pass for the old log-probabilities."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openrlhf.models.ring_attn_utils import gather_and_pad_tensor
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
from tokenweights._errors import invalid
from tokenweights.capture import CapturedAttention, capture_attention
from tokenweights.recipes import Recipe
from torch import Tensor, nn


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
    """OpenRLHF's policy actor; its pass for the old log-probabilities leaves scores behind.

    Training, its batches and the weight synchronization are OpenRLHF's own. A pass keeps one number
    for each token until `take_token_scores` hands them over.
    """

    def init_model_from_pretrained(self, strategy: Any, *args: Any, **kwargs: Any) -> Any:
        """As OpenRLHF's; also chooses the layers that are read."""
        result = super().init_model_from_pretrained(strategy, *args, **kwargs)
        self._token_scores: list[Tensor] = []
        self.recipe: Recipe = strategy.args.tokenweights.token_recipe
        self.probe_layers = self.recipe.model_layers(self.actor.model.module)
        return result

    def forward(
        self, sequences: Tensor, action_mask: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        """As OpenRLHF's; also keeps the scores of the response tokens."""
        if self.recipe.signal == "none":
            return super().forward(sequences, action_mask, attention_mask, **kwargs)
        length = action_mask.shape[1]
        if self.probe_layers:
            ring_group = self.strategy.ring_attn_group
            context = attention_scores(
                self.actor, attention_mask, self.recipe, self.probe_layers, length, ring_group
            )
        else:
            context = predictive_scores(self.actor, length)
        with context as scores:
            log_probs = super().forward(sequences, action_mask, attention_mask, **kwargs)
        merged = self.recipe.merged_layers([layer.cpu() for layer in scores], action_mask.bool())
        self._token_scores.append(merged.float())
        return log_probs

    def take_token_scores(self) -> list[Tensor]:
        """The scores of the passes since the last call, each `batch token`, in their order."""
        taken, self._token_scores = self._token_scores, []
        return taken

    def token_score_layers(self) -> tuple[int, ...]:
        """The layers that are read."""
        return self.probe_layers


@contextmanager
def attention_scores(
    actor: Any,
    attention_mask: Tensor,
    recipe: Recipe,
    layers: tuple[int, ...],
    response_length: int,
    ring_group: Any = None,
) -> Iterator[list[Tensor]]:
    """A context in which one forward pass of an OpenRLHF `Actor` leaves attention entropies.

    Args:
        actor: The `Actor`; with `packing_samples` it takes the padding out of its batch, and over a
            ring each rank runs a slice.
        attention_mask: True at real tokens of prompt and response, `batch position`.
        recipe: The entropy's kind and the row that stands for a token.
        layers: Layers to read.
        response_length: Number of response positions, the last ones.
        ring_group: The ranks of the ring, or None.

    Yields:
        A list that on exit holds the attention entropy of each response token (nats, `batch
        token`) for each layer.
    """
    packed = bool(actor.packing_samples)

    def entropy(captured: CapturedAttention) -> Tensor:
        key_mask = None if packed else attention_mask.bool().to(captured.key.device)
        return recipe.captured_entropy(captured, key_mask=key_mask, group=ring_group)

    scores: list[Tensor] = []
    with capture_attention(actor.model, layers, packed=packed, reduce=entropy) as capture:
        yield scores
    for layer in layers:
        (entropies,) = capture.calls[layer]
        if packed:
            indices = attention_mask.to(entropies.device).flatten().nonzero().flatten()
            padding = 0 if ring_group is None else -len(indices) % ring_group.size()
            shape = attention_mask.shape
            entropies = gather_and_pad_tensor(entropies, ring_group, padding, indices, *shape)
        scores.append(recipe.aligned(entropies, response_length=response_length))


@contextmanager
def predictive_scores(actor: nn.Module, response_length: int) -> Iterator[list[Tensor]]:
    """A context in which one forward pass of an OpenRLHF `Actor` leaves predictive entropies.

    They are those of the sampling distribution, logits over the rollout temperature.

    Args:
        actor: The `Actor`.
        response_length: Number of response positions, the last ones.

    Yields:
        A list that on exit holds the entropies (nats, `batch token`).
    """
    scores: list[Tensor] = []

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "return_output": True, "return_entropy": True}

    def take(module: nn.Module, args: Any, result: Any) -> Tensor:
        log_probs, output = result
        scores.append(output.entropy[:, -response_length:])
        return log_probs

    hooks = [actor.register_forward_pre_hook(ask, with_kwargs=True)]
    hooks.append(actor.register_forward_hook(take))
    try:
        yield scores
    finally:
        for hook in hooks:
            hook.remove()

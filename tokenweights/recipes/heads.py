"""Local and global heads of a model from a probe batch, and a recipe that names them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.attention import HeadClasses, attention_distance, head_classes
from tokenweights.capture import CapturedAttention, capture_attention
from tokenweights.recipes.attention import model_layers
from tokenweights.recipes.backward import BackwardDistance, FutureInfluence, middle_third
from tokenweights.recipes.parts import mapped_parts, parts_of
from tokenweights.recipes.recipe import Recipe


@typed
@torch.no_grad()
def probe_head_classes(
    model: nn.Module,
    input_ids: Int[Tensor, "batch position"],
    response_mask: Bool[Tensor, "batch position"],
    *,
    attention_mask: Bool[Tensor, "batch position"] | None = None,
    layers: tuple[int, ...] | None = None,
    share: float = 0.3,
) -> dict[int, HeadClasses]:
    """Local and global heads of some layers, from one forward pass over a probe batch.

    Heads are told apart by the mean distance of their attention over response rows, see
    `head_classes`. Do it once, before training, and give the classes to the recipe with
    `with_head_classes`: they are part of it then, in its text too, and the same on any layout.

    Args:
        model: A transformers model.
        input_ids: Prompts and responses.
        response_mask: True at response tokens.
        attention_mask: True at real tokens; None if all are.
        layers: Layers to look at; None for five of the middle third.
        share: Share of the heads in each class.

    Returns:
        The classes by the number of the layer.

    Raises:
        TokenWeightsError: If the model has no layer that can be read, or no response token is
            given.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(
        ...     vocab_size=8,
        ...     hidden_size=16,
        ...     intermediate_size=16,
        ...     num_hidden_layers=3,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2,
        ...     head_dim=8,
        ... )
        >>> ids = torch.arange(8)[None]
        >>> classes = probe_head_classes(Qwen3ForCausalLM(config), ids, ids > 2)
        >>> list(classes), len(classes[1].local), len(classes[1].distant)
        ([1], 1, 1)
    """
    if layers is None:
        layers = middle_third(*model_layers(model))

    def classes(captured: CapturedAttention) -> HeadClasses:
        distances = attention_distance(
            captured.query,
            captured.key,
            heads="none",
            scale=captured.scale,
            key_mask=captured.key_mask if attention_mask is None else attention_mask,
            window=captured.window,
            softcap=captured.softcap,
            sinks=captured.sinks,
        )
        return head_classes(distances, response_mask, share=share)

    given: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if attention_mask is not None:
        given["attention_mask"] = attention_mask.long()
        given["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    with capture_attention(model, layers, reduce=classes) as capture:
        model(**given)
    return {layer: calls[0] for layer, calls in capture.calls.items()}


@typed
def with_head_classes(recipe: Recipe, classes: Mapping[int, HeadClasses]) -> Recipe:
    """The recipe with its heads named: local ones for distances, global ones for influence.

    Args:
        recipe: A recipe that reads `backward_distance` or `future_influence`.
        classes: The classes by the number of the layer; these are the layers that it reads.

    Returns:
        The recipe.

    Raises:
        TokenWeightsError: If it reads neither, or there is no class.

    Example:
        >>> import tokenweights as tw
        >>> classes = {1: tw.HeadClasses(local=(0,), distant=(3,))}
        >>> made = with_head_classes(tw.recipe("preplan_anchor40"), classes)
        >>> made.readings
        ('1_distance_10_h0', '1_received_10_50_h3')
    """
    if not classes:
        hint = "See `probe_head_classes`."
        raise invalid("with_head_classes", "classes", "of at least one layer", "none", hint)
    layers = tuple(classes)
    local = tuple(each.local for each in classes.values())
    distant = tuple(each.distant for each in classes.values())
    kinds = (BackwardDistance, FutureInfluence)
    parts = (*parts_of(recipe.signal), *parts_of(recipe.rule))
    if not any(isinstance(part, kinds) for part in parts):
        hint = "Name one with `preplan` in its name."
        raise invalid("with_head_classes", "recipe", "that names heads", recipe.name, hint)

    def change(part: Any) -> Any:
        if isinstance(part, kinds):
            heads = local if isinstance(part, BackwardDistance) else distant
            return dataclasses.replace(part, layers=layers, heads=heads)
        return part

    signal, rule = mapped_parts(recipe.signal, change), mapped_parts(recipe.rule, change)
    return dataclasses.replace(recipe, signal=signal, rule=rule)

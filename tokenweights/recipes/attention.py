"""Attention entropy as a signal: which layers are read, by which statistic, at which row."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.attention import EntropyKind
from tokenweights.capture import (
    CapturedAttention,
    attention_layers,
    capture_attention,
    middle_layer,
)
from tokenweights.capture.megatron_layers import megatron_layers
from tokenweights.distributed import agreed
from tokenweights.masked import masked_ranks, sum_dtype
from tokenweights.recipes.batch import RolloutBatch
from tokenweights.recipes.parts import Part
from tokenweights.signals import align_to_decision, align_to_own

Alignment = Literal["deciding", "own"]
LayerReduction = Literal["mean", "rank_mean"]

# Positions are counted in int64.
_MAX_POSITIONS = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class AttentionEntropy(Part):
    """Entropy of the attention that each token is decided by (Section 3.1), averaged over heads.

    Attributes:
        layers: Attention layers that are read; None for the middle layer.
        layer_reduction: How scores of several layers become one: their mean, or the mean of their
            ranks within the response, scaled to [0, 1].
        entropy_kind: `"normalized"` (Eq. 13), `"raw"` (Eq. 12), `"topk"` (Eq. 14) or `"fixed"`
            (Eq. 15).
        top_k: Positions of the top-k entropy.
        fixed_k: Positions of the fixed-K entropy.
        alignment: Whose attention scores a token: the row `"deciding"` it, or its `"own"`.
    """

    kind: ClassVar[str] = "attention_entropy"
    columns: ClassVar[tuple[str, ...]] = ("attention",)

    layers: tuple[int, ...] | None = None
    layer_reduction: LayerReduction = "mean"
    entropy_kind: EntropyKind = "normalized"
    top_k: int = 256
    fixed_k: int = 256
    alignment: Alignment = "deciding"

    def __post_init__(self) -> None:
        if isinstance(self.layers, int):  # one layer
            object.__setattr__(self, "layers", (self.layers,))
        super().__post_init__()

    def _check(self) -> None:
        for name in ("top_k", "fixed_k"):
            self.require(name, 1 <= getattr(self, name) <= _MAX_POSITIONS, "in [1, 2**63)")
        self.require("layers", self.layers is None or len(self.layers) > 0, "not empty")

    def __call__(self, batch: RolloutBatch) -> Float[Tensor, "batch token"]:
        """The batch's columns of the layers as one score for each token."""
        read: Mapping[int | str, Tensor] = batch.attention or {}
        layers = self.layers
        if layers is None:  # columns of other signals have names
            layers = tuple(name for name in read if isinstance(name, int))
        if self.layers is None and len(layers) != 1:
            hint = "Name the layers in the recipe, or let `Recipe.on_model` do it."
            raise invalid(self.kind, "attention", "of one layer", list(layers), hint)
        for layer in layers:
            if layer not in read:
                hint = "Fill `RolloutBatch(attention={layer: scores})`; see `Recipe.on_model`."
                raise invalid(self.kind, "attention", f"with layer {layer}", list(read), hint)
        return self.merged([read[layer] for layer in layers], batch.mask)

    def lines(self) -> list[str]:
        """Equation, layer and row."""
        kinds = {
            "raw": "H = -sum a log a  (Eq. 12)",
            "normalized": "H = -sum a log a / log N  (Eq. 13)",
            "topk": f"H over the {self.top_k} largest a, renormalized  (Eq. 14)",
            "fixed": f"H over the first {self.fixed_k} positions, renormalized  (Eq. 15)",
        }
        layers = "middle" if self.layers is None else ", ".join(map(str, self.layers))
        lines = [
            f"attention entropy, {kinds[self.entropy_kind]}",
            f"layer {layers}, {self.alignment} row of each token",
        ]
        if self.layer_reduction == "rank_mean":
            lines.append("mean over layers of the rank within the response, in [0, 1]")
        elif self.layers is not None and len(self.layers) > 1:
            lines.append("mean over layers")
        return lines

    @property
    def statistic(self) -> tuple[str | int, ...]:
        """What is read of each layer, in which all attention signals of a recipe have to agree."""
        size = {"topk": self.top_k, "fixed": self.fixed_k}.get(self.entropy_kind, 0)
        return self.entropy_kind, size, self.alignment

    @property
    def names(self) -> tuple[int | str, ...]:
        """The columns of `RolloutBatch.attention` that it reads: the numbers of its layers."""
        return self.layers or ()

    @typed
    def placed(self, depth: int, *, available: Sequence[int] | None = None) -> "AttentionEntropy":
        """The signal with its layers numbered for a model of `depth` layers.

        Args:
            depth: Number of layers.
            available: Indices of the layers that have attention, in ascending order, for hybrid
                models; all layers if None.

        Returns:
            The signal with indices from 0, each once. By default the middle layer, or the layer
            with attention that is nearest to it.

        Raises:
            TokenWeightsError: If a layer is not available, or none is.
        """
        available = tuple(range(depth)) if available is None else tuple(available)
        if self.layers is None:
            middle = middle_layer(depth)
            ordered = sorted(available, key=lambda layer: abs(layer - middle))
            return dataclasses.replace(self, layers=tuple(ordered[:1]))
        chosen = numbered(self.kind, self.layers, available)
        # -1 may name a layer that has been named.
        return dataclasses.replace(self, layers=tuple(dict.fromkeys(chosen)))

    @agreed
    @typed
    def captured(
        self,
        captured: CapturedAttention,
        *,
        key_mask: Bool[Tensor, "batch key"] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Float[Tensor, "batch query"]:
        """The signal's kind of entropy of each query of a captured attention call.

        Args:
            captured: The call.
            key_mask: True for real keys; None if there is no padding, or the rows are packed.
            group: Ranks that hold slices of a packed row; None if this is all.

        Returns:
            Entropies.
        """
        kind, top_k, fixed_k = self.entropy_kind, self.top_k, self.fixed_k
        if captured.position_ids is not None:
            return captured.packed_entropy(group=group, kind=kind, top_k=top_k, fixed_k=fixed_k)
        return captured.entropy(key_mask=key_mask, kind=kind, top_k=top_k, fixed_k=fixed_k)

    def readings(
        self,
        captured: CapturedAttention,
        *,
        key_mask: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> dict[int | str, Tensor]:
        """What is read of a captured call, by the names of the columns; see `captured`."""
        return {captured.layer: self.captured(captured, key_mask=key_mask, group=group)}

    @typed
    def aligned(
        self, scores: Float[Tensor, "batch position"], *, response_length: int
    ) -> Float[Tensor, "batch token"]:
        """Scores of sequence positions as scores of response tokens, by the signal's alignment.

        Args:
            scores: Scores of the last positions of sequences whose responses fill the last
                `response_length` columns.
            response_length: Width of the response part.

        Returns:
            One score for each response token.
        """
        return aligned_scores(scores, self.alignment, response_length=response_length)

    @typed
    def merged(
        self, scores: Sequence[Float[Tensor, "batch token"]], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token"]:
        """Scores of several layers as one score for each token, by `layer_reduction`.

        Args:
            scores: Scores of each layer.
            mask: True for valid response tokens.

        Returns:
            Their mean, or the mean of their within-response ranks over `T - 1`, of the dtype of
            the scores but float32 for half precision and for ranks.

        Raises:
            TokenWeightsError: If there is no layer.
        """
        if not scores:
            hint = "Probe a layer."
            raise invalid("attention_entropy", "scores", "of at least one layer", "none", hint)
        if self.layer_reduction == "rank_mean":
            last = (mask.sum(-1, keepdim=True) - 1).clamp(min=1)
            scores = [masked_ranks(layer, mask).float() / last for layer in scores]
        elif len(scores) == 1:
            return scores[0].to(sum_dtype(scores[0].dtype))
        layers = torch.stack(list(scores))
        return layers.mean(0, dtype=sum_dtype(layers.dtype))


def numbered(kind: str, layers: Sequence[int], available: Sequence[int]) -> list[int]:
    """Layers by their number from 0; negative ones count from the last one with attention."""
    chosen = []
    for layer in layers:
        index = available[layer] if -len(available) <= layer < 0 else layer
        if index not in available:
            raise invalid(
                kind,
                "layers",
                f"among the attention layers {list(available)}",
                layer,
                "Layers count from 0; -1 is the last one with attention.",
            )
        chosen.append(index)
    return chosen


def model_layers(model: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Depth of a model, and the layers that have attention which can be read.

    Args:
        model: The model.

    Returns:
        The number of layers, and the indices from 0 of those with attention.

    Raises:
        TokenWeightsError: If the model has no layer that can be tapped.
    """
    spread = megatron_layers(model)
    if spread is not None:
        return spread.depth, tuple(range(spread.depth))
    with capture_attention(model, ()):  # refuses a model without a layer it can tap
        available = tuple(attention_layers(model))
    config: Any = model.config
    return config.get_text_config().num_hidden_layers, available


def aligned_scores(scores: Tensor, alignment: Alignment, *, response_length: int) -> Tensor:
    """Scores of sequence positions as scores of the tokens that these rows stand for."""
    align = align_to_decision if alignment == "deciding" else align_to_own
    return align(scores, response_length=response_length)

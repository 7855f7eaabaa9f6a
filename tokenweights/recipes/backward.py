"""Signals of looking back: how far a token's attention goes, and how much later ones look at it.

Both are read at a token's own position, of heads that are named once and for all: see
`with_head_classes`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights.attention import Received
from tokenweights.capture import CapturedAttention
from tokenweights.masked import sum_dtype
from tokenweights.recipes.attention import Alignment, AttentionEntropy, aligned_scores, numbered
from tokenweights.recipes.batch import RolloutBatch
from tokenweights.recipes.parts import Part

# Layers that are read by default, evenly spaced over the middle third of the model.
LAYERS = 5


@dataclass(frozen=True, kw_only=True)
class AttentionColumns(Part):
    """A statistic of attention beside the entropy; a mean over layers and over heads of each.

    Attributes:
        layers: Attention layers that are read; None for five of the middle third.
        heads: For each layer the numbers of the query heads that are averaged; None for all heads.
    """

    columns: ClassVar[tuple[str, ...]] = ("attention",)
    alignment: ClassVar[Alignment] = "own"

    layers: tuple[int, ...] | None = None
    heads: tuple[tuple[int, ...], ...] | None = None

    def _check(self) -> None:
        self.require("layers", self.layers is None or len(self.layers) > 0, "not empty")
        if self.heads is not None:
            fits = self.layers is not None and len(self.heads) == len(self.layers)
            self.require("heads", fits, "one tuple of heads for each of `layers`")
            self.require("heads", all(self.heads), "at least one head in each layer")

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """The mean over layers of the batch's columns."""
        read = batch.attention or {}
        if self.layers is None:
            hint = "Name the layers in the recipe, or let `Recipe.on_model` do it."
            raise invalid(self.kind, "attention", "of named layers", list(read), hint)
        for name in self.names:
            if name not in read:
                hint = "Fill `RolloutBatch(attention={name: values})`; see `Recipe.readings`."
                raise invalid(self.kind, "attention", f"with {name!r}", list(read), hint)
        layers = torch.stack([read[name] for name in self.names])
        return layers.mean(0, dtype=sum_dtype(layers.dtype))

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of `RolloutBatch.attention` that it reads, one for each layer."""
        return tuple(self._name(place) for place in range(len(self.layers or ())))

    def placed(self, depth: int, *, available: Sequence[int] | None = None) -> "AttentionColumns":
        """The signal with its layers numbered for a model of `depth` layers.

        Args:
            depth: Number of layers.
            available: Indices of the layers that have attention; all layers if None.

        Returns:
            The signal with indices from 0.

        Raises:
            TokenWeightsError: If a layer is not available, or none is.
        """
        available = tuple(range(depth)) if available is None else tuple(available)
        if self.layers is not None:
            layers = tuple(numbered(self.kind, self.layers, available))
        else:
            layers = middle_third(depth, available)
        return dataclasses.replace(self, layers=layers)

    def reading(
        self,
        captured: CapturedAttention,
        heads: Sequence[int] | None,
        *,
        key_mask: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """What is read of a captured call, `batch query`."""
        raise NotImplementedError

    def readings(
        self,
        captured: CapturedAttention,
        *,
        key_mask: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> dict[int | str, Tensor]:
        """What is read of a captured call, by the names of the columns.

        Args:
            captured: The call.
            key_mask: True for real keys; None if there is no padding, or the rows are packed.
            group: Ranks that hold slices of a packed row; None if this is all.

        Returns:
            One column, `batch query`; nothing of a layer that is not read.
        """
        found: dict[int | str, Tensor] = {}
        for place, layer in enumerate(self.layers or ()):
            if layer == captured.layer:
                heads = None if self.heads is None else self.heads[place]
                own = self.reading(captured, heads, key_mask=key_mask, group=group)
                found[self._name(place)] = own
        return found

    @property
    def _statistic(self) -> str:
        raise NotImplementedError

    def _name(self, place: int) -> str:
        assert self.layers is not None
        heads = "" if self.heads is None else "_h" + "_".join(map(str, self.heads[place]))
        return f"{self.layers[place]}_{self._statistic}{heads}"

    def _where(self) -> str:
        if self.layers is None:
            layers = f"{LAYERS} layers of the middle third"
        else:
            layers = "layers " + ", ".join(map(str, self.layers))
        if self.heads is None:
            return f"mean over {layers}, all heads"
        heads = " | ".join(",".join(map(str, own)) for own in self.heads)
        return f"mean over {layers}, heads {heads}"


@dataclass(frozen=True, kw_only=True)
class BackwardDistance(AttentionColumns):
    """How far back a token looks, each pair counting with a bounded distance, tokens.

    Attributes:
        bound: The largest distance that a pair counts with; None for no bound.
    """

    kind: ClassVar[str] = "backward_distance"
    bound: int | None = 10

    def _check(self) -> None:
        super()._check()
        self.require("bound", self.bound is None or self.bound >= 1, ">= 1")

    def reading(
        self,
        captured: CapturedAttention,
        heads: Sequence[int] | None,
        *,
        key_mask: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """The distances of the call."""
        return captured.distance(key_mask=key_mask, group=group, bound=self.bound, heads=heads)

    @property
    def _statistic(self) -> str:
        return f"distance_{'all' if self.bound is None else self.bound}"

    def lines(self) -> list[str]:
        """The equation, layers and heads."""
        far = "t - s" if self.bound is None else f"min(t - s, {self.bound})"
        return [f"backward distance, sum over s of a[t, s] {far}", self._where()]


@dataclass(frozen=True, kw_only=True)
class FutureInfluence(AttentionColumns):
    """How much later tokens of the sequence look back at a token, as a share of a query's 1.

    Attributes:
        first: Least distance to the queries that count.
        last: Largest distance; None for all later ones.
    """

    kind: ClassVar[str] = "future_influence"
    first: int = 10
    last: int | None = 50

    def _check(self) -> None:
        super()._check()
        self.require("first", self.first >= 0, ">= 0")
        self.require("last", self.last is None or self.last >= self.first, f">= {self.first}")

    def reading(
        self,
        captured: CapturedAttention,
        heads: Sequence[int] | None,
        *,
        key_mask: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """What the call's keys receive."""
        asked = Received((self.first, self.last), "mean")
        return captured.received(asked, key_mask=key_mask, group=group, heads=heads)

    @property
    def _statistic(self) -> str:
        return f"received_{self.first}_{'all' if self.last is None else self.last}"

    def lines(self) -> list[str]:
        """The equation, layers and heads."""
        last = "T" if self.last is None else f"min(T, s + {self.last})"
        line = f"future influence, mean of a[t, s] over t from s + {self.first} to {last}"
        return [line, self._where()]


@dataclass(frozen=True)
class AttentionReading:
    """All that a recipe reads of attention, where it is more than one entropy.

    Attributes:
        parts: The signals that read it.
    """

    parts: tuple[AttentionEntropy | AttentionColumns, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that are read, each once."""
        return tuple(dict.fromkeys(layer for part in self.parts for layer in part.layers or ()))

    @property
    def names(self) -> tuple[int | str, ...]:
        """The columns of `RolloutBatch.attention` that are read, each once."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.names))

    @property
    def alignment(self) -> Alignment:
        """Whose row stands for a token, the same for all parts."""
        return self.parts[0].alignment

    def placed(self, depth: int, *, available: Sequence[int] | None = None) -> "AttentionReading":
        """The same with layers numbered for a model; see `Recipe.placed`."""
        parts = (part.placed(depth, available=available) for part in self.parts)
        return AttentionReading(tuple(parts))

    def readings(
        self,
        captured: CapturedAttention,
        *,
        key_mask: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> dict[int | str, Tensor]:
        """What is read of a captured call, by the names of the columns; each is read once."""
        found: dict[int | str, Tensor] = {}
        for part in dict.fromkeys(self.parts):
            if captured.layer in (part.layers or ()) and not found.keys() >= set(part.names):
                found |= part.readings(captured, key_mask=key_mask, group=group)
        return found

    def aligned(self, scores: Tensor, *, response_length: int) -> Tensor:
        """Values of sequence positions as values of response tokens; see `AttentionEntropy`."""
        return aligned_scores(scores, self.alignment, response_length=response_length)


def joined_readings(
    calls: Mapping[int, Sequence[Mapping[int | str, Tensor]]],
) -> dict[int | str, Tensor]:
    """Readings of all layers, by name; those of consecutive calls one after another.

    Args:
        calls: What `readings` gave for the calls of each layer.

    Returns:
        Columns over the positions of the calls.
    """
    found: dict[int | str, list[Tensor]] = {}
    for layer in calls.values():
        for call in layer:
            for name, values in call.items():
                found.setdefault(name, []).append(values)
    return {name: torch.cat(parts) for name, parts in found.items()}


def middle_third(depth: int, available: Sequence[int]) -> tuple[int, ...]:
    """Five layers of the middle third, evenly spaced; fewer where there are fewer."""
    inside = [layer for layer in available if depth / 3 <= layer < 2 * depth / 3]
    inside = inside or sorted(available, key=lambda layer: abs(layer - depth / 2))[:1]
    count = min(LAYERS, len(inside))
    steps = (round(place * (len(inside) - 1) / max(count - 1, 1)) for place in range(count))
    return tuple(inside[step] for step in steps)

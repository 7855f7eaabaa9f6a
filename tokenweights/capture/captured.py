"""One attention call: query, key and all that shapes its distribution."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._errors import invalid, refused_by
from tokenweights._typing import typed
from tokenweights.attention import (
    EntropyKind,
    Received,
    attention_distance,
    attention_entropy,
    attention_received,
    packed_distance,
    packed_entropy,
    packed_received,
    sharded_entropy,
)
from tokenweights.attention.sweeps import averaged
from tokenweights.capture.shards import Shards, token_major
from tokenweights.distributed import agreed


@dataclass(frozen=True)
class CapturedAttention:
    """Query and key of one attention call, detached, with all that shapes its distribution.

    Attributes:
        layer: Index of the layer.
        query: Rotated queries, `batch heads query dim`: the last `query` positions of `key`.
        key: Rotated keys, `batch kv_heads key dim`.
        scale: Factor on the scores.
        window: Visible keys of a sliding-window layer, the query included, or None.
        softcap: Bound of a soft cap on the scores, or None.
        sinks: Extra logit of each head in the softmax denominator, ` heads`, or None.
        position_ids: Position of each token in its own sequence, `batch query`, of a call that was
            captured as packed; None otherwise.
        key_mask: True for the keys that are no padding, `batch key`, as the layer's own mask has
            it; None if all are.
        precision: What attention itself rounds query and key to under autocast, in which entropies
            are then computed as well; None where it takes them as they are.
        shards: Where this rank's tokens and heads lie in the whole call, of a model that is spread
            over ranks by megatron-core; None otherwise. Entropies are those of the whole: all ranks
            of both groups have to ask for them, and each gets those of its own tokens.
    """

    layer: int
    query: Tensor
    key: Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    position_ids: Tensor | None = None
    key_mask: Tensor | None = None
    precision: torch.dtype | None = None
    shards: Shards | None = None

    @refused_by("CapturedAttention.entropy")
    @typed
    def entropy(
        self,
        *,
        key_mask: Bool[Tensor, "batch key"] | None = None,
        kind: EntropyKind = "normalized",
        top_k: int = 256,
        fixed_k: int = 256,
    ) -> Float[Tensor, "batch query"]:
        """Entropy of the head-averaged attention distribution of each captured query.

        Args:
            key_mask: True for real keys; None for those that were real to the layer.
            kind: As in `tokenweights.attention_entropy`.
            top_k: As in `tokenweights.attention_entropy`.
            fixed_k: As in `tokenweights.attention_entropy`.

        Returns:
            Entropies, 0 for padded queries.

        Raises:
            TokenWeightsError: As `attention_entropy`, if the call was captured as packed, or if
                `key_mask` has keys that the layer did not attend to, or lacks some.
        """
        self._require_packed("entropy", False)
        if self.shards is not None:
            self._require_own("entropy", "key_mask", key_mask, "Mask the entropies of padding.")
            return self._sharded(self.shards, kind, top_k, fixed_k)
        return attention_entropy(
            *self._rounded(),
            kind=kind,
            top_k=top_k,
            fixed_k=fixed_k,
            key_mask=self._keys(key_mask),
            **self._options(),
        )

    @agreed
    @refused_by("CapturedAttention.packed_entropy")
    @typed
    def packed_entropy(
        self,
        *,
        group: dist.ProcessGroup | None = None,
        kind: EntropyKind = "normalized",
        top_k: int = 256,
        fixed_k: int = 256,
    ) -> Float[Tensor, "1 token"]:
        """Entropy of the head-averaged attention distribution of each token of a packed row.

        Args:
            group: As in `tokenweights.packed_entropy`: ranks that hold slices of the row.
            kind: As in `tokenweights.attention_entropy`.
            top_k: As in `tokenweights.attention_entropy`.
            fixed_k: As in `tokenweights.attention_entropy`.

        Returns:
            Entropies of this rank's tokens.

        Raises:
            TokenWeightsError: As `tokenweights.packed_entropy`, or if the call was not captured as
                packed.
        """
        self._require_packed("packed_entropy", True)
        assert self.position_ids is not None
        if self.shards is not None:
            self._require_own("packed_entropy", "group", group, "The call knows its groups.")
            return self._sharded(self.shards, kind, top_k, fixed_k)
        return packed_entropy(
            *self._packed_row(),
            self.position_ids[0],
            group=group,
            kind=kind,
            top_k=top_k,
            fixed_k=fixed_k,
            **self._options(),
        )[None]

    def _sharded(
        self, shards: Shards, kind: EntropyKind, top_k: int, fixed_k: int
    ) -> Float[Tensor, "batch query"]:
        query, key = map(token_major, self._as_attended())
        entropy = sharded_entropy(
            query,
            key,
            shards.positions,
            shards.cu_seqlens,
            token_group=shards.token_group,
            head_group=shards.head_group,
            key_mask=None if self.key_mask is None else self.key_mask.flatten(),
            kind=kind,
            top_k=top_k,
            fixed_k=fixed_k,
            **self._options(),
        )
        return entropy.view(self.query.shape[0], -1)

    @agreed
    @refused_by("CapturedAttention.distance")
    @typed
    def distance(
        self,
        *,
        key_mask: Bool[Tensor, "batch key"] | None = None,
        group: dist.ProcessGroup | None = None,
        bound: int | None = None,
        heads: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch query"]:
        """Mean distance from each captured query to the keys it looks at, in real tokens.

        Args:
            key_mask: As in `entropy`, of rows that are not packed.
            group: As in `packed_entropy`, of rows that are.
            bound: As in `tokenweights.attention_distance`.
            heads: Numbers of the query heads that are averaged; None for all.

        Returns:
            Distances, 0 for padded queries.

        Raises:
            TokenWeightsError: As `attention_distance`, and as `entropy` for `key_mask`.
        """
        options = {"bound": bound, **self._options()}
        if self.position_ids is not None:
            row = (*self._packed_row(), self.position_ids[0])
            return packed_distance(*row, group=group, heads=heads, **options)[None]
        options["heads"] = averaged(heads)
        return attention_distance(*self._rounded(), key_mask=self._keys(key_mask), **options)

    @agreed
    @refused_by("CapturedAttention.received")
    @typed
    def received(
        self,
        asked: Received,
        *,
        key_mask: Bool[Tensor, "batch key"] | None = None,
        group: dist.ProcessGroup | None = None,
        heads: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch query"]:
        """Attention that the key of each captured query gets from the captured queries.

        Of a call that was captured with `rows`, these are the last ones, as of a response.

        Args:
            asked: Which queries count, and how.
            key_mask: As in `entropy`, of rows that are not packed.
            group: As in `packed_entropy`, of rows that are.
            heads: Numbers of the query heads that are averaged; None for all.

        Returns:
            What the last `query` keys receive, 0 for padded ones.

        Raises:
            TokenWeightsError: As `attention_received`, and as `entropy` for `key_mask`.
        """
        options = {"horizon": asked.horizon, "reduction": asked.reduction, **self._options()}
        if self.position_ids is not None:
            row = (*self._packed_row(), self.position_ids[0])
            return packed_received(*row, group=group, heads=heads, **options)[None]
        options["heads"] = averaged(heads)
        columns = attention_received(*self._rounded(), key_mask=self._keys(key_mask), **options)
        return columns[:, columns.shape[1] - self.query.shape[2] :]

    def _options(self) -> dict[str, Any]:
        """What shapes the distribution beside query and key."""
        names = ("scale", "window", "softcap", "sinks")
        return {name: getattr(self, name) for name in names}

    def _packed_row(self) -> tuple[Tensor, Tensor]:
        query, key = (states[0].transpose(0, 1) for states in self._rounded())
        return query, key

    def _keys(self, key_mask: Tensor | None) -> Tensor | None:
        if key_mask is None:
            return self.key_mask
        self._require_same_keys(key_mask)
        return key_mask

    def _rounded(self) -> tuple[Tensor, Tensor]:
        """Query and key as the products of attention take them, where this rank has all of them."""
        if self.shards is not None:
            function, hint = "CapturedAttention", "Over ranks there are only entropies."
            raise invalid(function, "self", "with all tokens and heads", "shards of them", hint)
        return self._as_attended()

    def _as_attended(self) -> tuple[Tensor, Tensor]:
        dtype = self.precision or self.query.dtype
        return self.query.to(dtype), self.key.to(dtype)

    def _require_same_keys(self, key_mask: Tensor) -> None:
        """Raises if a real query had other keys than the mask says."""
        batch, queries, keys = self.query.shape[0], self.query.shape[2], self.key.shape[2]
        if tuple(key_mask.shape) != (batch, keys):
            return  # for `attention_entropy` to refuse
        seen = torch.ones_like(key_mask) if self.key_mask is None else self.key_mask
        columns = torch.arange(keys, device=key_mask.device)
        asked = torch.where(key_mask, columns, -1)[:, -queries:]
        first = torch.where(asked >= 0, asked, keys).amin(-1, keepdim=True)
        reached = columns <= asked.amax(-1, keepdim=True)
        if self.window is not None:
            reached &= columns > first - self.window
        if bool(((key_mask != seen) & reached).any()):
            raise invalid(
                "CapturedAttention.entropy",
                "key_mask",
                "to be the padding that the model was given",
                "other keys",
                "Pass the model and `entropy` the same mask, or leave it out here.",
            )

    def _require_own(self, method: str, name: str, given: object, hint: str) -> None:
        if given is not None:
            function = f"CapturedAttention.{method}"
            raise invalid(function, name, "None for a call over ranks", type(given).__name__, hint)

    def _require_packed(self, method: str, packed: bool) -> None:
        if packed != (self.position_ids is not None):
            wanted, other = ("packed", "entropy") if packed else ("unpacked", "packed_entropy")
            raise invalid(
                f"CapturedAttention.{method}",
                "self",
                f"captured from {wanted} rows",
                f"packed={not packed}",
                f"Call `{other}`, or capture with `packed={packed}`.",
            )

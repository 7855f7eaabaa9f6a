"""What one attention call attends to, or why query, key and padding do not determine it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tokenweights.capture.layers import implementation, layer_type, window_hint
from tokenweights.capture.masks import Square, Unreadable, block_mask, tensor_mask

_CAUSAL_LAYERS = ("full_attention", "sliding_attention", "hybrid", "hybrid_sliding")
# Functions whose mask alone says what is seen; others read causality and window from options.
_BY_MASK = ("eager", "sdpa", "flex_attention")
# What an attention function may be given beside query, key, value and mask: the options that are
# understood here, and those that do not touch the distribution. Any other option that a function
# names may shape it in a way of its own.
_UNDERSTOOD = {"scaling", "sliding_window", "softcap", "is_causal", "s_aux"}
_WITHOUT_EFFECT = {"module", "query", "key", "value", "attention_mask", "dropout", "kwargs"}
_OTHER_MASK = "a mask other than causal order, window and padding (or a static cache)"


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function: what its module handed it."""

    function: Callable
    module: Any
    query: Tensor
    key: Tensor
    mask: Any
    options: dict[str, Any]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows of the batch, queries of a row, keys of a row."""
        return self.query.shape[0], self.query.shape[2], self.key.shape[2]

    @property
    def backend(self) -> str:
        """The key of the function in the registry."""
        return implementation(self.module)

    @property
    def window(self) -> int | None:
        """The window that the call or its layer names; its mask may show another, or none."""
        return window_hint(self.module, self.options)


@dataclass(frozen=True)
class Attended:
    """The keys of one attention call.

    Attributes:
        window: Visible keys of each query, itself included, or None.
        key_mask: True for real keys, `batch key`; None if all are.
    """

    window: int | None
    key_mask: Tensor | None


def attended(call: AttentionCall, *, packed: bool) -> Attended:
    """What a call attends to.

    Raises:
        Unreadable: If query, key and padding, or packed positions, do not determine it.
    """
    _require_understood(call)
    return _attended_packed(call) if packed else _attended_padded(call)


def _require_understood(call: AttentionCall) -> None:
    kind = layer_type(call.module)
    if kind not in _CAUSAL_LAYERS:
        raise Unreadable(f"a layer of type {kind!r}")
    if call.options.get("position_bias") is not None:
        raise Unreadable("a layer with a position bias")
    if call.options.get("s_aux") is not None and call.backend == "sdpa":
        raise Unreadable("sinks, which sdpa leaves out")
    known = _UNDERSTOOD | _WITHOUT_EFFECT
    for option in inspect.signature(call.function).parameters:
        if option not in known and call.options.get(option) is not None:
            raise Unreadable(f"an option {option!r} of its attention function")


def _attended_padded(call: AttentionCall) -> Attended:
    """What a call over rows of one sequence each attends to."""
    _, queries, keys = call.sizes
    square = _square(call)
    if square is not None:
        seen = _explained(square, call.window)
    else:
        _require_causal(call)
        if call.backend == "sdpa" and 1 < queries < keys:
            raise Unreadable(_OTHER_MASK)
        seen = Attended(_own_window(call), _padding(call))
    real = None if seen.key_mask is None else seen.key_mask[:, keys - queries :]
    restarts = _restarts(call.options.get("position_ids"), real)
    if restarts or call.options.get("cu_seq_lens_q") is not None:
        raise Unreadable("several sequences packed into a row")
    return seen


def _attended_packed(call: AttentionCall) -> Attended:
    """What a call over one row of sequences, each of which attends to itself only, attends to."""
    batch, tokens, keys = call.sizes
    positions = call.options.get("position_ids")
    if batch != 1 or tokens != keys:
        shapes = f"queries {tuple(call.query.shape)} and keys {tuple(call.key.shape)}"
        raise Unreadable(f"{shapes}, not one packed row")
    if not isinstance(positions, Tensor) or positions.shape != (1, tokens):
        shape = tuple(positions.shape) if isinstance(positions, Tensor) else None
        raise Unreadable(f"position ids of shape {shape} for {tokens} packed tokens")
    square = _square(call)
    if square is not None:
        sequence = (positions[0] == 0).cumsum(0)
        real = torch.ones(1, tokens, dtype=torch.bool, device=call.query.device)
        for window in dict.fromkeys((call.window, None)):
            if _shows(square, real, _causal(square, window, real, sequence)):
                return Attended(window, None)
        raise Unreadable("a mask that mixes sequences")
    if call.mask is not None:
        raise Unreadable("a padding mask on a packed row")
    # Flash attention itself keeps sequences apart, by their positions; others need a mask.
    if "flash" not in call.backend and bool((positions[0, 1:] == 0).any()):
        raise Unreadable("several sequences packed into a row and no mask between them")
    _require_causal(call)
    return Attended(_own_window(call), None)


def _square(call: AttentionCall) -> Square | None:
    """The mask as a square of queries and keys; None if there is none, or only one of padding."""
    mask = call.mask
    if isinstance(mask, BlockMask) and call.backend == "flex_attention":
        return block_mask(mask, *call.sizes, device=call.query.device)
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and not _by_mask(call)):
        return None
    if not isinstance(mask, Tensor):
        raise Unreadable(f"a mask of type {type(mask).__name__}, which cannot be read")
    if call.backend == "flex_attention" and mask.dtype == torch.bool:
        raise Unreadable("a boolean mask that flex attention adds to the scores")
    return tensor_mask(mask, *call.sizes)


def _by_mask(call: AttentionCall) -> bool:
    return call.backend in _BY_MASK


def _own_window(call: AttentionCall) -> int | None:
    """The window of a call without a square: only some functions look at the option."""
    return None if _by_mask(call) else call.window


def _padding(call: AttentionCall) -> Tensor | None:
    batch, _, keys = call.sizes
    if call.mask is not None and call.mask.shape != (batch, keys):
        raise Unreadable(_OTHER_MASK)
    return None if call.mask is None else call.mask.bool()


def _require_causal(call: AttentionCall) -> None:
    """Raises if attention without a square mask shows later keys."""
    asked = call.options.get("is_causal")
    causal = call.module.is_causal if asked is None else asked
    if call.backend in ("eager", "flex_attention"):
        causal = False
    # One query, the last position, sees everything before it in any case.
    if not causal and call.query.shape[2] > 1:
        raise Unreadable("a layer that is not causal")


def _explained(square: Square, hint: int | None) -> Attended:
    """Window and padding that show exactly what the square shows to real queries.

    A key counts as padding if no query sees it. Rows of padded queries may show anything.
    """
    own = square.own()
    if square.past and not bool(own[:, -1].any()):
        raise Unreadable(_OTHER_MASK)  # a cache with free slots: queries are not its last positions
    for window in dict.fromkeys((hint, None)):
        key_mask = _real_keys(square, own, window)
        if _shows(square, own, _causal(square, window, key_mask)):
            if window is not None and _has_holes(key_mask, window):
                raise Unreadable(
                    "padding inside a window: the layer counts it and the entropy does not"
                )
            return Attended(window, key_mask)
    raise Unreadable(_OTHER_MASK)


def _causal(
    square: Square, window: int | None, key_mask: Tensor, sequence: Tensor | None = None
) -> Callable[[slice], Tensor]:
    """What causal order, window, padding and the bounds of packed sequences let a query see."""
    places = torch.arange(square.keys, device=key_mask.device)

    def allowed(rows: slice) -> Tensor:
        distance = places[square.past :][rows, None] - places
        inside = distance >= 0
        if window is not None:
            inside &= distance < window
        if sequence is not None:
            inside &= sequence[rows, None] == sequence
        return inside & key_mask[:, None]

    return allowed


def _real_keys(square: Square, own: Tensor, window: int | None) -> Tensor:
    """Keys of the queries themselves, then those of the past that some real query sees."""
    past = torch.zeros(square.batch, square.past, dtype=torch.bool, device=own.device)
    if square.past:
        for rows in square.row_blocks():
            seen = square.shown(rows, slice(0, square.past)).all(1)
            past |= (seen & own[:, rows, None]).any(1)
        if window is not None:
            # Keys that have left every window may be real or not; no row asks.
            past[:, : max(0, square.past - window + 1)] = True
    return torch.cat([past, own], 1)


def _shows(square: Square, own: Tensor, allowed: Callable[[slice], Tensor]) -> bool:
    """Whether every real query sees what is allowed, under every head, and nothing else."""
    everything = slice(0, square.keys)
    for rows in square.row_blocks():
        differs = square.shown(rows, everything) != allowed(rows)[:, None]
        if bool((differs & own[:, None, rows, None]).any()):
            return False
    return True


def _has_holes(key_mask: Tensor, window: int) -> bool:
    """Whether a window counted in columns and one counted in real keys differ anywhere."""
    for row in key_mask:
        columns = row.nonzero().squeeze(1)
        farthest = torch.arange(len(columns), device=columns.device) - window + 1
        if bool((columns - columns[farthest.clamp(min=0)] >= window).any()):
            return True
    return False


def _restarts(positions: Any, real: Tensor | None) -> bool:
    """Whether positions fall from one real token of a row to the next: packed sequences."""
    if not isinstance(positions, Tensor):
        return False
    falls = positions.diff(dim=-1) < 0
    return bool((falls if real is None else falls & real[:, 1:] & real[:, :-1]).any())

"""Refusals: every argument that a type annotation cannot judge."""

import sys

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights.attention.layout import TokenBatch
from tokenweights.attention.scores import LARGEST_SCORE, check_scores, score_range
from tokenweights.attention.statistics import ENTROPY_KINDS, Heads, Logits, Request

MASS_TOLERANCE = 1e-3
FOREIGN_LSE = (
    "This lse does not belong to these q and k: check scale, softcap, window, masks and sinks, and "
    "keep it in float32; or leave it out."
)


def check_request(function: str, request: Request, heads: Heads) -> None:
    """Refuse parameters outside their range and combinations without a meaning."""
    for name in ("top_k", "fixed_k", "local_window"):
        value = getattr(request, name)
        if value < 1:
            raise invalid(function, name, "to be >= 1", value, "Pass a number of keys.")
    check_distance_bound(function, "distance_bound", request.distance_bound)
    for kind in request.kinds:
        if heads == "mean_entropy" and kind not in ENTROPY_KINDS:
            condition = 'to hold entropies only with heads="mean_entropy"'
            hint = 'Pass heads="none" or "mean_distribution" for the other statistics.'
            raise invalid(function, "kinds", condition, repr(kind), hint)
    if request.received is not None and heads == "mean_entropy":
        hint = 'Pass heads="none" or "mean_distribution" for what keys receive.'
        raise invalid(function, "heads", "for a distribution", repr(heads), hint)
    if not request.kinds and request.received is None:
        raise invalid(function, "kinds", "to name a statistic", "none", "Ask for at least one.")
    if "support_size" in request.kinds and not request.support_mass:
        hint = "Pass shares of the mass, or leave support_size out of `kinds`."
        raise invalid(function, "support_mass", "to name a share", "none", hint)
    for mass in request.support_mass:
        if not 0 < mass <= 1:
            raise invalid(
                function, "support_mass", "to be in (0, 1]", mass, "Pass shares of the mass."
            )


def check_distance_bound(function: str, argument: str, bound: int | None) -> None:
    """Refuse a largest distance that tells no key from another."""
    if bound is not None and bound < 1:
        raise invalid(function, argument, "to be >= 1", bound, "Pass a number of tokens.")


def check_exchange(function: str, *, ranks: dict[str, int], **sizes: int) -> None:
    """Refuse numbers of ranks below 1 and sizes below 0."""
    for least, numbers in ((1, ranks), (0, sizes)):
        for name, number in numbers.items():
            if number < least:
                raise invalid(function, name, f"to be >= {least}", number, "Count what there is.")


def check_logits(function: str, logits: Logits) -> None:
    """Refuse a window or softcap without a meaning."""
    if logits.window is not None and logits.window < 1:
        hint = "A query always sees itself; pass None for no window."
        raise invalid(function, "window", "to be >= 1", logits.window, hint)
    if logits.window is not None and not logits.causal:
        hint = "A window counts keys back from the query; drop it or pass causal=True."
        raise invalid(function, "window", "to be None when causal=False", logits.window, hint)
    # Written for NaN, and for integers beyond any float.
    if not abs(logits.scale) <= sys.float_info.max:
        raise invalid(function, "scale", "to be finite", logits.scale, "Pass a number or None.")
    if logits.softcap is not None and not logits.softcap > 0:
        hint = "Pass None for no softcap."
        raise invalid(function, "softcap", "to be > 0", logits.softcap, hint)


def check_heads(
    function: str, *, heads: int, kv_heads: int, dim: int, key_dim: int, sinks: Tensor | None
) -> None:
    """Refuse query and key whose heads do not fit together."""
    if dim != key_dim:
        hint = "Query and key must come from the same attention layer."
        raise invalid(function, "key", f"to have the query's dim {dim}", key_dim, hint)
    if dim == 0:
        hint = "Heads without a width have no scores."
        raise invalid(function, "query", "to have a dim of at least 1", dim, hint)
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        hint = "Grouped-query attention needs a whole number of query heads per key head."
        got = f"{heads} query heads and {kv_heads} key heads"
        raise invalid(function, "query", "to have a multiple of the key heads", got, hint)
    if sinks is not None and tuple(sinks.shape) != (heads,):
        hint = "Pass one sink logit per query head."
        raise invalid(function, "sinks", f"to have shape ({heads},)", tuple(sinks.shape), hint)


def check_padded(
    function: str,
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    key_mask: Bool[Tensor, "batch key"] | None,
    lse: Float[Tensor, "batch heads query"] | None,
    sinks: Float[Tensor, " heads"] | None,
) -> None:
    """Refuse shapes of a padded batch that do not fit together."""
    batch, heads, queries, dim = query.shape
    if key.shape[0] != batch:
        condition = f"to have the query's batch {batch}"
        raise invalid(function, "key", condition, key.shape[0], "Pass the keys of the same rows.")
    check_heads(
        function,
        heads=heads,
        kv_heads=key.shape[1],
        dim=dim,
        key_dim=key.shape[3],
        sinks=sinks,
    )
    check_positions(function, queries, key.shape[2])
    check_shape(function, "key_mask", key_mask, (batch, key.shape[2]))
    check_shape(function, "lse", lse, (batch, heads, queries))


def check_positions(function: str, queries: int, keys: int) -> None:
    """Refuse more queries than keys."""
    if queries > keys:
        hint = "The queries are the last positions of the keys; pass the keys of all positions."
        got = f"{queries} queries and {keys} keys"
        raise invalid(function, "query", "to be no longer than `key`", got, hint)


def check_shape(function: str, argument: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse an optional tensor of another shape."""
    if value is not None and tuple(value.shape) != shape:
        hint = "It has one entry per position of the batch it describes."
        raise invalid(function, argument, f"to have shape {shape}", tuple(value.shape), hint)


def check_bounds(function: str, argument: str, bounds: list[int], total: int) -> None:
    """Refuse cumulative lengths that do not cut `total` tokens into sequences."""
    if not bounds or bounds[0] != 0 or bounds[-1] != total or bounds != sorted(bounds):
        condition = f"to rise from 0 to the {total} packed tokens"
        hint = "Pass cumulative sequence lengths with a leading zero."
        raise invalid(function, argument, condition, bounds, hint)


def check_workspace(function: str, workspace_bytes: int) -> None:
    """Refuse a bound that nothing can keep."""
    if workspace_bytes < 1:
        hint = "At least one row of float32 weights is held whatever the bound."
        raise invalid(function, "workspace_bytes", "to be >= 1", workspace_bytes, hint)


def check_finite(function: str, batch: TokenBatch, sinks: Float[Tensor, " heads"] | None) -> None:
    """Refuse numbers that are not finite at real positions; a sink of -inf is none."""
    if sinks is not None and not bool((sinks <= LARGEST_SCORE).all()):
        condition = f"to be at most {LARGEST_SCORE:.2g}"
        hint = "Pass the sink logits of the layer; -inf is no sink."
        raise invalid(function, "sinks", condition, sinks.tolist(), hint)
    if batch.lse is not None and batch.lse.dtype not in (torch.float32, torch.float64):
        raise invalid(function, "lse", "to be float32 or float64", batch.lse.dtype, FOREIGN_LSE)
    # A sum is one cheap pass and finite only if all its terms are. Padding may hold anything, and
    # sums may overflow: only then the sequences are looked at one by one.
    given = [values for values in (batch.query, batch.key, batch.lse) if values is not None]
    totals = [values.sum(dtype=torch.float32) for values in given]
    if bool(torch.stack(totals).isfinite().all()):
        return
    for argument in ("query", "key", "lse"):
        values = [getattr(sequence, argument) for sequence in batch.sequences]
        if not all(value is None or bool(value.isfinite().all()) for value in values):
            hint = "A real position holds NaN or infinity: mask it, or repair what produced it."
            condition = "to be finite at real positions"
            hint = FOREIGN_LSE if argument == "lse" else hint
            raise invalid(function, argument, condition, "NaN or infinity", hint)


def check_batch_scores(function: str, batch: TokenBatch, scale: float) -> None:
    """Refuse scores of real positions that float64 cannot tell apart."""
    for sequence in batch.sequences:
        check_scores(function, score_range(sequence.query, sequence.key, scale))


def check_results(function: str, results: dict[str, Tensor]) -> None:
    """Refuse results that are not numbers, whatever made them so."""
    # All at once: on a GPU every answer is a wait.
    if not bool(torch.stack([value.isfinite().all() for value in results.values()]).all()):
        hint = "Inner products overflow: rescale the inputs, or check `scale`."
        condition = "and `key` to have finite inner products"
        raise invalid(function, "query", condition, "an overflow", hint)


def check_total_mass(function: str, total: Float[Tensor, " row"]) -> None:
    """Refuse an `lse` under which the weights of a row, sink included, do not sum to one."""
    worst = float((total - 1.0).abs().max()) if total.numel() else 0.0
    # Written so that a NaN fails too.
    if not worst <= MASS_TOLERANCE:
        condition = "to be the log of the softmax denominators of `query` and `key`"
        got = f"weights whose sums miss 1 by {worst:.2g}"
        raise invalid(function, "lse", condition, got, FOREIGN_LSE)

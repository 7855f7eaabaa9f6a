"""Statistics of a block of attention rows: from weights over keys to one number per query."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights.attention.statistics import Logits, Request
from tokenweights.masked import accumulator_dtype

# The smallest positive normal float32: where a weight is zero, its `p log p` must be zero too.
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class RowBlock:
    """Consecutive queries `first_query ...` of one sequence against its keys `first_key ...`.

    Positions count real tokens from the start of the sequence; no padding is left here.
    """

    first_query: int
    queries: int
    first_key: int
    keys: int
    total_keys: int
    causal: bool
    window: int | None
    device: torch.device

    @property
    def key_slice(self) -> slice:
        """The block's range of keys."""
        return slice(self.first_key, self.first_key + self.keys)

    @property
    def query_position(self) -> Int[Tensor, " query"]:
        """Position of each query."""
        return torch.arange(self.first_query, self.first_query + self.queries, device=self.device)

    @property
    def key_position(self) -> Int[Tensor, " key"]:
        """Position of each key."""
        return torch.arange(self.first_key, self.first_key + self.keys, device=self.device)

    @property
    def first_visible(self) -> Int[Tensor, " query"]:
        """Position of the first key each query sees."""
        position = self.query_position
        if self.window is None:
            return torch.zeros_like(position)
        return (position - self.window + 1).clamp_min(0)

    @property
    def visible_count(self) -> Int[Tensor, " query"]:
        """$N_t$: how many keys each query sees."""
        position = self.query_position
        if not self.causal:
            return torch.full_like(position, self.total_keys)
        return position - self.first_visible + 1

    @cached_property
    def hidden(self) -> list[tuple[slice, Bool[Tensor, "query key"]]]:
        """Column ranges holding keys that some query does not see, and which ones those are.

        Only the corners at the diagonal and at the edge of the window need a mask.
        """
        offset = self.first_query - self.first_key
        hidden = []
        if self.causal and offset + 1 < self.keys:
            columns = slice(offset + 1, self.keys)
            hidden.append((columns, self._ones(columns).triu()))
        if self.window is not None and self.queries + offset > self.window:
            columns = slice(0, min(self.queries + offset - self.window, self.keys))
            hidden.append((columns, self._ones(columns).tril(offset - self.window)))
        return hidden

    def _ones(self, columns: slice) -> Bool[Tensor, "query key"]:
        width = columns.stop - columns.start
        return torch.ones(self.queries, width, dtype=torch.bool, device=self.device)

    @property
    def distance(self) -> Int[Tensor, "query key"]:
        """Tokens between query and key."""
        return (self.query_position[:, None] - self.key_position).abs_()


def row_blocks(
    *, queries: int, keys: int, rows: int, logits: Logits, device: torch.device
) -> Iterator[tuple[slice, RowBlock]]:
    """The last `queries` positions of a sequence in blocks of `rows`, each with its visible keys.

    Args:
        queries: Number of queries.
        keys: Number of keys.
        rows: Largest number of queries per block.
        logits: Which keys a query sees.
        device: Where positions and masks are built.

    Yields:
        The block's range of queries, and where its rows and columns lie in the sequence.
    """
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        position = keys - queries + start
        first_key = 0 if logits.window is None else max(position - logits.window + 1, 0)
        last_key = keys - queries + stop if logits.causal else keys
        block = RowBlock(
            first_query=position,
            queries=stop - start,
            first_key=first_key,
            keys=last_key - first_key,
            total_keys=keys,
            causal=logits.causal,
            window=logits.window,
            device=device,
        )
        yield slice(start, stop), block


def first_keys(block: RowBlock, fixed_k: int) -> RowBlock:
    """The block cut to the columns that hold the first `fixed_k` visible keys of its rows."""
    spread = 0 if block.window is None else block.queries - 1
    return replace(block, keys=min(block.keys, spread + fixed_k))


def row_statistics(
    weights: Float[Tensor, "heads query key"],
    block: RowBlock,
    request: Request,
    *,
    least_mass: float = 0.0,
    scratch: Float[Tensor, "heads query key"] | None = None,
) -> dict[str, Tensor]:
    """The requested statistics of every row of `weights`, which vanish where not visible.

    Args:
        weights: Non-negative weights; rows need not sum to one.
        block: Where the rows and columns lie in the sequence.
        request: What to compute.
        least_mass: The fixed-position entropy is NaN where its keys hold no more mass than this.
        scratch: Memory for intermediate values, shaped like `weights`; fresh memory costs time.

    Returns:
        One tensor `heads query` per kind (`heads query mass` for `support_size`).
    """
    kinds = set(request.kinds)
    mass = weights.sum(-1)
    count = block.visible_count
    results: dict[str, Tensor] = {}
    if "row_mass" in kinds:
        results["row_mass"] = mass
    if "max_weight" in kinds:
        results["max_weight"] = weights.amax(-1) / mass
    if kinds & {"raw", "normalized"}:
        raw = _renormalized_entropy(weights, count, scratch)
        # A single visible key has entropy 0 and log N_t = 0: the quotient is 0 by convention.
        results |= {"raw": raw, "normalized": raw / count.float().log().clamp_min(TINY)}
    if "fixed" in kinds:
        results["fixed"] = _fixed_entropy(weights, block, request.fixed_k, least_mass)
    if kinds & {"topk", "support_size"}:
        results |= _selections(weights, count, request)
    if kinds & {"mean_distance", "local_mass", "nonlocal_mass"}:
        results |= _distances(weights, mass, block, request)
    return {kind: results[kind] for kind in request.kinds}


def log_row_statistics(
    log_weights: Float[Tensor, "heads query key"], block: RowBlock, request: Request
) -> dict[str, Tensor]:
    """As `row_statistics`, from finite log-weights of any size; without `row_mass`."""
    shifted = (log_weights - log_weights.amax(-1, keepdim=True)).float()
    others = set(request.kinds) - {"fixed", "row_mass"}
    results = row_statistics(shifted.exp(), block, request.only(*others))
    if "fixed" in request.kinds:
        # Shifted by their own largest, so that the first keys keep a mass.
        hidden = ~is_first_key(block, request.fixed_k)
        first = log_weights.masked_fill(hidden, torch.finfo(torch.float32).min / 2)
        first = (first - first.amax(-1, keepdim=True)).float().exp()
        bound = block.visible_count.clamp_max(request.fixed_k)
        results["fixed"] = _renormalized_entropy(first, bound)
    return results


def _fixed_entropy(
    weights: Float[Tensor, "heads query key"], block: RowBlock, fixed_k: int, least_mass: float
) -> Float[Tensor, "heads query"]:
    if block.window is None:
        # Every row starts at the same key, so the columns can be cut instead of masked.
        weights = weights[..., :fixed_k]
    else:
        weights = weights * is_first_key(block, fixed_k)
    # Normalized at once: logarithms of a faint mass would cancel, and their digits with them.
    mass = weights.sum(-1, keepdim=True)
    entropy = _renormalized_entropy(weights / mass, block.visible_count.clamp_max(fixed_k))
    return torch.where(mass[..., 0] > least_mass, entropy, torch.nan)


def is_first_key(block: RowBlock, fixed_k: int) -> Bool[Tensor, "query key"]:
    """Whether a key is one of the first `fixed_k` that a query sees, or lies before them."""
    return block.key_position < (block.first_visible + fixed_k)[:, None]


def _renormalized_entropy(
    weights: Float[Tensor, "heads query key"],
    bound: Int[Tensor, " query"],
    scratch: Float[Tensor, "heads query key"] | None = None,
) -> Float[Tensor, "heads query"]:
    # With M the sum of the weights, H = log M - (sum p log p) / M needs no normalized copy.
    mass = weights.sum(-1)
    log_weights = torch.clamp_min(weights, TINY, out=scratch).log_()
    return _clamp_entropy(mass.log() - log_weights.mul_(weights).sum(-1) / mass, bound)


def _clamp_entropy(
    entropy: Float[Tensor, "heads query"], bound: Int[Tensor, " query"]
) -> Float[Tensor, "heads query"]:
    """Rounding removed that would leave the range from 0 to the log of the number of keys."""
    return torch.minimum(entropy.clamp_min(0.0), bound.float().log())


def _selections(weights: Tensor, count: Tensor, request: Request) -> dict[str, Tensor]:
    keys = weights.shape[-1]
    results: dict[str, Tensor] = {}
    if "support_size" in request.kinds:
        ordered = _ascending(weights)
        results["support_size"] = support_sizes(ordered, count, request.support_mass)
        largest = ordered[..., -request.top_k :]
    elif request.top_k < keys:
        largest = weights.topk(request.top_k, -1, sorted=False).values
    else:
        largest = weights
    if "topk" in request.kinds:
        results["topk"] = _renormalized_entropy(largest, count.clamp_max(request.top_k))
    return results


def support_sizes(
    ascending: Float[Tensor, "heads query key"],
    count: Int[Tensor, " query"],
    shares: Sequence[float],
) -> Int[Tensor, "heads query mass"]:
    """The least number of keys that hold each share of the mass, from weights in order.

    The keys that can be left out are counted: their sum must not exceed what the share leaves. The
    error of a sum of small weights is small beside each weight that follows; that of a sum which
    starts with the large ones may be worth hundreds of the small.
    """
    wide, device = accumulator_dtype(ascending.device), ascending.device
    rest = torch.tensor([1.0 - share for share in shares], dtype=wide, device=device)
    cumulative = ascending.cumsum(-1, dtype=wide)
    left_out = torch.searchsorted(cumulative, cumulative[..., -1:] * rest, right=True)
    # Visible weights may be zeros too: all of the mass is all that is visible.
    size = torch.where(rest > 0, ascending.shape[-1] - left_out, count[:, None])
    return torch.minimum(size.clamp_min(1), count[:, None])


def _ascending(weights: Tensor) -> Tensor:
    if weights.device.type == "cpu":
        ordered = weights.clone()
        try:
            # NumPy sorts numbers alone, in vector registers; torch sorts pairs with positions and
            # takes some twenty times as long.
            ordered.numpy().sort(-1)
            return ordered
        except RuntimeError:  # torch was built, or runs, without NumPy
            pass
    return weights.sort(-1).values


def _distances(
    weights: Tensor, mass: Tensor, block: RowBlock, request: Request
) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    if "mean_distance" in request.kinds:
        results["mean_distance"] = _mean_distance(weights, block, request.distance_bound) / mass
    if {"local_mass", "nonlocal_mass"} & set(request.kinds):
        near = (weights * (block.distance < request.local_window)).sum(-1) / mass
        results["local_mass"] = near.clamp_max(1.0)
        results["nonlocal_mass"] = 1.0 - results["local_mass"]
    return results


def _mean_distance(weights: Tensor, block: RowBlock, bound: int | None) -> Tensor:
    if bound is None:
        return (weights * block.distance).sum(-1)
    # Columns that lie at least the bound before every row need no distance.
    far = block.first_query - block.first_key - bound + 1 if block.causal else 0
    far = min(max(far, 0), block.keys)
    total = weights[..., :far].sum(-1) * bound
    distance = block.distance[:, far:].clamp_max(bound)
    return total + (weights[..., far:] * distance).sum(-1)

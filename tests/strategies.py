"""Hypothesis strategies that all suites share: batches as they come on a bad day.

Values under a False mask are poison, valid ones meet the edges of their type, tensors are views of
others, rows are empty, padded on either side or full of holes. Everything shrinks towards few
tokens, float64, plain numbers and contiguous memory.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import tokenweights as tw

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Memory layouts.


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _transposed(tensor: Tensor) -> Tensor:
    return _contiguous(tensor.movedim(0, -1)).movedim(-1, 0)


def _strided(tensor: Tensor) -> Tensor:
    """Every second element of each row."""
    wide = _poison_like(tensor.repeat_interleave(2, dim=-1))
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


def _sliced(tensor: Tensor) -> Tensor:
    """The inside of a larger tensor, so that it starts at an offset and rows have a gap."""
    wide = _poison_like(tensor.new_empty([size + 3 for size in tensor.shape]))
    inside = tuple(slice(1, 1 + size) for size in tensor.shape)
    wide[inside] = tensor
    return wide[inside]


def _expanded(tensor: Tensor) -> Tensor:
    """One row for all, where all rows are equal."""
    first = tensor[:1]
    same = (tensor == first) | ((tensor != tensor) & (first != first))
    return _contiguous(first).expand_as(tensor) if bool(same.all()) else _contiguous(tensor)


def _poison_like(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return torch.full_like(tensor, torch.nan)
    return torch.ones_like(tensor) if tensor.dtype == torch.bool else torch.full_like(tensor, -100)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "strided": _strided,
    "sliced": _sliced,
    "expanded": _expanded,
}


@st.composite
def views(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """The same values in another memory layout."""
    return VIEWS[draw(st.sampled_from(list(VIEWS)))](tensor) if tensor.dim() else tensor


# Masks and values.


@st.composite
def masks(
    draw: st.DrawFn,
    max_batch: int = 4,
    max_token: int = 12,
    *,
    min_batch: int = 0,
    min_token: int = 0,
) -> Tensor:
    """Masks padded right or left or with holes: any rows, empty ones and empty batches included."""
    batch = draw(st.integers(min_batch, max_batch))
    token = draw(st.integers(min_token, max_token))
    lengths = st.integers(0, token)
    row = st.one_of(
        lengths.map(lambda length: [True] * length + [False] * (token - length)),
        lengths.map(lambda length: [False] * (token - length) + [True] * length),
        st.lists(st.booleans(), min_size=token, max_size=token),
    )
    bits = draw(st.lists(row, min_size=batch, max_size=batch))
    return draw(views(torch.tensor(bits, dtype=torch.bool).view(batch, token)))


def edges(dtype: torch.dtype) -> list[float]:
    """Numbers in [0, 1] at which arithmetic of a type goes wrong first."""
    info = torch.finfo(dtype)
    beside = [0.5 + info.eps / 2, 0.5 - info.eps / 4, 1 - info.eps / 2]
    return [0.0, 1.0, 0.5, -0.0, *beside, info.smallest_normal, info.smallest_normal * info.eps]


@st.composite
def values(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers in [0, 1]: with ties, in general position, at the edges, or of equal rows."""
    size = torch.Size(shape).numel()
    kind = draw(st.sampled_from(["ties", "edges", "rows", "random"]))
    if kind == "random":
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        return torch.rand(size, generator=generator, dtype=torch.float64).to(dtype).view(*shape)
    number = st.integers(0, 4).map(lambda quarter: quarter / 4)
    if kind != "ties":
        number = st.sampled_from(edges(dtype)) | st.floats(0, 1)
    count = size // max(shape[0], 1) if kind == "rows" else size
    drawn = draw(st.lists(number, min_size=count, max_size=count))
    tensor = torch.tensor(drawn, dtype=torch.float64).to(dtype)
    return tensor.repeat(shape[0] if kind == "rows" else 1).view(*shape)


POISONS = {
    "NaN": [torch.nan],
    "infinite": [torch.inf],
    "minus infinite": [-torch.inf],
    "huge": [1e300],
    "all": [torch.nan, 1e300, -torch.inf, -1e300, torch.inf],
}
poisons = st.sampled_from(list(POISONS))


def poisoned(tensor: Tensor, mask: Tensor, poison: str) -> Tensor:
    """The tensor with poison wherever the mask, of its shape or broadcast to it, is False."""
    given = torch.tensor(POISONS[poison], dtype=torch.float64)
    if not tensor.is_floating_point():
        given = torch.tensor([-100, 10**9], dtype=torch.float64)
    else:
        largest = torch.finfo(tensor.dtype).max
        given = torch.where(given.isinf(), given, given.clamp(-largest, largest))
    cycle = given[torch.arange(tensor.numel()) % len(given)].to(tensor.dtype)
    return torch.where(mask, tensor, cycle.view(tensor.shape))


@st.composite
def scored_masks(
    draw: st.DrawFn,
    max_batch: int = 4,
    max_token: int = 12,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
) -> tuple[Tensor, Tensor]:
    """Scores in [0, 1], poison wherever the mask is False, and their mask."""
    mask = draw(masks(max_batch, max_token))
    scores = draw(values(mask.shape, draw(st.sampled_from(dtypes))))
    return draw(views(poisoned(scores, mask, draw(poisons)))), mask


@st.composite
def score_stacks(
    draw: st.DrawFn,
    layers: int,
    max_batch: int = 4,
    max_token: int = 12,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
) -> tuple[Tensor, Tensor]:
    """Several scores of the same tokens, `layers batch token`, and their mask."""
    mask, dtype = draw(masks(max_batch, max_token)), draw(st.sampled_from(dtypes))
    drawn = [draw(values(mask.shape, dtype)) for _ in range(layers)]
    return draw(views(poisoned(torch.stack(drawn), mask, draw(poisons)))), mask


# Identities and layouts of a batch.


def sample_ids(batch: int) -> st.SearchStrategy[Tensor]:
    """Different numbers for the samples of a batch, as small or large as int64 goes."""
    number = st.integers(0, 99) | st.integers(-(2**63), 2**63 - 1)
    numbers = st.lists(number, min_size=batch, max_size=batch, unique=True)
    return numbers.map(lambda drawn: torch.tensor(drawn, dtype=torch.int64))


def lengths(
    max_batch: int = 4, max_token: int = 12, *, min_batch: int = 1, min_token: int = 1
) -> st.SearchStrategy[list[int]]:
    """Numbers of tokens of the sequences of a batch."""
    return st.lists(st.integers(min_token, max_token), min_size=min_batch, max_size=max_batch)


def boundaries(lengths: Sequence[int]) -> Tensor:
    """Cumulative lengths of packed sequences, with a leading zero."""
    return torch.tensor([0, *lengths]).cumsum(0)


def positions(lengths: Sequence[int]) -> Tensor:
    """Position ids of packed sequences, which count from zero in each."""
    return torch.cat([torch.arange(length) for length in (0, *lengths)])


@dataclass(frozen=True)
class Layout:
    """Another place for every token of a batch: other rows, more columns on both sides."""

    order: Tensor
    left: int
    right: int

    def moved(self, tensor: Tensor, axes: str) -> Tensor:
        """A tensor in this layout; `axes` says which of its axes are `batch` and `token`."""
        for dim, axis in enumerate(axes.split()):
            if axis == "batch":
                tensor = tensor.index_select(dim, self.order)
            elif axis == "token":
                left, right = (_padding(tensor, dim, size) for size in (self.left, self.right))
                tensor = torch.cat([left, tensor, right], dim)
        return tensor

    def restored(self, tensor: Tensor, axes: str) -> Tensor:
        """What `moved` was given."""
        for dim, axis in enumerate(axes.split()):
            if axis == "batch":
                tensor = tensor.index_select(dim, self.order.argsort())
            elif axis == "token":
                width = tensor.shape[dim] - self.left - self.right
                tensor = tensor.narrow(dim, self.left, width)
        return tensor


def _padding(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = [*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]]
    empty = tensor.new_zeros(shape)
    return empty if tensor.dtype == torch.bool else _poison_like(empty)


@st.composite
def layouts(draw: st.DrawFn, batch: int) -> Layout:
    """Layouts of a batch of so many rows."""
    order = torch.tensor(draw(st.permutations(range(batch))), dtype=torch.int64)
    return Layout(order, draw(st.integers(0, 3)), draw(st.integers(0, 3)))


def splits(batch: int) -> st.SearchStrategy[list[slice]]:
    """Micro-batches of consecutive rows, some of them empty."""
    cuts = st.lists(st.integers(0, batch), max_size=3).map(lambda inner: [0, *sorted(inner), batch])
    return cuts.map(lambda bounds: list(map(slice, bounds[:-1], bounds[1:])))


# Queries and keys.


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@st.composite
def attention_inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict]:
    """Queries and keys with grouped heads, and the options that say which keys a query sees."""
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    batch, keys = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 33, 140]))
    queries = draw(st.one_of(st.just(keys), st.integers(1, keys)))
    dim = draw(st.sampled_from([1, 8, 16]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    seed = draw(st.integers(0, 2**16))
    # Scores of a few tens at most: beyond, rounding of the scores themselves dominates.
    spread = draw(st.sampled_from([0.0, 0.3, 2.0, 8.0]))
    heads = kv_heads * group
    query = (normal(batch, heads, queries, dim, seed=seed) * spread).to(dtype)
    key = normal(batch, kv_heads, keys, dim, seed=seed + 1).to(dtype)
    causal = draw(st.booleans())
    arguments = {
        "causal": causal,
        "window": draw(st.sampled_from([None, 1, 5, 40])) if causal else None,
        "softcap": draw(st.sampled_from([None, 3.0])),
        "sinks": normal(heads, seed=seed + 2) if draw(st.booleans()) else None,
        "top_k": draw(st.sampled_from([1, 4, 300])),
        "fixed_k": draw(st.sampled_from([1, 4, 300])),
        "scale": draw(st.sampled_from([None, 0.25])),
        "key_mask": draw(key_masks(batch, keys, seed)),
    }
    mask = arguments["key_mask"]
    if mask is not None:
        poison = draw(poisons)
        key = poisoned(key, mask[:, None, :, None], poison)
        query = poisoned(query, mask[:, None, keys - queries :, None], poison)
    return draw(views(query)), draw(views(key)), arguments


@st.composite
def key_masks(draw: st.DrawFn, batch: int, keys: int, seed: int) -> Tensor | None:
    """Padding on either side, holes anywhere, or no mask."""
    side = draw(st.sampled_from(["none", "left", "right", "both", "holes"]))
    if side == "none":
        return None
    if side == "holes":
        return draw(views(normal(batch, keys, seed=seed) > -0.5))
    mask = torch.ones(batch, keys, dtype=torch.bool)
    for row in range(batch):
        if side in ("left", "both"):
            mask[row, : draw(st.integers(0, keys))] = False
        if side in ("right", "both"):
            mask[row, draw(st.integers(0, keys)) :] = False
    return draw(views(mask))


@functools.cache
def read_by_recipes() -> tuple[int | str, ...]:
    """Names of the attention columns that the named recipes read of a model of 36 layers."""
    made = (tw.recipe(name).placed(36) for name in tw.recipe_names())
    return tuple({name: None for recipe in made for name in recipe.readings})

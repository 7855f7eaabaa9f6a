"""Merging sufficient statistics over process groups.

Every quantity that spans more than one token row is split in three: *sufficient statistics*, which
each rank takes from its own tokens; a *merge*, which is one of the reductions below; and a pure
*finish*. `group=None` means "these tokens are all there is" and never communicates. Pass
`torch.distributed.group.WORLD` for all ranks. Every rank of the group has to call, also one
without a single token: its statistics are the identity of the merge.

Between statistics and merge the ranks agree to go on: what one of them refuses is refused on all,
see `agreed`. That is one more reduction, of three integers.
"""

import functools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from tokenweights._errors import TokenWeightsError, invalid
from tokenweights._typing import typed

P = ParamSpec("P")
R = TypeVar("R")


def agreed(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose error on one rank of its group is an error on all of them.

    The group is the argument `group`, or else the `group` of an argument that has one; a function
    with two groups has the rows and the columns of a grid of ranks, see `agreement`. The ranks
    agree once, before the call communicates, or at its end if it does not: a rank that
    refused raises its own error there, and the others one that names its global rank and quotes
    it. The decorator stands outside of `typed`, so the type check is agreed upon too. Inside of
    another such call that has not yet agreed, there is one agreement for both.

    The ranks then also have to be about to do the same: where an argument that has to be alike
    makes one rank merge another shape than the others, or nothing at all, all of them raise.

    Not covered are errors after the ranks have agreed, in what is left to do with the merged
    numbers, which are the same on every rank; ranks that do not call, or not with this group; and
    calls that `torch.compile` traces. One rank alone agrees with itself and sends nothing.

    Args:
        function: A function that every rank of a group calls.

    Returns:
        The function with the agreement around it.

    Example:
        >>> @agreed
        ... @typed
        ... def valid_tokens(
        ...     counts: Float[Tensor, " batch"], *, group: dist.ProcessGroup | None = None
        ... ) -> Float[Tensor, ""]:
        ...     if bool((counts < 0).any()):
        ...         raise ValueError("a negative count")
        ...     return global_sum(counts.sum(), group=group)
        >>> valid_tokens(torch.tensor([2.0, 3.0]))
        tensor(5.)
    """
    return _with_agreement(function, part=False)


def merge(function: Callable[P, R]) -> Callable[P, R]:
    """As `agreed`, for a bare merge: inside of an agreed call it is part of that call.

    Args:
        function: A function that communicates and has no input of its own to refuse.

    Returns:
        The function with the agreement around it.
    """
    return _with_agreement(function, part=True)


def _with_agreement(function: Callable[P, R], *, part: bool) -> Callable[P, R]:
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        groups = _groups_of(kwargs.get("group"), *args, *kwargs.values())
        if not groups or (part and _innermost.get() is not None):
            return function(*args, **kwargs)
        with agreement(function.__qualname__, *groups):
            return function(*args, **kwargs)

    return wrapper


def _groups_of(*arguments: Any) -> list[dist.ProcessGroup]:
    given = [each for each in arguments if isinstance(each, dist.ProcessGroup)]
    owned = (getattr(argument, "group", None) for argument in arguments)
    return given or [each for each in owned if isinstance(each, dist.ProcessGroup)][:1]


@dataclass(eq=False)
class _Call:
    """A call in which an error is an error of all ranks as long as it is `open`."""

    function: str
    groups: list[dist.ProcessGroup]
    outer: "_Call | None"
    open: bool = True


_innermost: ContextVar[_Call | None] = ContextVar("_innermost", default=None)


@contextmanager
def agreement(function: str, *groups: dist.ProcessGroup | None) -> Iterator[None]:
    """A context that all ranks of a group leave, or none: `agreed` for a part of a function.

    For what a rank may refuse after its call has communicated. Two groups are those along the axes
    of a grid of ranks: what one rank refuses its row learns, and from each rank of that its column.

    Args:
        function: Name of the public function, for errors.
        groups: The ranks, all of which have to enter; None for one rank alone. Of a grid the
            groups along the same axes in the same order on every rank.

    Yields:
        Nothing.

    Raises:
        TokenWeightsError: If another rank raised, or is about to communicate something else.
    """
    several = [group for group in dict.fromkeys(groups) if is_shared(group)]
    if not several or torch.compiler.is_compiling():
        yield
        return
    call = _Call(function, several, _innermost.get())
    token = _innermost.set(call)
    try:
        yield
        if _open_calls() == [call]:
            _agree("return")
    except Exception as error:
        # An open call around this one is where the others are going to meet.
        if _open_calls() == [call]:
            _agree("raise", error)
        raise
    finally:
        _innermost.reset(token)


def _open_calls() -> list[_Call]:
    """The calls without an agreement that this point is in, the outermost first."""
    calls, call = [], _innermost.get()
    while call is not None:
        calls += [call] if call.open else []
        call = call.outer
    return calls[::-1]


def _communicating(what: str, group: dist.ProcessGroup | None) -> None:
    """Agrees, if nobody has yet, that all ranks of the open calls are about to do the same.

    Args:
        what: What this rank does next, in words that are the same on every rank.
        group: The ranks that it does it with; None for this one alone, which says nothing.
    """
    if group is not None and not torch.compiler.is_compiling():
        _agree(what)


def _agree(step: str, refusal: Exception | None = None) -> None:
    """Returns once all ranks are about to take the same step; raises where another one refused.

    Args:
        step: What this rank does next, in words that are the same on every rank.
        refusal: Why it does not.
    """
    functions: dict[dist.ProcessGroup, str] = {}
    for call in _open_calls():
        call.open = False
        for group in call.groups:
            functions.setdefault(group, call.function)
    learned: TokenWeightsError | None = None
    for group, function in functions.items():
        own = f"`{function}`: {step}"
        mark = zlib.crc32(own.encode())
        # What one group refuses is refused in the next ones, where others wait.
        fault = refusal or learned
        own_flags = [int(fault is not None), mark, -mark]
        flags = torch.tensor(own_flags, dtype=torch.int64, device=_device(group))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        refused, highest, negated_lowest = flags.tolist()
        if refused or highest != -negated_lowest:
            try:
                _raise_together(function, group, own, fault)
            except TokenWeightsError as error:
                learned = error
    if learned is not None and refusal is None:
        raise learned


def _raise_together(
    function: str, group: dist.ProcessGroup, step: str, refusal: Exception | None
) -> None:
    told: list[tuple[str, str | None]] = [("", None)] * group.size()
    dist.all_gather_object(told, (step, _quoted(refusal)), group=group)
    if refusal is not None:
        return  # the caller raises it
    told_by = {dist.get_global_rank(group, rank): words for rank, words in enumerate(told)}
    refusals = {rank: words for rank, (_, words) in told_by.items() if words is not None}
    if refusals:
        rank, words = next(iter(refusals.items()))
        others = f" (also on {list(refusals)[1:]})" if len(refusals) > 1 else ""
        raise invalid(
            function,
            "group",
            "whose ranks all accept their input",
            f"a refusal on global rank {rank}{others}: {words}",
            "Mend the input of that rank.",
        )
    steps: dict[str, list[int]] = {}
    for rank, (words, _) in told_by.items():
        steps.setdefault(words, []).append(rank)
    raise invalid(
        function,
        "group",
        "whose ranks all make the same call",
        "; ".join(f"{words} on global ranks {ranks}" for words, ranks in steps.items()),
        "Only tokens differ between ranks: pass the same other arguments and shapes on each.",
    )


def _quoted(error: Exception | None) -> str | None:
    if error is None or isinstance(error, TokenWeightsError):
        return error and str(error).removesuffix(".")
    return f"{type(error).__name__}: {error}".removesuffix(".")


def is_shared(group: dist.ProcessGroup | None) -> TypeGuard[dist.ProcessGroup]:
    """Whether several ranks share a batch."""
    return group is not None and group.size() > 1


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where a tensor that does not come from the input may go over the wire, for any input."""
    kinds = [device.type for device in group._device_types]  # as torch's own object collectives
    return torch.device("cpu" if "cpu" in kinds or not kinds else kinds[0])


@merge
@typed
def global_sum(
    values: Float[Tensor, "*shape"], *, group: dist.ProcessGroup | None = None
) -> Float[Tensor, "*shape"]:
    """Elementwise sum over the ranks of a group, detached.

    Args:
        values: This rank's contribution, of the same shape on every rank; strides may differ.
        group: The ranks that share the batch; None leaves `values` as they are.

    Returns:
        The same numbers on every rank.

    Example:
        >>> global_sum(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    return _reduced(values, dist.ReduceOp.SUM, group)


@merge
@typed
def global_extrema(
    minimum: Float[Tensor, ""],
    maximum: Float[Tensor, ""],
    *,
    group: dist.ProcessGroup | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Smallest minimum and largest maximum over the ranks of a group, in one reduction.

    Args:
        minimum: This rank's minimum, `inf` where it has no token. NaN on any rank gives NaN on all,
            and so for the maximum.
        maximum: This rank's maximum, `-inf` where it has no token.
        group: The ranks that share the batch; None leaves both as they are.

    Returns:
        Minimum and maximum, the same on every rank.

    Example:
        >>> global_extrema(torch.tensor(0.5), torch.tensor(2.0))
        (tensor(0.5000), tensor(2.))
    """
    ends = torch.stack([minimum, -maximum])
    # Of NaN and a number a backend takes either, so that NaN travels as a number beside them.
    unknown = ends.isnan()
    own = torch.cat([ends.where(~unknown, torch.inf), -unknown.to(ends.dtype)])
    least = _reduced(own, dist.ReduceOp.MIN, group)
    low, negated_high = least[:2].where(least[2:] == 0, torch.nan)
    return low, -negated_high


@merge
@typed
def gathered(
    values: Tensor,
    positions: Int[Tensor, " token"],
    *,
    dim: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The whole of a tensor that is sharded by position over a sequence-parallel group, detached.

    Contiguous shards (Ulysses), zigzag and ring shards differ only in their positions. Shards may
    be of different length, also empty. Each rank receives every other rank's shard once.

    Args:
        values: This rank's shard, of the same shape on every rank but for axis `dim`.
        positions: The position of each of its slices in the whole; over all ranks every position
            from 0 occurs once.
        dim: The sharded axis.
        group: The ranks that share the sequence, all of which have to call; None if this shard is
            all there is.

    Returns:
        The whole tensor in the order of positions, the same on every rank.

    Raises:
        TokenWeightsError: If the ranks' positions are not a permutation, or do not fit the axis.

    Example:
        >>> gathered(torch.tensor([[30.0, 10.0, 20.0]]), torch.tensor([2, 0, 1]), dim=1)
        tensor([[10., 20., 30.]])
    """
    if not -values.dim() <= dim < values.dim() or values.shape[dim] != len(positions):
        raise invalid(
            "gathered",
            "values",
            f"with {len(positions)} entries along axis {dim}, one for each position",
            f"shape {tuple(values.shape)}",
            "Name the sharded axis.",
        )
    others = [size for axis, size in enumerate(values.shape) if axis != dim % values.dim()]
    _communicating(f"gather {values.dtype} of {others} along axis {dim}", group)
    lengths = _shard_lengths(len(positions), values.device, group)
    order = torch.cat(_shards(positions, 0, lengths, group))
    if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
        raise invalid(
            "gathered", "positions", "a permutation over the ranks", order.tolist(),
            "Give each token its position in the sequence, from 0.",
        )  # fmt: skip
    whole = torch.cat(_shards(values.detach(), dim, lengths, group), dim)
    return whole.index_select(dim, order.argsort())


@merge
@typed
def slice_positions(
    count: int, *, device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None
) -> Int[Tensor, " token"]:
    """Positions in the whole of this rank's tokens, where ranks hold consecutive slices in order.

    Args:
        count: Number of this rank's tokens; it may differ between ranks and be 0.
        device: Where the result lies, and what the exchange of counts goes over.
        group: The ranks that share the sequence, all of which have to call; None if this is all.

    Returns:
        Positions for `gathered`.

    Raises:
        TokenWeightsError: If `count` is negative.

    Example:
        >>> slice_positions(3)
        tensor([0, 1, 2])
    """
    if count < 0:
        raise invalid("slice_positions", "count", ">= 0", count, "It is a number of tokens.")
    _communicating("count positions", group)
    lengths = _shard_lengths(count, torch.device(device), group)
    first = sum(lengths[: 0 if group is None else group.rank()])
    return torch.arange(first, first + count, device=device)


def _shard_lengths(own: int, device: torch.device, group: dist.ProcessGroup | None) -> list[int]:
    if group is None:
        return [own]
    lengths = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(group.size())]
    dist.all_gather(lengths, lengths[0].new_tensor([own]), group=group)
    return [int(length) for length in lengths]


def _shards(
    values: Tensor, dim: int, lengths: list[int], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Every rank's shard; shards travel padded to the longest, since a gather wants one shape."""
    if group is None:
        return [values]
    shape = list(values.shape)
    shape[dim] = max(lengths)
    padded = values.new_zeros(shape)
    padded.narrow(dim, 0, values.shape[dim]).copy_(values)
    received = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(received, padded, group=group)
    parts = zip(received, lengths, strict=True)
    return [part.narrow(dim, 0, length) for part, length in parts]


def _reduced(
    values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> Tensor:
    # A backend adds up memory, so that strides have to be alike on all ranks.
    reduced = values.detach().clone(memory_format=torch.contiguous_format)
    _communicating(f"reduce {values.dtype} of {list(values.shape)}", group)
    if group is not None:
        dist.all_reduce(reduced, op=operation, group=group)
    return reduced


def gathered_on(
    owner: int, block: Tensor, *, dim: int, group: dist.ProcessGroup | None
) -> Tensor | None:
    """The blocks of all ranks one after another, on the owner alone.

    Args:
        owner: A rank of the group.
        block: This rank's block, of the same shape on every rank.
        dim: The axis along which blocks follow each other.
        group: The ranks, all of which have to call; None if this block is all.

    Returns:
        The whole on the owner, None elsewhere.
    """
    if group is None:
        return block
    block = block.contiguous()
    _communicating(f"gather blocks, {block.dtype} of {list(block.shape)}", group)
    parts = [torch.empty_like(block) for _ in range(group.size())]
    parts = parts if group.rank() == owner else None
    dist.gather(block, parts, dst=dist.get_global_rank(group, owner), group=group)
    return None if parts is None else torch.cat(parts, dim)


@merge
def held_by_one(values: Tensor | None, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """What one rank of a group holds, on all of them.

    For what a single pipeline stage computes: every stage calls, and sends or receives once.

    Args:
        values: The values, of any shape, on one rank; None on the others, which need not know it.
        group: The ranks, all of which have to call; None for one rank alone.

    Returns:
        The values.

    Raises:
        TokenWeightsError: If not exactly one rank holds values.

    Example:
        >>> held_by_one(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    own = None if values is None else (tuple(values.shape), values.dtype)
    told: list[tuple[tuple[int, ...], torch.dtype] | None] = [own]
    if group is not None:
        _communicating("hold values", group)
        told = [None] * group.size()
        dist.all_gather_object(told, own, group=group)
    holders = [rank for rank, known in enumerate(told) if known is not None]
    if len(holders) != 1:
        raise invalid(
            "held_by_one", "values", "on exactly one rank", f"on {holders}", "Ask the stage of one."
        )
    shape, dtype = told[holders[0]] or ((), torch.float32)
    if values is None:
        assert group is not None
        values = torch.empty(shape, dtype=dtype, device=_device(group))
    values = values.detach().contiguous()
    if group is not None:
        dist.broadcast(values, src=dist.get_global_rank(group, holders[0]), group=group)
    return values


def summed_on(owner: int, values: Tensor, *, group: dist.ProcessGroup | None) -> Tensor | None:
    """Elementwise sum over ranks, on the owner alone.

    Args:
        owner: A rank of the group.
        values: This rank's contribution, of the same shape on every rank; its memory is reused.
        group: The ranks, all of which have to call; None if these are all.

    Returns:
        The sum on the owner, None elsewhere.
    """
    if group is None:
        return values
    values = values.contiguous()  # a backend adds up memory
    _communicating(f"sum {values.dtype} of {list(values.shape)}", group)
    dist.reduce(values, dst=dist.get_global_rank(group, owner), group=group)
    return values if group.rank() == owner else None


def largest_of(values: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise maximum over ranks, the same on every rank.

    Args:
        values: This rank's contribution, of the same shape on every rank.
        group: The ranks, all of which have to call; None if these are all.

    Returns:
        The maximum.
    """
    return _reduced(values, dist.ReduceOp.MAX, group)

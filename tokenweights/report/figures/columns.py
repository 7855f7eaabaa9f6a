"""Token records as padded tensors, `batch token`, for the functions of the core."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenweights.attention import AttentionStatistics, EntropyKind
from tokenweights.report.records import TokenRecord

SUPPORT = "support_size_"
LOCAL_MASS = "local_mass"


def distinct(records: Sequence[TokenRecord]) -> list[TokenRecord]:
    """The records without repetitions: of one prompt, the first of each response.

    A policy that has learned a task says the same again and again. Counted each time, its tokens
    would pass for observations of their own.
    """
    return [
        *{
            (r.prompt, r.token_ids, r.step, r.layer, r.entropy_kind): r for r in reversed(records)
        }.values()
    ][::-1]


def counted(records: Sequence[TokenRecord]) -> str:
    """How many tokens, distinct responses and prompts numbers of records are over, in words."""
    found = distinct(records)
    prompts = len({record.prompt for record in found})
    return (
        f"{_many(sum(len(record.tokens) for record in found), 'token')} of "
        f"{_many(len(found), 'distinct response')} to {_many(prompts, 'prompt')}"
    )


def unit_of(kind: EntropyKind) -> str:
    """Kind of an attention entropy, with its unit if it has one."""
    return kind if kind == "normalized" else f"{kind}, nats"


def layers_of(records: Sequence[TokenRecord]) -> str:
    """The layer or layers of records in words."""
    found: dict[int, None] = {}
    for record in records:
        layers = record.layer if isinstance(record.layer, tuple) else (record.layer,)
        found |= dict.fromkeys(layers)
    return f"layer{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def token_mask(records: Sequence[TokenRecord]) -> Tensor:
    """True where a response has a token."""
    lengths = torch.tensor([len(record.tokens) for record in records], dtype=torch.int64)
    width = int(lengths.max()) if len(lengths) else 0
    return torch.arange(width) < lengths[:, None]


def padded(
    records: Sequence[TokenRecord], values: Callable[[TokenRecord], Sequence[float] | None]
) -> Tensor | None:
    """One value per token, 0 beyond a response's end; None if a record has no such values."""
    rows = [values(record) for record in records]
    if not rows or any(row is None for row in rows):
        return None
    tensors = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def column(records: Sequence[TokenRecord], name: str) -> Tensor | None:
    """A further column of the records by name."""
    return padded(records, lambda record: (record.columns or {}).get(name))


def entropy_of_kind(records: Sequence[TokenRecord], kind: EntropyKind) -> Tensor | None:
    """Attention entropy of a kind: the records' own, or their column `<kind>_entropy`."""

    def values(record: TokenRecord) -> Sequence[float] | None:
        if record.entropy_kind == kind:
            return record.attention_entropy
        return (record.columns or {}).get(f"{kind}_entropy")

    return padded(records, values)


def local_mass_name(records: Sequence[TokenRecord]) -> str:
    """The column of the local mass, which says its window: `local_mass_<window>`."""
    names = {name for record in records for name in record.columns or {}}
    return next((name for name in sorted(names) if name.startswith(LOCAL_MASS)), LOCAL_MASS)


def support_statistics(
    records: Sequence[TokenRecord],
) -> tuple[AttentionStatistics, tuple[float, ...]]:
    """Support statistics from the columns of the records, and the masses of the support sizes."""
    names = sorted(
        {name for r in records for name in (r.columns or {}) if name.startswith(SUPPORT)}
    )
    sizes = {float(name.removeprefix(SUPPORT)): column(records, name) for name in names}
    sizes = {mass: size for mass, size in sorted(sizes.items()) if size is not None}
    spans = {"mean_distance": column(records, "mean_distance")}
    spans["local_mass"] = column(records, local_mass_name(records))
    given = {name: values for name, values in spans.items() if values is not None}
    if sizes:
        given["support_size"] = torch.stack(list(sizes.values()), -1).long()
    return AttentionStatistics(**given), tuple(sizes)

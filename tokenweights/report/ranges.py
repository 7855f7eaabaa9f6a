"""Ranges too narrow to mean anything, as those of random models are: rounding, not attention."""

from collections.abc import Iterable

from tokenweights.report.records import TokenRecord

NARROW = 1e-3  # of an entropy, in nats or normalized


def is_narrow(low: float, high: float) -> bool:
    """Whether entropies between the two say nothing that could be coloured or weighted."""
    return high - low < NARROW


def flat_range(record: TokenRecord) -> str:
    """What to say of a response whose attention entropies hardly differ; empty if they do."""
    return flat_words(record.attention_entropy)


def flat_words(entropies: Iterable[float]) -> str:
    """The same of entropies."""
    values = list(entropies)
    if len(values) < 2 or not is_narrow(min(values), max(values)):
        return ""
    width = max(values) - min(values)
    return (
        f"attention entropies differ by {width:.1g} at most, so that colours, groups and weights "
        "from them would show rounding"
    )

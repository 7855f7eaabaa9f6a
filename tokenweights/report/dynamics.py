"""Dynamics over training from token records: what the metrics would say of any kind of entropy."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.attention import ENTROPY_KINDS, EntropyKind
from tokenweights.diagnostics import group_dynamics
from tokenweights.partition import bottom_fraction, require_share, top_fraction
from tokenweights.report.figures.columns import distinct, entropy_of_kind, token_mask
from tokenweights.report.records import TokenRecord


@typed
def entropy_metrics(
    records: Iterable[TokenRecord], *, kind: EntropyKind = "normalized", fraction: float = 0.2
) -> list[dict[str, float]]:
    """Mean and spread of the entropy of all tokens, of anchors and of explorers, step by step.

    For `dynamics_figure(metrics, prefix="")`: Figure 20, and with another kind Figures 21 to 23.
    Anchors and explorers are the bottom and top `fraction` of each response by this entropy.

    Args:
        records: Token records, those of a step one after another; one step is held in memory. Of
            a step taken twice by a resumed run the later one counts, within a step the last record
            of each `sample_id`, and of a response that occurs several times one.
        kind: The records' own kind, or another that they have as a column `<kind>_entropy`.
        fraction: Share of each response that makes up anchors, and explorers, in [0, 1].

    Returns:
        For each step, ascending, a dictionary with `step`, `entropy_mean`, `entropy_std` and the
        same with `anchor_` and `explorer_` before it.

    Raises:
        TokenWeightsError: If a record has no such entropy, or `fraction` is outside [0, 1].

    Example:
        >>> record = TokenRecord(
        ...     step=4,
        ...     sample_id=0,
        ...     prompt="",
        ...     tokens=("a", "b"),
        ...     token_ids=(0, 1),
        ...     attention_entropy=(0.25, 0.75),
        ...     layer=0,
        ...     entropy_kind="normalized",
        ...     alignment="own",
        ... )
        >>> (metrics,) = entropy_metrics([record])
        >>> metrics["step"], metrics["entropy_mean"], metrics["anchor_entropy_mean"]
        (4, 0.5, 0.25)
    """
    require_share("entropy_metrics", fraction)
    lines: dict[int, dict[str, float]] = {}
    for step, grouped in groupby(records, key=lambda record: record.step):
        line = _step_metrics(step, [*grouped], kind, fraction)
        if line is None:
            hint = f"Record a column `{kind}_entropy`, or choose the kind of the records."
            raise invalid("entropy_metrics", "records", f"with {kind} entropies", "others", hint)
        lines[step] = line
    return [lines[step] for step in sorted(lines)]


def with_other_kinds(
    records: Iterable[TokenRecord], found: dict[str, list[dict[str, float]]]
) -> Iterator[TokenRecord]:
    """The records, passed through one by one; at their end `found` holds `entropy_metrics`.

    By kind, for every kind beside the records' own that all records of two steps or more have as a
    column; of the groups of 20 %.
    """
    lines: dict[EntropyKind, dict[int, dict[str, float]]] = {kind: {} for kind in ENTROPY_KINDS}
    for step, grouped in groupby(records, key=lambda record: record.step):
        members: list[TokenRecord] = []
        recorded = set(ENTROPY_KINDS)
        for record in grouped:
            recorded &= {kind for kind in recorded if f"{kind}_entropy" in (record.columns or {})}
            if recorded:
                members.append(record)
            yield record
        for kind in ENTROPY_KINDS:
            if kind in recorded:
                line = _step_metrics(step, members, kind, 0.2)
                lines[kind] |= {} if line is None else {step: line}
    for kind, steps in lines.items():
        if len(steps) > 1:
            found[kind] = [steps[step] for step in sorted(steps)]


def _step_metrics(
    step: int, records: Sequence[TokenRecord], kind: EntropyKind, fraction: float
) -> dict[str, float] | None:
    """Mean and spread of one step, or None if a record has no such entropy."""
    members = distinct([*{record.sample_id: record for record in records}.values()])
    scores = entropy_of_kind(members, kind)
    if scores is None:
        return None
    mask = token_mask(members)
    anchors = bottom_fraction(scores, mask, fraction=fraction)
    explorers = top_fraction(scores, mask, fraction=fraction)
    found = group_dynamics(scores, [mask, anchors, explorers])
    line: dict[str, float] = {"step": step}
    for place, name in enumerate(("", "anchor_", "explorer_")):
        line[f"{name}entropy_mean"] = float(found.mean[place])
        line[f"{name}entropy_std"] = float(found.std[place])
    return line

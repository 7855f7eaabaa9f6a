"""The tables of what is looked at along a training: gradients, entropies, support, roles."""

import statistics
from collections.abc import Callable
from typing import Any

from paper.data import WARM_STARTS, Data
from paper.probes import QUADRANTS
from paper.tables import head, number, row, spread
from paper.training import task_of

GROUPS = ("random", "anchor", "explorer")
Probe = dict[str, Any]


def _along(
    data: Data, columns: tuple[str, ...], values: Callable[[Probe, str], list[float | None]]
) -> list[str]:
    """A line for each warm start and probed update: mean and deviation over the seeds."""
    lines = head("warm start", "update", "seeds", *columns)
    for name in WARM_STARTS:
        by_step: dict[int, list[Probe]] = {}
        for record in data.probes.get(name, {}).values():
            for probe in record["probes"]:
                by_step.setdefault(probe["step"], []).append(probe)
        for step, probes in sorted(by_step.items()):
            found = zip(*(values(probe, name) for probe in probes), strict=True)
            lines.append(row(name, step, len(probes), *(spread(column, 2) for column in found)))
    return lines if len(lines) > 2 else ["No run yet."]


def gradients_table(data: Data) -> list[str]:
    """Geometry of the subsets along the probed trainings."""
    pairs = [(group, value) for group in GROUPS for value in ("cosine", "norm", "projection")]

    def values(probe: Probe, _: str) -> list[float | None]:
        found = probe.get("gradients", {})
        return [found.get(group, {}).get(value) for group, value in pairs]

    return _along(data, tuple(f"{group} {value}" for group, value in pairs), values)


def dispersion_table(data: Data) -> list[str]:
    """Deviation and coefficient of variation of the cosine along each probed training (J.2)."""
    columns = [f"{group} {what}" for group in GROUPS for what in ("STD", "CV")]
    lines = head("warm start", "seeds", *columns)
    for name in WARM_STARTS:
        records = list(data.probes.get(name, {}).values())
        if not records:
            continue
        cells = []
        for group in GROUPS:
            series = [
                [p["gradients"][group]["cosine"] for p in record["probes"] if "gradients" in p]
                for record in records
            ]
            held = [[c for c in each if c is not None] for each in series]
            deviations = [statistics.pstdev(each) for each in held if each]
            means = [abs(statistics.fmean(each)) for each in held if each]
            ratios = [d / m for d, m in zip(deviations, means, strict=True) if m]
            cells += [spread(deviations, 2), spread(ratios, 2)]
        lines.append(row(name, len(records), *cells))
    return lines if len(lines) > 2 else ["No run yet."]


def tenths_table(data: Data) -> list[str]:
    """Projection of every tenth by attention entropy, lowest first."""

    def values(probe: Probe, _: str) -> list[float | None]:
        return probe.get("gradients", {}).get("tenths", [None] * 10)

    return _along(data, tuple(map(str, range(10))), values)


def entropies_table(data: Data) -> list[str]:
    """Entropy by group, its relation to predictive entropy, and the layers' agreement."""
    columns = (
        "anchors", "explorers", "all", "STD of anchors", "STD of explorers", "STD of all",
        "predictive", "correlation", "layers: anchors", "layers: explorers", "layers: ranks",
    )  # fmt: skip

    def values(probe: Probe, _: str) -> list[float | None]:
        found = probe["entropies"]
        layers = [found["layers"][name] for name in ("anchors", "explorers", "ranks")]
        return [*found["mean"], *found["deviation"], found["predictive"], found["correlation"],
                *layers]  # fmt: skip

    return _along(data, columns, values)


def support_table(data: Data) -> list[str]:
    """Keys that hold half and nine tenths of the attention, and who the groups are."""
    columns = tuple(
        f"{share} of {group}"
        for share in ("0.5", "0.9")
        for group in ("anchors", "explorers", "all")
    )

    def values(probe: Probe, warm_start: str) -> list[float | None]:
        decisive = [probe["roles"].get(role, {}) for role in task_of(warm_start).decisive]
        shares = [
            sum(role.get(group) or 0.0 for role in decisive) for group in ("anchors", "explorers")
        ]
        return [*probe["support"]["0.5"], *probe["support"]["0.9"], *shares]

    return _along(data, (*columns, "decisive anchors", "decisive explorers"), values)


def quadrants_table(data: Data) -> list[str]:
    """The roles in each quadrant of predictive and attention entropy, at the first probe."""
    lines = []
    for name in WARM_STARTS:
        first = [record["probes"][0]["quadrants"] for record in data.probes.get(name, {}).values()]
        roles = sorted({role for each in first for part in each.values() for role in part})
        if not roles:
            continue
        lines += ["", f"`{name}`:", "", *head("quadrant", *roles)]
        for quadrant in QUADRANTS:
            shares = [
                statistics.fmean(each[quadrant].get(role) or 0.0 for each in first)
                for role in roles
            ]
            lines.append(row(quadrant, *(number(share, 2) for share in shares)))
    return lines or ["No run yet."]

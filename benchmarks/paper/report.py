"""RESULTS.md and the figures, from the records and nothing else."""

import math
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from paper.arms import ARMS, REFUSED, UNTRAINED
from paper.claims import CLAIMS, MARGIN, MASKS, verdicts
from paper.collapse import collapse
from paper.comparison import rank_correlation, welch
from paper.data import WARM_STARTS, Data, Metric, area, data_of, easy, hard
from paper.figures import FIGURES
from paper.probe_tables import (
    dispersion_table,
    entropies_table,
    gradients_table,
    quadrants_table,
    support_table,
    tenths_table,
)
from paper.prose import INTRODUCTION, NOT_LEARNED, NOTES, PAPER, SATURATED
from paper.rules import judged
from paper.running import SEEDS, THROUGH_TRL, TRL_SEEDS, design
from paper.summary import summary
from paper.tables import head, number, row, signed, spread
from paper.training import SETTINGS, task_of

RESULTS = Path(__file__).parent / "RESULTS.md"


def claims_table(data: Data) -> list[str]:
    """Every claim, and its verdict on every warm start."""
    lines = head("claim", "where", "the paper's number", *WARM_STARTS)
    columns = [verdicts(data, name) for name in WARM_STARTS]
    for place, claim in enumerate(CLAIMS):
        words = [column[place].words for column in columns]
        name = f"**{claim.name}**{'†' if claim.later else ''}: {claim.says}"
        lines.append(row(name, claim.where, claim.paper or "-", *words))
    return lines


def arms_table(data: Data, warm_start: str) -> list[str]:
    """Every arm of a warm start that has runs."""
    decisive = task_of(warm_start).decisive
    lines = head(
        "arm", "seeds", "hard", "hard - full", "gain kept", "area", "easy", "hard, top-p 1",
        "collapsed", "weight on decisive tokens", "first cosine", "first projection",
        "the paper's number",
    )  # fmt: skip
    for arm in ARMS.values():
        values = list(data.values(warm_start, arm.name, hard).values())
        if not values:
            continue
        hits, runs = data.collapses(warm_start, arm.name)
        against = data.difference(warm_start, arm.name, "full", hard)
        whole = data.values(warm_start, arm.name, lambda r: r["evaluations"][-1]["hard_whole"])
        lines.append(
            row(
                arm.name,
                len(values),
                spread(values),
                "-" if arm.name == "full" else signed(against),
                number(gain_kept(data, warm_start, arm.name), 2),
                spread(list(data.values(warm_start, arm.name, area).values())),
                spread(list(data.values(warm_start, arm.name, easy).values())),
                spread(list(whole.values())),
                f"{hits} of {runs}",
                "-"
                if arm is UNTRAINED
                else number(data.decisive(warm_start, arm.name, decisive), 2),
                number(data.at_start(warm_start, arm.name, "cosine"), 2),
                number(data.at_start(warm_start, arm.name, "projection"), 2),
                PAPER.get(arm.name, "-"),
            )
        )
    return lines if len(lines) > 2 else ["No run yet."]


def gain_kept(data: Data, warm_start: str, arm: str) -> float | None:
    """An arm's gain in hard accuracy as a share of that of full training; None if unknown."""
    columns = [data.values(warm_start, name, hard) for name in (arm, "full", UNTRAINED.name)]
    seeds = set.intersection(*map(set, columns))
    if not seeds or arm == UNTRAINED.name:
        return None
    mine, full, before = (sum(column[seed] for seed in seeds) for column in columns)
    return (mine - before) / (full - before) if full != before else None


def roles_table(data: Data) -> list[str]:
    """Roles at each warm start: who they are among anchors and explorers, and what they carry."""
    lines = head("warm start", "role", "decisive", "tokens", "anchors", "explorers",
                 "predictive entropy", "projection")  # fmt: skip
    for name in WARM_STARTS:
        found = [record["first"] for record in data.first.get(name, {}).values()]
        for role in sorted({role for each in found for role in each["table"]}):

            def mean(*path: str, chosen=found) -> float:
                values = []
                for each in chosen:
                    value = each
                    for step in path:
                        value = (value or {}).get(step)
                    values.append(0.0 if value is None else value)
                return sum(values) / len(values)

            cells = [mean("table", role, each) for each in ("tokens", "anchors", "explorers")]
            cells += [mean("table", role, "entropy"), mean("projection", role)]
            marked = "yes" if role in task_of(name).decisive else ""
            lines.append(row(name, role, marked, *(number(cell, 2) for cell in cells)))
    if len(lines) == 2:
        return ["No record yet."]
    return [*lines, "", "Rank correlation of an arm's weight on decisive tokens with its hard "
            f"accuracy at the end, over hard masks and over all arms: {'; '.join(_ordered(data))}. "
            "Where it is weaker over all arms it matters which decisive tokens are trained, and "
            "when."]  # fmt: skip


def _ordered(data: Data) -> list[str]:
    """How far weight on decisive tokens orders arms, by warm start."""
    said = []
    for name in WARM_STARTS:
        arms = {arm: runs for arm, runs in data.runs.get(name, {}).items() if arm != UNTRAINED.name}
        decisive = task_of(name).decisive
        found = []
        for chosen in ([arm for arm in arms if arm in MASKS], list(arms)):
            weights = [data.decisive(name, arm, decisive) or 0.0 for arm in chosen]
            ends = [sum(map(hard, arms[arm].values())) / len(arms[arm]) for arm in chosen]
            found.append(rank_correlation(weights, ends) if len(chosen) > 2 else math.nan)
        said.append(f"{name} {number(found[0], 2)} and {number(found[1], 2)}")
    return said


def selected_table(data: Data) -> list[str]:
    """Which roles each core arm weights along its trainings."""
    lines = []
    for name in WARM_STARTS:
        runs = data.runs.get(name, {})
        roles = sorted(
            {r for arm in runs.values() for run in arm.values() for r in run["roles"]["weight"]}
        )
        if not roles:
            continue
        lines += ["", f"`{name}`, shares of the weight:", "", *head("arm", *roles)]
        for arm in (each for each in ARMS if each in runs):
            shares = [data.decisive(name, arm, (role,)) for role in roles]
            lines.append(row(arm, *(number(share, 2) for share in shares)))
    return lines or ["No run yet."]


def explorers_table(data: Data) -> list[str]:
    """The explorer seeds of the first warm start, each with the reason of its collapse."""
    lines = head("seed", "hard", "easy", "collapse", "length at the end", "reward at the end")
    for seed, run in sorted(data.runs.get("totals-0", {}).get("explorer20", {}).items()):
        last = {name: run["history"][name][-1] for name in ("length", "reward")}
        why = collapse(run["history"]) or "no"
        cells = (number(hard(run)), number(easy(run)), why)
        lines.append(row(seed, *cells, number(last["length"], 1), number(last["reward"], 2)))
    return lines if len(lines) > 2 else ["No run yet."]


def field_table(data: Data) -> list[str]:
    """The field's rules and the new ones against uniform weights, at equal mass."""
    lines = []
    for name in WARM_STARTS:
        found = judged(data, name)
        if not found:
            continue
        lines += ["", f"`{name}`:", ""]
        lines += head("rule", "pairs", "area - full", "p after Holm", "verdict")
        for each in found:
            cells = (each.found.count, signed(each.found), number(each.p), each.words)
            lines.append(row(each.rule, *cells))
    return lines or ["No run yet."]


def _over_steps(name: str) -> Metric:
    return lambda record: sum(record["history"][name]) / len(record["history"][name])


ENGINE_METRICS: dict[str, Metric] = {
    "hard at the end": hard,
    "reward over the steps": _over_steps("reward"),
    "length over the steps": _over_steps("length"),
}


def engines_table(data: Data) -> list[str]:
    """Runs through TRL against the engine's of the same arm, as two groups."""
    lines = head("arm", "what", "TRL", "engine", "TRL - engine", "verdict", "seed by seed")
    for arm in THROUGH_TRL:
        groups = [runs.get("totals-0", {}).get(arm, {}) for runs in (data.trl, data.runs)]
        shared = sorted(groups[0].keys() & groups[1].keys())
        counts = [len(group) for group in groups]
        missing = [
            f"{there} of {len(wanted)} runs {name}"
            for name, there, wanted in zip(
                ("through TRL", "of the engine"), counts, (TRL_SEEDS, SEEDS), strict=True
            )
            if there < len(wanted)
        ]
        for what, metric in ENGINE_METRICS.items():
            values = [[metric(run) for run in group.values()] for group in groups]
            pairs = [metric(groups[0][seed]) - metric(groups[1][seed]) for seed in shared]
            each = ", ".join(f"{pair:+.3f}" for pair in pairs) or "-"
            shown, verdict = "-", f"not compared yet ({', '.join(missing)})"
            if not missing:
                found = welch(*values)
                shown = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
                verdict = "agrees" if found.low <= 0 <= found.high else "differs"
            lines.append(row(arm, what, *map(spread, values), shown, verdict, each))
    return lines


def tasks_table(data: Data) -> list[str]:
    """The tasks, their settings, and what uniform weights learn on them."""
    lines = head(
        "warm start", "decided by", "updates", "rollout", "rate", "probed layer", "hard, untrained",
        "hard at the evaluations, uniform weights", "reward, first and last four steps",
        "margin as a share of the gain",
    )  # fmt: skip
    for name in WARM_STARTS:
        task, runs = task_of(name), list(data.runs.get(name, {}).get("full", {}).values())
        made = SETTINGS[task.name]
        curve, ends = [], []
        for place, step in enumerate(made.evaluated):
            values = [run["evaluations"][place]["hard"] for run in runs]
            curve.append(f"{step}: {spread(values)}")
        for part in (slice(0, 4), slice(-4, None)):
            values = [sum(run["history"]["reward"][part]) / 4 for run in runs]
            ends.append(spread(values))
        rollout = f"{made.prompts} x {made.samples}"
        before = list(data.values(name, UNTRAINED.name, hard).values())
        after = list(data.values(name, "full", hard).values())
        share = None
        if before and after:
            share = MARGIN / (sum(after) / len(after) - sum(before) / len(before))
        lines.append(
            row(name, task.about, made.steps, rollout, f"{made.rate:g}", task.probe, spread(before),
                "; ".join(curve), ", ".join(ends), number(share, 2))
        )  # fmt: skip
    return lines


def refused_table(data: Data) -> list[str]:
    """What cannot be tested here."""
    lines = head("what", "verdict")
    for name, reason in REFUSED.items():
        lines.append(row(name, f"cannot be tested here ({reason})"))
    reason = "one rollout makes one update, so the ratio is 1 and no clip ever binds"
    lines.append(
        row("clipping, and all that depends on the ratio", f"cannot be tested here ({reason})")
    )
    reason = (
        "Adam cancels a constant factor of the gradient: the arms `... all` end exactly where "
        "their twins do"
    )
    lines.append(
        row("selected against all-token denominators (G.2)", f"cannot be tested here ({reason})")
    )
    reason = "four layers and two hundred thousand parameters"
    lines.append(
        row("transfer to other models, and layers as depths", f"cannot be tested here ({reason})")
    )
    reason = "24 to 40 updates are too few"
    what = "the anchors' plateau over a long training (3.2), gradual degeneration (G.3)"
    lines.append(row(what, f"cannot be tested here ({reason})"))
    lines.append(row("other definitions of the entropy, spatial span (H, I)", "not measured"))
    lines.append(row("maps and traces of single responses (F.2, H.3)", "pictures, no claim"))
    return lines


def provenance_table(data: Data) -> list[str]:
    """What the numbers come from."""
    wanted = len(design())
    records = data.records
    hours = {
        name: sum(record.get(name, 0.0) for record in records) / 3600
        for name in ("cpu_seconds", "wall_seconds")
    }
    machines = Counter(
        f"{found['cpu']}, {found['cores']} cores" if found else "unknown"
        for found in (record.get("machine") for record in records)
    )
    lines = [
        f"{len(records)} of {wanted} items of the design have a record, {len(data.failed)} of them "
        f"failed. They took {hours['cpu_seconds']:.2f} CPU hours, and {hours['wall_seconds']:.2f} "
        f"hours of wall time if run one after the other. {wall(records)} Records by machine: "
        + "; ".join(f"{name} ({count})" for name, count in machines.most_common())
        + ".",
        "",
        *head("warm start", "weights", "records", "CPU seconds a run", "commits", "torch"),
    ]
    for name in WARM_STARTS:
        mine = [record for record in records if record["warm_start"] == name]
        runs = [run for arm in data.runs.get(name, {}).values() for run in arm.values()]
        commits = Counter(str(record["commit"])[:8] for record in mine)
        digests = sorted({run["warm_start_digest"] for run in runs})
        versions = sorted({record["versions"]["torch"] for record in mine})
        each = sum(run["cpu_seconds"] for run in runs) / len(runs) if runs else math.nan
        shown = ", ".join(f"{commit} ({count})" for commit, count in sorted(commits.items()))
        lines.append(
            row(name, ", ".join(digests) or "-", len(mine), number(each, 1), shown or "-",
                ", ".join(versions) or "-")
        )  # fmt: skip
    for record in data.failed:
        lines += ["", f"Failed: {record['warm_start']}, {record['arm']}, seed {record['seed']}: "
                  f"`{record['error']}`."]  # fmt: skip
    return lines


def wall(records: list[dict]) -> str:
    """How long runs were under way, from those that say when they began."""
    spans = sorted(
        (datetime.fromisoformat(record["started"]).timestamp(), record["wall_seconds"])
        for record in records
        if "started" in record
    )
    total, until = 0.0, -math.inf
    for begin, seconds in spans:
        total += max(0.0, begin + seconds - max(begin, until))
        until = max(until, begin + seconds)
    known = f"{len(spans)} of {len(records)} records say when"
    return f"Runs were under way for {total / 3600:.2f} hours ({known})." if spans else ""


def _arms(name: str) -> Callable[[Data], list[str]]:
    return lambda data: arms_table(data, name)


TABLES: dict[str, tuple[str, Callable[[Data], list[str]]]] = {
    "summary": ("In short", summary),
    "claims": ("Claims", claims_table),
    "tasks": ("Tasks, and that they can be learned", tasks_table),
    "roles": ("Token roles at the warm starts", roles_table),
    **{f"arms-{name}": (f"Arms, `{name}`", _arms(name)) for name in WARM_STARTS},
    "explorers": ("Explorers alone, seed by seed", explorers_table),
    "field": ("The field's rules and new ones, at equal mass", field_table),
    "weights": ("Which tokens each rule weights", selected_table),
    "gradients": ("Gradient geometry along training", gradients_table),
    "dispersion": ("Dispersion of the cosine", dispersion_table),
    "tenths": ("Projection by tenths of attention entropy", tenths_table),
    "entropies": ("Entropies and layers along training", entropies_table),
    "support": ("Support, and who the groups are, along training", support_table),
    "quadrants": ("Quadrants of predictive and attention entropy", quadrants_table),
    "engines": ("The same runs through TRL", engines_table),
    "refused": ("What cannot be tested here", refused_table),
    "provenance": ("Where the numbers come from", provenance_table),
}

# What says something of a few short runs.
QUICK = {"roles", "weights", *(f"arms-{name}" for name in WARM_STARTS), "gradients", "dispersion",
         "tenths", "entropies", "support", "quadrants", "explorers", "provenance"}  # fmt: skip


def results(folder: Path, *, only: str | None = None, quick: bool = False) -> str:
    """RESULTS.md as text.

    Args:
        folder: The records.
        only: One table.
        quick: The records are those of a smoke test: no claims, and a word of warning.

    Returns:
        Markdown.
    """
    data = data_of(folder, every=quick)
    if only is not None:
        return "\n".join(TABLES[only][1](data)) + "\n"
    lines = ["# The paper's experiments on two CPU cores", ""]
    if quick:
        lines += ["Smoke only, no verdicts.", ""]
    else:
        lines += [INTRODUCTION, ""]
    for name, (title, table) in TABLES.items():
        if quick and name not in QUICK:
            continue
        lines += [f"## {title}", ""]
        lines += [NOTES[name], ""] if name in NOTES else []
        lines += [*table(data), ""]
        if name == "tasks":
            lines += [
                "What failed to learn, and was given up, from pilots that have no records:",
                "",
            ]
            lines += [*(f"- {each}" for each in NOT_LEARNED), ""]
            lines += [SATURATED, ""]
        if not quick:
            lines += [f"![{title}](figures/{FIGURES[name].file})", ""] if name in FIGURES else []
    return "\n".join(lines).rstrip() + "\n"

"""RESULTS.md and the figures, from the records and nothing else."""

import math
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from paper.arms import ARMS, CORE, FIELD, NEW, REFUSED, Arm
from paper.claims import CLAIMS, MARGIN, PAIRS, verdicts
from paper.collapse import FALL, LONG, SHORT, UNBOXED, WINDOW, collapse
from paper.comparison import Paired, holm, welch
from paper.data import WARM_STARTS, Data, Metric, area, data_of, easy, hard
from paper.figures import FIGURES
from paper.running import SEEDS, THROUGH_TRL, TRL_SEEDS, design
from paper.training import SETTINGS, task_of

RESULTS = Path(__file__).parent / "RESULTS.md"

# What the paper reports of an arm, on its own benchmarks.
PAPER = {
    "full": "43.55; 34.39 ± 0.47",
    "random20": "42.60",
    "explorer20": "5 of 8 collapse",
    "paper low2high": "37.15 ± 0.77",
    "predictive_high20": "34.35",
}

# What did not learn in the pilots, and is in no table below.
NOT_LEARNED = (
    "register programs with shuffled symbols: the look-up of a value stayed at 0.45 after 2,700 "
    "supervised steps",
    "linked chains with decoys: 0.02 on easy problems after 1,200 supervised steps",
    "running totals from a policy of careful solutions only, whose mistakes are copying and "
    "adding: no gain in 90 to 120 updates at rates from 1e-4 to 1e-3, and a collapse at 1e-3",
    "votes whose verdicts were wrong at random in 40 % of a warm start at a rate of 1e-3: the "
    "policy forgot how to count, and 24 updates did not move it",
    "votes over 11 to 23 signs: learned, but in five of six warm starts no layer had the verdict "
    "among its explorers",
    "tripled totals of 2 to 4 terms with a box of two totals: easy problems stayed at 0.25 over 40 "
    "updates at 1e-4 and fell at 3e-4",
    "tripled totals from a warm start at chance (0.10): no gain in 40 updates",
    "tripled totals over all signed digits (200 contexts): 0.40 to 0.43 on easy problems in 40 "
    "updates at 1e-4, too little to compare rules by",
)


SATURATED = (
    "At a rate of 3e-5 uniform weights reached 0.84 on hard running totals at the end (seed 0); "
    "2e-5 was taken before any arm was compared, so that nothing saturates."
)


def row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def head(*cells: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*cells), row(*("---" for _ in cells))]


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(found: Paired) -> str:
    """A mean difference and its interval."""
    if found.count < 2:
        return "-"
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.3f} ± {deviation:.3f}"


def claims_table(data: Data) -> list[str]:
    """Every claim, and its verdict on every warm start."""
    lines = head("claim", "where", "the paper's number", *WARM_STARTS)
    columns = [verdicts(data, name) for name in WARM_STARTS]
    for place, claim in enumerate(CLAIMS):
        words = [column[place].words for column in columns]
        lines.append(
            row(f"**{claim.name}**: {claim.says}", claim.where, claim.paper or "-", *words)
        )
    return lines


def arms_table(data: Data, warm_start: str) -> list[str]:
    """Every arm of a warm start that has runs."""
    decisive = task_of(warm_start).decisive
    lines = head(
        "arm", "seeds", "hard", "hard - full", "area", "easy", "hard, top-p 1", "collapsed",
        "weight on decisive tokens", "first cosine", "first projection", "the paper's number",
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
                spread(list(data.values(warm_start, arm.name, area).values())),
                spread(list(data.values(warm_start, arm.name, easy).values())),
                spread(list(whole.values())),
                f"{hits} of {runs}",
                number(data.decisive(warm_start, arm.name, decisive), 2),
                number(data.at_start(warm_start, arm.name, "cosine"), 2),
                number(data.at_start(warm_start, arm.name, "projection"), 2),
                PAPER.get(arm.name, "-"),
            )
        )
    return lines if len(lines) > 2 else ["No run yet."]


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
    return lines if len(lines) > 2 else ["No record yet."]


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
        runs = data.runs.get(name, {})
        arms = [arm for arm in (*FIELD, *NEW, *_paper_rules()) if arm.name in runs]
        found = [data.difference(name, arm.name, "full", area) for arm in arms]
        enough = [place for place, each in enumerate(found) if each.count >= PAIRS]
        adjusted = dict(zip(enough, holm([found[place].p for place in enough]), strict=True))
        if not arms:
            continue
        lines += ["", f"`{name}`:", ""]
        lines += head("rule", "pairs", "area - full", "p after Holm", "verdict")
        for place, arm in enumerate(arms):
            p = adjusted.get(place)
            lines.append(
                row(
                    arm.name,
                    found[place].count,
                    signed(found[place]),
                    number(p),
                    _better(found[place], p),
                )
            )
    return lines or ["No run yet."]


def _paper_rules() -> list[Arm]:
    names = [name for name in CORE if name != "full" and ARMS[name].equal_mass]
    return [ARMS[name] for name in names]


def _better(found: Paired, p: float | None) -> str:
    if p is None:
        return f"not resolved ({found.count} of {PAIRS} pairs)"
    if p >= 0.05 or found.low <= 0 <= found.high:
        return "not resolved"
    return "better than uniform here" if found.mean > 0 else "worse than uniform here"


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


def _probe_rows(data: Data, cells: Callable[[dict], list[str]]) -> list[str]:
    lines = []
    for name in WARM_STARTS:
        for seed, record in sorted(data.probes.get(name, {}).items()):
            for probe in record["probes"]:
                lines.append(row(name, seed, probe["step"], *cells(probe)))
    return lines


def gradients_table(data: Data) -> list[str]:
    """Geometry of the subsets along the probed trainings."""
    names = [f"{group} {value}" for group in ("random", "anchor", "explorer")
             for value in ("cosine", "norm", "projection")]  # fmt: skip

    def cells(probe: dict) -> list[str]:
        found = probe.get("gradients", {})
        return [number(found.get(n.split()[0], {}).get(n.split()[1]), 2) for n in names]

    return [*head("warm start", "seed", "step", *names), *_probe_rows(data, cells)]


def tenths_table(data: Data) -> list[str]:
    """Projection of every tenth by attention entropy, lowest first."""

    def cells(probe: dict) -> list[str]:
        tenths = probe.get("gradients", {}).get("tenths", [None] * 10)
        return [number(value, 2) for value in tenths]

    return [*head("warm start", "seed", "step", *map(str, range(10))), *_probe_rows(data, cells)]


def entropies_table(data: Data) -> list[str]:
    """Entropy by group, its relation to predictive entropy, support, and the layers' agreement."""
    names = (
        "anchors", "explorers", "all tokens", "deviation of all", "predictive", "correlation",
        "keys for 0.9: anchors", "explorers ", "layers: anchors", "explorers", "ranks",
    )  # fmt: skip

    def cells(probe: dict) -> list[str]:
        found, keys = probe["entropies"], probe["support"]["0.9"]
        values = [*found["mean"], found["deviation"][2], found["predictive"], found["correlation"]]
        layers = [found["layers"][name] for name in ("anchors", "explorers", "ranks")]
        return [number(value, 2) for value in (*values, keys[0], keys[1], *layers)]

    return [*head("warm start", "seed", "step", *names), *_probe_rows(data, cells)]


def tasks_table(data: Data) -> list[str]:
    """The tasks, their settings, and what uniform weights learn on them."""
    lines = head(
        "warm start", "decided by", "updates", "rollout", "rate", "probed layer",
        "hard at the evaluations, uniform weights", "reward, first and last four steps",
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
        lines.append(
            row(name, task.about, made.steps, rollout, f"{made.rate:g}", task.probe,
                "; ".join(curve), ", ".join(ends))
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
    reason = "Adam cancels a constant factor of the gradient"
    words = (
        f"cannot be tested here ({reason}); the arms `... all` differ by the clip of the norm only"
    )
    lines.append(row("selected against all-token denominators as a step size", words))
    reason = "four layers and two hundred thousand parameters"
    lines.append(
        row("transfer to other models, and layers as depths", f"cannot be tested here ({reason})")
    )
    return lines


def provenance_table(data: Data) -> list[str]:
    """What the numbers come from."""
    wanted = len(design())
    records = data.records
    seconds = sum(record.get("cpu_seconds", 0.0) for record in records)
    machines = Counter(
        f"{found['cpu']}, {found['cores']} cores" if found else "unknown"
        for found in (record.get("machine") for record in records)
    )
    lines = [
        f"{len(records)} of {wanted} items of the design have a record, {len(data.failed)} of them "
        f"failed; {seconds / 3600:.2f} CPU hours. {wall(records)} Records by machine: "
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
    return f"Runs were under way for {total / 3600:.2f} hours ({known})."


def _arms(name: str) -> Callable[[Data], list[str]]:
    return lambda data: arms_table(data, name)


TABLES: dict[str, tuple[str, Callable[[Data], list[str]]]] = {
    "claims": ("Claims", claims_table),
    "tasks": ("Tasks, and that they can be learned", tasks_table),
    "roles": ("Token roles at the warm starts", roles_table),
    **{f"arms-{name}": (f"Arms, `{name}`", _arms(name)) for name in WARM_STARTS},
    "explorers": ("Explorers alone, seed by seed", explorers_table),
    "field": ("The field's rules and new ones, at equal mass", field_table),
    "weights": ("Which tokens each rule weights", selected_table),
    "gradients": ("Gradient geometry along training", gradients_table),
    "tenths": ("Projection by tenths of attention entropy", tenths_table),
    "entropies": ("Entropies, support and layers along training", entropies_table),
    "engines": ("The same runs through TRL", engines_table),
    "refused": ("What cannot be tested here", refused_table),
    "provenance": ("Where the numbers come from", provenance_table),
}

NOTES = {
    "claims": f"Verdicts are those of `claims.py`: {PAIRS} pairs at least, Holm's correction over "
    f"the claims of a warm start, a margin of {MARGIN} for claims that two arms are alike. The "
    "interval is that of the difference, or of the quantity that the claim says is above zero, "
    "over pairs and too narrow at five of them; p is the paired t test's after the correction, so "
    "an interval may leave out zero where p is not small. "
    "The paper's accuracies are percents on its benchmarks; ours are shares on another task, and "
    "only signs can be compared.",
    "arms-totals-0": "Mean and standard deviation over seeds; differences are paired by seed, with "
    "a 95 % bootstrap interval over pairs, which is too narrow at five pairs. `hard` is mean@4 on "
    "held-out problems at top-p 0.7. The last three numbers say where a rule puts its weight: on "
    "decisive tokens over the training, and how its gradient lies towards that of all tokens at "
    "the warm start.",
    "explorers": f"A run has collapsed if, of its last {WINDOW} steps against its first {WINDOW}, "
    f"responses are shorter than {SHORT} or longer than {LONG} of what they were, {UNBOXED:.0%} "
    f"have no answer, or the mean reward has fallen by more than {FALL}.",
    "field": "Area under the curve of hard accuracy against uniform weights, Holm's correction "
    "over the rules of a warm start.",
    "roles": "Shares of a role among all tokens, anchors and explorers of the probed layer, its "
    "share of the predictive entropy, and its part of the full gradient's projection. This is what "
    "orders the arms: a rule trains as well as the decisive tokens it keeps.",
    "engines": f"`{'`, `'.join(THROUGH_TRL)}` on `totals-0`, seeds 0 to {max(TRL_SEEDS)}, trained "
    "by `TokenWeightsGRPOTrainer` (`through_trl.py`): warm start, prompts, rewards, settings and "
    "held-out problems are the engine's, the draws are TRL's own. They enter no other table. "
    f"{len(TRL_SEEDS)} runs stand against the engine's {len(SEEDS)} as two groups, with Welch's "
    "95 % interval of the difference of their means; `agrees` says that it holds zero, not that "
    "the difference is zero, and where nothing differs one interval in twenty misses zero. The "
    "last column, which no verdict uses, is TRL less the engine at the same prompts.",
    "gradients": "Cosine and projection under the all-token mean, norm under the selected-token "
    "mean.",
}


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
        if quick and name in ("claims", "field", "tasks", "engines", "refused"):
            continue
        lines += [f"## {title}", ""]
        lines += [NOTES[name], ""] if name in NOTES else []
        lines += [*table(data), ""]
        if name == "tasks":
            lines += ["What failed to learn, and was given up:", ""]
            lines += [*(f"- {each}" for each in NOT_LEARNED), ""]
            lines += [SATURATED, ""]
        if not quick:
            lines += [f"![{title}](figures/{FIGURES[name].file})", ""] if name in FIGURES else []
    return "\n".join(lines).rstrip() + "\n"


INTRODUCTION = """\
Generated by `python benchmarks/paper results` from the records in `runs/`; do not edit. Every run
is in the records, failed ones included, with its seed, commit, configuration and versions.

A policy of 200,384 parameters on synthetic tasks says nothing about a model of eight billion: the
tables say which of the paper's claims appear at this scale, and the token roles say why. One update
of the engine equals TRL's to 1e-5 (`integrations/trl/tests/test_paper_update.py`); whole runs
through the TRL adapter are compared with the engine's in a table below. Arms are compared at equal
weight mass, but for those named `paper ...` and `... all`."""

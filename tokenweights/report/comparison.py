r"""Runs of several recipes side by side: what each earned over its seeds, and by how much.

A run stands for a recipe and a seed. Where `run.json` does not name them, the directory does, as
`RECIPE-seedN` or `RECIPE/seedN`. All numbers are over the steps that all runs have in common.
Intervals are percentile bootstrap intervals over seeds at 95 %; with one seed there is none, and
both of its bounds are NaN. Between a handful of seeds they are too narrow: with n of them about
$1.96 \sqrt{(n - 1) / n} / t_{n-1}$ as wide as Student's interval, 0.37 for three.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenweights._errors import invalid, nearest
from tokenweights._typing import typed
from tokenweights.report.figures.panels import first_recorded, series
from tokenweights.report.figures.training import REWARD
from tokenweights.report.recipe_runs import RecipeRun
from tokenweights.rewards import Interval, bootstrap_interval

WEIGHT, SAMPLE_SIZE = "token_weights/weight_mean", "token_weights/effective_sample_size"
FEW_SEEDS = 5
LARGEST = 1e100  # beyond, squares and axes overflow

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Effect:
    """The metric of a recipe minus that of the baseline.

    Attributes:
        final: At the last common step.
        mean: Over all common steps.
        seeds: Seeds that both have, in ascending order: the effect is the mean of their
            differences. Empty if they share none: then it is the difference of the means, and the
            bootstrap draws the seeds of both apart.
    """

    final: Interval
    mean: Interval
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class RecipeResult:
    """What the runs of one recipe came to.

    Attributes:
        recipe: Its name.
        seeds: In ascending order.
        final: The metric at the last common step, over seeds.
        mean: The mean of the metric over the common steps, over seeds.
        effect: Against the baseline; None for the baseline itself, or without one.
        weight_mean: Mean token weight, over steps and seeds; NaN unless every seed logged it.
        effective_sample_size: The same of the effective sample size, a share of the tokens.
        curve: For each common step the mean over seeds.
        spread: For each common step the standard deviation over seeds; empty with one seed.
    """

    recipe: str
    seeds: tuple[int, ...]
    final: Interval
    mean: Interval
    effect: Effect | None
    weight_mean: float
    effective_sample_size: float
    curve: tuple[float, ...]
    spread: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Recipes side by side.

    Attributes:
        metric: Name of the metric.
        steps: The steps that all runs have in common.
        baseline: Name of the baseline; None if no run is of it.
        results: One for each recipe, the baseline first, the others by name.
        notes: What a reader has to know, a sentence each.
    """

    metric: str
    steps: tuple[float, ...]
    baseline: str | None
    results: tuple[RecipeResult, ...]
    notes: tuple[str, ...]


@typed
def recipe_comparison(
    runs: Sequence[RecipeRun], *, metric: str | None = None, baseline: str = "full"
) -> Comparison:
    """Runs of several recipes side by side, over the steps they all have in common.

    A step at which a run's metric is not finite is left out of every run. Numbers do not depend on
    the order of the runs.

    Args:
        runs: At least two, of one recipe and seed each.
        metric: What is compared; None for the reward, under the name that the trainer gives it.
        baseline: Recipe that the others are compared with.

    Returns:
        The comparison; `notes` says which steps and seeds were left out.

    Raises:
        TokenWeightsError: If there are fewer than two runs, two are of one recipe and seed, runs of
            one recipe describe it differently, a run did not log the metric, or no step is common.

    Example:
        >>> comparison = recipe_comparison(
        ...     [
        ...         RecipeRun(name, seed, [{"step": 0, "reward": seed + better}])
        ...         for name, better in (("full", 0.0), ("low2high", 0.5))
        ...         for seed in (0, 1)
        ...     ]
        ... )
        >>> comparison.results[1].effect
        Effect(final=Interval(mean=0.5, low=0.5, high=0.5), mean=Interval(...), seeds=(0, 1))
    """
    if len(runs) < 2:
        hint = "`report` shows one run."
        raise invalid("recipe_comparison", "runs", "to be at least two", len(runs), hint)
    runs = sorted(runs, key=lambda run: (run.recipe != baseline, run.recipe, run.seed))
    _require_distinct(runs)
    keys = [metric if metric is not None else first_recorded(run.metrics, REWARD) for run in runs]
    _require_recorded(runs, keys)
    tables = [_table(run, key) for run, key in zip(runs, keys, strict=True)]
    logged = set.intersection(*(set(table) for table in tables))
    steps = [step for step in sorted(logged) if all(math.isfinite(t[step]) for t in tables)]
    if not steps:
        got = f"{len(logged)} steps in common, none of them finite in all runs"
        hint = "Compare runs that logged the same steps."
        raise invalid("recipe_comparison", "runs", "with a step in common", got, hint)
    notes = _step_notes(runs, tables, logged, len(steps))
    if len(set(keys)) > 1:
        notes.append(f"The reward is {' or '.join(sorted(set(keys)))}, by the trainer of a run.")
    values = [torch.tensor([t[s] for s in steps], dtype=torch.float64) for t in tables]

    seeds: dict[str, dict[int, Tensor]] = {}
    for run, value in zip(runs, values, strict=True):
        seeds.setdefault(run.recipe, {})[run.seed] = value
    base = seeds.get(baseline)
    if base is None:
        near = nearest(baseline, list(seeds))
        meant = f" Did you mean {near}?" if near else ""
        notes.append(f"No run of the baseline {baseline}: effects are left out.{meant}")
    results = []
    for name, of_seed in seeds.items():
        effect = None if base is None or name == baseline else _effect(of_seed, base)
        stacked = torch.stack(list(of_seed.values()))
        own = [run for run in runs if run.recipe == name]
        spread = stacked.std(0).tolist() if len(of_seed) > 1 else ()
        results.append(
            RecipeResult(
                recipe=name,
                seeds=tuple(of_seed),
                final=_interval(stacked[:, -1]),
                mean=_interval(stacked.mean(1)),
                effect=effect,
                weight_mean=_mean_over_seeds(own, WEIGHT, steps),
                effective_sample_size=_mean_over_seeds(own, SAMPLE_SIZE, steps),
                curve=tuple(stacked.mean(0).tolist()),
                spread=tuple(spread),
            )
        )
    notes += _seed_notes(results)
    shown = metric if metric is not None else min(keys, key=REWARD.index)
    return Comparison(
        shown, tuple(steps), baseline if base is not None else None, tuple(results), tuple(notes)
    )


def _require_distinct(runs: Sequence[RecipeRun]) -> None:
    """Raises where two runs are one, or two recipes have one name."""
    taken: dict[tuple[str, int], RecipeRun] = {}
    described: dict[str, RecipeRun] = {}
    for run in runs:
        twin = taken.setdefault((run.recipe, run.seed), run)
        if twin is not run:
            condition = "of different recipe or seed"
            got = f"{run.recipe}, seed {run.seed}, twice: {_place(twin)} and {_place(run)}"
            raise invalid("recipe_comparison", "runs", condition, got, "Leave one out.")
        if not run.description:
            continue
        other = described.setdefault(run.recipe, run)
        first, second = (_SEED.sub("", each.description) for each in (other, run))
        if first != second:
            condition = "to have one recipe under one name"
            hint = "Give recipes that differ different names."
            got = f"{run.recipe} of two kinds: {_place(other)} and {_place(run)}"
            raise invalid("recipe_comparison", "runs", condition, got, hint)


def _require_recorded(runs: Sequence[RecipeRun], keys: Sequence[str]) -> None:
    known = {name for run in runs for line in run.metrics for name in line} - {"step"}
    lacking = [
        _place(run)
        for run, key in zip(runs, keys, strict=True)
        if key == "step" or not any(key in line for line in run.metrics)
    ]
    if lacking:
        # Names of metrics are long paths, of which people remember a part.
        near = nearest(keys[0], sorted(known - set(keys)), cutoff=0.4)
        hint = f"Did you mean {near!r}?" if near else "Pass a metric that all runs logged."
        if len(lacking) < len(runs):
            hint = "Leave these runs out, or pass a metric that all runs logged."
        shown = ", ".join(lacking[:_PLACES])
        more = f" and {len(lacking) - _PLACES} more" if len(lacking) > _PLACES else ""
        got = f"{keys[0]!r}, which is not in {shown}{more}"
        raise invalid("recipe_comparison", "metric", "that every run logged", got, hint)


def _table(run: RecipeRun, key: str) -> dict[float, float]:
    table = dict(zip(*series(run.metrics, key), strict=True))
    if any(abs(value) > LARGEST for value in table.values()):
        got, hint = f"a larger value of {key!r} in {_place(run)}", "Correct the file."
        raise invalid("recipe_comparison", "runs", f"within {LARGEST:g} of 0", got, hint)
    return table


def _place(run: RecipeRun) -> str:
    return run.place or f"{run.recipe}, seed {run.seed}"


def _step_notes(
    runs: Sequence[RecipeRun],
    tables: Sequence[Mapping[float, float]],
    logged: set[float],
    count: int,
) -> list[str]:
    notes = []
    sizes = [len(table) for table in tables]
    if max(sizes) > len(logged):
        notes.append(
            f"Runs logged different steps, {min(sizes)} to {max(sizes)} of them: all numbers are "
            f"over the {_counted(len(logged), 'step')} they have in common."
        )
    for run, table in zip(runs, tables, strict=True):
        gaps = sum(not math.isfinite(table[step]) for step in logged)
        if gaps:
            notes.append(
                f"{run.recipe}, seed {run.seed}: not finite at {_counted(gaps, 'step')}, left out "
                f"of every run; {_counted(count, 'step')} remain."
            )
    return notes


def _seed_notes(results: Sequence[RecipeResult]) -> list[str]:
    notes = []
    alone = [result.recipe for result in results if len(result.seeds) == 1]
    if alone:
        notes.append(f"1 seed: no interval ({', '.join(alone)}).")
    if any(1 < len(result.seeds) < FEW_SEEDS for result in results):
        notes.append(f"Bootstrap intervals over fewer than {FEW_SEEDS} seeds are too narrow.")
    effects = [(result.seeds, result.effect) for result in results if result.effect is not None]
    base = results[0].seeds
    if any(effect.seeds and {*seeds, *base} > {*effect.seeds} for seeds, effect in effects):
        notes.append("A paired effect leaves out the seeds that only one of the two recipes has.")
    return notes


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _effect(own: Mapping[int, Tensor], base: Mapping[int, Tensor]) -> Effect:
    shared = tuple(seed for seed in own if seed in base)
    if shared:
        differences = torch.stack([own[seed] - base[seed] for seed in shared])
        return Effect(_interval(differences[:, -1]), _interval(differences.mean(1)), shared)
    first, second = (torch.stack(list(runs.values())) for runs in (own, base))
    return Effect(
        _difference(first[:, -1], second[:, -1]), _difference(first.mean(1), second.mean(1)), ()
    )


def _interval(values: Tensor) -> Interval:
    if len(values) == 1:
        return Interval(float(values), math.nan, math.nan)
    return bootstrap_interval(values, resamples=_RESAMPLES)


def _difference(values: Tensor, others: Tensor) -> Interval:
    """The difference of two means; the bootstrap draws both groups."""
    estimate = float(values.mean() - others.mean())
    if min(len(values), len(others)) == 1:
        return Interval(estimate, math.nan, math.nan)
    generator = torch.Generator("cpu").manual_seed(0)
    means = []
    for group in (values, others):
        shape = (_RESAMPLES, len(group))
        draws = torch.randint(len(group), shape, generator=generator, device="cpu")
        means.append(group[draws].mean(-1))
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")
    low, high = (means[0] - means[1]).quantile(bounds).tolist()
    return Interval(estimate, low, high)


def _mean_over_seeds(runs: Sequence[RecipeRun], key: str, steps: Sequence[float]) -> float:
    """Mean over the given steps that logged a finite value, then over runs; NaN without one."""
    means, chosen = [], set(steps)
    for run in runs:
        pairs = zip(*series(run.metrics, key), strict=True)
        values = [value for step, value in pairs if step in chosen and abs(value) <= LARGEST]
        means.append(math.fsum(values) / len(values) if values else math.nan)
    return math.fsum(means) / len(means)


_PLACES = 3
_SEED = re.compile(r"; seed -?[0-9]+$", re.MULTILINE)  # of the rule's own draws

"""How often, and how late, a `CollapseMonitor` raises an alarm on drawn runs.

Healthy runs of five kinds have to stay without one; failing runs of nine kinds have to get theirs.
Run with `python benchmarks/diagnostics/collapse.py --seeds 2000`, a few minutes on one core. It
ends with status 1 after a false alarm, and prints for each kind of failure how many runs were
caught, how many of those under the right name, and the updates from the onset to the alarm.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "diagnostics"))

import runs

from tokenweights import CollapseMonitor

FAST = {
    "short, reward falls": (
        "short_response_collapse",
        lambda seed: runs.short_responses(seed, stalls=False),
    ),
    "short, reward stalls": (
        "short_response_collapse",
        lambda seed: runs.short_responses(seed, stalls=True),
    ),
    "spiking": ("length_instability", runs.spiking_lengths),
    "accuracy declines": ("gradual_degeneration", runs.degenerating),
}


def first_alarm(run):
    """The first verdict that says collapsed; None where there is none."""
    monitor = CollapseMonitor()
    for step, numbers in run.updates():
        verdict = monitor.update(step, **numbers)
        if verdict.collapsed:
            return verdict
    return None


def main():
    """Draws, watches and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="runs of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed of each kind")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    false_alarms = 0
    print("| healthy | runs | alarms |\n|---|---|---|")
    for name, draw in runs.HEALTHY.items():
        alarms = [seed for seed in seeds if first_alarm(draw(seed)) is not None]
        false_alarms += len(alarms)
        print(f"| {name} | {len(seeds)} | {len(alarms)} {alarms[:5] or ''} |", flush=True)
    print("\n| failing | runs | caught | by name | median | 95 % | worst |")
    print("|---|---|---|---|---|---|---|")
    for name, (mode, draw) in (FAST | runs.SLOW).items():
        delays, named = [], 0
        for seed in seeds:
            run = draw(seed)
            verdict = first_alarm(run)
            if verdict is not None:
                delays.append(verdict.step - run.onset)
                named += verdict.mode == mode
        delays.sort()
        late = delays[int(0.95 * (len(delays) - 1))]
        print(
            f"| {name} | {len(seeds)} | {len(delays)} | {named} "
            f"| {statistics.median(delays):.0f} | {late} | {delays[-1]} |",
            flush=True,
        )
    sys.exit(1 if false_alarms else 0)


if __name__ == "__main__":
    main()

"""Every failure mode is caught in time, and no healthy run is taken for one."""

import json
import math
import statistics
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from diagnostics import runs
from ranks import on_ranks

import tokenweights as tw
from tokenweights import CollapseMonitor, CollapseThresholds, TokenWeightsError

# Updates from the onset to the verdict, as docs/guides/diagnostics.md states them.
FAILURES = {
    "falling": ("short_response_collapse", lambda s: runs.short_responses(s, stalls=False), 40),
    "stalling": ("short_response_collapse", lambda s: runs.short_responses(s, stalls=True), 45),
    "spiking": ("length_instability", runs.spiking_lengths, 50),
    "degenerating": ("gradual_degeneration", runs.degenerating, 150),
}


# The same of slow failures: the median.
SLOW_DELAYS = {
    "slow shrinking": 130,
    "slow forgetting": 100,
    "abrupt forgetting": 30,
    "ramping length": 90,
    "spike, then decline": 90,
}


def verdicts(run, monitor=None):
    monitor = monitor or CollapseMonitor()
    return [monitor.update(step, **numbers) for step, numbers in run.updates()]


# The full sweep of 2,000 seeds of each kind is benchmarks/diagnostics/collapse.py.
@pytest.mark.parametrize("name", runs.HEALTHY)
def test_no_false_alarm_in_healthy_runs(name):
    for seed in range(100):
        alarms = [verdict for verdict in verdicts(runs.HEALTHY[name](seed)) if verdict.collapsed]
        assert not alarms, (seed, alarms[0])


@pytest.mark.parametrize("name", runs.SLOW)
def test_slow_failures_are_caught(name):
    mode, draw = runs.SLOW[name]
    delays, named = [], 0
    for seed in range(40):
        run = draw(seed)
        first = next((v for v in verdicts(run) if v.collapsed), None)
        if first is not None:
            assert first.since == first.step >= run.onset, (seed, first)
            named += first.mode == mode
            delays.append(first.step - run.onset)
    assert len(delays) >= 38 and named >= 34, (delays, named)
    assert statistics.median(delays) <= SLOW_DELAYS[name]


@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_is_caught_in_time_and_by_name(name):
    mode, draw, delay = FAILURES[name]
    for seed in range(100):
        run = draw(seed)
        first = next((v for v in verdicts(run) if v.collapsed), None)
        assert first is not None, f"seed {seed} was missed"
        assert first.mode == mode, (seed, first)
        assert run.onset <= first.since == first.step <= run.onset + delay, (seed, run.onset, first)


def test_healthy_runs_include_the_hard_ones():
    """The generator draws shedding, spikes, growth and shrinking; else the promise is cheap."""
    drawn = [runs.healthy(seed) for seed in range(100)]
    change = [run.log_length[-1] - run.log_length[0] for run in drawn]
    assert min(change) < math.log(0.4) and max(change) > math.log(2.5)
    jumps = [abs(torch.tensor(run.log_length).diff()).max().item() for run in drawn]
    assert sum(jump > math.log(1.5) for jump in jumps) >= 10


def series(lengths, rewards, monitor=None):
    monitor = monitor or CollapseMonitor()
    pairs = enumerate(zip(lengths, rewards, strict=True))
    return [monitor.update(step, length=n, reward=r) for step, (n, r) in pairs]


def test_shorter_and_better_is_healthy():
    lengths = [800.0] * 30 + [200.0] * 60
    assert not any(v.collapsed for v in series(lengths, [-1.0] * 30 + [0.0] * 60))
    worse = series(lengths, [-1.0] * 90)
    assert worse[-1].mode == "short_response_collapse"
    assert worse[-1].reason == (
        "median length went from 800 to 200 tokens, and the mean reward from -1 to -1"
    )


def test_a_solved_task_need_not_grow():
    lengths, rewards = [800.0] * 30 + [200.0] * 60, [0.95] * 90
    assert series(lengths, rewards)[-1].collapsed
    solved = CollapseMonitor(CollapseThresholds(saturated_reward=0.9))
    assert not any(v.collapsed for v in series(lengths, rewards, solved))


def test_spikes_without_a_falling_reward_are_healthy():
    lengths = [300.0, 310.0] * 20 + [1500.0] + [300.0] * 40
    assert not any(v.collapsed for v in series(lengths, [0.0] * 81))
    fallen = series(lengths, [0.0] * 45 + [-1.0] * 36)
    assert fallen[-1].mode == "length_instability" and fallen[-1].since == 48
    late = series(lengths, [0.0] * 72 + [-1.0] * 9)
    assert not any(v.collapsed for v in late)


def test_a_new_spike_keeps_the_old_one_in_mind():
    lengths, rewards = [300.0] * 100, [0.0] * 60 + [-1.0] * 40
    lengths[25] = 900.0
    assert not any(v.collapsed for v in series(lengths, rewards))
    lengths[50] = 900.0
    got = series(lengths, rewards)
    assert got[-1].mode == "length_instability"
    assert got[-1].reason.startswith("length spiked at step 25 from 300 tokens")


def test_a_run_recovers_from_its_spikes_with_its_reward():
    lengths, rewards = [300.0] * 100, [0.0] * 100
    lengths[40] = 900.0
    rewards[42:60] = [-1.0] * 18
    got = series(lengths, rewards)
    held = [v.step for v in got if v.collapsed]
    assert held == list(range(held[0], held[-1] + 1))
    assert 42 < held[0] < 50 and 60 < held[-1] < 70


def test_a_noisy_accuracy_has_to_decline_further():
    steady = [0.5] * 10 + [0.42] * 10
    noisy = [accuracy + 0.08 * (-1) ** place for place, accuracy in enumerate(steady)]
    for accuracies, expected in ((steady, True), (noisy, False)):
        monitor = CollapseMonitor()
        for step, accuracy in enumerate(accuracies):
            verdict = monitor.update(step, length=100.0, reward=0.0, accuracy=accuracy)
        assert verdict.collapsed == expected


def test_a_verdict_holds_until_the_run_recovers():
    lengths = [500.0] * 20 + [50.0] * 40 + [500.0] * 20
    got = series(lengths, [0.0] * 20 + [-1.0] * 40 + [0.0] * 20)
    held = [v.step for v in got if v.collapsed]
    assert held == list(range(held[0], held[-1] + 1))
    assert held[0] < 32 and 60 < held[-1] < 68
    assert len({v.since for v in got if v.collapsed}) == 1


def test_accuracy_has_to_decline_from_its_best():
    monitor = CollapseMonitor()
    accuracies = [0.2, 0.25, 0.3, 0.35] + [0.4] * 6 + [0.3] * 5 + [0.4] * 6
    got = [
        monitor.update(step, length=100.0, reward=0.0, accuracy=accuracy)
        for step, accuracy in enumerate(accuracies)
    ]
    raised = [v.step for v in got if v.mode == "gradual_degeneration"]
    assert raised[0] == 14 and got[-1].mode is None
    assert got[14].reason == (
        "mean accuracy went from 0.400 at step 8 to 0.300; it had started at 0.200"
    )


def test_thresholds_are_respected():
    lengths, rewards = [500.0] * 20 + [200.0] * 30, [0.0] * 20 + [-1.0] * 30
    assert series(lengths, rewards)[-1].collapsed
    for change in ({"short_ratio": 0.3}, {"reward_range": 20.0, "patience": 60}):
        monitor = CollapseMonitor(CollapseThresholds(**change))
        assert not series(lengths, rewards, monitor)[-1].collapsed


@pytest.mark.parametrize("draw", [draw for _, draw, *_ in (FAILURES | runs.SLOW).values()])
@pytest.mark.parametrize("cut", [3, 60, 135])
def test_a_resumed_monitor_says_the_same(draw, cut):
    updates = list(draw(7).updates())
    first, second = CollapseMonitor(), CollapseMonitor()
    for step, numbers in updates[:cut]:
        first.update(step, **numbers)
    saved = first.state_dict()
    second.load_state_dict(json.loads(json.dumps(saved, allow_nan=False)))
    for step, numbers in updates[cut:]:
        assert first.update(step, **numbers) == second.update(step, **numbers)
    # What was saved did not move on with the run.
    assert saved["step"] == cut - 1 and len(saved["history"]["lengths"]) == min(cut, 60)


def test_a_spike_is_remembered_over_a_resume():
    lengths, rewards = [300.0] * 80, [0.0] * 45 + [-1.0] * 35
    lengths[40] = 900.0
    first = CollapseMonitor()
    for step in range(43):
        first.update(step, length=lengths[step], reward=rewards[step])
    second = CollapseMonitor()
    second.load_state_dict(first.state_dict())
    for step in range(43, 80):
        verdict = second.update(step, length=lengths[step], reward=rewards[step])
    assert verdict.mode == "length_instability"


def test_loading_leaves_the_saved_state_alone():
    monitor = CollapseMonitor()
    monitor.update(0, length=10.0, reward=0.0, accuracy=0.5)
    saved = monitor.state_dict()
    before = json.dumps(saved)
    monitor.load_state_dict(saved)
    monitor.update(1, length=10.0, reward=0.0, accuracy=0.5)
    assert json.dumps(saved) == before


def on_own_responses(rank, size):
    """Verdicts of a rank that holds some of the responses of every batch."""
    monitor, got = CollapseMonitor(), []
    for step in range(40):
        mask, rewards = batch(step)
        mine = slice(rank, None, size)
        merged = tw.rollout_statistics(mask[mine], rewards[mine], group=dist.group.WORLD)
        got.append(monitor.update(step, length=merged.length, reward=merged.reward))
    return got


def batch(step):
    generator = torch.Generator().manual_seed(step)
    longest = 40 if step < 20 else 4
    lengths = torch.randint(1, longest + 1, (7, 1), generator=generator)
    rewards = torch.randint(-2, 2 if step < 20 else 0, (7,), generator=generator)
    return torch.arange(40) < lengths, rewards.double()


def test_every_rank_says_what_one_process_says():
    monitor, alone = CollapseMonitor(), []
    for step in range(40):
        merged = tw.rollout_statistics(*batch(step))
        alone.append(monitor.update(step, length=merged.length, reward=merged.reward))
    assert alone[-1].collapsed
    for got in on_ranks(on_own_responses, 2):
        assert got == alone


@pytest.mark.parametrize(
    "step, numbers, message",
    [
        (0, {"length": 1.0, "reward": 0.0}, "the one before"),
        (1, {"length": math.nan, "reward": 0.0}, "length"),
        (1, {"length": -1.0, "reward": 0.0}, "length"),
        (1, {"length": 1.0, "reward": math.inf}, "reward"),
        (1, {"length": 1.0, "reward": 0.0, "accuracy": math.nan}, "accuracy"),
        (1, {"length": 1.0, "reward": 0.0, "accuracy": 40.0}, "per cent"),
    ],
)
def test_bad_numbers_are_refused_and_leave_no_trace(step, numbers, message):
    monitor = CollapseMonitor()
    monitor.update(0, length=1.0, reward=0.0)
    before = monitor.state_dict()
    with pytest.raises(TokenWeightsError, match=message):
        monitor.update(step, **numbers)
    assert monitor.state_dict() == before


@pytest.mark.parametrize(
    "change, named",
    [
        ({"window": 1}, "window"),
        ({"window": 10.0}, "window"),
        ({"horizon": 5}, "horizon"),
        ({"memory": 89}, "memory"),
        ({"reward_decline": 0.0}, "reward_decline"),
        ({"lowest_reward": math.nan}, "lowest_reward"),
        ({"short_ratio": 0.8}, "recovery_ratio"),
        ({"recovery_ratio": 1.1}, "recovery_ratio"),
        ({"spike_ratio": 1.0}, "spike_ratio"),
        ({"reward_range": -1.0}, "reward_range"),
        ({"deviations": math.nan}, "deviations"),
    ],
)
def test_bad_thresholds_are_refused(change, named):
    with pytest.raises(TokenWeightsError, match=f"expected `{named}`"):
        replace(CollapseThresholds(), **change)


def test_other_states_are_refused():
    with pytest.raises(TokenWeightsError, match="state_dict"):
        CollapseMonitor().load_state_dict({"step": 3})


@pytest.mark.parametrize(
    "change, caught",
    [({}, False), ({"reward_decline": 0.2}, True)],
)
def test_a_smaller_decline_is_a_threshold_one_can_set(change, caught):
    """Reward falls by 0.8, or 27 % of its range, over 100 steps at constant length."""
    rewards = [0.0] * 100 + [-0.008 * step for step in range(100)] + [-0.8] * 100
    monitor = CollapseMonitor(CollapseThresholds(**change))
    got = series([300.0] * 300, rewards, monitor)
    assert got[-1].collapsed == caught


def test_an_abrupt_fall_is_a_change_of_the_task_unless_nothing_is_left():
    lengths = [300.0, 310.0] * 100
    for after, caught in ((-1.0, False), (-2.0, True)):
        got = series(lengths, [0.5] * 100 + [after] * 100)
        assert got[-1].collapsed == caught
    # Where no response gets less than -1, that is all there is.
    lowest = CollapseMonitor(CollapseThresholds(lowest_reward=-1.0))
    verdict = series(lengths, [0.5] * 100 + [-1.0] * 100, lowest)[-1]
    assert verdict.mode == "gradual_degeneration"
    assert verdict.reason.startswith("since step 29 the mean reward went from 0.5 to -1")


def test_a_slow_decline_holds_until_half_of_it_has_come_back():
    fall = [-0.015 * step for step in range(100)]
    rewards = [0.0] * 100 + fall + [-1.5] * 20 + fall[::-1] + [0.0] * 60
    got = series([300.0] * len(rewards), rewards)
    held = [v.step for v in got if v.collapsed]
    assert held == list(range(held[0], held[-1] + 1)) and 160 < held[0] < 200
    assert 220 < held[-1] < 330 and len({v.since for v in got if v.collapsed}) == 1


def test_the_state_stays_small():
    monitor = CollapseMonitor(CollapseThresholds(memory=100))
    for step in range(1000):
        monitor.update(step, length=100.0, reward=0.0, accuracy=0.5)
    past = monitor.state_dict()["past"]
    assert len(past["steps"]) == len(past["rewards"]) == 10
    assert len(past["moved"]) + len(past["recent"]) // 10 == 10

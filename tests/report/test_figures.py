import math

import matplotlib
import numpy as np
import pytest

from tokenweights import TokenWeightsError
from tokenweights.report import dynamics_figure, learning_figure, weights_figure

NAN = math.nan
METRICS = [
    {
        "step": step,
        "reward": step / 10 - 1,
        "completions/mean_length": 50 - step,
        "token_weights/weight_mean": 0.5 + step / 100,
        "token_weights/effective_sample_size": 1 - step / 100,
        "token_weights/anchor_share": 0.3 - step / 100,
        "token_weights/explorer_share": 0.1 + step / 100,
        "token_weights/endpoint_low": 1 - step / 20,
        "token_weights/endpoint_high": 0.2 + step / 20,
        "token_weights/entropy_mean": 0.6,
        "token_weights/entropy_std": 0.2,
        "token_weights/anchor_entropy_mean": 0.4,
        "token_weights/anchor_entropy_std": 0.1,
        "token_weights/explorer_entropy_mean": 0.8,
        "token_weights/explorer_entropy_std": 0.05,
    }
    for step in range(6)
]


def points(line):
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def assert_line(line, steps, values):
    x, y = points(line)
    np.testing.assert_array_equal(x, steps)
    np.testing.assert_allclose(y, values)


def labels(axes):
    """The texts of a panel by the colour they are drawn in."""
    return {text.get_text(): text.get_color() for text in axes.texts if text.get_text()}


def test_weights_figure_draws_each_metric_in_its_panel():
    ends, mean, size, share = weights_figure(METRICS).axes
    steps = np.arange(6)
    expected = {
        "highest entropy": (ends, 0.2 + steps / 20),
        "lowest entropy": (ends, 1 - steps / 20),
        "explorers": (share, 0.1 + steps / 100),
        "anchors": (share, 0.3 - steps / 100),
    }
    for name, (axes, values) in expected.items():
        (line,) = (line for line in axes.lines if line.get_color() == labels(axes)[name])
        assert_line(line, steps, values)
    assert_line(mean.lines[0], steps, 0.5 + steps / 100)
    assert_line(size.lines[0], steps, 1 - steps / 100)
    assert all(axes.get_ylim()[0] == 0 for axes in (ends, mean, size, share))


def test_dynamics_figure_draws_means_and_bands():
    entropy, length = dynamics_figure(METRICS).axes
    expected = {"explorers": (0.8, 0.05), "all tokens": (0.6, 0.2), "anchors": (0.4, 0.1)}
    for band, line, (name, (mean, std)) in zip(
        entropy.collections, entropy.lines, expected.items(), strict=True
    ):
        assert line.get_color() == labels(entropy)[name]
        assert_line(line, np.arange(6), [mean] * 6)
        heights = band.get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose([heights.min(), heights.max()], [mean - std, mean + std])
    assert_line(length.lines[0], np.arange(6), 50 - np.arange(6))


def test_learning_figure_draws_reward_and_every_accuracy():
    evaluations = [
        {"step": 0, "accuracy/easy": 0.5, "accuracy/hard": 0.0},
        {"step": 4, "accuracy/easy": 0.75},
        {"step": 8, "accuracy/easy": 1.0, "accuracy/hard": 0.25},
    ]
    reward, accuracy = learning_figure(METRICS, evaluations).axes
    assert_line(reward.lines[0], np.arange(6), np.arange(6) / 10 - 1)
    easy, hard = accuracy.lines
    assert_line(easy, [0, 4, 8], [0.5, 0.75, 1.0])
    assert_line(hard, [0, 8], [0.0, 0.25])
    assert labels(accuracy) == {"easy": easy.get_color(), "hard": hard.get_color()}


def test_a_long_run_shows_each_step_and_a_centred_mean():
    rewards = [float(step % 7) for step in range(100)]
    rewards[50] = NAN
    metrics = [{"step": step, "reward": value} for step, value in enumerate(rewards)]
    raw, mean = learning_figure(metrics).axes[0].lines
    assert_line(raw, np.arange(100), rewards)
    windows = [rewards[max(0, step - 2) : step + 3] for step in range(100)]
    expected = [np.nanmean(window) for window in windows]
    expected[50] = NAN
    assert_line(mean, np.arange(100), expected)
    assert "mean over 5 steps" in learning_figure(metrics).axes[0].get_xlabel()


def test_steps_are_sorted_and_a_step_logged_twice_counts_once():
    metrics = [{"step": s, "reward": r} for s, r in [(0, 0.0), (2, 9.0), (1, 1.0), (2, 2.0)]]
    assert_line(learning_figure(metrics).axes[0].lines[0], [0, 1, 2], [0.0, 1.0, 2.0])


@pytest.mark.parametrize("gap", [NAN, math.inf])
def test_a_value_that_is_not_finite_is_a_gap(gap):
    metrics = [{"step": s, "completions/mean_length": v} for s, v in enumerate([3.0, gap, 5.0])]
    figure = dynamics_figure(metrics)
    assert_line(figure.axes[1].lines[0], [0, 1, 2], [3.0, NAN, 5.0])
    figure.canvas.draw()


@pytest.mark.parametrize("metrics", [[], [{"step": 0}], [{"step": 0, "reward": NAN}]])
def test_what_is_missing_is_said(metrics):
    for figure in (learning_figure(metrics), dynamics_figure(metrics), weights_figure(metrics)):
        for axes in figure.axes:
            assert [text.get_text() for text in axes.texts] == ["not recorded"]
        figure.canvas.draw()


def test_one_missing_line_leaves_the_others():
    metrics = [{k: v for k, v in line.items() if "anchor" not in k} for line in METRICS]
    entropy = dynamics_figure(metrics).axes[0]
    assert set(labels(entropy)) == {"explorers", "all tokens"} and len(entropy.lines) == 2


def test_names_at_line_ends_do_not_touch():
    evaluations = [{"step": s, "accuracy/a": 0.5, "accuracy/b": 0.5} for s in range(3)]
    figure = learning_figure(METRICS, [*evaluations, {"step": 3, "accuracy/$_{$": 0.51}])
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[1].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_line_without_a_step_is_refused():
    with pytest.raises(TokenWeightsError, match=r"step.*reward"):
        learning_figure([{"reward": 1.0}])


def test_settings_of_matplotlib_are_neither_used_nor_changed():
    plain = learning_figure(METRICS).axes[0]
    with matplotlib.rc_context({"lines.linewidth": 9.0, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        other = learning_figure(METRICS).axes[0]
        assert dict(matplotlib.rcParams) == before
    assert other.lines[0].get_linewidth() == plain.lines[0].get_linewidth()
    assert other.get_facecolor() == plain.get_facecolor()

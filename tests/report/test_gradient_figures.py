import math

import numpy as np

from tokenweights.report import decile_heatmap


def line(step, ratios, shares=(0.2, 0.3, 0.5)):
    bands = dict(zip(("low", "middle", "high"), shares, strict=True))
    return (
        {"step": step, "gradient/full_norm": 1.0}
        | {f"gradient/decile_{number}": ratio for number, ratio in enumerate(ratios)}
        | {f"gradient/{band}_share": share for band, share in bands.items()}
    )


def test_every_probe_is_a_column_in_order_of_steps():
    rows = np.linspace(-0.3, 0.5, 30).reshape(3, 10)
    metrics = [line(51, rows[1]), line(1, rows[2]), {"step": 2, "reward": 0.0}, line(1, rows[0])]
    heat, shares, _ = decile_heatmap(metrics).axes
    (image,) = heat.get_images()
    np.testing.assert_allclose(image.get_array(), rows[:2].T)
    largest = np.abs(rows[:2]).max()
    np.testing.assert_allclose(image.get_clim(), (-largest, largest))
    assert heat.get_ylim()[0] < heat.get_ylim()[1]  # the lowest decile is at the bottom
    assert [label.get_text() for label in heat.get_xticklabels()] == ["1", "51"]
    assert [list(curve.get_xdata()) for curve in shares.lines] == [[1, 51]] * 3
    assert [curve.get_ydata()[0] for curve in shares.lines] == [0.5, 0.3, 0.2]


def test_zero_is_white_and_a_missing_decile_is_not():
    heat, *_ = decile_heatmap([line(1, [0.0, math.nan, *[0.125] * 8])]).axes
    (image,) = heat.get_images()
    zero, missing, along = image.cmap(image.norm(image.get_array()[:3, 0]))
    assert zero.min() > 0.98 and missing.max() <= 1 and missing[:3].max() < 0.95
    assert along[0] > along[2]


def test_long_runs_have_few_labels_and_no_run_says_so():
    heat, *_ = decile_heatmap([line(step, [0.1] * 10) for step in range(100)]).axes
    assert 4 <= len(heat.get_xticks()) <= 8
    for axes in decile_heatmap([{"step": 1, "reward": 0.0}]).axes:
        assert [text.get_text() for text in axes.texts] == ["not recorded"]

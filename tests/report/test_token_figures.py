"""Figures of responses, support, layers, gradients and runs, against the numbers in them."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from tokenweights import TokenWeightsError, bottom_fraction, layer_agreement, top_fraction
from tokenweights.report import (
    append_token_records,
    attention_map_figure,
    decile_heatmap,
    dispersion_figure,
    dynamics_figure,
    entropy_metrics,
    entropy_relation_figure,
    gradient_figure,
    kinds_figure,
    layer_agreement_figure,
    quadrant_figure,
    response_figure,
    run_from_directory,
    run_report_html,
    runs_figure,
    support_figure,
)

ATTENDED = {
    "prompt_tokens": ("<", "1", "+"),
    "attended": ((0,), (0, 3), (1, 4), (1, 3, 5), (5, 6)),
    "attended_weights": ((1.0,), (0.25, 0.75), (0.5, 0.125), (0.5, 0.25, 0.25), (0.5, 0.25)),
}


def said(figure):
    return figure.get_suptitle()


def title(axes):
    return axes.get_title(loc="left")


def named_lines(axes):
    """Values of each thick line by the name at its end."""
    colors = {text.get_color(): text.get_text() for text in axes.texts}
    return {
        colors[line.get_color()]: list(map(float, line.get_ydata()))
        for line in axes.lines
        if line.get_alpha() is None
    }


def bars(axes):
    names = [label.get_text() for label in axes.get_yticklabels()]
    return dict(zip(names, (bar.get_width() for bar in axes.patches), strict=True))


def responses(record, count=4, length=40):
    """Responses with random numbers in every column that figures read."""
    generator = torch.Generator().manual_seed(0)

    def values(low=0.0, high=1.0):
        drawn = low + (high - low) * torch.rand(length, generator=generator)
        return tuple(drawn.tolist())

    records = []
    for sample in range(count):
        ids = torch.randint(5, (length,), generator=generator).tolist()
        nothing = dict.fromkeys(("weights", "advantages", "log_probs", "group"))
        columns = {
            "raw_entropy": values(0, 3),
            "support_size_0.5": tuple(map(float, range(1, length + 1))),
            "support_size_0.9": tuple(map(float, range(10, length + 10))),
            "mean_distance": values(0, 30),
            "local_mass_128": values(),
        }
        records.append(
            record(
                sample_id=sample,
                tokens=tuple(f"t{token}" for token in ids),
                token_ids=tuple(ids),
                attention_entropy=values(),
                predictive_entropy=values(0, 2),
                columns=columns,
                **nothing,
            )
        )
    return records


@pytest.mark.parametrize(("kind", "first"), [("normalized", None), ("raw", None), ("raw", 15)])
def test_support_is_averaged_over_groups_of_the_chosen_entropy(kind, first, record):
    records = responses(record)
    size, distance, local = support_figure(records, kind=kind, first=first).axes
    own = kind == "normalized"
    rows = [r.attention_entropy if own else r.columns["raw_entropy"] for r in records]
    width = first or 40
    scores = torch.tensor(rows)[:, :width]
    mask = torch.ones(4, width, dtype=torch.bool)
    groups = {
        "all tokens": mask,
        "anchors": bottom_fraction(scores, mask),
        "explorers": top_fraction(scores, mask),
    }

    def mean(name, members):
        column = torch.tensor([r.columns[name] for r in records])[:, :width]
        return float(column[members].double().mean())

    for name, members in groups.items():
        expected = [mean(f"support_size_{mass}", members) for mass in (0.5, 0.9)]
        np.testing.assert_allclose(named_lines(size)[name], expected)
        np.testing.assert_allclose(bars(distance)[name], mean("mean_distance", members), rtol=1e-5)
        np.testing.assert_allclose(bars(local)[name], mean("local_mass_128", members), rtol=1e-5)
    assert list(size.lines[0].get_xdata()) == [50, 90]
    assert "random 20 %" in named_lines(size)


def test_support_without_columns_or_without_the_entropy(record):
    assert [a.texts[0].get_text() for a in support_figure([record()]).axes] == ["not recorded"] * 3
    with pytest.raises(TokenWeightsError, match="raw_entropy"):
        support_figure([record()], kind="raw")


@pytest.mark.parametrize("kind", ["normalized", "raw"])
def test_dynamics_follow_from_token_records(kind, record):
    early, late = responses(record), responses(record, count=2, length=7)
    records = [*early, *(replace(entry, step=9) for entry in late)]
    metrics = entropy_metrics(iter(records), kind=kind)
    assert [line["step"] for line in metrics] == [early[0].step, 9]
    for line, entries in zip(metrics, (early, late), strict=True):
        own = kind == "normalized"
        rows = [e.attention_entropy if own else e.columns["raw_entropy"] for e in entries]
        rows = np.sort(np.array(rows), axis=1)
        count = -(-rows.shape[1] // 5)
        groups = {"": rows, "anchor_": rows[:, :count], "explorer_": rows[:, -count:]}
        for name, values in groups.items():
            assert line[f"{name}entropy_mean"] == pytest.approx(values.mean())
            assert line[f"{name}entropy_std"] == pytest.approx(values.std())
    lines = named_lines(dynamics_figure(metrics, prefix="", title="Raw, nats").axes[0])
    assert lines["anchors"] == [line["anchor_entropy_mean"] for line in metrics]
    with pytest.raises(TokenWeightsError, match="topk_entropy"):
        entropy_metrics(records, kind="topk")


def test_a_run_shows_the_kinds_that_all_its_responses_have(record, tmp_path):
    early, late = responses(record), responses(record, count=2, length=7)
    late = [replace(entry, step=9) for entry in late]
    path = tmp_path / "tokens.jsonl"
    append_token_records(path, [*early, *late])
    run = run_from_directory(tmp_path)
    assert run.entropies == {"raw": entropy_metrics([*early, *late], kind="raw")}
    assert len(run.records) == len(early) + len(late)
    assert "Attention entropy of other kinds" in run_report_html(run)
    assert "Here they are one" not in run_report_html(run)
    twice = replace(run, entropies=dict.fromkeys(("raw", "topk"), run.entropies["raw"]))
    assert "Here they are one" in run_report_html(twice)
    (panel,) = kinds_figure(run.entropies).axes
    assert named_lines(panel)["anchors"] == [s["anchor_entropy_mean"] for s in run.entropies["raw"]]
    # A step alone is no course, and a response without the column leaves its step out.
    append_token_records(path, [replace(late[0], sample_id=77, columns=None)])
    run = run_from_directory(tmp_path)
    assert run.entropies == {}
    assert "Attention entropy of other kinds" not in run_report_html(run)


def test_dynamics_of_a_resumed_run_count_each_response_once(record):
    early, late = responses(record), responses(record, count=2, length=7)
    late = [replace(entry, step=9) for entry in late]
    stale = [replace(e, attention_entropy=e.attention_entropy[::-1]) for e in (*early, *late)]
    stale = [replace(e, attention_entropy=tuple(v / 2 for v in e.attention_entropy)) for e in stale]
    expected = entropy_metrics([*early, *late])
    assert entropy_metrics([*stale, *early, *late]) == expected
    assert entropy_metrics([*stale[:1], *early, *stale[-1:], *late]) == expected


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_figures_of_records_do_not_follow_the_default_dtype(default, record):
    entries = responses(record)

    def numbers():
        size, distance, local = support_figure(entries).axes
        return (
            named_lines(size),
            bars(distance),
            bars(local),
            entropy_relation_figure(entries).axes[0].get_title(loc="left"),
            [axes.get_title(loc="left") for axes in quadrant_figure(entries).axes],
            entropy_metrics(entries),
        )

    expected, before = numbers(), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert numbers() == expected
    finally:
        torch.set_default_dtype(before)


def test_layers_agree_as_computed():
    scores = torch.rand(3, 2, 30, generator=torch.Generator().manual_seed(0))
    agreement = layer_agreement(scores, torch.ones(2, 30, dtype=torch.bool))
    figure = layer_agreement_figure(agreement, [4, 8, 15])
    tables = (agreement.anchor_jaccard, agreement.explorer_jaccard, agreement.rank_correlation)
    for axes, table in zip(figure.axes, tables, strict=False):
        drawn = axes.collections[0].get_array()
        np.testing.assert_allclose(np.asarray(drawn), table.numpy())
        assert [label.get_text() for label in axes.get_yticklabels()] == ["4", "8", "15"]
        assert axes.texts[0].get_text() == "1.00"


def test_the_relation_has_a_point_per_token_and_the_correlation(record):
    records = responses(record)
    axes = entropy_relation_figure(records).axes[0]
    predictive = np.concatenate([r.predictive_entropy for r in records])
    attention = np.concatenate([r.attention_entropy for r in records])
    np.testing.assert_allclose(axes.collections[0].get_offsets(), np.c_[predictive, attention])
    r = np.corrcoef(predictive, attention)[0, 1]
    assert title(axes) == f"Pearson r = {r:.3f}, layer 2"
    assert "nats" in axes.get_xlabel() and "normalized" in axes.get_ylabel()


def test_many_tokens_are_drawn_as_their_density(record):
    records = responses(record, count=8, length=500)
    figure = entropy_relation_figure(records)
    assert said(figure).startswith("4,000 tokens of 8 distinct responses to 1 prompt")
    assert figure.axes[1].get_ylabel() == "tokens per cell"
    assert np.nansum(figure.axes[0].collections[0].get_array()) == 4000


def test_quadrants_count_the_tokens_between_the_medians(record):
    records = responses(record)
    counts = {}
    for entry in records:
        first, second = np.array(entry.predictive_entropy), np.array(entry.attention_entropy)
        high = first > np.median(first), second > np.median(second)
        for token, x, y in zip(entry.tokens, *high, strict=True):
            counts.setdefault((x, y), {}).setdefault(token, 0)
            counts[x, y][token] += 1
    panels = zip(
        quadrant_figure(records, limit=10).axes,
        [(False, True), (True, True), (False, False), (True, False)],
        strict=True,
    )
    for axes, quadrant in panels:
        assert bars(axes) == counts[quadrant]
        share = sum(counts[quadrant].values()) / 160
        words = [("low", "high")[high] for high in quadrant]
        expected = f"{words[0]} predictive, {words[1]} attention entropy: {share:.0%}"
        assert title(axes) == expected
    assert all(len(bars(axes)) == 2 for axes in quadrant_figure(records, limit=2).axes)


def test_kinds_of_entropy_are_not_mixed(record):
    for draw in (entropy_relation_figure, quadrant_figure):
        with pytest.raises(TokenWeightsError, match="one entropy_kind"):
            draw([record(), record(entropy_kind="raw")])


def test_without_predictive_entropies_nothing_is_drawn(record):
    bare = [record(predictive_entropy=None)]
    for figure in (entropy_relation_figure(bare), quadrant_figure(bare)):
        assert {axes.texts[0].get_text() for axes in figure.axes} == {"not recorded"}
    assert response_figure(bare[0]).axes[1].texts[0].get_text() == "not recorded"


def test_a_response_is_drawn_along_its_positions(record):
    attention, predictive = response_figure(record()).axes
    np.testing.assert_allclose(attention.lines[0].get_ydata(), record().attention_entropy)
    np.testing.assert_allclose(predictive.lines[0].get_ydata(), record().predictive_entropy)
    anchors, explorers = (dots.get_offsets().tolist() for dots in attention.collections)
    assert (anchors, explorers) == ([[1.0, 0.0]], [[5.0, 1.0]])


def test_attention_is_drawn_over_the_context(record):
    entry = record(**ATTENDED)
    chosen, last = attention_map_figure(entry, [3, 4]).axes
    heights = {round(b.get_x() + b.get_width() / 2): b.get_height() for b in chosen.patches[1:]}
    assert heights == {1: 0.5, 3: 0.25, 5: 0.25}
    assert "position 4" in title(chosen) and "3 weights with 100% of its attention" in title(chosen)
    assert "2 weights with 75%" in title(last)
    assert {text.get_text() for text in chosen.texts} == {"1", "The", "\u00b7is"}
    shade = chosen.patches[0]
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (-0.5, 2.5)


def test_attention_of_the_least_and_the_most_spread_token_by_default(record):
    low, high = attention_map_figure(record(**ATTENDED)).axes
    assert "position 3" in title(low) and "position 5" in title(high)


def test_a_response_said_again_counts_once(record):
    records = responses(record, count=2)
    again = [*records, *(replace(r, sample_id=r.sample_id + 9) for r in records)]
    for draw in (entropy_relation_figure, quadrant_figure):
        once, twice = draw(records), draw(again)
        assert title(once.axes[0]) == title(twice.axes[0])
        assert said(once) == said(twice) and "80 tokens of 2 distinct responses" in said(once)
        assert len(once.axes[0].patches) == len(twice.axes[0].patches)
    once, twice = support_figure(records), support_figure(again)
    assert said(once) == said(twice)
    assert bars(once.axes[1]) == bars(twice.axes[1])
    # To another prompt it is another response.
    other = [*records, replace(records[0], prompt="other")]
    assert "120 tokens of 3 distinct responses to 2 prompts" in said(entropy_relation_figure(other))
    assert entropy_metrics(again) == entropy_metrics(records)


def test_support_says_what_its_groups_and_its_window_are(record):
    figure = support_figure(responses(record), kind="raw", first=8)
    assert said(figure).startswith("groups by raw attention entropy, layer 2: 160 tokens of 4")
    assert said(figure).endswith("the first 8 of each")
    assert title(figure.axes[2]) == "Mass within 128 tokens"


def long_record(record, count):
    rng = np.random.default_rng(0)
    places = [tuple(sorted({0, 1, *rng.integers(0, p, 30).tolist()})) for p in range(2, count + 2)]
    values = tuple(rng.random(count).tolist())
    nothing = dict.fromkeys(("weights", "advantages", "log_probs", "group"))
    return record(
        tokens=("x",) * count,
        token_ids=(1,) * count,
        attention_entropy=values,
        predictive_entropy=values,
        prompt_tokens=("?", "?"),
        attended=tuple(places),
        attended_weights=tuple(tuple([1 / len(row)] * len(row)) for row in places),
        **nothing,
    )


@pytest.mark.parametrize("count", [60, 8192])
def test_every_recorded_weight_is_drawn_a_pixel_wide(record, count):
    entry = long_record(record, count)
    figure = attention_map_figure(entry, [count - 1])
    (axes,) = figure.axes
    figure.draw_without_rendering()
    pixel = 72 / figure.dpi  # in points, the unit of widths of lines
    if count > 250:
        (marks,) = axes.collections
        drawn = [path.vertices[0][0] for path in marks.get_paths()]
        assert marks.get_linewidth()[0] >= pixel
    else:
        marks = axes.patches[1:]  # the first shades the prompt
        drawn = [bar.get_x() + bar.get_width() / 2 for bar in marks]
        assert all(bar.get_window_extent().width >= 1 for bar in marks)
    assert sorted(map(round, drawn)) == list(entry.attended[-1])
    top = axes.get_window_extent().y1
    assert axes.texts and all(text.get_window_extent().y1 <= top for text in axes.texts)
    boxes = [text.get_window_extent() for text in axes.texts]
    pairs = [(a, b) for place, a in enumerate(boxes) for b in boxes[:place]]
    assert not any(a.overlaps(b) for a, b in pairs)


def test_long_responses_are_smoothed_with_their_values_behind(record):
    entry = long_record(record, 8192)
    attention, predictive = response_figure(entry).axes
    assert title(attention).endswith("thick: mean over 81 tokens")
    for axes in (attention, predictive):
        raw, mean = (np.asarray(line.get_ydata()) for line in axes.lines)
        np.testing.assert_allclose(raw, entry.attention_entropy)
        np.testing.assert_allclose(mean[4000], raw[3960:4041].mean())
    assert not attention.collections
    assert len(response_figure(long_record(record, 400)).axes[0].lines) == 1


def test_entropies_that_do_not_differ_are_said_and_not_grouped(record):
    flat = record(attention_entropy=(0.5, 0.5, 0.5 + 3e-6, 0.5, 0.5))
    figure = response_figure(flat)
    assert "differ by 3e-06 at most" in said(figure)
    low, high = figure.axes[0].get_ylim()
    assert high - low > 0.05 and not figure.axes[0].collections
    assert said(response_figure(record())) == ""


@pytest.mark.parametrize(("changes", "positions"), [({}, []), (ATTENDED, [5]), (ATTENDED, [-1])])
def test_attention_that_is_not_there_is_refused(changes, positions, record):
    with pytest.raises(TokenWeightsError, match="attention_map_figure"):
        attention_map_figure(record(**changes), positions)


def test_any_token_text_can_be_drawn(record):
    hostile = ("$_{$", "\u4e16\u754c", "\u202e", "\x00", " \n")
    entry = record(
        tokens=hostile,
        prompt_tokens=hostile,
        attended=((0,), (1,), (2,), (3,), (4,)),
        attended_weights=((1.0,),) * 5,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (attention_map_figure(entry, range(5)), quadrant_figure([entry])):
            figure.canvas.draw()


def gradients():
    lines = []
    for step in (1, 51, 101):
        line = {"step": step}
        for number in range(10):
            line[f"gradient/decile_{number}"] = (number - 4 + step / 100) / 10
        for place, subset in enumerate(("anchor", "explorer", "random")):
            for name in ("cosine", "norm_ratio", "projection_ratio", "cosine_std", "cosine_cv"):
                line[f"gradient/{subset}_{name}"] = place + step / 1000 + len(name)
        for place, band in enumerate(("low", "middle", "high")):
            line[f"gradient/{band}_share"] = place / 10 + step / 1000
        lines.append(line)
    return lines


def test_gradients_of_subsets_are_drawn_by_statistic():
    names = {"anchors": "anchor", "explorers": "explorer", "random 20 %": "random"}
    panels = {
        gradient_figure: ("cosine", "norm_ratio", "projection_ratio"),
        dispersion_figure: ("cosine_std", "cosine_cv"),
    }
    for draw, keys in panels.items():
        for axes, key in zip(draw(gradients()).axes, keys, strict=True):
            lines = named_lines(axes)
            assert lines.keys() == names.keys()
            for name, subset in names.items():
                expected = [line[f"gradient/{subset}_{key}"] for line in gradients()]
                assert lines[name] == expected


def test_deciles_are_rows_from_the_bottom_up_and_probes_columns():
    cells, bands, _ = decile_heatmap(gradients()).axes
    table = np.asarray(cells.collections[0].get_array())
    expected = [[line[f"gradient/decile_{n}"] for line in gradients()] for n in range(10)]
    np.testing.assert_allclose(table, expected)
    assert [label.get_text() for label in cells.get_xticklabels()] == ["1", "51", "101"]
    rows = [label.get_text() for label in cells.get_yticklabels()]
    assert rows == [f"D{number}" for number in range(10)]
    low, high = cells.collections[0].get_clim()
    assert low == -high < 0
    assert named_lines(bands)["high: deciles 7-9"][0] == pytest.approx(0.201)


def test_missing_gradients_are_said():
    for figure in (gradient_figure([]), dispersion_figure([]), decile_heatmap([{"step": 1}])):
        assert {axes.texts[0].get_text() for axes in figure.axes} == {"not recorded"}


def test_seeds_of_a_run_are_faint_and_their_mean_is_thick():
    def run(values):
        return [{"step": step, "reward": value} for step, value in enumerate(values)]

    runs = {"full": [run([0.0, 1.0])], "explorers": [run([0.0, 2.0, 9.0]), run([1.0, 4.0])]}
    colors = {"full": "#000000"}
    figure = runs_figure(runs, {"Training reward": "reward", "Nothing": "x"}, colors=colors)
    reward, nothing = figure.axes
    assert named_lines(reward) == {"full": [0.0, 1.0], "explorers": [0.5, 3.0]}
    faint = [list(line.get_ydata()) for line in reward.lines if line.get_alpha() is not None]
    assert faint == [[0.0, 2.0, 9.0], [1.0, 4.0]]
    assert reward.lines[0].get_color() == "#000000"
    assert "mean over seeds" in reward.get_xlabel()
    assert nothing.texts[0].get_text() == "not recorded"


def test_more_than_three_panels_make_rows():
    metrics = [[{"step": 0, "a": 1.0}, {"step": 1, "a": math.nan}]]
    figure = runs_figure({"run": metrics}, {name: "a" for name in "pqrs"})
    assert [title(axes) for axes in figure.axes] == ["p", "q", "r", "s", "", ""]
    assert not figure.axes[4].axison
    figure.canvas.draw()


@pytest.mark.parametrize(("runs", "panels"), [({}, {"a": "b"}), ({"a": [[]]}, {})])
def test_nothing_to_compare_is_refused(runs, panels):
    with pytest.raises(TokenWeightsError, match="runs_figure"):
        runs_figure(runs, panels)

"""Figures of single tokens: both entropies of responses, and what tokens attended to."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.diagnostics import pearson_correlation, quadrant_tokens
from tokenweights.partition import median_quadrants
from tokenweights.report.figures import style
from tokenweights.report.figures.columns import (
    counted,
    distinct,
    layers_of,
    padded,
    token_mask,
    unit_of,
)
from tokenweights.report.figures.panels import (
    draw_bars,
    figure_of,
    moving_mean,
    say_nothing_recorded,
    say_what_of,
)
from tokenweights.report.ranges import flat_range
from tokenweights.report.records import TokenRecord

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

_POINTS = 3000  # more would only cover each other
_FEW = 300
_CELLS = 60
# Beyond so many tokens a line of single values is noise, and a bar is thinner than a pixel.
_DENSE, _SMOOTHED = 400, 100
_THIN = 250
_QUADRANTS = (
    # Quadrant of (predictive, attention) entropy, in reading order from the upper left.
    (2, "low predictive, high attention entropy", style.EXPLORER),
    (3, "high predictive, high attention entropy", style.EXPLORER),
    (0, "low predictive, low attention entropy", style.ANCHOR),
    (1, "high predictive, low attention entropy", style.ANCHOR),
)


@typed
def response_figure(record: TokenRecord) -> "matplotlib.figure.Figure":
    """Attention and predictive entropy along one response (the numbers behind Figure 11).

    Args:
        record: A response.

    Returns:
        A figure with two panels over the same positions; explorers and anchors are dots. Of a long
        response the values lie thin behind their means over about a hundredth of its length.

    Example:
        >>> record = TokenRecord(
        ...     step=0,
        ...     sample_id=0,
        ...     prompt="",
        ...     tokens=("a", "b"),
        ...     token_ids=(0, 1),
        ...     attention_entropy=(0.1, 0.9),
        ...     layer=3,
        ...     entropy_kind="normalized",
        ...     alignment="own",
        ... )
        >>> response_figure(record).axes[0].get_title(loc="left")
        'Attention entropy (normalized), layer 3'
    """
    places = list(range(1, len(record.tokens) + 1))
    with style.figure_style():
        figure = figure_of(width=10.0, height=4.2)
        attention, predictive = figure.subplots(2, 1, sharex=True)
        window = 2 * (len(places) // _SMOOTHED // 2) + 1 if len(places) > _DENSE else 1
        smoothed = f", thick: mean over {window} tokens" if window > 1 else ""
        attention.set_title(
            f"Attention entropy ({unit_of(record.entropy_kind)}), {layers_of([record])}{smoothed}"
        )
        _draw_along(attention, places, record.attention_entropy, style.ALL, window)
        said = flat_range(record)
        if said:
            say_what_of(figure, said)
            middle = sum(record.attention_entropy) / len(places)
            attention.set_ylim(middle - 0.05, middle + 0.05)
        groups = (("anchor", style.ANCHOR), ("explorer", style.EXPLORER))
        for name, color in groups if window == 1 and not said else ():
            members = [
                place for place in places if record.group and record.group[place - 1] == name
            ]
            heights = [record.attention_entropy[place - 1] for place in members]
            attention.scatter(members, heights, s=9, color=color, zorder=3)
        predictive.set_title("Predictive entropy, nats")
        if record.predictive_entropy is None:
            say_nothing_recorded(predictive)
        else:
            _draw_along(predictive, places, record.predictive_entropy, style.ACCENT, window)
        figure.axes[-1].set_xlabel("position in the response")
    return figure


@typed
def attention_map_figure(
    record: TokenRecord, positions: Sequence[int] = ()
) -> "matplotlib.figure.Figure":
    """What single tokens attended to, over the positions of their context (Figure 19).

    Args:
        record: A response with `attended` and `prompt_tokens`.
        positions: Response tokens to draw, counted from 0; by default that of the lowest and that
            of the highest attention entropy in the second half of the response.

    Returns:
        A figure with one panel per token. The prompt is shaded; a title says how much of the
        attention the recorded weights hold, and the largest are named.

    Raises:
        TokenWeightsError: If the record has no attention, or no such token.

    Example:
        >>> record = TokenRecord(
        ...     step=0,
        ...     sample_id=0,
        ...     prompt="?",
        ...     tokens=("a", "b"),
        ...     token_ids=(0, 1),
        ...     attention_entropy=(0.0, 1.0),
        ...     layer=3,
        ...     entropy_kind="normalized",
        ...     alignment="deciding",
        ...     prompt_tokens=("?",),
        ...     attended=((0,), (0, 1)),
        ...     attended_weights=((1.0,), (0.5, 0.5)),
        ... )
        >>> figure = attention_map_figure(record, [1])
        >>> figure.axes[0].get_title(loc="left")
        '“b”, position 2, attention entropy 1.00: 2 weights with 100% of its attention'
    """
    if record.attended is None or record.attended_weights is None or record.prompt_tokens is None:
        hint = "The command `inspect` records it."
        raise invalid("attention_map_figure", "record", "with `attended`", "none", hint)
    count = len(record.tokens)
    if not all(0 <= position < count for position in positions) or count == 0:
        condition, hint = f"below the {count} tokens of the response", "Count from 0."
        raise invalid("attention_map_figure", "positions", condition, list(positions), hint)
    if not positions:
        late = sorted(range(count // 2, count), key=record.attention_entropy.__getitem__)
        positions = list(dict.fromkeys((late[0], late[-1])))
    context = (*record.prompt_tokens, *record.tokens)
    with style.figure_style():
        figure = figure_of(width=10.0, height=0.6 + 2.2 * len(positions))
        grid = figure.subplots(len(positions), 1, sharex=True, squeeze=False).flat
        for axes, position in zip(grid, positions, strict=True):
            _draw_attention(axes, record, position, context)
        figure.axes[-1].set_xlabel("position in the context, prompt shaded")
    return figure


@typed
def entropy_relation_figure(records: Sequence[TokenRecord]) -> "matplotlib.figure.Figure":
    """Predictive against attention entropy, token by token, with their correlation (Figure 9).

    Args:
        records: Responses with predictive entropies, all with one kind of attention entropy.

    Returns:
        A figure with a point for each token; beyond 3,000 tokens with their density. A response
        that occurs several times counts once.

    Raises:
        TokenWeightsError: If kinds are mixed.

    Example:
        >>> entropy_relation_figure([]).axes[0].texts[0].get_text()
        'not recorded'
    """
    records = distinct(records)
    with style.figure_style():
        figure = figure_of(width=8.0, height=3.8)
        axes = figure.subplots()
        found = _both_entropies(records)
        if found is None:
            axes.set_title("Predictive and attention entropy")
            say_nothing_recorded(axes)
            return figure
        attention, predictive, mask = found
        r = float(pearson_correlation(attention, predictive, mask))
        x, y = predictive[mask].numpy(), attention[mask].numpy()
        axes.set_title(f"Pearson r = {r:.3f}, {layers_of(records)}")
        say_what_of(figure, counted(records))
        if len(x) <= _POINTS:
            strength = 0.35 if len(x) > _FEW else 0.8
            axes.scatter(x, y, s=8, color=style.ACCENT, alpha=strength, linewidths=0)
        else:
            options = {"bins": _CELLS, "cmap": style.colormap(), "cmin": 1, "norm": "log"}
            cells = axes.hist2d(x, y, **options)[3]
            bar = figure.colorbar(cells, ax=axes, pad=0.02, aspect=26)
            bar.set_label("tokens per cell")
            bar.outline.set_visible(False)
        axes.margins(x=0.03)
        axes.set_xlabel("predictive entropy, nats")
        axes.set_ylabel(f"attention entropy, {unit_of(records[0].entropy_kind)}")
    return figure


@typed
def quadrant_figure(
    records: Sequence[TokenRecord], *, limit: int = 8
) -> "matplotlib.figure.Figure":
    """The most frequent tokens of each quadrant of the two entropies (Figure 10).

    Quadrants are cut at the medians of each response (Eq. 22). A bar is a token's share of its
    quadrant, with its number of occurrences. A response that occurs several times counts once.

    Args:
        records: Responses with predictive entropies, all with one kind of attention entropy.
        limit: Tokens of a quadrant.

    Returns:
        A figure with four panels.

    Raises:
        TokenWeightsError: If kinds are mixed.

    Example:
        >>> len(quadrant_figure([]).axes)
        4
    """
    records = distinct(records)
    with style.figure_style():
        figure = figure_of(width=9.0, height=1.4 + 0.5 * limit)
        grid = figure.subplots(2, 2).flat
        found = _both_entropies(records)
        texts: dict[int, str] = {}
        frequent = None
        if found is not None:
            attention, predictive, mask = found
            ids = padded(records, lambda record: record.token_ids)
            assert ids is not None
            quadrants = median_quadrants(predictive, attention, mask)
            size = int(ids.max()) + 1 if ids.numel() else 1
            frequent = quadrant_tokens(ids.long(), quadrants, vocab_size=size)
            for record in records:
                texts |= dict(zip(record.token_ids, record.tokens, strict=True))
            say_what_of(figure, f"{counted(records)}, {layers_of(records)}")
        for axes, (quadrant, name, color) in zip(grid, _QUADRANTS, strict=True):
            pairs = [] if frequent is None else frequent.most_frequent(quadrant, limit=limit)
            share = "" if frequent is None else f": {float(frequent.share[quadrant]):.0%}"
            axes.set_title(f"{name}{share}", fontsize=9)
            names = [style.drawable(texts[token]) for token, _ in pairs]
            numbers = [float(count) for _, count in pairs]
            colors = [color] * len(names)
            draw_bars(axes, names, numbers, colors, shown="{:.0f}".format, slots=limit)
    return figure


def _both_entropies(records: Sequence[TokenRecord]) -> tuple[Tensor, Tensor, Tensor] | None:
    kinds = {record.entropy_kind for record in records}
    if len(kinds) > 1:
        hint = "Kinds have different scales: draw a figure for each."
        raise invalid("figures", "records", "with one entropy_kind", sorted(kinds), hint)
    attention = padded(records, lambda record: record.attention_entropy)
    predictive = padded(records, lambda record: record.predictive_entropy)
    if attention is None or predictive is None or not attention.numel():
        return None
    return attention, predictive, token_mask(records)


def _draw_along(
    axes: "Axes", places: Sequence[int], values: Sequence[float], color: str, window: int
) -> None:
    if window == 1:
        axes.plot(places, values, color=color, linewidth=0.9)
        return
    axes.plot(places, values, color=color, linewidth=0.5, alpha=0.25)
    axes.plot(places, moving_mean(values, window), color=color, linewidth=1.4)


def _draw_attention(
    axes: "Axes", record: TokenRecord, position: int, context: Sequence[str]
) -> None:
    assert record.attended is not None and record.attended_weights is not None
    places, weights = record.attended[position], record.attended_weights[position]
    prompt = len(record.prompt_tokens or ())
    label = f" ({record.group[position]})" if record.group else ""
    axes.set_title(
        f"\u201c{style.drawable(record.tokens[position])}\u201d{label}, position {position + 1}, "
        f"attention entropy {record.attention_entropy[position]:.2f}: "
        f"{len(places)} weights with {sum(weights):.0%} of its attention",
        fontsize=9,
        parse_math=False,
    )
    color = style.EXPLORER if label == " (explorer)" else style.ANCHOR
    if prompt:
        axes.axvspan(-0.5, prompt - 0.5, color=style.GRID, alpha=0.5, linewidth=0)
    if len(context) > _THIN:
        axes.vlines(places, 0, weights, color=color, linewidth=1.6)
    else:
        axes.bar(places, weights, width=0.9, color=color, edgecolor=color, linewidth=0.8)
    axes.set_xlim(-0.5, len(context) - 0.5)
    axes.set_ylabel("attention weight")
    largest = sorted(zip(weights, places, strict=True), reverse=True)[:5]
    # A name over each mark; where marks are close, the smaller one's would cover it.
    taken: list[float] = []
    for weight, place in largest:
        text = style.drawable(context[place])
        width = (2.0 + len(text)) / 130 * len(context)
        if any(abs(place - other) < width for other in taken):
            continue
        taken.append(place)
        options = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(text, (place, weight), color=style.INK, parse_math=False, **options)
    axes.set_ylim(0.0, 1.2 * max(weights, default=1.0) or 1.0)

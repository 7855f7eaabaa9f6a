"""Figures of single tokens: both entropies of responses, and what tokens attended to."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.diagnostics import pearson_correlation, quadrant_tokens
from tokenweights.partition import median_quadrants
from tokenweights.report.figures import style
from tokenweights.report.figures.columns import padded, token_mask
from tokenweights.report.figures.panels import draw_bars, figure_of, say_nothing_recorded
from tokenweights.report.records import TokenRecord

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

_POINTS = 3000  # more would only cover each other
_CELLS = 60
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
        A figure with two panels over the same positions; explorers and anchors are dots.

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
        attention.set_title(f"Attention entropy ({unit_of(record)}), {layers_of(record)}")
        attention.plot(places, record.attention_entropy, color=style.ALL, linewidth=0.9)
        for name, color in (("anchor", style.ANCHOR), ("explorer", style.EXPLORER)):
            members = [
                place for place in places if record.group and record.group[place - 1] == name
            ]
            heights = [record.attention_entropy[place - 1] for place in members]
            attention.scatter(members, heights, s=9, color=color, zorder=3)
        predictive.set_title("Predictive entropy, nats")
        if record.predictive_entropy is None:
            say_nothing_recorded(predictive)
        else:
            predictive.plot(places, record.predictive_entropy, color=style.ACCENT, linewidth=0.9)
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
        A figure with a point for each token; beyond 3,000 tokens with their density.

    Raises:
        TokenWeightsError: If kinds are mixed.

    Example:
        >>> entropy_relation_figure([]).axes[0].texts[0].get_text()
        'not recorded'
    """
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
        axes.set_title(f"Pearson r = {r:.3f} over {len(x):,} tokens")
        if len(x) <= _POINTS:
            axes.scatter(x, y, s=8, color=style.ACCENT, alpha=0.35, linewidths=0)
        else:
            options = {"bins": _CELLS, "cmap": style.colormap(), "cmin": 1, "norm": "log"}
            cells = axes.hist2d(x, y, **options)[3]
            bar = figure.colorbar(cells, ax=axes, pad=0.02, aspect=26)
            bar.set_label("tokens per cell")
            bar.outline.set_visible(False)
        axes.margins(x=0.03)
        axes.set_xlabel("predictive entropy, nats")
        axes.set_ylabel(f"attention entropy, {unit_of(records[0])}")
    return figure


@typed
def quadrant_figure(
    records: Sequence[TokenRecord], *, limit: int = 8
) -> "matplotlib.figure.Figure":
    """The most frequent tokens of each quadrant of the two entropies (Figure 10).

    Quadrants are cut at the medians of each response (Eq. 22). A bar is a token's share of its
    quadrant, with its number of occurrences.

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
    with style.figure_style():
        figure = figure_of(width=9.0, height=1.4 + 0.5 * limit)
        grid = figure.subplots(2, 2).flat
        found = _both_entropies(records)
        texts: dict[int, str] = {}
        counted = None
        if found is not None:
            attention, predictive, mask = found
            ids = padded(records, lambda record: record.token_ids)
            assert ids is not None
            quadrants = median_quadrants(predictive, attention, mask)
            size = int(ids.max()) + 1 if ids.numel() else 1
            counted = quadrant_tokens(ids.long(), quadrants, vocab_size=size)
            for record in records:
                texts |= dict(zip(record.token_ids, record.tokens, strict=True))
        for axes, (quadrant, name, color) in zip(grid, _QUADRANTS, strict=True):
            pairs = [] if counted is None else counted.most_frequent(quadrant, limit=limit)
            share = "" if counted is None else f": {float(counted.share[quadrant]):.0%}"
            axes.set_title(f"{name}{share}", fontsize=9)
            names = [style.drawable(texts[token]) for token, _ in pairs]
            numbers = [float(count) for _, count in pairs]
            colors = [color] * len(names)
            draw_bars(axes, names, numbers, colors, shown="{:.0f}".format, slots=limit)
    return figure


def unit_of(record: TokenRecord) -> str:
    """Kind of a record's attention entropy, with its unit if it has one."""
    return "normalized" if record.entropy_kind == "normalized" else f"{record.entropy_kind}, nats"


def layers_of(record: TokenRecord) -> str:
    """The layer or layers of a record in words."""
    layers = record.layer if isinstance(record.layer, tuple) else (record.layer,)
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


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
    axes.bar(places, weights, width=0.9, color=color)
    axes.set_xlim(-0.5, len(context) - 0.5)
    axes.set_ylabel("attention weight")
    largest = sorted(zip(weights, places, strict=True), reverse=True)[:5]
    labels = [(place, weight, style.drawable(context[place])) for weight, place in largest]
    for place, weight, text in labels:
        options = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(text, (place, weight), color=style.INK, parse_math=False, **options)
    axes.margins(y=0.2)

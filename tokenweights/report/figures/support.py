"""Where attention lies: support of token groups, and agreement of layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.attention import EntropyKind
from tokenweights.diagnostics import LayerAgreement, support_concentration
from tokenweights.partition import bottom_fraction, first_tokens, random_fraction, top_fraction
from tokenweights.report.figures import style
from tokenweights.report.figures.columns import (
    LOCAL_MASS,
    counted,
    distinct,
    entropy_of_kind,
    layers_of,
    local_mass_name,
    support_statistics,
    token_mask,
)
from tokenweights.report.figures.panels import (
    Line,
    draw_bars,
    draw_cells,
    draw_lines,
    figure_of,
    say_nothing_recorded,
    say_what_of,
)
from tokenweights.report.records import TokenRecord

if TYPE_CHECKING:
    import matplotlib.figure

_GROUPS = ("explorers", "random 20 %", "all tokens", "anchors")
_COLORS = (style.EXPLORER, style.SECOND, style.ALL, style.ANCHOR)


@typed
def support_figure(
    records: Sequence[TokenRecord], *, kind: EntropyKind = "normalized", first: int | None = None
) -> "matplotlib.figure.Figure":
    """How many keys hold a share of the attention, and how far away they are (Figures 3, 15-18).

    Local mass is the share of the attention at distances below the local window of the records,
    which their column names. A response that occurs several times counts once.
    Anchors and explorers are the bottom and top fifth of each response by the entropy of `kind`;
    the random fifth is drawn with a fixed seed. Values are means over the tokens of a group.

    Args:
        records: Reads the columns `support_size_<mass>`, `mean_distance`, `local_mass_<window>`,
            and `<kind>_entropy` where a record's own is of another kind; the command `inspect`
            writes them all.
        kind: Entropy that makes the groups: `raw` for Figure 16, `topk` for Figure 18.
        first: Only the first so many tokens of each response: 512 for Figure 17.

    Returns:
        A figure with three panels.

    Raises:
        TokenWeightsError: If there is no record, or one without an entropy of this kind.

    Example:
        >>> record = TokenRecord(
        ...     step=0,
        ...     sample_id=0,
        ...     prompt="",
        ...     tokens=("a", "b"),
        ...     token_ids=(0, 1),
        ...     attention_entropy=(0.1, 0.9),
        ...     layer=0,
        ...     entropy_kind="normalized",
        ...     alignment="own",
        ...     columns={"support_size_0.5": (1.0, 4.0), "support_size_0.9": (2.0, 9.0)},
        ... )
        >>> figure = support_figure([record])
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [4.0, 9.0]
    """
    records = distinct(records)
    scores = entropy_of_kind(records, kind)
    if scores is None:
        hint = f"Record a column `{kind}_entropy`, or choose the kind of the records."
        got = f"{len(records)} records"
        raise invalid("support_figure", "records", f"with {kind} entropies", got, hint)
    window = local_mass_name(records).removeprefix(LOCAL_MASS).lstrip("_")
    mask = token_mask(records)
    if first is not None:
        mask = first_tokens(mask, count=first)
    sample_ids = torch.tensor([record.sample_id for record in records])
    groups = (
        top_fraction(scores, mask),
        random_fraction(mask, fraction=0.2, seed=0, sample_ids=sample_ids),
        mask,
        bottom_fraction(scores, mask),
    )
    statistics, masses = support_statistics(records)
    with style.figure_style():
        figure = figure_of(width=10.0, height=3.2)
        size, distance, local = figure.subplots(1, 3, width_ratios=(5, 3, 3))
        size.set_title("Keys that hold a share")
        distance.set_title("Mean distance, tokens")
        local.set_title(f"Mass within {window} tokens" if window else "Local mass")
        part = "" if first is None else f", the first {first} of each"
        groups_of = f"groups by {kind} attention entropy, {layers_of(records)}"
        say_what_of(figure, f"{groups_of}: {counted(records)}{part}")
        if all(value is None for value in vars(statistics).values()):
            for axes in figure.axes:
                say_nothing_recorded(axes)
            return figure
        found = support_concentration(statistics, groups)
        lines = []
        if found.support_size is not None:
            shares = [100 * mass for mass in masses]
            rows = zip(_GROUPS, _COLORS, found.support_size.tolist(), strict=True)
            lines = [Line(name, color, shares, row) for name, color, row in rows]
            size.set_xlabel("share of the attention, %")
        draw_lines(size, lines, from_zero=True)
        if lines:
            size.set_xticks(lines[0].steps)
        spans = ((distance, found.mean_distance, "{:.1f}"), (local, found.local_mass, "{:.1%}"))
        for axes, values, shown in spans:
            names = () if values is None else _GROUPS
            numbers = [] if values is None else values.tolist()
            draw_bars(axes, names, numbers, _COLORS, shown=shown.format)
    return figure


@typed
def layer_agreement_figure(
    agreement: LayerAgreement, layers: Sequence[int]
) -> "matplotlib.figure.Figure":
    """Agreement of every pair of layers: overlap of anchors and of explorers, rank correlation.

    Args:
        agreement: Result of `layer_agreement`.
        layers: Index of each layer.

    Returns:
        A figure with three heat maps.

    Example:
        >>> import torch
        >>> from tokenweights import layer_agreement
        >>> scores, mask = torch.rand(3, 2, 9), torch.ones(2, 9, dtype=torch.bool)
        >>> figure = layer_agreement_figure(layer_agreement(scores, mask), [0, 1, 2])
        >>> [axes.get_title(loc="left") for axes in figure.axes[:3]]
        ['Anchors, Jaccard', 'Explorers, Jaccard', 'Rank correlation']
    """
    tables = (
        ("Anchors, Jaccard", agreement.anchor_jaccard, False),
        ("Explorers, Jaccard", agreement.explorer_jaccard, False),
        ("Rank correlation", agreement.rank_correlation, True),
    )
    names = [str(layer) for layer in layers]
    with style.figure_style():
        figure = figure_of(width=10.0, height=3.2)
        for axes, (title, table, signed) in zip(figure.subplots(1, 3), tables, strict=True):
            axes.set_title(title)
            draw_cells(
                axes,
                table.tolist(),
                rows=names,
                columns=names,
                limits=(-1.0, 1.0) if signed else (0.0, 1.0),
                diverging=signed,
                written=len(layers) <= 6,
            )
            axes.set_xlabel("layer")
    return figure

"""Token traces: a response as HTML, each token's background its attention entropy.

The picture of the paper's Figure 11: the background of a token shows its attention entropy, the bar
under it its predictive entropy. All traces of a page share both scales, so two steps of a run can
be compared by eye. Where attention was recorded, choosing a token shows what it attended to
(Figure 19). A page is one file that loads nothing.
"""

import base64
import math
import struct
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, get_args

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.report.document import (
    asset,
    document_html,
    escaped,
    facts_html,
    filled,
    script_json,
)
from tokenweights.report.ranges import flat_words
from tokenweights.report.records import EntropyKind, TokenGroup, TokenRecord
from tokenweights.report.runs import outer_steps

STYLES = ("trace.css",)
SCRIPTS = ("trace.js", "trace_search.js", "trace_strip.js")


@typed
def token_trace_html(
    *,
    tokens: Sequence[str],
    attention_entropy: Sequence[float],
    predictive_entropy: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    advantages: Sequence[float] | None = None,
    log_probs: Sequence[float] | None = None,
    group: Sequence[TokenGroup] | None = None,
    prompt: str = "",
    prompt_tokens: Sequence[str] | None = None,
    attended: Sequence[Sequence[int]] | None = None,
    attended_weights: Sequence[Sequence[float]] | None = None,
    columns: Mapping[str, Sequence[float]] | None = None,
    title: str = "Token trace",
    caption: str = "",
    entropy_kind: EntropyKind = "normalized",
) -> str:
    """One response as a self-contained HTML page, colored by attention entropy.

    The colors run from the lowest to the highest attention entropy of the response. Hovering or
    focusing a token shows all its values; choosing one, by click or Enter, shows its attention over
    the context if `attended` is given. Token text is shown as text whatever it holds.

    Args:
        tokens: Text of each token.
        attention_entropy: Attention entropy of each token, in nats unless normalized.
        predictive_entropy: Predictive entropy of each token in nats, drawn as a bar from 0.
        weights: Token weights.
        advantages: Advantages before weighting.
        log_probs: Log-probability of each token in nats.
        group: Label of each token; with it the page can show anchors or explorers alone.
        prompt: The prompt as text; left out if there are `prompt_tokens`.
        prompt_tokens: Text of each prompt token.
        attended: For each token the places of its largest attention weights in the context, which
            is `prompt_tokens` followed by `tokens`, counted from 0.
        attended_weights: The attention weights at these places.
        columns: Further numbers of each token, by the name that the page shows.
        title: Title of the page.
        caption: One line that says where the values come from, such as the layer and the row.
        entropy_kind: Variant of the attention entropy, for the legend.

    Returns:
        HTML in one string, to be written as UTF-8.

    Raises:
        TokenWeightsError: A sequence is not as long as `tokens`, a number is not finite, or an
            attended place lies outside the context.

    Example:
        >>> page = token_trace_html(tokens=["1", "<2>"], attention_entropy=[0.2, 0.9])
        >>> "&lt;2&gt;" in page
        True
    """
    trace = _Trace(
        title="Response",
        facts={"tokens": len(tokens), "source": caption or None},
        prompt=prompt,
        tokens=tokens,
        attention_entropy=attention_entropy,
        predictive_entropy=predictive_entropy,
        weights=weights,
        advantages=advantages,
        log_probs=log_probs,
        group=group,
        prompt_tokens=prompt_tokens,
        attended=attended,
        attended_weights=attended_weights,
        columns=columns or {},
    )
    _check(trace)
    body = f"<h1>{escaped(title)}</h1>\n{_section_html([trace], entropy_kind)}"
    return document_html(title=title, body=body, styles=STYLES, scripts=SCRIPTS)


@typed
def trace_page_html(records: Iterable[TokenRecord], *, title: str = "Token traces") -> str:
    """Several responses on one self-contained HTML page, with common color and bar scales.

    Args:
        records: Responses in the order of the page, all with one `entropy_kind`.
        title: Title of the page.

    Returns:
        HTML in one string, to be written as UTF-8.

    Raises:
        TokenWeightsError: There is no record, or the records mix entropy kinds.

    Example:
        >>> record = TokenRecord(
        ...     step=0,
        ...     sample_id=7,
        ...     prompt="1+1=",
        ...     tokens=("2",),
        ...     token_ids=(5,),
        ...     attention_entropy=(0.8,),
        ...     weights=(1.0,),
        ...     advantages=(0.7,),
        ...     layer=2,
        ...     entropy_kind="normalized",
        ...     alignment="deciding",
        ... )
        >>> "step 0" in trace_page_html([record]).lower()
        True
    """
    body = f"<h1>{escaped(title)}</h1>\n{traces_html(tuple(records))}"
    return document_html(title=title, body=body, styles=STYLES, scripts=SCRIPTS)


def traces_html(records: Sequence[TokenRecord]) -> str:
    """The part of a page that holds traces; the page needs `STYLES` and `SCRIPTS`."""
    kinds = {record.entropy_kind for record in records}
    if len(kinds) != 1:
        hint = "Kinds have different scales: make a page for each."
        got = sorted(kinds) or "no record"
        raise invalid("trace_page_html", "records", "with one entropy_kind", got, hint)
    # One response at several layers, as the command `inspect` shows it, or several responses.
    one_step = len(records) > 1 and len({record.step for record in records}) == 1
    by_layer = one_step and len({record.layer for record in records}) == len(records)
    traces = [_trace_of(record, by_layer=by_layer) for record in records]
    return _section_html(traces, records[0].entropy_kind)


def first_and_last(records: Iterable[TokenRecord]) -> tuple[TokenRecord, ...]:
    """One response of the first step and one of the last, to the same prompt if there is one.

    Nothing is picked by hand: the first prompt of the first step that the last step has too, and
    for each step the first response to it.
    """
    outer = outer_steps(records)
    if not outer or outer[0].step == outer[-1].step:
        return outer[:1]
    first = [record for record in outer if record.step == outer[0].step]
    last = [record for record in outer if record.step == outer[-1].step]
    answered = {record.prompt: record for record in reversed(last)}
    common = [record for record in first if record.prompt in answered]
    return (common[0], answered[common[0].prompt]) if common else (first[0], last[0])


@dataclass(frozen=True)
class _Trace:
    title: str
    facts: dict[str, object]
    prompt: str
    tokens: Sequence[str]
    attention_entropy: Sequence[float]
    predictive_entropy: Sequence[float] | None
    weights: Sequence[float] | None
    advantages: Sequence[float] | None
    log_probs: Sequence[float] | None
    group: Sequence[TokenGroup] | None
    prompt_tokens: Sequence[str] | None
    attended: Sequence[Sequence[int]] | None
    attended_weights: Sequence[Sequence[float]] | None
    columns: Mapping[str, Sequence[float]]
    token_ids: Sequence[int] | None = None
    reads_own_row: bool = False


def _trace_of(record: TokenRecord, *, by_layer: bool) -> _Trace:
    layers = record.layer if isinstance(record.layer, tuple) else (record.layer,)
    layer = "layers" if len(layers) > 1 else "layer"
    indices = ", ".join(map(str, layers))
    facts = {
        "reward": None if record.reward is None else f"{record.reward:g}".replace("-", "\u2212"),
        "tokens": len(record.tokens),
        layer: None if by_layer else indices,
        "row": record.alignment,
        "sample": None if by_layer else record.sample_id,
    }
    return _Trace(
        title=f"{layer.capitalize()} {indices}" if by_layer else f"Step {record.step}",
        facts=facts,
        prompt=record.prompt,
        tokens=record.tokens,
        attention_entropy=record.attention_entropy,
        predictive_entropy=record.predictive_entropy,
        weights=record.weights,
        advantages=record.advantages,
        log_probs=record.log_probs,
        group=record.group,
        prompt_tokens=record.prompt_tokens,
        attended=record.attended,
        attended_weights=record.attended_weights,
        columns=record.columns or {},
        token_ids=record.token_ids,
        reads_own_row=record.alignment == "own",
    )


def _check(trace: _Trace) -> None:
    count = len(trace.tokens)
    columns = {name: getattr(trace, name) for name in _COLUMNS}
    columns |= {f"columns[{name!r}]": values for name, values in trace.columns.items()}
    for name, values in columns.items():
        if values is None:
            continue
        if len(values) != count:
            expected, got = f"as long as `tokens` ({count})", f"{len(values)} values"
            raise invalid("token_trace_html", name, expected, got, "Pass one value per token.")
        kinds = get_args(TokenGroup)
        for position, value in enumerate(values):
            if value not in kinds if name == "group" else not math.isfinite(value):
                condition = f"one of {kinds}" if name == "group" else "finite"
                got, hint = f"{value!r} at position {position}", "Leave out a column with gaps."
                raise invalid("token_trace_html", name, f"to be {condition}", got, hint)
    if trace.attended is None:
        return
    places, weights = trace.attended, trace.attended_weights or ()
    size = len(trace.prompt_tokens or ()) + count
    if len(places) != count or list(map(len, places)) != list(map(len, weights)):
        condition = f"{count} rows, with a row of `attended_weights` as long as each"
        got = f"{len(places)} and {len(weights)} rows"
        raise invalid("token_trace_html", "attended", condition, got, "Pass both for every token.")
    if not all(0 <= place < size for row in places for place in row):
        condition = f"places in the context of {size} tokens"
        hint = "Count `prompt_tokens` first, then `tokens`, from 0."
        raise invalid("token_trace_html", "attended", condition, "others", hint)
    if not all(0 <= weight <= 1 for row in weights for weight in row):
        hint = "Weights are shares of the attention mass."
        raise invalid("token_trace_html", "attended_weights", "in [0, 1]", "others", hint)


def _section_html(traces: Sequence[_Trace], kind: EntropyKind) -> str:
    entropies = [value for trace in traces for value in trace.attention_entropy]
    bars = [value for trace in traces for value in trace.predictive_entropy or ()]
    low, high = min(entropies, default=0.0), max(entropies, default=1.0)
    top = max(bars, default=0.0)
    flat = flat_words(entropies)
    scale = (low, low) if flat else (low, high)
    prompts = {_prompt_html(trace) for trace in traces}
    shared = prompts.pop() if len(prompts) == 1 else None
    # Many long responses at once are slow to lay out, and nobody reads them side by side.
    crowded = len(traces) > 2 and len(entropies) > _SIDE_BY_SIDE
    has_attention = any(trace.attended is not None for trace in traces)
    return filled(
        "traces.html",
        entropy_label=_LABELS[kind],
        flat=f'<p class="quiet">Not coloured: {escaped(flat)}.</p>' if flat else "",
        entropy_low=f"{low:.2f}",
        entropy_middle=f"{(low + high) / 2:.2f}",
        entropy_high=f"{high:.2f}",
        predictive_scale=filled("trace_bars.html", top=f"{top:.2f} nats") if bars else "",
        filter=asset("trace_filter.html") if any(trace.group for trace in traces) else "",
        picker=_picker_html(traces, crowded) if len(traces) > 1 else "",
        strip_help="; click or Enter for its attention" if has_attention else "",
        strip=asset("trace_strip.html") if has_attention else "",
        prompt=shared or "",
        traces="\n".join(
            filled(
                "trace.html",
                hidden=" hidden" if crowded and number else "",
                title=escaped(trace.title),
                facts=facts_html(trace.facts),
                prompt="" if shared is not None else _prompt_html(trace),
                tokens=_tokens_html(trace, low=scale[0], high=scale[1], top=top),
                data=_data_json(trace, kind),
            )
            for number, trace in enumerate(traces)
        ),
    )


def _picker_html(traces: Sequence[_Trace], crowded: bool) -> str:
    chosen = ' selected=""'
    options = [f'<option value="all"{"" if crowded else chosen}>all responses</option>']
    for number, trace in enumerate(traces):
        sample = trace.facts.get("sample")
        label = trace.title if sample is None else f"{trace.title}, sample {sample}"
        mark = chosen if crowded and number == 0 else ""
        options.append(f'<option value="{number}"{mark}>{escaped(label)}</option>')
    return filled("trace_picker.html", options="".join(options))


def _prompt_html(trace: _Trace) -> str:
    if trace.prompt_tokens is None:
        text = escaped(trace.prompt)
    else:
        # In the text of a prompt line breaks break lines; the marks are for tokens of the response.
        spans = (f'<span class="context">{escaped(token)}</span>' for token in trace.prompt_tokens)
        text = "".join(spans)
    return f'<p class="trace-prompt" dir="auto">{text}</p>' if text else ""


def _tokens_html(trace: _Trace, *, low: float, high: float, top: float) -> str:
    parts: list[str] = []
    before = ""
    for position, token in enumerate(trace.tokens):
        style = f"--e:{_share(trace.attention_entropy[position], low, high):.3g}"
        if trace.predictive_entropy is not None:
            style += f";--p:{_share(trace.predictive_entropy[position], 0.0, top):.3g}"
        group = f' data-group="{trace.group[position]}"' if trace.group is not None else ""
        # A line may break before a token, but not inside a word that spans several tokens.
        if not (before[-1:].isalnum() and token[:1].isalnum()):
            parts.append("<wbr>")
        parts.append(f'<span class="token"{group} style="{style}">{_token_text_html(token)}</span>')
        parts.append("<br>" * token.count("\n"))
        before = token
    return "".join(parts)


def _token_text_html(token: str) -> str:
    """A token as HTML in which nothing is invisible: white space has marks, an empty token too."""
    if not token.strip(" \t\n"):
        marks = "".join(_MARKS[character] for character in token) or _EMPTY
        return f'<i class="token-mark">{marks}</i>'
    text = token.replace(" ", "\u00a0").replace("\n", _MARKS["\n"]).replace("\t", _MARKS["\t"])
    # A combining character alone would change the letter of the token before it.
    return escaped("\u25cc" + text if unicodedata.combining(text[0]) else text)


def _data_json(trace: _Trace, kind: EntropyKind) -> str:
    nats = "" if kind == "normalized" else "nats"
    columns = (
        ("group", trace.group, ""),
        ("attention entropy", trace.attention_entropy, nats),
        ("predictive entropy", trace.predictive_entropy, "nats"),
        ("weight", trace.weights, ""),
        ("advantage", trace.advantages, ""),
        ("log-probability", trace.log_probs, "nats"),
        *((name.replace("_", " "), values, "") for name, values in trace.columns.items()),
        ("token id", trace.token_ids, ""),
    )
    return script_json(
        {
            "length": len(trace.tokens),
            "attention": _attention_data(trace),
            "columns": [
                {"label": label, "unit": unit, "values": [_rounded(value) for value in values]}
                for label, values, unit in columns
                if values is not None
            ],
        }
    )


def _attention_data(trace: _Trace) -> dict[str, Any] | None:
    """Places and weights as packed numbers: a row of 32 takes 128 characters or 192, not 500."""
    if trace.attended is None or trace.attended_weights is None:
        return None
    prompt = len(trace.prompt_tokens or ())
    wide = prompt + len(trace.tokens) > 2**16
    shares = chain.from_iterable(trace.attended_weights)
    return {
        "prompt": prompt,
        "own": trace.reads_own_row,
        "wide": wide,
        "counts": _packed(map(len, trace.attended), "I"),
        "places": _packed(chain.from_iterable(trace.attended), "I" if wide else "H"),
        "weights": _packed((round(min(share, 1.0) * _WEIGHT_STEPS) for share in shares), "H"),
    }


def _packed(numbers: Iterable[int], code: str) -> str:
    """Base64 of little-endian unsigned integers, 2 bytes each for `H` and 4 for `I`."""
    values = list(numbers)
    return base64.b64encode(struct.pack(f"<{len(values)}{code}", *values)).decode("ascii")


def _rounded(value: float | str) -> float | str:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _share(value: float, low: float, high: float) -> float:
    """Where `value` lies between the ends of a scale; the middle when the ends are equal."""
    return (value - low) / (high - low) if high > low else 0.5


_COLUMNS = (
    "attention_entropy",
    "predictive_entropy",
    "weights",
    "advantages",
    "log_probs",
    "group",
)
_SIDE_BY_SIDE = 4000  # tokens
_WEIGHT_STEPS = 2**16 - 1
_MARKS = {" ": "\u00b7", "\t": "\u21e5", "\n": "\u21b5"}
_EMPTY = "\u2205"
_LABELS = {
    "raw": "Attention entropy, nats",
    "normalized": "Attention entropy, normalized",
    "topk": "Attention entropy of the top k keys, nats",
    "fixed": "Attention entropy of the first keys, nats",
}

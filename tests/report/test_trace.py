import base64
import itertools
import json
import math
import re
import struct
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenweights import TokenWeightsError
from tokenweights.report import token_trace_html, trace_page_html
from tokenweights.report.document import asset, script_json
from tokenweights.report.trace import SCRIPTS, first_and_last

HOSTILE = [
    "<script>alert(1)</script>",
    "</script>",
    "</style>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "-->",
    "]]>",
    "&lt;b&gt;",
    "$title",
    "\u202eevil",
    "\u2066x",
    "\x00\x1b[31m",
    "\x85\u2028",
    "\ud83d",
    "\u200b",
]


class Page(HTMLParser):
    """The tags of a page, the text of its tokens, and what its scripts hold."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.tokens, self.scripts, self.texts = [], [], [], []
        self.inside = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "span" and dict(attrs).get("class") == "token":
            self.inside = "token"
            self.tokens.append("")
        elif tag == "script":
            self.inside = "script"
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag):
        if tag in ("span", "script"):
            self.inside = None

    def handle_data(self, data):
        if self.inside == "token":
            self.tokens[-1] += data
        elif self.inside == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        else:
            self.texts.append(data)


def page_of(tokens, **options):
    entropy = [position / max(1, len(tokens) - 1) for position in range(len(tokens))]
    return token_trace_html(tokens=tokens, attention_entropy=entropy, **options)


def structure(page):
    """What a browser would act on: all tags with their attributes, less breaks and marks."""
    marks = ("br", []), ("wbr", []), ("i", [("class", "token-mark")])
    tags = [(tag, sorted(attrs.items())) for tag, attrs in page.tags]
    return [tag for tag in tags if tag not in marks]


def test_background_and_bar_follow_the_entropies():
    page = Page(
        token_trace_html(
            tokens=["a", "b", "c"],
            attention_entropy=[0.2, 0.4, 0.6],
            predictive_entropy=[0.0, 3.0, 1.5],
            group=["anchor", "middle", "explorer"],
        )
    )
    spans = [attrs for _, attrs in page.tags if attrs.get("class") == "token"]
    assert [span["style"] for span in spans] == ["--e:0;--p:0", "--e:0.5;--p:1", "--e:1;--p:0.5"]
    assert [span["data-group"] for span in spans] == ["anchor", "middle", "explorer"]
    assert {"0.20", "0.40", "0.60", "3.00 nats"} <= set(page.texts)


def test_all_traces_of_a_page_share_both_scales(record):
    low = record(attention_entropy=(0.0,) * 5, predictive_entropy=(1.0,) * 5)
    high = record(attention_entropy=(0.5,) * 5, predictive_entropy=(4.0,) * 5)
    page = Page(trace_page_html([low, high]))
    styles = [attrs["style"] for _, attrs in page.tags if attrs.get("class") == "token"]
    assert styles == ["--e:0;--p:0.25"] * 5 + ["--e:1;--p:1"] * 5


def test_the_tooltip_has_every_value_of_every_token(record):
    page = Page(trace_page_html([record(log_probs=(-0.123456789, -0.2, -3.0, -0.4, -0.5))]))
    data = [json.loads(text) for kind, text in page.scripts if kind == "application/json"]
    assert len(data) == 1 and data[0]["length"] == 5
    columns = {column["label"]: (column["unit"], column["values"]) for column in data[0]["columns"]}
    assert columns == {
        "group": ("", ["anchor", "middle", "middle", "middle", "explorer"]),
        "attention entropy": ("", [0.0, 0.25, 0.5, 0.75, 1.0]),
        "predictive entropy": ("nats", [0.0, 0.1, 2.0, 0.3, 0.4]),
        "weight": ("", [1.0, 0.9, 0.5, 0.25, 0.0]),
        "advantage": ("", [0.5, 0.5, 0.5, 0.5, -0.5]),
        "log-probability": ("nats", [-0.12346, -0.2, -3.0, -0.4, -0.5]),
        "token id": ("", [5, 81, 12, 9, 1]),
    }


def test_a_page_names_what_was_read(record):
    texts = Page(trace_page_html([record(layer=(3, 4), alignment="own", reward=-2.0)])).texts
    assert {"Step 3", "3, 4", "own", "\u22122", "5"} <= set(texts)
    assert "Attention entropy, nats" in Page(trace_page_html([record(entropy_kind="raw")])).texts


def test_layers_of_one_response_are_told_apart_by_layer(record):
    page = trace_page_html([record(layer=layer) for layer in (1, 2)])
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["Layer 1", "Layer 2"]
    page = trace_page_html([record(layer=1, step=0), record(layer=2, step=1)])
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["Step 0", "Step 1"]


def test_optional_columns_leave_no_trace_when_missing(record):
    page = trace_page_html([record(predictive_entropy=None, log_probs=None, group=None)])
    body = page[page.index("<body>") : page.index('"use strict"')]
    assert "predictive" not in body and "log-prob" not in body and "trace-filter" not in body


def test_nothing_in_a_token_is_invisible():
    tokens = [" ", "\n", "\n\n", "\t", " \n", "", " the", "a b", "x\ty", ".\n", "\u0301", "\r\n"]
    assert Page(page_of(tokens)).tokens == [
        "\u00b7",
        "\u21b5",
        "\u21b5\u21b5",
        "\u21e5",
        "\u00b7\u21b5",
        "\u2205",
        "\u00a0the",
        "a\u00a0b",
        "x\u21e5y",
        ".\u21b5",
        "\u25cc\u0301",
        "\u240d\u21b5",
    ]
    assert page_of(["a\nb\n"]).count("<br>") == 2


def test_hostile_text_is_shown_and_never_markup():
    harmless = Page(page_of(["x"] * len(HOSTILE), prompt="x", title="x", caption="x"))
    everywhere = "".join(HOSTILE)
    text = page_of(HOSTILE, prompt=everywhere, title=everywhere, caption=everywhere)
    page = Page(text)
    assert structure(page) == structure(harmless)
    assert page.tokens[:11] == [token.replace(" ", "\u00a0") for token in HOSTILE[:11]]
    assert page.tokens[11:] == [
        "\u27e8U+202E\u27e9evil",
        "\u27e8U+2066\u27e9x",
        "\u2400\u241b[31m",
        "\u27e8U+0085\u27e9\u27e8U+2028\u27e9",
        "\u27e8U+D83D\u27e9",
        "\u27e8U+200B\u27e9",
    ]
    # UTF-8 refuses lone surrogates: a page must be writable.
    text.encode("utf-8")


@given(st.lists(st.text(st.characters(exclude_categories=())), min_size=1, max_size=5), st.text())
def test_any_text_leaves_the_structure_as_it_is(tokens, prompt):
    page = page_of(tokens, prompt="." + prompt)
    assert structure(Page(page)) == structure(Page(page_of(["x"] * len(tokens), prompt="x")))
    page.encode("utf-8")


@given(st.recursive(st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists))
def test_embedded_json_cannot_leave_its_script(value):
    text = script_json([*HOSTILE, value])
    assert not set("<>&") & set(text)
    assert json.loads(text) == [*HOSTILE, value]


def test_a_page_loads_nothing_and_runs_one_script_only(record):
    text = trace_page_html([record()])
    page = Page(text)
    assert not [a for _, attrs in page.tags for a in attrs if a in ("src", "href", "srcset")]
    assert "url(" not in text and "@import" not in text
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';") and "script-src 'sha256-" in policy
    code = [script for kind, script in page.scripts if kind is None]
    assert code == ["\n".join(map(asset, SCRIPTS))]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function", code[0]
    )


def test_8192_tokens_stay_under_five_megabytes(record):
    count = 8192
    values = tuple(-math.pi * 1e-5 / (1 + position) for position in range(count))
    entry = record(
        tokens=(" <token>",) * count,
        token_ids=(151_000,) * count,
        attention_entropy=tuple(map(abs, values)),
        weights=tuple(map(abs, values)),
        advantages=values,
        predictive_entropy=tuple(map(abs, values)),
        log_probs=values,
        group=("explorer",) * count,
    )
    assert len(trace_page_html([entry]).encode("utf-8")) < 5_000_000


def test_sequences_must_fit_and_be_finite(record):
    with pytest.raises(TokenWeightsError, match=r"`weights` as long as `tokens` \(2\)"):
        token_trace_html(tokens=["a", "b"], attention_entropy=[0.0, 1.0], weights=[1.0])
    with pytest.raises(TokenWeightsError, match=r"`attention_entropy` to be finite.*position 1"):
        token_trace_html(tokens=["a", "b"], attention_entropy=[0.0, math.nan])
    with pytest.raises(TokenWeightsError, match="one entropy_kind"):
        trace_page_html([record(), record(entropy_kind="raw")])
    with pytest.raises(TokenWeightsError, match="no record"):
        trace_page_html([])


def test_first_and_last_prefers_a_common_prompt(record):
    entries = [
        record(step=step, sample_id=sample, prompt=prompt)
        for step, sample, prompt in [
            (1, 0, "b"),
            (0, 1, "a"),
            (0, 2, "b"),
            (0, 3, "b"),
            (2, 4, "c"),
            (2, 5, "b"),
            (2, 6, "b"),
        ]
    ]
    assert [entry.sample_id for entry in first_and_last(iter(entries))] == [2, 5]
    assert [entry.sample_id for entry in first_and_last(entries[:5])] == [1, 4]
    assert [entry.sample_id for entry in first_and_last(entries[1:4])] == [1]
    assert first_and_last([]) == ()


def colour(text):
    """OKLab lightness and axes of a `#rrggbb` or `oklch(...)` colour."""
    if text.startswith("#"):
        channels = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
        )
        long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
        medium = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
        short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
        return (
            0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
            1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
            0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
        )
    lightness, chroma, hue = map(float, re.findall(r"[\d.]+", text))
    return (
        lightness,
        chroma * math.cos(math.radians(hue)),
        chroma * math.sin(math.radians(hue)),
    )


def luminance(lab):
    lightness, a, b = lab
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short
    green = -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short
    blue = -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_ramp_is_ordered_by_lightness_and_text_on_it_is_readable():
    def declared(name, sheet):
        return [colour(text) for text in re.findall(rf"--{name}: ([^;]+);", asset(sheet))]

    schemes = zip(
        declared("ink", "document.css"),
        declared("low", "trace.css"),
        declared("high", "trace.css"),
        strict=True,
    )
    directions = []
    for ink, low, high in schemes:
        ramp = [
            tuple(a + (b - a) * share / 20 for a, b in zip(low, high, strict=True))
            for share in range(21)
        ]
        lights = [luminance(step) for step in ramp]
        steps = [after - before for before, after in itertools.pairwise(lights)]
        assert all(step > 0 for step in steps) or all(step < 0 for step in steps)
        directions.append(steps[0] > 0)
        for light in lights:
            bright, dark = max(light, luminance(ink)), min(light, luminance(ink))
            # WCAG 2 level AA for body text.
            assert (bright + 0.05) / (dark + 0.05) >= 4.5
    assert directions == [False, True]


def test_attention_is_packed_row_by_row(record):
    rows = ((0,), (), (1, 70_000), (2,), (0, 1))
    weights = ((1.0,), (), (0.25, 0.5), (0.125,), (1.0000001, 0.0))
    entry = record(
        prompt_tokens=("x",) * 70_000, attended=rows, attended_weights=weights, alignment="own"
    )
    page = Page(trace_page_html([entry]))
    (data,) = (json.loads(text)["attention"] for kind, text in page.scripts if kind)

    def unpacked(name, code):
        data_bytes = base64.b64decode(data[name])
        return struct.unpack(f"<{len(data_bytes) // struct.calcsize(code)}{code}", data_bytes)

    assert (data["prompt"], data["own"], data["wide"]) == (70_000, True, True)
    assert unpacked("counts", "I") == (1, 0, 2, 1, 2)
    assert unpacked("places", "I") == (0, 1, 70_000, 2, 0, 1)
    shares = [count / 65535 for count in unpacked("weights", "H")]
    assert shares == pytest.approx([1, 0.25, 0.5, 0.125, 1, 0], abs=1e-5)


@pytest.mark.parametrize(
    ("attended", "weights", "words"),
    [
        ([(0,)], [(1.0,)], "2 rows"),
        ([(0,), (0,)], [(1.0,), ()], "2 rows"),
        ([(0,), (0,)], None, "2 rows"),
        ([(0,), (3,)], [(1.0,), (1.0,)], "context of 3 tokens"),
        ([(0,), (-1,)], [(1.0,), (1.0,)], "context of 3 tokens"),
        ([(0,), (0,)], [(1.0,), (1.5,)], r"in \[0, 1\]"),
        ([(0,), (0,)], [(1.0,), (math.nan,)], r"in \[0, 1\]"),
    ],
)
def test_attention_must_fit_the_context(attended, weights, words):
    with pytest.raises(TokenWeightsError, match=words):
        page_of(["a", "b"], prompt_tokens=["?"], attended=attended, attended_weights=weights)


@pytest.mark.parametrize("made", [np.array, torch.tensor])
def test_a_trace_takes_arrays_and_tensors(made):
    numbers = {
        "attention_entropy": [0.25, 1.0],
        "predictive_entropy": [0.5, 2.0],
        "weights": [1.0, 0.0],
        "advantages": [-0.5, 0.5],
        "log_probs": [-0.25, -4.0],
        "attended": [[0, 1], [1, 2]],
        "attended_weights": [[0.25, 0.75], [0.5, 0.5]],
    }
    texts = {"tokens": ["a", "b"], "prompt_tokens": ["?"]}
    given = {name: made(values) for name, values in numbers.items()}
    page = token_trace_html(**texts, **given, columns={"distance": made([2.0, 0.5])})
    assert page == token_trace_html(**texts, **numbers, columns={"distance": [2.0, 0.5]})
    with pytest.raises(TokenWeightsError, match=r"`weights` as long as `tokens` \(2\)"):
        token_trace_html(**texts, **(given | {"weights": made([1.0])}))


@pytest.mark.parametrize("place", range(7))
def test_every_item_of_a_column_is_looked_at(place):
    column = [0.5] * place + ["0.5"] + [0.5] * (6 - place)
    for _ in range(3):
        with pytest.raises(TypeError, match="`token_trace_html`: expected `weights`"):
            token_trace_html(tokens=["a"] * 7, attention_entropy=[0.5] * 7, weights=column)


def test_columns_must_fit():
    with pytest.raises(TokenWeightsError, match=r"columns\['support'\]"):
        page_of(["a", "b"], columns={"support": [1.0]})


def test_of_many_long_responses_the_first_is_shown(record):
    def shown(count, length):
        values = tuple(map(float, range(length)))
        nothing = dict.fromkeys(("weights", "advantages", "predictive_entropy", "log_probs"))
        entries = [
            record(
                sample_id=sample,
                tokens=("x",) * length,
                token_ids=(0,) * length,
                attention_entropy=values,
                group=None,
                **nothing,
            )
            for sample in range(count)
        ]
        tags = Page(trace_page_html(entries)).tags
        traces = [attrs for tag, attrs in tags if tag == "article"]
        options = [attrs for tag, attrs in tags if tag == "option"]
        chosen = [attrs["value"] for attrs in options if "selected" in attrs]
        return ["hidden" not in attrs for attrs in traces], chosen

    assert shown(3, 1500) == ([True, False, False], ["0"])
    assert shown(3, 100) == ([True] * 3, ["all"])
    assert shown(2, 3000) == ([True] * 2, ["all"])
    assert shown(1, 10) == ([True], [])


@pytest.mark.parametrize(
    ("reward", "number"), [(1.0, "1"), (-1.0, "\u22121"), (-2.0, "\u22122"), (0.5, "0.5")]
)
def test_a_trace_says_its_reward_and_not_what_an_unknown_function_means(record, reward, number):
    texts = Page(trace_page_html([record(reward=reward)])).texts
    assert texts[texts.index("reward") + 1] == number


def test_entropies_that_do_not_differ_are_said_and_not_coloured(record):
    flat = record(attention_entropy=(0.5, 0.5, 0.5 + 3e-6, 0.5, 0.5))
    page = trace_page_html([flat])
    assert "Not coloured: attention entropies differ by 3e-06" in page
    shares = re.findall(r'class="token"[^>]*style="--e:([^;"]+)', page)
    assert len(shares) == 5 and len(set(shares)) == 1
    assert "Not coloured" not in trace_page_html([record()])

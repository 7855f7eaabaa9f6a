"""A boxed answer in a megabyte that a policy repeats, against one plain pass over the characters.

A policy that collapsed repeats anything up to its longest response, unclosed boxes included.
"""

import random
import statistics
import time

import pytest

import tokenweights as tw

SIZE, RUNS = 1_000_000, 3
UNITS = [
    *("{", "}", "\\", "\\{", "\\}", "\\\\", "{}", "}{", "{{}", "{}}", "{{}}", "{{{{{{{}}}}}}}"),
    *("\\boxed{", "\\boxed{{", "\\boxed{a", "\\boxed{a}", "\\boxed{{}", "\\boxed{\\}", "\\boxed"),
    *("\\boxed{{{{}}}}", "\\\\boxed{", "a", "\u00e9", "a\u00e9", "\U0001d465", "\ud83d", "\n"),
]
FRAMES = [("", ""), ("\\boxed{", ""), ("\\boxed{", "}"), ("\\boxed{{", "}"), ("\\boxed{", "}}")]


def repeated():
    """Texts of one megabyte: a unit over and over, alone and within a box that may close."""
    for unit in UNITS:
        for before, after in FRAMES:
            yield before + unit * ((SIZE - len(before + after)) // len(unit)) + after


def drawn():
    """Braces without a pattern, all of them inside one box."""
    generator = random.Random(0)
    yield "\\boxed{" + "".join(generator.choices("{}", weights=(51, 49), k=SIZE))
    yield "\\boxed{" + "{" * (SIZE // 2) + "}" * (SIZE // 2 + 1)


def counted():
    """Pieces that differ, each of which has to be read on its own."""
    yield "".join(f"\\boxed{{{{{number}}}" for number in range(SIZE // 15))


def in_one_pass(text):
    """The same value, by a stack of open braces and one step for each character."""
    stack, best, place = [], None, 0
    while place < len(text):
        character = text[place]
        if character == "\\":
            if text.startswith("\\boxed{", place):
                place += 7
                stack.append(place)
                continue
            # An escaped backslash may be that of a box.
            place += 1 + (text[place + 1 : place + 2] in ("{", "}", "\\"))
            if text.startswith("boxed{", place) and text[place - 1] == "\\":
                place += 6
                stack.append(place)
            continue
        if character == "{":
            stack.append(None)
        elif character == "}" and stack:
            start = stack.pop()
            if start is not None and (best is None or start > best[0]):
                best = start, place
        place += 1
    return None if best is None else text[slice(*best)].strip()


def seconds(function, *arguments):
    start = time.process_time()
    value = function(*arguments)
    return time.process_time() - start, value


@pytest.mark.parametrize("texts", [repeated, drawn, counted])
def test_boxed_answer(benchmark, texts):
    slowest, ratios = 0.0, []
    for text in texts():
        plain, expected = seconds(in_one_pass, text)
        assert tw.boxed_answer(text) == expected
        own = statistics.median(seconds(tw.boxed_answer, text)[0] for _ in range(RUNS))
        ratios.append(plain / own)
        slowest = max(slowest, own)
    ratio = statistics.median(ratios)
    benchmark.extra_info["one plain pass / boxed_answer (median)"] = round(ratio, 1)
    benchmark.extra_info["slowest, ms per megabyte"] = round(1e3 * slowest, 1)
    print(
        f"\n{texts.__name__}: one plain pass / boxed_answer {ratio:.1f} (median), "
        f"{min(ratios):.1f} (least); slowest {1e3 * slowest:.0f} ms per megabyte"
    )
    benchmark.pedantic(tw.boxed_answer, args=(text,), rounds=3)

"""A trace of 8,192 tokens: how long it takes to write, and a headless Chromium to load.

Loading is compared with a page that holds the same text without anything else, in the same browser.
"""

import sys
from pathlib import Path

import pytest

from tokenweights.report import token_trace_html

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from browser import started

TOKENS, KEPT = 8192, 32
LOADED = "return performance.getEntriesByType('navigation')[0].loadEventEnd"


def tokens():
    return [" token" if place % 16 else ".\n" for place in range(1, TOKENS + 1)]


def trace():
    values = [(place * 37 % 101) / 100 for place in range(TOKENS)]
    places = [tuple(range(max(0, place - KEPT), place)) for place in range(1, TOKENS + 1)]
    return token_trace_html(
        tokens=tokens(),
        attention_entropy=values,
        predictive_entropy=values,
        weights=values,
        advantages=values,
        log_probs=values,
        group=["explorer"] * TOKENS,
        prompt_tokens=["?"],
        attended=places,
        attended_weights=[(1 / len(row),) * len(row) for row in places],
    )


def plain():
    return f"<!doctype html><meta charset=utf-8><pre>{''.join(tokens())}</pre>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = started(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


def test_writing(benchmark):
    page = benchmark.pedantic(trace, rounds=5)
    benchmark.extra_info["megabytes"] = len(page.encode("utf-8")) / 1e6


@pytest.mark.parametrize("page", [trace, plain], ids=["trace", "plain text"])
def test_loading(page, benchmark, browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page(), encoding="utf-8")
    loads = []

    def load():
        browser.get(path.as_uri())
        loads.append(browser.execute_script(LOADED))

    benchmark.pedantic(load, rounds=9, warmup_rounds=1)
    benchmark.extra_info["load_event_ms"] = sorted(loads)
    print(f"\nload event after {sorted(loads)[len(loads) // 2]:.0f} ms, median of {len(loads)}")

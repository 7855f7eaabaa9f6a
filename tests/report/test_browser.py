"""Pages as a browser shows them: opened, hovered, clicked and typed at in headless Chromium."""

import math

import pytest
from browser import emulate, overflowing, started
from selenium.webdriver import ActionChains as Actions
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tokenweights.report import (
    RecipeRun,
    Run,
    comparison_html,
    recipe_comparison,
    run_report_html,
    token_trace_html,
    trace_page_html,
)

PROMPT = ("<", "1", "+", "1", "=?\n")
ATTENDED = {
    "prompt_tokens": PROMPT,
    "attended": ((0,), (0, 4), (1, 5), (1, 3, 6), (7, 8)),
    "attended_weights": ((1.0,), (0.25, 0.75), (0.5, 0.125), (0.5, 0.25, 0.25), (0.5, 0.5)),
    "columns": {"support_size_0.9": (1.0, 2.0, 2.0, 3.0, 2.0)},
}
PATIENCE = 120  # seconds that a page may take on a busy machine
HOSTILE = [
    "<script>window.hurt = 1</script>",
    "</script><script>window.hurt = 2</script>",
    "<img src=x onerror='window.hurt = 3'>",
    '" onmouseover="window.hurt = 4" x="',
    "<!--",
    "\u202eevil\u202c",
    "\x00\x1b[31m\x07",
    "$title",
    "\ud83d",
]


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    driver = started(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """`opened(page)` shows a page; afterwards its console must be empty and nothing was loaded."""

    def show(page, **system):
        emulate(browser, **system)
        path = tmp_path / "page.html"
        path.write_text(page, encoding="utf-8")
        browser.get(path.as_uri())
        # The driver may answer while a long page is still being read.
        WebDriverWait(browser, PATIENCE).until(is_complete)
        return browser

    yield show
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def is_complete(driver):
    return driver.execute_script("return document.readyState") == "complete"


def all_of(driver, selector):
    return driver.find_elements(By.CSS_SELECTOR, selector)


def one(driver, selector):
    return driver.find_element(By.CSS_SELECTOR, selector)


def tooltip(driver):
    """The shown tooltip's rows, or None."""
    shown = one(driver, "#token-tooltip")
    if not shown.is_displayed():
        return None
    labels, values = ([e.text for e in shown.find_elements(By.TAG_NAME, t)] for t in ("dt", "dd"))
    return dict(zip(labels, values, strict=True))


def test_hovering_a_token_shows_all_its_values(opened, record):
    driver = opened(trace_page_html([record(**ATTENDED)]))
    assert tooltip(driver) is None
    Actions(driver).move_to_element(all_of(driver, ".token")[2]).perform()
    assert tooltip(driver) == {
        "position": "3 of 5",
        "group": "middle",
        "attention entropy": "0.500",
        "predictive entropy": "2 nats",
        "weight": "0.500",
        "advantage": "0.500",
        "log-probability": "\u22123 nats",
        "support size 0.9": "2",
        "token id": "12",
    }
    Actions(driver).move_to_element(one(driver, "h1")).perform()
    assert tooltip(driver) is None


def test_clicking_a_token_shows_its_attention_over_the_context(opened, record):
    driver = opened(trace_page_html([record(**ATTENDED)]))
    strip = one(driver, ".trace-strip")
    assert not strip.is_displayed()
    all_of(driver, ".token")[3].click()
    assert strip.find_element(By.TAG_NAME, "p").text == (
        "\u201c2\u201d, position 4, looks at 8 tokens; 3 recorded, with 100 % of its attention."
    )
    largest = [button.text for button in all_of(driver, ".trace-largest button")]
    assert largest == ["1 50 %", "1 25 %", "\u00b7answer 25 %"]
    strengths = {e.text: e.get_attribute("style") for e in all_of(driver, ".attended")}
    assert len(all_of(driver, ".context.attended")) == 2 and "--a: 0.5" in strengths[" answer"]
    # The bars are where the places are: 1, 3 and 6 of 8.
    drawn = driver.execute_script(
        """const canvas = document.querySelector("canvas");
        const pixels = canvas.getContext("2d").getImageData(0, canvas.height - 1, canvas.width, 1);
        return [...Array(8).keys()].map((place) => {
          const at = 4 * Math.round((place + 0.5) * canvas.width / 8);
          return pixels.data[at + 3] > 0 && pixels.data[at + 1] < 100;
        });"""
    )
    assert drawn == [False, True, False, True, False, False, True, False]
    all_of(driver, ".token")[0].click()
    assert [button.text for button in all_of(driver, ".trace-largest button")] == ["< 100 %"]
    assert len(all_of(driver, ".attended")) == 1
    one(driver, ".trace-close").click()
    assert not strip.is_displayed() and not all_of(driver, ".attended, .chosen")


def test_a_click_turns_to_who_looks_back_and_it_stays_turned(opened, record):
    driver = opened(trace_page_html([record(**ATTENDED)]))
    tokens, text = all_of(driver, ".token"), one(driver, ".trace-strip p")
    tokens[1].click()
    one(driver, ".trace-turn").click()
    # Of the three later tokens the last but one has it among its keys, with a quarter.
    assert text.text == (
        "\u201c\u00b7answer\u201d, position 2: 1 of 3 later tokens look back at it among "
        "their recorded weights, and give it 0.25 in sum."
    )
    assert one(driver, ".trace-turn").get_attribute("aria-pressed") == "true"
    assert [button.text for button in all_of(driver, ".trace-largest button")] == ["2 25 %"]
    assert [token.text for token in all_of(driver, ".attended")] == [tokens[3].text]
    assert one(driver, ".trace-end").text == "last token"
    tokens[0].click()
    assert "1 of 4 later tokens" in text.text
    tokens[4].click()
    assert "0 of 0 later tokens" in text.text and not all_of(driver, ".attended")
    one(driver, ".trace-turn").click()
    assert "looks at 9 tokens" in text.text and one(driver, ".trace-end").text == "chosen token"


def test_the_keyboard_reaches_everything(opened, record):
    driver = opened(trace_page_html([record(**ATTENDED)]))
    tokens = all_of(driver, ".token")
    focused = driver.switch_to
    for _ in range(4):
        Actions(driver).send_keys(Keys.TAB).perform()
        if focused.active_element in tokens:
            break
    assert focused.active_element == tokens[0] and tooltip(driver)["position"] == "1 of 5"
    Actions(driver).send_keys(Keys.END, Keys.ARROW_LEFT).perform()
    assert focused.active_element == tokens[3]
    Actions(driver).send_keys(Keys.ENTER).perform()
    assert one(driver, ".trace-strip").is_displayed()
    Actions(driver).send_keys(Keys.ESCAPE).perform()
    assert not one(driver, ".trace-strip").is_displayed() and tooltip(driver) is None
    Actions(driver).send_keys(Keys.HOME).perform()
    assert focused.active_element == tokens[0]


def test_search_finds_text_across_tokens_and_steps_through_it(opened, record):
    driver = opened(trace_page_html([record(), record(sample_id=18)]))
    box, count = one(driver, ".trace-search input"), one(driver, ".trace-search output")
    box.send_keys("Answer IS")
    assert count.text == "2 found"
    assert [token.text for token in all_of(driver, ".found")] == [" answer", " is"] * 2
    box.send_keys(Keys.ENTER)
    assert count.text == "1 of 2" and len(all_of(driver, ".found-now")) == 2
    box.send_keys(Keys.SHIFT + Keys.ENTER)
    assert count.text == "2 of 2"
    box.send_keys("x")
    assert count.text == "not found" and not all_of(driver, ".found")


def test_a_group_can_be_shown_alone(opened, record):
    driver = opened(trace_page_html([record()]))

    def coloured():
        script = "return getComputedStyle(arguments[0]).backgroundImage"
        tokens = all_of(driver, ".token")
        return [driver.execute_script(script, token) != "none" for token in tokens]

    assert coloured() == [True] * 5
    all_of(driver, ".trace-filter span")[1].click()
    assert coloured() == [True, False, False, False, False]
    all_of(driver, ".trace-filter span")[2].click()
    assert coloured() == [False, False, False, False, True]


def test_of_several_responses_one_can_be_shown(opened, record):
    driver = opened(trace_page_html([record(step=step) for step in (0, 5, 9)]))
    shown = lambda: [e.text for e in all_of(driver, ".trace h3") if e.is_displayed()]  # noqa: E731
    assert shown() == ["Step 0", "Step 5", "Step 9"]
    one(driver, ".trace-picker select").send_keys("Step 5")
    assert shown() == ["Step 5"]


def test_hostile_text_is_shown_and_never_run(opened):
    count = len(HOSTILE)
    everything = "".join(HOSTILE)
    page = token_trace_html(
        tokens=HOSTILE,
        attention_entropy=[0.5] * count,
        title=everything,
        caption=everything,
        prompt_tokens=HOSTILE,
        attended=[(place,) for place in range(count)],
        attended_weights=[(1.0,)] * count,
        columns={everything: [1.0] * count},
    )
    driver = opened(page)
    for token in all_of(driver, ".token"):
        token.click()
        Actions(driver).move_to_element(token).perform()
    one(driver, ".trace-search input").send_keys("<script>")
    assert driver.execute_script("return window.hurt") is None
    assert len(all_of(driver, ".found")) == 2
    shown = [token.text for token in all_of(driver, ".token")]
    assert shown[:5] == [text.replace("\u00a0", " ") for text in HOSTILE[:5]]
    assert shown[5:] == [
        "\u27e8U+202E\u27e9evil\u27e8U+202C\u27e9",
        "\u2400\u241b[31m\u2407",
        "$title",
        "\u27e8U+D83D\u27e9",
    ]
    assert not all_of(driver, "main script:not([type='application/json']), img, main style")


@pytest.mark.parametrize(("scheme", "ground"), [("light", "253, 253, 251"), ("dark", "21, 23, 26")])
def test_colours_follow_the_system(scheme, ground, opened, record):
    driver = opened(trace_page_html([record()]), scheme=scheme)
    assert ground in one(driver, "body").value_of_css_property("background-color")


def test_a_narrow_window_never_scrolls_sideways(opened, record):
    driver = opened(trace_page_html([record(**ATTENDED), record(**ATTENDED)]), width=360)
    all_of(driver, ".token")[4].click()
    wide = driver.execute_script("return document.documentElement.scrollWidth")
    assert wide <= 360


def test_a_trace_of_8192_tokens_opens(opened):
    count, kept = 8192, 32
    entropy = [0.5 + math.sin(position / 40) / 2 for position in range(count)]
    places = [tuple(range(max(0, place - kept), place)) for place in range(1, count + 1)]
    page = token_trace_html(
        tokens=[" token" if place % 16 else ".\n" for place in range(count)],
        attention_entropy=entropy,
        predictive_entropy=entropy,
        weights=entropy,
        advantages=entropy,
        log_probs=entropy,
        group=["explorer"] * count,
        prompt_tokens=["?"],
        attended=places,
        attended_weights=[(1 / len(row),) * len(row) for row in places],
    )
    assert len(page.encode("utf-8")) < 5_000_000
    driver = opened(page)
    tokens = all_of(driver, ".token")
    assert len(tokens) == count
    driver.execute_script("arguments[0].scrollIntoView()", tokens[-1])
    tokens[-1].click()
    Actions(driver).move_to_element(tokens[-2]).perform()
    assert tooltip(driver)["position"] == "8191 of 8192"
    assert "32 recorded" in one(driver, ".trace-strip p").text
    driver.execute_script("arguments[0].scrollIntoView()", tokens[4000])
    tokens[4000].click()
    one(driver, ".trace-turn").click()
    assert "32 of 4191 later tokens look back" in one(driver, ".trace-strip p").text
    one(driver, ".trace-turn").click()


def long_page(count):
    """A trace with everything, of so many tokens."""
    entropy = [0.5 + math.sin(position / 40) / 2 for position in range(count)]
    places = [tuple(range(max(0, place - 32), place)) for place in range(1, count + 1)]
    return token_trace_html(
        title="a_title_of_one_very_long_word_that_no_line_of_a_phone_can_hold/" * 2,
        tokens=[" token" if place % 16 else "x" * 70 for place in range(count)],
        attention_entropy=entropy,
        predictive_entropy=entropy,
        weights=entropy,
        log_probs=entropy,
        group=["explorer"] * count,
        prompt_tokens=["?" * 90],
        attended=places,
        attended_weights=[(1 / len(row),) * len(row) for row in places],
    )


def full_report(record):
    """A run with every section, and long words wherever a run may have them."""
    metrics = [{"step": step, "reward": step / 4, "response_length": 60} for step in range(30)]
    word = "data/a_very_long_path_without_a_space_in_it/" * 2
    accuracies = {f"accuracy/{word}": 0.25, "accuracy/easy": 0.5, "samples": 8, "prompts": 30}
    evaluations = [{"step": step, **accuracies} for step in (0, 29)]
    ratios = {f"gradient/decile_{number}": number / 45 for number in range(10)}
    gradients = [{"step": step, "gradient/anchor_cosine": 0.7, **ratios} for step in (1, 3)]
    columns = {"mean_distance": (1.0,) * 5, "support_size_0.9": (2.0,) * 5}
    last = record(step=29, **{**ATTENDED, "columns": columns})
    return run_report_html(
        Run(
            title=word,
            description=word,
            recipe="recipe   " + word * 3,
            settings={"model": word, "seed": 3},
            metrics=metrics,
            evaluations=evaluations,
            gradients=gradients,
            records=[record(step=0, prompt=word), last],
            unreadable=[word],
        )
    )


def comparison_page():
    runs = [
        RecipeRun(name, seed, [{"step": step, "reward": step + seed} for step in range(5)])
        for name in ("full", "a_recipe_with_a_name_that_is_as_long_as_it_can_be")
        for seed in range(3)
    ]
    return comparison_html(recipe_comparison(runs))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("page", ["report", "comparison", "trace 60", "trace 8192"])
def test_no_page_sticks_out_of_the_window(opened, record, page, width, scheme):
    made = {
        "report": lambda: full_report(record),
        "comparison": comparison_page,
        "trace 60": lambda: long_page(60),
        "trace 8192": lambda: long_page(8192),
    }
    driver = opened(made[page](), width=width, scheme=scheme)
    assert overflowing(driver) == []
    if page != "comparison":
        token = all_of(driver, ".token")[-1]
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
        token.click()
        assert overflowing(driver) == []


def test_what_sticks_out_is_found(opened):
    driver = opened('<body style="margin: 0"><p style="width: 500px">wide</p>', width=390)
    found = overflowing(driver)
    assert found == ["P to 500: wide", "the page scrolls sideways by 110"]
    scrolled = '<div style="overflow-x: auto"><p style="width: 500px">wide</p></div>'
    assert overflowing(opened(f'<body style="margin: 0">{scrolled}', width=390)) == []


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844), (390, 500)])
@pytest.mark.parametrize("block", ["start", "center"])
def test_the_tooltip_covers_neither_its_token_nor_the_strip(opened, width, height, block):
    driver = opened(long_page(200), width=width, height=height)
    tokens = all_of(driver, ".token")
    place = f"arguments[0].scrollIntoView({{block: '{block}'}})"
    driver.execute_script(place, tokens[90])
    tokens[90].click()  # which opens the strip under a tooltip that is shown already
    _covers_nothing(driver, tokens[90])
    driver.execute_script(place, tokens[97])
    Actions(driver).move_to_element(tokens[97]).perform()
    _covers_nothing(driver, tokens[97])
    assert one(driver, "#token-tooltip").size["height"] > 0


def _covers_nothing(driver, token):
    boxes = driver.execute_script(
        """const of = (e) => { const b = e.getBoundingClientRect(); return [b.top, b.bottom]; };
        const rects = arguments[0].getClientRects(), last = rects[rects.length - 1];
        return [of(document.querySelector("#token-tooltip")), [last.top, last.bottom],
          of(document.querySelector(".trace-strip"))];""",
        token,
    )
    shown, *others = boxes
    assert shown[1] >= shown[0] >= 0
    for covered in others:
        assert shown[1] <= covered[0] + 1 or shown[0] >= covered[1] - 1, boxes


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("bar", [".trace-strip", ".trace-controls"])
def test_marks_of_tokens_do_not_show_beside_a_bar_that_covers_them(opened, width, bar):
    """Rings and outlines reach beyond the text; the bars that stay on the screen hide all of it."""
    driver = opened(long_page(60), width=width, height=844)
    all_of(driver, ".token")[-9].click()
    left, text, reach = driver.execute_script(
        """const token = document.querySelectorAll(".token")[0];
        token.classList.add("found", "found-now");
        const rings = [...getComputedStyle(token).boxShadow.matchAll(/([\\d.]+)px(?=,|$)/g)];
        const reach = Math.max(...rings.map((ring) => Number(ring[1])));
        const left = (e) => e.getBoundingClientRect().left;
        const of = (selector) => left(document.querySelector(selector));
        return [of(arguments[0]), of(".trace-tokens"), reach];""",
        bar,
    )
    assert reach >= 6 and 0 <= left <= text - reach
    assert overflowing(driver) == []


def test_a_report_opens(opened, record):
    metrics = [{"step": step, "reward": step / 4} for step in range(4)]
    ratios = {f"gradient/decile_{number}": number / 45 for number in range(10)}
    gradients = [{"step": step, "gradient/anchor_cosine": 0.7, **ratios} for step in (1, 3)]
    values = tuple(place / 4000 for place in range(4000))
    nothing = dict.fromkeys(("weights", "advantages", "log_probs", "group"))
    long = record(
        step=9,
        tokens=("x",) * 4000,
        token_ids=(1,) * 4000,
        attention_entropy=values,
        predictive_entropy=values,
        **nothing,
    )
    run = Run(metrics=metrics, gradients=gradients, records=[record(step=0), long])
    driver = opened(run_report_html(run), scheme="dark")
    figures = all_of(driver, ".run-figure svg")
    assert len(figures) == 8 and all(figure.size["width"] > 500 for figure in figures)
    all_of(driver, ".token")[0].click()
    assert tooltip(driver)["position"] == "1 of 5"

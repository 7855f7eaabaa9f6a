import importlib.util
from pathlib import Path

import pytest

markdown = pytest.importorskip("markdown")
math_core = pytest.importorskip("math_core")

SOURCE = Path(__file__).parents[2] / "docs/extensions/mathml.py"


@pytest.fixture(scope="module")
def html():
    spec = importlib.util.spec_from_file_location("mathml", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return markdown.Markdown(extensions=[module.MathML()]).convert


def test_inline_maths_becomes_mathml(html):
    assert html("so $x$ is") == "<p>so <math><mi>x</mi></math> is</p>"


def test_display_maths_is_marked_as_display(html):
    assert '<math display="block">' in html("$$x$$")


def test_display_maths_scrolls_inside_itself(html):
    assert html("$$x$$").startswith('<p><span class="equation" tabindex="0"><math display="block">')
    assert "equation" not in html("$x$")


def test_backslashes_reach_the_formula(html):
    formula = math_core.LatexToMathML().convert_with_local_state(r"\{x\}", displaystyle=False)
    assert html(r"so $\{x\}$") == f"<p>so {formula}</p>"


def test_a_formula_may_span_lines(html):
    assert html("$a +\nb$").count("<math>") == 1


@pytest.mark.parametrize("text", ["`$x$`", "5 $ and 6$", "5$ and 6 $", r"\$5 or \$6$", "    $x$"])
def test_code_prices_and_escapes_stay_text(html, text):
    assert "<math" not in html(text)


def test_an_unknown_command_fails_the_build(html):
    with pytest.raises(math_core.LatexError):
        html(r"$\nosuchcommand$")

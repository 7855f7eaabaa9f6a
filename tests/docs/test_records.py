import importlib.util
import re
from pathlib import Path

import pytest

markdown = pytest.importorskip("markdown")

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "docs/extensions/records.py"


@pytest.fixture
def html(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("record.md").write_text(
        "# R\n\n## One\n\nfirst\n\n![p](p.svg)\n\n### Of one\n\n## Two\n\nlast\n"
    )
    spec = importlib.util.spec_from_file_location("records", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return markdown.Markdown(extensions=[module.Records()]).convert


def test_a_section_is_shown_without_its_pictures(html):
    shown = html('before\n\n<!-- section "One" of record.md -->\n\nafter')
    assert shown == "<p>before</p>\n<p>first</p>\n<h3>Of one</h3>\n<p>after</p>"
    assert html('<!-- section "Two" of record.md -->') == "<p>last</p>"


def test_a_section_that_is_missing_fails_the_build(html):
    with pytest.raises(ValueError, match="no section 'Three'"):
        html('<!-- section "Three" of record.md -->')


def test_other_comments_stay(html):
    assert html("<!-- a section -->") == "<!-- a section -->"


def test_every_section_that_a_page_shows_is_there():
    asked = [
        found
        for page in (ROOT / "docs").rglob("*.md")
        for found in re.findall(r'^<!-- section "(.+)" of (\S+) -->$', page.read_text(), re.M)
    ]
    assert asked
    for title, file in asked:
        assert f"\n## {title}\n" in (ROOT / file).read_text()

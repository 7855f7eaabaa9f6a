"""The site as a browser shows it: every page fits a phone and a desk, and none has an error."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from browser import emulate, overflowing, started

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    for name in ("tokenweights", "integrations", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": "docs/extensions"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "site" / "blank.html").write_text("<!doctype html><title>blank</title>")
    return folder / "site"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = started(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_every_page_fits_the_window_and_logs_no_error(site, browser, width, scheme):
    emulate(browser, width=width, scheme=scheme)
    # A visitor's first page settles the colours, and the browser keeps them for the others. A page
    # without scripts forgets them: one of the site would write them down again.
    browser.get((site / "blank.html").as_uri())
    browser.execute_script("localStorage.clear()")
    wrong = {}
    for page in PAGES:
        browser.get((site / page.with_suffix(".html")).as_uri())
        colours = browser.execute_script("return document.body.dataset.mdColorScheme")
        assert colours == {"light": "default", "dark": "slate"}[scheme]
        # A page that is opened as a file cannot load its search index.
        logged = [each["message"] for each in browser.get_log("browser")]
        errors = [message for message in logged if "search" not in message]
        if found := overflowing(browser) + errors:
            wrong[str(page)] = found
    assert not wrong
    broken = "return [...document.images].filter((i) => !i.naturalWidth).map((i) => i.src)"
    assert browser.execute_script(broken) == []

"""A headless Chromium for tests that open pages: what a user sees, clicks and types.

Chromium and its driver come with the system (Debian: `chromium chromium-driver`). Where they are
missing the tests are skipped by name, unless `REQUIRE_BROWSER` is set, as it is in CI.
"""

import os
import shutil
from pathlib import Path

import pytest

SWITCHES = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "disable-dev-shm-usage",
    "window-size=1280,900",
    "force-prefers-reduced-motion",
)


def started(profile: Path):
    """A driver of a fresh Chromium that keeps what pages write to the console."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        reason = "chromium and chromedriver are not installed"
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = ChromeOptions()
    options.binary_location = programs[0]
    for switch in (*SWITCHES, f"user-data-dir={profile}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options=options, service=ChromeService(programs[1]))


def emulate(driver, *, scheme: str = "light", width: int = 1280, height: int = 900) -> None:
    """Sets colour scheme and window size, as a user's system would."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


# Elements that stick out of the window, and that no parent within it scrolls.
_OVERFLOWING = """
const wide = document.documentElement.clientWidth;
const scrolls = (element) => {
  for (let at = element; at && at !== document.body; at = at.parentElement) {
    const shown = getComputedStyle(at).overflowX;
    if (shown !== "visible" && at.getBoundingClientRect().right <= wide + 1) return true;
  }
  return false;
};
const found = [];
for (const element of document.body.querySelectorAll("*")) {
  const box = element.getBoundingClientRect();
  const seen = box.width && box.height && getComputedStyle(element).visibility !== "hidden";
  if (seen && box.right > wide + 1 && !scrolls(element.parentElement)) {
    const text = element.textContent.slice(0, 40);
    found.push(`${element.tagName} to ${Math.round(box.right)}: ${text}`);
  }
}
const more = document.documentElement.scrollWidth - wide;
if (more > 0) found.push(`the page scrolls sideways by ${more}`);
return found.slice(0, 8);
"""


def overflowing(driver) -> list[str]:
    """What of the open page sticks out of the window."""
    return driver.execute_script(_OVERFLOWING)

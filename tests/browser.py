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

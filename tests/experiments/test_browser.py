# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: headless Chromium, offline."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason='no playwright; pip install -e ".[dev]" brings it'
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH; apt install chromium"),
]

PHONE = {"width": 375, "height": 812}
DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Without its sandbox, which Chromium refuses to root; the page is our own.
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(params=[PHONE, DESKTOP], ids=["phone", "desktop"])
def page(request: pytest.FixtureRequest, browser: Any, real_suite: Path) -> Iterator[Any]:
    """The suite's report, copied to where nothing lies beside it; complaints are collected."""
    alone = request.getfixturevalue("tmp_path") / "page.html"
    shutil.copy(real_suite / "report" / "index.html", alone)
    context = browser.new_context(viewport=request.param, offline=True)
    opened = context.new_page()
    opened.complaints = []
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("requestfailed", lambda request: opened.complaints.append(request.url))
    opened.requests = []
    opened.on("request", lambda request: opened.requests.append(request.url))
    opened.goto(alone.as_uri())
    yield opened
    context.close()


def test_page(page: Any) -> None:
    images = page.evaluate(
        """async () => {
            const images = [...document.images];
            await Promise.all(images.map(image => image.decode()));
            return images.map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]);
        }"""
    )
    assert len(images) == 10
    room = min(page.viewport_size["width"] - 60, 400)
    for complete, own_width, width in images:
        assert complete
        assert own_width > 0
        # Wide enough for letters of 9.5 points in 4.2 inches to be read.
        assert width >= 0.85 * room
    assert page.complaints == []
    outside = [url for url in page.requests if not url.startswith(("file:", "data:"))]
    assert outside == []


def test_page_does_not_scroll_sideways(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("body *")]
            .filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth)
            .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert beyond == []


def test_page_can_be_walked_without_eyes_or_mouse(page: Any) -> None:
    levels = page.evaluate(
        '[...document.querySelectorAll("h1, h2, h3, h4")].map(h => Number(h.tagName[1]))'
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    # No level is skipped on the way down.
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.evaluate("[...document.images].every(i => i.alt)")
    assert page.evaluate('document.querySelectorAll("main, header, nav, footer").length') == 4
    for link in page.query_selector_all("nav a"):
        link.click()
        target = page.evaluate("document.querySelector(location.hash).getBoundingClientRect().top")
        assert -1 < target < page.viewport_size["height"]

"""A headless Chromium of the system's, driven by Playwright, and what a page did that it should not."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Visit:
    """An open page.

    Attributes:
        page: Playwright's.
        problems: warnings and errors in the console, and errors that nothing caught.
        requests: addresses that it asked for, other than itself, what stands in the page, and its own server.
    """

    page: Any
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def open_browser() -> Iterator[Any]:
    """Playwright's Browser; $CHROMIUM names the program, otherwise it is looked for. Skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip: playwright)")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"there is no browser: none of {', '.join(_NAMES)} is on the path, and $CHROMIUM is not set")
    alone = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=alone)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Any, address: str, **settings: Any) -> Iterator[Visit]:
    """Opens an address in a fresh context.

    Args:
        browser: of `open_browser`.
        address: file:// or http://.
        settings: of Playwright's `new_context`, such as viewport, color_scheme, java_script_enabled.
    """
    context = browser.new_context(**settings)
    context.set_default_timeout(20_000)
    opened = Visit(context.new_page())
    own = urlsplit(address)

    def asked(request: Any) -> None:
        to = urlsplit(request.url)
        same = to.netloc == own.netloc if own.netloc else request.url.split("#")[0] == address.split("#")[0]
        if to.scheme not in ("data", "blob") and not same:
            opened.requests.append(request.url)

    def said(message: Any) -> None:
        if message.type in ("warning", "error"):
            opened.problems.append(f"{message.type}: {message.text}")

    opened.page.on("request", asked)
    opened.page.on("console", said)
    opened.page.on("pageerror", lambda error: opened.problems.append(f"uncaught: {error}"))
    try:
        opened.page.goto(address)
        yield opened
    finally:
        context.close()

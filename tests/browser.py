"""A headless Chromium of the system's, driven by Playwright, and what a page did that it should not."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest


@dataclass
class Visit:
    """An open page."""

    page: Any
    """Playwright's."""
    problems: list[str] = field(default_factory=list)
    """Warnings and errors in the console, and errors that nothing caught."""
    requests: list[str] = field(default_factory=list)
    """Addresses that it asked for, other than itself, what stands in the page, and its own server."""


@contextmanager
def open_browser() -> Iterator[Any]:
    """Playwright's Browser; $CHROMIUM names the program, otherwise it is looked for. Skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip: playwright)")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"there is no browser: none of {', '.join(names)} is on the path, and $CHROMIUM is not set")
    alone = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=program, args=alone) as browser:
        yield browser


@contextmanager
def visit(browser: Any, address: str, **settings: Any) -> Iterator[Visit]:
    """Opens an address, file:// or http://, in a fresh context with these settings of Playwright's `new_context`."""
    with browser.new_context(**settings) as context:
        context.set_default_timeout(20_000)
        opened = Visit(context.new_page())
        own = urlsplit(address)

        def note_request(request: Any) -> None:
            to = urlsplit(request.url)
            same = to.netloc == own.netloc if own.netloc else request.url.split("#")[0] == address.split("#")[0]
            if to.scheme not in ("data", "blob") and not same:
                opened.requests.append(request.url)

        def note_message(message: Any) -> None:
            if message.type in ("warning", "error"):
                opened.problems.append(f"{message.type}: {message.text}")

        opened.page.on("request", note_request)
        opened.page.on("console", note_message)
        opened.page.on("pageerror", lambda error: opened.problems.append(f"uncaught: {error}"))
        opened.page.goto(address)
        yield opened

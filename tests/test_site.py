"""The documentation as a site: it builds without a warning, pages load alone, search finds, links lead somewhere."""

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

from tests.browser import open_browser, visit

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder of the site, and its address."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml", "-d", str(folder)]
    built = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert not built.returncode, built.stderr
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_load_alone_and_every_link_leads_somewhere(site: tuple[Path, str], width: int) -> None:
    folder, address = site
    anchors: dict[str, set[str]] = {}
    links: dict[str, list[str]] = {}
    with (
        open_browser() as browser,
        visit(browser, f"{address}index.html", viewport={"width": width, "height": 900}) as at,
    ):
        for page in sorted(folder.glob("*.html")):
            at.page.goto(f"{address}{page.name}")
            anchors[page.name] = {
                *at.page.eval_on_selector_all("[id], a[name]", "all => all.map(one => one.id || one.name)")
            }
            links[page.name] = at.page.eval_on_selector_all(
                "a[href]", "all => all.map(one => one.getAttribute('href'))"
            )
            assert at.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{page.name} is too wide"
            assert at.page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth)"), page.name
        assert (at.problems, at.requests) == ([], [])
    assert len(links) > 15
    for page, targets in links.items():
        for target in targets:
            to, anchor = urldefrag(urljoin(f"{address}{page}", target))
            if page == "404.html" or not to.startswith(address):
                continue
            name = unquote(to.removeprefix(address)) or "index.html"
            assert (folder / name).is_file(), f"{page}: {target}"
            assert not anchor or name not in anchors or unquote(anchor) in anchors[name], f"{page}: {target}"


def test_search_finds(site: tuple[Path, str]) -> None:
    with open_browser() as browser, visit(browser, f"{site[1]}index.html") as at:
        at.page.fill("input[name=query]", "num_pictures")
        # A key that is let go before the page listens is lost, so one is let go again and again.
        result = ".md-search-result__link[href*='settings.html']"
        at.page.wait_for_function(
            """result => {
                document.querySelector("input[name=query]").dispatchEvent(new Event("keyup"));
                return document.querySelector(result);
            }""",
            arg=result,
            polling=500,
            timeout=60_000,
        )
        at.page.wait_for_selector(result)  # and it is visible
        assert at.problems == []

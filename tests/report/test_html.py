"""The page as a browser shows it: nothing is requested from the network, every picture is there and accessible."""

import base64
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpp.report.charts import Line, line_chart
from mpp.report.html import render, write_page, write_pictures
from mpp.report.page import Block, Gallery, Page, Picture, Section, Sheet, Table, Text
from tests.browser import open_browser, visit

HOSTILE = "<script>document.title = 'broken'</script> \" ' ]]> --> </style> &amp; 🦆 " + "unbreakable" * 30
STOPS = ("step 1", "step 20", "step 300")


def pixels(seed: int, side: int = 24, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, channels), dtype=np.uint8)


def chart(name: str) -> Picture:
    lines = [Line("masked", np.arange(9.0), np.arange(9.0)), Line(HOSTILE, np.arange(9.0), np.ones(9), dashed=True)]
    return line_chart(name, f"the {name}", lines, x="step", y="loss", caption="A caption.", markers=True)


def sheet() -> Sheet:
    def moving(name: str) -> tuple[Picture, ...]:
        return tuple(
            Picture(f"{name}-{i}", f"{name} at {stop}", pixels(i), f"{i} right", pixelated=True)
            for i, stop in enumerate(STOPS)
        )

    rows: Any = (
        (Picture("first", "an image", pixels(7)), moving("a"), Picture("still", "an original", pixels(9))),
        (Picture("second", "another", pixels(8, channels=4)), moving("b"), ""),
    )
    return Sheet(("original", "predicted", "again"), rows, ("one", "two"), STOPS, "training step")


def page_of(*blocks: Block) -> Page:
    return Page("A run", "In a sentence.", (Section("all", "Everything", "Read it like this.", blocks),))


@pytest.fixture(scope="module")
def whole() -> Page:
    """Every kind of block, with hostile words where there are words."""
    wide = tuple(f"column {i}" for i in range(30))
    photo, tile = Picture("photo", f"{HOSTILE} photo", pixels(1, 64)), Picture("tile", "a tile", pixels(2, 4), "", True)
    blocks: tuple[Block, ...] = (
        chart("loss"),
        Gallery((chart("accuracy"), photo, tile)),
        Gallery(tuple(Picture(f"filter{i}", f"filter {i}", pixels(i, 8), width=64) for i in range(9))),
        Table(("", *wide), (("a row", *wide), (HOSTILE, *wide)), "A table."),
        Table(("name", HOSTILE), (("a", "b"),), HOSTILE, folded=True),
        Text(f"First.\n\n{HOSTILE}"),
        Text(f"{HOSTILE}\n  more", summary="config.yaml"),
    )
    sections = (
        Section("blocks", "Blocks", "How to read them.", blocks, "section 4.5"),
        Section("sheet", HOSTILE, HOSTILE, (sheet(),), HOSTILE),
        Section("empty", "Empty", "", ()),
    )
    return Page(HOSTILE, HOSTILE, sections, {"accuracy": "31.2 %", HOSTILE: HOSTILE})


@pytest.fixture(scope="module")
def address(whole: Page, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(whole, path)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


def test_whole_in_one_document(whole: Page) -> None:
    """What needs no browser: all that is referred to is there, and nothing comes from elsewhere."""
    tags: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    text = render(whole)
    parser.feed(text)
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == 2 + 9 + 2 + 6 + 1
    assert all(image["alt"] and (image["src"] or "").startswith("data:image/") for image in images)
    assert sum(tag == "svg" and "aria-label" in of and of.get("role") == "img" for tag, of in tags) == 2
    ids = [of["id"] for _, of in tags if "id" in of]
    assert len(set(ids)) == len(ids)
    marks = [of["xlink:href"] or "" for tag, of in tags if tag == "use"]
    assert {mark.removeprefix("#") for mark in marks} <= set(ids)
    assert len(marks) > 2 * 18
    assert Counter(tag for tag, _ in tags)["script"] == 1
    scopes = {of.get("scope") for tag, of in tags if tag == "th"}
    assert scopes == {"row", "col"}
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    policy = next(of["content"] or "" for _, of in tags if of.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


@pytest.mark.slow
def test_opens_from_disk_whole_and_quiet(browser: Any, address: str) -> None:
    with visit(browser, address) as opened:
        page = opened.page
        assert page.title() == HOSTILE
        assert page.evaluate("document.images.length") == 2 + 9 + 2 + 6 + 1
        assert page.evaluate("[...document.images].filter((image) => !image.alt || !image.naturalWidth).length") == 0
        assert page.locator("svg[role=img]").count() == page.locator("svg[aria-label]").count() == 2
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
        assert len(set(ids)) == len(ids)
        marks = page.evaluate("[...document.querySelectorAll('use')].map((use) => use.getAttribute('xlink:href'))")
        assert {mark.removeprefix("#") for mark in marks} <= set(ids)
        assert len(marks) > 2 * 18
        assert page.locator("header, nav[aria-label], main").count() == 3
        assert page.locator("table:not(.sheet table) > caption").first.inner_text() == "A table."
        assert page.locator("thead th:not([scope=col]), tbody th:not([scope=row])").count() == 0
        # The policy that keeps a name from running anything, or from calling home.
        assert page.evaluate("document.querySelectorAll('script').length") == 1
        page.evaluate("document.head.append(Object.assign(document.createElement('script'), {text: 'throw 1'}))")
        assert page.title() == HOSTILE
        (problem,) = opened.problems
        assert "Content Security Policy" in problem
        assert not opened.requests


@pytest.mark.slow
def test_slider_by_keyboard_and_mouse(browser: Any, address: str) -> None:
    with visit(browser, address) as opened:
        page = opened.page
        slider = page.get_by_role("slider", name="training step")

        def state() -> tuple[Any, ...]:
            alts = "all => all.filter(i => i.offsetParent).map(i => i.alt)"
            shown = page.locator(".sheet .stop img").evaluate_all(alts)
            return slider.get_attribute("aria-valuetext"), page.locator(".slider b").inner_text(), shown

        assert state() == ("step 300", "step 300", ["a at step 300", "b at step 300"])
        slider.focus()
        page.keyboard.press("ArrowLeft")
        assert state() == ("step 20", "step 20", ["a at step 20", "b at step 20"])
        slider.click(position={"x": 2, "y": 12})
        assert state() == ("step 1", "step 1", ["a at step 1", "b at step 1"])
        assert page.locator("img[alt='an original']").is_visible()
        assert not opened.problems


@pytest.mark.slow
def test_pictures_are_enlarged_and_walked_by_keyboard(browser: Any, address: str) -> None:
    with visit(browser, address) as opened:
        page = opened.page
        dialog = page.locator("dialog")
        page.get_by_role("button", name="the loss").focus()
        page.keyboard.press("Enter")
        frame, drawing = dialog.locator("div").bounding_box(), dialog.locator("svg").bounding_box()
        assert drawing["height"] <= frame["height"] + 1
        assert drawing["width"] > 800
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        dialog.locator("svg").wait_for(state="detached")  # by the close event, which comes after the key is dealt with
        cells = page.locator(".sheet button")
        assert cells.evaluate_all("all => all.filter(b => b.offsetParent && b.tabIndex === 0).length") == 1
        cells.first.focus()
        for key, row in (("Right", "a"), ("Down", "b"), ("Right", "b")):
            page.keyboard.press(f"Arrow{key}")
            assert page.evaluate("document.activeElement.querySelector('img').alt") == f"{row} at step 300"
        page.keyboard.press("Enter")
        assert dialog.locator("p").inner_text() == "b at step 300"
        page.mouse.click(5, 5)
        dialog.wait_for(state="hidden")
        page.keyboard.press("Control+Home")
        assert not opened.problems


@pytest.mark.slow
def test_read_without_javascript_and_on_paper(browser: Any, address: str) -> None:
    def check_whole(page: Any) -> None:
        shown = page.locator(".stop img").evaluate_all("all => all.filter(i => i.offsetParent).map(i => i.alt)")
        assert shown == ["a at step 300", "b at step 300"]
        assert not page.locator("input").is_visible()
        assert "step 300" in page.locator(".last").inner_text()

    with visit(browser, address, java_script_enabled=False) as opened:
        check_whole(opened.page)
        assert opened.page.locator("button:visible").count() == 0
    with visit(browser, address, color_scheme="dark") as opened:
        page = opened.page
        page.get_by_role("slider").fill("0")
        page.emulate_media(media="print")
        check_whole(page)
        assert not page.locator("nav").is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.slow
def test_light_dark_and_the_switch(browser: Any, address: str) -> None:
    stroke = "getComputedStyle(document.querySelector('svg path[style*=series-1]')).stroke"
    colours = f"[getComputedStyle(document.body).backgroundColor, {stroke}]"
    light, found = ["rgb(255, 255, 255)", "rgb(0, 114, 178)"], {}
    for scheme in ("light", "dark"):
        with visit(browser, address, color_scheme=scheme) as opened:
            found[scheme] = [opened.page.evaluate(colours)]
            switch = opened.page.locator("#page_scheme")
            for name in ("light", "dark", "system"):
                switch.click()
                assert switch.inner_text() == f"Colours: {name}"
                found[scheme].append(opened.page.evaluate(colours))
    dark = found["dark"][0]
    assert not set(light) & set(dark)
    assert found == {"light": [light, light, dark, light], "dark": [dark, light, dark, dark]}


def luminance(colour: str) -> float:
    """Of rgb(r, g, b), as WCAG's contrast has it."""
    shares = [int(value) / 255 for value in re.findall(r"\d+", colour)]
    return np.dot((0.2126, 0.7152, 0.0722), [v / 12.92 if v < 0.04 else ((v + 0.055) / 1.055) ** 2.4 for v in shares])


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 360), ("light", 768)])
def test_no_width_overflows_charts_have_contrast_and_axe_finds_nothing(
    browser: Any, address: str, scheme: str, width: int
) -> None:
    with visit(browser, address, color_scheme=scheme, viewport={"width": width, "height": 900}) as opened:
        page = opened.page
        page.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        inks = page.locator("svg text").evaluate_all("all => all.map(text => getComputedStyle(text).fill)")
        paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        ratios = [(max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) for ink in map(luminance, inks)]
        assert len(ratios) > 12
        assert min(ratios) > 4.5
        # axe reads no `fill`.
        pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
        page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8"))
        violations = page.evaluate("axe.run().then((result) => result.violations)")
        assert [(found["id"], [node["html"][:200] for node in found["nodes"]]) for found in violations] == []


def test_pixels_that_mean_something_stay_exact() -> None:
    smooth = np.add.outer(np.arange(96), np.arange(96))[..., None].repeat(3, axis=2).astype(np.uint8)
    photo = (smooth + pixels(0, 96) // 8).astype(np.uint8)
    text = render(page_of(Picture("exact", "", smooth, pixelated=True), Picture("photo", "", photo)))
    found = re.findall(r'src="data:image/(\w+);base64,([^"]*)"', text)
    exact, close = (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for _, data in found)
    assert [kind for kind, _ in found] == ["png", "webp"]
    np.testing.assert_array_equal(exact, smooth)
    assert np.abs(close.astype(int) - photo).mean() < 12


def test_pictures_as_files(whole: Page, tmp_path: Path) -> None:
    paths = write_pictures(whole, tmp_path)
    assert [path.name for path in paths[:5]] == ["loss.svg", "accuracy.svg", "photo.png", "tile.png", "filter0.png"]
    assert paths[-1].name == "sheet_sheet.png"
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    tile, drawn = (np.asarray(Image.open(tmp_path / name)) for name in ("tile.png", "sheet_sheet.png"))
    np.testing.assert_array_equal(tile, pixels(2, 4).repeat(64, axis=0).repeat(64, axis=1))
    last = np.asarray(Image.fromarray(pixels(2)).resize((192, 192), Image.Resampling.NEAREST))
    corners = np.argwhere((drawn == last[0, 0]).all(axis=2))
    assert any(np.array_equal(drawn[y : y + 192, x : x + 192], last) for y, x in corners)


@pytest.mark.slow
def test_a_drawing_alone_is_right(browser: Any, whole: Page, tmp_path: Path) -> None:
    write_pictures(whole, tmp_path)
    style = "getComputedStyle(document.querySelector('path[style*=series-1]')).stroke"
    root = "document.documentElement"
    with visit(browser, (tmp_path / "loss.svg").as_uri(), color_scheme="dark") as opened:
        assert opened.page.evaluate(style) == "rgb(0, 114, 178)"
        assert opened.page.evaluate(f"getComputedStyle({root}).backgroundColor") == "rgb(255, 255, 255)"
        assert opened.page.evaluate(f"{root}.getAttribute('aria-label')") == "the loss"
        assert not opened.problems


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(page_of(Text("first \udcff")), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="two pictures of the name 'a'"):
        write_page(page_of(chart("a"), Gallery((chart("a"),))), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert b"first ?" in before

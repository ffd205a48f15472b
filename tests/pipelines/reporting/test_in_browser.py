"""Reports in Chromium: nothing is asked for, nothing is wider than the screen, pictures load, tables sort."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vcache.pipelines.reporting.report import ReportConfig, write_report
from vcache.pipelines.reporting.run_predictions import Asked
from vcache.pipelines.reporting.run_report import Options

WIDTHS = {"phone": 375, "desktop": 1280}

SMALLEST_TEXT = """() => {
  let smallest = Infinity;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !parent.getClientRects().length || parent.matches("script, title")) continue;
    const scale = parent instanceof SVGGraphicsElement ? parent.getScreenCTM().a : 1;
    smallest = Math.min(smallest, scale * parseFloat(getComputedStyle(parent).fontSize));
  }
  return smallest;
}"""
CLIPPED_WORDS = """() => [...document.querySelectorAll("figure svg text")].filter((word) => {
  const box = word.getBoundingClientRect(), around = word.closest("svg").getBoundingClientRect();
  return box.left < around.left - 1 || box.right > around.right + 1 || box.bottom > around.bottom + 1;
}).map((word) => word.textContent)"""


@pytest.fixture(scope="module")
def run_report(trained_evl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "run.html"
    options = Options(asked=Asked(device="cpu", save=False), num_explained=2)
    return write_report(ReportConfig(path=trained_evl, out=out, options=options)).path


@pytest.fixture(scope="module")
def sweep_report(finished_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "sweep.html"
    return write_report(
        ReportConfig(path=finished_sweep, out=out, options=Options(asked=Asked(device="cpu", save=False)))
    ).path


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """show(file, width=1280, scheme="light"): the page. At the end nothing may have gone wrong in it or out of it."""
    troubles: list[str] = []
    pages = []

    def open_page(file: Path, width: int = 1280, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("data:", file.as_uri())) or troubles.append(request.url)
        )
        page.goto(file.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert troubles == []


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("report", ["run_report", "sweep_report"])
def test_a_page_is_whole_at_every_width(
    show: Callable[..., Any], request: pytest.FixtureRequest, report: str, width: int
) -> None:
    page = show(request.getfixturevalue(report), width, "dark" if width == WIDTHS["phone"] else "light")
    images = page.eval_on_selector_all("img", "images => images.map(image => [image.naturalWidth, image.alt])")
    assert images and all(natural > 0 and alt for natural, alt in images)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.body.scrollWidth") <= width
    assert page.evaluate(SMALLEST_TEXT) >= 11
    assert page.evaluate(CLIPPED_WORDS) == []


@pytest.mark.parametrize("report", ["run_report", "sweep_report"])
def test_a_page_can_be_read_aloud(show: Callable[..., Any], request: pytest.FixtureRequest, report: str) -> None:
    page = show(request.getfixturevalue(report))
    assert page.evaluate("document.documentElement.lang") == "en" and page.title()
    assert page.locator("h1").count() == 1 and page.locator("main").count() == 1
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("svg:not([aria-label])").count() == 0
    links = page.eval_on_selector_all("a", "links => links.map(link => link.getAttribute('href').slice(1))")
    assert links and all(page.locator(f"#{anchor}").count() == 1 for anchor in links)


def test_light_and_dark_differ_and_print_is_light(show: Callable[..., Any], run_report: Path) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light, page = show(run_report).evaluate(colour), show(run_report, scheme="dark")
    dark = page.evaluate(colour)
    page.emulate_media(media="print", color_scheme="dark")
    assert light != dark and page.evaluate(colour) == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()


def test_tables_sort_by_the_head_that_is_clicked(show: Callable[..., Any], sweep_report: Path) -> None:
    page = show(sweep_report)
    table = page.locator("#runs table")
    buttons = table.locator("th button")
    column = [button.inner_text().strip() for button in buttons.all()].index("loss")

    def values() -> list[str]:
        return [row.locator("th, td").nth(column).inner_text() for row in table.locator("tbody tr").all()]

    before = values()
    for kind, reverse in (("descending", True), ("ascending", False)):
        buttons.nth(column).click()
        known = [float(value) for value in values() if value]
        assert known == sorted(known, reverse=reverse) and len(known) == 4
        assert values()[-1] == ""  # the run that failed has no loss
        assert table.locator("th[aria-sort]").get_attribute("aria-sort") == kind
    assert sorted(before) == sorted(values())
    buttons.nth(0).focus()
    page.keyboard.press("Enter")
    names = [row.locator("th").inner_text() for row in table.locator("tbody tr").all()]
    assert names == sorted(names)

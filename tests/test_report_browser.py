"""The report in a real browser, headless: it draws without errors, asks no host for anything, and reacts."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_page import alarm_line, write_probe, write_run, write_sweep
from training.report.page.write import write_report

pytestmark = pytest.mark.slow
FLAGS = ("no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `dev` has Playwright")
    path = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium is on the PATH")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=[f"--{flag}" for flag in FLAGS])


@pytest.fixture(params=[1440, 800])
def opened(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A function that opens a file, waits until it is drawn, and returns the page. No error and no request may come."""
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": request.param, "height": 900})

    def opened(file: Path) -> Any:
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", lambda sent: sent.url.startswith(file.as_uri()) or wrong.append(f"request: {sent.url}"))
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-ready=yes]", timeout=60_000)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= request.param, "the page does not scroll sideways"
        return page

    yield opened
    context.close()
    assert wrong == []


def drawn(page: Any) -> None:
    """Wait until the page has drawn what was chosen, which it does with the next frame of the screen."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def loads_shown(page: Any) -> list[list[float]]:
    return page.evaluate("document.getElementById('load').data[0].customdata")


def click_cell(page: Any, figure: str, x: float, y: float) -> None:
    """Click the middle of a heatmap's cell, as a user does."""
    place = page.evaluate(
        """([name, x, y]) => {
            const figure = document.getElementById(name), box = figure.getBoundingClientRect();
            const { xaxis, yaxis } = figure._fullLayout;
            return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
        }""",
        [figure, x, y],
    )
    page.mouse.move(*place)
    page.wait_for_timeout(100)
    page.mouse.click(*place)
    page.wait_for_timeout(400)  # plotly waits for a second click


def test_the_slider_the_clicks_and_the_theme(opened: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", sample="</script><script>document.title = 'attacked'</script>")
    alarms = [alarm_line(4, "layer 1: <b>1 expert</b>", 1), alarm_line(9, "over", 1, ended=True)]
    (run / "alarms.jsonl").write_text("".join(alarms))
    page = opened(write_report(run))
    assert page.title() == "r - Mixwright report"
    assert page.locator("#step-name").text_content() == "step 12 of 12"
    assert loads_shown(page)[0] == [3.0, 0.5, 0.5, 0.0]

    page.locator("#step").fill("0")
    drawn(page)
    assert page.locator("#step-name").text_content() == "step 1 of 12"
    assert loads_shown(page)[0][0] == pytest.approx(4 * (0.25 + 1 / 24), rel=1e-4)
    marks = page.evaluate("document.getElementById('curve-loss').layout.shapes.map((shape) => shape.x0)")
    assert marks == [4, 1], "the alarm's step and the slider's"

    page.locator("[data-step]").first.click()
    drawn(page)
    assert page.locator("#step-name").text_content() == "step 4 of 12" and page.locator("#layer").input_value() == "1"

    page.locator("#load").scroll_into_view_if_needed()
    click_cell(page, "load", 2, 1)
    assert page.locator("#router .expert-name").text_content() == "2 of layer 1"
    assert page.locator("#layer").input_value() == "1" and page.locator("#expert").input_value() == "2"
    click_cell(page, "history", 8, 0)
    assert page.locator("#router .expert-name").text_content() == "0 of layer 1"
    assert page.locator("#step-name").text_content() == "step 8 of 12"
    shown = page.evaluate("document.getElementById('expert-load').data[0].y")
    assert shown == pytest.approx([4 * (0.25 + step / 24) for step in range(1, 13)], rel=1e-4)

    page.locator("#step").fill("10")
    drawn(page)
    page.locator("#play").click()
    page.get_by_text("step 12 of 12").wait_for()
    page.get_by_text("▶").wait_for()

    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    drawn(page)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def data_of(page: Any, figure: str, trace: int, name: str) -> Any:
    return page.evaluate(
        "([figure, trace, name]) => document.getElementById(figure).data[trace][name]", [figure, trace, name]
    )


def test_the_probe(opened: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    write_probe(run)
    page = opened(write_report(run))
    tokens = page.locator("#text span")
    assert tokens.all_text_contents() == [" the", "<i>", "\n", " the", "1", "+", "1", " the"]
    colours = "[...document.querySelectorAll('#text span')].map((span) => span.style.backgroundColor)"
    assert [colour != "" for colour in page.evaluate(colours)] == [True] * 4 + [False] * 4
    assert data_of(page, "expert-domains", 0, "y") == pytest.approx([2, 0], abs=1e-3)
    assert data_of(page, "expert-partners", 0, "x") == ["1"]
    assert data_of(page, "domains", 0, "y") == ["prose", "&lt;/b>"]

    page.locator("#layer").select_option("1")
    page.locator("#expert").select_option("3")
    drawn(page)
    assert [colour != "" for colour in page.evaluate(colours)] == [True] + [False] * 3 + [True] * 4
    assert data_of(page, "expert-partners", 0, "x") == ["2", "0"], "in the order of the share: 4/5 and 1/5"
    page.locator("#step").fill("6")  # after the probe of step 4
    drawn(page)
    assert [colour != "" for colour in page.evaluate(colours)] == [False] * 4 + [True] * 4
    assert "Probe of step 4." in page.locator("#tokens .probe-step").text_content()

    tokens.nth(5).click()
    drawn(page)
    assert data_of(page, "path", 0, "x") == [2, 2] and data_of(page, "path", 1, "x") == [3, 3]
    assert data_of(page, "path", 2, "x") == pytest.approx([0.125, 0.125], abs=1e-4)
    page.locator("#domain").select_option("</b>")
    drawn(page)
    assert not tokens.nth(0).is_visible() and tokens.nth(5).is_visible()

    assert page.locator("#from option:checked").text_content() == "1", "the first step with loads"
    assert data_of(page, "moved-layers", 0, "y") == [0, 0.125], "from step 1 to 12: token 0 in layer 1"
    assert data_of(page, "moved", 0, "customdata") == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    page.locator("#to").select_option(label="7")
    drawn(page)
    assert data_of(page, "moved-layers", 0, "y") == [0, 0]
    change = data_of(page, "change", 0, "customdata")
    assert change[0][0] == pytest.approx(6 / 6, rel=1e-3), "of step 7 and step 1: 4 * 6 / 24"


def test_step_0_has_a_probe_and_no_loads(opened: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    write_probe(run)
    page = opened(write_report(run))
    notes = "document.getElementById(name).layout.annotations.map((note) => note.text)"

    def notes_of(figure: str) -> list[str]:
        return page.evaluate(f"(name) => {notes}", figure)

    assert notes_of("load") == notes_of("change") == []
    page.locator("#step").fill("0")
    page.locator("#from").select_option("0")
    drawn(page)
    assert page.locator("#step-name").text_content() == "step 0 of 12"
    assert "Probe of step 0." in page.locator("#router .probe-step").text_content()
    assert "at the probe of step 0" in page.locator("#token-name").text_content()
    assert page.locator("#compared").text_content() == "Tokens: probes of steps 0 and 12"
    assert data_of(page, "moved-layers", 0, "y") == [0, 0.125] and loads_shown(page) == [[None] * 4] * 2
    note = "No loads at step 0: they are counted from step 1 on."
    assert notes_of("load") == notes_of("change") == [note]
    assert data_of(page, "history", 0, "x") == list(range(1, 13))


def test_the_table_of_a_sweep(opened: Any, tmp_path: Path) -> None:
    page = opened(write_report(write_sweep(tmp_path / "s")))
    rows = page.locator("#jobs tbody tr")

    def runs() -> list[str]:
        return [row.locator("td").first.text_content() for row in rows.all() if row.is_visible()]

    assert runs() == ["0", "1", "2", "3", "4", "5"]
    loss = page.locator("#jobs th button", has_text="loss")
    loss.click()
    assert runs()[:3] == ["2", "0", "1"]
    loss.click()
    assert runs()[:3] == ["1", "0", "2"], "runs without a loss stay at the end"
    page.locator("#filter").fill("failed")
    assert runs() == ["3"]
    assert data_of(page, "cost-total", 0, "y") == [3.25, 2.5]


def test_the_cursor_is_common_to_the_curves(opened: Any, tmp_path: Path) -> None:
    page = opened(write_report(write_run(tmp_path / "r")))
    page.locator("#curve-loss").scroll_into_view_if_needed()
    click_cell(page, "curve-loss", 6, 4.35)
    labels = page.locator("#curve-max_vio .hoverlayer text").all_text_contents()
    assert "6" in labels and "all layers : 0.5" in labels, "the other curve has the values of step 6"
    assert page.locator("#step-name").text_content() == "step 6 of 12"

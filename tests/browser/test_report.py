"""The report in a real browser, from disk: every figure drawn, nothing said on the console, no sideways scroll."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.report.compare import write as write_comparison
from distft.report.page import write
from tests.unit.tiny_runs import run_of

pytestmark = pytest.mark.browser

TAKEN = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
#: The paths of a figure that have a size: what of it can be seen.
DRAWN = """
return [...document.querySelectorAll("figure")].map((figure) => {
  const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
  const seen = [...svg.querySelectorAll("path, use")].filter((one) => {
    const its = one.getBoundingClientRect();
    return its.width + its.height > 8 && its.left >= box.left - 1 && its.right <= box.right + 1;
  });
  return [figure.id, box.width, box.height, seen.length, svg.querySelectorAll("text").length];
});
"""
#: What is wider than the window and not inside something that scrolls by itself.
TOO_WIDE = """
return [...document.body.querySelectorAll("*")].filter((one) => !one.closest(".scroll, pre, nav, svg, .skip")
  && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 100));
"""
#: Letters that are drawn smaller than so many pixels, and text that is cut at the edge of its picture.
SMALL = """
return [...document.querySelectorAll("figure:not(#search-parallel) svg text")].filter((one) => {
  const box = one.getBoundingClientRect(), frame = one.closest("svg").getBoundingClientRect();
  return box.height < 9 || box.left < frame.left - 1 || box.right > frame.right + 1;
}).map((one) => one.textContent);
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = {
        "language": run_of("language_modeling", folder / "language", steps=400, text=TAKEN, kill=150, resize=300),
        "classes": run_of("classification", folder / "classes", text=TAKEN, searched=12),
        "answers": run_of("generation", folder / "answers", text="long " * 200 + "w" * 400),
        "begun": run_of("language_modeling", folder / "begun", status="running", steps=1),
    }
    found = {name: write(run) for name, run in runs.items()}
    return {**found, "comparison": write_comparison(list(runs.values()), folder / "comparison.html")}


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], ids=str)
def window(browser: Any, request: pytest.FixtureRequest) -> tuple[int, str]:
    width, scheme = request.param
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    return width, scheme


@pytest.mark.parametrize("name", ["language", "classes", "answers", "begun", "comparison"])
def test_a_page_is_drawn_whole(browser: Any, window: tuple[int, str], pages: dict[str, Path], name: str) -> None:
    browser.get(pages[name].as_uri())
    assert browser.get_log("browser") == []
    assert "taken" not in browser.title
    figures = browser.execute_script(DRAWN)
    assert figures
    for figure, width, height, seen, texts in figures:
        assert width > 250, figure
        assert height > 40, figure
        assert seen >= 2, figure
        assert texts >= 3, figure
    assert browser.execute_script("return document.documentElement.scrollWidth") <= window[0]
    assert browser.execute_script(TOO_WIDE) == []
    assert browser.execute_script(SMALL) == []
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) == (window[1] == "dark")


def test_a_page_opens_in_no_time(browser: Any, pages: dict[str, Path]) -> None:
    browser.get(pages["language"].as_uri())
    loaded = browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < loaded < 2000


def test_values_are_read_off_a_chart_with_the_keyboard_and_the_pointer(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains, Keys

    browser.get(pages["classes"].as_uri())
    plot = browser.find_element("css selector", "#loss .plot")
    said = browser.find_element("css selector", "#loss .readout")
    plot.send_keys(Keys.HOME)
    first = said.text
    assert first.startswith("step 1: training ")
    plot.send_keys(Keys.ARROW_RIGHT)
    assert said.text.startswith("step 2: ")
    plot.send_keys(Keys.END)
    assert said.text.startswith("step 60: ")
    ActionChains(browser).move_to_element(plot).perform()
    assert 25 <= int(said.text.split(":")[0].split()[1]) <= 40


def test_all_that_scrolls_or_opens_is_reached_with_the_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver import Keys

    browser.get(pages["classes"].as_uri())
    wanted = "a[href], summary, .plot, .scroll, pre"
    count = browser.execute_script(
        f"return [...document.querySelectorAll('{wanted}')].filter(e => e.checkVisibility()).length"
    )
    seen = set()
    for _ in range(count + 20):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.add(
            browser.execute_script(f"return [...document.querySelectorAll('{wanted}')].indexOf(document.activeElement)")
        )
    assert len(seen - {-1}) == count

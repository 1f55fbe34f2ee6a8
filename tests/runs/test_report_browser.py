"""The report in a real browser: headless Chromium, driven by selenium."""

import json
import shutil
import time

import pytest

from mdistiller.study.analyze import analyze

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing: pip install selenium")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
COLUMN = "return [...document.querySelectorAll('#table-results tbody tr:not([hidden]) td:nth-child({})')]"


@pytest.fixture(scope="module")
def report(tmp_path_factory, recorded_runs):
    out = tmp_path_factory.mktemp("report") / "out"
    published = out.parent / "published.json"
    published.write_text(json.dumps({"KD": {"resnet8/resnet8": 60.0}, "dataset": "npz"}))
    analyze([recorded_runs / name for name in ("dtkd-0", "dtkd-1", "kd", "alone")], out, published)
    return out / "report.html"


@pytest.fixture(scope="module")
def chromium():
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium or chromedriver is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def show(chromium, report):
    def open_page(width=1280, height=900, theme="light"):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 500})
        scheme = [{"name": "prefers-color-scheme", "value": theme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        chromium.get("about:blank")  # the page before must not answer for this one
        chromium.get(report.as_uri())
        settle(chromium, "drawn")
        return chromium

    return open_page


def settle(driver, promise="updateAll()"):
    """Wait until every chart is drawn as the page's state wants it."""
    script = "const done = arguments[0]; %s.then(() => done(''), (error) => done(`${error}`))"
    assert driver.execute_async_script(script % promise) == ""


def click(driver, selector):
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)
    settle(driver)


def tooltip(driver):
    """Wait for the values that a chart says; returns them and where they stand, from the left to the right edge."""
    script = "const t = document.querySelector('#vg-tooltip-element.visible'); if (!t) return null; "
    script += "const r = t.getBoundingClientRect(); return [t.innerText, r.left, r.right]"
    deadline = time.monotonic() + 10
    while not (found := driver.execute_script(script)):
        assert time.monotonic() < deadline, "no values are shown"
        time.sleep(0.05)
    return found


def place_in(driver, plot):
    """Scroll to a plot and return a point in it."""
    driver.execute_script(f"plots[{plot}].scrollIntoView({{ block: 'center' }})")
    time.sleep(0.2)  # values go when the page scrolls
    return driver.execute_script(
        f"const r = plots[{plot}].getBoundingClientRect(); return [r.left + 0.6 * r.width, r.top + 0.4 * r.height]"
    )


def test_every_chart_is_drawn_without_an_error_or_the_network(show):
    driver = show()
    assert driver.execute_script("return plots.length") > 15
    assert driver.execute_script("return plots.every((plot) => plot.querySelector('svg, canvas')?.clientWidth > 100)")
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert driver.execute_script("return [...document.images].every((image) => image.naturalWidth === 16)")


def test_a_pointer_and_a_finger_are_told_values(show):
    driver = show()
    x, y = place_in(driver, 0)
    for step in range(2):
        driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x + step, "y": y})
    text, *_ = tooltip(driver)
    assert "resnet8" in text and "last" in text and "top-1 (%)" in text
    driver = show(390, 844)
    x, y = place_in(driver, 0)
    driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    text, left, right = tooltip(driver)
    assert "resnet8" in text and left >= 0 and right <= 390
    before = driver.execute_script("return scrollY")
    driver.execute_cdp_cmd("Input.synthesizeScrollGesture", {"x": int(x), "y": int(y), "yDistance": -200})
    assert driver.execute_script("return scrollY") > before + 100, "a finger on a chart scrolls the page"
    assert driver.execute_script("return document.querySelector('#vg-tooltip-element.visible')") is None


def test_the_table_sorts_and_filters(show):
    driver = show()
    values, texts = COLUMN + ".map((c) => Number(c.dataset.value))", COLUMN + ".map((c) => c.innerText)"
    last, published = "#table-results th:nth-child(7)", "#table-results th:nth-child(9) button"
    click(driver, f"{last} button")
    rising = driver.execute_script(values.format(7))
    assert len(rising) == 3 and rising == sorted(rising)
    assert driver.execute_script(f"return document.querySelector('{last}').ariaSort") == "ascending"
    click(driver, f"{last} button")
    assert driver.execute_script(values.format(7)) == rising[::-1]
    click(driver, "#table-results th:nth-child(2) button")
    assert driver.execute_script(texts.format(2)) == ["DTKD", "KD", "NONE"]
    for _ in range(2):
        click(driver, published)
        assert driver.execute_script(texts.format(9))[1:] == ["–", "–"], "what is unknown comes last either way"
    box = driver.find_element("css selector", "#table-results input[type=search]")
    box.send_keys("resnet8 max_logit")
    assert driver.execute_script(texts.format(2)) == ["DTKD"]
    box.clear()
    box.send_keys("nothing like it")
    assert driver.execute_script(texts.format(2)) == []


def test_runs_are_switched_off_and_on_everywhere(show):
    driver = show()
    rows = COLUMN.format(1) + ".length"
    lines = "return document.querySelectorAll('.plot .mark-line path[stroke=\"#3f7fd9\"]').length"
    figures = "return [...document.querySelectorAll('[data-group=\"0\"]')].filter((f) => f.offsetParent).length"
    shown = [driver.execute_script(script) for script in (lines, figures, rows)]
    assert shown[0] > 10 and shown[1] >= 3 and shown[2] == 3
    click(driver, "#runs input[value='0']")
    assert [driver.execute_script(script) for script in (lines, figures, rows)] == [0, 0, 2]
    click(driver, "[data-all='0']")
    assert driver.execute_script(rows) == 0
    click(driver, "[data-all='1']")
    assert [driver.execute_script(script) for script in (lines, figures, rows)] == shown
    assert driver.execute_script("return plots.every((plot) => plot.querySelector('svg, canvas').clientWidth > 100)")


@pytest.mark.parametrize("width", [390, 320, 820])
def test_nothing_overflows(show, width):
    driver = show(width, 844)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    scrolls = "table" if width > 700 else "none"  # wide screens scroll a wide table in its card
    over = (
        f"return [...document.querySelectorAll('main *')].filter((e) => !e.closest('thead, .plot, {scrolls}') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 200))"
    )
    assert driver.execute_script(over) == []
    wide = "return plots.filter((p) => p.querySelector('svg, canvas').clientWidth > p.clientWidth + 1).length"
    assert driver.execute_script(wide) == 0
    sizes = (
        "return [...document.querySelectorAll('.plot svg text')].map((t) => parseFloat(t.getAttribute('font-size')))"
    )
    assert min(driver.execute_script(sizes)) >= 10, "labels are legible"


def test_dark_light_and_paper(show):
    colours = (
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, "
        "document.querySelector('.plot svg text').getAttribute('fill')]"
    )
    seen = {theme: show(theme=theme).execute_script(colours) for theme in ("light", "dark")}
    assert all(a != b for a, b in zip(seen["light"], seen["dark"], strict=True))
    driver = show(theme="dark")
    for event, theme in (("beforeprint", "light"), ("afterprint", "dark")):
        driver.execute_script(f"dispatchEvent(new Event('{event}'))")
        settle(driver)
        assert driver.execute_script(colours) == seen[theme], event
    click(driver, "#theme")
    assert driver.execute_script(colours) == seen["light"]

"""The report in a real browser: headless Chromium, driven by selenium."""

import json
import shutil
import time

import pytest

from mdistiller.analysis.analyse import analyse

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing: pip install selenium")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
ROWS = (
    "return [...document.querySelectorAll('#table-results tbody tr')].filter((r) => !r.hidden).map((r) => r.innerText)"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory, recorded_runs):
    out = tmp_path_factory.mktemp("report") / "out"
    published = out.parent / "published.json"
    published.write_text(json.dumps({"KD": {"resnet8/resnet8": 60.0}}))
    analyse([recorded_runs / name for name in ("dtkd-0", "dtkd-1", "kd", "alone")], out, published)
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
    yield driver
    driver.quit()


@pytest.fixture
def show(chromium, report):
    def open_page(width=1280, height=900, theme="light"):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": theme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        chromium.get("about:blank")  # the page before must not answer for this one
        chromium.get(report.as_uri())
        wait(chromium, "return document.readyState === 'complete' && typeof widths === 'function'")  # get returns early
        return chromium

    return open_page


def wait(driver, script):
    deadline = time.monotonic() + 20
    while not (value := driver.execute_script(script)):
        assert time.monotonic() < deadline, script
        time.sleep(0.05)
    return value


def reveal_all(driver):
    driver.execute_script("plots.forEach(reveal)")
    wait(driver, "return plots.every((plot) => plot.querySelector('.main-svg'))")


def click(driver, selector):
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)


def test_it_loads_every_chart_without_an_error_or_the_network(show):
    driver = show()
    wait(driver, "return document.querySelectorAll('.plot .main-svg').length > 0")
    reveal_all(driver)
    assert driver.execute_script("return plots.length") > 15
    assert [entry for entry in driver.get_log("browser") if entry["level"] != "INFO"] == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    pictures = "return [...document.images].every((image) => image.naturalWidth === 32)"
    assert driver.execute_script(pictures)


def test_the_table_sorts(show):
    driver = show()
    last = "#table-results th:nth-child(7) button"
    values = (
        "return [...document.querySelectorAll('#table-results td:nth-child(7)')].map((c) => Number(c.dataset.value))"
    )
    click(driver, last)
    rising = driver.execute_script(values)
    assert len(rising) == 3 and rising == sorted(rising)
    assert (
        driver.execute_script("return document.querySelector('#table-results th:nth-child(7)').ariaSort") == "ascending"
    )
    click(driver, last)
    assert driver.execute_script(values) == rising[::-1]
    click(driver, "#table-results th:nth-child(2) button")
    methods = driver.execute_script(
        "return [...document.querySelectorAll('#table-results td:nth-child(2)')].map((c) => c.innerText)"
    )
    assert methods == ["DTKD", "KD", "NONE"]
    click(driver, "#table-results th:nth-child(9) button")
    published = "return [...document.querySelectorAll('#table-results td:nth-child(9)')].map((c) => c.innerText)"
    assert driver.execute_script(published)[-1] == "–", "what is unknown comes last"


def test_the_table_filters(show):
    driver = show()
    box = driver.find_element("css selector", "#table-results input[type=search]")
    box.send_keys("resnet8 max_logit")
    (row,) = driver.execute_script(ROWS)
    assert "DTKD" in row
    box.clear()
    box.send_keys("nothing like it")
    assert driver.execute_script(ROWS) == []


def test_runs_are_switched_off_and_on_everywhere(show):
    driver = show()
    reveal_all(driver)
    traces = (
        "return plots.flatMap((p) => p.closest('[data-group]') ? [] : p.data)"
        ".filter((t) => t.meta === 0 && t.visible !== false).length"
    )
    figures = "return [...document.querySelectorAll('[data-group=\"0\"]')].filter((f) => f.offsetParent).length"
    assert driver.execute_script(traces) > 10 and driver.execute_script(figures) >= 3
    click(driver, "#runs input[value='0']")
    assert driver.execute_script(traces) == 0 and driver.execute_script(figures) == 0
    assert len(driver.execute_script(ROWS)) == 2
    click(driver, "[data-all='0']")
    assert driver.execute_script(ROWS) == []
    click(driver, "[data-all='1']")
    assert driver.execute_script(traces) > 10 and driver.execute_script(figures) >= 3
    assert len(driver.execute_script(ROWS)) == 3


@pytest.mark.parametrize("width", [390, 320, 820])
def test_nothing_overflows(show, width):
    driver = show(width, 844)
    reveal_all(driver)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    scrolls = "table" if width > 700 else "none"  # wide screens scroll a wide table in its card
    over = (
        f"return [...document.querySelectorAll('main *')].filter((e) => !e.closest('thead, .plot, {scrolls}') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 200))"
    )
    assert driver.execute_script(over) == []
    wide = (
        "return plots.filter((p) => p.offsetParent)"
        ".filter((p) => p.querySelector('.main-svg').clientWidth > p.clientWidth + 1).length"
    )
    assert driver.execute_script(wide) == 0


def test_paper_gets_every_chart_at_its_width_and_the_screen_gets_it_back(show):
    driver = show(theme="dark")
    driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert driver.execute_script("return plots.every((plot) => plot.data && plot.layout.width === 320)")
    assert driver.execute_script("return document.documentElement.dataset.theme") == "light"
    driver.execute_script("dispatchEvent(new Event('afterprint'))")
    wait(driver, "return plots.some((plot) => plot.querySelector('.main-svg').clientWidth > 330)")
    assert driver.execute_script("return document.documentElement.dataset.theme") == "dark"


def test_dark_and_light(show):
    colours = (
        "const plot = plots.find((p) => p.data); return [getComputedStyle(document.body).backgroundColor, "
        "getComputedStyle(document.body).color, plot.layout.font.color]"
    )
    seen = {}
    for theme in ("light", "dark"):
        driver = show(theme=theme)
        wait(driver, "return plots.some((plot) => plot.data)")
        seen[theme] = driver.execute_script(colours)
    assert all(a != b for a, b in zip(seen["light"], seen["dark"], strict=True))
    click(driver, "#theme")
    assert driver.execute_script(colours) == seen["light"]

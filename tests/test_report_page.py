"""The page of an audit in a real browser: it loads nothing, fits a phone, and shows the numbers of the document."""

import itertools
import json
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import DIGITS

from lipnext import reports, runs

pytestmark = pytest.mark.slow
pytest.importorskip("jinja2", reason="Jinja2 is not installed (extra: report)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: report)")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra: dev)")

PHONE, DESK = 360, 1100
# WCAG 2.1, 1.4.3: body text against its background, from computed styles.
CONTRAST = """
const light = c => { const s = c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                     return .2126 * s[0] + .7152 * s[1] + .0722 * s[2]; };
const parse = t => t.match(/[0-9.]+/g).map(Number);
const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
                      if (c.length === 3 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
let worst = [99, ""];
for (const e of document.querySelectorAll("body *")) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.closest("svg, td[style]")) continue;
  const a = light(parse(getComputedStyle(e).color).slice(0, 3)), b = light(ground(e));
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 80)];
}
return worst;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        pytest.skip("there is no chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("page")
    runs.train("lipnext/digits", folder / "run", overrides=DIGITS)
    report = reports.audit(folder / "run", samples=20, attacks="minimal-norm", min_cra=["36/255:0.01"])
    (folder / "page.html").write_text(report.html(), encoding="utf-8")
    return folder / "page.html", json.loads(json.dumps(report.document))


def show(browser: Any, page: Path, width: int, **media: str) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def test_it_loads_nothing_and_complains_of_nothing(
    browser: Any, written: tuple[Path, dict[str, Any]]
) -> None:
    page, _ = written
    browser.get_log("performance")
    show(browser, page, DESK)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"][:60] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert page.as_uri() in asked
    assert all(url == page.as_uri() or url.startswith("data:") for url in asked), asked
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    assert browser.execute_script("return document.images.length") > 10


@pytest.mark.parametrize("width", [PHONE, 768, DESK])
def test_no_width_needs_sideways_scrolling_of_the_page(
    browser: Any, written: tuple[Path, dict[str, Any]], width: int
) -> None:
    show(browser, written[0], width)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    outside = (
        "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert browser.execute_script(outside) == []


def test_the_numbers_shown_are_those_of_the_document(
    browser: Any, written: tuple[Path, dict[str, Any]]
) -> None:
    page, document = written
    show(browser, page, DESK)
    shown = browser.execute_script(
        "return [...document.querySelectorAll('data')].map(d => [d.dataset.path, d.value, d.innerText])"
    )
    assert len(shown) > 100
    for path, value, text in shown:
        found: Any = document
        for key in json.loads(path):
            found = found[key]
        assert json.loads(value) == found
        printed = float(text.replace(",", "").removesuffix("%")) / (100 if "%" in text else 1)
        assert printed == pytest.approx(found, rel=1e-2, abs=1.01e-4), path
    cards = browser.execute_script("return [...document.querySelectorAll('.cards dd')].map(d => d.innerText)")
    right = Fraction(round(document["test_part"]["clean"] * 359), 359)
    assert cards[0] == f"{int(right * 10000) / 100:.2f} %"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_dark(
    browser: Any, written: tuple[Path, dict[str, Any]], scheme: str
) -> None:
    show(browser, written[0], DESK, prefers_color_scheme=scheme)
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    ratio, where = browser.execute_script(CONTRAST)
    assert ratio >= 4.5, where


def test_headings_and_tables_are_named_and_regions_can_be_reached_by_keyboard(
    browser: Any, written: tuple[Path, dict[str, Any]]
) -> None:
    show(browser, written[0], DESK)
    levels = browser.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3')].map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= before + 1 for before, later in itertools.pairwise(levels))
    for selector in (
        "table:not(:has(caption))",
        "img:not([alt])",
        "svg:not([aria-label])",
        ".scroll:not([tabindex])",
    ):
        assert browser.execute_script(f"return document.querySelectorAll('{selector}').length") == 0


def test_it_prints_on_a_few_pages(browser: Any, written: tuple[Path, dict[str, Any]]) -> None:
    import base64

    show(browser, written[0], DESK)
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF")
    assert 3 <= pdf.count(b"/Type /Page\n") <= 15

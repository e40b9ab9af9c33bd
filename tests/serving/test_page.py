"""The page in headless Chromium: upload, draw, break, errors, keyboard alone, a narrow screen."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving_process import Server, running

from lipnext import runs

pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: serve)")
pytest.importorskip("selenium", reason="selenium is not installed (extra: dev)")
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="chromium and chromedriver are not installed (Debian: chromium-driver)",
    ),
]


class Page:
    """A browser on the page."""

    def __init__(self, browser: Chrome) -> None:
        self.browser = browser

    def __getitem__(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def wait(self, name: str) -> Any:
        """Wait until an element is shown."""
        WebDriverWait(self.browser, 60).until(lambda _: self[name].is_displayed())
        return self[name]

    def open(self, url: str) -> None:
        self.browser.get(url)
        WebDriverWait(self.browser, 60).until(lambda _: self["facts"].text or self["problem"].text)

    def complaints(self) -> list[str]:
        """What the browser's console holds, apart from refusals that were meant."""
        logged = self.browser.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in logged if "/v1/" not in entry["message"]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "run"
    runs.train(
        "digits", folder, overrides=["model.width=32", "model.depth=2", "model.patch=2", "train.epochs=10"]
    )
    return folder


@pytest.fixture(scope="module")
def server(digits: Path) -> Iterator[Server]:
    with running(digits) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,900"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=Service(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Chrome, server: Server) -> Iterator[Page]:
    page = Page(browser)
    page.open(server.url)
    yield page
    assert page.complaints() == []


@pytest.fixture
def picture(digits: Path, tmp_path: Path) -> tuple[Path, str, float]:
    """A test image as PNG, its label and its certified radius."""
    certificate, test = runs.certify_run(digits)
    k = int(certificate.radius.argmax())
    path = tmp_path / "digit.png"
    Image.fromarray(test.images[k, 0].numpy()).save(path)
    return path, test.classes[int(certificate.label[k])], certificate.radius[k].item()


def test_upload_shows_label_and_radius_and_the_attack_its_flip(
    page: Page, picture: tuple[Path, str, float]
) -> None:
    path, label, radius = picture
    page["file"].send_keys(str(path))
    page.wait("answer")
    assert page["label"].text == label
    shown = float(page["radius"].text.split()[2])
    assert shown < radius < shown + 2e-4
    assert "36/255" in page["bar"].get_attribute("aria-label")
    assert page["rival"].text.startswith("Nearest rival: ")
    assert not page["notes"].is_displayed()
    page.browser.find_element(By.TAG_NAME, "summary").click()
    assert "l2 distance is at most the radius" in page["statement"].text
    page["break"].click()
    page.wait("attack")
    assert page["verdict"].text.startswith("The label first flips at ")
    flip = float(page["verdict"].text.split()[5].rstrip(","))
    assert flip > radius
    rows = [row.text for row in page["budgets"].find_elements(By.TAG_NAME, "tr")]
    assert len(rows) == 8
    assert [row.endswith("held, as proved") for row in rows[:2]] == [True, True]
    assert rows[-1].endswith("label changed")
    for name in ("original", "changed", "difference"):
        assert page[name].size["width"] > 50
        assert page[name].get_attribute("aria-label")
    assert "flipped" in page["bar"].text or "flipped" in page["bar"].get_attribute("innerHTML")


def test_a_resized_picture_says_so(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), (0, 0, 0)).save(tmp_path / "large.jpg")
    page["file"].send_keys(str(tmp_path / "large.jpg"))
    page.wait("answer")
    assert "resized from 64 x 48 to 8 x 8" in page["notes"].text


def test_a_drawing_is_classified(page: Page) -> None:
    page["classify"].click()
    assert page.wait("problem").text == "Nothing is drawn yet."
    canvas = page["canvas"]
    pen = ActionChains(page.browser).move_to_element_with_offset(canvas, 0, -80).click_and_hold()
    for _ in range(8):
        pen = pen.move_by_offset(0, 20)
    pen.release().perform()
    page["classify"].click()
    page.wait("answer")
    assert not page["problem"].is_displayed()
    assert page["label"].text in "0123456789"
    page["clear"].click()
    page["classify"].click()
    assert page.wait("problem").text == "Nothing is drawn yet."


def test_errors_are_told_in_words(page: Page, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("this is no picture")
    page["file"].send_keys(str(tmp_path / "text.png"))
    assert "unreadable picture" in page.wait("problem").text
    assert page["problem"].get_attribute("role") == "alert"
    assert page["status"].text == "No answer."
    assert not page["answer"].is_displayed()


def test_the_keyboard_is_enough(page: Page) -> None:
    def press(*keys: str) -> None:
        ActionChains(page.browser).send_keys(*keys).perform()

    def focus() -> str:
        return str(page.browser.execute_script("return document.activeElement.id"))  # type: ignore[no-untyped-call]

    reached = []
    for _ in range(4):
        press(Keys.TAB)
        reached.append(focus())
    assert reached == ["file", "canvas", "classify", "clear"]
    ActionChains(page.browser).key_down(Keys.SHIFT).send_keys(Keys.TAB, Keys.TAB).key_up(Keys.SHIFT).perform()
    assert focus() == "canvas"
    press(*[Keys.ARROW_UP] * 7, Keys.SPACE, *[Keys.ARROW_DOWN] * 14, Keys.SPACE)
    assert page["status"].text == "Pen lifted."
    press(Keys.TAB, Keys.ENTER)
    page.wait("answer")
    press(Keys.TAB, Keys.TAB)
    assert focus() == "break"
    press(Keys.ENTER)
    page.wait("attack")
    assert focus() == "verdict"
    outline = page.browser.execute_script(  # type: ignore[no-untyped-call]
        "document.getElementById('break').focus({focusVisible: true});"
        "return getComputedStyle(document.activeElement).outlineStyle"
    )
    assert outline == "solid"


def test_every_control_has_a_name(page: Page) -> None:
    page.browser.execute_script(  # type: ignore[no-untyped-call]
        "for (const part of document.querySelectorAll('[hidden]')) part.hidden = false"
    )
    for element in page.browser.find_elements(By.CSS_SELECTOR, "button, input, canvas, img, svg[role]"):
        if element.get_attribute("id") in ("bar", "original", "changed"):
            continue  # named when they are filled, as the first test sees
        assert element.accessible_name, element.get_attribute("outerHTML")
    assert page.browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"
    assert page["status"].aria_role == "status"


def test_a_narrow_screen_needs_no_sideways_scrolling(page: Page, picture: tuple[Path, str, float]) -> None:
    override = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", override)  # type: ignore[no-untyped-call]
    try:
        page["file"].send_keys(str(picture[0]))
        page.wait("answer")
        page["break"].click()
        page.wait("attack")
        wide = page.browser.execute_script(  # type: ignore[no-untyped-call]
            "return [document.documentElement.scrollWidth, ...[...document.querySelectorAll('section, button, canvas, table')]"
            ".map((e) => e.getBoundingClientRect().right)]"
        )
        assert max(wide) <= 320
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})  # type: ignore[no-untyped-call]


def test_a_token_is_asked_for(browser: Chrome, digits: Path, picture: tuple[Path, str, float]) -> None:
    with running(digits, env={"LIPNEXT_TOKEN": "s3cret"}) as server:
        page = Page(browser)
        page.open(server.url)
        assert "token" in page.wait("problem").text
        page.wait("access")
        page["token"].send_keys("wrong", Keys.ENTER)
        WebDriverWait(browser, 60).until(lambda _: page["token"].get_attribute("value") == "")
        assert page["access"].is_displayed()
        page["token"].send_keys("s3cret", Keys.ENTER)
        WebDriverWait(browser, 60).until(lambda _: page["facts"].text)
        assert not page["access"].is_displayed()
        page["file"].send_keys(str(picture[0]))
        page.wait("answer")
        assert page.complaints() == []
        server.stop()
        page["break"].click()
        assert page.wait("problem").text == "The server cannot be reached; is it running?"
        browser.get_log("browser")  # type: ignore[no-untyped-call]

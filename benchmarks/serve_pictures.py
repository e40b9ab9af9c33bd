"""The pictures of docs/serve.md: starts a server, uses its page in headless Chromium, writes docs/serve-*.png.

python benchmarks/serve_pictures.py RUN [--out docs]
"""

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from serve import running

from lipnext.data.dataset import load as load_data
from lipnext.deployment.bundle import load_experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--out", default="docs")
    parser.add_argument("--sample", type=int, default=7)
    options = parser.parse_args()
    test = load_data(load_experiment(Path(options.run)).data).test
    with tempfile.TemporaryDirectory() as folder, running(options.run) as url:
        picture = Path(folder) / "picture.png"
        pixels = test.images[options.sample]
        Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()).save(picture)
        photograph(url, picture, 1100, Path(options.out) / "serve-page.png")
        photograph(url, picture, 390, Path(options.out) / "serve-narrow.png")


def photograph(url: str, picture: Path, width: int, out: Path) -> None:
    """Upload, attack, and save the whole page."""
    browser = Chrome(options=chrome(width), service=Service("/usr/bin/chromedriver"))
    try:
        browser.get(url)
        browser.find_element(By.ID, "file").send_keys(str(picture))
        WebDriverWait(browser, 30).until(lambda b: b.find_element(By.ID, "break").is_displayed())
        browser.find_element(By.ID, "break").click()
        WebDriverWait(browser, 60).until(lambda b: b.find_element(By.ID, "attack").is_displayed())
        browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        shot.quantize(64).save(out, optimize=True)
    finally:
        browser.quit()


def chrome(width: int) -> ChromeOptions:
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},900",
    ):
        options.add_argument(word)
    return options


if __name__ == "__main__":
    main()

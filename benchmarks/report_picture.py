"""The picture of docs/audit.md: the upper part of an audit's page in headless Chromium.

lipnext audit RUN --html audit.html
python benchmarks/report_picture.py audit.html [--out docs/report.png]
"""

import argparse
import base64
import io
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

WIDTH, HEIGHT = 940, 1990


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page")
    parser.add_argument("--out", default="docs/report.png")
    options = parser.parse_args()
    chrome = ChromeOptions()
    chrome.binary_location = "/usr/bin/chromium"
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        chrome.add_argument(word)
    browser = Chrome(options=chrome, service=Service("/usr/bin/chromedriver"))
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(Path(options.page).resolve().as_uri())
        shot = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {})["data"])
    finally:
        browser.quit()
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(96).save(options.out, optimize=True)


if __name__ == "__main__":
    main()

"""Remake the pictures of the docs: `python assets/pictures/take.py [NAME ...]`.

Starts the app on a free port, opens it in headless Chromium (MLPMOE_CHROMIUM, by default
/usr/bin/chromium; needs the package playwright) and writes PNGs with a palette beside this file.
NAME: page, weights, runs and so on; by default all.
"""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).resolve().parent
CHROMIUM = os.environ.get("MLPMOE_CHROMIUM", "/usr/bin/chromium")
WIDTH, HEIGHT = 1400, 1000  # pixels of the window
MARGIN, TALLEST = 12, 1330  # pixels around a tab, and of a picture of one
COLOURS = 128  # of a picture
PATIENCE = 180  # seconds for anything that is waited for
MEASURED = """() => {
    const shown = [...document.querySelectorAll('#cards .card .values')];
    const note = document.querySelector('#card-perplexity .note')?.innerText ?? '';
    return shown.length === 4 && shown.every(card => !card.textContent.includes('…'))
        && !/first look|[0-9] of [0-9]/.test(note);  // the text has ended
}"""


@contextmanager
def running_app() -> Iterator[str]:
    """The address of the app, which ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=HERE.parents[1],
        env=os.environ | {"GRADIO_SERVER_PORT": str(port)},
        stdout=subprocess.DEVNULL,
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                opener.open(f"{url}/config", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the app did not start") from None
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def contains(page: Page, selector: str, text: str) -> None:
    """Wait until there is this text."""
    page.wait_for_function(
        "([s, text]) => document.querySelector(s)?.innerText.includes(text)", arg=[selector, text]
    )


def answered(page: Page) -> None:
    contains(page, "#writing-report", "token")


def routed(page: Page) -> None:
    """With the experts of one word shown."""
    answered(page)
    page.locator("#converted-text [data-token]").nth(5).hover()


def tokens(page: Page) -> None:
    page.wait_for_selector("#worst-sentences li")
    page.wait_for_selector("#branch-correlations .hm")


def trade_offs(page: Page) -> None:
    """A sweep; a preset of each kind stays from the tabs before."""
    page.click("#sweep > button")
    for name, values in (("branches", "16"), ("fade", "0, 0.5, 0.9"), ("keep", "8:16:2")):
        page.fill(f"#sweep-{name} textarea, #sweep-{name} input", values)
    contains(page, "#sweep-plan", "15 runs")
    page.click("#start-sweep")
    contains(page, "#sweep-status", "Done")
    page.click("#sweep > button")
    page.wait_for_function("document.querySelectorAll('#trade-offs .points path').length > 60")


def suggest(page: Page) -> None:
    page.fill("#seconds input[type=number]", "40")
    page.click("#suggest")
    contains(page, "#suggestion", "recipes tried")
    page.locator("#front-table [role=gridcell][data-row='0']").nth(3).wait_for()


def lesson(page: Page) -> None:
    page.wait_for_selector("#lesson svg.mlp")


def training(page: Page) -> None:
    answered(page)
    page.wait_for_selector("#training-curve .legendtext")


def export(page: Page) -> None:
    page.click("#make-checkpoint")
    contains(page, "#export-status", "Made and verified")


# picture -> query, key of the tab, what is done there; on the real model where no other is named
PICTURES = {
    "page": ("fade=0.9", "weights", answered),
    "page-dark": ("fade=0.9", "weights", answered),
    "page-phone": ("fade=0.9", "weights", answered),
    "page-projector": ("fade=0.9", "weights", answered),
    "routed": (
        "method=coactivation&active=0.75&selection=threshold&compensation=mean", "weights", routed
    ),
    "weights": ("fade=0.9&keep=12", "weights", None),
    "tokens": ("fade=0.9", "tokens", tokens),
    "runs": ("model=demo&keep=12&order=least-squares&compensation=refit", "runs", trade_offs),
    "suggest": ("model=demo&keep=12", "suggest", suggest),
    "lesson": ("fade=0.9", "lesson", lesson),
    "training": ("model=demo&keep=8&recover=down&recover_steps=40", "weights", training),
    "export": ("model=demo&keep=12&fade=0.5", "export", export),
}  # fmt: skip
# of the first screen; the others show a tab
SCREENS = {
    "page": (WIDTH, HEIGHT), "page-dark": (WIDTH, HEIGHT), "page-phone": (360, 1500),
    "page-projector": (1280, 720), "routed": (WIDTH, HEIGHT), "training": (WIDTH, HEIGHT),
}  # fmt: skip


def take(page: Page, name: str, url: str) -> None:
    """The first screen of the page, or the tab without what stands around it."""
    query, tab, act = PICTURES[name]
    width, height = SCREENS.get(name, (WIDTH, HEIGHT))
    page.set_viewport_size({"width": width, "height": height})
    theme = "dark" if name.endswith("dark") else "light"
    page.goto(f"{url}/?{query}&tab={tab}&__theme={theme}")
    page.wait_for_selector("#measure")
    if "recover" in query:
        page.wait_for_selector("#training-says h3")
    if "refit" in query or "recover" in query:
        page.click("#measure")
    page.wait_for_function(MEASURED)
    page.mouse.move(0, 0)
    if act:
        act(page)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.evaluate("() => new Promise(done => requestIdleCallback(done, {timeout: 5000}))")
    if name in SCREENS:
        shot = page.screenshot()
    else:
        box = page.locator("#tabs").bounding_box()
        shot = page.screenshot(
            full_page=True,
            clip={
                "x": box["x"] - MARGIN,
                "y": box["y"] - MARGIN,
                "width": box["width"] + 2 * MARGIN,
                "height": min(box["height"] + 2 * MARGIN, TALLEST),
            },
        )
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    path = HERE / f"{name}.png"
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def main(names: list[str]) -> None:
    if unknown := set(names) - set(PICTURES):
        raise SystemExit(f"no picture is called {', '.join(sorted(unknown))}")
    with running_app() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        window = browser.new_context(
            viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light"
        )
        window.set_default_timeout(1000 * PATIENCE)
        page = window.new_page()  # one browser, so that the runs of a tab are there in the next
        for name in names or PICTURES:
            take(page, name, url)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])

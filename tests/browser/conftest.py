"""The page as a person starts and sees it: `python app.py`, and headless Chromium.

The browser is looked for at MLPMOE_CHROMIUM, by default /usr/bin/chromium. With
MLPMOE_SCREENSHOTS=1 every journey leaves pictures in tests/browser/screenshots, of two seconds
each; one that fails always does.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path

import pytest

from tests.browser.on_the_page import PATIENCE, wait_until_measured

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = Path(__file__).resolve().parent / "screenshots"
CHROMIUM = os.environ.get("MLPMOE_CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOGGED_BY_UVICORN = re.compile(
    r"ERROR:\s+Exception in ASGI application\n(?:(?!Exception in ASGI application).)*?"
    r"response already started\.\n",
    re.DOTALL,
)
FORGOTTEN_SESSION = re.compile(r"in sse_stream\n.*?HTTPException: 404: Not Found", re.DOTALL)
START_SECONDS = 120  # until the page has to answer
FAILED = pytest.StashKey[bool]()
# Gradio's page aborts its own event stream as it is left, and logs that as an error
SILENT_ONCE_LEFT = "addEventListener('beforeunload', () => { console.error = () => {} })"
# Gradio counts hidden seconds at every frame, for each output that is awaited: ten frames a second
# leave the cores to what is tested.
TEN_FRAMES = """
window.requestAnimationFrame = shown => setTimeout(() => shown(performance.now()), 100);
window.cancelAnimationFrame = clearTimeout;
"""


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    missing = None
    if not Path(CHROMIUM).exists():
        missing = f"there is no browser at {CHROMIUM}; set MLPMOE_CHROMIUM to one"
    try:
        from playwright.sync_api import Page, sync_playwright
    except ImportError:
        missing = "playwright is not installed"
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    with sync_playwright() as playwright, pytest.MonkeyPatch.context() as patch:
        # Playwright looks at every frame, which makes the browser draw each of them
        patch.setattr(Page, "wait_for_function", partialmethod(Page.wait_for_function, polling=100))
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


class App:
    """The app, started by its own entry point on a port that it keeps, also when it is started
    again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log.txt"
        ours = ("SPACE_ID", "MLPMOE_ALLOW_ANY_MODEL", "GRADIO_ROOT_PATH", "GRADIO_SERVER_NAME")
        self.environment = {name: v for name, v in os.environ.items() if name not in ours}
        # no network, and nothing of what this machine has fetched before
        self.environment |= {
            "GRADIO_SERVER_PORT": str(port),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hub"),
        }

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "app.py"],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=output,
            )
        self._wait_for_answer()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)

    def restart(self) -> None:
        self.stop()
        self.start()

    def written(self) -> str:
        return self.log.read_text()

    def faults(self) -> str:
        """What the app has written from its first traceback on, empty without one.

        Gradio's page aborts its event stream as it is left; where an answer still comes in, it
        asks for the stream again, whose session is forgotten by then, and uvicorn logs that. A
        page that somebody looks at would say so in its console, which `new_window` refuses."""
        written = LOGGED_BY_UVICORN.sub(
            lambda found: "" if FORGOTTEN_SESSION.search(found[0]) else found[0], self.written()
        )
        start = written.find("Traceback")
        return "" if start < 0 else written[start:][:4000]

    def _wait_for_answer(self) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with opener.open(f"{self.url}/config", timeout=5):
                    return
            except OSError:
                assert self.process.poll() is None, f"no start:\n{self.written()[-2000:]}"
                assert time.monotonic() < deadline, "the page does not answer"
                time.sleep(0.1)


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    app = App(tmp_path_factory.mktemp("app"))
    try:
        app.start()
        yield app
        assert app.process.poll() is None, f"the app has ended:\n{app.written()[-2000:]}"
    finally:
        app.stop()
    # what Gradio itself refuses, such as a value beyond a slider's end, would show here as well
    assert not app.faults()


@pytest.fixture(scope="session")
def server(app: App) -> str:
    """The address of the app."""
    return app.url


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> object:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


@pytest.fixture
def new_window(browser, server: str, request: pytest.FixtureRequest) -> Iterator[Callable]:
    """Opens browser windows of their own; afterwards none may have asked another machine for
    anything, or logged an error."""
    contexts, elsewhere, complaints = [], [], []

    def watch(page) -> None:
        page.on("request", lambda request: elsewhere.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: message.type == "error" and complaints.append(message.text),
        )

    def open_window(width: int = 1400, height: int = 1000, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(PATIENCE)
        context.add_init_script(SILENT_ONCE_LEFT + TEN_FRAMES)
        context.on("page", watch)
        contexts.append(context)
        return context

    yield open_window
    for context in contexts:
        if request.node.stash.get(FAILED, False):
            SCREENSHOTS.mkdir(exist_ok=True)
            for number, page in enumerate(context.pages):
                page.screenshot(
                    path=SCREENSHOTS / f"failed-{request.node.name}-{number}.png", full_page=True
                )
        context.close()
    assert [u for u in elsewhere if not u.startswith((f"{server}/", "data:", "blob:"))] == []
    assert complaints == []


@pytest.fixture
def open_page(new_window, server: str) -> Callable:
    """Opens the page, by default in a new window, and waits until everything on it is filled in.
    A link measures on the shortest text that ships, unless it names another."""

    def open_it(query: str = "", window=None, **options):
        page = (window or new_window(**options)).new_page()
        if query and "text=" not in query:
            query += "&text=proxy"
        page.goto(f"{server}/{query}")
        wait_until_measured(page)
        return page

    return open_it


@pytest.fixture
def take_picture(request: pytest.FixtureRequest) -> Callable:
    def take(page, name: str, full_page: bool = True) -> None:
        if os.environ.get("MLPMOE_SCREENSHOTS") != "1":
            return
        SCREENSHOTS.mkdir(exist_ok=True)
        journey = re.sub(r"^test_", "", request.node.name)
        page.screenshot(path=SCREENSHOTS / f"{journey}-{name}.png", full_page=full_page)

    return take

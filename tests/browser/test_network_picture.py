"""The picture of the network on a page of its own: mouse, keyboard, token, theme, phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import gradio as gr
import pytest
import torch

from mlpmoe.explorer.launch import launch_kwargs
from mlpmoe.explorer.server.events import QUIET
from mlpmoe.explorer.shell.network import Column, network_component, network_value, static_columns

pytestmark = pytest.mark.browser

LABEL = "<img src=x onerror=\"document.title = 'executed'\">"
LEFT = torch.ones(30, 16) - torch.arange(16) / 20  # later branches lose more
LEFT[:, 12:] = 0
VALUES = {
    "branches": network_value("branches", static_columns(LEFT, {0}), 3, label=LABEL),
    "experts": network_value(
        "experts",
        [Column([1.0] * 4 + [0.5] * 12, always=4) for _ in range(6)],
        0,
        used=[[[0, 1, 2, 3, 5]] * 6, [[0, 1, 2, 3, 15]] * 6],
    ),
    "neurons": network_value("neurons", [Column([1 - i / 64 for i in range(64)])] * 48, 47),
    "nothing": None,
}
# the colour in the middle of a cell
COLOUR = """([layer, cell, layers, cells]) => {
    const [canvas, grid] = ['canvas', '.network-grid'].map(s => document.querySelector(s));
    const ratio = canvas.width / canvas.clientWidth;
    const x = grid.offsetLeft + (layer + 0.5) * grid.offsetWidth / layers;
    const y = grid.offsetTop + (cell + 0.5) * grid.offsetHeight / cells;
    return [...canvas.getContext('2d').getImageData(x * ratio, y * ratio, 1, 1).data].join();
}"""
TOKEN = "token => document.dispatchEvent(new CustomEvent('mlpmoe:token', {detail: token}))"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A page with the picture only; what it is clicked for is written beneath it."""

    def say(event: gr.EventData) -> str:
        return str(event._data)

    with gr.Blocks(analytics_enabled=False) as demo:
        gr.Markdown("# mlpmoe")
        network = network_component()
        said = gr.Textbox(label="said", elem_id="said")
        network.click(say, None, said, **QUIET)
        for name, value in VALUES.items():
            button = gr.Button(name, elem_id=f"show-{name}")
            button.click(lambda value=value: value, None, network, **QUIET)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_kwargs())
    yield url.rstrip("/")
    demo.close()


@pytest.fixture
def open_network(new_window, server: str) -> Callable:
    """Opens the page with one of VALUES."""

    def open_it(name: str, **options):
        page = new_window(**options).new_page()
        page.goto(f"{server}/")
        page.wait_for_selector(".network.bare .network-empty")
        show(page, name)
        return page

    return open_it


def show(page, name: str) -> None:
    page.click(f"#show-{name}")
    shown = f".network:not(.bare) .network-legend[data-kind={name}]"
    page.wait_for_selector(".network.bare" if VALUES[name] is None else shown)


def wait_for_said(page, expected: dict) -> None:
    page.wait_for_function(
        "said => document.querySelector('#said textarea').value === said", arg=str(expected)
    )


def middle(page, layer: int, cell: int, layers: int, cells: int) -> dict[str, float]:
    box = page.locator(".network-grid").bounding_box()
    return {
        "x": (layer + 0.5) / layers * box["width"],
        "y": (cell + 0.5) / cells * box["height"],
    }


def reading(page) -> str:
    return page.inner_text(".network-reading")


def test_mouse_reads_looks_and_spares(open_network):
    page = open_network("branches")
    grid = page.locator(".network-grid")
    grid.hover(position=middle(page, 7, 5, 30, 16))
    assert "layer 7" in reading(page) and "branch 5" in reading(page) and "75 %" in reading(page)
    grid.hover(position=middle(page, 7, 13, 30, 16))
    assert "branch 13" in reading(page) and "%" not in reading(page)
    grid.hover(position=middle(page, 0, 13, 30, 16))
    assert "dense" in reading(page) and "branch" not in reading(page)
    grid.click(position=middle(page, 9, 4, 30, 16))
    wait_for_said(page, {"action": "look", "layer": 9, "cell": 4})
    grid.click(position=middle(page, 0, 4, 30, 16))
    wait_for_said(page, {"action": "look", "layer": 0, "cell": None})
    page.click(".network-spare")
    wait_for_said(page, {"action": "spare", "layer": 0})


def test_keyboard_is_one_stop_and_goes_by_arrows(open_network):
    page = open_network("branches")
    page.locator(".network-cell").focus()
    assert "layer 3" in reading(page) and "branch 0" in reading(page)
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowDown"):
        page.keyboard.press(key)
    assert "layer 5" in reading(page) and "branch 1" in reading(page)
    assert page.get_attribute(".network-cell", "aria-label") == reading(page)
    assert page.get_attribute(".network-cell", "aria-selected") == "false"
    page.keyboard.press("Enter")
    wait_for_said(page, {"action": "look", "layer": 5, "cell": 1})
    assert page.get_attribute(".network-cell", "aria-selected") == "true"
    page.keyboard.press("End")
    page.keyboard.press("s")
    wait_for_said(page, {"action": "spare", "layer": 29})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "network-spare"
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+Tab")
    assert "layer 29" in reading(page)


def test_a_token_shows_the_experts_that_it_uses(open_network):
    page = open_network("experts")

    def colours() -> list[str]:
        return [page.evaluate(COLOUR, [2, cell, 6, 16]) for cell in (1, 5, 15)]

    shared, same, other = before = colours()
    assert same == other != shared
    page.evaluate(TOKEN, 0)
    always, used, unused = colours()
    assert always == used == shared
    assert unused not in (used, other)
    assert "30 of 96" in reading(page)
    page.evaluate(TOKEN, 1)
    assert colours() == [always, unused, used]
    page.evaluate(TOKEN, 2)  # beyond the answer
    assert colours() == before
    page.evaluate(TOKEN, 1)
    page.evaluate(TOKEN, None)
    assert colours() == before


def test_the_picture_follows_the_theme(open_network):
    page = open_network("branches", color_scheme="light")
    light = page.evaluate(COLOUR, [5, 0, 30, 16])
    page.evaluate("document.body.classList.add('dark')")
    page.wait_for_function(
        f"([light, place]) => ({COLOUR})(place) !== light", arg=[light, [5, 0, 30, 16]]
    )


def test_a_name_is_text(open_network):
    page = open_network("branches")
    assert page.inner_text(".network-label") == LABEL
    assert page.locator(".network img").count() == 0


@pytest.mark.parametrize("width", [1000, 320])
def test_every_network_has_the_same_place(open_network, width: int):
    """And none makes a phone scroll sideways."""
    page = open_network("nothing", width=width)
    heights = set()
    for name in ("branches", "experts", "neurons", "nothing"):
        show(page, name)
        heights.add(page.locator("#network").bounding_box()["height"])
        reach = page.evaluate("document.documentElement.scrollWidth")
        assert reach <= width, name
    assert len(heights) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(open_network, scheme: str):
    from axe_playwright_python.sync_playwright import Axe

    page = open_network("nothing", color_scheme=scheme)
    found = []
    for name in ("nothing", "branches", "experts"):
        show(page, name)
        found += Axe().run(page, "#network").response["violations"]
    assert [(wrong["id"], wrong["nodes"]) for wrong in found] == []

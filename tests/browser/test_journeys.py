"""Journeys through the first screen. Each is a story that a person could tell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpmoe.core.choices import METHODS
from mlpmoe.core.static.compensation import COMPENSATIONS
from mlpmoe.core.static.order import ORDERS
from tests.browser.on_the_page import (
    HERE,
    ON_THE_CURVE,
    answer,
    answers,
    choose,
    click_in_network,
    figure,
    load_model,
    network_picture,
    notice,
    open_accordion,
    open_broken_link,
    open_tab,
    slider,
    value,
    wait_for_address,
    wait_for_answer,
    wait_for_choice,
    wait_for_exactly,
    wait_for_here,
    wait_for_new_answer,
    wait_for_new_figure,
    wait_for_other_picture,
    wait_for_other_text,
    wait_for_outlines,
    wait_for_spec,
    wait_for_text,
    wait_for_value,
    wait_until_measured,
    wait_until_still,
)
from tests.tiny import D_FF, LAYERS, save_tiny_model

pytestmark = pytest.mark.browser

DEMO_LAYERS = 8
FIRST_SCREEN = ("#sentence", "#controls", "#curve", "#network", "#cards", "#dense-pane",
                "#converted-pane")  # fmt: skip
# By how much of the window things were moved that nobody touched, as browsers count it.
COUNT_SHIFTS = """
window.shifted = 0;
new PerformanceObserver(list => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) shifted += entry.value;
}).observe({ type: 'layout-shift', buffered: true });
"""
IN_SIGHT = """selector => {
    const box = document.querySelector(selector).getBoundingClientRect();
    return box.top >= 0 && box.left >= 0 && box.right <= innerWidth && box.bottom <= innerHeight
        && box.height > 20;
}"""


def for_other_tabs(config: dict, asked: list[int], tab: str) -> list[str]:
    """Names of the events that fill in nothing but tabs that are not this one."""
    kinds = {component["id"]: component for component in config["components"]}

    def places(node: dict, within: str | None) -> Iterator[tuple[int, str | None]]:
        kind = kinds.get(node["id"], {})
        if within is None and kind.get("type") == "tabitem":
            within = kind["props"]["label"]
        yield node["id"], within
        for child in node.get("children", []):
            yield from places(child, within)

    where = dict(places(config["layout"], None))
    events = {event["id"]: event for event in config["dependencies"]}
    filled = {number: {where.get(o) for o in events[number]["outputs"]} for number in asked}
    return [events[number]["api_name"] for number in asked if not filled[number] & {None, tab}]


def test_the_first_screen(new_window, server: str, take_picture):
    """Somebody opens the page, touches nothing, and sees without scrolling what the published
    recipe does and costs, on two pictures and in two texts; nothing jumps meanwhile. Then they
    move the sliders by keyboard and by mouse, and everything follows. What is in tabs that they
    have not opened is not computed."""
    window = new_window()
    window.add_init_script(COUNT_SHIFTS)
    page = window.new_page()
    asked: list[int] = []
    page.on(
        "request",
        lambda request: (
            "/queue/join" in request.url and asked.append(request.post_data_json["fn_index"])
        ),
    )
    page.goto(server)
    wait_until_measured(page)
    wait_for_answer(page)
    shifted = page.evaluate("shifted")
    print(f"layout shift: {shifted:.3f}")
    assert shifted < 0.1
    assert [block for block in FIRST_SCREEN if not page.evaluate(IN_SIGHT, block)] == []
    assert page.evaluate("scrollY") == 0
    wait_for_spec(page, branches=16, fade=0.9, keep=16)
    assert page.title() == "mlpmoe"
    assert "Demo" in page.inner_text("#status")
    assert "Fractal Fade" in page.input_value("#preset input")
    removed = re.search(r"MLPs −([\d.]+)", figure(page, "nonzero", "difference")).group(1)
    sentence = page.inner_text("#sentence")
    assert f"{removed}\u202f%" in sentence.replace("\xa0", "\u202f") and "perplexity" in sentence
    assert figure(page, "compute", "dense") == figure(page, "compute")  # zeros save nothing
    assert figure(page, "perplexity", "dense") != figure(page, "perplexity")
    assert page.locator("#axis input[value=nonzero]").is_checked()  # where fade saves something
    wait_for_here(page, 100 - float(removed))
    dense, converted = answers(page)
    assert len(dense) > 20 < len(converted)
    wait_for_outlines(page, stays=16, zeroed=15, thresholds=15)
    take_picture(page, "untouched")

    before = {card: figure(page, card) for card in ("perplexity", "nonzero", "compute")}
    picture = network_picture(page)
    slider(page, "keep").focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    wait_for_value(page, "keep", 12)
    for card, old in before.items():
        wait_for_new_figure(page, card, old)
    assert "−" in figure(page, "compute", "difference")
    wait_for_value(page, "budget", 75)
    wait_for_text(page, "#sentence", "4 of 16 branches")
    wait_for_outlines(page, stays=12, zeroed=11, thresholds=11, dropped=4)
    assert network_picture(page) != picture
    take_picture(page, "faded-and-cut")

    slider(page, "branches").scroll_into_view_if_needed()
    box = slider(page, "branches").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 15 / 63, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    page.wait_for_function(
        "Number(document.querySelector('#branches input[type=number]')?.value) < 12"
    )
    branches = int(value(page, "branches"))
    kept = int(branches * 12 / 16 + 0.5)  # the same share of them
    wait_for_value(page, "keep", kept)
    wait_until_measured(page)
    page.locator(f"#keep input[type=range][max='{branches}']").wait_for()
    slider(page, "branches").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    branches += 5
    kept = int(branches * 12 / 16 + 0.5)
    wait_for_spec(page, branches=branches, keep=kept)
    wait_for_outlines(
        page, stays=kept, zeroed=kept - 1, thresholds=kept - 1, dropped=branches - kept
    )
    wait_until_measured(page)
    assert page.locator("[data-testid=toast-text]").all_inner_texts() == []
    assert len(asked) > 10
    assert for_other_tabs(page.evaluate("gradio_config"), asked, "Weights") == []


def test_the_budget(open_page, take_picture):
    """A teacher drags along the curve, then takes the slider of the budget: K, the sentence, the
    point on the curve, the network and the address follow; and looks at the other axis."""
    page = open_page("?keep=12")
    wait_for_here(page, 75)
    wait_for_value(page, "budget", 75)
    dearer, picture = page.evaluate(HERE)["y"], network_picture(page)
    page.mouse.move(*page.evaluate(ON_THE_CURVE, 75))
    page.mouse.down()
    page.mouse.move(*page.evaluate(ON_THE_CURVE, 62), steps=8)
    wait_for_value(page, "keep", 10)  # while it is dragged
    page.mouse.move(*page.evaluate(ON_THE_CURVE, 51), steps=8)
    page.mouse.up()
    wait_for_spec(page, branches=16, keep=8, budget=50)
    wait_for_text(page, "#sentence", "8 of 16 branches")
    wait_for_address(page, "keep=8")
    wait_for_here(page, 50)
    assert page.evaluate(HERE)["y"] > dearer
    assert network_picture(page) != picture
    wait_until_measured(page)
    take_picture(page, "dragged")

    slider(page, "budget").focus()
    for _ in range(25):
        page.keyboard.press("ArrowRight")
    wait_for_spec(page, keep=12, budget=75)
    wait_for_address(page, "keep=12")
    slider(page, "keep").focus()
    page.keyboard.press("ArrowRight")
    wait_for_value(page, "budget", 81)  # 13 of 16
    wait_for_here(page, 81)

    assert "multiply-adds" in page.text_content("#curve .xtitle")
    page.locator("#axis label", has_text="non-zero").click()
    page.wait_for_function(
        "document.querySelector('#curve .xtitle')?.textContent.includes('non-zero')"
    )
    assert page.locator("[data-testid=toast-text]").all_inner_texts() == []


def test_a_layer_is_spared(open_page, take_picture):
    """A researcher clicks on a layer in the network, keeps it dense, reloads, and cuts it again by
    keyboard."""
    page = open_page("?keep=8")
    costly = figure(page, "compute")
    wait_for_answer(page)
    written = answer(page)
    open_accordion(page, "more")
    page.locator("#spared input, #spared textarea").wait_for()
    click_in_network(page, 3, DEMO_LAYERS)
    wait_for_value(page, "layer", 3)
    wait_for_text(page, "#histograms .xtitle", "layer 3")
    picture = network_picture(page)
    page.click(".network-spare")
    wait_for_address(page, "spared=3")
    wait_for_new_figure(page, "compute", costly)
    assert page.input_value("#spared input, #spared textarea") == "3"
    wait_for_other_picture(page, picture)
    wait_for_text(page, "#sentence", "layer 3")
    wait_for_value(page, "budget", 56)  # half of seven layers, and one
    wait_until_measured(page)
    spared = {card: figure(page, card) for card in ("perplexity", "nonzero", "compute")}
    wait_for_new_answer(page, written)
    take_picture(page, "spared")

    page.reload()
    wait_until_measured(page)
    assert {card: figure(page, card) for card in spared} == spared
    page.locator(".network-cell").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    wait_for_text(page, ".network-reading", "spared")
    wait_for_text(page, ".network-spare", "Convert layer 3")
    page.keyboard.press("s")
    wait_for_address(page, "keep=8", without="spared")
    wait_for_exactly(page, "#card-compute .converted", costly)
    wait_for_value(page, "budget", 50)
    assert page.locator("[data-testid=toast-text]").all_inner_texts() == []


def test_another_method(open_page, take_picture):
    """Somebody asks what a router would do at the same budget: the other sliders come in the same
    place, every picture speaks of the routed model, and its words show their experts; then they
    return to MLPMoE as it was."""
    page = open_page("?keep=12")
    static = {card: figure(page, card) for card in ("perplexity", "nonzero", "compute")}
    place = slider(page, "branches").bounding_box()["y"]
    choose(page, "method", METHODS["contiguous"].label)
    slider(page, "experts").wait_for(state="visible")
    assert abs(slider(page, "experts").bounding_box()["y"] - place) < 60
    assert not slider(page, "branches").is_visible()
    wait_for_spec(page, active=0.75, experts=16, budget=75)
    wait_for_address(page, "method=contiguous", "active=0.75")
    wait_for_new_figure(page, "compute", static["compute"])
    wait_for_text(page, "#card-nonzero .note", "all weights stay")
    wait_until_measured(page)
    wait_for_text(page, "#sentence", "router")
    assert figure(page, "perplexity") != static["perplexity"]
    assert page.locator("#measure").count() == 1
    headings = page.locator("h3, h4").all_inner_texts()
    assert len([words for words in headings if "perplexity" in words.lower()]) == 1
    wait_for_here(page, 76, near=4)  # with what the routers cost
    page.wait_for_selector("#split .bars .point", state="attached")  # some are of nothing
    assert page.locator("#words-by-expert [data-cells]").count() > 20
    take_picture(page, "routed")

    page.wait_for_selector("#converted-text [data-token]")
    wait_until_still(page, "#converted-text")
    still = network_picture(page)
    page.locator("#converted-text [data-token]").nth(2).hover()
    wait_for_other_picture(page, still)
    wait_for_text(page, ".network-reading", "experts")
    page.locator("#title").hover()
    page.wait_for_function(
        "still => document.querySelector('#network canvas').toDataURL() === still", arg=still
    )
    page.locator("#words-by-expert [data-cells]").nth(5).hover()
    wait_for_other_picture(page, still)

    choose(page, "method", METHODS["mlpmoe"].label)
    slider(page, "branches").wait_for(state="visible")
    wait_for_address(page, "keep=12", without="method")
    wait_for_exactly(page, "#card-perplexity .converted", static["perplexity"])
    assert {card: figure(page, card) for card in static} == static
    wait_for_outlines(page, stays=12, dropped=4)
    assert page.locator("[data-testid=toast-text]").all_inner_texts() == []


def test_two_models_write(open_page, take_picture):
    """A teacher cuts the model in half and both go on by themselves; asks them something else;
    stops a long text; forgets the prompt and is told so."""
    page = open_page("?branches=16&keep=8")
    open_accordion(page, "writing-options")
    wait_for_value(page, "tokens", 48)
    wait_for_answer(page)
    first = answers(page)
    assert first[0] != first[1]
    wait_for_text(page, "#writing-report", "part at token")
    page.fill("#prompt textarea", "Once upon a time, there was a dragon who liked")
    page.keyboard.press("Enter")
    wait_for_other_text(page, "#dense-text", first[0])
    wait_for_other_text(page, "#converted-text", first[1])
    wait_until_still(page, "#converted-text")
    take_picture(page, "side-by-side")

    slider(page, "tokens").focus()
    page.keyboard.press("End")
    wait_for_value(page, "tokens", 256)
    slider(page, "temperature").focus()
    page.keyboard.press("End")
    wait_for_value(page, "temperature", 1.5)
    before = answers(page)[0]
    page.click("#write")
    wait_for_other_text(page, "#dense-text", before)
    page.click("#stop-writing")
    wait_for_text(page, "#writing-report", "Stopped")
    wait_until_still(page, "#dense-text")
    assert len(answers(page)[0].split()) < 200  # of 256 tokens

    page.fill("#prompt textarea", "")
    page.click("#write")
    assert "prompt is empty" in notice(page).lower()
    page.locator("#follow input").uncheck()
    page.fill("#prompt textarea", "The end")
    slider(page, "tokens").focus()
    page.keyboard.press("Home")
    stopped = answers(page)[0]
    page.click("#write")  # nothing is in the way any more
    wait_for_other_text(page, "#dense-text", stopped)
    page.wait_for_selector("#writing-report .loss-scale")  # and it comes to its end
    assert page.locator("[data-testid=toast-text]").all_inner_texts() == []


def test_two_tabs_and_a_link(open_page, new_window, server, take_picture):
    """Two visitors look at different conversions at once; one reloads; another has a link that is
    broken."""
    window = new_window()
    first = open_page("?branches=16&fade=0.9", window=window)
    second = open_page("?branches=8&keep=4&compensation=none", window=window)
    wait_for_spec(first, branches=16, fade=0.9, keep=16)
    wait_for_outlines(first, stays=16, zeroed=15, thresholds=15)
    wait_for_spec(second, branches=8, fade=0, keep=4)
    wait_for_outlines(second, stays=4, dropped=4)
    mine = {card: figure(first, card) for card in ("perplexity", "nonzero", "compute")}

    shown = figure(second, "perplexity")
    slider(second, "keep").focus()
    second.keyboard.press("ArrowLeft")
    wait_for_value(second, "keep", 3)
    wait_for_outlines(second, stays=3, dropped=5)
    wait_for_new_figure(second, "perplexity", shown)
    assert {card: figure(first, card) for card in mine} == mine
    assert value(first, "keep") == 16

    first.reload()
    first.wait_for_function(
        """wanted => Object.entries(wanted).every(([card, text]) =>
            document.querySelector(`#card-${card} .converted`)?.innerText === text)""",
        arg=mine,
    )
    wait_for_outlines(first, stays=16, zeroed=15, thresholds=15)
    first.close()  # a browser opens few connections to one server, and every tab keeps some
    second.close()

    for query, said in (
        ("?branches=8&keep=9", "between 1 and"),
        ("?fade=<img src=//elsewhere.invalid/x.png onerror=alert(1)>", "<img"),
        ("?branches=65", "at most 64"),
    ):
        broken = open_broken_link(window, server, query, said)
        take_picture(broken, "broken-link", full_page=False)
        wait_for_spec(broken, branches=16, fade=0.9, keep=16)
        broken.close()


def test_another_model(open_page, take_picture, tmp_path: Path):
    """Somebody mistypes a model's name, is told, goes on with the demo model; then loads a model
    of their own from a folder, smaller in every respect, and returns."""
    page = open_page("?branches=64")
    wait_for_spec(page, branches=64, keep=64)
    status = page.inner_text("#status")
    load_model(page, "no such model")
    assert "does not name a model" in notice(page)
    wait_for_exactly(page, "#status", status)
    shown = figure(page, "nonzero")
    slider(page, "fade").focus()
    page.keyboard.press("End")
    wait_for_new_figure(page, "nonzero", shown)

    folder = save_tiny_model(tmp_path / "my-model")
    load_model(page, str(folder))
    wait_for_text(page, "#status", f"d_ff {D_FF}")
    assert page.inner_text("#status").startswith("my-model")
    wait_for_value(page, "branches", D_FF)
    wait_for_value(page, "keep", D_FF)
    for control, most in (("branches", D_FF), ("keep", D_FF), ("layer", LAYERS - 1)):
        page.locator(f"#{control} input[type=range][max='{most}']").wait_for()
    wait_for_outlines(page, stays=D_FF, zeroed=D_FF - 1, thresholds=D_FF - 1)
    page.click("#measure")  # by itself only a part of a text that is long in bytes, its tokens
    wait_until_measured(page)
    take_picture(page, "own-model")
    slider(page, "layer").focus()
    page.keyboard.press("End")
    wait_for_text(page, "#histograms .xtitle", "layer 1")

    load_model(page, "demo")
    wait_for_exactly(page, "#status", status)
    wait_for_text(page, "#histograms .xtitle", "layer 0")
    page.locator("#branches input[type=range][max='64']").wait_for()
    assert page.locator("[data-testid=toast-text]").all_inner_texts() == []


def test_a_better_recipe_is_found_and_taken(open_page, take_picture):
    """Somebody looks into every stage, takes a preset that calibrates and waits for its figures;
    gives a calibration text that is too short; then asks for the best recipe that looks at nothing
    but the weights, and takes the first."""
    page = open_page("?branches=16")
    untouched = {card: figure(page, card) for card in ("nonzero", "compute")}
    open_accordion(page, "more")
    page.locator("#order input").wait_for()
    choose(page, "preset", "Keep 12 of 16, least squares *")
    wait_for_spec(page, branches=16, fade=0, keep=12)
    wait_for_choice(page, "order", f"{ORDERS['least-squares'].label} *")
    wait_for_choice(page, "compensation", f"{COMPENSATIONS['refit'].label} *")
    for card, old in untouched.items():
        wait_for_new_figure(page, card, old)
    wait_until_measured(page)
    wait_for_choice(page, "preset", "Keep 12 of 16, least squares *")
    assert "−" in figure(page, "compute", "difference")
    take_picture(page, "least-squares")
    calibrated = page.input_value("#calibration-text input")
    open_accordion(page, "text-choice")
    page.fill("#own-text textarea", "Much too short.")
    page.click("#calibrate-on-own-text")
    assert re.search(r"at least [\d,]+", notice(page))
    choose(page, "calibration-text", calibrated)

    open_tab(page, "Suggest")
    page.locator("#seconds input[type=number]").fill("10")
    page.get_by_label("May look at a calibration text").uncheck()
    page.click("#suggest")
    wait_for_text(page, "#suggestion", "recipes tried")
    first = page.locator("#front-table [role=gridcell][data-row='0']")
    first.nth(3).wait_for()
    perplexity, nonzero, compute, recipe = first.all_inner_texts()
    assert "*" not in page.inner_text("#front-table")
    assert re.search(r"\d+ recipes tried, \d+ measured", page.inner_text("#suggestion"))
    assert page.locator("#suggested-front .points path.point").count() > 3
    take_picture(page, "suggested")

    first.nth(3).click()
    page.wait_for_function(
        """([perplexity, nonzero, compute]) => {
            const said = card => document.querySelector(`#card-${card} .difference`)?.innerText;
            return said('perplexity') === perplexity && said('nonzero')?.includes(nonzero)
                && said('compute')?.includes(compute);
        }""",
        arg=[perplexity, nonzero, compute],
    )
    wait_until_measured(page)
    kept = re.search(r"keeps (\d+) of (\d+) branches", recipe)
    branches, keep = value(page, "branches"), value(page, "keep")
    assert (keep, branches) == (int(kept[1]), int(kept[2])) if kept else keep == branches
    assert page.input_value("#compensation input").endswith("*") is False
    take_picture(page, "taken")

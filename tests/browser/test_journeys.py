"""Journeys through the real page. Each is a story that a person could tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlpmoe.core.compensation import COMPENSATIONS
from mlpmoe.core.order import ORDERS
from tests.browser.on_the_page import (
    choose,
    figure,
    load_model,
    notice,
    open_broken_link,
    open_tab,
    slider,
    value,
    wait_for_choice,
    wait_for_exactly,
    wait_for_new_figure,
    wait_for_outlines,
    wait_for_spec,
    wait_for_text,
    wait_for_value,
    wait_until_measured,
    wait_until_still,
)
from tests.tiny import D_FF, LAYERS, save_tiny_model

pytestmark = pytest.mark.browser


def test_first_visit(open_page, take_picture):
    """Somebody opens the page, touches nothing, and sees the demo model measured; then moves the
    three sliders, two of them by keyboard, and everything follows."""
    page = open_page()
    assert page.title() == "mlpmoe"
    assert "Demo" in page.inner_text("#status")
    assert figure(page, "perplexity", "dense") == figure(page, "perplexity")
    wait_for_outlines(page, stays=16)
    assert page.locator("#heat .hm").count() == 1
    take_picture(page, "untouched")

    untouched = {card: figure(page, card) for card in ("perplexity", "nonzero", "compute")}
    slider(page, "fade").focus()
    for _ in range(18):
        page.keyboard.press("ArrowRight")
    wait_for_value(page, "fade", 0.9)
    wait_for_outlines(page, stays=16, zeroed=15, thresholds=15)
    faded = wait_for_new_figure(page, "nonzero", untouched["nonzero"])
    assert figure(page, "nonzero", "difference").startswith("−")
    assert figure(page, "compute") == untouched["compute"]  # zeros in place save nothing
    worse = wait_for_new_figure(page, "perplexity", untouched["perplexity"])
    assert "Fractal Fade" in page.input_value("#preset input")

    slider(page, "keep").focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    wait_for_value(page, "keep", 12)
    wait_for_outlines(page, stays=12, zeroed=11, thresholds=11, dropped=4)
    wait_for_new_figure(page, "nonzero", faded)
    wait_for_new_figure(page, "compute", untouched["compute"])
    assert "−" in figure(page, "compute", "difference")
    wait_for_new_figure(page, "perplexity", worse)
    take_picture(page, "faded-and-cut")

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
    wait_for_outlines(
        page, stays=kept, zeroed=kept - 1, thresholds=kept - 1, dropped=branches - kept
    )
    assert page.get_attribute("#keep input[type=range]", "max") == str(branches)
    wait_until_measured(page)
    assert page.locator("[data-testid=toast-text]").count() == 0
    take_picture(page, "moved-by-mouse")

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
    assert page.locator("[data-testid=toast-text]").count() == 0


def test_two_models_write(open_page, take_picture):
    """A teacher cuts the model in half and lets both write the same beginning; stops a long text;
    forgets the prompt and is told so; and looks at the lesson about it."""
    page = open_page("?branches=16&keep=8")
    wait_for_spec(page, branches=16, keep=8)
    open_tab(page, "Generations")
    page.fill("#prompt textarea", "Once upon a time, there was a dragon who liked")
    page.click("#write")
    wait_for_text(page, "#writing-report", "from token")
    dense, converted = (
        page.input_value(f"#{pane}-text textarea") for pane in ("dense", "converted")
    )
    assert dense
    assert converted
    assert dense != converted
    assert "K 8" in page.inner_text("#writing-report")
    assert re.search(r"[\d.]+ tokens/s", page.inner_text("#writing-report"))
    take_picture(page, "side-by-side")

    slider(page, "tokens").focus()
    page.keyboard.press("End")
    slider(page, "temperature").focus()
    page.keyboard.press("End")
    page.click("#write")
    page.wait_for_function(
        "old => { const now = document.querySelector('#dense-text textarea')?.value;"
        " return now && now !== old && now.length > 3; }",
        arg=dense,
    )
    page.click("#stop-writing")
    wait_until_still(page, "#dense-text textarea")
    stopped = page.inner_text("#writing-report")
    assert "256 tokens" not in stopped

    page.fill("#prompt textarea", "")
    page.click("#write")
    assert "prompt is empty" in notice(page).lower()
    slider(page, "tokens").focus()
    page.keyboard.press("Home")
    page.fill("#prompt textarea", "The end")
    page.click("#write")  # nothing is in the way any more
    wait_for_text(page, "#writing-report", "16 tokens")

    open_tab(page, "How it works")
    page.wait_for_selector("#lesson-split-words .katex")
    page.click("#lesson-split-to-2")
    page.wait_for_selector("#lesson-fade-figure .legendtext")
    take_picture(page, "lesson")


def test_on_a_phone(open_page, take_picture):
    """A student on a phone, in dark mode, looks into every tab and never has to scroll sideways;
    somebody without a mouse reaches every control."""
    page = open_page("?fade=0.9&keep=12", width=390, height=844, color_scheme="dark")
    assert "dark" in page.get_attribute("body", "class")
    for name, shown in (
        ("Branches", "#histograms .js-plotly-plot"),
        ("Generations", "#write"),
        ("How it works", "#lesson-split-words .katex"),
    ):
        open_tab(page, name)
        page.wait_for_selector(shown)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for box in page.locator(f"#controls, #cards .card, {shown}").all():
            if edges := box.bounding_box():
                assert edges["x"] >= 0
                assert edges["x"] + edges["width"] <= 390
        take_picture(page, name.lower().replace(" ", "-"))

    open_tab(page, "Branches")
    wanted = {
        "model", "load", "preset", "branches", "fade", "keep", "measure", "stop-measuring",
        "layer", "projection", "quantity",
    }  # fmt: skip
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        ids = page.evaluate(
            """() => {
                const found = [];
                for (let e = document.activeElement; e; e = e.parentElement) found.push(e.id);
                return found;
            }"""
        )
        reached |= wanted & set(ids)
    assert reached == wanted


def test_two_tabs_and_a_link(open_page, new_window, server, take_picture):
    """Two visitors look at different conversions at once; one reloads; one sends a link on, and
    another breaks it."""
    window = new_window()
    first = open_page("?branches=16&fade=0.9", window=window)
    second = open_page("?branches=8&keep=4&compensation=none", window=window)
    wait_for_spec(first, branches=16, fade=0.9, keep=16)
    wait_for_outlines(first, stays=16, zeroed=15, thresholds=15)
    wait_until_measured(first)
    wait_for_spec(second, branches=8, fade=0, keep=4)
    wait_for_outlines(second, stays=4, dropped=4)
    wait_until_measured(second)
    mine = {card: figure(first, card) for card in ("perplexity", "nonzero", "compute")}

    shown = figure(second, "perplexity")
    slider(second, "keep").focus()
    second.keyboard.press("ArrowLeft")
    wait_for_value(second, "keep", 3)
    wait_for_outlines(second, stays=3, dropped=5)
    wait_for_new_figure(second, "perplexity", shown)
    assert {card: figure(first, card) for card in mine} == mine
    assert value(first, "keep") == 16
    assert mine["perplexity"] != figure(second, "perplexity")

    first.reload()
    first.wait_for_function(
        """wanted => Object.entries(wanted).every(([card, text]) =>
            document.querySelector(`#card-${card} .converted`)?.innerText === text)""",
        arg=mine,
    )
    wait_for_outlines(first, stays=16, zeroed=15, thresholds=15)
    take_picture(first, "reloaded")
    first.close()  # a browser opens few connections to one server, and every tab keeps some
    second.close()

    for query, said in (
        ("?branches=8&keep=9", "between 1 and"),
        ("?fade=<img src=//elsewhere.invalid/x.png onerror=alert(1)>", "<img"),
        ("?branches=65", "at most 64"),
    ):
        broken = open_broken_link(window, server, query, said)
        take_picture(broken, "broken-link", full_page=False)
        wait_for_outlines(broken, stays=16)
        wait_for_spec(broken, branches=16, fade=0, keep=16)
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
        assert page.get_attribute(f"#{control} input[type=range]", "max") == str(most)
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
    assert page.get_attribute("#branches input[type=range]", "max") == "64"
    assert page.locator("[data-testid=toast-text]").count() == 0


def test_experts_are_converted_and_measured(open_page, take_picture):
    """Somebody opens the tab of experts, converts by the method offered first, reads the result,
    and then gives a calibration text that is too short."""
    page = open_page()
    open_tab(page, "Experts")
    assert "Convert and measure" in page.inner_text("#experts-result")
    page.wait_for_function("document.querySelectorAll('#tradeoff .points path.point').length > 1")
    page.click("#measure-experts")
    wait_for_text(page, "#experts-result", "multiply-adds", timeout=120_000)
    assert "ExpertWeaver" in page.inner_text("#experts-result")
    page.wait_for_selector("#expert-load .hm")
    page.wait_for_selector("#variation .js-line")
    assert page.locator("#split .bars .point").count() >= 3 * LAYERS
    assert page.locator("#tokens-by-expert .tokens span").count() > 20
    take_picture(page, "experts")

    page.get_by_role("button", name="More: shared share").click()
    page.get_by_label("own text", exact=True).check()
    page.locator("#own-calibration textarea").fill("Much too short.")
    page.click("#measure-experts")
    assert "at least 1,024 are needed" in notice(page)


def test_a_better_recipe_is_found_and_taken(open_page, take_picture):
    """Somebody looks into every stage, takes a preset that calibrates and waits for its figures;
    then asks for the best recipe that looks at nothing but the weights, and takes the first."""
    page = open_page()
    untouched = {card: figure(page, card) for card in ("nonzero", "compute")}
    page.get_by_role("button", name="More: every stage").click()
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
    assert page.locator("#front .points path.point").count() > 3
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
    fades = "zeroes weights" in recipe or "drops whole neurons" in recipe
    assert (value(page, "fade") > 0) == fades
    kept = re.search(r"keeps (\d+) of (\d+) branches", recipe)
    branches, keep = value(page, "branches"), value(page, "keep")
    assert (keep, branches) == (int(kept[1]), int(kept[2])) if kept else keep == branches
    assert page.input_value("#compensation input").endswith("*") is False
    take_picture(page, "taken")

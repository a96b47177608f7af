"""Journeys through what the page keeps, shares and saves: runs, links, sweeps, files, texts."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from mlpmoe.core.choices import METHODS
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.explorer.shell.links import TABS
from mlpmoe.explorer.shell.run_words import short_recipe
from tests.browser.on_the_page import (
    PATIENCE,
    SHOWN,
    cards,
    choose,
    figure,
    notice,
    open_accordion,
    open_broken_link,
    open_tab,
    press_in_row,
    rows,
    slider,
    stored_runs,
    value,
    wait_for_address,
    wait_for_answer,
    wait_for_exactly,
    wait_for_new_figure,
    wait_for_other_text,
    wait_for_rows,
    wait_for_spec,
    wait_for_stored_runs,
    wait_for_text,
    wait_for_value,
    wait_until_measured,
    wait_until_still,
)

pytestmark = pytest.mark.browser

FADED = ConversionSpec(fade=0.9)
STORY = (
    "A grey cat sat on the wall and looked at the moon. The moon looked back and said nothing. "
    "So the cat went home, drank some milk and dreamt of fish.\n"
)
# What reaches beyond the window, where that lets the whole page scroll sideways.
SIDEWAYS = """() => document.documentElement.scrollWidth <= 360 && innerWidth <= 360 ? []
    : [document.documentElement.scrollWidth, ...[...document.querySelectorAll('body *')]
        .filter(e => e.getBoundingClientRect().right > 361)
        .map(e => `${e.tagName}#${e.id}.${e.className}`)].slice(0, 12)"""
FOCUS = """() => {
    const ids = [];
    for (let e = document.activeElement; e; e = e.parentElement) if (e.id) ids.push(e.id);
    return ids;
}"""


def measure_preset(page, name: str, runs: int) -> None:
    """Choose a preset that is measured by itself, and wait until it is the newest of the runs."""
    choose(page, "preset", name)
    wait_for_stored_runs(page, runs)
    wait_until_measured(page)


def test_runs_are_kept_and_compared(open_page, new_window, take_picture):
    """Somebody measures three recipes, restores the second, compares it with another, and comes
    back after a reload; measures in a second tab; deletes too much and takes it back."""
    window = new_window()
    page = open_page("?fade=0.9&text=stories", window=window)
    open_tab(page, "Runs")
    wait_for_rows(page, 1)
    measure_preset(page, "Keep 12 of 16 (paper)", 2)
    second = cards(page)
    measure_preset(page, "Fade 0.9 and keep 12 of 16", 3)
    wait_for_rows(page, 3)
    recipes = [row[1] for row in rows(page)]
    specs = [ConversionSpec(fade=0.9, keep=12), ConversionSpec(keep=12), FADED]
    assert recipes == [short_recipe(spec) for spec in specs]
    assert page.locator("#trade-offs .points path.point").count() > 3
    assert "3 runs" in page.inner_text("#runs-about")

    press_in_row(page, 1, "restore")
    wait_for_spec(page, branches=16, fade=0, keep=12)
    wait_for_exactly(page, "#card-perplexity .converted", second[1])
    wait_until_measured(page)
    assert cards(page) == second
    assert sorted(row[1] for row in rows(page)) == sorted(recipes)  # no run twice

    for recipe in recipes[1:]:
        page.get_by_role("button", name=f"compare: {recipe}", exact=True).click()
        page.get_by_role("button", name=f"do not compare: {recipe}", exact=True).wait_for()
    page.wait_for_selector("#comparison table")
    compared = page.inner_text("#comparison table")
    assert all(recipe in compared for recipe in recipes[1:])
    assert second[2] in compared
    page.click("#compare")
    for letter in "ab":
        page.wait_for_function(
            "id => document.querySelector(id)?.value.length > 20", arg=f"#text-{letter} textarea"
        )
        page.wait_for_selector(f"#histograms-{letter} .js-line")
    wait_for_exactly(page, "#compare-status", "")
    texts = [page.input_value(f"#text-{letter} textarea") for letter in "ab"]
    assert texts[0] != texts[1]
    take_picture(page, "compared")

    kept = rows(page)
    page.reload()
    wait_until_measured(page)
    open_tab(page, "Runs")
    wait_for_rows(page, 3)
    assert sorted(row[1] for row in rows(page)) == sorted(row[1] for row in kept)
    wait_for_exactly(page, "#comparison table", compared)

    other = open_page("?branches=8&keep=4", window=window)
    wait_for_stored_runs(other, 4)
    wait_for_rows(page, 4)  # the first tab hears of it
    measure_preset(page, "Keep 12 of 16, not scaled", 5)
    open_tab(other, "Runs")
    wait_for_rows(other, 5)
    assert {run["id"] for run in stored_runs(other)} == {run["id"] for run in stored_runs(page)}
    other.close()

    wait_for_rows(page, 5)
    gone = rows(page)[2][1]
    press_in_row(page, 2, "remove")
    wait_for_rows(page, 4)
    assert gone not in [row[1] for row in rows(page)]
    page.click("#undo-runs")
    wait_for_rows(page, 5)
    assert gone in [row[1] for row in rows(page)]
    newest = stored_runs(page)[0]
    page.click("#clear-runs")
    wait_for_text(page, "#runs", "No runs yet")
    assert stored_runs(page) == []
    # what is told of a measurement after its run was removed does not bring it back
    page.evaluate("run => mlpmoe.add(JSON.stringify([{ ...run, speed: null }]))", newest)
    assert stored_runs(page) == []
    page.click("#undo-runs")
    wait_for_rows(page, 5)
    assert page.is_disabled("#undo-runs")
    assert page.locator("[data-testid=toast-text]").all_inner_texts() == []


def test_runs_outlive_the_server(open_page, new_window, app):
    """Somebody measures, the server is started anew over night, and the runs are still there, can
    be restored, and measured again."""
    window = new_window()
    page = open_page("?keep=9", window=window)
    wait_for_stored_runs(page, 1)
    found = cards(page)
    page.close()
    app.restart()
    page = open_page("?fade=0.5", window=window)
    wait_for_stored_runs(page, 2)
    open_tab(page, "Runs")
    wait_for_rows(page, 2)
    press_in_row(page, 1, "restore")
    wait_for_spec(page, fade=0, keep=9)
    wait_for_exactly(page, "#card-perplexity .converted", found[1])
    assert cards(page) == found


def chosen_tab(page) -> str:
    return page.inner_text("#tabs [role=tab][aria-selected=true]")


def wait_for_tab(page, name: str) -> None:
    wait_for_exactly(page, "#tabs [role=tab][aria-selected=true]", name)


def test_the_address_follows(open_page):
    """Somebody changes a setting, undoes it and does it again, opens another tab, restores a run
    from the table, goes back and forward as browsers do, and reloads."""
    page = open_page("?keep=12")
    wait_for_address(page, "model=demo", "keep=12")
    entries = page.evaluate("history.length")
    slider(page, "keep").focus()
    page.keyboard.press("ArrowLeft")
    wait_for_value(page, "keep", 11)
    wait_for_address(page, "keep=11")
    assert page.evaluate("history.length") == entries  # a setting is no step of the browser
    page.keyboard.press("Control+z")
    wait_for_value(page, "keep", 12)
    wait_for_address(page, "keep=12")
    page.keyboard.press("Control+Shift+Z")
    wait_for_value(page, "keep", 11)
    wait_for_address(page, "keep=11")
    page.click("#undo")
    wait_for_value(page, "keep", 12)
    wait_for_address(page, "keep=12")
    page.click("#redo")
    wait_for_value(page, "keep", 11)
    wait_for_address(page, "keep=11")
    wait_until_measured(page)
    wait_for_stored_runs(page, 2)

    open_tab(page, "Runs")
    wait_for_address(page, "keep=11", "tab=runs")
    wait_for_rows(page, 2)
    assert page.evaluate("history.length") == entries + 1
    page.locator("#runs tbody tr", has_text="K 12").locator("[data-run-action=restore]").click()
    wait_for_value(page, "keep", 12)
    wait_for_address(page, "keep=12", "tab=runs")
    assert page.evaluate("history.length") == entries + 2
    page.go_back()
    wait_for_value(page, "keep", 11)
    wait_for_address(page, "keep=11", "tab=runs")
    page.go_back()
    wait_for_tab(page, "Weights")
    wait_for_address(page, "keep=11", without="tab=")
    page.go_forward()
    wait_for_tab(page, "Runs")
    page.go_forward()
    wait_for_value(page, "keep", 12)
    wait_for_address(page, "keep=12", "tab=runs")
    page.click("#undo")  # Back and Forward are steps like others
    wait_for_value(page, "keep", 11)
    wait_for_address(page, "keep=11", "tab=runs")
    wait_until_measured(page)

    shown = cards(page)
    page.reload()
    wait_until_measured(page)
    wait_for_spec(page, branches=16, fade=0, keep=11)
    assert cards(page) == shown
    assert chosen_tab(page) == "Runs"
    assert page.locator("[data-testid=toast-text]").all_inner_texts() == []


def test_a_link_is_shared(open_page, new_window, server: str):
    """Somebody copies the link of a conversion with the tab that they look at; another opens it
    and sees the same. Older links open what their tabs have become. Links with nonsense say so,
    and the page works."""
    page = open_page("?fade=0.4&keep=11&compensation=none")
    open_tab(page, "Tokens")
    page.wait_for_selector("#worst-sentences li")
    open_accordion(page, "share")
    page.wait_for_function("document.querySelector('#link textarea')?.value.endsWith('tab=tokens')")
    link = page.input_value("#link textarea")
    assert link == page.url
    assert "fade=0.4" in link
    wait_for_text(page, "#snippet", "keep=11")
    shown, worst = cards(page), page.inner_text("#worst-sentences ol")
    page.close()

    theirs = open_page(f"?{link.partition('?')[2]}")
    wait_for_spec(theirs, branches=16, fade=0.4, keep=11)
    theirs.wait_for_selector("#worst-sentences li")
    assert cards(theirs) == shown
    assert theirs.inner_text("#worst-sentences ol") == worst
    assert chosen_tab(theirs) == "Tokens"
    open_tab(theirs, "Weights")
    wait_for_address(theirs, "fade=0.4", without="tab=")
    theirs.go_back()  # what was opened as a link is a step as well
    wait_for_tab(theirs, "Tokens")
    theirs.close()

    old = open_page("?method=random&active=0.5&experts=32&tab=trade-offs")
    wait_for_spec(old, active=0.5, experts=32)
    assert old.input_value("#method input").startswith(METHODS["random"].label)
    assert chosen_tab(old) == "Runs"
    old.close()

    window = new_window()
    for query, said in (
        ("?tab=nowhere&keep=12", "tab 'nowhere'"),
        ("?fade=much", "must be a number"),
        ("?text=novel", "text is called 'novel'"),
        ("?text=own-0123456789ab", "Paste it again"),
        ("?model=nobody/nothing&keep=12", "Press Load"),
    ):
        broken = open_broken_link(window, server, query, said)
        wait_until_measured(broken)
        fade, keep = (0, 12) if "keep=12" in query else (0.9, 16)
        wait_for_spec(broken, fade=fade, keep=keep)
        shown_now = figure(broken, "nonzero")
        slider(broken, "keep").focus()
        broken.keyboard.press("ArrowLeft")
        wait_for_new_figure(broken, "nonzero", shown_now)
        broken.close()


def fill_sweep(page, **values: str) -> None:
    """Once the plan stands: what is filled in sooner may be overwritten as the fields appear."""
    open_accordion(page, "sweep")
    wait_for_text(page, "#sweep-plan", "runs")
    wait_until_still(page, "#sweep-plan")
    for name, text in values.items():
        page.fill(f"#sweep-{name} textarea, #sweep-{name} input", text)


def test_a_sweep_is_stopped_and_resumed(open_page, take_picture):
    """Many recipes are measured in one go; it is stopped after some, the page is closed, and the
    rest is measured the next time."""
    page = open_page("?keep=12&text=stories")
    open_tab(page, "Runs")
    wait_for_rows(page, 1)
    grid = {"branches": "8, 16, 32", "fade": "0, 0.5, 0.9", "keep": "100%, 75%, 50%"}
    fill_sweep(page, **grid)
    wait_for_text(page, "#sweep-plan", "27 runs, 1 of them measured before")
    page.click("#start-sweep")
    page.wait_for_function("document.querySelectorAll('#runs tbody tr').length > 3")
    page.click("#stop-sweep")
    wait_until_still(page, "#sweep-status")
    stopped = len(rows(page))
    take_picture(page, "stopped")

    page.reload()
    wait_until_measured(page)
    open_tab(page, "Runs")
    wait_for_rows(page, stopped)
    there = len(rows(page))
    assert 3 < there < 27
    fill_sweep(page, **grid)
    wait_for_text(page, "#sweep-plan", f"27 runs, {there} of them measured before")
    page.click("#start-sweep")
    wait_for_text(page, "#sweep-status", "Done")
    status = page.inner_text("#sweep-status")
    assert f"{27 - there} measured in" in status
    assert f"{there} were there before" in status
    wait_for_rows(page, 27)
    assert len({row[1] for row in rows(page)}) == 27
    page.wait_for_function(
        "document.querySelectorAll('#trade-offs .points path.point').length > 27"
    )
    take_picture(page, "done")
    wait_for_text(page, "#sweep-plan", "27 runs, 27 of them measured before")

    page.fill("#sweep-keep textarea, #sweep-keep input", "some")
    page.wait_for_selector("#sweep-plan .problem")
    assert "Keep must be" in page.inner_text("#sweep-plan")


def saved(page, press) -> tuple[str, bytes]:
    """Name and content of the file that is downloaded."""
    with page.expect_download(timeout=PATIENCE) as download:
        press()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def test_runs_and_plots_are_saved(open_page, browser, tmp_path: Path):
    """Somebody takes the runs home as CSV and JSON, and a plot as PNG, SVG and as a page that
    opens without a network."""
    page = open_page("?fade=0.9")
    open_tab(page, "Runs")
    measure_preset(page, "Keep 12 of 16 (paper)", 2)
    wait_for_rows(page, 2)
    shown, stored = rows(page), stored_runs(page)

    name, content = saved(page, lambda: page.click("#runs-csv"))
    assert name == "mlpmoe-runs.csv"
    table = pd.read_csv(io.BytesIO(content))
    assert list(table["recipe"]) == [row[1] for row in shown]
    assert list(table["perplexity"]) == [run["run"]["perplexity"] for run in stored]
    for row, ratio, nonzero in zip(shown, table["ratio"], table["nonzero_share"], strict=True):
        assert f"{100 * (ratio - 1):.1f}" in row[2]
        assert f"{100 * (1 - nonzero):.1f}" in row[3]

    name, content = saved(page, lambda: page.click("#runs-json"))
    assert name == "mlpmoe-runs.json"
    runs = json.loads(content)["runs"]
    assert [run["recipe"] for run in runs] == [row[1] for row in shown]
    assert [run["run"]["perplexity"] for run in runs] == list(table["perplexity"])

    page.wait_for_selector("#trade-offs .save-plot")
    points = page.locator("#trade-offs .points path.point").count()
    files = {}
    for kind in ("PNG", "SVG", "HTML"):
        press = page.locator("#trade-offs .save-plot").get_by_text(kind, exact=True).click
        name, files[kind] = saved(page, press)
        assert name == f"mlpmoe-trade-offs.{kind.lower()}"
    assert files["PNG"].startswith(b"\x89PNG\r\n\x1a\n")
    assert re.match(rb"\s*(<\?xml[^>]*>\s*)?<svg\b", files["SVG"])

    file = tmp_path / "plot.html"
    file.write_bytes(files["HTML"])
    window = browser.new_context(offline=True)
    alone, asked, complaints = window.new_page(), [], []
    alone.on("request", lambda request: asked.append(request.url))
    alone.on("pageerror", lambda error: complaints.append(str(error)))
    alone.goto(file.as_uri())
    alone.wait_for_selector(".points path.point")
    assert alone.locator(".points path.point").count() == points
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert complaints == []
    window.close()


def test_own_text(open_page, take_picture):
    """Somebody measures on a text of their own, pastes nothing, gives a file that is no text, and
    asks for a public text where there is no network."""
    page = open_page("?keep=12&text=stories")
    wait_for_text(page, "#card-nonzero", "4 of 16 branches")
    on_stories = figure(page, "perplexity")
    open_accordion(page, "text-choice")
    page.fill("#own-text textarea", STORY * 20)
    page.click("#use-own-text")
    page.wait_for_function("document.querySelector('#text input')?.value.startsWith('Own text')")
    name = page.input_value("#text input")
    page.click("#measure")  # by itself only where that is predicted to be quick
    wait_for_stored_runs(page, 2)
    wait_until_measured(page)
    on_mine = figure(page, "perplexity")
    assert on_mine != on_stories
    assert name.lower() in page.inner_text("#card-perplexity .note").lower()
    open_tab(page, "Runs")
    wait_for_rows(page, 2)
    assert name.lower() in rows(page)[0][6].lower()
    assert "evaluation stories" in rows(page)[1][6]
    wait_for_text(page, "#runs-about", "2 runs; 1 of Demo")
    take_picture(page, "measured")

    page.fill("#own-text textarea", " ")
    page.click("#use-own-text")
    assert "There is no text" in notice(page)
    page.set_input_files(
        "#own-file input[type=file]",
        {"name": "photo.txt", "mimeType": "text/plain", "buffer": b"\xff\xd8\xff\xe0\x00\x10JFIF"},
    )
    assert "not UTF-8 text" in notice(page)
    assert page.input_value("#text input") == name
    # the file that is no text is taken away by itself
    page.wait_for_function("!document.querySelector('#own-file .file-preview')")
    page.set_input_files(
        "#own-file input[type=file]",
        {"name": "tale.txt", "mimeType": "text/plain", "buffer": f"{STORY}The end.\n".encode()},
    )
    page.wait_for_function(
        "name => (document.querySelector('#text input')?.value ?? name) !== name", arg=name
    )
    page.click("#measure")
    wait_for_stored_runs(page, 3)
    wait_until_measured(page)
    assert page.input_value("#text input").startswith("Own text")
    assert page.input_value("#text input") != name

    choose(page, "text", "WikiText-2 (test)")
    said = notice(page)
    assert said.startswith("WikiText-2")
    assert "needs a network once" in said
    assert page.locator("[data-testid=toast-text]").all_inner_texts() == []
    choose(page, "text", "Evaluation stories")
    wait_for_exactly(page, "#card-perplexity .converted", on_stories)


def test_where_the_text_breaks(open_page, take_picture):
    """A researcher looks at which words became harder, in which layer it starts, and what the
    branches of a layer add up to."""
    page = open_page("?keep=8&text=stories")
    open_tab(page, "Tokens")
    page.wait_for_selector("#worst-sentences li")
    changes = [
        float(text.split()[0].replace("−", "-"))
        for text in page.locator("#worst-sentences li > b").all_inner_texts()
    ]
    assert len(changes) == 10
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] > 0
    assert page.locator("#worst-sentences i.worse[title*=nats]").count() > 10
    shades = page.locator("#worst-sentences li i.worse").evaluate_all(
        "found => [...new Set(found.map(i => getComputedStyle(i).backgroundColor))]"
    )
    assert len(shades) > 2
    open_accordion(page, "whole-text")
    page.wait_for_selector("#coloured-text .loss")
    assert page.locator("#coloured-text .loss").count() > 5

    page.wait_for_selector("#drift .js-line")
    layers = page.locator("#drift .points path.point").count() // 3
    page.wait_for_selector(f"#tokens-layer input[type=range][max='{layers - 1}']")
    page.wait_for_selector("#branch-correlations .hm image")
    assert page.locator("#branch-norms .bars .point").count() == 16
    assert page.locator("#branch-figures tbody tr").count() == 5
    first = page.inner_text("#branch-figures")
    slider(page, "tokens-layer").focus()
    page.keyboard.press("ArrowRight")
    wait_for_other_text(page, "#branch-figures", first)
    take_picture(page, "tokens")

    choose(page, "preset", "All 16 branches")
    wait_for_text(page, "#worst-sentences", "No sentence became harder")
    assert page.locator("[data-testid=toast-text]").all_inner_texts() == []


def press_until(page, key: str, wanted: str, most: int = 120) -> None:
    """Press a key until the focus is in a block, or on what is called so."""
    for _ in range(most):
        page.keyboard.press(key)
        label = page.evaluate("document.activeElement.getAttribute('aria-label') ?? ''")
        if wanted in page.evaluate(FOCUS) or label.startswith(wanted):
            return
    raise AssertionError(f"{wanted} is not reached by {key}")


def focus_is_visible(page) -> bool:
    """What has the focus, or what stands around it, is drawn otherwise than without."""
    return page.evaluate(
        """() => {
            const e = document.activeElement;
            const look = () => {
                const found = [];
                for (let a = e, up = 0; a && up < 4; a = a.parentElement, up++) {
                    const s = getComputedStyle(a);
                    found.push(s.outlineStyle === 'none' ? '' : s.outlineWidth + s.outlineColor,
                        s.boxShadow, s.borderColor, s.backgroundColor);
                }
                return found.join();
            };
            for (let a = e, up = 0; a && up < 4; a = a.parentElement, up++)
                a.style.transition = 'none';
            const focused = look();
            e.blur();
            const blurred = look();
            e.focus({focusVisible: true});
            return focused !== blurred;
        }"""
    )


def test_by_keyboard(open_page):
    """Somebody without a mouse moves K, looks over the other axis and into a layer, opens the
    runs, pins one and restores another."""
    page = open_page("?fade=0.9")
    wait_for_stored_runs(page, 1)
    press_until(page, "Tab", "keep")
    while page.evaluate("document.activeElement.type") != "range":
        page.keyboard.press("Tab")
    assert focus_is_visible(page)
    shown = figure(page, "compute")
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    wait_for_value(page, "keep", 12)
    wait_for_new_figure(page, "compute", shown)
    wait_for_stored_runs(page, 2)
    wait_until_measured(page)

    press_until(page, "Tab", "axis")
    while page.evaluate("document.activeElement.checked"):
        page.keyboard.press("Tab")  # each choice is a stop of its own
    assert focus_is_visible(page)
    before = page.text_content("#curve .xtitle")
    page.keyboard.press("Space")
    page.wait_for_function(
        "old => document.querySelector('#curve .xtitle')?.textContent !== old", arg=before
    )
    press_until(page, "Tab", "network")
    assert focus_is_visible(page)
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    wait_for_value(page, "layer", 2)
    press_until(page, "Tab", "prompt")

    press_until(page, "Tab", "tabs")
    while page.evaluate("document.activeElement.textContent.trim()") != "Runs":
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.role") == "tab"
    assert focus_is_visible(page)
    page.keyboard.press("Enter")
    page.wait_for_selector("#runs tbody tr")
    wait_for_rows(page, 2)
    press_until(page, "Tab", f"compare: {short_recipe(FADED)}")
    assert focus_is_visible(page)
    page.keyboard.press("Space")
    page.wait_for_selector("#runs tr.pinned")
    page.wait_for_function(  # the table is new, the focus where it was
        "document.activeElement.getAttribute('aria-label')?.startsWith('do not compare')"
    )
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == short_recipe(FADED)
    assert focus_is_visible(page)
    page.keyboard.press("Enter")
    wait_for_spec(page, branches=16, fade=0.9, keep=16)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_fits_a_phone(open_page, take_picture, scheme: str):
    """A student with a phone taps on a layer and into every tab, and never has to scroll
    sideways, with branches as with experts."""
    page = open_page(
        "?fade=0.9&keep=12", width=360, height=780, color_scheme=scheme, has_touch=True,
        is_mobile=True,
    )  # fmt: skip
    assert ("dark" in (page.get_attribute("body", "class") or "")) == (scheme == "dark")
    wait_for_answer(page)
    assert page.evaluate(SIDEWAYS) == []
    take_picture(page, "first-screen")
    box = page.locator(".network-grid").bounding_box()
    page.locator(".network-grid").tap(position={"x": box["width"] * 2.5 / 8, "y": 50})
    wait_for_text(page, ".network-spare", "Spare layer 2")
    page.locator(".network-spare").tap()
    wait_for_address(page, "spared=2")
    for key, name in TABS.items():
        page.locator("#tabs").get_by_role("tab", name=name, exact=True).tap()
        page.wait_for_selector(SHOWN[key])
        assert page.evaluate(SIDEWAYS) == [], key
        take_picture(page, key)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", ground)[:3])) > 3 * 128
    assert light == (scheme == "light")
    assert value(page, "keep") == 12
    if scheme == "dark":  # only colours are others
        return
    choose(page, "method", METHODS["contiguous"].label)
    slider(page, "experts").wait_for(state="visible")
    open_tab(page, "Weights")
    slider(page, "layer").press("ArrowRight")  # the spared one has no experts
    page.wait_for_selector("#words-by-expert [data-cells]")
    assert page.evaluate(SIDEWAYS) == []
    take_picture(page, "routed")

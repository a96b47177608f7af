"""The page for people who read with a screen reader, go by keyboard, or need contrast; and a page
that stands still while it is used."""

from __future__ import annotations

import pytest

from mlpmoe.core.choices import METHODS
from mlpmoe.explorer.shell.links import FIRST_TAB, TABS
from tests.browser.on_the_page import (
    SHOWN,
    choose,
    open_accordion,
    open_tab,
    slider,
    wait_for_answer,
    wait_for_other_text,
    wait_for_rows,
    wait_for_text,
    wait_for_value,
    wait_until_measured,
)

pytestmark = pytest.mark.browser

SERIOUS = ("serious", "critical")
FIRST_SCREEN = ("#model-row", "#sentence", "#pictures", "#cards", "#asking", "#panes")
# Gradio's own markup, which the page cannot change: rule, where, why.
NOT_OURS: tuple[tuple[str, str, str], ...] = ()
EVERYTHING = {  # accordions of a tab, so that their content is looked at as well
    "tokens": ["whole-text"],
    "runs": ["sweep", "paper"],
}
ACCORDIONS = ("more", "training", "text-choice", "share", "writing-options", "words")
ORDER = [
    "model", "load", "undo", "redo", "method", "preset", "branches", "fade", "keep", "budget",
    "measure", "stop-measuring", "more", "text-choice", "share", "axis", "curve", "network",
    "prompt", "write", "stop-writing", "examples", "panes", "writing-options", "tabs", "layer",
    "projection", "words",
]  # fmt: skip
UNNAMED = """() => [...document.querySelectorAll('input, textarea, select, button, [role=button]')]
    .filter(e => e.checkVisibility({visibilityProperty: true}) && e.type !== 'hidden')
    .filter(e => !(e.labels && [...e.labels].some(l => l.textContent.trim()))
        && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby')
        && !e.title && !(e.matches('button, [role=button]') && e.textContent.trim()))
    .map(e => e.outerHTML.slice(0, 160))"""
WATCH = """selectors => {
    window.heights = {};
    window.watcher?.disconnect();
    const names = new Map();  // the page may draw attributes anew
    const seen = window.watcher = new ResizeObserver(entries => {
        for (const {target} of entries) {
            const now = target.getBoundingClientRect().height;
            const [low, high] = heights[names.get(target)] ?? [now, now];
            heights[names.get(target)] = [Math.min(low, now), Math.max(high, now)];
        }
    });
    for (const selector of selectors)
        document.querySelectorAll(selector).forEach((element, i) => {
            names.set(element, `${selector} ${i}`);
            seen.observe(element);
        });
}"""


def violations(page, *rules: str, within: str | None = None) -> set[str]:
    """What axe finds serious or critical, but for NOT_OURS: rule, what is wrong, an example.
    rules: some only; without any, all. within: a selector; None, the whole document."""
    from axe_playwright_python.sync_playwright import Axe

    # contrast is judged once nothing fades in any more
    page.add_style_tag(content="* { transition: none !important; animation: none !important; }")
    found = {}
    options = {"resultTypes": ["violations"]} | ({"runOnly": list(rules)} if rules else {})
    for violation in Axe().run(page, within, options).response["violations"]:
        if violation["impact"] not in SERIOUS:
            continue
        places = [where for rule, where, _ in NOT_OURS if rule == violation["id"]]
        for node in violation["nodes"]:
            theirs = page.evaluate(
                "([selector, places]) => places.some(place =>"
                " document.querySelector(selector)?.closest(place))",
                [node["target"][-1], places],
            )
            if not theirs:
                wrong = (violation["id"], node["failureSummary"])
                found.setdefault(wrong, f"{node['target'][-1]}: {node['html'][:300]}")
    return {"\n".join([*wrong, example]) for wrong, example in found.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, scheme: str):
    """Every tab with something on it, by axe-core: contrast, names, roles, structure. In the dark
    only colours are others."""
    rules = ["color-contrast"] if scheme == "dark" else []
    page = open_page("?fade=0.9&keep=12", color_scheme=scheme)
    for block in ACCORDIONS:
        open_accordion(page, block)
    page.wait_for_selector("#link textarea")
    found = set()
    for key, name in TABS.items():
        open_tab(page, name)
        page.wait_for_selector(SHOWN[key])
        for block in EVERYTHING.get(key, []):
            open_accordion(page, block)
        if key == "runs":
            page.locator("#runs [data-run-action=pin]").first.click()
            page.wait_for_selector("#runs tr.pinned")
        within = None if key == FIRST_TAB else "#tabs"  # once is enough for what stays
        found |= {f"{key}: {wrong}" for wrong in violations(page, *rules, within=within)}
    assert not found, "\n\n".join(sorted(found))


def test_axe_on_results(open_page):
    """The same where runs are compared, and where experts are looked at."""
    page = open_page("?keep=8")
    wait_for_answer(page)
    choose(page, "method", METHODS["contiguous"].label)
    page.wait_for_selector("#words-by-expert [data-cells]")
    open_accordion(page, "more")
    page.locator("#router input").wait_for()
    wait_until_measured(page)
    page.wait_for_selector("#converted-text [data-token]")
    found = violations(page)
    open_tab(page, "Tokens")
    page.wait_for_selector("#worst-sentences li")
    found |= violations(page, within="#tabs")
    open_tab(page, "Runs")
    wait_for_rows(page, 2)
    for _ in range(2):
        page.locator("#runs [data-run-action=pin][aria-pressed=false]").first.click()
        page.wait_for_selector("#runs tr.pinned")
    page.wait_for_selector("#compare")
    found |= violations(page, within="#tabs")
    assert not found, "\n\n".join(sorted(found))


def test_every_control_has_a_name(open_page):
    page = open_page("?keep=12")
    for block in ACCORDIONS:
        open_accordion(page, block)
    page.wait_for_selector("#link textarea")
    for key, name in TABS.items():
        open_tab(page, name)
        page.wait_for_selector(SHOWN[key])
        for block in EVERYTHING.get(key, []):
            open_accordion(page, block)
        page.wait_for_function(  # page.js names some as they appear
            "[...document.querySelectorAll('label textarea')]"
            ".every(field => field.ariaLabel || field.closest('label').control === field)"
        )
        assert page.evaluate(UNNAMED) == [], key


def test_tab_goes_down_the_page(open_page):
    """The Tab key visits the controls in the order in which they are read."""
    page = open_page()
    page.evaluate("document.activeElement.blur()")
    visited = []
    for _ in range(120):
        page.keyboard.press("Tab")
        ids = page.evaluate(
            """() => {
                const found = [];
                for (let e = document.activeElement; e; e = e.parentElement) found.push(e.id);
                return found;
            }"""
        )
        found = [name for name in ids if name in ORDER]
        if found and found[0] not in visited:
            visited.append(found[0])
    assert visited == ORDER


def test_nothing_jumps(open_page):
    """What is on the first screen and in a tab keeps its place while sliders are moved and
    measured, while runs come into the plots, and while the models write."""
    page = open_page("?fade=0.5")
    page.wait_for_selector(SHOWN["weights"])
    wait_for_answer(page)
    page.evaluate(WATCH, [*FIRST_SCREEN, ".card", "#histograms"])
    slider(page, "fade").focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    wait_for_value(page, "fade", 0.8)
    wait_until_measured(page)
    slider(page, "keep").focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    wait_for_value(page, "keep", 12)
    wait_until_measured(page)
    wait_for_text(page, "#histograms .legend", "dropped")
    heights = page.evaluate("heights")
    assert len(heights) == len(FIRST_SCREEN) + 5
    assert {name: ends for name, ends in heights.items() if ends[1] - ends[0] > 2} == {}

    for name, watched in (("Runs", ["#trade-offs"]), ("Tokens", ["#drift", "#branch-norms"])):
        open_tab(page, name)
        page.wait_for_selector(SHOWN[name.lower()])
        wait_until_measured(page)
        page.evaluate(WATCH, [*watched, ".card"])
        before = page.inner_text("#card-nonzero .converted")
        slider(page, "keep").focus()
        page.keyboard.press("ArrowLeft")
        wait_for_other_text(page, "#card-nonzero .converted", before)
        wait_until_measured(page)
        heights = page.evaluate("heights")
        assert len(heights) == len(watched) + 4
        assert {name: ends for name, ends in heights.items() if ends[1] - ends[0] > 2} == {}

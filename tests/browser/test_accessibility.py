"""The page for people who read with a screen reader, go by keyboard, or need contrast; and a page
that stands still while it is used."""

from __future__ import annotations

import pytest

from mlpmoe.explorer.links import FIRST_TAB, TABS
from tests.browser.on_the_page import (
    SHOWN,
    open_accordion,
    open_tab,
    slider,
    wait_for_other_text,
    wait_for_rows,
    wait_for_text,
    wait_for_value,
    wait_until_measured,
)

pytestmark = pytest.mark.browser

SERIOUS = ("serious", "critical")
# Gradio's own markup, which the page cannot change: rule, where, why.
NOT_OURS: tuple[tuple[str, str, str], ...] = ()
EVERYTHING = {  # accordions of a tab, so that their content is looked at as well
    "tokens": ["whole-text"],
    "trade-offs": ["sweep", "paper"],
}
ORDER = [
    "model", "load", "preset", "branches", "fade", "keep", "measure", "stop-measuring", "more",
    "text-choice", "share", "tabs", "layer", "projection", "quantity", "words",
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
    const seen = window.watcher = new ResizeObserver(entries => {
        for (const {target} of entries) {
            const now = target.getBoundingClientRect().height;
            const [low, high] = heights[target.dataset.watched] ?? [now, now];
            heights[target.dataset.watched] = [Math.min(low, now), Math.max(high, now)];
        }
    });
    for (const selector of selectors)
        document.querySelectorAll(selector).forEach((element, i) => {
            element.dataset.watched = `${selector} ${i}`;
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
    for block in ("more", "text-choice", "share", "words"):
        open_accordion(page, block)
    page.wait_for_selector("#link textarea")
    found = set()
    for key, name in TABS.items():
        open_tab(page, name)
        page.wait_for_selector(SHOWN[key])
        for block in EVERYTHING.get(key, []):
            open_accordion(page, block)
        if key == "trade-offs":
            page.locator("#runs [data-run-action=pin]").first.click()
            page.wait_for_selector("#runs tr.pinned")
        within = None if key == FIRST_TAB else "#tabs"  # once is enough for what stays
        found |= {f"{key}: {wrong}" for wrong in violations(page, *rules, within=within)}
    assert not found, "\n\n".join(sorted(found))


def test_axe_on_results(open_page):
    """The same where something was compared, written and measured."""
    page = open_page("?keep=8")
    page.locator("#fade input[type=range]").focus()
    page.keyboard.press("End")
    open_tab(page, "Trade-offs")
    wait_for_rows(page, 2)
    for _ in range(2):
        page.locator("#runs [data-run-action=pin][aria-pressed=false]").first.click()
        page.wait_for_selector("#runs tr.pinned")
    page.wait_for_selector("#compare")
    found = violations(page)
    open_tab(page, "Generations")
    page.click("#write")
    page.wait_for_selector("#writing-report table")
    found |= violations(page, within="#tabs")
    open_tab(page, "Experts")
    page.click("#measure-experts")
    page.wait_for_selector("#tokens-by-expert .tokens span")
    found |= violations(page, within="#tabs")
    assert not found, "\n\n".join(sorted(found))


def test_every_control_has_a_name(open_page):
    page = open_page("?keep=12")
    for block in ("more", "text-choice", "share", "words"):
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
    for _ in range(80):
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
    """Cards and plots keep their height while a slider is moved and measured, and while runs come
    into the plot of trade-offs."""
    page = open_page("?fade=0.5")
    page.wait_for_selector("#heat .hm")
    page.evaluate(WATCH, ["#cards", ".card", "#histograms", "#heat"])
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
    assert len(heights) == 7
    assert {name: ends for name, ends in heights.items() if ends[1] - ends[0] > 2} == {}

    for name, key in (("Trade-offs", "trade-offs"), ("Tokens", "tokens")):
        open_tab(page, name)
        page.wait_for_selector(SHOWN[key])
        wait_until_measured(page)
        watched = {"trade-offs": ["#trade-offs"], "tokens": ["#drift", "#branch-norms"]}[key]
        page.evaluate(WATCH, [*watched, ".card"])
        before = page.inner_text("#card-nonzero .converted")
        slider(page, "keep").focus()
        page.keyboard.press("ArrowLeft")
        wait_for_other_text(page, "#card-nonzero .converted", before)
        wait_until_measured(page)
        heights = page.evaluate("heights")
        assert len(heights) == len(watched) + 4
        assert {name: ends for name, ends in heights.items() if ends[1] - ends[0] > 2} == {}

"""The lesson: one MLP is cut, the real controls follow each step, questions keep their answers to
themselves, and the whole of it fits a projector."""

from __future__ import annotations

import pytest

from tests.browser.on_the_page import (
    slider,
    wait_for_exactly,
    wait_for_spec,
    wait_for_text,
    wait_for_value,
)

pytestmark = pytest.mark.browser

STEPS = ("cut", "fade", "keep", "route", "train", "turn")
SLIDE = {"width": 1280, "height": 720}
LEAST_TYPE = 20  # pixels, on a projector
# What is beyond the window, scrolls, or is small, of what is seen of the lesson.
MISFITS = """least => {
    const [page, lesson] = [document.documentElement, document.querySelector('#lesson')];
    const found = [];
    for (const e of [page, lesson])
        if (e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight)
            found.push(`${e.id || 'page'} scrolls: ${e.scrollWidth} x ${e.scrollHeight}`);
    const parts = '#lesson, #controls, #curve-panel, #network-panel';
    for (const e of document.querySelectorAll('body *')) {
        const inside = e.closest(parts), svg = e.closest('svg, .katex');
        if (!inside || !e.checkVisibility({visibilityProperty: true})) continue;
        if (e.closest('.lesson-where, .visually-hidden, .sr-only') || svg) continue;
        const box = e.getBoundingClientRect();
        if (!box.width || !box.height) continue;
        if (box.left < -1 || box.top < -1 || box.right > innerWidth + 1
                || box.bottom > innerHeight + 1)
            found.push(`outside: ${e.tagName}#${e.id}.${e.className} ${JSON.stringify(box)}`);
        const says = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (says && inside.id === 'lesson' && parseFloat(getComputedStyle(e).fontSize) < least)
            found.push(`small: ${e.textContent.slice(0, 30)}`);
    }
    return found.slice(0, 5);
}"""


def open_step(page, number: int) -> None:
    """By the button of the step before."""
    page.click(f"#lesson-{STEPS[number - 2]}-to-{number}")
    page.wait_for_selector(f"#lesson-{STEPS[number - 1]}-words p")


def query(page) -> str:
    return page.input_value("#query textarea")


def test_a_lesson(open_page, take_picture):
    """A student opens the lesson with settings of their own, cuts an MLP, walks on, answers a
    question, takes up the challenge, and gets their own settings back."""
    page = open_page("?model=demo&branches=16&fade=0.5&tab=lesson")
    page.wait_for_selector("#lesson-cut-words .katex")
    assert page.locator("#lesson svg.mlp g.branch").count() == 4
    assert "fade=0.5" in query(page)  # to look changes nothing
    assert not page.is_visible("#lesson-back")
    take_picture(page, "cut")

    slider(page, "lesson-cut-control").focus()
    page.keyboard.press("ArrowRight")
    wait_for_spec(page, branches=5, fade=0, keep=5)
    page.wait_for_function("document.querySelectorAll('#lesson g.branch').length === 5")
    wait_for_text(page, "#lesson-cut-numbers", "5 branches")
    wait_for_text(page, "#lesson-whole", "Nothing is removed")

    open_step(page, 2)
    wait_for_spec(page, branches=16, fade=0.9, keep=16)
    wait_for_text(page, "#lesson-whole", "Fade zeroes 28.2")
    assert page.evaluate("document.activeElement.innerText") == "Step 2 of 6 · Fade"
    slider(page, "lesson-fade-control").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    wait_for_value(page, "fade", 0.8)

    open_step(page, 3)
    wait_for_spec(page, branches=16, fade=0, keep=12)
    page.wait_for_selector("#lesson-keep-figure .legendtext")
    everything = page.content()
    assert "least error" not in everything and "Right is" not in everything
    page.locator("#lesson-keep-question label").first.click()
    wait_for_text(page, "#lesson-keep-feedback", "Measured at layer")
    wait_for_text(page, "#lesson-keep-numbers", "leaves the least error")
    take_picture(page, "keep")

    open_step(page, 4)
    wait_for_value(page, "active", 0.75)
    page.wait_for_function("document.querySelector('#query textarea').value.includes('contiguous')")
    assert page.inner_text("#lesson-route-numbers").count("?") == 3

    open_step(page, 5)
    wait_for_spec(page, branches=16, keep=8)
    page.wait_for_function(
        "document.querySelector('#query textarea').value.includes('recover=all&recover_steps=20')"
    )
    wait_for_text(page, "#lesson-whole", "then trained for 20 steps: not")
    assert page.inner_text("#lesson-train-numbers").count("?") == 2
    page.locator("#lesson-train-question label").last.click()
    wait_for_text(page, "#lesson-train-feedback", "Recorded after 40 steps")
    take_picture(page, "train")

    open_step(page, 6)
    page.click("#lesson-turn-published")
    wait_for_spec(page, branches=16, keep=12)
    page.wait_for_function("document.querySelector('#query textarea').value.includes('keep=12')")
    assert "recover" not in query(page)
    page.click("#lesson-turn-check")
    wait_for_text(page, "#lesson-turn-verdict", "at most 52")
    take_picture(page, "turn")
    page.click("#lesson-turn-back")
    wait_for_spec(page, branches=16, fade=0.5, keep=16)
    wait_for_exactly(page, "#lesson-turn-verdict", "")
    assert not page.is_visible("#lesson-back")


def wait_until_it_fits(page, what: str) -> None:
    """A plot that was just shown takes a moment to fill its new place."""
    page.wait_for_function(
        f"""least => {{
        const now = ({MISFITS})(least);
        window.misfitsSince ??= Date.now();
        if (now.length && Date.now() - window.misfitsSince < 20000) return false;
        window.misfitsSince = undefined;
        window.misfits = now;
        return true;
    }}""",
        arg=LEAST_TYPE,
    )
    assert page.evaluate("window.misfits") == [], what


def test_a_lecture(open_page, take_picture):
    """A lecturer presents all steps on a small projector, with the curve and the network beside
    them, by the keys of a clicker; and leaves with Esc."""
    page = open_page("?model=demo&keep=10&tab=lesson", **SLIDE)
    page.wait_for_selector("#lesson-cut-words .katex")
    page.click("#lesson-present")
    wait_for_text(page, "#lesson-present", "Leave")
    wait_for_spec(page, branches=4, keep=4)
    wait_for_text(page, "#lesson-whole", "Nothing is removed")
    for number, step in enumerate(STEPS, 1):
        if number > 1:
            page.keyboard.press("PageDown")
        page.wait_for_selector(f"#lesson-{step}-words p")
        if step not in ("cut", "turn"):
            page.wait_for_selector(f"#lesson-{step}-figure .legendtext")
        wait_until_it_fits(page, step)
        assert page.is_visible("#controls") == (step == "turn")
        take_picture(page, f"slide-{step}", full_page=False)

    for look, panel in (("Curve", "#curve-panel"), ("Network", "#network-panel")):
        page.locator("#lesson-look label", has_text=look).click()
        page.wait_for_selector(panel)
        wait_until_it_fits(page, look)
    page.locator("#lesson-look label", has_text="This step").click()

    for step in ("train", "route"):
        page.keyboard.press("PageUp")
        page.wait_for_selector(f"#lesson-{step}-words p")
    page.locator("#lesson-route .lesson-ask").click()
    page.locator("#lesson-route-question label").first.click()
    wait_for_text(page, "#lesson-route-feedback", "Measured at layer")
    wait_until_it_fits(page, "answered")
    page.keyboard.press("Escape")  # to the step, where the errors are shown now
    page.wait_for_selector("#lesson-route-question", state="hidden")
    wait_for_text(page, "#lesson-route-numbers", "%")
    page.keyboard.press("Escape")
    wait_for_exactly(page, "#lesson-present", "Present")
    assert page.evaluate("document.activeElement.id") == "lesson-present"
    assert page.is_visible("#sentence") and page.is_visible("#curve-panel")
    page.click("#lesson-back")
    wait_for_spec(page, branches=16, keep=10)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_step_suits_a_phone_and_axe(open_page, scheme: str):
    """Nothing scrolls sideways at 360 pixels, and axe finds nothing serious in any step."""
    from tests.browser.test_accessibility import violations

    page = open_page("?model=demo&tab=lesson", width=360, height=800, color_scheme=scheme)
    page.wait_for_selector("#lesson-cut-words .katex")
    for number, step in enumerate(STEPS, 1):
        if number > 1:
            open_step(page, number)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, step
        assert not violations(page, within="#lesson"), step

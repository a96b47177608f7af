"""A text that takes its time: an estimate that sharpens, and a page that is never wiped."""

from __future__ import annotations

import pytest

from mlpmoe.models.texts import named_calibration
from tests.browser.on_the_page import (
    COUNTS,
    RECORD_NOTES,
    figure,
    open_accordion,
    slider,
    token_counts,
    wait_for_text,
    wait_for_value,
)

pytestmark = pytest.mark.browser

CHARACTERS = 60_000  # about 15,000 tokens: some thirty windows of the demo model


def test_an_estimate_sharpens_while_the_visitor_goes_on(open_page, take_picture):
    """A teacher pastes a long text, sees the estimate go on, moves K meanwhile, and stops: what is
    known stays, and no card was ever empty."""
    page = open_page("?keep=14")
    open_accordion(page, "text-choice")
    page.fill("#own-text textarea", named_calibration("stories")[:CHARACTERS])
    page.evaluate(RECORD_NOTES)
    page.click("#use-own-text")
    page.wait_for_function(f"() => ({COUNTS}).size >= 3")
    counts = token_counts(page)
    assert counts == sorted(counts) and len(set(counts)) >= 3
    before = figure(page, "perplexity")

    slider(page, "keep").press("ArrowLeft")
    wait_for_value(page, "keep", 13)
    wait_for_text(page, "#card-nonzero", "3 of 16 branches")
    page.evaluate("window.notes = []")
    page.wait_for_function("window.notes.filter(n => /[0-9] of [0-9]/.test(n)).length >= 2")
    page.click("#stop-measuring")
    kept = figure(page, "perplexity")
    assert kept not in ("…", before)
    token_counts(page)
    take_picture(page, "stopped")

"""The tab Export in the browser: from settings to a model that other software opens, and back."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlpmoe import ConversionSpec, convert, load
from tests.browser.on_the_page import (
    notice,
    open_tab,
    slider,
    value,
    wait_for_spec,
    wait_for_text,
    wait_for_value,
    wait_until_measured,
)
from tests.browser.test_accessibility import violations

pytestmark = pytest.mark.browser

FILE = "#open-conversion input[type=file]"


def make_checkpoint(page) -> None:
    page.click("#make-checkpoint")
    wait_for_text(page, "#export-status", "Made and verified")
    page.wait_for_selector("#export-result table")


def served(address: str) -> bool:
    """Whether the server gives this file to somebody who knows its address."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=30) as answer:
            return answer.status == 200
    except urllib.error.HTTPError:
        return False


def test_a_conversion_is_taken_home(open_page, new_window, take_picture, tmp_path: Path):
    """A student keeps 12 of 16 branches, makes the checkpoint, reads that it is the same model,
    downloads it and opens it with transformers alone; moves a slider and is told that the result
    is of other settings; leaves; and opens conversion.json in a new window another day."""
    page = open_page("?keep=12")
    open_tab(page, "Export")
    wait_for_text(page, "#export-plan", "576 of 768 neurons per MLP")
    assert "--keep 12" in page.inner_text("#export-command .cm-content")
    page.locator("#export-dtype label").nth(1).click()  # as it is measured: exact
    wait_for_text(page, "#export-plan", "in float32")
    make_checkpoint(page)
    figures = {
        row.locator("th").inner_text(): row.locator("td").first.inner_text()
        for row in page.locator("#export-result table").first.locator("tr").all()
    }
    assert figures["Same likeliest next token"] == "100.0%"
    assert float(figures["… relative to the largest logit"]) <= 1e-5
    assert figures["Perplexity in memory"] == figures["Perplexity reloaded"]
    assert figures["Saved as"] == "F32"
    assert page.locator("#export-stale p").count() == 0
    take_picture(page, "made")

    with page.expect_download() as download:
        page.click("#download-checkpoint")
    assert download.value.suggested_filename == "demo-b16-k12.zip"
    download.value.save_as(tmp_path / "taken.zip")
    with zipfile.ZipFile(tmp_path / "taken.zip") as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "demo-b16-k12"
    dense, tokenizer = load("demo")
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dense.dtype)
    ids = torch.tensor([tokenizer.encode("Once upon a time, there was a little dragon")])
    assert AutoTokenizer.from_pretrained(folder).encode("Once upon") == tokenizer.encode(
        "Once upon"
    )
    with torch.no_grad():
        expected = convert(dense, ConversionSpec(keep=12))(ids).logits
        torch.testing.assert_close(reloaded(ids).logits, expected, rtol=0, atol=1e-4)

    address = download.value.url
    slider(page, "keep").focus()
    page.keyboard.press("ArrowLeft")
    wait_for_text(page, "#export-stale", "The settings have changed since")
    assert "K 12" in page.inner_text("#export-stale")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("!document.querySelector('#export-stale p')")
    assert served(address)
    assert not served(address.replace("demo-b16-k12.zip", "demo-b16-k12/config.json"))
    page.close()

    page = open_page("?branches=8", window=new_window())
    open_tab(page, "Export")
    page.wait_for_selector("#export-plan p")
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"spec": {"branches": 16, "keep": 99}}))
    page.set_input_files(FILE, wrong)
    assert "between 1 and" in notice(page)
    assert (value(page, "branches"), value(page, "keep")) == (8, 8)
    page.set_input_files(FILE, folder / "conversion.json")
    wait_for_spec(page, branches=16, keep=12)
    wait_for_text(page, "#opened-conversion", "K 12")
    wait_until_measured(page)
    wait_for_text(page, "#export-plan", "576 of 768 neurons per MLP")
    assert page.locator("#tabs [role=tab][aria-selected=true]").inner_text() == "Export"
    assert not served(address)  # whoever made it has left


def test_stop_and_go_on(open_page):
    """Somebody stops, nothing is left, and the next attempt is made."""
    page = open_page("?fade=0.9")
    open_tab(page, "Export")
    wait_for_text(page, "#export-plan", "the same size and speed")
    page.click("#make-checkpoint")
    wait_for_text(page, "#export-status", "fresh process")
    page.click("#stop-export")
    wait_for_text(page, "#export-status", "Stopped.")
    assert page.locator("#export-result table").count() == 0
    make_checkpoint(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_by_keyboard(open_page, take_picture, scheme: str):
    """On a phone, without a mouse: nothing sticks out, nothing jumps, axe finds nothing."""
    page = open_page("?keep=8&tab=export", width=390, height=844, color_scheme=scheme)
    wait_for_text(page, "#export-plan", "384 of 768")
    page.focus("#make-checkpoint")
    page.keyboard.press("Enter")
    wait_for_text(page, "#export-status", "Made and verified")
    page.focus("#export-result summary")
    page.keyboard.press("Enter")
    page.wait_for_selector("#export-result details[open]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    slider(page, "keep").focus()
    page.keyboard.press("ArrowLeft")
    wait_for_value(page, "keep", 7)
    wait_for_text(page, "#export-stale", "changed since")
    take_picture(page, f"made-{scheme}")
    assert violations(page) == set()

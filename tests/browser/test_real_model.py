"""The journey on the real model: what a new user meets who runs the README's first command."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlpmoe.core.choices import METHODS
from tests.browser.conftest import App
from tests.browser.on_the_page import (
    COUNTS,
    RECORD_NOTES,
    choose,
    figure,
    open_accordion,
    open_tab,
    slider,
    token_counts,
    wait_for_address,
    wait_for_spec,
    wait_for_text,
    wait_for_value,
    wait_until_still,
)

pytestmark = [pytest.mark.browser, pytest.mark.real, pytest.mark.slow]

LONG = 300_000  # milliseconds: a model of 135 M parameters on a busy machine
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def server(real_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an app that opens with the model it would choose by itself."""
    app = App(tmp_path_factory.mktemp("real-app"))
    app.environment.pop("MLPMOE_FIRST_MODEL", None)
    try:
        app.start()
        yield app.url
    finally:
        app.stop()
    assert not app.faults()


def test_a_visitor_meets_a_real_model(new_window, server: str, take_picture, tmp_path: Path):
    """It opens by itself, converted as published: the sentence says what that removes and costs,
    and the dense model knows the capital of France. K is dragged by keyboard and the estimate
    sharpens. A router is tried. The checkpoint is made, taken home and opened by transformers,
    where it answers in the same words as on the page."""
    page = new_window().new_page()
    page.goto(server)
    wait_for_text(page, "#status", "SmolLM2-135M-Instruct", LONG)
    wait_for_text(page, "#card-perplexity .difference", "×", LONG)
    wait_for_text(page, "#card-nonzero .difference", "MLPs −")
    removed = re.search(r"MLPs −([\d.]+)", figure(page, "nonzero", "difference")).group(1)
    wait_for_text(page, "#sentence", removed)
    wait_for_text(page, "#sentence", "times as perplexed", LONG)
    assert page.input_value("#prompt textarea") == QUESTION
    wait_for_text(page, "#dense-text", "Paris", LONG)
    take_picture(page, "as-published")

    slider(page, "fade").focus()
    page.keyboard.press("Home")
    wait_for_value(page, "fade", 0)
    for _ in range(4):
        slider(page, "keep").press("ArrowLeft")
    wait_for_value(page, "keep", 12)
    wait_for_text(page, "#sentence", "4 of 16 branches")
    page.evaluate(RECORD_NOTES)  # those before were of other settings
    page.wait_for_function(f"() => ({COUNTS}).size >= 3", timeout=LONG)
    counts = token_counts(page)
    assert counts == sorted(counts)
    wait_for_text(page, "#card-perplexity .difference", "×", LONG)
    ratio = re.search(r"× ([\d,.]+) ±", page.inner_text("#card-perplexity .difference"))
    assert 10 < float(ratio.group(1).replace(",", "")) < 150  # × 36 ± 2 on the whole text
    take_picture(page, "keep-12")

    choose(page, "method", METHODS["random"].label)
    wait_for_text(page, "#sentence", "router", LONG)
    wait_for_text(page, "#card-perplexity .difference", "×", LONG)
    page.locator("#converted-text [data-token]").first.wait_for(timeout=LONG)
    take_picture(page, "routed")

    open_accordion(page, "writing-options")
    wait_until_still(page, "#follow")  # a box that has just appeared is set once more
    page.locator("#follow input").uncheck()
    choose(page, "method", METHODS["mlpmoe"].label)
    wait_for_address(page, "keep=12")  # at the budget there is
    for _ in range(4):
        slider(page, "keep").press("ArrowRight")
    for _ in range(6):
        slider(page, "fade").press("ArrowRight")
    wait_for_spec(page, fade=0.3, keep=16)
    wait_for_address(page, "fade=0.3")
    page.click("#write")
    page.wait_for_function(  # it is tinted once it is written, and of no experts any more
        "() => document.querySelector('#converted-text .loss > *')"
        " && !document.querySelector('#converted-text [data-token]')",
        timeout=LONG,
    )
    converted = page.inner_text("#converted-text").strip()

    open_tab(page, "Export")
    wait_for_text(page, "#export-command", "--fade 0.3", LONG)
    page.locator("#export-dtype label").last.click()  # the numbers that it was measured in
    page.click("#make-checkpoint")
    wait_for_text(page, "#export-status", "Made and verified", LONG)
    with page.expect_download(timeout=LONG) as download:
        page.click("#download-checkpoint")
    download.value.save_as(tmp_path / "taken.zip")
    with zipfile.ZipFile(tmp_path / "taken.zip") as archive:
        archive.extractall(tmp_path)
    (folder,) = (path.parent for path in tmp_path.glob("*/config.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    with torch.inference_mode():
        ids = model.generate(**chat, max_new_tokens=8, do_sample=False)[
            0, chat.input_ids.shape[1] :
        ]
    answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert answer and converted.startswith(answer)

"""Inputs that take what the page shows, also where it is of a moment before."""

from __future__ import annotations

import gradio as gr
import pytest
from gradio.blocks import BlocksConfig

from mlpmoe.explorer.app import build_demo
from mlpmoe.explorer.server.workbench import Workbench
from mlpmoe.explorer.shell.inputs import OpenDropdown, OpenRadio

FOLLOWING = {"text", "calibration-text", "router", "projection", "compare-projection",
             "export-dtype"}  # fmt: skip


def test_what_follows_others_takes_a_choice_of_before():
    page: BlocksConfig = build_demo(Workbench()).default_config
    found = {block.elem_id: block for block in page.blocks.values() if block.elem_id in FOLLOWING}
    assert found.keys() == FOLLOWING
    for block in found.values():
        assert block.preprocess("own-0123456789ab") == "own-0123456789ab"


@pytest.mark.parametrize("kind", [OpenDropdown, OpenRadio])
def test_in_the_browser_they_are_gradios(kind):
    assert kind(["a"]).get_block_name() == kind.__base__(["a"]).get_block_name()
    for nothing in (None, 3, ["a"], {"a": 1}):
        with pytest.raises(gr.Error, match="Text needs a choice"):
            kind(["a"], label="Text").preprocess(nothing)

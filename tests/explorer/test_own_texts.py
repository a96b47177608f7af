"""The texts of a server: ours, public ones, and those of visitors, which are kept by content."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import gradio as gr
import pytest

from mlpmoe import ConversionSpec, UserError, named_text
from mlpmoe import perplexity as measure_perplexity
from mlpmoe.core.calibration import Calibration
from mlpmoe.explorer.server import texts as module
from mlpmoe.explorer.server.events import readable
from mlpmoe.explorer.server.texts import (
    MOST_OWN,
    OWN_PREFIX,
    SHIPPED,
    Texts,
    text_choices,
    text_name,
)
from mlpmoe.explorer.shell.handlers import Handlers
from mlpmoe.models import named_calibration
from mlpmoe.models.texts import MAX_OWN_TEXT, TEXTS, text_digest
from tests.explorer.calibrated import direct
from tests.explorer.controls import Measured, Previewed, preview_values, shown_values

OWN = "The ferry left at nine, and nobody had told the gulls. Grüße – “ok”!\n" * 9


def test_the_same_text_has_the_same_key():
    texts = Texts()
    key = texts.add(OWN)
    assert key == f"{OWN_PREFIX}{text_digest(OWN)}"
    for same in (OWN, OWN.encode(), OWN.encode("utf-8-sig"), OWN.encode("utf-16"),
                 OWN.replace("\n", "\r\n"), OWN.replace("\n", "\r")):  # fmt: skip
        assert texts.add(same) == key
    assert texts.read(key) == OWN
    assert texts.add(OWN + ".") != key
    assert Texts().add(OWN) == key  # on another server too, so that a link can work there


@pytest.mark.parametrize(
    "content",
    ["", "  \n", None, 5, b"", b"\xff\xfe\x00", "a\0b", "x" * (MAX_OWN_TEXT + 1), "\ud800", [OWN],
     "<|endoftext|>\n"],
    ids=lambda content: repr(content)[:20],
)  # fmt: skip
def test_what_is_no_text_is_refused(content):
    texts = Texts()
    with pytest.raises(UserError) as caught:
        texts.add(content)
    assert len(str(caught.value)) < 200
    assert not texts._own


def test_the_text_used_longest_ago_makes_room(monkeypatch):
    monkeypatch.setattr(module, "MOST_OWN", 3)
    texts = Texts()
    first, second, third = (texts.add(f"Text {i}.") for i in range(3))
    texts.read(first)
    fourth = texts.add("Text 4.")
    assert [texts.read(key) for key in (first, third, fourth)] == ["Text 0.", "Text 2.", "Text 4."]
    for look in (texts.check, texts.read):
        with pytest.raises(UserError, match=r"not on the server .*Paste it again"):
            look(second)
    assert texts.add("Text 1.") == second
    assert texts.read(second) == "Text 1."
    assert MOST_OWN * MAX_OWN_TEXT * 4 <= 2**27  # bytes that visitors can fill


@pytest.mark.parametrize("key", ["", "nothing", None, 5, ["stories"], "own", "x" * 10**5, "own-"])
def test_unknown_texts_are_refused(key):
    with pytest.raises(UserError, match=r"no text is called|not on the server") as caught:
        Texts().check(key)
    assert len(str(caught.value)) < 200


def test_ours_are_read_whole():
    for key in SHIPPED:
        Texts().check(key)
        assert Texts().read(key) == named_text(key)


def test_the_list_names_every_text_and_the_visitor_s_own():
    assert [key for _, key in text_choices()] == list(TEXTS)
    assert text_choices("stories") == text_choices() == text_choices(None)
    *ours, (label, key) = text_choices("own-0123456789ab")
    assert ours == text_choices()
    assert (label, key) == ("Own text 012345", "own-0123456789ab")
    assert all(label[0].isupper() for label, _ in text_choices())
    assert len({text_name(key) for key in TEXTS}) == len(TEXTS)


# measured on


def test_perplexity_on_an_own_text_is_the_library_s(demo):
    key, spec = demo.texts.add(OWN), ConversionSpec(keep=9)
    assert demo.has_text(key)
    *_, found = demo.evaluate(spec, key)
    assert found.complete
    for part, model in ((found.dense, demo.model), (found.converted, direct(demo, spec))):
        expected = measure_perplexity(model, demo.tokenizer, OWN)
        assert part.value == pytest.approx(expected.value, rel=1e-6)
        tokens = 1 + len(OWN.strip().encode())  # with BOS; the first of each window is context
        assert part.tokens == expected.tokens == tokens - ceil(tokens / 256)


def test_a_public_text_is_cut_into_windows(demo, monkeypatch):
    """As its published figures have it; not before somebody asked for it."""
    content = named_text("stories")
    read = []
    entry = replace(TEXTS["c4"], read=lambda: read.append(1) or content, most_windows=2)
    monkeypatch.setitem(TEXTS, "c4", entry)
    assert not demo.has_text("c4")
    assert read == []
    encoded = demo.text("c4")
    assert demo.has_text("c4")
    assert encoded.window == 256  # the tiny model's context
    ids = demo.tokenizer(content, verbose=False).input_ids
    assert [document.tolist() for document in encoded.documents] == [ids[:256], ids[256:512]]
    demo.text("c4")
    assert read == [1]


def test_a_text_that_is_calibrated_on_is_refused_for_what_calibrates(demo):
    passage = named_calibration("stories")[:3000]
    key = demo.texts.add(f"Something else first.\n{passage}")
    calibrated = demo.asked(ConversionSpec(keep=12, order="activation"))
    with pytest.raises(UserError, match="share a passage"):
        list(demo.evaluate(calibrated, key))
    assert demo.known_evaluation(calibrated, key) is None
    *_, found = demo.evaluate(ConversionSpec(keep=12), key)  # which looks at no text
    assert found.dense.tokens > 1000
    other = demo.texts.add(OWN)
    *_, found = demo.evaluate(calibrated, other)
    expected = direct(demo, calibrated.spec)
    assert found.converted.value == pytest.approx(
        measure_perplexity(expected, demo.tokenizer, OWN).value, rel=1e-5
    )


def test_the_page_says_so_and_measures_on_an_own_text(workbench, opening, visitor):
    handlers = Handlers(workbench)
    update = opening.use_text(OWN)
    key = update["value"]
    assert key in [name for _, name in update["choices"]]
    values = {"text": key, "keep": 9}
    shown = Previewed(*handlers.preview(visitor(), *preview_values(**values)))
    assert text_name(key) in shown.perplexity
    *_, last = handlers.measure(visitor(), *shown_values(**values))
    assert f'"{key}"' in Measured(*last).new
    copied = opening.use_text(named_calibration("stories")[:3000])["value"]
    steps = readable(handlers.measure)(
        visitor(), *shown_values(text=copied, keep=12, order="activation")
    )
    with pytest.raises(gr.Error, match="share a passage"):
        list(steps)


def test_a_file_is_read_as_bytes(opening, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(OWN.encode("utf-16"))
    assert opening.use_file(str(path))["value"] == opening.use_text(OWN)["value"]
    assert opening.use_file(None) == gr.skip()
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0")
    with pytest.raises(UserError, match="not UTF-8 text"):
        opening.use_file(str(path))


def test_our_calibration_text_is_long_enough_to_calibrate_on(demo):
    assert Calibration.from_text(demo.tokenizer, named_text("calibration")).samples.numel() > 1024
    assert named_text("calibration") == named_calibration("stories")

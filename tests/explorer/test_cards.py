"""What the cards say: true, complete, and harmless whatever a model is called."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from math import inf, log

import pytest
import torch

from mlpmoe import ConversionSpec
from mlpmoe.explorer.server.loaded import Evaluation
from mlpmoe.explorer.server.structure import Zeros
from mlpmoe.explorer.server.texts import SHIPPED, text_name
from mlpmoe.explorer.shell.cards import (
    Card,
    compute_card,
    mlp_share,
    nonzero_card,
    pending_perplexity_card,
    pending_speed_card,
    pending_structure_cards,
    perplexity_card,
    speed_card,
    status_line,
)
from mlpmoe.measure.cost.parameters import ParameterReport
from mlpmoe.measure.cost.speed import Ratio, SpeedReport
from mlpmoe.measure.notation import NBSP, NO_CHANGE, count
from mlpmoe.measure.quality.encoding import Window
from mlpmoe.measure.quality.perplexity import compare, summarise

HOSTILE = "\"'><img src=x onerror=alert(1)><script>alert(2)</script>&amp;"
ZEROS = Zeros("gate and up", 0.421875, 0.4307)
DENSE = ParameterReport(
    total=1000, nonzero=1000, mlp_total=500, mlp_nonzero=500,
    active_per_token=1000, macs_per_token=800, mlp_macs_per_token=480,
)  # fmt: skip


class Elements(HTMLParser):
    """The elements and the text of a piece of HTML, as a browser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def plain(text: str) -> str:
    return text.replace(NBSP, " ")


def piece(tokens: int) -> Window:
    """That scores so many tokens, of four bytes each."""
    return Window(torch.zeros(tokens + 1, dtype=torch.long), 1, 0, 0, 4 * tokens, 0, 0)


def evaluation(
    dense: torch.Tensor, converted: torch.Tensor, total: int | None = None, look: bool = False
) -> Evaluation:
    parts = [piece(len(dense))]
    first, second = (summarise(losses, parts) for losses in (dense, converted))
    change = compare(first, second)
    return Evaluation(first, second, change, total or len(dense), look=look, parts=parts)


def losses(mean: float, count: int = 1000) -> torch.Tensor:
    noise = torch.randn(count, generator=torch.Generator().manual_seed(1))
    return mean + 0.5 * (noise - noise.mean())


def test_card_escapes_every_field():
    html = Card(*[HOSTILE] * 5).html()
    found = Elements(html)
    assert set(found.tags) == {"section", "h3", "p", "span"}
    assert found.attributes == {"class", "title", "aria-label"}
    assert found.text.count(HOSTILE) == 5


def test_status_line_escapes_names(tiny):
    hostile = replace(tiny, label=HOSTILE, checked=replace(tiny.checked, architecture=HOSTILE))
    found = Elements(status_line(hostile))
    assert set(found.tags) == {"p", "strong"}
    assert found.text.count(HOSTILE) == 2


def test_status_line_says_what_is_loaded(tiny, tiny_folder):
    text = plain(Elements(status_line(tiny)).text)
    for part in ("tiny", "Llama", "2 layers", "d_model 32", "d_ff 48", "float32 on cpu"):
        assert part in text
    assert f"{100 * tiny.report.mlp_total / tiny.report.total:.0f} % in MLPs" in text
    assert str(tiny_folder.parent) not in text
    assert mlp_share(tiny) == tiny.report.mlp_total / tiny.report.total


def test_texts_have_names():
    assert "proxy" in text_name("proxy")


@pytest.mark.parametrize("text", SHIPPED)
def test_perplexity_card(text):
    card = perplexity_card(evaluation(losses(log(8)), losses(log(8)) + log(1.5)), text)
    assert (card.dense, card.converted) == ("8.00", "12.0")
    assert plain(card.difference) == "+50.0 % ± 0.0 %"
    assert text_name(text) in card.note
    assert "1,000 tokens" in card.note
    assert "0.75 → 0.896 bits per byte" in plain(card.note)


def test_a_difference_inside_its_error_is_no_change():
    dense = losses(2.0)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    card = perplexity_card(
        evaluation(dense, dense + 0.01 * (noise - noise.mean()) + 1e-6), "stories"
    )
    assert card.difference == NO_CHANGE


def test_what_is_known_of_a_part_is_said_to_be_of_it():
    """With its error, whether that lets anything be said or not; the first look apart."""
    dense = losses(2.0)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    close = dense + 0.5 * (noise - noise.mean()) + 0.01
    for converted in (close, close + 1):
        some = evaluation(dense, converted, total=5000)
        card = perplexity_card(some, "stories", 256)
        assert "1,000 of 5,000 tokens" in card.note and "windows of 256" in card.note
        assert "±" in card.difference
        assert ("not measurable" in card.difference) == (converted is close)
        look = perplexity_card(replace(some, look=True), "stories", 256)
        assert "first look" in look.note and "1,000 tokens" in look.note
        assert "256" not in look.note  # which its pieces are not
        assert "±" in look.difference
    whole = perplexity_card(evaluation(dense, close), "stories", 256)
    assert whole.difference == NO_CHANGE
    assert "1,000 tokens in windows of 256" in whole.note


def test_an_infinite_perplexity_is_a_change():
    broken = losses(2.0)
    broken[3] = inf
    card = perplexity_card(evaluation(losses(2.0), broken), "stories")
    assert card.converted == "∞"
    assert card.difference != NO_CHANGE


def test_pending_cards():
    dense = summarise(losses(log(8)), [piece(1000)])
    assert pending_perplexity_card(None, "stories", "wait").dense == "…"
    card = pending_perplexity_card(dense, "proxy", "measuring, 40%")
    assert (card.dense, card.converted, card.difference) == ("8.00", "…", "measuring, 40%")
    assert text_name("proxy") in card.note
    assert pending_speed_card("soon").difference == "soon"


def test_nonzero_card_has_both_denominators():
    converted = replace(DENSE, total=1006, nonzero=856, mlp_total=506, mlp_nonzero=356)
    card = nonzero_card(DENSE, converted, ConversionSpec(fade=0.9), ZEROS)
    assert re.findall(r"−[\d.]+", card.difference) == ["−28.8", "−14.4"]  # of the MLPs, of all


def test_nonzero_card_tells_requested_from_realised():
    card = nonzero_card(DENSE, DENSE, ConversionSpec(fade=0.9), ZEROS)
    assert card.note == "fade zeroes 43.07 % of gate and up, asked for 42.19 %"
    kept = nonzero_card(DENSE, DENSE, ConversionSpec(fade=0.9, keep=12), ZEROS)
    assert "of gate and up in what is kept, asked for 42.19 %" in kept.note
    neurons = replace(ZEROS, what="neurons")
    dropped = nonzero_card(DENSE, DENSE, ConversionSpec(fade=0.9, fade_unit="neuron"), neurons)
    assert dropped.note.startswith("fade drops 43.07 % of neurons, ")


def test_nonzero_card_without_fade():
    kept = nonzero_card(DENSE, DENSE, ConversionSpec(keep=12), None)
    assert kept.note.startswith("4 of 16 branches")
    added = replace(DENSE, total=DENSE.total + 1234)
    assert "1,234" in nonzero_card(DENSE, added, ConversionSpec(), None).note


def test_compute_card():
    converted = replace(DENSE, macs_per_token=680, mlp_macs_per_token=360)
    card = compute_card(DENSE, converted, ConversionSpec(keep=12))
    assert re.findall(r"−[\d.]+", card.difference) == ["−25.0", "−15.0"]  # of the MLPs, of all
    assert "zeros" not in card.note
    for spec in (ConversionSpec(fade=0.9), ConversionSpec(fade_unit="2:4")):
        assert "saves no" in compute_card(DENSE, DENSE, spec).note
    neurons = ConversionSpec(fade=0.9, fade_unit="neuron")
    assert "zeros" not in compute_card(DENSE, DENSE, neurons).note


def test_cards_of_a_conversion_to_come(tiny):
    cards = pending_structure_cards(tiny, "calibrating (50%)")
    assert [card.title for card in cards] == ["Non-zero parameters", "Compute per token"]
    assert [card.dense for card in cards] == [
        count(tiny.report.nonzero), count(tiny.report.macs_per_token)
    ]  # fmt: skip
    for card in cards:
        assert (card.converted, card.difference) == ("…", "calibrating (50%)")


@pytest.mark.parametrize(
    ("speedup", "difference"),
    [
        (Ratio(1.15, 1.08, 1.21), "× 1.15 (1.08 to 1.21)"),
        (Ratio(0.80, 0.75, 0.90), "× 0.80 (0.75 to 0.90)"),
        (Ratio(1.02, 0.97, 1.08), NO_CHANGE),
    ],
)
def test_speed_card(tiny, speedup, difference):
    card = speed_card(SpeedReport(400.0, 400.0 * speedup.median, speedup), tiny)
    assert card.difference == difference
    assert card.title == "Tokens per second"
    assert "float32 on cpu" in card.note

"""The table of runs and the comparison of two: right figures, nothing but our own HTML."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from math import inf, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe import PRESETS, ConversionSpec
from mlpmoe.explorer.server.texts import text_name
from mlpmoe.explorer.shell.records import Record
from mlpmoe.explorer.shell.run_words import model_name, recipe_of, short_recipe
from mlpmoe.explorer.tabs.runs_table import EMPTY, NOTHING_PINNED, comparison_table, runs_table
from mlpmoe.measure.cost.speed import Ratio
from mlpmoe.models import assets_folder
from tests.explorer.made import made_record

HOSTILE = "\"><img src=x onerror='alert(1)'>&amp;<script>"


class Cells(HTMLParser):
    """The rows of a table: texts of their cells; and all tags with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "small":
            self.handle_data("|")

    def handle_endtag(self, tag):
        if tag == "table":
            self.rows.append([])  # what follows is in no cell

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.replace("\N{NBSP}", " ")

    def buttons(self) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == "button"]


def test_without_runs_it_is_said():
    assert runs_table([]) == EMPTY
    assert comparison_table([]) == comparison_table([made_record()]) == NOTHING_PINNED


def test_a_row_has_the_figures():
    record = made_record(
        ConversionSpec(keep=12), ratio=1.034, stderr=0.0067, nonzero_share=0.8393,
        macs_share=0.8391, tokens=3563, speed=Ratio(1.17, 1.1, 1.2),
    )  # fmt: skip
    head, row, _ = Cells(runs_table([record])).rows
    assert head == ["compare", "recipe", "perplexity", "non-zero", "compute", "speed", "text",
                    "measured", "delete"]  # fmt: skip
    assert row == [
        "☆", "B 16 · K 12, × √(B/K)", "+3.4 % ± 0.7 %", "−16.1 %", "−16.1 %", "× 1.17",
        "evaluation stories|3,563 tokens", "11-25 21:07", "✕",
    ]  # fmt: skip
    assert '<time datetime="2026-11-25T21:07:00Z">' in runs_table([record])


def test_rows_stay_in_order_and_models_are_named_where_there_are_several():
    records = [made_record(ConversionSpec(keep=k)) for k in (3, 1, 2)]
    rows = Cells(runs_table(records)).rows[1:-1]
    assert [row[1] for row in rows] == [short_recipe(r.run.spec) for r in records]
    several = Cells(runs_table([*records, made_record(model="owner/name")])).rows[1:-1]
    assert all("|Demo" in row[1] for row in several[:3])
    assert several[3][1].endswith("|owner/name")


def test_buttons_carry_what_page_js_does():
    """A click runs the change of that name on the id, or restores the query."""
    script = (assets_folder() / "page.js").read_text(encoding="utf-8")
    assert "button.dataset" in script
    assert "change[pressed.runAction](pressed.run)" in script
    changes = set(re.findall(r"^    (\w+)\(\w*\) \{", script, re.MULTILINE))
    records = [made_record(), made_record(ConversionSpec(keep=3), pinned=True)]
    buttons = Cells(runs_table(records)).buttons()
    assert len(buttons) == 6
    for number, record in enumerate(records):
        pin, restore, remove = buttons[3 * number : 3 * number + 3]
        actions = [b["data-run-action"] for b in (pin, restore, remove)]
        assert actions == ["pin", "restore", "remove"]
        assert set(actions) <= changes
        assert pin["data-run"] == remove["data-run"] == record.id
        assert restore["data-run"] == record.query
        assert pin["aria-pressed"] == str(bool(record.pinned)).lower()
        assert all(b["type"] == "button" for b in (pin, restore, remove))
        recipe = short_recipe(record.run.spec)
        assert recipe in pin["aria-label"] and recipe in remove["aria-label"]
        assert restore["title"] == recipe_of(record.run.spec)


def test_names_of_others_are_escaped(monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.tabs.runs_table.short_recipe", lambda spec: HOSTILE)
    monkeypatch.setattr("mlpmoe.explorer.tabs.runs_table.recipe_of", lambda spec: HOSTILE)
    hostile = made_record(model=HOSTILE, text=HOSTILE, when=HOSTILE)
    plain = [made_record(), made_record(ConversionSpec(keep=3))]
    for html in (
        runs_table([hostile, *plain]),
        comparison_table([hostile, plain[0]]),
        comparison_table([hostile, hostile]),
    ):
        cells = Cells(html)
        assert not {"img", "script"} & {tag for tag, _ in cells.tags}
        assert not any("onerror" in attributes for _, attributes in cells.tags)
    attributes = Cells(runs_table([hostile])).buttons()
    assert attributes[1]["data-run"] == hostile.query
    assert unescape(attributes[1]["title"]) == unescape(HOSTILE)


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_name_adds_a_tag(model, text):
    usual = [made_record(model="m", text="own-1"), made_record(model="n", text="own-1")]
    odd = [made_record(model=model or "x", text=text), made_record(model="n", text="own-1")]
    if model == "n":
        return
    tags = [[tag for tag, _ in Cells(runs_table(pair)).tags] for pair in (usual, odd)]
    assert tags[0] == tags[1]


# comparison


def compared(first: Record, second: Record) -> dict[str, list[str]]:
    _, *rows, _ = Cells(comparison_table([first, second])).rows
    return {name: figures for name, *figures in rows}


def figures_in(text: str) -> list[float]:
    return [float(f.replace("−", "-").replace(",", "")) for f in re.findall(r"[−+-]?[\d.,]+", text)]


def test_the_comparison_is_recomputed():
    first = made_record(
        ConversionSpec(keep=12), perplexity=12.5, ratio=1.25, stderr=0.01, nonzero_share=0.84,
        mlp_nonzero_share=0.75, macs_share=0.83, bits_per_byte=1.05, speed=Ratio(1.2, 1.1, 1.3),
    )  # fmt: skip
    second = made_record(
        ConversionSpec(fade=0.9), perplexity=15.0, ratio=1.5, stderr=0.03, nonzero_share=0.82,
        mlp_nonzero_share=0.72, macs_share=1.0, bits_per_byte=1.15,
    )  # fmt: skip
    found = compared(first, second)
    dense, a, b, against = found["Perplexity"]
    assert (dense, a, b) == ("10.0", "12.5", "15.0")
    error = 1.2 * sqrt((0.01 / 1.25) ** 2 + (0.03 / 1.5) ** 2)
    assert figures_in(against) == pytest.approx([20.0, 100 * error], abs=0.051)
    assert [figures_in(t) for t in found["… to dense"][1:3]] == [[25.0, 1.0], [50.0, 3.0]]
    assert found["Bits per byte"] == ["", "1.05", "1.15", ""]
    assert found["Non-zero parameters"][:3] == ["100 %", "84.0 %", "82.0 %"]
    assert figures_in(found["Non-zero parameters"][3]) == pytest.approx([-2.4])
    assert figures_in(found["… in MLPs"][3]) == pytest.approx([-4.0])
    assert figures_in(found["Compute per token"][3]) == pytest.approx([100 / 0.83 - 100], abs=0.051)
    assert found["Writing speed"] == ["× 1", "× 1.20", "–", ""]


shares = st.floats(0.05, 2)


@given(shares, shares, shares, shares, st.floats(0.5, 1.9), st.floats(0.5, 1.9))
def test_every_comparison_is_b_against_a(n1, n2, m1, m2, r1, r2):
    first = made_record(nonzero_share=n1, mlp_nonzero_share=m1, macs_share=m1, ratio=r1)
    second = made_record(
        ConversionSpec(keep=3), nonzero_share=n2, mlp_nonzero_share=m2, macs_share=m2, ratio=r2
    )
    found = compared(first, second)
    expected = {
        "Non-zero parameters": n2 / n1, "… in MLPs": m2 / m1, "Compute per token": m2 / m1
    }  # fmt: skip
    for name, ratio in expected.items():
        assert figures_in(found[name][3])[0] == pytest.approx(100 * (ratio - 1), abs=0.051)
    said = found["Perplexity"][3]
    if said.startswith("×"):
        assert r2 / r1 >= 2
        assert figures_in(said)[0] == pytest.approx(r2 / r1, abs=0.0051)
    else:
        assert figures_in(said)[0] == pytest.approx(100 * (r2 / r1 - 1), abs=0.051)


@pytest.mark.parametrize(
    "change", [{"model": "owner/name"}, {"text": "proxy"}, {"tokens": 999}], ids=str
)
def test_runs_on_different_models_or_texts_are_not_compared(change):
    first, second = made_record(), made_record(ConversionSpec(keep=3), **change)
    found = compared(first, second)
    assert {figures[3] for figures in found.values()} == {""}
    assert found["Perplexity"][0] == ""  # they have no dense perplexity in common
    assert found["Perplexity"][1:3] == ["12.0", "12.0"]
    assert "cannot be compared" in comparison_table([first, second])
    same = comparison_table([first, made_record(ConversionSpec(keep=3))])
    assert "cannot be compared" not in same


def test_a_broken_model_is_shown_and_not_compared():
    broken = made_record(
        ConversionSpec(keep=1), perplexity=inf, ratio=inf, stderr=inf, bits_per_byte=inf
    )
    for pair in ((broken, made_record()), (made_record(), broken), (broken, broken)):
        found = compared(*pair)
        assert "∞" in "".join(found["Perplexity"][1:3])
        assert found["Perplexity"][3] == ""
    assert "∞" in Cells(runs_table([broken])).rows[1][2]


# words


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ConversionSpec(), "B 16 · K 16"),
        (ConversionSpec(fade=0.9), "B 16 · fade 0.90 · K 16"),
        (ConversionSpec(method="cmoe", experts=8, active=0.5), "CMoE · 50 % active · 8 experts"),
        (
            ConversionSpec(method="neurons", active=0.125, selection="threshold",
                           compensation="mean"),
            "12.5 % active · threshold · mean output of the others",
        ),
    ],
)  # fmt: skip
def test_short_recipes(spec, words):
    assert short_recipe(spec).endswith(words)


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_name_their_preset(name):
    assert recipe_of(PRESETS[name]).startswith(name.rstrip(" *"))


def test_a_routed_recipe_can_be_typed():
    spec = ConversionSpec(method="cmoe", experts=8, active=0.5)
    assert spec.to_flags() in recipe_of(spec)


def test_texts_of_visitors_are_named_by_their_digest():
    assert text_name("own-0123456789ab") == "own text 012345"
    assert text_name("stories") == "evaluation stories"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("owner/name", "owner/name"),
        ("/models/some/mine", "mine"),
        ("./mine", "mine"),
        ("~/models/mine.gguf", "mine.gguf"),
    ],
)
def test_a_model_of_this_machine_is_called_by_its_folder_or_file(key, name):
    assert model_name(key) == name

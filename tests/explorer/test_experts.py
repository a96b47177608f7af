"""The tab of routed experts: what the controls ask for, what is measured, what is said of it."""

import json
from math import sqrt

import gradio as gr
import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert
from mlpmoe.core.errors import UserError
from mlpmoe.core.routed import ROUTED_METHODS
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.explorer import experts
from mlpmoe.explorer.expert_figures import coloured_tokens, load_plot, split_plot, story_ids
from mlpmoe.explorer.expert_plots import Point, expert_load, shared_split, tradeoff
from mlpmoe.explorer.expert_settings import read_spec
from mlpmoe.explorer.experts import (
    ExpertHandlers,
    best_static,
    shipped_points,
    verdict,
)
from mlpmoe.explorer.preview import snippet
from mlpmoe.explorer.records import Record
from mlpmoe.measure.perplexity import perplexity
from mlpmoe.measure.routing import routing
from mlpmoe.models import assets_folder, named_text

OWN_TEXT = "A lamp stood on the table and a moth flew round it, again and again. " * 60


@pytest.fixture
def tab(workbench):
    return ExpertHandlers(workbench)


def settings(
    method="contiguous", active=0.5, count=16, shared=0.25, own_share=True, router="own",
    selection="topk", fill="none", calibration="own", own_text=OWN_TEXT,
):  # fmt: skip
    return (
        method, active, count, shared, own_share, router, selection, fill, calibration, own_text,
    )  # fmt: skip


def last(steps):
    *_, final = steps
    return final


@pytest.mark.parametrize("method", ROUTED_METHODS)
def test_every_method_is_explained_and_measured(tab, method):
    assert ROUTED_METHODS[method].about.endswith(".")
    status, result, figure, details, load, split, _, tokens, new = last(
        tab.measure("demo", 0, *settings(method))
    )
    assert status == ""
    assert details["visible"] is True
    assert ROUTED_METHODS[method].label.replace("'", "&#x27;") in result
    here = [trace for trace in figure.data if trace.name == "measured here"]
    assert len(here[0].x) == 1
    assert len(load.data[0].z) == len(split.data[0].x) == 2  # layers
    expected = "single neurons" if method == "neurons" else "favourite: expert"
    assert expected in tokens
    assert new == gr.skip()  # a link cannot carry a visitor's calibration text


def test_the_figures_are_those_of_the_library(tab, demo):
    chosen = settings("cmoe", active=0.5, count=8)
    result = last(tab.measure("demo", 0, *chosen))[1]
    spec = ConversionSpec(method="cmoe", active=0.5, experts=8)
    calibration = Calibration.from_text(demo.tokenizer, OWN_TEXT)
    converted = convert(demo.model, spec, calibration)
    text = (assets_folder() / "texts" / "evaluation.txt").read_text(encoding="utf-8")
    expected = perplexity(converted, demo.tokenizer, text).value
    assert f'<td class="converted">{expected:.0f}</td>' in result
    (point,) = demo.points.values()
    before = perplexity(demo.model, demo.tokenizer, text).value
    assert point.ratio == pytest.approx(expected / before, rel=1e-4)
    # 4 of 8 experts of 6 neurons, 2 of them shared, and two rows per routed expert as router
    assert point.compute == pytest.approx((24 * 3 + 2 * 6) / (48 * 3))


def test_neurons_need_no_experts_and_unticked_share_counts():
    spec = read_spec("neurons", 0.5, 64, 0.25, False, "gate-norm", "threshold", "mean")
    assert spec == ConversionSpec(
        method="neurons", active=0.5, router="gate-norm", selection="threshold",
        compensation="mean",
    )  # fmt: skip
    assert read_spec("random", 0.5, 8, 0.25, False, "own", "topk", "none").shared == 0.25
    assert read_spec("random", 0.5, 8, 0.25, True, "own", "topk", "none").shared == 0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"method": "magic"}, "method must be one of"),
        ({"own_text": "  "}, "there is no calibration text"),
        ({"own_text": "Too short.", "method": "cmoe"}, "at least 1,024 are needed"),
        ({"method": "cmoe", "own_share": False, "shared": 0.8}, "at most"),
        ({"method": "cmoe", "router": "gate-norm"}, "router must be one of"),
        ({"method": "neurons", "router": "oracle"}, "router must be one of"),
        ({"count": 1}, "experts must be at least 2"),
    ],
)
def test_what_cannot_be_done_is_said(tab, demo, changed, reason, weights_hash):
    before = weights_hash(demo.model)
    with pytest.raises(UserError, match=reason):
        last(tab.measure("demo", 0, *settings(**changed)))
    assert not demo.points
    assert weights_hash(demo.model) == before


def test_the_text_that_is_measured_on_is_refused_for_calibration(tab):
    text = (assets_folder() / "texts" / "evaluation.txt").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="share a passage"):
        last(tab.measure("demo", 0, *settings(own_text=OWN_TEXT + text)))


def test_a_file_becomes_the_own_text(tab, tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("Grüße", encoding="utf-8")
    bad.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert tab.read_file(str(good)) == ("Grüße", "own")
    good.write_bytes("Grüße\r\n".encode("utf-16"))
    assert tab.read_file(str(good)) == ("Grüße\n", "own")
    assert tab.read_file(None) == (gr.skip(), gr.skip())
    with pytest.raises(UserError, match="not UTF-8"):
        tab.read_file(str(bad))


def test_another_layer_is_coloured_anew_and_a_changed_setting_is_not_shown_as_measured(tab):
    final = last(tab.measure("demo", 0, *settings()))
    again = tab.recolour("demo", 0, *settings())
    assert again == final[-2]
    assert "Layer 1" in tab.recolour("demo", 1, *settings())
    assert "Convert and measure" in tab.recolour("demo", 1, *settings(active=0.75))


def test_static_recipes_join_the_plot(tab, demo):
    steps = list(tab.measure_static("demo", 0.5))
    figure = steps[-1][1]
    new = [json.loads(step[2]) for step in steps if step[2] != gr.skip()]
    assert all(len(records) == 1 for records in new)
    assert [Record.from_dict(r).source for (r,) in new] == ["experts"] * 4
    static = [p for p in demo.points.values() if p.kind == "static"]
    assert len(static) == 4
    assert [p.compute for p in static] == pytest.approx([0.5] * 4)
    assert figure.data[0].name == "static"


def test_what_is_measured_on_our_stories_becomes_a_run_and_its_code_is_shown(tab, demo):
    chosen = settings("random", count=8, calibration="stories", own_text="")
    new = last(tab.measure("demo", 0, *chosen))[-1]
    (record,) = map(Record.from_dict, json.loads(new))
    spec = ConversionSpec(method="random", experts=8, active=0.5)
    assert (record.model, record.text, record.source) == ("demo", "stories", "experts")
    assert record.run.spec == spec
    expected = perplexity(convert(demo.model, spec), demo.tokenizer, named_text("stories"))
    assert record.run.perplexity == pytest.approx(expected.value, rel=1e-5)
    assert record.run.mlp_macs_share == pytest.approx(demo.points.popitem()[1].compute)
    assert tab.describe("demo", *chosen)[1] == snippet("demo", spec, "stories")
    for calibration, name in (("stories", "stories"), ("own", "own-calibration.txt")):
        code = tab.describe("demo", *settings("cmoe", count=8, calibration=calibration))[1]
        assert f"--calibration {name} " in code


def test_settings_that_do_not_go_together_do_not_break_the_description(tab):
    about, code, _, _ = tab.describe("demo", *settings("cmoe", router="gate-norm"))
    assert about == ROUTED_METHODS["cmoe"].about
    assert code.startswith("# router must be one of")


def test_the_snippet_runs(demo, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text(OWN_TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    spec = ConversionSpec(method="expertweaver", experts=8, active=0.5)
    names = {}
    exec(snippet("demo", spec, "proxy", "mine.txt"), names)
    ids = torch.arange(12)[None]
    expected = convert(demo.model, spec, Calibration.from_text(demo.tokenizer, OWN_TEXT))
    assert torch.allclose(names["converted"](ids).logits, expected(ids).logits)


# What is said of it --------------------------------------------------------------------------


def point(kind, compute, ratio):
    return Point("p", kind, compute, ratio, 0.01)


def test_the_best_static_recipe_lies_between_the_measured_ones():
    known = [point("static", 0.5, 4.0), point("static", 0.5, 2.0), point("routed", 0.75, 1.0)]
    assert best_static(known, 0.5) == pytest.approx(2)
    assert best_static(known, 0.75) == pytest.approx(sqrt(2))  # halfway to dense, in logarithms
    assert best_static(known, 1.2) == pytest.approx(1)
    assert best_static(known, 0.4) is None
    assert best_static([], 0.9) is None


def test_the_verdict_says_which_is_better():
    known = [point("static", 0.5, 2.0)]
    spec = ConversionSpec(method="cmoe")
    assert "routing pays" in verdict(known, spec, 1.5, 0.5)
    assert "static is better" in verdict(known, spec, 2.5, 0.5)
    assert "no measurable difference" in verdict(known, spec, 1.99, 0.5, stderr=0.01)
    assert "routing pays" in verdict(known, spec, 1.95, 0.5, stderr=0.01)
    assert "No static recipe" in verdict(known, spec, 1.5, 0.3)
    oracle = ConversionSpec(method="cmoe", router="oracle")
    assert "bound" in verdict(known, oracle, 1.0, 0.5)


def test_the_shipped_comparison_is_complete():
    found = shipped_points("demo")
    expected = sum(len(experts.comparison(active)) for active in experts.BUDGETS)
    assert len(found) == expected
    assert {p.kind for p in found} == {"static", "routed", "bound"}
    assert all(0.2 < p.compute < 1.1 and p.ratio > 0.9 for p in found)


# Figures -------------------------------------------------------------------------------------


def test_the_trade_off_shows_every_point_and_dense():
    points = [point(kind, 0.5, 2.0) for kind in ("static", "routed", "bound", "here")]
    figure = tradeoff(points)
    assert sum(len(trace.x) for trace in figure.data) == 5
    assert [trace.name for trace in figure.data if trace.showlegend is not False][-1] == "dense"
    assert [trace.y[0] for trace in figure.data] == pytest.approx([100] * 4 + [0.1])
    better = tradeoff([point("here", 0.5, 0.99)])  # than dense: logarithms know no such increase
    assert better.data[3].y[0] == 0.1
    for worst in (1.001, 900.0):
        axis = tradeoff([point("here", 0.5, worst)]).layout.yaxis
        assert len(axis.tickvals) == len(axis.ticktext) <= 10
        assert 10 ** axis.range[1] > 100 * (worst - 1)


def test_the_load_shows_shared_experts_as_always_busy():
    figure = expert_load([torch.tensor([0.5, 0.25]), torch.tensor([0.1])], [1, 2], False)
    assert [list(row) for row in figure.data[0].z] == [[100, 50, 25], [100, 100, pytest.approx(10)]]
    neurons = expert_load([torch.linspace(0, 1, 640)], [0], True)
    row = list(neurons.data[0].z[0])
    assert len(row) == 64 and row == sorted(row, reverse=True)


def test_the_split_adds_up():
    figure = shared_split([0.25, 0.5], [0.25, 0.1], [0.5, 0.4])
    for layer in range(2):
        assert sum(bar.y[layer] for bar in figure.data) == pytest.approx(100)


def test_a_spared_layer_is_shown_as_always_busy(demo):
    spec = ConversionSpec(method="random", experts=8, active=0.5, spared="0")
    model = convert(demo.model, spec)
    found = routing(model, story_ids(demo)[:160])
    assert load_plot(found).data[0].z[0][0] == 100
    always, chosen, idle = (bar.y[0] for bar in split_plot(model, found).data)
    assert (always, chosen, idle) == (100, 0, 0)
    assert "all neurons run" in coloured_tokens(demo, found, 0)
    assert "expert" in coloured_tokens(demo, found, 1)

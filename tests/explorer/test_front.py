"""What the first screen shows of a setting: what is counted, estimated and measured of it."""

from __future__ import annotations

import json

import gradio as gr
import numpy as np
import pytest

from mlpmoe import ConversionSpec, convert, parameter_report
from mlpmoe.explorer.plots.cost_plot import shown_increase
from mlpmoe.explorer.server.loaded import LoadedModel
from mlpmoe.explorer.shell.front import FRONT, Front, axis_for, front
from mlpmoe.explorer.shell.shipped import shipped
from mlpmoe.measure.notation import count
from mlpmoe.measure.runs.families import estimate
from tests.explorer.calibrated import direct
from tests.explorer.made import made_record

SKIPPED = gr.skip()


def named(value: object) -> str:
    return value.to_query() if isinstance(value, ConversionSpec) else str(value)


PLAIN = [
    ConversionSpec(),
    ConversionSpec(branches=1),
    ConversionSpec(branches=48, fade=2.0),
    ConversionSpec(branches=5, fade=0.9, keep=1),
    ConversionSpec(branches=7, keep=3, compensation="none"),
    ConversionSpec(branches=8, fade=0.9, keep=6, spared="1"),
]
# layers that keep different branches, and branches that keep fewer neurons
SHARED_OUT = ConversionSpec(branches=8, keep=5, allocation="sensitivity")
EMPTIED = ConversionSpec(branches=8, fade=2.0, fade_unit="neuron")  # the last four are
DIFFERING = [
    SHARED_OUT,
    EMPTIED,
    ConversionSpec(branches=8, fade=1.2, fade_unit="neuron"),
    ConversionSpec(
        branches=8, keep=5, fade=0.8, fade_unit="neuron", fade_score="wanda",
        allocation="sensitivity",
    ),
]  # fmt: skip


def shown(loaded, asked, text="proxy", axis="compute", mine=(), layer=0, message="soon") -> Front:
    found = front(loaded, asked, text, axis, mine, layer, message)
    assert len(found.outputs) == len(found.measured) == FRONT
    return found


def here(found: Front):
    """The point of the present setting on the curve."""
    (trace,) = found.curve.select_traces({"name": "here"})
    return trace


def columns(found: Front) -> list[dict]:
    return json.loads(found.network["columns"])


# what is counted


@pytest.mark.parametrize("spec", PLAIN, ids=ConversionSpec.to_query)
def test_the_cards_count_what_the_library_counts(tiny, spec):
    found = shown(tiny, spec)
    dense, converted = (
        parameter_report(model) for model in (tiny.model, convert(tiny.model, spec))
    )
    for name, card in (("nonzero", found.nonzero), ("macs_per_token", found.compute)):
        assert f">{count(getattr(dense, name))}<" in card
        assert f">{count(getattr(converted, name))}<" in card


@pytest.mark.parametrize("spec", PLAIN, ids=ConversionSpec.to_query)
def test_the_network_shows_what_is_left_of_each_branch(tiny, spec):
    """Recounted from the weights of the two models, without the project's measurements."""
    dense = tiny.model.state_dict()
    converted = convert(tiny.model, spec).state_dict()
    for layer, column in enumerate(columns(shown(tiny, spec))):
        before, after = np.zeros(spec.branches), np.zeros(spec.branches)
        kept = spec.branches if layer in spec.spared_layers else spec.kept
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            key = f"model.layers.{layer}.mlp.{name}.weight"
            start = 0
            for b, piece in enumerate(dense[key].tensor_split(spec.branches, dim=dim)):
                before[b] += piece.count_nonzero()
                if b < kept:
                    left = converted[key].narrow(dim, start, piece.shape[dim])
                    after[b] += left.count_nonzero()
                    start += piece.shape[dim]
        assert column["left"] == pytest.approx(list(after / before), abs=1e-4)
        assert column["spared"] == (layer in spec.spared_layers)


@pytest.mark.parametrize("spec", DIFFERING, ids=ConversionSpec.to_query)
def test_the_network_of_layers_and_branches_that_differ(uneven, spec):
    """From the shapes of a direct conversion."""
    asked = uneven.asked(spec)
    uneven.converted(asked)
    left = []
    for layer in direct(uneven, spec).model.layers:
        sizes = layer.mlp.sizes
        assert sum(sizes) == layer.mlp.state_dict()["up_proj.weight"].shape[0]
        left.append([*sizes, *[0] * (8 - len(sizes))])
    drawn = np.array([column["left"] for column in columns(shown(uneven, asked))])
    assert drawn == pytest.approx(np.array(left) / 6, abs=1e-4)
    if spec.allocation == "sensitivity":  # the layer loses most that says least
        kept = (drawn > 0).sum(1)
        assert kept[0] > kept[1] and kept.sum() == 2 * spec.kept
    if spec is EMPTIED:
        assert ((drawn > 0) == ([True] * 4 + [False] * 4)).all()


# what is not known yet


@pytest.mark.parametrize(
    ("spec", "counted"),
    [
        (ConversionSpec(keep=12, order="activation"), False),
        (ConversionSpec(method="cmoe", experts=8), False),
        (ConversionSpec(method="random", experts=8), True),  # which calibrates nothing
    ],
    ids=named,
)
def test_before_it_is_made_and_watched_the_network_stays(demo, spec, counted):
    asked = demo.asked(spec)
    found = shown(demo, asked)
    assert found.network == SKIPPED
    for card in (found.perplexity, found.speed):
        assert "soon" in card
    for card in (found.nonzero, found.compute):
        assert ("soon" in card) != counted
    demo.converted(asked)
    if spec.routed:
        demo.routing(asked)
    found = shown(demo, asked, layer=1)
    assert found.network["looked"] == 1
    assert [len(c["left"]) for c in columns(found)] == [8 if spec.routed else 16] * 2
    assert "soon" not in found.nonzero + found.compute
    kept = found.measured[1], found.measured[2], found.measured[-1]
    assert kept == (SKIPPED,) * 3  # what a measurement does not change


# the axis


@pytest.mark.parametrize(
    ("spec", "saved"),
    [
        (ConversionSpec(), ""),
        (ConversionSpec(fade=0.9), "nonzero"),
        (ConversionSpec(fade_unit="2:4", branches=8), "nonzero"),
        (ConversionSpec(fade=0.9, fade_unit="neuron"), "nonzero, compute"),
        (ConversionSpec(keep=12), "nonzero, compute"),
        (ConversionSpec(fade=0.9, spared="0,1"), ""),
        (ConversionSpec(method="neurons", active=0.5), "compute"),
        (ConversionSpec(method="neurons", active=1.0), ""),
        (ConversionSpec(method="inputs", active=0.5), "compute"),
        (ConversionSpec(method="cmoe", experts=8, active=0.5), "compute"),
    ],
    ids=named,
)
def test_the_curve_turns_to_the_axis_on_which_something_is_saved(demo, spec, saved):
    dense, converted = (parameter_report(model) for model in (demo.model, direct(demo, spec)))
    assert ("nonzero" in saved) == (converted.mlp_nonzero < dense.mlp_nonzero)
    assert ("compute" in saved) == (converted.mlp_macs_per_token < dense.mlp_macs_per_token)
    for made in (False, True):
        asked = demo.asked(spec)
        if made:
            demo.converted(asked)
        elif spec.spared:
            continue  # what is asked for leaves spared layers aside
        for axis, other in (("compute", "nonzero"), ("nonzero", "compute")):
            turned = axis not in saved and other in saved
            assert axis_for(axis, demo, asked) == (other if turned else axis)


# the point of the present setting


def test_it_is_hollow_while_it_is_estimated_and_solid_once_it_is_measured(demo):
    spec = ConversionSpec(branches=16, keep=10)
    found = shown(demo, spec)
    guess = estimate([record.run for record in shipped("demo")], spec)
    trace = here(found)
    assert trace.marker.symbol == "circle-open"
    assert list(trace.y) == pytest.approx([shown_increase(guess.ratio)])
    top = trace.y[0] + trace.error_y.array[0]
    bottom = trace.y[0] - trace.error_y.arrayminus[0]
    assert (bottom, top) == pytest.approx((shown_increase(guess.low), shown_increase(guess.high)))
    assert "estimated" in found.sentence
    *_, measured = demo.evaluate(spec, "proxy")
    found = shown(demo, spec)
    trace = here(found)
    assert trace.marker.symbol == "circle"
    assert list(trace.y) == pytest.approx([shown_increase(measured.change.ratio)])
    assert trace.error_y.array[0] == pytest.approx(100 * measured.change.stderr)
    assert "estimated" not in found.sentence
    assert "soon" not in found.perplexity and "soon" in found.speed
    dense, converted = (parameter_report(model) for model in (demo.model, direct(demo, spec)))
    compute = converted.mlp_macs_per_token / dense.mlp_macs_per_token
    assert list(trace.x) == pytest.approx([100 * compute])
    nonzero = converted.mlp_nonzero / dense.mlp_nonzero
    assert list(here(shown(demo, spec, axis="nonzero")).x) == pytest.approx([100 * nonzero])


def test_where_nothing_is_known_only_its_cost_is_shown(tiny):
    """A line upright at it."""
    spec = ConversionSpec(branches=8, keep=6)
    found = shown(tiny, spec, text="prose")
    trace = here(found)
    assert trace.mode == "lines" and set(trace.x) == {75}
    assert "not measured yet" in found.sentence
    runs = [made_record(spec, model=tiny.key, text="stories"), made_record(spec, text="prose")]
    assert here(shown(tiny, spec, text="prose", mine=runs)).mode == "lines"  # of others
    here_too = made_record(spec, model=tiny.key, text="prose", ratio=1.5)
    trace = here(shown(tiny, spec, text="prose", mine=[*runs, here_too]))
    assert list(trace.y) == pytest.approx([shown_increase(1.5)])


# the sentence


def test_the_sentence_says_what_is_removed_and_of_what(demo, tiny):
    spec = ConversionSpec(branches=16, fade=0.9)
    left = parameter_report(convert(demo.model, spec)).mlp_nonzero / demo.report.mlp_nonzero
    for loaded, toy in ((demo, True), (tiny, False)):
        sentence = shown(loaded, spec).sentence
        assert f"{100 * (1 - left):.3g}\N{NO-BREAK SPACE}% of the MLP weights" in sentence
        assert ("toy" in sentence) == toy


def test_the_sentence_names_the_calibration_text(demo: LoadedModel):
    spec = ConversionSpec(keep=12, order="activation")
    key = demo.texts.add("A lamp stood there and a moth flew round it. " * 90)
    assert "own text" in shown(demo, demo.asked(spec, key)).sentence
    assert "own text" not in shown(demo, demo.asked(spec)).sentence
    assert "calibrated on" not in shown(demo, ConversionSpec(keep=12)).sentence

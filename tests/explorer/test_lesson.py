"""The lesson: its numbers are those of the loaded model, recounted here from the model's own
modules, and its right answers are right."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import gradio as gr
import pytest
import torch

from mlpmoe import ConversionSpec, convert, load
from mlpmoe.core.errors import UserError
from mlpmoe.core.recovery.tensors import places
from mlpmoe.explorer.server.events import Together
from mlpmoe.explorer.server.loaded import LoadedModel
from mlpmoe.explorer.shell.convert_panel import convert_panel
from mlpmoe.explorer.shell.links import read_link
from mlpmoe.explorer.tabs.lesson import LEAVE, PRESENT, LessonHandlers, plan
from mlpmoe.explorer.tabs.lesson_panel import lesson_panel, wire_lesson
from mlpmoe.explorer.tabs.lesson_steps import STEPS, Reading, feedback, read_layers
from mlpmoe.explorer.tabs.lesson_steps.cut import addition
from mlpmoe.explorer.tabs.lesson_steps.fade import faded
from mlpmoe.explorer.tabs.lesson_steps.keep import kept
from mlpmoe.explorer.tabs.lesson_steps.route import routed
from mlpmoe.explorer.tabs.lesson_steps.train import ASKED, KINDS, recorded, won
from mlpmoe.explorer.tabs.lesson_turn import PUBLISHED

CUT, FADE, KEEP, ROUTE, TRAIN = STEPS
MOST_WORDS = 65  # of running text in a step
LAYER = 1


@pytest.fixture(params=["tiny", "gateless", "one_layer"])
def any_model(request) -> LoadedModel:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def reading(tiny) -> Reading:
    return read_layers(tiny)[LAYER]


@pytest.fixture(scope="module")
def caught(tiny) -> SimpleNamespace:
    """Input and output of the dense model's own MLP for the words, by a hook."""
    found = []
    mlp = tiny.model.model.layers[LAYER].mlp
    handle = mlp.register_forward_hook(lambda _, args, out: found.append((args[0][0], out[0])))
    ids = tiny.text("prose").documents[0][:64]
    try:
        with torch.no_grad():
            tiny.model(ids[None])
    finally:
        handle.remove()
    words = ids != tiny.tokenizer.bos_token_id
    return SimpleNamespace(mlp=mlp, x=found[0][0][words], whole=found[0][1][words], ids=ids[words])


def branch(mlp, x: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """What some neurons of a Llama's MLP say."""
    gated = torch.nn.functional.silu(x @ mlp.gate_proj.weight[first:stop].T)
    return (gated * (x @ mlp.up_proj.weight[first:stop].T)) @ mlp.down_proj.weight[:, first:stop].T


def said(caught, branches: int) -> torch.Tensor:
    size = 48 // branches
    with torch.no_grad():
        return torch.stack(
            [branch(caught.mlp, caught.x, b * size, (b + 1) * size) for b in range(branches)]
        )


# all steps


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.key)
def test_any_model_and_any_value_of_the_control_has_a_view(any_model, step):
    layers = read_layers(any_model)
    assert [reading.layer for reading in layers] == list(range(len(any_model.mlps)))
    low, high = step.control["minimum"], step.control["maximum"]
    for reading in layers:
        for value in (low, step.control["value"], high):
            for answered in (False, True):
                view = step.view(reading, value, answered)
                shown = view.numbers + (str(view.figure) if not step.plots else "")
                assert not re.search(r"\b(nan|inf|undefined)\b|[{}]", shown)
            spec = step.spec(reading, value)
            any_model.check_fits(spec)
            assert read_link(plan("x/y", spec))[0].spec.canonical() == spec.canonical()
        for answer in range(3):
            assert re.match(
                r'<p role="status" class="(right|wrong)">', feedback(step, reading, answer)
            )


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.key)
def test_words_are_few_and_about_the_matrices_there_are(tiny, gateless, step):
    for model in (tiny, gateless):
        text = step.words(read_layers(model)[0])
        formula, running = re.search(r"\$\$(.*?)\$\$(.*)", text, re.DOTALL).groups()
        assert len(running.split()) <= MOST_WORDS
        assert "$" not in running and "{" not in running
        assert formula.count("{") == formula.count("}")
        assert ("gate" in text) <= (model is tiny)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.key)
def test_one_answer_is_right_and_nothing_is_said_before(any_model, step):
    for reading in read_layers(any_model):
        assert feedback(step, reading, None) == ""
        verdicts = [feedback(step, reading, answer) for answer in range(3)]
        right, why = step.judge(reading)
        assert [i for i, text in enumerate(verdicts) if 'class="right"' in text] == [right]
        assert all(why in text for text in verdicts)
        assert all("Right is" in text for i, text in enumerate(verdicts) if i != right)


def test_the_reading_leaves_out_what_is_no_text(tiny, reading, caught):
    assert torch.equal(reading.x, caught.x)
    assert tiny.tokenizer.bos_token_id not in caught.ids
    assert len(reading.words) == len(caught.ids) == 63
    assert "".join(reading.words[:4]) == tiny.tokenizer.decode(caught.ids[:4])


def test_reading_leaves_the_model_alone(tiny, weights_hash):
    before = weights_hash(tiny.model)
    reading = read_layers(tiny)[0]
    for step in STEPS:
        step.view(reading, step.control["value"], True)
        step.judge(reading)
    assert weights_hash(tiny.model) == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tiny.model.modules())


def test_text_of_the_model_is_escaped(reading):
    odd = replace(reading, words=("<img src=x onerror=1>",) * len(reading.words))
    figure = ROUTE.view(odd, 4, True).figure
    assert "<img" not in figure.to_json().replace("\\u003c", "<")


def test_nothing_that_is_sent_before_an_answer_contains_it(any_model):
    """What the question asks for is in no figure and no text; afterwards it is."""
    for reading in read_layers(any_model):
        for k in range(1, 17):
            found, before = kept(reading), KEEP.view(reading, k, False)
            after = KEEP.view(reading, k, True)
            assert {t.name for t in after.figure.data} - {t.name for t in before.figure.data} == {
                "least error", "restores size",
            }  # fmt: skip
            assert len(found.best) == 16
            assert "error" not in before.numbers and "least error" in after.numbers
            before = ROUTE.view(reading, k, False)
            assert before.numbers.count("<td>?</td>") == 3 and "width:" not in before.numbers
            assert "?" not in ROUTE.view(reading, k, True).numbers


def test_answers_stand_in_their_own_order_and_no_place_is_always_right(any_model):
    places = {step.judge(reading)[0] for reading in read_layers(any_model) for step in STEPS}
    assert len(places) > 1


# 1: cut


def test_cut_says_how_well_the_branches_add_up(reading, caught):
    parts, whole = said(caught, 4), caught.whole.detach()
    found = addition(reading, 4)
    assert found.said == pytest.approx([float(part.norm()) for part in parts], rel=1e-4)
    expected = float((parts.sum(0) - whole).abs().max() / whole.abs().max())
    assert found.error == pytest.approx(expected, abs=1e-6)
    assert 0 <= found.error < 1e-5


def test_cut_names_uneven_branches(reading):
    assert "5 branches of 9 or 10 neurons" in CUT.view(reading, 5, False).numbers
    assert "1 branch of 48 neurons" in CUT.view(reading, 1, False).numbers


def test_neurons_fire_as_in_the_model(reading, caught):
    with torch.no_grad():
        up = caught.x @ caught.mlp.up_proj.weight.T
        h = torch.nn.functional.silu(caught.x @ caught.mlp.gate_proj.weight.T) * up
    assert torch.allclose(reading.activity(), h.abs().mean(0), atol=1e-5)


def test_shuffled_neurons_say_the_same(any_model):
    """What the question claims, on the model as converted by the library."""
    spec = ConversionSpec(branches=8, order="random")
    ids = any_model.text("prose").documents[0][None, :32]
    with torch.no_grad():
        shuffled = convert(any_model.model, spec)(ids).logits
        assert torch.allclose(shuffled, any_model.model(ids).logits, atol=1e-3)
    for reading in read_layers(any_model):
        assert CUT.judge(reading)[0] == 2


# 2: fade


@pytest.mark.parametrize("strength", [0.05, 0.9, 1.0])
def test_fade_zeroes_what_the_library_zeroes(any_model, strength):
    spec = ConversionSpec(branches=16, fade=strength)
    converted = convert(any_model.model, spec)
    mlps = [m for m in converted.modules() if type(m).__name__ == "BranchedMLP"]
    for reading, mlp in zip(read_layers(any_model), mlps, strict=True):
        found = faded(reading, strength)
        assert found.projection == ("gate" if "gate" in any_model.projections else "up")
        pieces = mlp.projections[found.projection].weight.detach().split(mlp.sizes)
        thresholds = mlp.fade_thresholds[found.projection]
        assert [b.branch for b in found.branches] == [0, 8, 15]
        for b in found.branches:
            assert b.realised == pytest.approx(float((pieces[b.branch] == 0).double().mean()))
            assert b.threshold == pytest.approx(thresholds[b.branch])
            assert b.requested == pytest.approx(strength * b.branch / 16)
            assert int(b.counts.sum()) >= 0.98 * pieces[b.branch].numel()


def test_no_fade_zeroes_nothing(reading):
    assert [b.realised for b in faded(reading, 0).branches] == [0, 0, 0]
    assert [b.threshold for b in faded(reading, 0).branches] == [0, 0, 0]


def test_half_of_the_weights_hold_less_than_half_of_the_squares(reading, caught):
    right, why = FADE.judge(reading)
    rows = caught.mlp.gate_proj.weight.detach()[24:27].flatten().square().sort().values.double()
    lost = float(rows[: len(rows) // 2].sum() / rows.sum())
    assert FADE.question.answers[right] == "Less than half"
    share = float(re.search(r"and ([\d.]+)\N{NO-BREAK SPACE}% of the squares", why)[1])
    assert share == pytest.approx(100 * lost, abs=0.06)


# 3: keep


def test_keep_measures_size_direction_and_factors(reading, caught):
    parts, found = said(caught, 16).double(), kept(reading)
    whole = parts.sum(0)
    for k in (1, 7, 16):
        some = parts[:k].sum(0)
        assert float(found.size[k - 1]) == pytest.approx(float(some.norm() / whole.norm()), 1e-4)
        restored = found.restoring[k - 1] * some
        assert float(restored.norm()) == pytest.approx(float(whole.norm()), 1e-4)
        errors = {
            factor: float((factor * found.best[k - 1] * some - whole).norm() / whole.norm())
            for factor in (0.97, 1, 1.03)
        }
        assert min(errors, key=errors.get) == 1
        assert float(found.error[k - 1]) == pytest.approx(errors[1], abs=2e-3)
    assert float(found.cosine[-1]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("first", "second", "answer"),
    [
        ([1.0, 0.0], [0.0, 1.0], "One below √(16/8) = 1.41"),  # uncorrelated: 1 is best
        ([1.0, 0.0], [1.0, 0.0], "One above it"),  # the same: 2 is best
        ([1.0, 0.0], [0.4142, 0.9], "That one, give or take 5 %"),
    ],
)
def test_the_best_factor_is_told_from_the_published_one(reading, first, second, answer):
    """Half of the branches say `first`, the others `second`."""
    outputs = torch.zeros(16, 1, 2)
    outputs[:8], outputs[8:] = torch.tensor(first) / 8, torch.tensor(second) / 8
    stand_in = SimpleNamespace(layer=0, looped=lambda branches: (outputs, outputs.sum(0)))
    right, _ = KEEP.judge(stand_in)
    assert KEEP.question.answers[right] == answer


# 4: route


def test_router_oracle_and_fixed_choice_have_the_errors_they_make(tiny, reading, caught):
    parts, found = said(caught, 16), routed(reading, 5)
    whole = parts.sum(0)

    def error(chosen: torch.Tensor) -> float:
        return float(((chosen.T[..., None] * parts).sum(0) - whole).norm() / whole.norm())

    mlp = caught.mlp
    centroids = mlp.gate_proj.weight.detach().view(16, 3, -1).mean(1)
    best = (caught.x @ centroids.T).topk(5).indices
    chosen = torch.zeros(63, 16, dtype=torch.bool).scatter(1, best, True)
    assert torch.equal(found.chosen, chosen)
    assert found.error == pytest.approx(error(chosen), rel=1e-4)
    loudest = parts.norm(dim=2).mean(1).topk(5).indices
    fixed = torch.zeros(63, 16, dtype=torch.bool)
    fixed[:, loudest] = True
    assert found.fixed_error == pytest.approx(error(fixed), rel=1e-4)
    oracle = ConversionSpec(method="contiguous", experts=16, active=5 / 16, router="oracle")
    with torch.no_grad():
        y = convert(tiny.model, oracle).model.layers[LAYER].mlp(caught.x)
    expected = float((y - whole).norm() / whole.norm())
    assert found.oracle_error == pytest.approx(expected, rel=1e-4)


def test_all_experts_make_no_error(any_model):
    for reading in read_layers(any_model):
        found = routed(reading, 16)
        assert found.chosen.all()
        assert max(found.error, found.fixed_error, found.oracle_error) < 1e-6


def test_experts_are_fewer_where_the_neurons_forbid_sixteen(one_layer):
    found = routed(read_layers(one_layer)[0], 16)
    assert found.size.shape[1] == found.running == 10
    assert "10 of 10 experts" in ROUTE.view(read_layers(one_layer)[0], 16, False).numbers
    assert ROUTE.spec(read_layers(one_layer)[0], 16).experts == 10


@pytest.mark.parametrize(
    ("error", "fixed", "answer"), [(0.3, 0.5, 2), (0.5, 0.3, 0), (0.5, 0.52, 1), (0.52, 0.5, 1)]
)
def test_the_verdict_on_routing_follows_the_errors(reading, monkeypatch, error, fixed, answer):
    found = replace(routed(reading, 4), error=error, fixed_error=fixed)
    monkeypatch.setattr("mlpmoe.explorer.tabs.lesson_steps.route.routed", lambda *_: found)
    assert ROUTE.judge(reading)[0] == answer


# 5: train


def test_training_is_recorded_for_every_value_of_the_control():
    steps = [0, *range(10, 41, 10)]
    assert {kind: list(runs) for kind, runs in recorded().items()} == dict.fromkeys(KINDS, steps)
    for kind, runs in recorded().items():
        assert runs[0].spec.canonical() == ConversionSpec(keep=8)
        for n, run in list(runs.items())[1:]:
            assert run.spec == ConversionSpec(keep=8, recover=kind, recover_steps=n)
            assert run.mlp_macs_share == runs[0].mlp_macs_share == pytest.approx(0.5)
            assert 1 < run.ratio < runs[0].ratio
        assert won(kind, 40) > won(kind, 10) > 0 == won(kind, 0)


def test_so_many_numbers_are_trained():
    dense, _ = load("demo")
    for kind, (_, count) in KINDS.items():
        spec = ConversionSpec(keep=8, recover=kind)
        found = places(convert(dense, replace(spec, recover="none")), spec)
        assert sum(place.tensor.numel() for place in found) == count


def test_the_curves_of_the_question_come_with_the_answer(reading):
    before, after = (TRAIN.view(reading, 20, answered) for answered in (False, True))
    names = {KINDS[kind][0] for kind in ASKED}
    assert {t.name for t in after.figure.data} - {t.name for t in before.figure.data} == names
    assert before.numbers.count("<td>?</td>") == 2 and "?" not in after.numbers
    ratio = f"{recorded()['all'][20].ratio:.3g}"
    assert ratio in before.numbers.replace("\N{NO-BREAK SPACE}", " ")
    lines = {t.name: t for t in after.figure.data}
    for name, _ in KINDS.values():
        kind = next(k for k in KINDS if KINDS[k][0] == name)
        assert lines[name].x == (0, 10, 20, 30, 40)
        assert lines[name].y == tuple(run.ratio for run in recorded()[kind].values())
    assert lines["dense model"].y == (1, 1)


@pytest.mark.parametrize(
    ("factors", "down", "answer"), [(0.5, 0.2, 0), (0.2, 0.24, 1), (0.24, 0.2, 1), (0.1, 0.6, 2)]
)
def test_the_verdict_on_training_follows_the_gains(reading, monkeypatch, factors, down, answer):
    gains = {"alpha": factors, "down": down, "all": 0.7}
    monkeypatch.setattr(
        "mlpmoe.explorer.tabs.lesson_steps.train.won", lambda kind, steps: gains[kind]
    )
    assert TRAIN.judge(reading)[0] == answer


# the events


@pytest.fixture
def lesson(workbench) -> LessonHandlers:
    return LessonHandlers(workbench)


DEFAULTS = [step.control["value"] for step in STEPS]


def test_show_fills_all_steps_and_keeps_answers(lesson):
    shown = lesson.show("demo", 0, False, *DEFAULTS, None, 0, None, 2, None)
    assert len(shown) == 5 * len(STEPS)
    assert [bool(text) for text in shown[3::5]] == [False, True, False, True, False]
    assert [type(figure) is str for figure in shown[1::5]] == [not step.plots for step in STEPS]


def test_a_control_gives_what_show_gave(lesson):
    shown = lesson.show("demo", 1, False, *DEFAULTS, None, 0, None, 2, None)
    for index, (step, answer) in enumerate(zip(STEPS, (None, 0, None, 2, None), strict=True)):
        of_step = shown[5 * index : 5 * index + 5]
        _, figure, numbers, said, planned = of_step
        assert lesson.view(step, "demo", 1, False, DEFAULTS[index], answer) == (
            figure, numbers, planned,
        )  # fmt: skip
        assert lesson.answer(step, "demo", 1, False, DEFAULTS[index], answer)[-1] == said


@pytest.mark.parametrize(
    ("step", "value", "spec"),
    [
        (CUT, 3, ConversionSpec(branches=3)),
        (FADE, 0.45, ConversionSpec(branches=16, fade=0.45)),
        (KEEP, 7, ConversionSpec(branches=16, keep=7)),
        (KEEP, 16, ConversionSpec(branches=16)),
        (ROUTE, 4, ConversionSpec(method="contiguous", experts=16, active=0.25)),
        (TRAIN, 0, ConversionSpec(keep=8)),
        (TRAIN, 30, ConversionSpec(keep=8, recover="all", recover_steps=30)),
    ],
    ids=lambda value: getattr(value, "key", None),
)
def test_a_step_plans_the_same_for_the_whole_model(lesson, step, value, spec):
    *_, planned = lesson.view(step, "demo", 0, False, value, None)
    link, notices = read_link(planned)
    assert not notices
    assert (link.model, link.spec.canonical()) == ("demo", spec.canonical())


def test_a_layer_beyond_the_last_is_the_last(lesson):
    assert lesson.reading("demo", 99).layer == 1
    slider, words = lesson.another_model("demo")
    assert slider == gr.update(maximum=1, value=1)
    assert "52 %" in words


def test_starts_can_be_asked_for_again(lesson):
    first, second = lesson.start_published("demo"), lesson.start_published("demo")
    assert first != second
    assert read_link(first.split()[0])[0].spec == PUBLISHED
    assert read_link(lesson.start_well("demo").split()[0])[0].spec.active == 0.625


def test_large_figures_are_larger(lesson):
    for step in (FADE, KEEP, ROUTE, TRAIN):
        value = step.control["value"]
        small, *_ = lesson.view(step, "demo", 0, False, value, None)
        large, *_ = lesson.view(step, "demo", 0, True, value, None)
        assert large.layout.height > small.layout.height
        assert large.layout.font.size > small.layout.font.size


def test_the_button_says_where_it_leads(lesson):
    assert lesson.present(True) == (True, LEAVE)
    assert lesson.present(False) == (False, PRESENT)


def test_the_model_reads_the_text_once(lesson, workbench, monkeypatch):
    lesson.show("demo", 0, False, *DEFAULTS, *[None] * len(STEPS))
    monkeypatch.setattr(workbench.loaded("demo"), "model", None)
    lesson.view(KEEP, "demo", 1, False, 3, None)
    assert "Right" in lesson.answer(CUT, "demo", 1, False, 4, 1)[-1]


def test_a_model_that_left_is_named(lesson):
    with pytest.raises(UserError, match="not loaded"):
        lesson.view(KEEP, "nobody/nothing", 0, False, 3, None)


def test_all_listeners_are_private_and_one_runs_at_a_time(lesson):
    with gr.Blocks() as demo:
        model, query, sentence = gr.State("demo"), gr.Textbox(), gr.HTML()
        convert = convert_panel()
        theirs = {block.elem_id for block in demo.blocks.values()}
        with gr.Tab("Lesson") as tab:
            panel = lesson_panel()
        told, another_model = gr.Textbox(), Together()
        wire_lesson(lesson, panel, model, convert, query, sentence, told, tab, another_model)
    assert {fn.api_visibility for fn in demo.fns.values()} == {"private"}
    measuring = [fn for fn in demo.fns.values() if fn.concurrency_id == "lesson"]
    assert len(measuring) == 1 + 2 * len(STEPS)
    assert {fn.concurrency_limit for fn in measuring} == {1}
    ids = [b.elem_id for b in demo.blocks.values() if b.elem_id and b.elem_id not in theirs]
    assert all(name == "lesson" or name.startswith("lesson-") for name in ids)
    assert len(ids) == len(set(ids))

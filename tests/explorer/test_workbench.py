"""What a server holds: conversions, what is counted of them, models that come and go, and a dense
model that nothing ever changes."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mlpmoe import ConversionSpec, UserError, convert, named_text, parameter_report, perplexity
from mlpmoe.explorer.server import workbench as module
from mlpmoe.explorer.server.loaded import SMALL_CONVERSIONS_HELD
from mlpmoe.explorer.server.workbench import Workbench, model_key
from mlpmoe.explorer.shell.front import front
from mlpmoe.explorer.tabs.weights import histograms
from mlpmoe.models import CATALOGUE

SPEC = ConversionSpec(branches=6, fade=0.9, keep=4)


def test_conversions_are_shared_and_few(demo):
    assert demo.converted(SPEC) is demo.converted(ConversionSpec(**SPEC.to_dict()))
    kept = demo.converted(SPEC)
    for branches in range(1, SMALL_CONVERSIONS_HELD + 1):
        demo.converted(ConversionSpec(branches=branches))  # holds no weights of its own
    assert demo.converted(SPEC) is kept
    for branches in range(1, SMALL_CONVERSIONS_HELD + 1):
        demo.converted(ConversionSpec(branches=branches, order="norm"))
    assert demo.converted(SPEC) is not kept


@pytest.mark.parametrize(
    "spec",
    [ConversionSpec(), SPEC, ConversionSpec(branches=48, fade=2.0), ConversionSpec(keep=1)],
    ids=ConversionSpec.to_query,
)
@pytest.mark.parametrize("model", ["tiny", "gateless", "one_layer"])
def test_counts_from_memory_are_plain_counts(request, model, spec):
    loaded = request.getfixturevalue(model)
    spec = ConversionSpec(**{**spec.to_dict(), "branches": min(spec.branches, loaded.d_ff)})
    assert loaded.report == parameter_report(loaded.model)
    assert loaded.structure.report(spec) == parameter_report(convert(loaded.model, spec))


def test_zeros_are_counted_over_the_kept_branches(tiny):
    zeros = tiny.structure.zeros(SPEC)
    wanted = [0.9 * b / 6 for b in range(4)]  # 48 neurons: all branches have 8
    assert zeros.requested == pytest.approx(sum(wanted) / 4)
    gates = [
        linear.weight
        for layer in convert(tiny.model, SPEC).model.layers
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj)
    ]
    zero = sum(int((weight == 0).sum()) for weight in gates)
    assert zeros.realised == pytest.approx(zero / sum(weight.numel() for weight in gates))
    assert zeros.what == "gate and up"
    assert tiny.structure.zeros(ConversionSpec(keep=3)) is None


def test_zeros_count_neurons_where_branches_differ_in_size(one_layer):
    """40 neurons in 16 branches: the first 8 have 3 each, the others 2."""
    sizes = [3] * 8 + [2] * 8
    wanted = sum(n * 0.9 * b / 16 for b, n in enumerate(sizes)) / 40
    assert one_layer.structure.zeros(ConversionSpec(fade=0.9)).requested == pytest.approx(wanted)


def test_left_lies_between_nothing_and_all(tiny):
    left = tiny.structure.left(SPEC)
    assert left.shape == (2, 6)
    assert ((left >= 0) & (left <= 1)).all()
    assert (left[:, 4:] == 0).all()
    assert left[:, 0] == pytest.approx(1)


@pytest.mark.parametrize(
    "text", ["", "Stories", None, 3, ["stories"], "../evaluation.txt", "x" * 9999]
)
def test_unknown_texts_are_refused(tiny, text):
    with pytest.raises(
        UserError, match=r"no text is called .*; allowed: stories, prose, proxy"
    ) as caught:
        next(tiny.evaluate(SPEC, text))
    assert len(str(caught.value)) < 200


def test_the_dense_model_is_never_changed(demo, weights_hash):
    before = weights_hash(demo.model)
    modules = [type(module) for module in demo.model.modules()]
    for spec in (SPEC, ConversionSpec(fade=2.0), ConversionSpec(keep=1)):
        front(demo, spec, "proxy", "compute", (), 0, "")
        histograms(demo, spec, 0, "gate")
        list(demo.evaluate(spec, "proxy"))
        list(demo.speed(spec))
    unfinished = demo.evaluate(ConversionSpec(branches=3, fade=1.0), "stories")
    next(unfinished)
    unfinished.close()
    assert weights_hash(demo.model) == before
    assert [type(module) for module in demo.model.modules()] == modules


def test_threads_get_their_own_right_results(demo, weights_hash):
    specs = [ConversionSpec(branches=8, fade=0.1 * i, keep=8 - i) for i in range(4)]
    before = weights_hash(demo.model)
    barrier = threading.Barrier(len(specs))

    def work(spec):
        barrier.wait(timeout=30)
        report = demo.structure.report(spec)
        left = demo.structure.left(spec)
        return report, left, list(demo.evaluate(spec, "proxy"))[-1]

    with ThreadPoolExecutor(len(specs)) as pool:
        results = list(pool.map(work, specs))
    text = named_text("proxy")
    for spec, (report, left, found) in zip(specs, results, strict=True):
        alone = convert(demo.model, spec)
        assert report == parameter_report(alone)
        assert (left > 0).sum(1).tolist() == [spec.kept] * 2
        assert found.converted == perplexity(alone, demo.tokenizer, text)
    assert weights_hash(demo.model) == before


# models that come and go


def load_all(workbench: Workbench, name: object) -> list:
    return list(workbench.load(str(name)))


def test_load_says_what_it_does(workbench, one_layer_folder):
    *steps, loaded = load_all(workbench, one_layer_folder)
    assert steps[0] == "checking"
    assert "reading weights" in steps
    assert all(isinstance(step, str) for step in steps)
    assert loaded.label == "one-layer"
    assert loaded is workbench.loaded(str(one_layer_folder))
    assert load_all(workbench, one_layer_folder) == ["checking", loaded]


@pytest.fixture
def forgotten(monkeypatch):
    """Whoever does not run a model has left it."""
    monkeypatch.setattr(module, "IN_USE", 0.0)
    monkeypatch.setattr(module, "MAX_IDLE", 1)


def test_a_model_in_use_does_not_make_room(
    workbench, tiny_folder, one_layer_folder, gateless_folder, forgotten
):
    """Whatever is loaded beside it, and where both do not fit the new one is refused."""
    *_, used = load_all(workbench, one_layer_folder)
    steps = used.evaluate(SPEC, "stories")
    with used.turns.turn():
        load_all(workbench, gateless_folder)
        load_all(workbench, tiny_folder)
        assert workbench.loaded(str(one_layer_folder)) is used
        assert not workbench.holds(str(gateless_folder))
    steps.close()


def test_who_looks_at_a_model_keeps_it(
    workbench, tiny_folder, one_layer_folder, gateless_folder, monkeypatch
):
    now = 1000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    for folder in (one_layer_folder, gateless_folder, tiny_folder):
        load_all(workbench, folder)
    assert all(map(workbench.holds, map(str, (one_layer_folder, gateless_folder, tiny_folder))))
    now += module.IN_USE + 1
    workbench.loaded(str(one_layer_folder))
    assert {one.key for one in workbench._idle()} == {str(gateless_folder), str(tiny_folder)}


def test_the_demo_model_stays_and_a_guest_makes_room(
    workbench, tiny_folder, one_layer_folder, gateless_folder, forgotten
):
    demo = workbench.loaded("demo")
    load_all(workbench, one_layer_folder)
    load_all(workbench, gateless_folder)
    load_all(workbench, tiny_folder)
    assert workbench.loaded("demo") is demo
    assert workbench.holds(str(tiny_folder))
    assert not workbench.holds(str(one_layer_folder))
    with pytest.raises(UserError, match="the model of this page is not loaded"):
        workbench.loaded("")  # of a page that a server before this one had opened
    with pytest.raises(UserError, match="is not loaded on this server"):
        workbench.loaded(str(one_layer_folder))


def test_what_the_page_opens_with_stays_too(
    workbench, tiny_folder, one_layer_folder, gateless_folder, forgotten
):
    """Else whoever opened the page after a visitor had loaded another model would find none."""
    *_, first = load_all(workbench, tiny_folder)
    workbench.staying.add(first.key)
    for guest in (one_layer_folder, gateless_folder, tiny_folder):
        load_all(workbench, guest)
    assert workbench.loaded(first.key) is first
    assert workbench.holds(str(gateless_folder)) and not workbench.holds(str(one_layer_folder))


def test_a_failed_load_leaves_everything(workbench, one_layer_folder, tmp_path):
    load_all(workbench, one_layer_folder)
    held = workbench.loaded("demo"), workbench.loaded(str(one_layer_folder))
    damaged = shutil.copytree(one_layer_folder, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in (damaged, empty, tmp_path / "absent", "no such model", "a/b/c", ""):
        with pytest.raises(UserError):
            load_all(workbench, name)
    assert held == (workbench.loaded("demo"), workbench.loaded(str(one_layer_folder)))


def test_a_model_that_cannot_be_split_is_not_kept(workbench, one_layer_folder, tmp_path):
    """Its weights overflow: known only when they are used."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(one_layer_folder, tmp_path / "huge")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = torch.full_like(weights[name], 3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="infinite or undefined numbers in float32"):
        load_all(workbench, folder)
    assert not workbench.holds(str(folder))


def test_a_closed_load_gives_up(workbench, one_layer_folder, gateless_folder):
    steps = workbench.load(str(one_layer_folder))
    for _ in range(2):
        next(steps)
    steps.close()
    assert not workbench.holds(str(one_layer_folder))
    load_all(workbench, gateless_folder)  # nobody waits for the one that gave up
    assert workbench.holds(str(gateless_folder))


def test_two_visitors_load_one_model_once(workbench, one_layer_folder, monkeypatch):
    calls = []
    original = module.load_checked

    def load_checked(checked, **options):
        calls.append(checked)
        return original(checked, **options)

    monkeypatch.setattr(module, "load_checked", load_checked)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: load_all(workbench, one_layer_folder)[-1], range(2))
    assert first is second
    assert len(calls) == 1


def test_the_guest_leaves_first_where_both_do_not_fit(
    workbench, one_layer_folder, gateless_folder, forgotten, monkeypatch
):
    """It is freed before the new one is read, not after."""
    load_all(workbench, one_layer_folder)
    monkeypatch.setattr("mlpmoe.models.host.available_memory", lambda device: 50_000_000)
    held = []
    original = module.load_checked

    def load_checked(checked, **options):
        held.append(workbench.holds(str(one_layer_folder)))
        return original(checked, **options)

    monkeypatch.setattr(module, "load_checked", load_checked)
    load_all(workbench, gateless_folder)
    assert held == [False]


def test_one_key_per_model():
    for entry in CATALOGUE:
        source = entry.source if isinstance(entry.source, str) else entry.key
        names = (entry.key, entry.label, source, f"  {entry.key.upper()} ")
        assert {model_key(name) for name in names} == {entry.key}
    assert model_key(" owner/name ") == "owner/name"


@pytest.mark.parametrize("name", [None, 3, True, ["demo"], {"key": "demo"}])
def test_a_name_must_be_text(workbench, name):
    for call in (workbench.loaded, workbench.holds, lambda n: list(workbench.load(n))):
        with pytest.raises(UserError, match="no model was named"):
            call(name)


@pytest.mark.parametrize("name", ["", "../demo", "/etc", "x" * 10**6, "demo\0", "‮demo"])
def test_unknown_names_are_refused_in_a_short_sentence(workbench, name):
    for call in (workbench.loaded, lambda n: list(workbench.load(n))):
        with pytest.raises(UserError) as caught:
            call(name)
        assert len(str(caught.value)) < 250
        json.dumps(str(caught.value)).encode()

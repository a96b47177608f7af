"""Layers that suffer more get more, out of the same budget; and what is observed once is enough."""

from dataclasses import replace
from itertools import product
from math import sqrt

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, convert_all, convert_mlp, mlp_modules, observe
from mlpmoe.core.mlps import read_mlps
from mlpmoe.core.sensitivity import sensitivities
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.allocation import FADE_STEPS, candidates, cost_curve, share_out
from mlpmoe.core.static.order import ORDERS, order_of
from mlpmoe.core.visiting import visit_layers
from tests.core.layers import D_FF, KINDS, gated_and_h, layer_of, output, random_mlp
from tests.core.specs import static_specs
from tests.families import VOCABULARY, build


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


# Candidates --------------------------------------------------------------------------------


@given(spec=static_specs(max_branches=40))
@example(
    spec=ConversionSpec(fade=0.5, fade_score="wanda", progressive=True, allocation="sensitivity")
)
def test_the_uniform_choice_is_a_candidate(spec):
    found = candidates(spec)
    uniform = replace(spec, allocation="uniform", progressive=False)
    assert uniform in found
    assert {spec.allocation for spec in found} == {"uniform"}
    same = {"keep": spec.keep, "fade": spec.fade}
    assert {replace(c, **same) for c in found} == {uniform}


def test_candidates_go_from_the_least_to_the_most():
    spec = ConversionSpec(branches=6, keep=2, fade=0.5, allocation="sensitivity")
    assert [(c.keep, c.fade) for c in candidates(spec)] == [(k, 0.5) for k in range(1, 7)]
    for fade, last in ((0.5, 0.0), (0.9, 0.0), (1.7, 1.4), (2.0, 2.0), (0.1, 0.0)):
        fades = [c.fade for c in candidates(ConversionSpec(fade=fade, allocation="sensitivity"))]
        assert len(fades) == 2 * FADE_STEPS + 1
        assert fades == sorted(fades, reverse=True)
        assert fades[FADE_STEPS] == fade
        assert fades[-1] == pytest.approx(last, abs=1e-12)
        assert fades[0] + fades[-1] == pytest.approx(2 * fade)


@pytest.mark.parametrize("fields", [{}, {"keep": 16}, {"fade_unit": "2:4"}], ids=str)
def test_nothing_to_share_out(fields):
    spec = ConversionSpec(allocation="sensitivity", **fields)
    assert candidates(spec) == [replace(spec, allocation="uniform")]
    curves = [torch.zeros(1).double()] * 3
    assert share_out(spec, curves) == candidates(spec) * 3


# Error curves ------------------------------------------------------------------------------


def cost(layer, found, expected):
    """Of outputs (tokens, d_model), in nats as the layer's sensitivity has it."""
    error = found - expected
    return float(torch.einsum("ti,ij,tj->t", error, layer.sensitivity, error).mean() / 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("compensation", ["none", "sqrt", "mean"])
def test_the_curve_over_kept_branches(kind, order, compensation):
    layer = layer_of(random_mlp(kind))
    spec = ConversionSpec(
        branches=5, keep=3, order=order, compensation=compensation, allocation="sensitivity"
    )
    curve = cost_curve(spec, layer)
    assert curve.dtype == torch.float64
    x = layer.x.flatten(0, 1).double()
    wanted, full = output(layer.weights, x), gated_and_h(layer.weights, x)[1]
    neurons, expected = order_of(order, layer.weights, layer, 0), []
    for keep in range(1, 6):
        dropped = neurons[sum(len(p) for p in neurons.tensor_split(5)[:keep]) :]
        h = full * (sqrt(5 / keep) if compensation == "sqrt" else 1)
        h[:, dropped] = h[:, dropped].mean(0) if compensation == "mean" else 0.0
        expected.append(cost(layer, output(layer.weights, x, h), wanted))
    torch.testing.assert_close(curve.tolist(), expected, rtol=1e-4, atol=1e-8)
    assert curve[-1] < 1e-7 * curve[0]


def test_the_curve_over_strengths_of_fade():
    layer = layer_of(random_mlp("gated with biases"))
    w, x = layer.weights, layer.x.flatten(0, 1).double()
    curve = cost_curve(ConversionSpec(branches=4, fade=0.6, allocation="sensitivity"), layer)
    expected = []
    for strength in [0.6 + i * 0.15 for i in range(4, -5, -1)]:
        faded = {}
        for name in ("gate", "up"):
            parts = getattr(w, name).tensor_split(4)
            cuts = [torch.quantile(p.abs(), strength * i / 4) for i, p in enumerate(parts)]
            cuts[0] = torch.tensor(-1.0)  # branch 0 keeps all
            kept = [p * (p.abs() > cut) for p, cut in zip(parts, cuts, strict=True)]
            faded[name] = torch.cat(kept)
        dense = replace(w, **faded) if strength > 1e-9 else w
        expected.append(cost(layer, output(dense, x), output(w, x)))
    torch.testing.assert_close(curve.tolist(), expected, rtol=1e-4, atol=1e-8)
    assert curve[-1] < 1e-10


def test_long_texts_are_measured_on_samples_evenly_spaced(monkeypatch):
    layer = layer_of(random_mlp())
    spec = ConversionSpec(branches=4, keep=2, compensation="none", allocation="sensitivity")
    monkeypatch.setattr("mlpmoe.core.static.allocation.COMPARED_TOKENS", 35)
    curve = cost_curve(spec, layer)
    x = layer.x[::3].flatten(0, 1).double()  # 40 of the 120 tokens: 4 of the 12 samples
    h = gated_and_h(layer.weights, x)[1]
    h[:, D_FF // 2 :] = 0
    expected = cost(layer, output(layer.weights, x, h), output(layer.weights, x))
    assert float(curve[1]) == pytest.approx(expected, rel=1e-4)


def test_flap_s_ranking_over_all_layers():
    """With a neuron per branch, the K of the layers are those of one ranking by standardised
    scores."""
    layers = [layer_of(random_mlp(seed=seed), seed=seed) for seed in range(5)]
    with torch.no_grad():  # layers that differ in how their scores spread
        for i, layer in enumerate(layers):
            layer.weights.down[:, : 3 * i] *= 0.1
    spec = ConversionSpec(branches=D_FF, keep=16, order="fluctuation", allocation="global")
    shares = share_out(spec, [cost_curve(spec, layer) for layer in layers])
    scores = []
    for layer in layers:
        h = gated_and_h(layer.weights, layer.x.flatten(0, 1).double())[1]
        score = h.var(0) * layer.weights.down.double().square().sum(0)
        scores.append((score - score.mean()) / score.std())
    threshold = torch.cat(scores).sort(descending=True).values[16 * len(layers) - 1]
    kept = [int((score >= threshold).sum()) for score in scores]
    assert len(set(kept)) > 2
    assert [share.kept for share in shares] == kept


# Sharing out -------------------------------------------------------------------------------

numbers = st.floats(0, 10, allow_subnormal=False)


@st.composite
def curves_of(draw, levels):
    """One curve per layer: convex and falling, or anything."""
    count = draw(st.integers(1, 3 if levels > 6 else 4))
    found = []
    for _ in range(count):
        values = draw(st.lists(numbers, min_size=levels, max_size=levels))
        if draw(st.booleans()):
            steps = torch.tensor(sorted(values)).double()
            values = steps.cumsum(0).flip(0).tolist()
        found.append(torch.tensor(values).double())
    return found


def least(curves, budget):
    """The least sum of costs of all assignments of this budget."""
    levels = range(len(curves[0]))
    return min(
        sum(float(curve[level]) for curve, level in zip(curves, chosen, strict=True))
        for chosen in product(levels, repeat=len(curves))
        if sum(chosen) == budget
    )


@given(data=st.data(), branches=st.integers(2, 6))
def test_kept_branches_are_shared_out_best(data, branches):
    keep = data.draw(st.integers(1, branches - 1))
    curves = data.draw(curves_of(branches))
    spec = ConversionSpec(branches=branches, keep=keep, allocation="sensitivity")
    found = share_out(spec, curves)
    assert len(found) == len(curves)
    assert sum(s.kept for s in found) == keep * len(curves)
    assert all(replace(s, keep=keep) == replace(spec, allocation="uniform") for s in found)
    error = sum(float(curve[s.kept - 1]) for curve, s in zip(curves, found, strict=True))
    assert error == pytest.approx(least(curves, (keep - 1) * len(curves)), rel=1e-12, abs=1e-12)


@given(data=st.data(), fade=st.floats(0.01, 1.99))
def test_fade_is_shared_out_best(data, fade):
    curves = data.draw(curves_of(2 * FADE_STEPS + 1))
    spec = ConversionSpec(fade=fade, allocation="sensitivity")
    choices = candidates(spec)
    levels = [choices.index(s) for s in share_out(spec, curves)]
    assert sum(choices[i].fade for i in levels) == pytest.approx(fade * len(curves))
    error = sum(float(curve[i]) for curve, i in zip(curves, levels, strict=True))
    expected = least(curves, FADE_STEPS * len(curves))
    assert error == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(value=numbers, count=st.integers(1, 5))
def test_what_some_layers_do_not_need_goes_to_the_others(value, count):
    flat = torch.full((4,), value).double()
    steep = flat + torch.tensor([9.0, 6.0, 3.0, 0.0]).double()
    spec = ConversionSpec(branches=4, keep=2, allocation="sensitivity")
    found = [s.keep for s in share_out(spec, [flat, *[steep] * count, flat])]
    spare = max(2, 2 * (count + 2) - 4 * count)  # what the flat layers must take between them
    assert found[0] + found[-1] == spare
    assert sum(found) == 2 * (count + 2)


# Whole models ------------------------------------------------------------------------------

LAYERS = 4


def calibration(samples=9, length=7):
    generator = torch.Generator().manual_seed(2)
    return Calibration(torch.randint(2, VOCABULARY, (samples, length), generator=generator))


@pytest.fixture(scope="module")
def model():
    """Of its layer 1 hardly anything but the first branches says something."""
    model = build("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[8:] *= 0.01
    return model


@pytest.fixture(scope="module")
def observed(model):
    found = observe(model, calibration())
    found.learn(sensitivities(model, read_mlps(model), calibration()))
    return found


def neurons(converted):
    return [sum(module.sizes) for module in mlp_modules(converted)]


SENSITIVE = ConversionSpec(branches=11, keep=6, compensation="none", allocation="sensitivity")


@pytest.mark.parametrize("keep", [1, 4, 6, 10])
@pytest.mark.parametrize("compensation", ["none", "refit"])
def test_as_many_neurons_in_all_as_with_one_share_for_all(model, keep, compensation):
    spec = replace(SENSITIVE, keep=keep, compensation=compensation)
    shared, uniform = convert_all(model, [spec, replace(spec, allocation="uniform")], calibration())
    assert sum(neurons(shared)) == sum(neurons(uniform)) == LAYERS * keep * 4
    assert neurons(uniform) == [4 * keep] * LAYERS
    if keep > 1:
        assert neurons(shared)[1] < 4 * keep
    assert torch.isfinite(shared(calibration().samples).logits).all()


def weights_of(module):
    return dict(module.named_parameters())


def assert_same_weights(one, other):
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    "spec",
    [
        SENSITIVE,
        ConversionSpec(fade=0.9, allocation="sensitivity"),
        ConversionSpec(fade=0.9, fade_score="wanda", fade_projections="down", compensation="mean",
                       allocation="sensitivity"),
        ConversionSpec(fade=0.9, fade_unit="neuron", allocation="sensitivity", order="norm"),
    ],
    ids=lambda spec: spec.to_query(),
)  # fmt: skip
def test_each_layer_gets_its_share(model, observed, spec):
    curves = [cost_curve(spec, layer) for layer in observed.layers]
    shares = share_out(spec, curves)
    assert len(set(shares)) > 1
    converted = convert(model, spec, calibration())
    for module, share, layer in zip(mlp_modules(converted), shares, observed.layers, strict=True):
        assert_same_weights(module, convert_mlp(layer.weights, share, layer))


SPECS = [
    ConversionSpec(branches=4),
    ConversionSpec(branches=4, keep=3, fade=0.5),
    ConversionSpec(branches=4, keep=3, order="fluctuation", compensation="refit"),
    ConversionSpec(branches=4, keep=3, order="least-squares", compensation="alpha"),
    ConversionSpec(branches=4, fade=0.9, fade_score="wanda", fade_projections="gate-up-down"),
    ConversionSpec(branches=4, fade_unit="2:4", fade_score="sparsegpt", compensation="mean"),
    ConversionSpec(branches=4, fade=0.9, fade_unit="neuron", fade_score="sparsegpt"),
    SENSITIVE,
    replace(SENSITIVE, order="activation", compensation="refit", progressive=True),
    ConversionSpec(branches=4, keep=3, compensation="refit", progressive=True),
    ConversionSpec(fade=0.9, fade_score="sparsegpt", fade_projections="down", progressive=True),
    ConversionSpec(method="cmoe"),
    ConversionSpec(method="expertweaver"),
    ConversionSpec(method="expertweaver", progressive=True),
]


def test_what_was_observed_converts_like_the_text(model, observed):
    """All at once and one by one, and no matter what was asked before."""
    expected = convert_all(model, SPECS, calibration())
    for one, other in zip(convert_all(model, SPECS, observed), expected, strict=True):
        assert_same_weights(one, other)
    for spec, other in reversed(list(zip(SPECS, expected, strict=True))):
        (one,) = convert_all(model, [spec], observed)
        assert_same_weights(one, other)


def test_only_progressive_specs_read_an_observed_text_again(model, observed, monkeypatch):
    runs = []
    decoder = type(model.model)
    forward = decoder.forward

    def spy(self, *args, **kwargs):
        runs.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(decoder, "forward", spy)
    convert_all(model, SPECS, observed)
    assert len(runs) == sum(spec.progressive for spec in SPECS)
    runs.clear()
    # two passes for what is found from the whole, once with gradients, and one
    convert_all(model, SPECS, calibration())
    assert len(runs) == 3 + sum(spec.progressive for spec in SPECS)


def test_what_is_observed_is_what_the_layers_see(model, observed):
    seen = []
    visit_layers(
        model, read_mlps(model), calibration(), lambda i, layer: seen.append(layer.x.clone())
    )
    assert len(observed.layers) == LAYERS
    for layer, x in zip(observed.layers, seen, strict=True):
        assert torch.equal(layer.x, x)


def test_unchanged_tensors_stay_the_dense_model_s(model, observed):
    (converted,) = convert_all(model, [ConversionSpec(branches=4, order="contiguous")], observed)
    for module, mlp in zip(mlp_modules(converted), read_mlps(model), strict=True):
        assert module.down_proj.weight is mlp.weights.down


def streams_of(model):
    """What each decoder layer of a model gives for the calibration text: (tokens, d_model)."""
    seen, hooks = [], []
    for layer in model.model.layers:
        hook = layer.register_forward_hook(
            lambda _, __, out: seen.append(
                (out[0] if isinstance(out, tuple) else out).flatten(0, 1)
            )
        )
        hooks.append(hook)
    model(calibration().samples)
    for hook in hooks:
        hook.remove()
    return [stream.double() for stream in seen]


@pytest.mark.parametrize(
    "spec",
    [
        ConversionSpec(branches=4, keep=2, compensation="refit"),
        ConversionSpec(method="neurons", active=0.3, compensation="refit"),
        ConversionSpec(method="inputs", active=0.3, compensation="refit"),
        ConversionSpec(method="random", experts=8, active=0.5, compensation="refit"),
    ],
    ids=ConversionSpec.to_flags,
)
def test_progressive_layers_make_up_for_what_was_lost_before(model, spec):
    """A fitted layer ends, in the mean, half way between what the dense MLP would give on the
    converted layers' output and where the dense model is."""
    spec = replace(spec, progressive=True)
    converted = convert(model, spec, calibration())
    dense, found = streams_of(model), streams_of(converted)
    for i, layer in enumerate(converted.model.layers):
        fitted, layer.mlp = layer.mlp, model.model.layers[i].mlp
        unfitted = streams_of(converted)[i]
        layer.mlp = fitted
        wanted = (unfitted + dense[i]) / 2
        torch.testing.assert_close(found[i].mean(0), wanted.mean(0), rtol=1e-4, atol=1e-4)


def test_progressive_fade_is_shared_out_too(model, monkeypatch):
    """Also if the first layer gets none of it: the others are still scored on converted inputs."""
    spec = ConversionSpec(fade=0.5, fade_score="wanda", progressive=True, allocation="sensitivity")
    levels = 2 * FADE_STEPS + 1
    even = (torch.arange(levels).double() - 8 / 3).square()  # for what layer 0 leaves
    curves = iter([100 * torch.arange(levels).flip(0).double(), even, even, even])
    monkeypatch.setattr("mlpmoe.core.conversion.cost_curve", lambda *_: next(curves))
    converted = convert(model, spec, calibration())
    seen = []
    for layer in converted.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    converted(calibration().samples)
    first, *later = mlp_modules(converted)
    assert torch.equal(first.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    for module, mlp, x in zip(later, read_mlps(model)[1:], seen[1:], strict=True):
        size = mlp.weights.up.abs() * x.square().mean(0).sqrt()
        gone = module.up_proj.weight == 0
        assert gone.any()
        highest = size.masked_fill(~gone, 0).amax(1)
        assert (highest <= size.masked_fill(gone, torch.inf).amin(1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["gpt2", "phi3", "bloom", "llama-bias"])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_families_share_out_and_fade_all_matrices(name, score):
    model = build(name)
    gate = "" if name in ("gpt2", "bloom") else "gate-"
    spec = ConversionSpec(
        branches=4, keep=3, fade=0.7, fade_projections=f"{gate}up-down", fade_score=score,
        compensation="refit", allocation="sensitivity", order="fluctuation",
    )  # fmt: skip
    contiguous = replace(spec, order="contiguous")
    for converted in convert_all(model, [spec, contiguous], observe(model, calibration())):
        assert torch.isfinite(converted(calibration().samples).logits).all()

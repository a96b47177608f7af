"""Orders of neurons, and how kept neurons make up for dropped ones."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.core.conversion import convert, convert_mlp
from mlpmoe.core.errors import SpecError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.compensation import COMPENSATIONS
from mlpmoe.core.static.order import ORDERS, order_of, permute, removal_by_loss
from mlpmoe.core.static.removal import DAMPING
from tests.core.layers import D_FF, KINDS, gated_and_h, layer_of, output, random_mlp
from tests.families import build

CALIBRATED = [name for name, order in ORDERS.items() if order.calibrated]


def rank(name, layer, seed=0):
    return order_of(name, layer.weights, layer, seed)


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=KINDS)
def layer(request):
    return layer_of(random_mlp(request.param))


def activations(layer):
    """(tokens, d_ff) float64."""
    return gated_and_h(layer.weights, layer.inputs().double())[1]


def outputs(layer):
    return output(layer.weights, layer.inputs().double())


# Orders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_is_a_permutation_that_changes_no_function(layer, name):
    order = rank(name, layer)
    assert sorted(order.tolist()) == list(range(D_FF))
    sorted_mlp = permute(layer.weights, order)
    x = layer.inputs().double()
    torch.testing.assert_close(
        output(sorted_mlp, x), output(layer.weights, x), rtol=1e-6, atol=1e-6
    )


@given(kind=st.sampled_from(KINDS), order=st.permutations(range(D_FF)))
def test_any_permutation_changes_no_function(kind, order):
    mlp = random_mlp(kind, dtype=torch.float64)
    x = layer_of(mlp).inputs().double()
    torch.testing.assert_close(output(permute(mlp, torch.tensor(order)), x), output(mlp, x))


def test_neurons_of_a_part_keep_their_biases():
    """Three parts of the neurons add up to the whole, each with the bias of down."""
    mlp = random_mlp("gated with biases", dtype=torch.float64)
    x = layer_of(mlp).inputs().double()
    neurons = torch.randperm(D_FF, generator=torch.Generator().manual_seed(0))
    parts = [output(permute(mlp, part), x) for part in neurons.split(10)]
    assert len(parts) == 3
    torch.testing.assert_close(sum(parts) - 2 * mlp.down_bias, output(mlp, x))


def test_by_activation_is_by_mean_size(layer):
    size = activations(layer).abs().mean(0)[rank("activation", layer)]
    assert (size.diff() <= 1e-6 * size.max()).all()


def test_by_fluctuation_is_by_flap_s_score(layer):
    down = layer.weights.down.detach().double()
    score = activations(layer).var(0) * down.square().sum(0)
    score = score[rank("fluctuation", layer)]
    assert (score.diff() <= 1e-6 * score.max()).all()


def test_by_norm_is_by_the_product_of_lengths(layer):
    w, score = layer.weights, []
    for i in range(D_FF):
        parts = [w.up[i], w.down[:, i]] + ([] if w.gate is None else [w.gate[i]])
        score.append(prod(float(part.double().norm()) for part in parts))
    assert rank("norm", layer).tolist() == sorted(range(D_FF), key=lambda i: -score[i])


def test_random_is_another_order_for_each_seed_and_needs_no_activations():
    orders = [order_of("random", random_mlp(), None, seed).tolist() for seed in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    assert order_of("random", random_mlp(), None, 3).tolist() == orders[3]


def test_contiguous_is_as_stored():
    assert order_of("contiguous", random_mlp(), None, 7).tolist() == list(range(D_FF))


def test_an_order_of_activations_is_found_once(layer, monkeypatch):
    first = rank("least-squares", layer)
    monkeypatch.setattr("mlpmoe.core.static.order.removal", None)
    assert rank("least-squares", layer) is first


def test_by_gradient_is_by_what_the_loss_loses(layer):
    """Half the mean of (g·δ)², over g of this sensitivity and what a neuron varies by."""
    h, down = activations(layer), layer.weights.down.double()
    score = []
    for i in range(D_FF):
        delta = (h[:, i] - h[:, i].mean())[:, None] * down[:, i]
        score.append(float(torch.einsum("ti,ij,tj->t", delta, layer.sensitivity, delta).mean()))
    order = rank("gradient", layer)
    score = torch.tensor(score)[order]
    assert (score.diff() <= 1e-6 * score.max()).all()


def loss_without(layer, dropped, metric):
    """Least mean of eᵀ M e that the other neurons and a bias leave, when the dropped ones are
    gone; with the damping as rows of data. By a general solver, from the activations."""
    h = activations(layer)
    h = (h - h.mean(0)) / len(h) ** 0.5
    damping = (DAMPING * h.square().sum(0).mean()).sqrt() * torch.eye(D_FF).double()
    data = torch.cat([h, damping])
    down = layer.weights.down.detach().double()
    target = data[:, dropped] @ down[:, dropped].T
    kept = [i for i in range(D_FF) if i not in dropped]
    left = target - data[:, kept] @ torch.linalg.lstsq(data[:, kept], target).solution
    return float(((left @ metric) * left).sum())


@pytest.mark.parametrize("kind", ["gated", "plain with biases"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["least-squares", "loss"])
@pytest.mark.parametrize("together", [1, 5, 64])
def test_what_the_others_make_up_for_best_goes_first(kind, seed, name, together, monkeypatch):
    """Every single choice against trying all, by fitting the whole anew each time; however many
    neurons go before their rows are taken out."""
    monkeypatch.setattr("mlpmoe.core.static.removal.COMPACTED_AFTER", together)
    layer = layer_of(random_mlp(kind, seed=seed), seed=seed)
    metric = layer.sensitivity if name == "loss" else torch.eye(len(layer.sensitivity)).double()
    order = rank(name, layer).tolist()
    dropped = []
    for neuron in reversed(order[D_FF // 2 :]):
        losses = {i: loss_without(layer, [*dropped, i], metric) for i in order if i not in dropped}
        assert losses[neuron] <= min(losses.values()) * (1 + 1e-4)
        dropped.append(neuron)


@pytest.mark.parametrize("groups", [48, 5])
def test_what_is_lost_on_the_way(groups, monkeypatch):
    """However many go at a time, the loss after each of the groups is that of fitting anew."""
    monkeypatch.setattr("mlpmoe.core.static.removal.GROUPS", groups)
    layer = layer_of(random_mlp())
    path = removal_by_loss(layer.weights, layer)
    assert path.lost.shape == (D_FF + 1,)
    assert path.lost[-1] == 0
    assert (path.lost.diff() <= 0).all()
    step = max(1, D_FF // groups)
    for kept in range(D_FF - step, 0, -step):
        dropped = path.order[kept:].tolist()
        expected = loss_without(layer, dropped, layer.sensitivity) / 2
        assert float(path.lost[kept]) == pytest.approx(expected, rel=1e-6)


def test_a_neuron_that_copies_another_goes_first():
    mlp = random_mlp()
    with torch.no_grad():
        for matrix in (mlp.gate, mlp.up):
            matrix[5] = matrix[3]
    assert rank("least-squares", layer_of(mlp))[-1] in (3, 5)


@pytest.mark.parametrize("name", CALIBRATED)
def test_neurons_that_never_fire_go_first(name):
    mlp = random_mlp()
    with torch.no_grad():
        mlp.up[[2, 7, 11]] = 0
    assert set(rank(name, layer_of(mlp))[-3:].tolist()) == {2, 7, 11}


def test_the_orders_of_a_dead_layer_are_permutations_too():
    mlp = random_mlp()
    with torch.no_grad():
        mlp.up.zero_()
    for name in ORDERS:
        assert sorted(rank(name, layer_of(mlp)).tolist()) == list(range(D_FF))


# Compensation ------------------------------------------------------------------------------


def error(layer, **spec):
    module = convert_mlp(layer.weights, ConversionSpec(branches=8, **spec), layer)
    return float((module(layer.inputs()).double() - outputs(layer)).square().mean())


@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize("keep", [1, 4, 7])
def test_better_compensations_are_not_worse_on_the_calibration_text(layer, order, keep):
    none, alpha, mean, refit = (
        error(layer, order=order, keep=keep, compensation=name)
        for name in ("none", "alpha", "mean", "refit")
    )
    assert refit <= mean * (1 + 1e-5)
    assert mean <= none * (1 + 1e-5)
    assert alpha <= none * (1 + 1e-5)


def test_mean_adds_the_mean_output_of_what_is_dropped(layer):
    spec = ConversionSpec(branches=8, keep=5, order="fluctuation", compensation="mean")
    module = convert_mlp(layer.weights, spec, layer)
    h = activations(layer)
    dropped = rank("fluctuation", layer)[15:]
    h[:, dropped] = h[:, dropped].mean(0)
    expected = output(layer.weights, layer.inputs().double(), h)
    torch.testing.assert_close(module(layer.inputs()).double(), expected, rtol=1e-5, atol=1e-5)


def test_refit_is_the_ridge_regression_of_the_whole_output(layer):
    spec = ConversionSpec(branches=8, keep=5, compensation="refit")
    module = convert_mlp(layer.weights, spec, layer)
    down = layer.weights.down.double()
    h = activations(layer)
    kept, dropped = h[:, :15], h[:, 15:]
    centred = (kept - kept.mean(0)) / len(h) ** 0.5
    ridge = (DAMPING * centred.square().sum(0).mean()).sqrt() * torch.eye(15).double()
    target = (dropped - dropped.mean(0)) @ down[:, 15:].T / len(h) ** 0.5
    change = torch.linalg.lstsq(
        torch.cat([centred, ridge]), torch.cat([target, torch.zeros(15, len(down)).double()])
    ).solution
    y = kept @ down[:, :15].T + (kept - kept.mean(0)) @ change + dropped.mean(0) @ down[:, 15:].T
    y = y if layer.weights.down_bias is None else y + layer.weights.down_bias.double()
    torch.testing.assert_close(module(layer.inputs()).double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_with_all_neurons_kept_nothing_changes(layer, compensation):
    spec = ConversionSpec(branches=8, compensation=compensation)
    module = convert_mlp(layer.weights, spec, layer)
    assert (module.alpha == 1).all()
    assert module.down_proj.weight is layer.weights.down
    assert module.down_proj.bias is layer.weights.down_bias


def test_the_dtype_of_the_weights_stays():
    layer = layer_of(random_mlp("gated with biases", dtype=torch.bfloat16))
    spec = ConversionSpec(branches=8, keep=6, order="least-squares", compensation="refit")
    module = convert_mlp(layer.weights, spec, layer)
    assert {p.dtype for n, p in module.named_parameters() if "alpha" not in n} == {torch.bfloat16}
    assert torch.isfinite(module(layer.x)).all()


def test_stages_that_look_at_activations_need_a_text():
    for spec in (
        *(ConversionSpec(order=name) for name in CALIBRATED),
        *(ConversionSpec(keep=8, compensation=name) for name in ("alpha", "mean", "refit")),
        *(ConversionSpec(fade=0.5, fade_score=name) for name in ("wanda", "sparsegpt")),
        *(ConversionSpec(fade_unit="2:4", fade_score=name) for name in ("wanda", "sparsegpt")),
        ConversionSpec(keep=8, allocation="sensitivity"),
        ConversionSpec(keep=8, compensation="mean", progressive=True),
    ):
        with pytest.raises(SpecError, match="needs a calibration text"):
            convert(build("llama"), spec)
    for name in set(COMPENSATIONS) - {"alpha", "mean", "refit"}:
        convert(build("llama"), ConversionSpec(keep=8, compensation=name))
    for name in set(ORDERS) - set(CALIBRATED):
        convert(build("llama"), ConversionSpec(keep=8, order=name))
    convert(build("llama"), ConversionSpec(keep=8, fade_unit="2:4"))
    # without anything to fade, the score is not asked
    convert(build("llama"), ConversionSpec(keep=8, fade_score="wanda"))

"""Input sparsity: against the definition, token by token; its budget, its path and its fit."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from mlpmoe.core.activations import LayerActivations
from mlpmoe.core.calibration import Calibration, few_tokens
from mlpmoe.core.conversion import convert, convert_mlp, mlp_modules
from mlpmoe.core.mlps import read_mlps
from mlpmoe.core.routed import InputMLP, inputs
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.cost.parameters import parameter_report
from tests.core.layers import D_FF, D_MODEL, KINDS, layer_of, output, random_input, random_mlp
from tests.families import VOCABULARY, build
from tests.tiny import tiny_model

ROUTERS = ("inputs", "inputs-norm", "inputs-gate")
SELECTIONS = ("topk", "threshold")
COMPENSATIONS = ("none", "mean", "refit")
TOLERANCE = 2e-5

each_kind = pytest.mark.parametrize("kind", KINDS)
each_router = pytest.mark.parametrize("router", ROUTERS)
each_selection = pytest.mark.parametrize("selection", SELECTIONS)
each_compensation = pytest.mark.parametrize("compensation", COMPENSATIONS)


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


def spec_of(router="inputs-gate", active=0.5, **values):
    return ConversionSpec(method="inputs", router=router, active=active, **values)


def new_input(mlp):
    """(tokens, d_model): not the calibration text's."""
    return random_input(mlp.d_model, mlp.up.dtype, seed=9).flatten(0, 1)[::4]


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# The definition ----------------------------------------------------------------------------


class Counted:
    """One token through one MLP, number by number: what each matrix reads, and how many
    multiply-adds that takes. In float64.

    chosen(stage, scores): the indices that a stage takes.
    """

    def __init__(self, mlp, router, chosen):
        self.mlp, self.chosen, self.products = mlp, chosen, 0
        self.opens = router == "inputs-gate" and mlp.gate is not None
        self.norms = router != "inputs"

    def column(self, matrix, j):
        return matrix[:, j].double()

    def importance(self, j):
        """Length of what an entry of x meets."""
        if not self.norms:
            return 1.0
        first = self.mlp.up if self.mlp.gate is None else self.mlp.gate
        both = self.mlp.gate is not None and not self.opens
        columns = [self.column(m, j) for m in ((first, self.mlp.up) if both else (first,))]
        return float(torch.cat(columns).norm())

    def weigh(self, i):
        return float(self.column(self.mlp.down, i).norm()) if self.norms else 1.0

    def by_columns(self, matrix, bias, x, inputs):
        total = torch.zeros(len(matrix)).double() if bias is None else bias.double()
        for j in inputs:
            total = total + self.column(matrix, j) * x[j]
            self.products += len(matrix)
        return total

    def __call__(self, x):
        """h of one token, which of it down reads, and the output without what stands in."""
        mlp, x = self.mlp, x.double()
        scores = torch.tensor([abs(float(x[j])) * self.importance(j) for j in range(len(x))])
        inputs = self.chosen("inputs", scores)
        first = (mlp.up, mlp.up_bias) if mlp.gate is None else (mlp.gate, mlp.gate_bias)
        h = gated = mlp.activation(self.by_columns(*first, x, inputs))
        neurons = list(range(mlp.d_ff))
        if self.opens:
            scores = torch.tensor([abs(float(gated[i])) * self.weigh(i) for i in neurons])
            neurons, h = self.chosen("opened", scores), torch.zeros(mlp.d_ff).double()
            for i in neurons:
                up = mlp.up[i].double() @ x + (0 if mlp.up_bias is None else mlp.up_bias[i])
                h[i] = gated[i] * up
                self.products += len(x)
        elif mlp.gate is not None:
            h = gated * self.by_columns(mlp.up, mlp.up_bias, x, inputs)
        scores = torch.tensor([
            abs(float(h[i])) * self.weigh(i) if i in neurons else -1.0 for i in range(mlp.d_ff)
        ])  # fmt: skip
        read = self.chosen("read", scores)
        self.products += len(read) * len(x)
        return h, read


def takes(module, near):
    """Choices by the numbers, or by the thresholds, of a module. near: gathers the distances of
    scores from what decides."""

    def chosen(stage, scores):
        if module.thresholds is None:
            count = getattr(module.active, stage)
            ranked = scores.sort(descending=True)
            if count < len(scores):
                near.append(float(ranked.values[count - 1] - ranked.values[count]))
            return ranked.indices[:count].tolist()
        threshold = getattr(module.thresholds, stage)
        near.append(float((scores - threshold).abs().min()))
        # which is a score of the calibration text itself, rounded otherwise
        return [i for i, score in enumerate(scores.tolist()) if score > threshold + 2e-6]

    return chosen


def defined(module, mlp, router, x, idle=None):
    """The output for each token of x, which of them are sure not to hang on rounding, and the
    mean of multiply-adds. idle: what stands in for a neuron that is not read."""
    outputs, sure, products = [], [], 0
    for token in x:
        near = []
        count = Counted(mlp, router, takes(module, near))
        h, read = count(token)
        stays = torch.zeros(mlp.d_ff).double() if idle is None else idle.double().clone()
        stays[read] = h[read]
        y = mlp.down.double() @ stays
        outputs.append(y if mlp.down_bias is None else y + mlp.down_bias.double())
        sure.append(min(near, default=1.0) > 1e-5)
        products += count.products
    return torch.stack(outputs), torch.tensor(sure), products / len(x)


@each_kind
@each_router
@each_selection
@pytest.mark.parametrize("active", [0.3, 0.7])
def test_the_output_is_that_of_the_definition(kind, router, selection, active):
    layer = layer_of(random_mlp(kind))
    mlp, spec = layer.weights, spec_of(router, active, selection=selection)
    module = convert_mlp(mlp, spec, layer)
    assert isinstance(module, InputMLP)
    x = new_input(mlp)
    expected, sure, _ = defined(module, mlp, router, x)
    assert sure.sum() > 0.9 * len(x)
    close(module(x)[sure].double(), expected[sure])
    assert (expected - output(mlp, x)).norm() > 0.01 * expected.norm()


@each_kind
@each_router
@each_selection
def test_the_mean_stands_in_for_what_is_not_read(kind, router, selection):
    layer = layer_of(random_mlp(kind))
    mlp, x = layer.weights, layer.inputs()
    spec = spec_of(router, selection=selection, compensation="mean")
    module = convert_mlp(mlp, spec, layer)
    total, count = torch.zeros(mlp.d_ff).double(), torch.zeros(mlp.d_ff)
    for token in x:
        gated = mlp.activation(token @ mlp.up.T + (0 if mlp.up_bias is None else mlp.up_bias))
        h = gated
        if mlp.gate is not None:
            up = token @ mlp.up.T + (0 if mlp.up_bias is None else mlp.up_bias)
            bias = 0 if mlp.gate_bias is None else mlp.gate_bias
            h = mlp.activation(token @ mlp.gate.T + bias) * up
        _, read = Counted(mlp, router, takes(module, []))(token)
        idle = [i for i in range(mlp.d_ff) if i not in read]
        total[idle] += h[idle].double()
        count[idle] += 1
    idle = total / count.clamp(min=1)
    close(module.idle_mean.double(), idle, 1e-3)  # a token may hang on rounding
    new = new_input(mlp)
    expected, sure, _ = defined(module, mlp, router, new, module.idle_mean)
    close(module(new)[sure].double(), expected[sure])


@each_kind
@each_router
@pytest.mark.parametrize("active", [0.3, 0.5, 0.9])
def test_topk_reads_so_many_of_each_matrix(kind, router, active):
    mlp = random_mlp(kind)
    module = convert_mlp(mlp, spec_of(router, active))
    neurons = round(active * D_FF)
    assert module.active.inputs == round(active * D_MODEL)
    opens = router == "inputs-gate" and mlp.gate is not None
    assert module.active.opened == (neurons if opens else D_FF)
    assert module.neurons_per_token == module.active.read == neurons
    x = new_input(mlp)
    assert module.select(x).sum(1).tolist() == [neurons] * len(x)


def test_without_a_gate_opening_is_going_by_columns():
    for kind, selection in product(("plain", "plain with biases"), SELECTIONS):
        layer = layer_of(random_mlp(kind))
        x = new_input(layer.weights)
        one, other = (
            convert_mlp(layer.weights, spec_of(router, selection=selection), layer)
            for router in ("inputs-gate", "inputs-norm")
        )
        assert torch.equal(one(x), other(x))


# One token and many ------------------------------------------------------------------------


@each_kind
@each_router
@each_selection
@each_compensation
def test_one_token_gives_what_many_give(kind, router, selection, compensation):
    """One token reads only what it chose, in place without gradients; with them, rows are
    copied."""
    layer = layer_of(random_mlp(kind))
    spec = spec_of(router, selection=selection, compensation=compensation)
    module = convert_mlp(layer.weights, spec, layer)
    x = new_input(layer.weights)
    together = module(x)
    close(torch.cat([module(token) for token in x.split(1)]), together, 1e-5)
    with torch.enable_grad():
        trained = torch.cat([module(token) for token in x[:20].split(1)])
    assert trained.requires_grad
    close(trained.detach(), together[:20], 1e-5)
    close(module(x.view(2, 3, 5, -1)).flatten(0, 2), together, 1e-5)


@each_router
@each_selection
@each_compensation
def test_one_token_gives_what_many_give_in_half_precision(router, selection, compensation):
    layer = layer_of(random_mlp("gated with biases", dtype=torch.bfloat16))
    spec = spec_of(router, selection=selection, compensation=compensation)
    module = convert_mlp(layer.weights, spec, layer)
    x = new_input(layer.weights)
    together = module(x).float()
    singly = torch.cat([module(token) for token in x.split(1)])
    assert singly.dtype == torch.bfloat16
    error = (singly.float() - together).norm(dim=1) / together.norm()
    assert error.median() < 0.002
    assert error.norm() < 0.05  # a score next to the border may fall on either side of it


@each_kind
@each_router
@pytest.mark.parametrize("stage", ["inputs", "opened", "read"])
def test_nothing_may_be_chosen(kind, router, stage):
    layer = layer_of(random_mlp(kind))
    mlp = layer.weights
    module = convert_mlp(mlp, spec_of(router, selection="threshold"), layer)
    module.thresholds = module.thresholds._replace(**{stage: 1e9})
    x = new_input(mlp)
    expected, sure, _ = defined(module, mlp, router, x)
    close(module(x)[sure].double(), expected[sure])
    close(torch.cat([module(token) for token in x.split(1)]), module(x), 1e-5)
    if stage == "read":
        bias = torch.zeros(D_MODEL) if mlp.down_bias is None else mlp.down_bias
        assert torch.equal(module(x), bias.expand(len(x), -1))


@each_kind
@each_router
@each_selection
@each_compensation
def test_with_everything_active_it_is_the_dense_mlp(kind, router, selection, compensation):
    layer = layer_of(random_mlp(kind))
    spec = spec_of(router, 1.0, selection=selection, compensation=compensation)
    module = convert_mlp(layer.weights, spec, layer)
    x = new_input(layer.weights)
    expected = output(layer.weights, x)
    close(module(x), expected, 1e-5)
    close(torch.cat([module(token) for token in x.split(1)]), expected, 1e-5)
    assert module.idle_parameters == 0
    assert module.macs_per_token == module.matrices * D_FF * D_MODEL


# Budgets -----------------------------------------------------------------------------------


@each_kind
@each_router
@each_selection
def test_multiply_adds_are_those_that_are_made(kind, router, selection):
    """Counted one by one on the calibration text, where thresholds give their means."""
    layer = layer_of(random_mlp(kind))
    mlp = layer.weights
    module = convert_mlp(mlp, spec_of(router, 0.6, selection=selection), layer)
    products = defined(module, mlp, router, layer.inputs())[2]
    assert module.macs_per_token == pytest.approx(products, rel=0.002)
    whole = module.matrices * D_FF * D_MODEL
    assert module.idle_parameters == pytest.approx(whole - module.macs_per_token)
    assert whole == sum(m.numel() for m in (mlp.gate, mlp.up, mlp.down) if m is not None)


@each_kind
@each_router
@pytest.mark.parametrize("active", [0.05, 0.13, 0.2, 0.375, 0.5, 0.77, 0.99])
def test_thresholds_meet_the_budget(kind, router, active):
    layer = layer_of(random_mlp(kind, d_ff=160, d_model=64))
    module = convert_mlp(layer.weights, spec_of(router, active, selection="threshold"), layer)
    whole = module.matrices * 160 * 64
    assert module.macs_per_token / whole == pytest.approx(active, abs=0.005, rel=0.01)
    if module.opens:
        assert module.active.read <= module.active.opened <= 160
    chosen = module.select(layer.inputs())
    assert float(chosen.sum(1).float().mean()) == pytest.approx(module.neurons_per_token, rel=1e-3)
    assert len(set(chosen.sum(1).tolist())) > 1  # not the same number for every token


def test_a_threshold_says_what_is_really_read():
    """A ReLU is often exactly 0, and a threshold cannot make that count."""
    layer = layer_of(replace(random_mlp("plain"), activation=F.relu))
    module = convert_mlp(layer.weights, spec_of("inputs", 0.95, selection="threshold"), layer)
    positive = (layer.inputs() @ layer.weights.up.T > 0).sum(1).float().mean()
    read = module.select(layer.inputs()).sum(1).float().mean()
    assert module.neurons_per_token == pytest.approx(float(read), rel=1e-3)
    assert module.neurons_per_token < 1.1 * float(positive) < 0.8 * D_FF


@pytest.mark.parametrize("router", ROUTERS)
def test_sharing_out_loses_less_than_equal_shares(router):
    """What the path is for, on an MLP whose inputs differ in size far more than its neurons."""
    mlp = random_mlp("gated", d_ff=96, d_model=32)
    x = random_input(32) * torch.logspace(0, -3, 32)
    layer = LayerActivations(mlp, x)
    wanted = output(mlp, layer.inputs())
    shared, even = (
        convert_mlp(mlp, spec_of(router, 0.6, selection=selection), layer)
        for selection in ("threshold", "topk")
    )
    errors = [(module(layer.inputs()) - wanted).norm() for module in (shared, even)]
    assert errors[0] < 0.9 * errors[1]
    assert shared.active.inputs < 0.9 * even.active.inputs


@pytest.mark.parametrize("samples, length", [(256, 128), (7, 30), (40, 100), (3, 2000), (900, 1)])
def test_the_tokens_are_of_all_places_in_a_sample(samples, length):
    """Where samples begin, models do something of their own."""
    place = torch.arange(length).float().expand(samples, length)[..., None]
    layer = LayerActivations(random_mlp(d_model=1), place.contiguous())
    taken = layer.spread(256).flatten()
    assert min(samples * length, 128) <= len(taken) <= 256
    assert len(taken.unique()) >= min(length, len(taken)) / 2
    assert (taken == 0).sum() <= len(taken) / length + 1


def test_specs_share_one_path_for_each_router(monkeypatch):
    found = []
    path = inputs._path
    monkeypatch.setattr(inputs, "_path", lambda *args: found.append(1) or path(*args))
    layer = layer_of(random_mlp())
    for active in (0.3, 0.5, 0.9):
        convert_mlp(layer.weights, spec_of(active=active, selection="threshold"), layer)
        convert_mlp(layer.weights, spec_of(active=active), layer)  # needs none
    assert len(found) == 1
    convert_mlp(layer.weights, spec_of("inputs", selection="threshold"), layer)
    assert len(found) == 2


# Fits --------------------------------------------------------------------------------------


@each_kind
@each_router
@each_selection
def test_a_refit_is_least_squares_on_what_is_read(kind, router, selection):
    """Never worse than no fit on the calibration text, and nearly as good as can be."""
    layer = layer_of(random_mlp(kind))
    mlp, x = layer.weights, layer.inputs()
    wanted = output(mlp, x).double()
    none, mean, refit = (
        convert_mlp(mlp, spec_of(router, selection=selection, compensation=name), layer)
        for name in COMPENSATIONS
    )
    errors = [float((module(x).double() - wanted).square().sum()) for module in (none, mean, refit)]
    assert errors[2] < errors[1] and errors[2] < errors[0]
    h = mean.summed(x).double()
    data = torch.cat([h, torch.ones(len(h), 1).double()], dim=1)
    least = (data @ torch.linalg.lstsq(data, wanted).solution - wanted).square().sum()
    assert errors[2] >= float(least) * (1 - 1e-6)  # nothing linear is better
    assert errors[2] <= 1.3 * float(least) + 1e-3 * float(wanted.square().sum())  # for the ridge


def test_few_tokens_are_too_few_for_a_refit():
    spec = spec_of(compensation="refit")
    assert few_tokens(spec, 8 * D_FF, D_FF, D_MODEL) is None
    assert "refitting down" in few_tokens(spec, 8 * D_FF - 1, D_FF, D_MODEL)
    assert few_tokens(spec_of(selection="threshold"), 10, D_FF, D_MODEL) is None


# Whole models ------------------------------------------------------------------------------


def calibration():
    generator = torch.Generator().manual_seed(2)
    return Calibration(torch.randint(2, VOCABULARY, (12, 12), generator=generator))


@each_router
@each_selection
@pytest.mark.parametrize("family", ["llama-bias", "phi3", "gpt2"])
def test_layer_by_layer_sees_the_layers_before(family, router, selection):
    dense = build(family)
    spec = spec_of(router, 0.4, selection=selection, compensation="mean", progressive=True)
    converted = convert(dense, spec, calibration())
    modules = mlp_modules(converted)
    seen = []
    hook = modules[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    converted(calibration().samples)
    hook.remove()
    again = convert_mlp(read_mlps(dense)[1].weights, spec, LayerActivations(
        read_mlps(dense)[1].weights, seen[0]
    ))  # fmt: skip
    x = seen[0][0]
    close(modules[1](x, x * 0) if modules[1].adds_residual else modules[1](x), again(x), 1e-4)
    at_once = mlp_modules(convert(dense, replace(spec, progressive=False), calibration()))
    assert not torch.equal(at_once[1].idle_mean, modules[1].idle_mean)


def test_refitting_layer_by_layer_works():
    spec = spec_of(selection="threshold", compensation="refit", progressive=True)
    converted = convert(build("llama"), spec, calibration())
    assert torch.isfinite(converted(torch.arange(2, 20)[None]).logits).all()


def test_a_report_counts_what_is_read():
    model = tiny_model()
    dense = parameter_report(model)
    for router in ROUTERS:
        report = parameter_report(convert(model, spec_of(router, 0.5)))
        assert report.total == dense.total and report.nonzero == dense.nonzero
        assert report.mlp_macs_per_token == dense.mlp_macs_per_token / 2
        left = dense.mlp_macs_per_token - report.mlp_macs_per_token
        assert report.active_per_token == dense.active_per_token - left


# The spec ----------------------------------------------------------------------------------


def test_what_needs_a_calibration_text():
    assert not spec_of().needs_calibration
    for values in ({"selection": "threshold"}, {"compensation": "mean"}, {"progressive": True}):
        assert spec_of(**values).needs_calibration


def test_with_everything_active_nothing_else_counts():
    spec = spec_of(active=1.0, selection="threshold", compensation="refit")
    assert spec.canonical() == ConversionSpec(method="inputs", active=1.0)
    assert ConversionSpec(method="inputs").router == "inputs-gate"
    for spec in (spec_of(), spec_of("inputs-norm", selection="threshold")):
        assert ConversionSpec.from_query(spec.to_query()) == spec.canonical() == spec

"""Token clusters: the neurons that matter to each kind of token, against loops over tokens."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mlpmoe.core.activations import LayerActivations
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, convert_mlp, mlp_modules
from mlpmoe.core.errors import SpecError
from mlpmoe.core.routed import ClusterMLP
from mlpmoe.core.routed.clustering import kmeans
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.branched import BranchedMLP
from mlpmoe.measure.cost.parameters import parameter_report
from mlpmoe.measure.quality.routing import routing
from tests.core.layers import D_FF, D_MODEL, KINDS, gated_and_h, layer_of, output, random_mlp, ridge
from tests.families import VOCABULARY, build

ROUTERS = ("clusters", "regression", "oracle")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_router = pytest.mark.parametrize("router", ROUTERS)
each_compensation = pytest.mark.parametrize("compensation", ["none", "mean", "refit"])


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


def spec_of(router="clusters", active=0.5, experts=3, **values):
    values |= {"router": router, "active": active, "experts": experts}
    return ConversionSpec(method="tokenclusters", **values)


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def new_input(layer):
    return layer_of(layer.weights, seed=9).x.flatten(0, 1)


# What is made -------------------------------------------------------------------------------


def lloyd(points, centres):
    """k-means with lists, until nothing changes."""
    while True:
        groups = [[] for _ in centres]
        for point in points:
            far = [float((point - c).square().sum()) for c in centres]
            groups[far.index(min(far))].append(point)
        means = [torch.stack(group).mean(0) for group in groups]
        if all(torch.equal(a, b) for a, b in zip(means, centres, strict=True)):
            return groups, means
        centres = means


def experts_of(layer, spec):
    """Centres and neurons of each expert, by the definition: float64, token by token."""
    mlp, x = layer.weights, layer.inputs().double()
    unit = x / x.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(spec.seed)
    start = torch.randperm(len(x), generator=generator)[: spec.experts]
    _, centres = lloyd(list(unit), list(unit[start]))
    size, norms = round(spec.active * mlp.d_ff), mlp.down.double().norm(dim=0)
    nearest = torch.cdist(unit, torch.stack(centres)).argmin(1)
    experts = []
    for e in range(len(centres)):
        weight = torch.zeros(mlp.d_ff).double()
        for token in x[nearest == e]:
            weight += (gated_and_h(mlp, token)[1] * norms).square()
        experts.append(sorted((weight / (nearest == e).sum()).topk(size).indices.tolist()))
    return torch.stack(centres), experts


def neurons_of(module, mlp):
    """Of each expert, by their number in the dense MLP: found by their rows of up."""
    where = torch.cdist(module.up, mlp.up.detach()).argmin(1)
    return [where[rows].tolist() for rows in module.members]


@each_kind
@pytest.mark.parametrize("active", [0.2, 0.5, 0.9])
def test_experts_are_the_strongest_neurons_of_each_cluster(kind, active):
    layer = layer_of(random_mlp(kind))
    spec = spec_of(active=active, seed=4)
    module = convert_mlp(layer.weights, spec, layer)
    assert isinstance(module, ClusterMLP)
    centres, experts = experts_of(layer, spec)
    assert neurons_of(module, layer.weights) == experts
    close(module.router.weight.double(), 2 * centres)
    used = sorted({neuron for expert in experts for neuron in expert})
    assert module.d_ff == len(used) and module.neurons == D_FF
    assert torch.equal(module.up, layer.weights.up[used])  # stored once, and only what is used
    if active > 1 / 3:  # in part the same ones
        assert sum(map(len, experts)) > len(used)


def scores(layer, module, spec, x):
    mlp, x = layer.weights, x.double()
    groups, norms = neurons_of(module, mlp), mlp.down.double().norm(dim=0)

    def mass(x):
        h = gated_and_h(mlp, x)[1]
        return torch.stack([(h[:, g].abs() * norms[g]).sum(1) for g in groups], dim=1)

    if spec.router == "oracle":
        return mass(x)
    if spec.router == "clusters":
        unit = x / x.norm(dim=1, keepdim=True)
        return -torch.cdist(unit, experts_of(layer, spec)[0])
    seen = layer.inputs().double()
    data, wanted = seen - seen.mean(0), mass(seen)
    strength = (1e-3 * data.square().sum(0).mean()).sqrt() * torch.eye(D_MODEL).double()
    target = torch.cat([wanted - wanted.mean(0), torch.zeros(D_MODEL, len(groups)).double()])
    weight = torch.linalg.lstsq(torch.cat([data, strength]), target).solution
    return wanted.mean(0) + (x - seen.mean(0)) @ weight


@each_kind
@each_router
@each_compensation
@pytest.mark.parametrize("active", [0.3, 0.7])
def test_the_output_is_that_of_the_definition(kind, router, compensation, active):
    """All neurons computed; those outside a token's expert replaced by 0 or by their mean over the
    calibration tokens that do not run them; with refit, down is the ridge regression on that."""
    layer = layer_of(random_mlp(kind))
    mlp, spec = layer.weights, spec_of(router, active, compensation=compensation)
    module = convert_mlp(mlp, spec, layer)
    groups = neurons_of(module, mlp)

    def masked(x):
        chosen = torch.zeros(len(x), mlp.d_ff, dtype=torch.bool)
        for t, e in enumerate(scores(layer, module, spec, x).argmax(1).tolist()):
            chosen[t, groups[e]] = True
        return gated_and_h(mlp, x)[1], chosen

    seen, x = layer.inputs(), new_input(layer)
    ranked = scores(layer, module, spec, x).sort(dim=1).values
    sure = ranked[:, -1] - ranked[:, -2] > 1e-5
    assert sure.sum() > 0.9 * len(x)
    seen_h, ran = masked(seen)
    h, chosen = masked(x)
    idle = torch.zeros(mlp.d_ff)
    if compensation != "none":
        idle = (seen_h * ~ran).sum(0) / (~ran).sum(0).clamp(min=1)
    if compensation == "refit":
        used = sorted({neuron for group in groups for neuron in group})
        data = ((seen_h - idle) * ran).double()[:, used]
        wanted = output(mlp, seen).double()
        new = ((h - idle) * chosen).double()[:, used] - data.mean(0)
        expected = (new @ ridge(data, wanted, mlp.down[:, used]).T + wanted.mean(0)).float()
    else:
        expected = output(mlp, x, torch.where(chosen, h, idle))
    close(module(x)[sure], expected[sure], 2e-4 if compensation == "refit" else 2e-5)
    assert (expected - output(mlp, x)).norm() > 0.01 * expected.norm()
    if compensation == "mean":  # also what no expert runs: nothing is lost on average
        error = (module(seen) - output(mlp, seen)).mean(0)
        bare = convert_mlp(mlp, replace(spec, compensation="none"), layer)
        assert error.norm() < (bare(seen) - output(mlp, seen)).mean(0).norm()


def test_two_kinds_of_tokens_with_neurons_of_their_own():
    """Each kind moves half of the neurons: half of them for each token is all there is."""
    mlp = random_mlp("plain", d_ff=20, d_model=8)
    mlp.up[:10, 4:], mlp.up[10:, :4] = 0, 0
    kind = torch.randint(2, (12, 10, 1), generator=torch.Generator().manual_seed(2))
    values = torch.rand(12, 10, 4, generator=torch.Generator().manual_seed(3)) + 0.5
    x = torch.cat([values * (kind == 0), values * (kind == 1)], dim=2)
    layer = LayerActivations(mlp, x)
    module = convert_mlp(mlp, spec_of(experts=2), layer)
    assert sorted(neurons_of(module, mlp)) == [[*range(10)], [*range(10, 20)]]
    close(module(x), output(mlp, x))
    assert module.macs_per_token == 2 * 10 * 8 + 2 * 8
    three = convert_mlp(mlp, spec_of(experts=2, active=0.25), layer)
    assert (three(x) - output(mlp, x)).norm() > 0.05 * output(mlp, x).norm()


@pytest.mark.parametrize("groups", [1, 3, 40])
def test_kmeans_is_a_fixed_point(groups):
    points = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    assigned, centres = kmeans(points, groups, torch.Generator().manual_seed(0))
    assert sorted(set(assigned.tolist())) == list(range(len(centres)))
    assert torch.equal(torch.cdist(points, centres).argmin(1), assigned)
    for group, centre in enumerate(centres):
        close(points[assigned == group].mean(0), centre)


def test_more_clusters_than_there_can_be():
    points = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    assigned, centres = kmeans(points, 9, torch.Generator().manual_seed(0))
    assert len(centres) <= 4 and centres[assigned].equal(points)
    layer = layer_of(random_mlp())
    module = convert_mlp(layer.weights, spec_of(experts=10**6), layer)
    assert 1 < module.experts <= layer.tokens
    assert torch.isfinite(module(new_input(layer))).all()


def test_the_seed_decides_the_clusters():
    layer = layer_of(random_mlp())
    made = [convert_mlp(layer.weights, spec_of(seed=seed), layer) for seed in (1, 1, 2, 3)]
    assert torch.equal(made[0].members, made[1].members)
    assert len({str(module.router.weight) for module in made}) > 1


# One token and many -------------------------------------------------------------------------


@each_kind
@each_router
@each_compensation
def test_one_token_gives_what_many_give(kind, router, compensation, monkeypatch):
    layer = layer_of(random_mlp(kind))
    module = convert_mlp(layer.weights, spec_of(router, compensation=compensation), layer)
    x = new_input(layer)
    ways = []
    for work in (0, 10**12):  # grouped by expert; all neurons, masked
        monkeypatch.setattr("mlpmoe.core.routed.cluster_mlp.GROUPED_FROM", {4: work})
        ways.append(module.many(x))
    close(*ways)
    close(torch.cat([module(token) for token in x.split(1)]), ways[0])
    close(module(x.view(2, 3, 20, -1)).flatten(0, 2), ways[0])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    close(module(x[order]), ways[0][order])
    with torch.enable_grad():
        trained = torch.cat([module(token) for token in x[:9].split(1)])
    close(trained.detach(), ways[0][:9])


@each_kind
@each_compensation
def test_with_all_neurons_it_is_the_dense_mlp(kind, compensation):
    layer = layer_of(random_mlp(kind))
    module = convert_mlp(layer.weights, spec_of(active=1.0, compensation=compensation), layer)
    assert isinstance(module, BranchedMLP)
    close(module(new_input(layer)), output(layer.weights, new_input(layer)))


# Cost ---------------------------------------------------------------------------------------


@each_router
@pytest.mark.parametrize("active", [0.25, 0.6])
def test_what_a_token_costs(router, active):
    dense = build("llama")
    calibration = Calibration(torch.randint(2, VOCABULARY, (12, 12)))
    model = convert(dense, spec_of(router, active), calibration)
    report, before = parameter_report(model), parameter_report(dense)
    size, modules = round(active * 44), mlp_modules(model)
    routers = sum(0 if router == "oracle" else 3 * 32 for _ in modules)
    assert report.mlp_macs_per_token == 2 * size * 3 * 32 + routers
    stored = sum(len(module.up) for module in modules)
    assert max(size, stored // 2) <= 44
    extra = sum(p.numel() for module in modules for p in module.router.parameters())
    assert report.mlp_total == stored * 3 * 32 + extra
    assert report.total == before.total - (88 - stored) * 3 * 32 + extra
    assert report.active_per_token == report.total - (stored - 2 * size) * 3 * 32


def test_every_token_chooses_one_expert():
    calibration = Calibration(torch.randint(2, VOCABULARY, (12, 12)))
    model = convert(build("llama"), spec_of(experts=4), calibration)
    ids = torch.arange(2, 40)
    for layer, module in zip(routing(model, ids), mlp_modules(model), strict=True):
        assert layer.chosen.shape == (38, module.experts)
        assert torch.equal(layer.chosen, F.one_hot(layer.favourite, module.experts).bool())


# The spec -----------------------------------------------------------------------------------


def test_any_number_of_neurons_has_token_clusters():
    calibration = Calibration(torch.randint(2, VOCABULARY, (12, 12)))
    model = convert(build("llama", intermediate_size=47), spec_of(experts=8), calibration)
    assert [module.size for module in mlp_modules(model)] == [24, 24]


@pytest.mark.parametrize("values", [{"shared": 0.25}, {"selection": "threshold"}])
def test_what_it_has_no_use_for_is_refused(values):
    with pytest.raises(SpecError, match="does not belong to the method tokenclusters"):
        spec_of(**values)


def test_its_own_settings():
    spec = ConversionSpec(method="tokenclusters")
    assert (spec.experts, spec.router, spec.compensation) == (8, "clusters", "none")
    assert spec.needs_calibration and spec.shared is None
    assert ConversionSpec.from_query(spec.to_query()) == spec.canonical() == spec

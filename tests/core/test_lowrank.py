"""Low rank: the best directions of each matrix, against the singular value decomposition."""

from dataclasses import replace

import pytest
import torch

from mlpmoe.core.activations import LayerActivations
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, convert_mlp, mlp_modules
from mlpmoe.core.errors import SpecError
from mlpmoe.core.routed import LowRankMLP
from mlpmoe.core.routed.low_rank_mlp import Factors
from mlpmoe.core.routed.lowrank import computed_and_kept, directions
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.branched import BranchedMLP
from mlpmoe.measure.cost.parameters import parameter_report
from mlpmoe.measure.runs.families import Shares, expected_shares, family_of
from tests.core.layers import KINDS, gated_and_h, layer_of, output, random_mlp
from tests.families import VOCABULARY, build

M, N = 48, 20  # of gate and up; of down the other way round
ROUTERS = ("directions", "directions-text", "directions-token")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_router = pytest.mark.parametrize("router", ROUTERS)
each_shape = pytest.mark.parametrize("m, n", [(M, N), (N, M), (N, N)])
each_compensation = pytest.mark.parametrize("compensation", ["none", "mean", "refit"])


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


def spec_of(router="directions-text", active=0.6, **values):
    return ConversionSpec(method="lowrank", router=router, active=active, **values)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def a_layer(kind="gated", **values):
    return layer_of(random_mlp(kind, M, N, **values))


def new_input(layer):
    return layer_of(layer.weights, seed=9).x.flatten(0, 1)


def rank_of(active):
    return round(active * M * N / (M + N))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


# Directions ---------------------------------------------------------------------------------


@each_shape
def test_without_a_text_they_are_the_singular_ones(m, n):
    matrix = random(m, n)
    first, second = directions(matrix, None)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    assert first.shape == (len(s), n) and second.shape == (len(s), m)
    for r in (1, 7, len(s)):
        close(second[:r].T @ first[:r], (u[:, :r] * s[:r]) @ v[:r], 1e-9)
    close(first.norm(dim=1), s, 1e-9)
    close(second @ second.T, torch.eye(len(s)).double(), 1e-9)


@each_shape
def test_with_a_text_they_are_those_of_the_whitened_matrix(m, n):
    """SVD-LLM: truncate W L, where L Lᵀ is the moment, and take L out again."""
    matrix, x = random(m, n), random(300, n, seed=1) * torch.logspace(0, -2, n).double()
    moment = x.T @ x / len(x)
    whitening = torch.linalg.cholesky(moment)
    u, s, v = torch.linalg.svd(matrix @ whitening, full_matrices=False)
    first, second = directions(matrix, moment)
    for r in (1, 7, len(s)):
        expected = (u[:, :r] * s[:r]) @ v[:r] @ torch.linalg.inv(whitening)
        close(second[:r].T @ first[:r], expected, 1e-7)
        error = (x @ (matrix - second[:r].T @ first[:r]).T).square().sum() / len(x)
        assert float(error) == pytest.approx(float(s[r:].square().sum()), abs=1e-9)
    plain_first, plain_second = directions(matrix, None)
    plain = (x @ (matrix - plain_second[:7].T @ plain_first[:7]).T).square().sum() / len(x)
    assert float(plain) > 1.5 * float(s[7:].square().sum())


@pytest.mark.parametrize("moment", ["none", "of few tokens", "zero"])
@each_shape
def test_all_of_them_are_the_matrix(m, n, moment):
    """Also where the inputs fill a few dimensions only."""
    matrix, x = random(m, n), random(3, n)
    seen = {"none": None, "of few tokens": x.T @ x, "zero": torch.zeros(n, n).double()}[moment]
    first, second = directions(matrix, seen)
    close(second.T @ first, matrix, 1e-9)


@each_kind
def test_at_full_rank_it_is_the_dense_mlp(kind):
    layer = a_layer(kind)
    mlp, moment = layer.weights, layer.input_moment

    def whole(matrix, bias, moment):
        first, second = (t.float() for t in directions(matrix, moment))
        return Factors(first, second, len(first), None, bias)

    h = gated_and_h(mlp, layer.inputs().double())[1]
    module = LowRankMLP(
        None if mlp.gate is None else whole(mlp.gate, mlp.gate_bias, moment),
        whole(mlp.up, mlp.up_bias, moment),
        whole(mlp.down, mlp.down_bias, h.T @ h),
        mlp.activation, False,
    )  # fmt: skip
    x = new_input(layer)
    close(module(x), output(mlp, x))
    close(torch.cat([module(token) for token in x.split(1)]), output(mlp, x))
    matrices = 2 if mlp.gate is None else 3
    assert module.dense_macs == matrices * M * N  # which all directions in two factors exceed
    assert module.macs_per_token == matrices * N * (M + N) > module.dense_macs


@each_router
@each_compensation
def test_with_all_multiply_adds_matrices_stay_in_one_piece(router, compensation):
    layer = a_layer()
    module = convert_mlp(layer.weights, spec_of(router, 1.0, compensation=compensation), layer)
    assert isinstance(module, BranchedMLP)
    close(module(new_input(layer)), output(layer.weights, new_input(layer)))


# The output ---------------------------------------------------------------------------------


def truncated(matrix, x, rank, plain):
    """Of rank `rank`, from the definitions; best for the outputs of x (tokens, n)."""
    matrix = matrix.double()
    if plain:
        u, s, v = torch.linalg.svd(matrix)
        return (u[:, :rank] * s[:rank]) @ v[:rank]
    axes = torch.linalg.svd(x.double() @ matrix.T, full_matrices=False).Vh[:rank]
    return axes.T @ axes @ matrix


def run(mlp, matrices, x):
    """The MLP of these matrices; float64."""
    x = x.double()
    biases = [0 if b is None else b.double() for b in (mlp.gate_bias, mlp.up_bias, mlp.down_bias)]
    h = x @ matrices[1].T + biases[1]
    gated = mlp.activation(h if mlp.gate is None else x @ matrices[0].T + biases[0])
    return (gated if mlp.gate is None else gated * h) @ matrices[2].T + biases[2]


@each_kind
@pytest.mark.parametrize("router", ROUTERS[:2])
@pytest.mark.parametrize("active", [0.3, 0.8])
def test_the_output_is_that_of_the_definition(kind, router, active):
    layer = a_layer(kind)
    mlp, x, rank = layer.weights, layer.inputs(), rank_of(active)
    module = convert_mlp(mlp, spec_of(router, active), layer)
    assert all(f.kept == f.directions == rank for f in module.projections.values())
    plain, h = router == "directions", gated_and_h(mlp, x)[1]
    pairs = ((mlp.gate, x), (mlp.up, x), (mlp.down, h))
    matrices = [None if w is None else truncated(w, seen, rank, plain) for w, seen in pairs]
    new = new_input(layer)
    expected = run(mlp, matrices, new)
    close(module(new).double(), expected, 1e-4)
    assert (expected - output(mlp, new)).norm() > 0.05 * expected.norm()


@each_kind
@each_compensation
def test_each_token_uses_its_own_directions(kind, compensation):
    """One matrix after the other, token by token: the largest |z| of those that are computed."""
    layer = a_layer(kind)
    module = convert_mlp(
        layer.weights, spec_of("directions-token", 0.8, compensation=compensation), layer
    )
    x = new_input(layer)
    if compensation != "none":  # z is of what differs from the mean
        z = module.up.sizes(layer.inputs())
        assert module.up.offset is None or z.mean(0).abs().max() < 1e-4

    def through(factors, x):
        outputs, sure = [], []
        for token in x:
            z = factors.first.double() @ token
            z = z if factors.offset is None else z + factors.offset.double()
            ranked = sorted(range(len(z)), key=lambda i: -abs(float(z[i])))
            y = sum(z[i] * factors.second[i].double() for i in ranked[: factors.kept])
            outputs.append(y if factors.bias is None else y + factors.bias.double())
            border = z.abs()[ranked][factors.kept - 1 : factors.kept + 1]
            sure.append(len(border) < 2 or float(border[0] - border[1]) > 1e-5)
        return torch.stack(outputs), torch.tensor(sure)

    h, sure = through(module.up, x.double())
    if module.gate is None:
        h = module.act_fn(h)
    else:
        gated, also = through(module.gate, x.double())
        h, sure = module.act_fn(gated) * h, sure & also
    expected, also = through(module.down, h)
    sure &= also
    assert sure.sum() > 0.8 * len(x)
    close(module(x)[sure].double(), expected[sure], 1e-4)
    chosen = module.up.choose(module.up.sizes(x))
    assert chosen.sum(1).tolist() == [module.up.kept] * len(x)
    if module.up.kept < module.up.directions:
        assert len(chosen.unique(dim=0)) > 1


@each_router
@each_compensation
def test_one_token_gives_what_many_give(router, compensation):
    for kind in KINDS:
        layer = a_layer(kind)
        module = convert_mlp(layer.weights, spec_of(router, compensation=compensation), layer)
        x = new_input(layer)
        together = module(x)
        close(torch.cat([module(token) for token in x.split(1)]), together, 2e-5)
        close(module(x.view(2, 3, 20, -1)).flatten(0, 2), together, 2e-5)
        with torch.enable_grad():
            trained = torch.cat([module(token) for token in x[:9].split(1)])
        assert trained.requires_grad
        close(trained.detach(), together[:9], 2e-5)


def test_inputs_of_few_dimensions_lose_nothing():
    """As many directions as the inputs have dimensions: gate and up are exact on them, and the
    plain SVD knows nothing of it."""
    mlp = random_mlp("gated", M, N)
    x = random(12, 10, 5) @ random(5, N, seed=3)
    layer = LayerActivations(mlp, x.float())
    assert rank_of(0.6) > 5
    errors = []
    for router in ROUTERS[:2]:
        module = convert_mlp(mlp, spec_of(router), layer)
        wanted = layer.inputs() @ mlp.up.T
        errors.append(float((module.up(layer.inputs()) - wanted).norm() / wanted.norm()))
    assert errors[1] < 1e-5 < 0.1 < errors[0]


# What is made up for ------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("router", ROUTERS[:2])
@pytest.mark.parametrize("compensation", ["mean", "refit"])
def test_the_mean_output_is_kept(kind, router, compensation):
    layer = a_layer(kind)
    mlp, x = layer.weights, layer.inputs()
    module = convert_mlp(mlp, spec_of(router, compensation=compensation), layer)
    close(module(x).mean(0), output(mlp, x).mean(0), 1e-4)
    bias = 0 if mlp.up_bias is None else mlp.up_bias
    close(module.up(x).mean(0), (x @ mlp.up.T + bias).mean(0), 1e-4)
    bare = convert_mlp(mlp, spec_of(router), layer)
    assert (bare(x) - output(mlp, x)).mean(0).norm() > 1e-2


@each_kind
def test_a_refit_is_the_best_map_of_its_rank(kind):
    """Reduced-rank regression of the dense output on what gate and up give, from its definition:
    least squares, projected on the principal axes of what it predicts."""
    layer = a_layer(kind)
    mlp, x = layer.weights, layer.inputs()
    mean, fitted = (
        convert_mlp(mlp, spec_of(compensation=name), layer) for name in ("mean", "refit")
    )
    h, y = fitted.hidden(x).double(), output(mlp, x).double()
    h, wanted = h - h.mean(0), y - y.mean(0)
    least = h @ torch.linalg.lstsq(h, wanted).solution
    axes = torch.linalg.svd(least, full_matrices=False).Vh[: fitted.down.kept]
    best = float((least @ axes.T @ axes - wanted).square().sum())
    errors = [float((m(x) - y).square().sum()) for m in (mean, fitted)]
    assert best * (1 - 1e-6) <= errors[1] < errors[0]
    assert errors[1] <= 1.3 * best + 1e-3 * float(wanted.square().sum())  # for the ridge


# Budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [0.2, 0.5, 0.75, 0.95])
@each_shape
def test_computed_and_used_directions_meet_the_budget(m, n, active):
    q = min(m, n)
    z = random(200, q) * torch.logspace(0, -1, q).double()
    computed, kept = computed_and_kept(z, m, n, active)
    least = max(1, round(active * m * n / (m + n)))
    assert 1 <= kept <= computed <= q and computed >= least
    assert computed * n + kept * m <= active * m * n + (m + n) / 2

    def lost(computed, kept):
        total = 0.0
        for token in z:
            held = sorted((float(v) ** 2 for v in token[:computed]), reverse=True)[:kept]
            total += float(token.square().sum()) - sum(held)
        return total

    found = lost(computed, kept)
    assert found <= lost(least, least) + 1e-9  # never worse than the same for all tokens
    for other in range(least + 1, q + 1):
        left = int((active * m * n - other * n) / m)
        if left >= 1:  # numbers are tried in steps
            assert found <= 1.05 * lost(other, min(other, left)) + 1e-9


def test_tokens_that_agree_compute_no_more_than_they_use():
    z = random(100, N).sign() * torch.logspace(0, -2, N).double()
    computed, kept = computed_and_kept(z, M, N, 0.5)
    assert computed == kept == rank_of(0.5)


def test_tokens_that_differ_compute_more():
    z = torch.eye(N).double().repeat(10, 1)  # each has a direction of its own
    computed, kept = computed_and_kept(z, M, N, 0.6)
    assert computed > rank_of(0.6) > kept


@pytest.mark.parametrize("active", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_model_costs(family, router, active):
    dense = build(family)
    calibration = Calibration(torch.randint(2, VOCABULARY, (12, 12)))
    model = convert(dense, spec_of(router, active), calibration)
    report, before = parameter_report(model), parameter_report(dense)
    share = report.mlp_macs_per_token / before.mlp_macs_per_token
    assert share == pytest.approx(active, abs=0.03)
    products = stored = idle = 0
    for module in mlp_modules(model):
        for f in module.projections.values():
            (directions, n), m = f.first.shape, f.second.shape[1]
            products += directions * n + f.kept * m
            idle += (directions - f.kept) * m
            stored += directions * (m + n) + (0 if f.bias is None else m)
    assert report.mlp_macs_per_token == products
    assert report.mlp_total == report.mlp_nonzero == stored
    assert report.active_per_token == report.total - idle
    assert report.total - stored == before.total - before.mlp_total
    if router != "directions-token":
        biases = sum(p.numel() for m in mlp_modules(model) for n, p in m.named_parameters()
                     if n.endswith("bias"))  # fmt: skip
        assert stored == products + biases
    expected = expected_shares(spec_of(router, active))
    assert expected == Shares(1.0 if router == "directions-token" else active, active)
    assert family_of(spec_of(router, active)) == "directions"


# Whole models, and the spec -----------------------------------------------------------------


@each_router
@pytest.mark.parametrize("family", ["llama-bias", "phi3", "gpt2", "bloom"])
def test_families_convert(family, router):
    calibration = Calibration(torch.randint(2, VOCABULARY, (12, 12)))
    for compensation in ("none", "refit"):
        spec = spec_of(router, 0.7, compensation=compensation, progressive=True)
        model = convert(build(family), spec, calibration)
        assert torch.isfinite(model(torch.arange(2, 20)[None]).logits).all()


def test_half_precision_stays_near():
    errors = []
    for router in ROUTERS:
        layer, exact = a_layer(dtype=torch.bfloat16), a_layer()
        made, same = (convert_mlp(one.weights, spec_of(router), one) for one in (layer, exact))
        x = new_input(layer)
        assert made(x).dtype == torch.bfloat16 and made.up.first.dtype == torch.bfloat16
        errors.append(float((made(x).float() - same(x.float())).norm() / same(x.float()).norm()))
    assert max(errors[:2]) < 0.02 and errors[2] < 0.1  # where numbers are close, others are chosen


def test_what_needs_a_calibration_text():
    assert not spec_of("directions").needs_calibration
    for spec in (
        spec_of(),
        spec_of("directions-token"),
        spec_of("directions", compensation="mean"),
    ):
        assert spec.needs_calibration
    layer = a_layer()
    alone = convert_mlp(layer.weights, spec_of("directions"))
    beside = convert_mlp(layer.weights, spec_of("directions"), layer)
    assert torch.equal(alone.down.first, beside.down.first)


@pytest.mark.parametrize("values", [{"experts": 8}, {"shared": 0.25}, {"selection": "threshold"}])
def test_what_it_has_no_use_for_is_refused(values):
    with pytest.raises(SpecError, match="does not belong to the method lowrank"):
        spec_of(**values)


def test_specs_go_around():
    assert ConversionSpec(method="lowrank").router == "directions-text"
    for router in ROUTERS:
        spec = spec_of(router)
        assert ConversionSpec.from_query(spec.to_query()) == spec.canonical() == spec
    whole = spec_of(active=1.0, compensation="refit")
    assert whole.canonical() == replace(whole, compensation="none")

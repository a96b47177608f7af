"""The static pipeline on one MLP, stage by stage and in all combinations."""

import random
from dataclasses import replace
from functools import cache
from itertools import combinations
from math import sqrt

import pytest
import torch

from mlpmoe.core.activations import LayerActivations
from mlpmoe.core.errors import SpecError, UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.branched import BranchedMLP, LoopedMLP
from mlpmoe.core.static.compensation import COMPENSATIONS
from mlpmoe.core.static.order import ORDERS, order_of
from mlpmoe.core.static.pipeline import build_static
from mlpmoe.core.static.schedule import SCHEDULES
from mlpmoe.core.static.scores import SCORES
from tests.core.layers import D_FF, D_MODEL, KINDS, gated_and_h, layer_of, output, random_mlp, ridge

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


@cache
def layer(kind="gated", dtype=torch.float32):
    return layer_of(random_mlp(kind, dtype=dtype))


def built(layer, **fields):
    return build_static(layer.weights, ConversionSpec(**fields), layer)


def flat(layer):
    """(tokens, d_model) float64: the calibration tokens."""
    return layer.x.flatten(0, 1).double()


def wanted(layer):
    return output(layer.weights, flat(layer))


def said(module, layer):
    """(tokens, d_model) float64: what the module gives for the calibration tokens."""
    return module(layer.x).flatten(0, 1).double()


def h_of(module, layer):
    """(tokens, n) float64: the activations of the module's own neurons."""
    return gated_and_h(module.folded(), flat(layer))[1]


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


# Order and split ---------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ORDERS)
def test_with_nothing_dropped_the_function_stays(kind, dtype, order):
    found = layer(kind, dtype)
    for compensation in COMPENSATIONS:
        for branches in (1, 5, D_FF):
            module = built(found, branches=branches, order=order, compensation=compensation)
            assert relative(said(module, found), wanted(found)) < 1e-6
            assert module.up_proj.weight.dtype == dtype


@each_kind
@pytest.mark.parametrize("order", ORDERS)
def test_the_first_branches_in_the_order_stay(kind, order):
    w = layer(kind).weights
    first = order_of(order, w, layer(kind), 3)[:15]  # 5, 5 and 5 of 24 in five branches
    module = built(layer(kind), branches=5, keep=3, order=order, seed=3, compensation="none")
    assert module.sizes == (5, 5, 5)
    assert torch.equal(module.up_proj.weight, w.up[first])
    assert torch.equal(module.down_proj.weight, w.down[:, first])
    if w.gate is not None:
        assert torch.equal(module.gate_proj.weight, w.gate[first])
    if w.up_bias is not None:
        assert torch.equal(module.up_proj.bias, w.up_bias[first])
        assert module.down_proj.bias is w.down_bias


# All stages together -----------------------------------------------------------------------

VALUES = {
    "kind": KINDS,
    "order": tuple(ORDERS),
    "branches": (6, 5),
    "keep": (None, 3, 1),
    "fade": (0.0, 0.7, 2.0),
    "fade_schedule": tuple(SCHEDULES),
    "fade_projections": ("gate-up", "gate", "up", "down", "gate-up-down", "up-down"),
    "fade_score": tuple(SCORES),
    "fade_unit": ("weight", "neuron", "2:4", "1:5"),
    "compensation": tuple(COMPENSATIONS),
}


def shares_of(case):
    """What fade asks of each kept branch, recomputed."""
    branches = case["branches"]
    ramp = [i / branches for i in range(branches)]
    powers = [i * i for i in range(branches)]
    shape = {
        "linear": ramp,
        "uniform": [(branches - 1) / 2 / branches or 0.5] * branches,
        "reverse": ramp[::-1],
        "power": [sum(ramp) * p / sum(powers) for p in powers],
    }[case["fade_schedule"]]
    return [min(1.0, case["fade"] * share) for share in shape][: case["keep"]]


def dense_sizes(case):
    parts = torch.arange(D_FF).tensor_split(case["branches"])
    return [len(part) for part in parts][: case["keep"]]


def expected_sizes(case):
    if case["fade_unit"] != "neuron":
        return dense_sizes(case)
    return [n - round(s * n) for n, s in zip(dense_sizes(case), shares_of(case), strict=True)]


def matrices_of(case):
    """The names of the matrices that get zeros."""
    if case["fade_unit"] == "neuron" or (
        case["fade_unit"] == "weight" and not any(shares_of(case))
    ):
        return []
    plain = case["kind"].startswith("plain")
    return [n for n in case["fade_projections"].split("-") if not (plain and n == "gate")]


def refusal_of(case):
    """Words of the SpecError that this case deserves; None: it can be built."""
    unit = case["fade_unit"]
    if unit == "neuron" and case["fade_projections"] != "gate-up":
        return "leave fade_projections alone"
    if ":" in unit and (case["fade"] or case["fade_schedule"] != "linear"):
        return "fixes the share of zeros"
    if unit == "neuron" and sum(expected_sizes(case)) == 0:
        return "leaves no neuron"
    if not matrices_of(case):
        asked = ":" in unit or (unit == "weight" and any(shares_of(case)))
        return "have no gate" if asked else None
    if ":" in unit:
        m = int(unit.partition(":")[2])
        inputs = {"gate": D_MODEL, "up": D_MODEL, "down": sum(dense_sizes(case))}
        if any(inputs[name] % m for name in matrices_of(case)):
            return f"need a multiple of {m} inputs"
    return None


@cache
def cases():
    """A fixed sample of the product of all values; more of those that can be built, and few that
    are refused for the same reason as others."""
    draw, found, refused = random.Random(0), [], 0
    while len(found) < 3000:
        case = {name: draw.choice(values) for name, values in VALUES.items()}
        if ":" in case["fade_unit"] and draw.random() < 0.8:
            case |= {"fade": 0.0, "fade_schedule": "linear"}
        if case["fade_unit"] == "neuron" and draw.random() < 0.8:
            case["fade_projections"] = "gate-up"
        if case["fade_unit"] == "1:5" and draw.random() < 0.8:
            case |= {"fade_projections": "down", "branches": 5}
        if refusal_of(case):
            refused += 1
            if refused > 400:
                continue
        found.append(case)
    return found


def test_the_sample_covers_every_pair_of_values():
    """Each pair of values is built together, unless no pair like it can be."""
    met = set()
    for case in cases():
        if not refusal_of(case):
            met |= set(combinations(case.items(), 2))
    for (one, some), (other, more) in combinations(VALUES.items(), 2):
        for pair in [((one, a), (other, b)) for a in some for b in more]:
            chosen = dict(pair)
            unit, matrices = chosen.get("fade_unit", ""), chosen.get("fade_projections", "gate-up")
            impossible = (
                (unit == "neuron" and matrices != "gate-up")
                or (unit == "1:5" and matrices != "down" and "fade_projections" in chosen)
                or (":" in unit and chosen.get("fade"))
                or (":" in unit and chosen.get("fade_schedule", "linear") != "linear")
                or (
                    unit == "1:5" and (chosen.get("branches") == 6 or chosen.get("keep", 1) is None)
                )
            )
            assert (pair in met) == (not impossible), pair


def zeros(weight):
    return int((weight == 0).sum())


def check_zeros(case, module):
    sizes, named = dense_sizes(case), matrices_of(case)
    n, _, m = case["fade_unit"].partition(":")
    for name, linear in module.projections.items():
        if name not in named:
            assert zeros(linear.weight) == 0
        elif m:
            for group in linear.weight.split(int(m), dim=1):
                assert ((group == 0).sum(1) == int(n)).all()
        else:
            shares = shares_of(case)
            parts = linear.weight.split(sizes, dim=int(name == "down"))
            if len(set(shares)) == 1 and case["fade_score"] != "magnitude":
                parts, shares = [linear.weight], shares[:1]  # branches have no say
            for part, share in zip(parts, shares, strict=True):
                by_output = case["fade_score"] in ("relative", "wanda")
                together = part.shape[1] if by_output else part.numel()
                assert zeros(part) / part.numel() == pytest.approx(share, abs=1 / together)


def check_alphas(case, module):
    keep = case["keep"] or case["branches"]
    factors = {"sqrt": sqrt(case["branches"] / keep), "ratio": case["branches"] / keep}
    if case["compensation"] != "alpha":
        expected = factors.get(case["compensation"], 1.0)
        assert module.alpha.tolist() == pytest.approx([expected] * keep)
    assert len(module.alpha) == keep


@each_kind
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_any_stages_together_are_built_or_refused_in_words(kind, compensation):
    for case in cases():
        if (case["kind"], case["compensation"]) != (kind, compensation):
            continue
        fields = {name: value for name, value in case.items() if name != "kind"}
        if words := refusal_of(case):
            with pytest.raises(SpecError, match=words):
                built(layer(kind), **fields)
            continue
        module = built(layer(kind), **fields)
        assert module.sizes == tuple(expected_sizes(case))
        assert module.branches == case["branches"]
        n = sum(module.sizes)
        shapes = {name: tuple(linear.weight.shape) for name, linear in module.projections.items()}
        assert shapes.pop("down") == (D_MODEL, n)
        assert set(shapes.values()) == {(n, D_MODEL)}
        check_zeros(case, module)
        check_alphas(case, module)
        magnitude = case["fade_score"] == "magnitude" and case["fade_unit"] == "weight"
        assert set(module.fade_thresholds) == set(matrices_of(case) if magnitude else [])
        y = module(layer(kind).x)
        assert y.shape == layer(kind).x.shape
        assert torch.isfinite(y).all()
        torch.testing.assert_close(LoopedMLP(module)(layer(kind).x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_half_precision_stays_half(dtype, score, compensation):
    found = layer("gated with biases", dtype)
    for unit in ("weight", "neuron", "2:4"):
        fields = {} if unit == "2:4" else {"fade": 0.5}
        if unit != "neuron":
            fields["fade_projections"] = "gate-up-down"
        module = built(
            found, keep=12, branches=16, order="fluctuation", fade_unit=unit, fade_score=score,
            compensation=compensation, **fields,
        )  # fmt: skip
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert torch.isfinite(module(found.x)).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("fields", [{"fade": 0.7}, {"fade_unit": "2:4"}], ids=str)
def test_memory_layout_does_not_matter(score, fields):
    """GPT-2 stores its weights transposed."""
    found = layer("plain with biases")
    w = found.weights
    stored = replace(w, up=w.up.T.contiguous().T, down=w.down.T.contiguous().T)
    other = LayerActivations(stored, found.x)
    for order in ("contiguous", "norm"):
        same, module = (
            built(
                x, branches=6, keep=4, order=order, fade_projections="up-down", fade_score=score,
                compensation="refit", **fields,
            )
            for x in (found, other)
        )  # fmt: skip
        for expected, linear in zip(
            same.projections.values(), module.projections.values(), strict=True
        ):
            torch.testing.assert_close(linear.weight, expected.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("projections", ["gate-up", "down"])
def test_a_dead_layer_stays_finite(score, projections):
    """Its neurons never fire, so there is nothing to fit to."""
    w = random_mlp()
    dead = layer_of(replace(w, up=torch.zeros_like(w.up)))
    for fields in (
        {"fade": 0.8, "fade_projections": projections},
        {"fade_unit": "2:4", "fade_projections": projections},
        {"fade": 0.8, "fade_unit": "neuron"},
    ):
        for compensation in COMPENSATIONS:
            module = built(
                dead, branches=6, keep=4, fade_score=score, compensation=compensation, **fields
            )
            assert all(torch.isfinite(p).all() for p in module.parameters())
            assert not module(dead.x).any()


# Compensation ------------------------------------------------------------------------------

LOSSES = {
    "keep": {"keep": 4},
    "keep by score": {"keep": 4, "order": "fluctuation"},
    "fade": {"fade": 1.0},
    "fade and keep": {"fade": 1.0, "keep": 4, "order": "norm", "fade_schedule": "reverse"},
    "fade up": {"fade": 0.8, "fade_projections": "up", "fade_score": "wanda"},
    "2:4": {"fade_unit": "2:4", "fade_score": "sparsegpt", "keep": 5},
    "neurons": {"fade": 0.8, "fade_unit": "neuron", "fade_schedule": "uniform"},
    "empty branches": {"fade": 2.0, "fade_unit": "neuron", "order": "activation"},
}
LOSSES_OF_DOWN = {
    "fade down": {"fade": 1.0, "fade_projections": "down"},
    "fade all by Wanda": {"fade": 0.8, "fade_projections": "gate-up-down", "fade_score": "wanda"},
    "down by SparseGPT": {"fade": 0.8, "fade_projections": "down", "fade_score": "sparsegpt"},
    "2:4 of down": {"fade_unit": "2:4", "fade_projections": "down", "keep": 4},
}
each_loss = pytest.mark.parametrize("name", LOSSES)
every_loss = pytest.mark.parametrize("name", LOSSES | LOSSES_OF_DOWN)


def fields_of_loss(name):
    return {"branches": 6} | (LOSSES | LOSSES_OF_DOWN)[name]


@every_loss
@each_kind
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_fitted_alphas_are_least_squares_on_the_branches_outputs(name, kind):
    found = layer(kind, torch.float64)
    fields = fields_of_loss(name)
    looped = LoopedMLP(built(found, **fields, compensation="none"))
    assert (looped.alpha == 1).all()
    outputs = [looped.branch(b, flat(found)).flatten() for b in range(len(looped.alpha))]
    bias = found.weights.down_bias
    target = wanted(found) if bias is None else wanted(found) - bias
    # gelsd, because outputs of empty branches leave the rank deficient
    data, target = torch.stack(outputs, 1), target.flatten()[:, None]
    solution = torch.linalg.lstsq(data, target, driver="gelsd").solution
    alpha = built(found, **fields, compensation="alpha").alpha
    assert alpha.dtype == torch.float64
    torch.testing.assert_close(alpha.detach(), solution[:, 0], rtol=1e-4, atol=1e-4)


@every_loss
@each_kind
@pytest.mark.parametrize("compensation", ["mean", "refit"])
def test_with_a_fitted_bias_the_mean_output_is_the_dense_one(name, kind, compensation):
    found = layer(kind, torch.float64)
    module = built(found, **fields_of_loss(name), compensation=compensation)
    mean, expected = said(module, found).mean(0), wanted(found).mean(0)
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)


@every_loss
@each_kind
def test_mean_changes_nothing_but_the_bias(name, kind):
    found = layer(kind)
    fields = fields_of_loss(name)
    none, mean = (built(found, **fields, compensation=c) for c in ("none", "mean"))
    state, other = none.state_dict(), mean.state_dict()
    assert set(other) - set(state) <= {"down_proj.bias"}
    for key in set(state) - {"down_proj.bias"}:
        assert torch.equal(state[key], other[key])


def ridge_of(found, module):
    """(d_model, n): down of the module, fitted to the dense output."""
    return ridge(h_of(module, found), wanted(found), module.down_proj.weight)


@each_loss
@each_kind
def test_refit_is_ridge_regression(name, kind):
    found = layer(kind, torch.float64)
    fields = fields_of_loss(name)
    before = built(found, **fields, compensation="none")
    after = built(found, **fields, compensation="refit")
    torch.testing.assert_close(
        after.down_proj.weight.detach(), ridge_of(found, before), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(after.up_proj.weight, before.up_proj.weight)
    assert said(after, found).mean(0).allclose(wanted(found).mean(0), atol=1e-5)


@each_kind
@pytest.mark.parametrize("score", ["magnitude", "wanda"])
@pytest.mark.parametrize("projections", ["down", "gate-up-down"])
@pytest.mark.parametrize("fields", [{"fade": 0.9}, {"fade_unit": "2:4"}], ids=str)
def test_down_is_refitted_before_it_is_faded(kind, score, projections, fields):
    """The zeros stay, chosen by the sizes of the fitted weights, which the survivors keep."""
    found = layer(kind, torch.float64)
    fields = fields | {"branches": 6, "keep": 4, "order": "activation", "fade_score": score}
    others = projections.removesuffix("down").strip("-")
    if others:
        before = built(found, **fields, fade_projections=others, compensation="none")
    else:
        keep = {name: fields[name] for name in ("branches", "keep", "order")}
        before = built(found, **keep, compensation="none")
    fitted = ridge_of(found, before)
    module = built(found, **fields, fade_projections=projections, compensation="refit")
    down = module.down_proj.weight.detach()
    torch.testing.assert_close(down, fitted * (down != 0), rtol=1e-4, atol=1e-4)
    size = fitted.abs()
    if score == "wanda":
        size = size * h_of(before, found).square().mean(0).sqrt()
    shares = [0.5] * 4 if "fade_unit" in fields else [0.9 * i / 6 for i in range(4)]
    for b, (part, sizes) in enumerate(zip(down.split(4, 1), size.split(4, 1), strict=True)):
        assert zeros(part) == pytest.approx(shares[b] * part.numel(), abs=D_MODEL / 2 + 1)
        if score == "magnitude" and "fade" in fields and b:  # one threshold for the branch
            assert sizes[part == 0].max() <= sizes[part != 0].min()
        for row, row_sizes in zip(part, sizes, strict=True):
            if (row == 0).any() and (row != 0).any():
                assert row_sizes[row == 0].max() <= row_sizes[row != 0].min() * (1 + 1e-5)


@each_kind
def test_sparsegpt_of_a_refitted_down_costs_less_than_the_same_zeros_by_magnitude(kind):
    found = layer(kind, torch.float64)

    def loss(score):
        module = built(
            found, branches=6, keep=5, fade=0.9, fade_projections="down", fade_score=score,
            compensation="refit",
        )  # fmt: skip
        return float((said(module, found) - wanted(found)).square().sum())

    assert loss("sparsegpt") < loss("magnitude")


@each_kind
def test_another_target_is_what_is_fitted_to(kind):
    found = layer(kind, torch.float64)
    target = torch.randn(found.x.shape, generator=torch.Generator().manual_seed(8)).double()
    target = target + 3 * found.x.roll(1, dims=2)
    aimed = LayerActivations(found.weights, found.x, target)
    y = target.flatten(0, 1)

    def error(compensation):
        module = built(aimed, branches=6, keep=4, compensation=compensation)
        return float((said(module, found) - y).square().mean())

    assert error("refit") <= error("mean") <= error("none")
    assert error("alpha") <= error("none")
    module = built(aimed, branches=6, keep=4, compensation="refit")
    torch.testing.assert_close(said(module, found).mean(0), y.mean(0), rtol=1e-5, atol=1e-5)


# Neurons -----------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("order", ["contiguous", "random", "activation"])
@pytest.mark.parametrize(
    "schedule, fade, keep", [("linear", 0.8, None), ("reverse", 1.3, 3), ("power", 1.2, 4)]
)
def test_neurons_that_rank_last_in_their_branch_go(kind, score, order, schedule, fade, keep):
    found = layer(kind)
    w = found.weights
    module = built(
        found, branches=5, keep=keep, order=order, seed=2, fade=fade, fade_schedule=schedule,
        fade_score=score, fade_unit="neuron", compensation="none",
    )  # fmt: skip
    case = {"branches": 5, "keep": keep, "fade": fade, "fade_schedule": schedule}
    assert module.sizes == tuple(expected_sizes(case | {"fade_unit": "neuron"}))
    present = order_of(order, w, found, 2).tolist()
    rank = order_of(SCORES[score].neurons, w, found, 0).tolist()
    left = []
    for size, stay in zip(dense_sizes(case), module.sizes, strict=True):
        branch, present = present[:size], present[size:]
        best = sorted(branch, key=rank.index)[:stay]
        left += [neuron for neuron in branch if neuron in best]
    assert torch.equal(module.up_proj.weight, w.up[left])
    assert torch.equal(module.down_proj.weight, w.down[:, left])
    for linear, weight, bias in (
        (module.gate_proj, w.gate, w.gate_bias),
        (module.up_proj, w.up, w.up_bias),
    ):
        assert (linear is None) == (weight is None)
        if linear is not None:
            assert torch.equal(linear.weight, weight[left])
            assert (linear.bias is None) == (bias is None)
            assert bias is None or torch.equal(linear.bias, bias[left])


def test_a_fade_too_small_for_any_neuron_changes_nothing():
    module = built(layer(), branches=6, fade=0.1, fade_unit="neuron", compensation="refit")
    assert module.sizes == (4,) * 6
    assert module.down_proj.weight is layer().weights.down
    assert module.down_proj.bias is None


@pytest.mark.parametrize("score", SCORES)
def test_no_neuron_left(score):
    fields = {"branches": D_FF, "fade": 1.9, "fade_unit": "neuron", "fade_schedule": "uniform"}
    with pytest.raises(SpecError, match=r"fade 1\.9 leaves no neuron\. Lower it\."):
        built(layer(), fade_score=score, **fields)


# A dense module again ----------------------------------------------------------------------

SHAPES = {
    "kept": {"keep": 4, "order": "norm"},
    "fitted": {"keep": 4, "compensation": "alpha"},
    "refitted": {"keep": 4, "compensation": "refit"},
    "of uneven branches": {"fade": 1.5, "fade_unit": "neuron", "compensation": "mean"},
    "with empty branches": {"fade": 2.0, "fade_unit": "neuron", "compensation": "alpha"},
    "faded": {"fade": 1.0, "fade_projections": "gate-up-down", "fade_score": "sparsegpt"},
}


@each_kind
@pytest.mark.parametrize("shape", SHAPES)
def test_folded_is_the_same_function_at_any_width(kind, shape):
    found = layer(kind, torch.float64)
    module = built(found, branches=6, **SHAPES[shape])
    n = sum(module.sizes)
    for width in (None, n, n + 1, D_FF + 7):
        dense = module.folded(width)
        assert dense.d_ff == (width or n)
        assert dense.down.shape == (D_MODEL, width or n)
        torch.testing.assert_close(output(dense, flat(found)), said(module, found))
        again = BranchedMLP(dense, (dense.d_ff,))
        torch.testing.assert_close(said(again, found), said(module, found))
        assert (dense.gate_bias is None, dense.up_bias is None) == (
            found.weights.gate_bias is None, found.weights.up_bias is None
        )  # fmt: skip
        for rows in (dense.gate, dense.up, dense.down.T):
            assert rows is None or not rows[n:].any()


def test_folded_with_trained_alphas():
    module = built(layer(), branches=6, keep=5)
    module.alpha.copy_(torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0]))
    torch.testing.assert_close(output(module.folded(40), layer().x), module(layer().x))


@pytest.mark.parametrize("width", [15, 1])
def test_a_width_that_is_too_small(width):
    module = built(layer(), branches=6, keep=4)
    with pytest.raises(UserError, match=f"16 neurons do not fit into a width of {width}"):
        module.folded(width)


@pytest.mark.parametrize("residual", [False, True])
def test_folded_keeps_the_residual(residual):
    weights = replace(layer().weights, adds_residual=residual)
    module = build_static(weights, ConversionSpec(branches=6, keep=4))
    assert module.folded().adds_residual == residual
    assert BranchedMLP(module.folded(), (16,)).adds_residual == residual

"""Routed conversions: every neuron once, the right experts per token, one result on every path."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as any_array

from mlpmoe.core.activations import LayerActivations
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, convert_all, convert_mlp, mlp_modules
from mlpmoe.core.errors import SpecError
from mlpmoe.core.mlps import read_mlps
from mlpmoe.core.routed import ROUTED_METHODS, NeuronMLP, RoutedMLP
from mlpmoe.core.routed.choosing import choose
from mlpmoe.core.routed.partition import expert_count, split_counts
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.text.decoding import read_on
from tests.core.layers import D_FF, KINDS, gated_and_h, layer_of, output, random_mlp, ridge
from tests.families import FAMILIES, LAYERS, VOCABULARY, build
from tests.tiny import tiny_model

SOME = ("llama", "llama-bias", "phi3", "gpt2", "bloom", "mpt", "gemma")
CLUSTERED = tuple(name for name, method in ROUTED_METHODS.items() if method.partition)
UNCALIBRATED = ("moefication", "contiguous", "random", "neurons", "inputs")
SEEDED = ("expertweaver", "moefication", "coactivation", "random")


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


@cache
def calibration(samples=12, length=12):
    generator = torch.Generator().manual_seed(2)
    return Calibration(torch.randint(2, VOCABULARY, (samples, length), generator=generator))


TOKENS = torch.arange(2, 32).view(2, 15)


def spec_of(method, **values):
    """A spec of eight experts, less what the method has no use for."""
    usual = {"experts": 8, "active": 0.5}
    fields = (*ROUTED_METHODS[method].fields, "compensation")
    return ConversionSpec(
        method=method, **{k: v for k, v in {**usual, **values}.items() if k in fields}
    )


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def refusal(function, *args, **values):
    with pytest.raises(SpecError) as caught:
        function(*args, **values)
    return str(caught.value)


# Everything runs: the dense model ----------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("method", ROUTED_METHODS)
def test_with_everything_active_it_is_the_dense_model(method, name):
    dense = build(name)
    spec = spec_of(method, experts=11, active=1.0)
    converted = convert(dense, spec, calibration())
    expected = dense(TOKENS).logits
    difference = (converted(TOKENS).logits - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("active", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", CLUSTERED)
def test_every_neuron_is_in_one_place(method, name, active):
    spec = spec_of(method, experts=13, active=active)
    experts = expert_count(FAMILIES[name].d_ff, 13)
    assert experts == 11
    modules = mlp_modules(convert(build(name), spec, calibration()))
    assert len(modules) == LAYERS
    for module in modules:
        assert isinstance(module, RoutedMLP)
        d_ff, partition = module.d_ff, module.partition
        assert sorted(partition.neurons.tolist()) == list(range(d_ff))
        size = d_ff // experts
        assert partition.experts.shape == (module.experts, size)
        assert len(partition.shared) == module.shared
        assert module.shared // size + module.experts == experts
        assert module.shared + module.active * size == max(1, round(active * experts)) * size


@given(experts=st.integers(2, 64), active=st.floats(0.01, 1), share=st.floats(0, 1))
def test_counts_of_experts(experts, active, share):
    running, always = split_counts(experts, active, share * active)
    assert 1 <= running <= experts
    assert abs(running - active * experts) <= 0.5 or running == 1
    assert 0 <= always <= running
    assert always < running or running == experts
    assert abs(always - share * active * experts) <= 1.5


@pytest.mark.parametrize("method", UNCALIBRATED)
def test_methods_that_look_at_no_text_convert_without(method):
    convert(build("llama"), ConversionSpec(method=method))


@pytest.mark.parametrize(
    "values",
    [
        *({"method": name} for name in sorted(set(ROUTED_METHODS) - set(UNCALIBRATED))),
        {"method": "random", "shared": 0.25},
        {"method": "contiguous", "selection": "threshold"},
        {"method": "moefication", "router": "regression"},
        {"method": "neurons", "compensation": "mean"},
        {"method": "inputs", "compensation": "refit"},
        {"method": "inputs", "selection": "threshold"},
        {"method": "random", "progressive": True},
    ],
    ids=str,
)
def test_others_need_a_calibration_text(values):
    message = refusal(convert, build("llama"), ConversionSpec(**values))
    assert "needs a calibration text" in message


def test_several_conversions_in_one_pass_are_those_made_alone():
    dense = build("llama")
    specs = [
        spec_of("random"),
        spec_of("expertweaver"),
        spec_of("cmoe", progressive=True),
        spec_of("coactivation"),
    ]
    for together, spec in zip(convert_all(dense, specs, calibration()), specs, strict=True):
        alone = convert(dense, spec, calibration())
        assert torch.equal(together(TOKENS).logits, alone(TOKENS).logits)


# A part runs: against all neurons computed and masked --------------------------------------


def first_rows(mlp):
    return (mlp.up, mlp.up_bias) if mlp.gate is None else (mlp.gate, mlp.gate_bias)


def expected_scores(router, layer, x, partition):
    """(tokens, experts), expert by expert from the definition; in float64."""
    mlp, x, groups = layer.weights, x.double(), partition.experts
    rows, bias = first_rows(mlp)
    rows = rows.double()
    if router == "centroid":
        scores = [(x @ rows[g].T + (0 if bias is None else bias[g])).mean(1) for g in groups]
    elif router == "similarity":
        rows = rows / rows.norm(dim=1, keepdim=True)
        unit = x / x.norm(dim=1, keepdim=True)
        scores = [1 - (unit - rows[g].mean(0)).square().sum(1) for g in groups]
    elif router == "oracle":
        h, norms = gated_and_h(mlp, x)[1], mlp.down.double().norm(dim=0)
        scores = [(h[:, g].abs() * norms[g]).sum(1) for g in groups]
    elif router == "representative":
        logits = []
        for i in partition.representatives:
            gate_or_up, offset = rows[i], 0 if bias is None else bias[i].double()
            score = F.silu((x @ gate_or_up + offset) / gate_or_up.norm())
            if mlp.gate is not None:
                up, offset = mlp.up[i].double(), 0 if mlp.up_bias is None else mlp.up_bias[i]
                score = score * (x @ up + offset) / up.norm()
            logits.append(score.abs())
        scores = torch.stack(logits, dim=1).exp()
        return scores / scores.sum(1, keepdim=True)
    else:
        seen = layer.inputs().double()
        h, norms = gated_and_h(mlp, seen)[1], mlp.down.double().norm(dim=0)
        mass = torch.stack([(h[:, g].abs() * norms[g]).sum(1) for g in groups], dim=1)
        data, target = seen - seen.mean(0), mass - mass.mean(0)
        ridge = (1e-3 * data.square().sum(0).mean()).sqrt() * torch.eye(data.shape[1]).double()
        target = torch.cat([target, target.new_zeros(len(ridge), len(groups))])
        weight = torch.linalg.lstsq(torch.cat([data, ridge]), target).solution
        return mass.mean(0) + (x - seen.mean(0)) @ weight
    return torch.stack(scores, dim=1)


def new_input(layer):
    """(tokens, d_model): not the calibration text's."""
    return layer_of(layer.weights, seed=9).x.flatten(0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method, router",
    [(m, r) for m in ("cmoe", "moefication") for r in ROUTED_METHODS[m].routers],
)
def test_scores_of_routers(method, router, kind):
    layer = layer_of(random_mlp(kind))
    module = convert_mlp(layer.weights, spec_of(method, router=router, shared=0.25), layer)
    x = new_input(layer)
    expected = expected_scores(router, layer, x, module.partition)
    close(module.router(x).double(), expected, 1e-5 * float(expected.abs().max()))


def masked(layer, module, spec, x):
    """All neurons computed for all tokens; those not chosen replaced by 0 or by their mean over
    the calibration tokens in which they were not chosen either. With "refit", down is the ridge
    regression of the dense output on that, less the mean, towards the down there is."""
    mlp, seen = layer.weights, layer.inputs()

    def runs(x):
        """(tokens, d_ff) bool."""
        if spec.method == "neurons":
            scores = gated_and_h(mlp, x)[0].abs()
            if spec.router == "gate-norm":
                scores = scores * mlp.down.norm(dim=0)
            chosen = pick(scores, round(spec.active * mlp.d_ff))
            return chosen
        partition = module.partition
        routed = len(partition.experts)
        size = partition.experts.shape[1]
        wanted = round(spec.active * mlp.d_ff / size) - len(partition.shared) // size
        chosen = pick(expected_scores(spec.router, layer, x, partition), wanted)
        mask = torch.zeros(len(x), mlp.d_ff, dtype=torch.bool)
        mask[:, partition.shared] = True
        for e in range(routed):
            mask[:, partition.experts[e]] = chosen[:, e : e + 1]
        return mask

    def pick(scores, wanted):
        if spec.selection == "threshold":
            return scores > module.threshold + 1e-6  # which is a score itself, rounded otherwise
        return scores >= scores.sort(dim=1, descending=True).values[:, wanted - 1 : wanted]

    h, mask = gated_and_h(mlp, x)[1], runs(x)
    idle = torch.zeros(mlp.d_ff)
    if spec.compensation != "none":
        seen_h, unseen = gated_and_h(mlp, seen)[1], ~runs(seen)
        idle = (seen_h * unseen).sum(0) / unseen.sum(0).clamp(min=1)
    if spec.compensation != "refit":
        return output(mlp, x, torch.where(mask, h, idle))
    data, wanted = ((seen_h - idle) * ~unseen).double(), output(mlp, seen).double()
    new = ((h - idle) * mask).double() - data.mean(0)
    return (new @ ridge(data, wanted, mlp.down).T + wanted.mean(0)).float()


CASES = [
    ("expertweaver", "centroid", {}),
    ("cmoe", "representative", {}),
    ("moefication", "similarity", {}),
    ("coactivation", "regression", {}),
    ("contiguous", "oracle", {"shared": 0.25}),
    ("random", "centroid", {"shared": 0.0}),
    ("neurons", "gate", {}),
    ("neurons", "gate-norm", {}),
]
each_case = pytest.mark.parametrize(
    "method, router, more", CASES, ids=[f"{m}-{r}" for m, r, _ in CASES]
)
each_selection = pytest.mark.parametrize("selection", ["topk", "threshold"])
each_compensation = pytest.mark.parametrize("compensation", ["none", "mean", "refit"])


def near_threshold(module, x):
    """Tokens with a score so near the threshold that rounding decides."""
    if module.threshold is None:
        return torch.zeros(len(x), dtype=torch.bool)
    if isinstance(module, NeuronMLP):
        scores = module.gated(x).abs()
        scores = scores if module.importance is None else scores * module.importance
    else:
        scores = module.router(x)
    return ((scores - module.threshold).abs() < 1e-6).any(1)


@each_case
@each_selection
@each_compensation
@pytest.mark.parametrize("kind", ["gated", "gated with biases", "plain with biases"])
def test_output_is_that_of_the_masked_dense_mlp(
    method, router, more, selection, compensation, kind
):
    layer = layer_of(random_mlp(kind))
    spec = spec_of(method, router=router, selection=selection, compensation=compensation, **more)
    tau = 0.8 if method == "expertweaver" else None
    spec = replace(spec, tau=tau)
    module = convert_mlp(layer.weights, spec, layer)
    x = new_input(layer)
    sure = ~near_threshold(module, x)
    assert sure.sum() > 0.9 * len(x)
    expected = masked(layer, module, spec, x)
    # products of h with itself are summed up in float32 pieces
    close(module(x)[sure], expected[sure], 2e-4 if compensation == "refit" else 2e-5)
    assert (expected - output(layer.weights, x)).norm() > 0.01 * expected.norm()


@each_case
@each_selection
@each_compensation
def test_one_token_gives_what_many_give(method, router, more, selection, compensation):
    """One token reads only its rows, in place without gradients; many are sorted by expert."""
    for kind in KINDS:
        layer = layer_of(random_mlp(kind))
        spec = spec_of(
            method, router=router, selection=selection, compensation=compensation, **more
        )
        spec = replace(spec, tau=0.8 if method == "expertweaver" else None)
        module = convert_mlp(layer.weights, spec, layer)
        x = new_input(layer)
        together = module(x)
        singly = torch.cat([module(token) for token in x.split(1)])
        close(singly, together)
        with torch.enable_grad():
            trained = torch.cat([module(token) for token in x[:20].split(1)])
        assert trained.requires_grad
        close(trained.detach(), together[:20])


@each_case
@each_compensation
def test_one_token_gives_what_many_give_in_half_precision(method, router, more, compensation):
    layer = layer_of(random_mlp("gated with biases", dtype=torch.bfloat16))
    spec = spec_of(method, router=router, compensation=compensation, **more)
    spec = replace(spec, tau=0.8 if method == "expertweaver" else None)
    module = convert_mlp(layer.weights, spec, layer)
    x = new_input(layer)
    together = module(x).float()
    singly = torch.cat([module(token) for token in x.split(1)])
    assert singly.dtype == torch.bfloat16
    error = (singly.float() - together).norm(dim=1) / together.norm()
    assert error.median() < 0.002
    assert error.norm() < 0.05


@each_case
def test_a_token_s_result_does_not_depend_on_its_batch(method, router, more):
    layer = layer_of(random_mlp("gated with biases"))
    spec = spec_of(method, router=router, **more)
    spec = replace(spec, tau=0.8 if method == "expertweaver" else None)
    module = convert_mlp(layer.weights, spec, layer)
    x = new_input(layer)
    expected = module(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    close(module(x[order]), expected[order])
    close(module(x[:7]), expected[:7])
    close(module(x.view(2, 3, 20, -1)).flatten(0, 2), expected)
    close(module(x[0]), expected[0])  # without a dimension for tokens


@pytest.mark.parametrize("selection", ["topk", "threshold"])
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("method", ["cmoe", "neurons", "inputs", "tokenclusters", "lowrank"])
def test_reading_token_by_token_gives_the_same_logits(method, name, selection):
    """With a cache each step is one token; BLOOM and MPT hand the residual to the MLP."""
    spec = spec_of(method, selection=selection, compensation="mean")
    model = convert(build(name), spec, calibration())
    tokens = TOKENS[:1]
    expected, cache = model(tokens).logits[0], None
    for position in range(tokens.shape[1]):
        logits, cache = read_on(model, tokens[:, position : position + 1], cache)
        close(logits[0], expected[position], 1e-4 * float(expected.abs().max()))


# Selection ---------------------------------------------------------------------------------


def test_equal_scores_go_to_the_experts_of_lower_index():
    scores = torch.tensor([[1.0, 2, 2, 2, 0], [0, 0, 0, 0, 0], [3, 1, 3, 1, 1]])
    assert choose(scores, 2, None).int().tolist() == [
        [0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]
    ]  # fmt: skip
    layer = layer_of(random_mlp())
    module = convert_mlp(layer.weights, spec_of("contiguous"), layer)
    module.router.weight.zero_()
    assert module.select(new_input(layer)).all(0).tolist() == [True] * 4 + [False] * 4


@given(
    any_array(np.float32, (3, 13), elements=st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0])),
    st.integers(0, 13),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_the_highest_scores_are_chosen(scores, active, dtype):
    """Against a sort that keeps the order of equals."""
    chosen = choose(torch.from_numpy(scores).to(dtype), active, None)
    for row, found in zip(scores.tolist(), chosen.tolist(), strict=True):
        best = sorted(range(13), key=lambda i: (-row[i], i))[:active]
        assert found == [i in best for i in range(13)]


@pytest.mark.parametrize("active", [0.25, 0.5, 0.8])
@each_case
def test_a_threshold_runs_the_wanted_number_on_average(method, router, more, active):
    layer = layer_of(random_mlp())
    more = {**more, "tau": 0.8} if method == "expertweaver" else more
    spec = spec_of(method, router=router, selection="threshold", active=active, **more)
    module = convert_mlp(layer.weights, spec, layer)
    chosen = module.select(layer.inputs())
    if method == "neurons":
        wanted, found = round(active * D_FF), chosen.sum(1).float().mean()
    else:
        wanted = round(active * 8) * module.size
        found = module.shared + chosen.sum(1).float().mean() * module.size
    assert float(found) == pytest.approx(wanted, rel=0.01)
    assert module.neurons_per_token == pytest.approx(float(found), rel=1e-4)
    assert len(set(chosen.sum(1).tolist())) > 1  # not the same number for every token


def test_a_threshold_says_what_really_runs():
    """A ReLU is often exactly 0; a threshold cannot make these neurons run."""
    layer = layer_of(replace(random_mlp("plain"), activation=F.relu))
    spec = ConversionSpec(method="neurons", selection="threshold", active=0.9)
    module = convert_mlp(layer.weights, spec, layer)
    positive = (gated_and_h(layer.weights, layer.inputs())[1] > 0).sum(1).float().mean()
    assert module.neurons_per_token == pytest.approx(float(positive), rel=1e-3)
    x = new_input(layer)
    close(module(x), output(layer.weights, x))


# Methods -----------------------------------------------------------------------------------


def groups_of(module):
    return [module.partition.shared.tolist(), *module.partition.experts.tolist()]


@pytest.mark.parametrize("method", SEEDED)
def test_the_seed_decides_the_clusters(method):
    layer = layer_of(random_mlp())
    values = {"tau": 0.8} if method == "expertweaver" else {}

    def clusters(seed):
        return groups_of(convert_mlp(layer.weights, spec_of(method, seed=seed, **values), layer))

    assert clusters(5) == clusters(5)
    assert len({str(clusters(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CLUSTERED)
def test_which_neurons_are_shared(method, kind):
    layer = layer_of(random_mlp(kind))
    spec = spec_of(method, shared=0.25)
    shared = convert_mlp(layer.weights, spec, layer).partition.shared
    gated, h = gated_and_h(layer.weights, layer.inputs().double())
    norms = layer.weights.down.double().norm(dim=0)
    if method == "cmoe":
        score = layer.markers(10).sum(0).double() - torch.arange(D_FF) / 1000  # ties: lower first
    elif method == "expertweaver":
        score = gated.mean(0).abs()
    elif method == "coactivation":
        score = h.var(0) * norms.square()
    else:
        score = h.abs().mean(0) * norms
    assert shared.tolist() == sorted(score.topk(6).indices.tolist())


def test_contiguous_experts_are_slices():
    layer = layer_of(random_mlp())
    module = convert_mlp(layer.weights, spec_of("contiguous"), layer)
    assert module.partition.neurons.tolist() == list(range(D_FF))


def greedy(distances, places):
    """Experts filled pair by pair, from the smallest distance up."""
    experts, pairs = [[] for _ in distances[0]], []
    for n, row in enumerate(distances):
        pairs += [(float(d), n, e) for e, d in enumerate(row)]
    placed = set()
    for _, n, e in sorted(pairs):
        if n not in placed and len(experts[e]) < places:
            experts[e].append(n)
            placed.add(n)
    return experts


@pytest.mark.parametrize("kind", KINDS)
def test_cmoe_s_experts_and_representatives(kind):
    """Sections 3.2 to 3.4 with lists: L1 distances between columns of markers."""
    layer = layer_of(random_mlp(kind))
    partition = convert_mlp(layer.weights, spec_of("cmoe", shared=0.25), layer).partition
    markers = layer.markers(10).T.double()  # (d_ff, tokens)
    ranked = sorted(range(D_FF), key=lambda n: (-float(markers[n].sum()), n))
    rest = ranked[6:]
    starts = rest[:6]
    distances = [[float((markers[n] - markers[s]).abs().sum()) for s in starts] for n in rest]
    expected = [[rest[n] for n in expert] for expert in greedy(distances, 3)]
    assert partition.experts.tolist() == [sorted(expert) for expert in expected]
    for expert, chosen in zip(expected, partition.representatives.tolist(), strict=True):
        assert chosen in expert
        centre = markers[expert].mean(0)
        far = {n: float((markers[n] - centre).abs().sum()) for n in expert}
        assert far[chosen] <= min(far.values()) + 1e-3


@pytest.mark.parametrize("method", ["moefication", "coactivation", "expertweaver"])
def test_neurons_that_are_alike_share_an_expert(method):
    """Two kinds of neurons, with rows of gate and up that are nearly equal within a kind."""
    mlp = random_mlp()
    kind = torch.randperm(D_FF, generator=torch.Generator().manual_seed(0)) % 2
    noise = 1e-3 * torch.randn(2, *mlp.up.shape, generator=torch.Generator().manual_seed(1))
    mlp.gate.copy_(mlp.gate[kind] + noise[0])
    mlp.up.copy_(mlp.up[kind] + noise[1])
    layer = layer_of(mlp)
    module = convert_mlp(mlp, spec_of(method, experts=2, shared=0.0), layer)
    assert all(len(set(kind[expert].tolist())) == 1 for expert in module.partition.experts)


@pytest.mark.parametrize("profile", ["signed", "absolute"])
@pytest.mark.parametrize("active", [0.75, 0.4])
def test_expertweaver_shares_by_layer(profile, active):
    """τ is the median over all neurons of all layers; what varies less is shared more."""
    dense = build("llama", intermediate_size=64)
    with torch.no_grad():  # layer 1 varies little over the samples, in either profile
        dense.model.layers[1].post_attention_layernorm.weight.mul_(0.3)
    spec = ConversionSpec(method="expertweaver", experts=32, active=active, profile=profile)
    seen = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in dense.model.layers
    ]
    dense(calibration().samples)
    for hook in hooks:
        hook.remove()
    variations = []
    for mlp, x in zip(read_mlps(dense), seen, strict=True):
        gated = F.silu(x.double() @ mlp.weights.gate.T.double())
        gated = gated.abs() if profile == "absolute" else gated
        profiles = gated.mean(1)
        variations.append(profiles.std(0) / (profiles.mean(0).abs() + 1e-6))
    values = torch.cat(variations).sort().values
    tau = float(values[(len(values) - 1) // 2])
    counts = []
    for values, module in zip(
        variations, mlp_modules(convert(dense, spec, calibration())), strict=True
    ):
        close(module.partition.variation.double(), values, 1e-3)
        share = 0.7 - 0.5 * float((values > tau).double().mean())
        running = round(active * 32)
        assert module.shared == min(round(round(share * 64) / 2), running - 1) * 2
        assert round(0.2 * 32) <= module.shared // 2 <= round(0.7 * 32)
        assert module.active == running - module.shared // 2
        counts.append(module.shared)
    if active == 0.75:
        assert counts[0] != counts[1]


@pytest.mark.parametrize("tau, share", [(0.0, 0.2), (1000.0, 0.7)])
def test_expertweaver_s_bounds(tau, share):
    spec = ConversionSpec(method="expertweaver", experts=11, tau=tau, active=0.9)
    for module in mlp_modules(convert(build("llama"), spec, calibration())):
        assert module.shared == round(share * 11) * 4


@pytest.mark.parametrize(
    "method",
    ["cmoe", "coactivation", "expertweaver", "neurons", "inputs", "tokenclusters", "lowrank"],
)
def test_progressive_sees_the_converted_layers_before(method):
    dense = build("llama")
    values = {"active": 0.3, "compensation": "mean"}
    if method == "expertweaver":
        values["tau"] = 0.8
    spec = spec_of(method, **values)
    at_once = mlp_modules(convert(dense, spec, calibration()))
    spec = replace(spec, progressive=True)
    converted = convert(dense, spec, calibration())
    modules = mlp_modules(converted)

    def same(one, other):
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        return all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5) for a, b in pairs)

    assert same(modules[0], at_once[0])
    assert not same(modules[1], at_once[1])
    seen = []
    hook = modules[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    converted(calibration().samples)
    hook.remove()
    weights = read_mlps(dense)[1].weights
    assert same(modules[1], convert_mlp(weights, spec, LayerActivations(weights, seen[0])))


@pytest.mark.parametrize("method", ROUTED_METHODS)
def test_the_dense_model_is_unchanged_and_shares_no_mlp_weights(method):
    dense = build("llama")
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    converted = convert(dense, spec_of(method), calibration())
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())
    assert converted.lm_head.weight is dense.lm_head.weight
    if ROUTED_METHODS[method].partition:  # others keep matrices that are read as they are stored
        own = {p.data_ptr() for m in mlp_modules(converted) for p in m.parameters()}
        assert own.isdisjoint(p.data_ptr() for p in dense.parameters())


# Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CLUSTERED)
def test_a_prime_number_of_neurons(method):
    model = tiny_model(intermediate_size=47)
    message = refusal(convert, model, spec_of(method), calibration())
    assert "47 neurons cannot be cut into 2 to 8 experts" in message
    assert message.endswith("allowed numbers of experts: 47.")


@given(d_ff=st.integers(2, 3000), experts=st.integers(2, 100))
def test_the_count_of_experts_divides_the_neurons(d_ff, experts):
    allowed = [n for n in range(2, experts + 1) if d_ff % n == 0]
    if allowed:
        assert expert_count(d_ff, experts) == allowed[-1]
    else:
        assert str(experts) in refusal(expert_count, d_ff, experts)


@pytest.mark.parametrize("method", CLUSTERED)
def test_more_shared_than_active(method):
    message = refusal(ConversionSpec, method=method, active=0.5, shared=0.6)
    assert "shared is 0.6" in message
    assert "0.5" in message


@pytest.mark.parametrize("method", ROUTED_METHODS)
def test_a_router_of_another_method_is_refused_with_the_allowed_ones(method):
    allowed = ROUTED_METHODS[method].routers
    every = {router for m in ROUTED_METHODS.values() for router in m.routers}
    for router in (every - set(allowed)) | {"none such"}:
        message = refusal(ConversionSpec, method=method, router=router)
        assert all(name in message for name in allowed)


@pytest.mark.parametrize("method", ROUTED_METHODS)
@pytest.mark.parametrize("field, value", [("branches", 4), ("fade", 0.5), ("keep", 3),
                                          ("order", "activation"), ("fade_schedule", "power"),
                                          ("fade_exponent", 3.0), ("fade_projections", "down"),
                                          ("fade_score", "wanda"), ("fade_unit", "2:4"),
                                          ("allocation", "sensitivity")])  # fmt: skip
def test_fields_of_static_methods_are_refused(method, field, value):
    message = refusal(ConversionSpec, method=method, **{field: value})
    assert f"{field} does not belong to the method {method}; it is for mlpmoe." == message


@pytest.mark.parametrize(
    "field, value",
    [("experts", 4), ("active", 0.5), ("shared", 0.1), ("router", "centroid"),
     ("selection", "threshold"), ("profile", "absolute"), ("tau", 0.6)],
)  # fmt: skip
def test_fields_of_routed_methods_are_refused(field, value):
    message = refusal(ConversionSpec, **{field: value})
    assert message.startswith(f"{field} does not belong to the method mlpmoe")
    users = [name for name, method in ROUTED_METHODS.items() if field in method.fields]
    assert message.endswith(f"it is for {', '.join(users)}.")


@pytest.mark.parametrize("method", ["cmoe", "coactivation", "moefication", "contiguous", "random"])
def test_only_expertweaver_shares_by_itself(method):
    assert "only expertweaver" in refusal(ConversionSpec, method=method, shared="auto")


def test_sorted_tokens_and_masked_experts_agree(monkeypatch):
    """The two ways to run many tokens at once are the same sum."""
    dense = build("llama-bias")
    converted = convert(dense, ConversionSpec(method="random", experts=11, active=0.5))
    ids = torch.arange(48).view(2, 24)
    outputs = []
    for work in (0, 10**12):
        monkeypatch.setattr("mlpmoe.core.routed.routed_mlp.GROUPED_FROM", {4: work})
        outputs.append(converted(ids).logits)
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-5)

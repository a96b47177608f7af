"""Trained masks: which neurons overlapping experts have, within the budget, and the routers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import (
    convert,
    convert_all,
    convert_mlp,
    mlp_modules,
    observe,
    recovery_of,
)
from mlpmoe.core.errors import SpecError
from mlpmoe.core.recovery import masks
from mlpmoe.core.recovery.budget import best_neurons, shared_out
from mlpmoe.core.recovery.divergence import divergence
from mlpmoe.core.recovery.masks import MaskStudent
from mlpmoe.core.recovery.recover import recover
from mlpmoe.core.routed import ClusterMLP
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.cost.parameters import parameter_report
from tests.families import D_FF, VOCABULARY, build

LENGTH = 32
SPEC = ConversionSpec(
    method="tokenclusters", active=0.5, experts=4, recover="masks", recover_steps=6
)


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(5)
    return Calibration(torch.randint(2, VOCABULARY, (160, LENGTH), generator=generator))


@pytest.fixture(scope="module")
def dense():
    return build("llama")


def untrained(spec):
    return replace(spec, recover="none")


@torch.no_grad()
def draft(dense, spec, text):
    """Converted, and not trained: the modules that training begins with."""
    seen = observe(dense, text)
    (model,) = convert_all(dense, [untrained(spec)], seen)
    for layer, activations in enumerate(seen.layers):
        if layer not in spec.spared_layers:
            path = f"model.layers.{layer}.mlp"
            model.set_submodule(path, convert_mlp(activations.weights, spec, activations))
    return model


def moved(student, by=0.5):
    """As after some training: everything that is trained has changed a little."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.trained:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter += by * parameter.square().mean().sqrt().clamp(min=0.1) * drawn
    return student


# The budget ---------------------------------------------------------------------------------


def shared_out_by_hand(logits, total):
    """One entry after the other, from the highest, in fractions; then the largest remainders."""
    entries = sorted(
        (-float(value), layer, place)
        for layer, own in enumerate(logits)
        for place, value in enumerate(own.flatten())
    )
    counts = [0] * len(logits)
    for _, layer, _ in entries:
        counts[layer] += 1
        if sum(n / len(own) for n, own in zip(counts, logits, strict=True)) > total + 1e-6:
            counts[layer] -= 1
            break
    exact = [n / len(own) for n, own in zip(counts, logits, strict=True)]
    whole = [int(n + 1e-9) for n in exact]
    while sum(whole) < total:
        missing = [n - w for n, w in zip(exact, whole, strict=True)]
        whole[missing.index(max(missing))] += 1
    return whole


@pytest.mark.parametrize("seed", range(8))
def test_the_budget_is_shared_out_exactly(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(4, 11, generator=generator) + n / 4 for n in range(3)]
    for total in range(12, 30, 3):
        counts = shared_out(logits, total)
        assert counts == shared_out_by_hand(logits, total) and sum(counts) == total
        for own, count in zip(logits, counts, strict=True):
            chosen = best_neurons(own, count)
            assert chosen.tolist() == [sorted(row.topk(count).indices.tolist()) for row in own]


@pytest.mark.parametrize("total", [3, 4, 17, 32, 33])
def test_each_layer_keeps_a_neuron_and_no_more_than_it_has(total):
    logits = [torch.full((2, 11), float(n)) for n in (-5, 0, 5)]
    counts = shared_out(logits, total)
    assert sum(counts) == total and min(counts) >= 1 and max(counts) <= 11
    assert counts == sorted(counts)


def test_layers_may_differ_in_the_number_of_their_experts():
    logits = [torch.tensor([[3.0, 2, -1], [3, -1, -2], [3, 2, -1]]), torch.tensor([[1.0, -3, -3]])]
    # 5 of 9 and 1 of 3 lie above 0: 5/3 + 1 neurons of a token
    assert shared_out(logits, 3) == [2, 1]
    assert best_neurons(torch.zeros(2, 4), 2).tolist() == [[0, 1], [0, 1]]


# The start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bloom"])
@pytest.mark.parametrize("compensation", ["none", "mean", "refit"])
def test_it_begins_with_the_model_without_training(name, compensation, text):
    dense, spec = build(name), replace(SPEC, compensation=compensation, recover_rate=10.0)
    plain = convert(dense, untrained(spec), text)
    ids = text.samples[:3]
    with torch.no_grad():
        wanted = plain(ids).logits
        ruined = convert(dense, spec, text)
        assert recovery_of(ruined).best == 0
        torch.testing.assert_close(ruined(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    for one, other in zip(mlp_modules(plain), mlp_modules(ruined), strict=True):
        assert torch.equal(one.members, other.members) and torch.equal(one.up, other.up)
        for a, b in zip(one.router.parameters(), other.router.parameters(), strict=True):
            assert torch.equal(a, b)
    if compensation == "none":
        assert all(
            torch.equal(a, b)
            for a, b in zip(plain.state_dict().values(), ruined.state_dict().values(), strict=True)
        )


def test_importance_decides_how_far_a_logit_is_from_the_border():
    importance = torch.tensor([[1.0, 100.0, 0.5, 0.0, 1.5], [1.0, 1.0, 1.0, 1.0, 1.0]])
    logits = masks.start(importance, torch.tensor([[1, 4], [0, 1]]))
    assert logits[0].argsort(descending=True).tolist() == [1, 4, 0, 2, 3]
    assert ((logits > 0) == torch.tensor([[0, 1, 0, 0, 1], [1, 1, 0, 0, 0]]).bool()).all()
    assert float(logits.abs().min()) >= masks.LEAST and float(logits.abs().max()) <= masks.MOST
    assert float(logits[0, 4] + logits[0, 0]) == pytest.approx(0, abs=1e-6)  # the border's own


# A step -------------------------------------------------------------------------------------


def test_the_finished_model_is_what_the_student_says(dense, text):
    for values in ({}, {"compensation": "mean"}, {"router": "regression", "active": 0.3}):
        spec = replace(SPEC, **values)
        model = draft(dense, spec, text)
        student = moved(MaskStudent(model, spec))
        ids = text.samples[:5]
        with torch.no_grad():
            said = student(ids)
        with torch.enable_grad():
            torch.testing.assert_close(student(ids), said)
        before = [mlp.members.clone() for mlp in mlp_modules(model)]
        student.write(model)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, said, rtol=1e-4, atol=1e-4)
        sizes = [mlp.size for mlp in mlp_modules(model)]
        assert sum(sizes) == sum(m.shape[1] for m in before)
        assert student.active == sum(sizes) / (2 * D_FF)
        for mlp in mlp_modules(model):  # stored once, and only what an expert has
            assert mlp.members.unique().tolist() == list(range(len(mlp.up)))


def test_a_step_draws_from_the_seed_and_its_number(dense, text):
    model = draft(dense, SPEC, text)

    def drawn(step, **values):
        student = MaskStudent(model, replace(SPEC, **values))
        return torch.cat([m.flatten() for n, m in student.values(step) if n.endswith("running")])

    state = torch.get_rng_state()
    first = drawn(3)
    assert torch.equal(state, torch.get_rng_state())
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(first, drawn(3))
    for other in (drawn(4), drawn(3, seed=1)):
        assert 0 < (first != other).float().mean() < 0.5


def test_how_often_a_mask_is_drawn(dense, text):
    """P(mask) = sigmoid(logit)."""
    student = MaskStudent(draft(dense, SPEC, text), SPEC)
    logits = [own.detach() for own in student.generator()]
    total = sum(torch.stack(student._drawn(logits, step)) for step in range(400))
    expected = torch.stack(logits).sigmoid()
    assert float((total / 400 - expected).abs().max()) < 6 * (0.25 / 400) ** 0.5


def test_gradients_reach_generator_and_routers_only(dense, text):
    model = draft(dense, SPEC, text)
    student, ids = MaskStudent(model, SPEC), text.samples[:4]
    with torch.no_grad():
        wanted = dense(ids).logits
    loss = divergence(student(ids, 0), wanted) / ids.numel() + student.penalty
    loss.backward()
    own = {id(p) for p in student.trained}
    assert own == {id(p) for p in student.parameters() if p.requires_grad}
    for parameter in student.trained:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    for other in (model, dense, student.twin):
        assert all(p.grad is None for p in other.parameters())


def test_the_gradient_of_a_mask_is_what_a_neuron_says(dense, text):
    """To its expert's tokens, whether it runs now or not; of a router, what experts would say."""
    student = MaskStudent(draft(dense, SPEC, text), SPEC)
    mlp = student.twin.get_submodule("model.layers.0.mlp")
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    mlp.running = mlp.running.clone().requires_grad_()
    weight = mlp.router.weight.detach().clone().requires_grad_()
    mlp.router.weight = torch.nn.Parameter(weight)
    wanted = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    (mlp(x) * wanted).sum().backward()
    h = F.silu(x @ mlp.gate.T) * (x @ mlp.up.T)
    said = h * (wanted @ mlp.down.T)  # (tokens, neurons)
    scores = mlp.router(x)
    expected = torch.stack([said[scores.argmax(1) == e].sum(0) for e in range(mlp.experts)])
    torch.testing.assert_close(mlp.running.grad, expected, rtol=1e-4, atol=1e-4)
    free = scores.detach().requires_grad_()
    soft = (free / (0.4 * free.detach().std(1).mean())).softmax(1)
    (soft * (said @ mlp.running.detach().T)).sum().backward()
    unit = F.normalize(x, dim=-1)  # what the router reads
    torch.testing.assert_close(mlp.router.weight.grad, free.grad.T @ unit, rtol=1e-3, atol=1e-3)


def test_the_penalty_is_that_of_budget_and_balance(dense, text):
    model, ids = draft(dense, SPEC, text), text.samples[:4]
    student = moved(MaskStudent(model, SPEC))
    inputs = {}
    for path in student.mlps:

        def keep(mlp, args, path=path):
            inputs[path] = args[0]

        student.twin.get_submodule(path).register_forward_pre_hook(keep)
    with torch.no_grad():
        student(ids)
        assert student.penalty is None  # of the model as it would be written
        student(ids, 7)
        found, values = student.penalty, dict(student.values(7))
    running = [values[f"{path}.running"] for path in student.mlps]
    share = sum(float(m.mean()) for m in running) / len(running)
    expected = abs(torch.tensor(share / 0.5).log())
    for path in student.mlps:
        x = F.normalize(inputs[path].flatten(0, 1), dim=-1)
        scores = x @ values[f"{path}.router.weight"].T + values[f"{path}.router.bias"]
        chosen = F.one_hot(scores.argmax(1), 4).float().mean(0)
        probability = (scores / (0.4 * scores.std(1).mean())).softmax(1).mean(0)
        expected = expected + (chosen * probability).sum() / 16 / len(running)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# What comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"active": 0.25, "experts": 7},
        {"active": 0.25, "spared": "0"},
        {"compensation": "refit"},
    ],
)
def test_the_budget_holds_for_every_token(dense, text, values):
    spec = replace(SPEC, recover_steps=12, **values)
    model, plain = convert(dense, spec, text), convert(dense, untrained(spec), text)
    report = recovery_of(model)
    assert report.best > 0 and report.after < report.before
    running = []
    for mlp in mlp_modules(model):
        if isinstance(mlp, ClusterMLP):
            mlp.register_forward_pre_hook(
                lambda mlp, args, running=running: running.append(
                    mlp.select(args[0].flatten(0, 1)).float() @ mlp.masks.float()
                )
            )
    with torch.no_grad():
        model(text.samples)
    share = float(torch.stack([layer.sum(1).mean() for layer in running]).mean()) / D_FF
    assert share <= spec.active + 0.5 / D_FF  # half a neuron: an active share is rounded
    assert report.active == pytest.approx(share)
    now, then = parameter_report(model), parameter_report(plain)
    assert now.macs_per_token == then.macs_per_token
    changed = [
        not torch.equal(a.members, b.members) or not torch.equal(a.router.weight, b.router.weight)
        for a, b in zip(mlp_modules(model), mlp_modules(plain), strict=True)
        if isinstance(a, ClusterMLP)
    ]
    assert any(changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_stay_and_learn(text, dtype):
    dense = build("llama").to(dtype)
    model = convert(dense, replace(SPEC, recover_steps=12), text)
    report = recovery_of(model)
    assert 0 < report.best and report.after < report.before and report.stopped is None
    assert {m.up.dtype for m in mlp_modules(model)} == {dtype}
    held_out = text.samples.view(-1, 2 * LENGTH)[8::16]  # rows of two samples, five of 80
    with torch.no_grad():
        due, said = (m(held_out).logits.double().log_softmax(-1) for m in (dense, model))
    found = float((due.exp() * (due - said)).sum(-1).mean())
    assert report.after == pytest.approx(found, rel=0.05)


def test_weights_stay_those_of_the_dense_model(dense, text):
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    model = convert(dense, SPEC, text)
    assert recovery_of(model).best > 0
    for name, tensor in dense.state_dict().items():
        assert torch.equal(before[name], tensor)
    for n, mlp in enumerate(mlp_modules(model)):
        for name in ("gate", "up", "down"):
            rows = before[f"model.layers.{n}.mlp.{name}_proj.weight"]
            rows = rows.T if name == "down" else rows
            here = torch.cdist(getattr(mlp, name), rows).argmin(1)
            assert torch.equal(getattr(mlp, name), rows[here])
            assert all(a < b for a, b in pairwise(here.tolist()))
    others = [n for n in before if ".mlp." not in n]
    assert all(torch.equal(before[n], model.state_dict()[n]) for n in others)


def test_one_token_and_many_run_the_same_experts(dense, text):
    model = convert(dense, SPEC, text)
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for mlp in mlp_modules(model):
            torch.testing.assert_close(
                torch.cat([mlp(token) for token in x.split(1)]), mlp(x), rtol=1e-4, atol=1e-4
            )


def test_it_finds_neurons_that_matter(dense, text):
    """From neurons drawn by lot."""
    model = draft(dense, SPEC, text)
    generator = torch.Generator().manual_seed(6)
    for mlp in mlp_modules(model):
        mlp.importance = torch.rand(mlp.masks.shape, generator=generator)
        mlp.members = best_neurons(mlp.importance, mlp.size)
    report = recover(dense, model, replace(SPEC, recover_steps=40, recover_rate=1e-2), text)
    assert report.after < 0.7 * report.before


def test_where_all_neurons_run_there_is_nothing_to_train(dense, text):
    with pytest.raises(SpecError, match="none to train"):
        convert(dense, replace(SPEC, active=0.999), text)
    assert recovery_of(convert(dense, replace(SPEC, active=1.0), text)) is None


def test_the_spec_is_written_and_read(dense):
    assert ConversionSpec.from_query(SPEC.to_query()) == SPEC
    assert "--recover masks" in SPEC.to_flags() and SPEC.recovers
    assert SPEC.canonical().seed == 0 and replace(SPEC, seed=3).canonical().seed == 3


def test_experts_that_have_their_neurons_are_not_trained(dense, text):
    model = convert(dense, untrained(SPEC), text)
    with pytest.raises(SpecError, match="was converted without it"):
        recover(dense, model, SPEC, text)

"""A little training after the conversion: what it changes, what it wins, how it ends."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, convert_all, mlp_modules, observe, recovery_of
from mlpmoe.core.descent import BETAS, CLIP, height
from mlpmoe.core.errors import SpecError
from mlpmoe.core.recovery import course as courses
from mlpmoe.core.recovery import divergence as divergences
from mlpmoe.core.recovery import recover as recovering
from mlpmoe.core.recovery import student as students
from mlpmoe.core.recovery.kinds import RECOVERIES
from mlpmoe.core.recovery.recover import recover
from mlpmoe.core.recovery.samples import Samples
from mlpmoe.core.recovery.tensors import TensorStudent
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.stopping import stoppable
from tests.families import VOCABULARY, build

SAMPLES, LENGTH = 40, 32
STATIC = ConversionSpec(branches=4, keep=2, recover_steps=6)
ROUTED = ConversionSpec(method="random", experts=4, active=0.5, recover_steps=6)
SPECS = {
    "alpha": replace(STATIC, recover="alpha"),
    "down": replace(STATIC, recover="down"),
    "lora": replace(STATIC, recover="lora"),
    "all": replace(STATIC, recover="all"),
    "router": replace(ROUTED, recover="router", recover_rate=0.1),
    "down, routed": replace(ROUTED, recover="down"),
    "lora, routed": replace(
        ROUTED, recover="lora", selection="threshold", compensation="mean", recover_rate=1e-3
    ),
    "all, routed": replace(ROUTED, recover="all"),
    "all, neurons": ConversionSpec(method="neurons", active=0.5, recover="all", recover_steps=6),
    "lora, inputs": ConversionSpec(method="inputs", active=0.25, recover="lora", recover_steps=6),
    "all, faded": ConversionSpec(branches=4, fade=0.9, recover="all", recover_steps=6),
    "all, spared": replace(STATIC, recover="all", spared="0"),
    "all, clusters": ConversionSpec(
        method="tokenclusters", active=0.6, experts=5, recover="all", recover_steps=6
    ),
    # what it changes is said in test_masks.py
    "masks": ConversionSpec(
        method="tokenclusters", active=0.5, experts=4, recover="masks", recover_steps=6
    ),
}
TRAINED = {  # of the names of a module's tensors, by hand
    "alpha": {"alpha"},
    "down": {"down_proj.weight", "down"},
    "lora": {"gate_proj.weight", "up_proj.weight", "down_proj.weight", "gate", "up", "down"},
    "router": {"router.weight", "router.bias"},
}
TRAINED["all"] = TRAINED["lora"] | TRAINED["alpha"] | {"down_bias"}


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(5)
    return Calibration(torch.randint(2, VOCABULARY, (SAMPLES, LENGTH), generator=generator))


@pytest.fixture(scope="module")
def dense():
    return build("llama")


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def untrained(spec):
    return replace(spec, recover="none")


def kept_apart(text):
    """Rows of two samples, since the models have 64 positions; one of 16, from the middle."""
    rows = text.samples.view(-1, 2 * LENGTH)
    return rows[len(rows) // 2][None]


@torch.no_grad()
def kl(dense, model, ids):
    """Nats per token, from the definition."""
    due, said = (m(ids).logits.double().log_softmax(-1) for m in (dense, model))
    return float((due.exp() * (due - said)).sum(-1).mean())


@pytest.mark.parametrize("name", [name for name in SPECS if name != "masks"])
def test_it_changes_what_was_chosen_and_nothing_else(dense, text, name):
    spec, before = SPECS[name], tensors(dense)
    plain = tensors(convert(dense, untrained(spec), text))
    model = convert(dense, spec, text)
    after, report = tensors(model), recovery_of(model)
    assert plain.keys() == after.keys()
    changed = {n for n in after if not torch.equal(plain[n], after[n])}
    layers = [n for n in after if ".mlp." in n and (not spec.spared or ".layers.1." in n)]
    chosen = {n for n in layers if n.partition(".mlp.")[2] in TRAINED[spec.recover]}
    assert report.best > 0 and changed == chosen
    if spec.recover != "lora":
        assert report.parameters == sum(after[n].numel() for n in chosen)
    assert all(torch.equal(before[n], tensor) for n, tensor in dense.state_dict().items())
    assert all(p.grad is None for p in (*dense.parameters(), *model.parameters()))
    for m in (dense, model):
        assert not any(module._forward_pre_hooks for module in m.modules())


@pytest.mark.parametrize("name", SPECS)
def test_what_it_says_of_the_held_out_text_is_so(dense, text, name):
    spec = SPECS[name]
    model = convert(dense, spec, text)
    report = recovery_of(model)
    held_out = kept_apart(text)
    assert report.held_out_tokens == held_out.numel()
    assert report.before == pytest.approx(
        kl(dense, convert(dense, untrained(spec), text), held_out), rel=1e-4
    )
    assert report.after == pytest.approx(kl(dense, model, held_out), rel=1e-4)
    assert report.after <= report.before
    assert [look.step for look in report.looks] == sorted({0, 1, 2, 3, 4, 5, 6})


@pytest.mark.parametrize("rate", [1e-5, 1e-2, 3.0])
@pytest.mark.parametrize("name", ["alpha", "all", "router", "masks", "lora, inputs"])
def test_it_is_never_worse_on_the_held_out_text(dense, text, name, rate):
    """At a rate that ruins the model, it is what it was."""
    spec = replace(SPECS[name], recover_rate=rate)
    model = convert(dense, spec, text)
    report = recovery_of(model)
    assert report.after == min(look.held_out for look in report.looks) <= report.before
    if report.best == 0:
        plain = convert(dense, untrained(spec), text).state_dict()
        assert all(torch.equal(plain[n], tensor) for n, tensor in model.state_dict().items())
    elif rate == 3.0 and name != "alpha":
        assert report.looks[-1].held_out > report.after


def test_two_steps_by_hand(dense, text):
    """Plain code: a copy of the model, autograd through softmax, Adam from its definition."""
    spec = ConversionSpec(
        branches=4, keep=2, recover="all", recover_steps=2, recover_rate=3e-4, seed=3
    )
    samples = Samples.of(text, 2, 3, 2 * LENGTH)
    model = copy.deepcopy(convert(dense, untrained(spec)))
    parameters = [p for mlp in mlp_modules(model) for p in mlp.parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step, chosen in enumerate(samples.order):
        ids = samples.train[chosen]
        assert ids.numel() == 512
        with torch.no_grad():
            wanted = dense(ids).logits.flatten(0, 1)
        said = model(ids).logits.flatten(0, 1)
        loss = F.kl_div(
            said.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        gradients = torch.autograd.grad(loss, parameters)
        length = torch.cat([g.flatten() for g in gradients]).norm()
        shrink = min(1.0, CLIP / float(length))
        rate = 3e-4 * (1.0, 0.5)[step]  # no steps to warm up, then half a cosine
        for p, g, (first, second) in zip(parameters, gradients, moments, strict=True):
            g = g * shrink
            first.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
            second.mul_(BETAS[1]).add_(g * g, alpha=1 - BETAS[1])
            corrected = first / (1 - BETAS[0] ** (step + 1))
            root = (second / (1 - BETAS[1] ** (step + 1))).sqrt()
            with torch.no_grad():
                p -= rate * corrected / (root + 1e-8)
    made = convert(dense, spec, text)
    assert recovery_of(made).best == 2
    for expected, found in zip(model.parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


def test_who_is_near_learns_slower(dense, text):
    near = ConversionSpec(branches=4, fade=0.3, recover="all", recover_steps=2)
    report = recovery_of(convert(dense, near, text))
    assert report.before < 0.3
    assert report.rate == pytest.approx(3e-4 * report.before / 0.5)
    assert RECOVERIES["all"].rate_at(0.51) == RECOVERIES["all"].rate_at(9.0) == 3e-4
    asked = replace(near, recover_rate=3e-4)
    assert asked.canonical() != near.canonical()  # as in `recover all`, unlike in the next
    assert recovery_of(convert(dense, asked, text)).rate == 3e-4
    routers = SPECS["router"]
    usual = replace(routers, recover_rate=None)
    assert replace(routers, recover_rate=5e-2).canonical() == usual.canonical()
    assert recovery_of(convert(dense, usual, text)).rate == 5e-2


def test_the_rate_goes_up_and_down():
    heights = [height(step, 200) for step in range(200)]
    assert heights.index(max(heights)) == 20 and max(heights) == 1
    assert heights[0] == 1 / 21 and heights[-1] < 1e-3
    assert heights[20:] == sorted(heights[20:], reverse=True)


def test_the_divergence_and_its_gradient(monkeypatch):
    """Against autograd, a few tokens at a time."""
    monkeypatch.setattr(divergences, "AT_ONCE", 15)
    generator = torch.Generator().manual_seed(1)
    logits, wanted = (torch.randn(3, 4, 7, generator=generator).double() * 4 for _ in range(2))
    logits.requires_grad_()
    ours = divergences.divergence(logits, wanted)
    (gradient,) = torch.autograd.grad(2 * ours, logits)
    plain = F.kl_div(
        logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum"
    )
    (expected,) = torch.autograd.grad(2 * plain, logits)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        wanted[0, 0, 1:] = -torch.inf
        assert torch.isfinite(divergences.divergence(logits, wanted))
        wanted[0, 0] = torch.nan
        assert torch.isnan(divergences.divergence(logits, wanted))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "phi3", "gemma2"])
def test_it_begins_with_the_model_as_it_is(name, text):
    """The student says what the converted model says, to the bit, for any family."""
    dense, ids = build(name), text.samples[:3]
    for spec in (SPECS["all"], SPECS["lora, routed"], SPECS["router"]):
        model = convert(dense, untrained(spec), text)
        student = TensorStudent(model, spec)
        with torch.no_grad():
            assert torch.equal(student(ids), model(ids).logits)
        with torch.enable_grad():  # the softly routed experts, too
            torch.testing.assert_close(student(ids), model(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_router_is_that_of_a_soft_choice(dense, text):
    """Raising a score counts for an expert what its output would bring."""
    spec = SPECS["router"]
    model = convert(dense, untrained(spec))
    student = TensorStudent(model, spec)
    soft = student.twin.get_submodule("model.layers.0.mlp")
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    hard = mlp_modules(model)[0]
    chosen = hard.select(x)
    gates = soft.select(x)
    assert torch.equal(gates, chosen.float())
    torch.testing.assert_close(soft(x), hard(x))
    weight = soft.router.weight.detach().requires_grad_()
    soft.router.weight = torch.nn.Parameter(weight)
    soft(x).sum().backward()
    assert (soft.router.weight.grad.abs().sum(1) > 0).all()  # of every expert


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["all", "lora", "router", "alpha"])
def test_other_dtypes_stay_and_learn(text, dtype, name):
    dense = build("llama").to(dtype)
    model = convert(dense, replace(SPECS[name], recover_steps=12), text)
    report = recovery_of(model)
    plain = convert(dense, untrained(SPECS[name]), text)
    assert report.after < report.before and report.stopped is None
    for expected, found in zip(plain.parameters(), model.parameters(), strict=True):
        assert found.dtype == expected.dtype and found.requires_grad
    held_out = kept_apart(text)
    assert report.after == pytest.approx(kl(dense, model, held_out), rel=0.05)


def test_zeros_of_fade_stay(dense, text):
    for spec in (
        ConversionSpec(branches=4, fade_unit="2:4", recover="lora", recover_steps=4),
        SPECS["all, faded"],
    ):
        plain, model = convert(dense, untrained(spec)), convert(dense, spec, text)
        assert recovery_of(model).best > 0
        for one, other in zip(mlp_modules(plain), mlp_modules(model), strict=True):
            for name in ("gate", "up"):
                zeros = one.projections[name].weight == 0
                assert zeros.any()
                assert torch.equal(zeros, other.projections[name].weight == 0)


def test_the_seed_decides(dense, text):
    def trained(**values):
        return tensors(convert(dense, replace(SPECS["lora, routed"], **values), text))

    one, again, other = trained(seed=1), trained(seed=1), trained(seed=2)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def test_thresholds_tell_what_runs_after_training(dense, text):
    for method in ("random", "neurons", "inputs"):
        spec = ConversionSpec(
            method=method, active=0.5, selection="threshold", recover="all", recover_steps=6,
            recover_rate=3e-3, **({"experts": 4} if method == "random" else {}),
        )  # fmt: skip
        plain, model = convert(dense, untrained(spec), text), convert(dense, spec, text)
        assert recovery_of(model).best > 0
        seen = {}
        for number, mlp in enumerate(mlp_modules(model)):
            mlp.register_forward_pre_hook(
                lambda module, inputs, number=number, seen=seen: seen.setdefault(number, inputs[0])
            )
        with torch.no_grad():
            model(text.samples)
        for number, (mlp, before) in enumerate(
            zip(mlp_modules(model), mlp_modules(plain), strict=True)
        ):
            with torch.no_grad():
                counts = mlp.select(seen[number].flatten(0, 1)).sum(1).double().mean()
            active = mlp.active.read if method == "inputs" else mlp.active
            assert active == pytest.approx(float(counts), rel=1e-4)
            assert method == "random" or mlp.active != before.active


def test_what_was_observed_is_trained_on_too(dense, text):
    spec = SPECS["down, routed"]
    seen = convert(dense, spec, text)
    from_observed = convert_all(dense, [spec, untrained(spec)], observe(dense, text))[0]
    assert all(
        torch.equal(a, b)
        for a, b in zip(seen.parameters(), from_observed.parameters(), strict=True)
    )


def test_small_pieces_of_a_batch_change_nothing(dense, text, monkeypatch):
    spec = SPECS["all"]
    whole = convert(dense, spec, text)
    monkeypatch.setattr(courses, "LOGITS", 3 * LENGTH * VOCABULARY)
    for a, b in zip(whole.parameters(), convert(dense, spec, text).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# what goes wrong


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"recover": "gate"}, "one of none, alpha, router, masks, down, lora, all"),
        ({"recover": "alpha", "method": "cmoe"}, "only branches have an α to train"),
        ({"recover": "router"}, "the method mlpmoe has no router"),
        ({"recover": "router", "method": "neurons"}, "by its own weights"),
        ({"recover": "router", "method": "cmoe", "router": "oracle"}, "a bound"),
        ({"recover": "router", "method": "cmoe", "selection": "threshold"}, "more experts than"),
        ({"recover": "router", "method": "tokenclusters"}, "together with its masks"),
        ({"recover": "masks"}, "only experts that overlap have masks"),
        ({"recover": "masks", "method": "cmoe"}, "only experts that overlap have masks"),
        ({"recover": "masks", "method": "tokenclusters", "router": "oracle"}, "a bound"),
        ({"recover": "all", "recover_steps": 0}, "between 1 and 100,000"),
        ({"recover": "all", "recover_steps": 2.5}, "a whole number"),
        ({"recover": "all", "recover_rate": 0.0}, "more than 0"),
        ({"recover": "all", "recover_rate": float("nan")}, "a number between"),
    ],
)
def test_specs_that_are_refused(values, words):
    with pytest.raises(SpecError, match=words):
        ConversionSpec(**{"keep": 8} | values if "method" not in values else values)


def test_it_needs_a_calibration_text_that_is_long_enough(dense, text):
    spec = SPECS["alpha"]
    assert spec.needs_calibration and not untrained(spec).needs_calibration
    with pytest.raises(SpecError, match="needs a calibration text"):
        convert(dense, spec)
    with pytest.raises(SpecError, match=r"needs 576 calibration tokens.* the text has 512"):
        convert(dense, spec, Calibration(text.samples[:16]))
    assert recovery_of(convert(dense, spec, Calibration(text.samples[:18]))).held_out_tokens == 64


def test_too_little_memory_is_said_before_it_starts(dense, text, monkeypatch):
    monkeypatch.setattr(recovering, "available_memory", lambda device: 50_000_000)
    with pytest.raises(SpecError, match=r"needs about 0\.1 GB .* 0\.1 GB are free"):
        convert(dense, SPECS["all"], text)
    monkeypatch.setattr(recovering, "available_memory", lambda device: None)
    convert(dense, SPECS["all"], text)


def test_where_nothing_is_lost_nothing_is_trained(dense, text):
    for spec in (
        ConversionSpec(branches=4, recover="all"),
        ConversionSpec(method="random", active=1, recover="router"),
        ConversionSpec(branches=4, keep=2, spared="0,1", recover="all"),
    ):
        assert recovery_of(convert(dense, spec, text)) is None


def test_experts_that_are_all_shared_have_no_router_to_train(dense, text):
    spec = ConversionSpec(
        method="random", experts=4, active=0.5, shared=0.5, recover="router", recover_steps=2
    )
    convert(dense, replace(spec, shared=0.25), text)
    mlps = mlp_modules(convert(dense, untrained(spec), text))
    if not any(mlp.chooses for mlp in mlps):
        with pytest.raises(SpecError, match="none to train"):
            convert(dense, spec, text)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_loss_that_is_not_finite_ends_it(dense, text, monkeypatch, at):
    """What was best until then is kept; at the first step, the model as it was."""
    spec, calls = SPECS["all"], []
    train = courses.Course._train

    def poisoned(course):
        if course.step == at:
            forward = students.Student.forward
            monkeypatch.setattr(
                students.Student, "forward", lambda *inputs: forward(*inputs) * torch.nan
            )
        calls.append(course.step)
        return train(course)

    monkeypatch.setattr(courses.Course, "_train", poisoned)
    model = convert(dense, spec, text)
    report = recovery_of(model)
    assert report.stopped == f"the loss is not finite at step {at + 1}."
    assert report.steps == at and calls == list(range(at + 1))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    held_out = kept_apart(text)
    assert report.after == pytest.approx(kl(dense, model, held_out), rel=1e-4)
    assert (report.best == 0) == (at == 0)


def test_a_model_that_is_broken_is_left_as_it_is(dense, text):
    model = convert(dense, untrained(SPECS["all"]))
    with torch.no_grad():
        mlp_modules(model)[0].alpha.fill_(torch.nan)
    before = tensors(model)
    report = recover(dense, model, SPECS["all"], text)
    assert (report.steps, report.best) == (0, 0) and "not finite" in report.stopped
    assert all(
        torch.equal(
            before[n],
            t,
        )
        or n.endswith("alpha")
        for n, t in tensors(model).items()
    )


class Stopped(Exception):
    pass


def test_every_look_is_told_with_what_was_done_so_far(dense, text, tmp_path):
    told, spec = [], SPECS["all"]
    report = recovery_of(convert(dense, spec, text, on_look=told.append))
    assert [each.looks for each in told] == [report.looks[:n] for n in range(1, 8)]
    assert [each.steps for each in told] == [0, 1, 2, 3, 4, 5, 6]
    assert told[-1] == replace(report, seconds=told[-1].seconds, result=None)
    for each in told:
        assert each.after == min(look.held_out for look in each.looks)
        assert each.planned == each.asked == 6 and each.stopped is None

    def stop(so_far):
        if so_far.steps == 4:
            raise Stopped

    with pytest.raises(Stopped):
        convert(dense, spec, text, state=tmp_path, on_look=stop)
    again = []
    convert(dense, spec, text, state=tmp_path, on_look=again.append)
    assert [each.looks for each in again] == [each.looks for each in told[4:]]


def test_it_can_be_left_within_a_step(dense, text):
    """Between any two modules, by whoever is told or asks to stop."""
    told = []
    spec, model = SPECS["all"], convert(dense, untrained(SPECS["all"]))
    before = tensors(model)
    recover(copy.deepcopy(dense), copy.deepcopy(model), spec, text, lambda *said: told.append(said))
    per_step = len(told) / (spec.recover_steps + 2)
    assert per_step > 20
    for after in (0, 5, len(told) // 2, len(told) - 1):
        left = [after]

        def tell(*said, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Stopped

        with pytest.raises(Stopped):
            recover(dense, model, spec, text, tell)
        left[0] = after // 2
        with pytest.raises(Stopped), stoppable(tell):
            recover(dense, model, spec, text)
    assert all(torch.equal(before[n], tensor) for n, tensor in tensors(model).items())
    messages = [message for message, _ in told]
    assert messages[-1] == "training all, step 6 of 6"
    assert [share for _, share in told] == sorted(share for _, share in told)

"""What a calibration text is, and what is gathered of a layer's activations on it."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from mlpmoe.core import activations as module
from mlpmoe.core.calibration import Calibration, check_disjoint, few_tokens
from mlpmoe.core.conversion import convert
from mlpmoe.core.errors import CalibrationWarning, UserError
from mlpmoe.core.mlps import read_mlps
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.visiting import visit_layers
from tests.core.layers import (
    D_FF,
    D_MODEL,
    KINDS,
    LENGTH,
    SAMPLES,
    gated_and_h,
    layer_of,
    random_mlp,
)
from tests.families import FAMILIES, VOCABULARY, build
from tests.tiny import byte_tokenizer


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = "".join(LETTERS[i * i % 26] for i in range(1000))


# The text ----------------------------------------------------------------------------------


def without_bos() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


def test_samples_are_the_text_with_bos_in_front_of_each():
    tokenizer = byte_tokenizer()
    samples = Calibration.from_text(tokenizer, TEXT, tokens=320, length=32).samples
    assert samples.shape == (10, 32)
    assert samples.dtype == torch.int64
    assert (samples[:, 0] == tokenizer.bos_token_id).all()
    text = tokenizer.decode(samples.flatten(), skip_special_tokens=True)
    assert TEXT.startswith(text)
    assert len(text) >= 10 * 31 - 1


def test_the_first_sample_begins_like_the_text():
    tokenizer = byte_tokenizer()
    samples = Calibration.from_text(tokenizer, TEXT, length=32).samples
    assert samples[0].tolist() == tokenizer(TEXT, verbose=False)["input_ids"][:32]


def test_a_tokenizer_without_bos_gets_none():
    tokenizer = without_bos()
    samples = Calibration.from_text(tokenizer, TEXT, tokens=320, length=32).samples
    assert tokenizer.decode(samples.flatten()) == TEXT[:320]


def test_documents_are_tokenised_one_by_one():
    """The separator is no text of the model, and space around a document is none of it."""
    tokenizer = byte_tokenizer()
    text = f"{TEXT}\n<|endoftext|>\n{TEXT}<|endoftext|>\n"
    samples = Calibration.from_text(tokenizer, text, length=32).samples
    read = tokenizer.decode(samples.flatten(), skip_special_tokens=True)
    assert (TEXT + TEXT).startswith(read)
    assert len(read) > 1900


def test_no_more_tokens_than_the_text_has_or_than_are_wanted():
    tokenizer = byte_tokenizer()
    for tokens in (256, 500, 10**6):
        samples = Calibration.from_text(tokenizer, TEXT, tokens=tokens, length=32).samples
        assert samples.numel() <= tokens
        assert len(samples) == min(tokens // 32, 1001 // 31)


@pytest.mark.parametrize("text, tokens", [("too short", "10"), ("", "0"), (TEXT, "1,001")])
def test_too_little_text_is_refused_with_its_number_of_tokens(text, tokens):
    with pytest.raises(UserError, match=f"has {tokens} tokens; at least 2,048 are needed"):
        Calibration.from_text(byte_tokenizer(), text, length=256)


@pytest.mark.parametrize(
    ("tokens", "length", "words"),
    [(1024, 1, "needs 2 tokens at least, not 1"), (1024, 0, "2 tokens"), (1024, -3, "2 tokens"),
     (255, 32, "255 calibration tokens make 7 samples of 32; at least 8"), (0, 32, "at least 8")],
)  # fmt: skip
def test_samples_that_say_nothing_are_refused(tokens, length, words):
    with pytest.raises(UserError, match=words):
        Calibration.from_text(byte_tokenizer(), TEXT, tokens=tokens, length=length)


# Too few tokens for a fit ------------------------------------------------------------------


def test_the_measured_case_is_said_and_its_remedy_is_enough():
    """Of 1,536 neurons, where 4k tokens gave a much worse perplexity than 32k."""
    spec = ConversionSpec(keep=12, order="least-squares", compensation="refit")
    said = few_tokens(spec, 4096, 1536, 576)
    assert "1,536 neurons per layer on 4,096 calibration tokens" in said
    assert few_tokens(spec, 32_768, 1536, 576) is None
    needed = int(said.split("at least ")[1].rstrip(".").replace(",", ""))
    assert few_tokens(spec, needed, 1536, 576) is None
    assert few_tokens(spec, needed - 1, 1536, 576) is not None


@pytest.mark.parametrize(
    ("fields", "unknowns"),
    [
        ({}, 0),
        ({"keep": 8}, 0),
        ({"keep": 8, "order": "fluctuation", "compensation": "mean"}, 0),
        ({"keep": 8, "order": "activation", "compensation": "alpha"}, 0),
        ({"fade": 0.5, "fade_score": "wanda"}, 0),
        ({"keep": 8, "fade_score": "sparsegpt"}, 0),  # nothing fades
        ({"compensation": "refit"}, 0),  # nothing is lost
        ({"keep": 8, "compensation": "refit"}, 200),  # half of 400 neurons stay
        ({"fade": 0.5, "compensation": "refit"}, 400),
        ({"keep": 8, "order": "least-squares"}, 400),
        ({"fade": 0.5, "fade_score": "sparsegpt"}, 100),  # the inputs of gate and up
        ({"fade": 0.5, "fade_score": "sparsegpt", "fade_projections": "down"}, 400),
        ({"fade_unit": "2:4", "fade_score": "sparsegpt", "fade_projections": "up-down"}, 400),
        ({"fade": 0.5, "fade_score": "sparsegpt", "fade_unit": "neuron"}, 400),
        ({"method": "random", "router": "regression"}, 100),
        ({"method": "cmoe"}, 0),
    ],
    ids=str,
)
def test_what_is_fitted_decides_how_many_tokens_are_few(fields, unknowns):
    spec = ConversionSpec(**fields)
    if not unknowns:
        assert few_tokens(spec, 1, 400, 100) is None
        return
    assert f"{unknowns} " in few_tokens(spec, 8 * unknowns - 1, 400, 100)
    assert few_tokens(spec, 8 * unknowns, 400, 100) is None


def test_convert_warns_of_few_tokens_and_points_at_its_caller():
    model, samples = build("llama"), calibration().samples
    fitted = ConversionSpec(branches=4, keep=3, order="least-squares")
    with pytest.warns(CalibrationWarning, match=r"on 63 calibration tokens") as caught:
        convert(model, fitted, Calibration(samples))
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, fitted, Calibration(samples.repeat(9, 1)))
        convert(model, replace(fitted, order="fluctuation"), Calibration(samples))


LINE = "It was the best of times, it was the worst of times, it was the age of wisdom"


@pytest.mark.parametrize(
    "shared", [LINE, LINE.upper(), f"  {LINE}\t", LINE.replace(" ", "   ")], ids=str.strip
)
def test_texts_with_a_long_line_in_common_are_refused(shared):
    with pytest.raises(UserError, match="share a passage"):
        check_disjoint(f"first\n{LINE}\nlast", f"something else\r\n{shared}\nand more")


def test_other_texts_are_accepted_even_with_short_lines_in_common():
    check_disjoint(f"Chapter 1\n\n{LINE}\n", f"Chapter 1\n\n{LINE[:-1]}\n")
    check_disjoint("", "")


# Statistics --------------------------------------------------------------------------------


@pytest.fixture(params=[None, 1, 3 * LENGTH * D_FF], ids=["at once", "singly", "by three"])
def pieces(request, monkeypatch):
    """Activations are made in pieces: all at once, sample by sample, three samples at a time."""
    if request.param:
        monkeypatch.setattr(module, "CHUNK", request.param)


def close(actual, expected, tolerance=1e-5):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=tolerance, atol=tolerance)


@pytest.fixture(params=KINDS)
def layer(request, pieces):
    return layer_of(random_mlp(request.param))


def full(layer):
    """φ(gate x) and h, (samples, tokens, d_ff) in float64."""
    return gated_and_h(layer.weights, layer.x.double())


def test_figures_per_neuron(layer):
    gated, h = full(layer)
    flat = h.flatten(0, 1)
    assert layer.tokens == SAMPLES * LENGTH
    close(layer.gate_means("signed"), gated.mean(1))
    close(layer.gate_means("absolute"), gated.abs().mean(1))
    close(layer.mean, flat.mean(0))
    close(layer.mean_size, flat.abs().mean(0))
    close(layer.variance, flat.var(0, unbiased=False))
    close(layer.covariance.float(), torch.cov(flat.T, correction=0))
    close(layer.down_norms, layer.weights.down.square().sum(0).sqrt())


def test_mass_of_groups(layer):
    _, h = full(layer)
    groups = torch.randperm(D_FF, generator=torch.Generator().manual_seed(3))[:20].view(5, 4)
    weight = torch.rand(D_FF, generator=torch.Generator().manual_seed(4))
    for factor in (None, weight):
        size = h.flatten(0, 1).abs() * (1 if factor is None else factor)
        expected = torch.stack([size[:, group].sum(1) for group in groups], dim=1)
        close(layer.mass(groups, factor), expected)


def test_mean_where_a_mask_holds(layer):
    h = full(layer)[1].flatten(0, 1)
    groups = torch.randperm(D_FF, generator=torch.Generator().manual_seed(3))[:20].view(5, 4)
    mask = torch.rand(len(h), 5, generator=torch.Generator().manual_seed(5)) < 0.3
    mask[:, 2] = False
    found = layer.mean_where(mask, groups)
    assert (found[2] == 0).all()
    for n in (0, 1, 3, 4):
        close(found[n], h[mask[:, n]][:, groups[n]].mean(0))


@pytest.mark.parametrize("count", [1, 7, 40, SAMPLES * LENGTH, 1000])
def test_sizes_of_tokens_evenly_spaced(layer, count):
    h = full(layer)[1].flatten(0, 1)
    step = -(-len(h) // count)
    found = layer.sizes(count)
    assert len(found) <= count
    close(found, h[::step].abs())


def test_markers_are_the_strongest_neurons_of_each_token(layer):
    """CMoE: input and rows of gate and up are scaled to length 1 first, token by token here."""
    w = layer.weights
    found = layer.markers(3)
    assert found.shape == (SAMPLES * LENGTH, D_FF)
    for x, marked in zip(layer.x.flatten(0, 1).double(), found, strict=True):
        x = x / x.norm()
        up = (w.up.double() / w.up.double().norm(dim=1, keepdim=True)) @ x
        if w.gate is None:
            h = F.silu(up)
        else:
            h = F.silu((w.gate.double() / w.gate.double().norm(dim=1, keepdim=True)) @ x) * up
        expected = sorted(range(D_FF), key=lambda i: -abs(float(h[i])))[:3]
        assert marked.nonzero()[:, 0].tolist() == sorted(expected)


def test_more_markers_than_neurons(layer):
    assert layer.markers(D_FF + 5).all()


def test_figures_of_half_precision_are_summed_in_full():
    layer = layer_of(random_mlp(dtype=torch.bfloat16))
    exact = full(layer)[1].flatten(0, 1)
    close(layer.mean, exact.mean(0), 0.01)
    close(layer.variance, exact.var(0, unbiased=False), 0.03)
    assert layer.inputs().dtype == torch.float32
    assert layer.inputs().shape == (SAMPLES * LENGTH, D_MODEL)


# One pass over a model ---------------------------------------------------------------------

SOME = ("llama", "llama-bias", "phi3", "gpt2", "bloom", "mpt", "gemma", "falcon", "lfm2")


def calibration(samples=9, length=7):
    generator = torch.Generator().manual_seed(2)
    return Calibration(torch.randint(2, VOCABULARY, (samples, length), generator=generator))


def inputs_by_hooks(model, name, samples):
    """What each MLP of the dense model is given."""
    seen, hooks = [], []
    for layer in range(model.config.num_hidden_layers):
        mlp = model.get_submodule(FAMILIES[name].mlp.format(layer))
        hooks.append(mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    model(samples)
    for hook in hooks:
        hook.remove()
    return [x.reshape(*samples.shape, -1) for x in seen]


def inputs_by_visit(model, samples):
    seen = []

    def visit(layer, activations):
        assert layer == len(seen)
        seen.append(activations.x.clone())

    visit_layers(model, read_mlps(model), Calibration(samples), visit)
    return seen


@pytest.mark.parametrize("name", SOME)
def test_layers_are_visited_with_the_dense_model_s_inputs(name, pieces):
    model, samples = build(name), calibration().samples
    expected = inputs_by_hooks(model, name, samples)
    found = inputs_by_visit(model, samples)
    assert len(found) == len(expected)
    for actual, x in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_module_that_a_visit_returns_takes_part(name):
    """With MLPs that add nothing, layer 1 sees what it would see without an MLP in layer 0."""
    model, samples = build(name), calibration().samples
    other = build(name)
    with torch.no_grad():
        for parameter in other.get_submodule(FAMILIES[name].mlp.format(0)).parameters():
            parameter.zero_()
    expected = inputs_by_hooks(other, name, samples)
    seen = []

    class Nothing(torch.nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    def visit(layer, activations):
        seen.append(activations.x.clone())
        return Nothing()

    visit_layers(model, read_mlps(model), Calibration(samples), visit)
    torch.testing.assert_close(seen[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_the_dense_model_is_left_alone(name, training):
    model = build(name).train(training)
    before = {key: (tensor, tensor.clone()) for key, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    modes = {key: m.training for key, m in modules.items()}
    visit_layers(model, read_mlps(model), calibration(), lambda layer, activations: None)
    for key, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[key][0].data_ptr()
        assert torch.equal(tensor, before[key][1])
    now = dict(model.named_modules())
    assert now.keys() == modules.keys()
    for key, m in now.items():
        assert m is modules[key]
        assert m.training == modes[key]
        assert not m._forward_hooks and not m._forward_pre_hooks


def test_dropout_of_a_model_in_training_does_not_disturb():
    """GPT-2's MLP ends in dropout; the text is read in evaluation mode."""
    model, samples = build("gpt2", resid_pdrop=0.5), calibration().samples
    expected = inputs_by_visit(model, samples)
    found = inputs_by_visit(model.train(), samples)
    for actual, x in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, x, rtol=1e-5, atol=1e-5)

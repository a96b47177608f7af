"""Static conversions as dense checkpoints of every family, opened with stock transformers."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from mlpmoe import ConversionSpec, convert
from mlpmoe.checkpoints.forms.dense import dense_form
from mlpmoe.checkpoints.forms.form import EXACT, FormError
from mlpmoe.checkpoints.write.export import as_dtype
from mlpmoe.core.calibration import Calibration
from tests.families import D_FF, FAMILIES, VOCABULARY, build

IDS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(
    torch.randint(VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(2))
)
FADED = ConversionSpec(branches=4, fade=0.9)
NARROW = ConversionSpec(branches=5, keep=3)  # 27 of 44 neurons: sizes 9, 9, 9, 9, 8
FIXED_WIDTH = ("bloom", "mpt")  # no config says how wide their MLPs are


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


def reloaded(form, folder, dtype=torch.float32, shards="5GB"):
    """The form written, and opened with stock transformers; nothing may be missing."""
    form.skeleton.to(dtype).save_pretrained(
        folder, state_dict=as_dtype(form, dtype), max_shard_size=shards
    )
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


def difference(model, other):
    """max|Δlogit| / max|logit|."""
    wanted = model(IDS).logits
    return ((wanted - other(IDS).logits).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("spec", [FADED, NARROW], ids=["faded", "narrow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_as_itself(family, spec, tmp_path):
    converted = convert(build(family), spec)
    before = {name: tensor.clone() for name, tensor in converted.state_dict().items()}
    form = dense_form(converted)
    found = reloaded(form, tmp_path)
    assert type(found).__name__ == type(converted).__name__
    assert difference(converted, found) <= EXACT
    # making the form took nothing from the converted model, nor its activations' own parameters
    after = converted.state_dict()
    assert all(after[name].device.type == "cpu" for name in after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_neurons_are_gone_wherever_a_config_can_say_so(family, tmp_path):
    form = dense_form(convert(build(family), NARROW))
    found = reloaded(form, tmp_path)
    table = FAMILIES[family]
    down = found.get_submodule(table.mlp.format(0)).get_submodule(table.down).weight
    neurons = max(set(down.shape) - {found.get_input_embeddings().weight.shape[1]}, default=None)
    if family in FIXED_WIDTH:
        assert neurons == table.d_ff
        assert "fixed width" in form.notes[0]
    else:
        assert neurons == 27
        assert not form.notes


def test_layers_of_different_widths_are_filled_up_with_zeros(tmp_path):
    spec = ConversionSpec(
        branches=11, keep=6, order="norm", allocation="sensitivity", compensation="none"
    )
    converted = convert(build("llama", intermediate_size=D_FF), spec, CALIBRATION)
    widths = [sum(layer.mlp.sizes) for layer in converted.model.layers]
    if len(set(widths)) == 1:  # the random model's layers are alike: make one narrower
        converted.model.layers[0].mlp = copy.deepcopy(
            convert(build("llama"), ConversionSpec(branches=11, keep=4)).model.layers[0].mlp
        )
        widths = [sum(layer.mlp.sizes) for layer in converted.model.layers]
    assert len(set(widths)) > 1
    form = dense_form(converted)
    found = reloaded(form, tmp_path)
    assert found.config.intermediate_size == max(widths)
    assert difference(converted, found) <= EXACT
    assert f"{min(widths)} to {max(widths)} neurons" in form.notes[0]
    narrow = widths.index(min(widths))
    filled = found.model.layers[narrow].mlp.down_proj.weight[:, min(widths) :]
    assert filled.numel() and not filled.any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_spared_layers_keep_their_width_and_get_a_bias_of_zeros(family, tmp_path):
    spec = ConversionSpec(branches=11, keep=6, order="fluctuation", compensation="mean", spared="1")
    converted = convert(build(family), spec, CALIBRATION)
    form = dense_form(converted)
    assert difference(converted, reloaded(form, tmp_path)) <= EXACT
    assert f"24 to {D_FF} neurons" in form.notes[0]


@pytest.mark.parametrize("compensation", ["mean", "refit"])
@pytest.mark.parametrize(
    "family, opens_as",
    [
        ("llama", "LlamaForCausalLM"),
        ("granite", "GraniteForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("qwen2", "LlamaForCausalLM"),
        ("mistral", "LlamaForCausalLM"),
    ],
)
def test_biases_of_a_compensation_find_a_place(family, opens_as, compensation, tmp_path):
    model = build(family, **({"sliding_window": None} if family == "mistral" else {}))
    spec = ConversionSpec(branches=4, keep=3, order="fluctuation", compensation=compensation)
    converted = convert(model, spec, CALIBRATION)
    form = dense_form(converted)
    found = reloaded(form, tmp_path)
    assert type(found).__name__ == opens_as
    assert difference(converted, found) <= EXACT
    assert difference(model, found) > 0.01  # the biases, or the cut, do matter
    assert bool(form.notes) == (opens_as != type(model).__name__)


def test_a_bias_without_a_place_is_refused_with_what_would_work():
    spec = ConversionSpec(branches=4, keep=3, compensation="mean")
    converted = convert(build("qwen3"), spec, CALIBRATION)
    with pytest.raises(FormError, match="Qwen3ForCausalLM has no place for the bias"):
        dense_form(converted)


def test_a_window_of_attention_is_not_given_to_a_llama():
    spec = ConversionSpec(branches=4, keep=3, compensation="mean")
    converted = convert(build("mistral", sliding_window=8), spec, CALIBRATION)
    with pytest.raises(FormError, match="has no place for the bias"):
        dense_form(converted)


def test_routed_and_dense_models_are_no_static_conversions():
    routed = convert(build("llama"), ConversionSpec(method="contiguous", active=0.5, experts=4))
    with pytest.raises(FormError, match="chosen per token"):
        dense_form(routed)
    with pytest.raises(FormError, match="not converted"):
        dense_form(build("llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2"])
def test_the_dtype_of_the_files_is_kept(family, dtype, tmp_path):
    converted = convert(build(family, dtype), FADED)
    form = dense_form(converted)
    found = reloaded(form, tmp_path, dtype)
    assert found.dtype == dtype
    assert found.config.dtype == dtype
    # α is 1 and zeros are exact, so no weight was rounded
    saved = found.state_dict()
    folded = dict(form.tensors)
    assert all(torch.equal(saved[name], tensor) for name, tensor in folded.items())


def test_files_of_a_large_model_and_tied_weights(tmp_path):
    model = build("qwen2")
    assert model.config.tie_word_embeddings
    found = reloaded(dense_form(convert(model, NARROW)), tmp_path, shards="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert found.lm_head.weight.data_ptr() == found.get_input_embeddings().weight.data_ptr()


def test_what_did_not_change_is_not_copied():
    model = build("llama")
    form = dense_form(convert(model, ConversionSpec(branches=4)))
    own = model.state_dict()
    assert set(form.tensors) == set(own)
    copied = [
        name for name, tensor in form.tensors.items()
        if tensor.data_ptr() != own[name].data_ptr()
    ]  # fmt: skip
    assert copied == []

"""Stock MoE forms: saved, reloaded and compared with the converted model; or refused, and why."""

import json
from functools import cache

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from mlpmoe import ConversionSpec, convert
from mlpmoe.checkpoints.forms.form import EXACT, FormError, converted_mlps
from mlpmoe.checkpoints.forms.moe import MOE_FORMS, moe_form, possible_moe_forms, score_bounds
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import mlp_modules
from tests.families import VOCABULARY, build
from tests.tiny import tiny_model

GENERATOR = torch.Generator().manual_seed(4)
CALIBRATION = Calibration(torch.randint(2, VOCABULARY, (12, 16), generator=GENERATOR))
TOKENS = torch.randint(2, VOCABULARY, (6, 50), generator=GENERATOR)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ADAPTIVE = {"method": "expertweaver", "tau": 1.0, "experts": 22}
SHARING = {"method": "random", "shared": 0.2}
APPROXIMATE = [
    ("glm4-moe", "llama", ADAPTIVE),
    ("glm4-moe", "qwen2", ADAPTIVE),
    ("glm4-moe", "qwen3", ADAPTIVE),
    ("glm4-moe", "llama", {"method": "contiguous"}),
    ("glm4-moe", "qwen2", {"method": "coactivation", "shared": 0.2}),
    ("mixtral", "llama", {"method": "contiguous"}),
    ("mixtral", "mistral", {"method": "random"}),
    ("qwen2-moe", "qwen2", SHARING),
    ("qwen2-moe", "llama", {"method": "contiguous"}),
]


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


@cache
def _dense(family, dtype, config):
    config = json.loads(config)
    if family == "mistral":
        config = {"sliding_window": None} | config
    return build(family, dtype, **config)


def converted(family, spec, dtype=torch.float32, **config):
    dense = _dense(family, dtype, json.dumps({"num_hidden_layers": 4} | config))
    spec = {"method": "random", "experts": 11, "active": 0.5} | spec
    model = convert(dense, ConversionSpec(**spec), CALIBRATION)
    if spec["method"] == "expertweaver":
        assert len({mlp.shared for mlp in mlp_modules(model)}) > 1
    return model


def reloaded(form, folder):
    form.skeleton.save_pretrained(folder, state_dict=dict(form.tensors))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def differences(model, other, tokens=TOKENS):
    """max|Δlogit| of each token over max|logit|, and how often the likeliest token is the same."""
    mine, theirs = (m(tokens).logits.double().flatten(0, 1) for m in (model, other))
    assert len(mine) >= 200
    same = (mine.argmax(-1) == theirs.argmax(-1)).double().mean()
    return (mine - theirs).abs().amax(-1) / mine.abs().max(), float(same)


def refusal(function, *args):
    with pytest.raises(FormError) as caught:
        function(*args)
    return str(caught.value)


# The same model --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize(
    "spec",
    [
        {"method": "random"},
        SHARING,
        {"method": "contiguous", "active": 0.1},
        {"method": "random", "active": 1.0},
        {"method": "random", "active": 1.0, "shared": 0.9},
        {"method": "cmoe", "active": 1.0, "experts": 4},
    ],
    ids=str,
)
def test_granite_moe_is_exact(family, spec, tmp_path):
    model = converted(family, spec)
    form = moe_form(model, "granite-moe")
    assert form.architecture == "GraniteMoeSharedForCausalLM"
    assert form.exact
    error, same = differences(model, reloaded(form, tmp_path))
    assert error.max() <= EXACT
    assert same == 1


def test_granite_moe_of_16_bits_may_be_chosen_after_a_softmax():
    """As llama.cpp does it: over all experts, of which those of the largest shares run."""
    model = converted("llama", {"method": "contiguous", "experts": 12})
    bounds, mlps = score_bounds(model, TOKENS), converted_mlps(model)
    hidden = torch.randn(400, 32, generator=torch.Generator().manual_seed(3))
    agree = {}
    for dtype in (torch.bfloat16, torch.float32):
        form = moe_form(model, "granite-moe", bounds, dtype)
        assert ("llama.cpp" in form.notes[0]) == (dtype == torch.float32)
        agree[dtype] = []
        for index, mlp in enumerate(mlps.values()):
            rows = form.tensors[f"model.layers.{index}.block_sparse_moe.router.weight"]
            scores = hidden @ rows.T
            after = scores.softmax(-1).topk(int(mlp.active)).indices.sort().values
            before = scores.topk(int(mlp.active)).indices.sort().values
            agree[dtype].append((after == before).all(-1).double().mean().item())
            # and those that run count nearly the same
            weights = scores.topk(int(mlp.active)).values.softmax(-1) * mlp.active
            assert (weights - 1).abs().max() <= 2.0**-8
    assert min(agree[torch.bfloat16]) >= 0.98
    assert max(agree[torch.float32]) < 0.9  # which is what the note is for


def test_granite_moe_holds_all_biases_of_attention(tmp_path):
    model = converted("llama", SHARING, attention_bias=True)
    error, same = differences(model, reloaded(moe_form(model, "granite-moe"), tmp_path))
    assert error.max() <= EXACT and same == 1


@pytest.mark.parametrize(("name", "family", "spec"), APPROXIMATE, ids=str)
@pytest.mark.parametrize("measured", [True, False])
def test_others_are_nearly_the_same(name, family, spec, measured, tmp_path):
    model = converted(family, spec)
    bounds = score_bounds(model, TOKENS) if measured else None
    form = moe_form(model, name, bounds)
    assert ("guessed" in " ".join(form.notes)) == (not measured)
    error, same = differences(model, reloaded(form, tmp_path))
    assert error.median() <= 1e-3
    assert error.median() <= 2e-3
    assert (error > 5e-3).double().mean() <= 0.25  # another expert, there or in a token before
    assert same >= 0.98


@pytest.mark.parametrize(("name", "family", "spec"), APPROXIMATE, ids=str)
def test_experts_differ_only_where_scores_are_almost_equal(name, family, spec, tmp_path):
    model = converted(family, spec)
    bounds = score_bounds(model, TOKENS)
    other = reloaded(moe_form(model, name, bounds), tmp_path)
    generator = torch.Generator().manual_seed(5)
    for layer, theirs, bound in zip(model.model.layers, other.model.layers, bounds, strict=True):
        x = layer.post_attention_layernorm(torch.randn(1, 500, 32, generator=generator))
        scores = layer.mlp.router(x[0]).sort(descending=True).values
        k = int(layer.mlp.active)
        clear = scores[:, k - 1] - scores[:, k] > bound / 500
        assert clear.double().mean() > 0.9
        mine, said = layer.mlp(x)[0], theirs.mlp(x)[0]
        error = (mine - said).abs().amax(-1) / mine.abs().max()
        assert error[clear].max() <= 5e-3


def test_layers_share_more_or_less(tmp_path):
    model = converted("llama", ADAPTIVE)
    counts = [mlp.shared // mlp.size for mlp in mlp_modules(model)]
    form = moe_form(model, "glm4-moe", score_bounds(model, TOKENS))
    assert form.skeleton.config.n_shared_experts == max(1, min(counts))
    for index, count in enumerate(counts):
        bias = form.tensors[f"model.layers.{index}.mlp.gate.e_score_correction_bias"]
        assert int((bias > 1).sum()) == count - min(counts)
    error, same = differences(model, reloaded(form, tmp_path))
    assert error.median() <= 1e-3 and same >= 0.98
    assert {name for name, reason in possible_moe_forms(model).items() if not reason} == {
        "glm4-moe"
    }


def test_a_bias_of_the_router_chooses_the_same_experts(tmp_path):
    """With biases as large as the scores, leaving them out would choose others."""
    model = converted("llama", {"method": "coactivation"})
    for mlp in mlp_modules(model):
        mlp.router.bias.copy_(torch.arange(mlp.experts).roll(3) - mlp.experts / 2)
    bounds = score_bounds(model, TOKENS)
    other = reloaded(moe_form(model, "glm4-moe", bounds), tmp_path)
    generator = torch.Generator().manual_seed(6)
    for layer, theirs, bound in zip(model.model.layers, other.model.layers, bounds, strict=True):
        x = layer.post_attention_layernorm(torch.randn(500, 32, generator=generator))
        mlp = layer.mlp
        chosen = mlp.select(x)
        said = torch.zeros_like(chosen).scatter_(1, theirs.mlp.gate(x)[2], True)
        scores = mlp.router(x).sort(descending=True).values
        clear = scores[:, int(mlp.active) - 1] - scores[:, int(mlp.active)] > bound / 500
        assert clear.double().mean() > 0.9
        assert torch.equal(chosen[clear], said[clear])
        without = (mlp.router(x) - mlp.router.bias).topk(int(mlp.active)).indices
        alone = torch.zeros_like(chosen).scatter_(1, without, True)
        assert (chosen != alone).any(-1).double().mean() > 0.3


@pytest.mark.parametrize(
    ("name", "family", "spared"),
    [("glm4-moe", "llama", "0,1"), ("qwen2-moe", "qwen2", "0,1"), ("qwen2-moe", "llama", "0,2")],
)
def test_spared_layers_stay_dense(name, family, spared, tmp_path):
    spec = {"method": "random", "shared": 0.2, "spared": spared}
    model = converted(family, spec)
    form = moe_form(model, name, score_bounds(model, TOKENS))
    other = reloaded(form, tmp_path)
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(2))
    for layer in map(int, spared.split(",")):
        mine, theirs = (m.model.layers[layer].mlp for m in (model, other))
        assert torch.equal(mine(x), theirs(x))
    error, same = differences(model, other)
    assert error.median() <= 1e-3 and same >= 0.98


# What else a checkpoint carries ----------------------------------------------------------------


@pytest.mark.parametrize("name", MOE_FORMS)
def test_settings_and_positions_carry_over(name, tmp_path):
    settings = {
        "rope_parameters": LLAMA3,
        "rms_norm_eps": 1e-2,
        "max_position_embeddings": 128,
        "eos_token_id": [3, 4],
        "attention_dropout": 0.25,
        "initializer_range": 0.5,
        "hidden_act": "gelu",
    }
    model = converted("llama", {"method": "random"}, **settings)
    form = moe_form(model, name, score_bounds(model, TOKENS))
    other = reloaded(form, tmp_path)
    for key, value in settings.items():
        found = getattr(other.config, key)
        if key == "rope_parameters":
            found = {field: found[field] for field in value}
        assert found == value
    frequencies = model.model.rotary_emb.inv_freq
    assert torch.equal(other.model.rotary_emb.inv_freq, frequencies)
    assert not torch.equal(converted("llama", {}).model.rotary_emb.inv_freq, frequencies)
    error, _ = differences(model, other)
    assert error.median() <= 1e-3


@pytest.mark.parametrize("name", ["granite-moe", "glm4-moe", "mixtral", "qwen2-moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(name, tied, tmp_path):
    model = converted("llama", {"method": "random"}, tie_word_embeddings=tied)
    form = moe_form(model, name)
    assert ("lm_head.weight" in form.tensors) == (not tied)
    other = reloaded(form, tmp_path)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", MOE_FORMS)
def test_files_have_the_dtype_of_the_model(name, tmp_path):
    model = converted("llama", {"method": "random"}, torch.bfloat16)
    form = moe_form(model, name, score_bounds(model, TOKENS))
    other = reloaded(form, tmp_path)
    assert other.dtype == torch.bfloat16
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}
    router = ("mlp.gate.weight", "e_score_correction_bias") if name == "glm4-moe" else ()
    for key, dtype in dtypes.items():
        assert dtype == ("F32" if key.endswith(router or "none") else "BF16")
    assert ("16 bits" in " ".join(form.notes)) == (name != "glm4-moe")
    error, same = differences(model, other)
    assert error.median() <= 0.05 and same >= 0.8


def test_float16_needs_a_router_in_float32(tmp_path):
    model = converted("llama", {"method": "random"}, torch.float16)
    possible = possible_moe_forms(model)
    assert possible.pop("glm4-moe") is None
    assert all("float16 rounds them to zero" in reason for reason in possible.values())


@pytest.mark.parametrize("name", ["glm4-moe", "mixtral"])
def test_heads_of_their_own_size(name, tmp_path):
    model = converted("llama", {"method": "random"}, head_dim=16)
    other = reloaded(moe_form(model, name, score_bounds(model, TOKENS)), tmp_path)
    error, same = differences(model, other)
    assert error.median() <= 1e-3 and same >= 0.98


def test_mixtral_carries_a_sliding_window(tmp_path):
    model = converted("mistral", {"method": "random"}, sliding_window=8)
    form = moe_form(model, "mixtral", score_bounds(model, TOKENS))
    other = reloaded(form, tmp_path)
    assert other.config.sliding_window == 8
    error, same = differences(model, other)
    assert error.median() <= 1e-3 and same >= 0.98
    everything = converted("mistral", {"method": "random"})
    assert differences(model, everything)[0].max() > 0.1


@pytest.mark.parametrize("name", MOE_FORMS)
def test_experts_are_filled_up_with_zeros(name):
    """11 experts of 4 neurons: too narrow for the kernels of grouped products."""
    model = converted("llama", {"method": "random"})
    form = moe_form(model, name)
    gate_up, down = (
        next(t for key, t in form.tensors.items() if key.endswith(f"experts.{part}_proj"))
        for part in ("gate_up", "down")
    )
    assert gate_up.shape == (11, 16, 32) and down.shape == (11, 32, 8)
    gate, up = gate_up.chunk(2, dim=1)
    assert torch.equal(gate[:, :4].flatten(0, 1), mlp_modules(model)[0].gate)
    assert torch.equal(up[:, :4].flatten(0, 1), mlp_modules(model)[0].up)
    assert not (gate[:, 4:].any() or up[:, 4:].any() or down[..., 4:].any())
    assert any("filled up with zeros, from 4 neurons" in note for note in form.notes)


def test_wide_experts_stay_as_they_are():
    model = convert(tiny_model(), ConversionSpec(method="contiguous", experts=3))
    form = moe_form(model, "granite-moe")
    assert form.skeleton.config.intermediate_size == 16
    assert not any("zeros" in note for note in form.notes)


def test_the_model_stays_as_it_was_and_lends_its_other_tensors():
    model = converted("llama", ADAPTIVE)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    form = moe_form(model, "glm4-moe", score_bounds(model, TOKENS))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    key = "model.layers.0.self_attn.q_proj.weight"
    assert form.tensors[key].data_ptr() == after[key].data_ptr()
    assert all(parameter.is_meta for parameter in form.skeleton.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_score_bounds_are_the_largest_scores():
    model = converted("llama", {"method": "coactivation"})
    found = score_bounds(model, TOKENS[:1])
    assert found == score_bounds(model, TOKENS[0])
    hooks, largest = [], []
    for mlp in mlp_modules(model):

        def watch(module, args, scores):
            scores = scores - module.bias
            largest.append(float((scores - scores.mean(-1, keepdim=True)).abs().max()))

        hooks.append(mlp.router.register_forward_hook(watch))
    model(TOKENS[:1])
    assert found == pytest.approx(largest, rel=1e-4)


# Refusals --------------------------------------------------------------------------------------

ALL = MOE_FORMS


@pytest.mark.parametrize(
    ("names", "family", "spec", "config", "words"),
    [
        (ALL, "llama", {"selection": "threshold"}, {}, "chosen by a threshold"),
        (ALL, "llama", {"compensation": "mean"}, {}, "count with their mean output"),
        (ALL, "llama", {"router": "similarity"}, {}, "not linear in the MLP's input"),
        (ALL, "llama", {"router": "oracle"}, {}, "not linear in the MLP's input"),
        (ALL, "llama", {"method": "cmoe"}, {}, "not linear in the MLP's input"),
        (ALL, "llama", {"method": "random", "active": 1.0, "shared": 1.0}, {}, "are shared"),
        (ALL, "llama", {"method": "random"}, {"mlp_bias": True}, "MLPs have biases"),
        (ALL, "gpt_neox", {"method": "random"}, {}, "MLPs have no gate"),
        (ALL, "gemma", {"method": "random"}, {}, "does beside its MLPs"),
        (("granite-moe", "qwen2-moe"), "llama", ADAPTIVE, {}, "differ in number from layer"),
        (("mixtral",), "llama", SHARING, {}, "no place for shared experts."),
        (ALL, "llama", {"method": "random", "spared": "0,1,2,3"}, {}, "nothing is routed"),
        (
            ("granite-moe", "mixtral"),
            "llama",
            {"method": "random", "spared": "0,1"},
            {},
            "first layers that are dense",
        ),
        (
            ("granite-moe", "glm4-moe", "mixtral"),
            "llama",
            {"method": "random", "spared": "2"},
            {},
            "dense layers behind routed ones",
        ),
        (("mixtral",), "qwen2", {"method": "random"}, {}, "q, k and v biases"),
        (
            ("glm4-moe", "qwen2-moe"),
            "llama",
            {"method": "random"},
            {"attention_bias": True},
            "a bias after attention",
        ),
        (
            ("granite-moe", "mixtral", "qwen2-moe"),
            "qwen3",
            {"method": "random"},
            {},
            "norms of queries and keys",
        ),
        (
            ("granite-moe", "mixtral", "qwen2-moe"),
            "llama",
            {"method": "coactivation", "shared": 0.0},
            {},
            "a router with a bias",
        ),
        (
            ("granite-moe", "qwen2-moe"),
            "llama",
            {"method": "random"},
            {"head_dim": 16},
            "heads of another size",
        ),
        (
            ("granite-moe", "glm4-moe", "qwen2-moe"),
            "mistral",
            {"method": "random"},
            {"sliding_window": 8},
            "a sliding window",
        ),
        (
            ("granite-moe", "glm4-moe", "qwen2-moe"),
            "qwen2",
            {"method": "random"},
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "a sliding window",
        ),
        (
            ("glm4-moe",),
            "llama",
            {"method": "random", "active": 1.0, "shared": 0.9},
            {},
            "a single routed expert",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_held_is_refused(names, family, spec, config, words):
    model = converted(family, spec, **config)
    possible = possible_moe_forms(model)
    assert tuple(possible) == MOE_FORMS
    for name, reason in possible.items():
        if name in names:
            assert words in reason
            assert reason.endswith(".") and reason.count(". ") == 0
            assert refusal(moe_form, model, name) == reason
        elif reason is None:
            moe_form(model, name)
        else:
            assert words not in reason


def test_a_window_that_no_layer_uses_is_no_obstacle(tmp_path):
    config = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 9}
    model = converted("qwen2", {"method": "random"}, **config)
    error, same = differences(model, reloaded(moe_form(model, "granite-moe"), tmp_path))
    assert error.max() <= EXACT and same == 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ConversionSpec(branches=4), "nothing is routed"),
        (ConversionSpec(method="neurons"), "single neurons"),
        (ConversionSpec(method="inputs"), "inputs that each matrix reads"),
        (ConversionSpec(method="lowrank", router="directions"), "into two factors"),
    ],
)
def test_conversions_without_experts_are_refused(spec, words):
    model = convert(build("llama"), spec)
    for name, reason in possible_moe_forms(model).items():
        assert words in reason
        assert refusal(moe_form, model, name) == reason


def test_a_dense_model_is_refused():
    dense = build("llama")
    assert "not converted" in refusal(moe_form, dense, "glm4-moe")
    assert "not converted" in possible_moe_forms(dense)["glm4-moe"]
    assert "not converted" in refusal(score_bounds, dense, TOKENS)


def test_layers_of_different_conversions_are_refused():
    model, other = (converted("llama", {"method": "random", "experts": n}) for n in (4, 11))
    model.model.layers[1].mlp = other.model.layers[1].mlp
    assert "layers differ" in refusal(moe_form, model, "glm4-moe")


def test_a_model_with_parts_of_its_own_is_refused():
    model = converted("llama", {"method": "random"})
    model.model.layers[0].extra = nn.Linear(2, 2)
    assert "does not fit this model at model.layers.0.extra" in refusal(
        moe_form, model, "granite-moe"
    )


def test_names_and_bounds_that_make_no_sense_are_refused():
    model = converted("llama", {"method": "random"})
    assert all(name in refusal(moe_form, model, "llama4") for name in MOE_FORMS)
    assert "needs 4 values" in refusal(moe_form, model, "glm4-moe", [1.0])

"""The form branches: a folder that opens with transformers alone and computes what the converted
model computes, keeps what is trained, and cannot be mistaken for a stock checkpoint."""

import ast
import gc
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from mlpmoe import ConversionSpec, convert
from mlpmoe.checkpoints.forms.branches import MODELING, branch_form
from mlpmoe.checkpoints.forms.form import EXACT, FormError
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import mlp_modules, recovery_of
from tests.families import FAMILIES, VOCABULARY, build

GENERATOR = torch.Generator().manual_seed(3)
CALIBRATION = Calibration(torch.randint(2, VOCABULARY, (12, 12), generator=GENERATOR))
TOKENS = torch.randint(2, VOCABULARY, (4, 20), generator=GENERATOR)
SOME = ("llama", "llama-bias", "qwen2", "gpt2", "phi3", "apertus", "bloom", "mpt", "lfm2")

KEPT = ConversionSpec(branches=5, keep=3, fade=0.9)
STATIC = (
    KEPT,
    ConversionSpec(branches=5, fade=0.9, fade_unit="neuron", order="norm"),
    ConversionSpec(branches=8, keep=5, allocation="sensitivity", compensation="alpha"),
    ConversionSpec(branches=5, keep=3, order="fluctuation", compensation="mean"),
    ConversionSpec(branches=5, keep=3, order="activation", compensation="refit"),
)
EXPERTS = {"experts": 11, "active": 0.5}
CMOE = ConversionSpec(method="cmoe", **EXPERTS, compensation="mean")
NEURONS = ConversionSpec(
    method="neurons", active=0.5, router="gate-norm", selection="threshold", compensation="refit"
)
INPUTS = ConversionSpec(
    method="inputs", active=0.5, selection="threshold", compensation="refit"
)  # fmt: skip
CLUSTERS = ConversionSpec(method="tokenclusters", experts=3, active=0.5, compensation="mean")
DIRECTIONS = ConversionSpec(
    method="lowrank", active=0.8, router="directions-token", compensation="mean"
)  # fmt: skip
EACH = [KEPT, CMOE, NEURONS, INPUTS, CLUSTERS, DIRECTIONS]
EACH_NAME = ["static", "experts", "neurons", "inputs", "clusters", "directions"]
ROUTED = (
    CMOE,
    NEURONS,
    ConversionSpec(method="neurons", active=0.5),
    ConversionSpec(method="expertweaver", **EXPERTS, tau=0.8),
    ConversionSpec(method="expertweaver", **EXPERTS, selection="threshold"),
    ConversionSpec(method="moefication", **EXPERTS, compensation="refit"),
    ConversionSpec(method="coactivation", **EXPERTS, shared=0.2, selection="threshold"),
    ConversionSpec(method="random", experts=11, active=1.0),
    ConversionSpec(method="cmoe", **EXPERTS, spared="1"),
    INPUTS,
    ConversionSpec(method="inputs", active=0.5),
    ConversionSpec(method="inputs", active=0.5, router="inputs", compensation="mean"),
    ConversionSpec(method="inputs", active=0.5, router="inputs-norm", selection="threshold"),
    ConversionSpec(method="inputs", active=1.0),
    CLUSTERS,
    ConversionSpec(method="tokenclusters", active=0.3, router="regression", compensation="refit"),
    ConversionSpec(method="tokenclusters", active=1.0),
    DIRECTIONS,
    ConversionSpec(method="lowrank", active=0.6, router="directions"),
    ConversionSpec(method="lowrank", active=0.6, spared="0", compensation="refit"),
    ConversionSpec(method="lowrank", active=1.0),
)


@pytest.fixture(autouse=True, scope="module")
def code_cache(tmp_path_factory):
    """Where transformers copies the code of checkpoints that it opens: not the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", list(sys.path))
        yield


@cache
def dense(family):
    return build(family)


def written(model, tmp_path, name="checkpoint"):
    """The folder of the form, written as its contract says; the code's workspace is gone."""
    workspace, folder = tmp_path / "workspace", tmp_path / name
    workspace.mkdir()
    form = branch_form(model, workspace)
    form.skeleton.save_pretrained(folder, state_dict=dict(form.tensors))
    shutil.rmtree(workspace)
    return folder


def reopened(folder, **values):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **values
    )
    assert not any(info.values()), info
    return model


@torch.no_grad()
def difference(actual, expected, tokens=TOKENS):
    """max|Δlogit| / max|logit|."""
    logits, wanted = actual(tokens).logits.float(), expected(tokens).logits.float()
    return float((logits - wanted).abs().max() / wanted.abs().max())


# The same function -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", EACH, ids=EACH_NAME)
@pytest.mark.parametrize("family", SOME)
def test_every_family_comes_back(family, spec, tmp_path):
    model = convert(dense(family), spec, CALIBRATION)
    again = reopened(written(model, tmp_path))
    assert difference(again, model) <= EXACT
    assert difference(dense(family), model) > 0.01  # there is something to see
    assert again.config.model_type == f"mlpmoe_{model.config.model_type}"
    assert isinstance(again, type(model))


@pytest.mark.parametrize("spec", STATIC + ROUTED, ids=lambda spec: spec.to_flags())
def test_every_kind_of_conversion_comes_back(spec, tmp_path):
    model = convert(dense("llama-bias"), spec, CALIBRATION)
    assert difference(reopened(written(model, tmp_path)), model) <= EXACT


def test_trained_masks_come_back(tmp_path):
    """With layers whose experts differ in size."""
    generator = torch.Generator().manual_seed(5)
    text = Calibration(torch.randint(2, VOCABULARY, (160, 32), generator=generator))
    spec = ConversionSpec(
        method="tokenclusters", experts=3, active=0.5, recover="masks", recover_steps=20
    )
    model = convert(dense("llama"), spec, text)
    sizes = [mlp.size for mlp in mlp_modules(model)]
    assert recovery_of(model).best > 0 and sum(sizes) == 44 and len(set(sizes)) > 1
    assert difference(reopened(written(model, tmp_path)), model) <= EXACT


def test_an_activation_function_with_parameters_keeps_them(tmp_path):
    model = convert(dense("apertus"), CMOE, CALIBRATION)
    again = reopened(written(model, tmp_path))
    for mlp, other in zip(mlp_modules(model), mlp_modules_of(again), strict=True):
        assert mlp.act_fn.alpha_p.item() != 0.8
        assert torch.equal(mlp.act_fn.alpha_p, other.act_fn.alpha_p)
        assert torch.equal(mlp.act_fn.alpha_n, other.act_fn.alpha_n)


def mlp_modules_of(opened):
    return [opened.get_submodule(mlp["path"]) for mlp in opened.config.mlps]


def test_equal_scores_go_to_the_experts_of_lower_index(tmp_path):
    model = convert(dense("llama"), CMOE, CALIBRATION)
    scored = convert(dense("llama"), ConversionSpec(method="contiguous", **EXPERTS))
    for mlp in mlp_modules(scored):
        nn.init.zeros_(mlp.router.weight)
    again = reopened(written(scored, tmp_path))
    assert difference(again, scored) <= EXACT
    assert difference(again, model) > 0.01
    mlp = mlp_modules_of(again)[0]
    chosen = mlp.select(torch.randn(3, 32))
    assert chosen[:, : mlp.active].all() and not chosen[:, mlp.active :].any()


@pytest.mark.parametrize("spec", EACH, ids=EACH_NAME)
@pytest.mark.parametrize("family", ["llama", "bloom", "lfm2"])
def test_generating_with_a_cache_from_a_padded_batch(family, spec, tmp_path):
    model = convert(dense(family), spec, CALIBRATION)
    again = reopened(written(model, tmp_path))
    tokens = TOKENS[:2].clone()
    mask = torch.ones_like(tokens)
    tokens[1, :7], mask[1, :7] = 0, 0
    values = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    made = again.generate(tokens, **values)
    assert made.shape == (2, 32)
    assert torch.equal(made, model.generate(tokens, **values))
    assert torch.equal(made, again.generate(tokens, **values, use_cache=False))
    alone = again.generate(tokens[1:, 7:], max_new_tokens=12, do_sample=False)
    assert torch.equal(made[1:, 7:], alone)


def test_routers_stay_float32_in_a_model_that_is_not(tmp_path):
    stored = tmp_path / "dense"
    build("llama", torch.bfloat16).save_pretrained(stored)
    base = LlamaForCausalLM.from_pretrained(stored)
    for index, spec in enumerate((CMOE, NEURONS, INPUTS, ROUTED[5], ROUTED[6])):
        model = convert(base, spec, CALIBRATION)
        again = reopened(written(model, tmp_path, f"out{index}"))
        assert again.dtype == again.config.dtype == torch.bfloat16
        own, float32 = model.state_dict(), set()
        for name, tensor in again.state_dict().items():
            assert tensor.dtype == own[name].dtype, name
            assert torch.equal(tensor, own[name]), name
            if tensor.dtype == torch.float32:
                float32.add(name.split(".")[4])
        importances = {NEURONS: {"importance"}, INPUTS: {"importance", "input_importance"}}
        assert float32 == importances.get(spec, {"router"})
        x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
        for mlp, other in zip(mlp_modules(model), mlp_modules_of(again), strict=True):
            with torch.no_grad():
                if spec in importances:
                    assert torch.equal(mlp(x), other(x))
                else:
                    assert torch.equal(mlp.select(x), other.select(x))
                    error = (mlp(x) - other(x)).float().norm() / mlp(x).float().norm()
                    assert error < 0.01


def test_opened_in_another_dtype_the_router_stays(tmp_path):
    model = convert(dense("llama"), CMOE, CALIBRATION)
    again = reopened(written(model, tmp_path), dtype=torch.bfloat16)
    assert again.lm_head.weight.dtype == torch.bfloat16
    for mlp, other in zip(mlp_modules(model), mlp_modules_of(again), strict=True):
        assert torch.equal(mlp.router.up, other.router.up)
        assert other.up.dtype == torch.bfloat16


@pytest.mark.parametrize("spec", EACH, ids=EACH_NAME)
@pytest.mark.parametrize("family", ["llama", "apertus"])
def test_weights_may_stay_on_disk(family, spec, tmp_path):
    model = convert(dense(family), spec, CALIBRATION)
    again = reopened(
        written(model, tmp_path), device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    assert all(parameter.is_meta for parameter in again.parameters())
    assert difference(again, model) <= EXACT


# In a process without mlpmoe ---------------------------------------------------------------

OPEN = """
import sys
sys.modules["mlpmoe"] = None  # from here on, importing it fails
import torch
from transformers import AutoModelForCausalLM
tokens = torch.load("tokens.pt")
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        torch.save(model(tokens).logits, f"{folder}.pt")
assert not any(name.startswith("mlpmoe.") for name in sys.modules)
"""


def test_they_open_where_mlpmoe_is_not_installed(tmp_path, monkeypatch):
    models = {
        name: convert(dense("qwen2"), spec, CALIBRATION)
        for name, spec in (("static", KEPT), ("routed", CMOE))
    }
    for name, model in models.items():
        written(model, tmp_path, name)
    torch.save(TOKENS, tmp_path / "tokens.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = subprocess.run(
        [sys.executable, "-I", "-c", OPEN, *models], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    for name, model in models.items():
        with torch.no_grad():
            expected = model(TOKENS).logits
        error = (torch.load(tmp_path / f"{name}.pt") - expected).abs().max()
        assert error <= EXACT * expected.abs().max()


def test_the_code_imports_torch_and_transformers_only():
    source = MODELING.read_text(encoding="utf-8")
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.partition(".")[0])
    assert roots == {"torch", "transformers"}
    assert len(source.splitlines()) < 350  # people will read it


# The files, and what else opens them -------------------------------------------------------


def test_the_folder_names_its_code(tmp_path):
    folder = written(convert(dense("qwen2"), KEPT), tmp_path)
    names = {file.name for file in folder.iterdir()}
    code = MODELING.name
    assert names == {"config.json", "generation_config.json", "model.safetensors", code}
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_mlpmoe.MLPMoEConfig",
        "AutoModelForCausalLM": "modeling_mlpmoe.MLPMoEForCausalLM",
    }
    assert config["architectures"] == ["MLPMoEForCausalLM"]
    assert [mlp["sizes"] for mlp in config["mlps"]] == [[9, 9, 9, 9, 8][:3]] * 2
    source, ours = (folder / code).read_text(), MODELING.read_text()
    changed = {("LlamaConfig", "Qwen2Config"), ("LlamaForCausalLM", "Qwen2ForCausalLM")}
    for llama, qwen in changed:
        assert qwen in source
        ours = ours.replace(f"import {llama} as", f"import {qwen} as")
    assert source == ours


@pytest.mark.parametrize("spec", [KEPT, CMOE], ids=["static", "routed"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_its_code_it_fails_instead_of_getting_random_mlps(family, spec, tmp_path):
    folder = written(convert(dense(family), spec, CALIBRATION), tmp_path)
    for opener in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            opener.from_pretrained(folder, trust_remote_code=False)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] not in transformers.CONFIG_MAPPING
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"mlpmoe_{FAMILIES[family].model_type}"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_the_settings_of_generation_come_along(tmp_path):
    model = convert(build("llama"), KEPT)
    model.generation_config.max_new_tokens = 7
    again = reopened(written(model, tmp_path))
    assert again.generation_config.max_new_tokens == 7
    assert again.generation_config.bos_token_id == model.config.bos_token_id


def test_tensors_are_the_converted_model_s_without_tied_copies(tmp_path):
    model = convert(dense("qwen2"), KEPT)
    form = branch_form(model, tmp_path)
    own = model.state_dict()
    assert set(own) - set(form.tensors) == {"lm_head.weight"}
    assert all(tensor.data_ptr() == own[name].data_ptr() for name, tensor in form.tensors.items())
    assert all(parameter.is_meta for parameter in form.skeleton.parameters())
    assert form.name == "branches" and form.remote_code and form.exact
    assert form.architecture == "MLPMoEForCausalLM"


def test_imported_code_goes_with_the_form(tmp_path):
    def ours():
        return [name for name in sys.modules if name.startswith("mlpmoe_form")]

    gc.collect()
    assert not ours()
    first = branch_form(convert(dense("llama"), KEPT), tmp_path)
    (tmp_path / "other").mkdir()
    second = branch_form(convert(dense("gpt2"), KEPT), tmp_path / "other")
    assert len(ours()) == 2
    for form, base in ((first, "LlamaForCausalLM"), (second, "GPT2LMHeadModel")):
        form.skeleton.save_pretrained(tmp_path / base, state_dict=dict(form.tensors))
        assert f"import {base} as" in (tmp_path / base / MODELING.name).read_text()
    del first, second, form
    gc.collect()
    assert not ours()


# Fine-tuning -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_trained_alpha_is_saved_and_comes_back(family, tmp_path):
    opened = reopened(written(convert(dense(family), KEPT), tmp_path))
    alphas = [mlp.alpha for mlp in mlp_modules_of(opened)]
    before = [alpha.detach().clone() for alpha in alphas]
    opened.requires_grad_(False)
    for alpha in alphas:
        alpha.requires_grad_(True)
    optimizer = torch.optim.SGD(alphas, lr=0.01)
    first = opened(TOKENS, labels=TOKENS).loss
    first.backward()
    optimizer.step()
    for alpha, old in zip(alphas, before, strict=True):
        assert (alpha != old).all()
    with torch.no_grad():
        assert opened(TOKENS, labels=TOKENS).loss < first
    opened.save_pretrained(tmp_path / "trained")
    assert (tmp_path / "trained" / MODELING.name).is_file()
    again = reopened(tmp_path / "trained")
    for alpha, mlp in zip(alphas, mlp_modules_of(again), strict=True):
        assert torch.equal(alpha, mlp.alpha)
    assert difference(again, opened) == 0


def test_the_gradient_of_alpha_is_that_of_the_converted_model(tmp_path):
    model = convert(dense("llama"), KEPT)
    opened = reopened(written(model, tmp_path))
    found = []
    for either, mlps in ((model, mlp_modules(model)), (opened, mlp_modules_of(opened))):
        alphas = [mlp.alpha for mlp in mlps]
        found.append(torch.autograd.grad(either(TOKENS, labels=TOKENS).loss, alphas))
    for expected, actual in zip(*found, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("spec", EACH[1:], ids=EACH_NAME[1:])
def test_experts_can_be_trained_too(spec, tmp_path):
    opened = reopened(written(convert(dense("llama"), spec, CALIBRATION), tmp_path))
    opened.train()(TOKENS, labels=TOKENS).loss.backward()
    for mlp in mlp_modules_of(opened):
        for matrix in (mlp.gate, mlp.up, mlp.down):
            matrix = getattr(matrix, "first", matrix)
            assert matrix.grad.abs().max() > 0
    opened.save_pretrained(tmp_path / "again")
    assert difference(reopened(tmp_path / "again"), opened.eval()) == 0


# Refusals and notes ------------------------------------------------------------------------


def test_the_oracle_is_refused_unless_it_has_nothing_to_say(tmp_path):
    oracle = {"method": "contiguous", "router": "oracle", "experts": 11}
    model = convert(dense("llama"), ConversionSpec(**oracle, active=0.5))
    with pytest.raises(FormError, match="OracleRouter is a bound"):
        branch_form(model, tmp_path)
    model = convert(dense("llama"), ConversionSpec(**oracle, active=1.0))
    assert difference(reopened(written(model, tmp_path)), dense("llama")) <= EXACT


class OwnLlama(LlamaForCausalLM):
    """What a person may have derived; transformers does not know it."""


def test_base_models_that_transformers_does_not_have_are_refused(tmp_path):
    with pytest.raises(FormError, match="not converted"):
        branch_form(dense("llama"), tmp_path)
    own = OwnLlama(dense("llama").config).eval()
    with pytest.raises(FormError, match="OwnLlama is not one of the classes of transformers"):
        branch_form(convert(own, KEPT), tmp_path)


def test_code_that_cannot_be_used_is_not_left_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr("mlpmoe.checkpoints.forms.branches.skeleton_of", fail)
    gc.collect()
    with pytest.raises(RuntimeError, match="no room"):
        branch_form(convert(dense("llama"), KEPT), tmp_path)
    assert not [name for name in sys.modules if name.startswith("mlpmoe_form")]


def test_notes_say_what_it_takes(tmp_path):
    lines = len(Path(MODELING).read_text().splitlines())
    for spec, reason, words in (
        (KEPT, None, "fine-tuning"),
        (CMOE, None, "experts and their routers"),
        (CMOE, "the moon is full.", "the moon is full"),
    ):
        notes = branch_form(convert(dense("llama"), spec, CALIBRATION), tmp_path, reason).notes
        assert notes[0].startswith("This is not a stock checkpoint") and words in notes[0]
        assert "trust_remote_code=True only" in notes[1]
        assert f"read it ({lines} lines) before you allow" in notes[1]

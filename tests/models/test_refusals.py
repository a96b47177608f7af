"""What people bring that is not a whole plain model: what it is, and what to bring instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, CLIPVisionConfig

from mlpmoe.core.errors import UserError
from mlpmoe.models.loading import load


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, device="cpu")
    message = str(caught.value)
    assert str(folder.parent) not in message
    assert message.isprintable() and message.endswith(".") and len(message) < 400
    return message


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("/home/someone/models/mine", "mine"),  # nobody's business
        (None, None),
        ("", None),
        (7, None),
    ],
)
def test_an_adapter_names_its_base_model(folder, whole, base, shown):
    if not whole:  # PEFT writes no config.json
        for file in folder.iterdir():
            file.unlink()
    content = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    whose = f" for {shown}" if shown else ""
    assert refusal(folder) == (
        f"model holds an adapter (PEFT){whose}, not a whole model. Merge it into "
        f"{shown or 'its base model'} (merge_and_unload), save that, and choose it."
    )


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ, 4 bits"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "AWQ, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "FP8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({}, "unknown method"),
        ("yes", "unknown method"),
        ({"bits": 2}, "unknown method, 2 bits"),
    ],
)
def test_quantised_checkpoints(folder, said, shown):
    edit_config(folder, quantization_config=said)
    assert refusal(folder) == (
        f"model is quantised ({shown}); only plain float weights can be converted. Choose the "
        "original model, or a GGUF file of it."
    )


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("quantize_config.json", "GPTQ"),
        ("quant_config.json", "AWQ"),
        ("hf_quant_config.json", "ModelOpt"),
    ],
)
def test_quantisers_that_write_a_file_of_their_own(folder, file, shown):
    (folder / file).write_text("{}")
    (folder / "README.md").write_text("---\nbase_model:\n- owner/original\n---\n")
    assert refusal(folder) == (
        f"model is quantised ({shown}); only plain float weights can be converted. Choose the "
        "original model, owner/original, or a GGUF file of it."
    )


def test_mlx(folder):
    edit_config(folder, quantization={"group_size": 64, "bits": 4})
    assert "is quantised (MLX, 4 bits)" in refusal(folder)


@pytest.mark.parametrize(
    ("dtype", "ending", "shown"),
    [
        (torch.float8_e4m3fn, "", "F8_E4M3"),
        (torch.uint8, "", "U8"),
        (torch.int32, "_packed", "I32"),
    ],
)
def test_packed_weights_of_which_the_config_says_nothing(folder, dtype, ending, shown):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name + ending] = tensors.pop(name).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert refusal(folder).startswith(f"model is quantised ({shown});")


def test_masks_and_positions_are_no_packed_weights(folder):
    """GPT checkpoints of old hold some, which models compute themselves."""
    tensors = load_file(folder / "model.safetensors")
    mask = torch.ones(4, 4, dtype=torch.uint8)
    tensors |= {"model.attn.bias": mask, "model.position_ids": torch.arange(4)[None]}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder, device="cpu")


@pytest.mark.parametrize(
    ("model_type", "declared", "inside"),
    [
        ("llava", "LlavaForConditionalGeneration", "LlamaForCausalLM"),
        ("paligemma", "PaliGemmaForConditionalGeneration", "GemmaForCausalLM"),
        ("smolvlm", "SmolVLMForConditionalGeneration", "LlamaForCausalLM"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text"),
    ],
)
def test_a_wrapper_names_its_language_model(folder, model_type, declared, inside):
    config = AutoConfig.for_model(model_type)
    config.architectures = [declared]
    config.save_pretrained(folder)
    assert refusal(folder) == (
        f"model is a model for more than text ({declared}). Its language model, {inside}, cannot "
        "be read out of it here: choose a text-only model of that kind."
    )


def test_what_only_sees_is_no_language_model(folder):
    CLIPVisionConfig(architectures=["CLIPVisionModel"]).save_pretrained(folder)
    assert "is not a causal language model (CLIPVisionModel)" in refusal(folder)


def test_remote_code(folder):
    edit_config(folder, model_type="mystery", auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit('repository code was run')")
    message = refusal(folder)
    assert "needs Python code from its repository (trust_remote_code). Such code" in message
    assert "choose a model of a type that transformers" in message

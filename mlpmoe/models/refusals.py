"""What people bring that is not a whole model in plain floats, and what to bring instead."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePath
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .errors import ModelError, shorten

ADAPTER = "adapter_config.json"
# Configs of quantisers, from before they were part of config.json.
QUANTISER_CONFIGS = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
METHODS = {  # as config.json has them, where people call them otherwise
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "bitnet": "BitNet",
}


def refuse_adapter(name: str, config: dict[str, Any]) -> ModelError:
    """config: adapter_config.json as a dict."""
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and base.strip():
        path = PurePath(base.strip())
        # a path says where things lie, and only on the machine of whoever trained it
        shown = shorten(path.name if path.is_absolute() else base.strip())
        whose, into = f" for {shown}", shown
    else:
        whose, into = "", "its base model"
    return ModelError(
        f"{name} holds an adapter (PEFT){whose}, not a whole model. Merge it into {into} "
        "(merge_and_unload), save that, and choose it."
    )


def refuse_quantised(name: str, method: str, base: str | None) -> ModelError:
    """base: the model it was made from, as its card names it."""
    instead = f", {shorten(base)}" if base else ""
    return ModelError(
        f"{name} is quantised ({shorten(method)}); only plain float weights can be converted. "
        f"Choose the original model{instead}, or a GGUF file of it."
    )


def quantisation_in(config: dict[str, Any], files: Collection[str]) -> str | None:
    """How a checkpoint with this config.json and these files is quantised; None if it is not."""
    said = config.get("quantization_config")
    if said is None and isinstance(config.get("quantization"), dict):  # as MLX writes it
        said = {"quant_method": "MLX"} | config["quantization"]
    if said is None:
        return next((what for file, what in QUANTISER_CONFIGS.items() if file in files), None)
    said = said if isinstance(said, dict) else {}
    method = str(said.get("quant_method") or "unknown method")
    bits = next((bits for bits in (4, 8) if said.get(f"load_in_{bits}bit")), said.get("bits"))
    return METHODS.get(method, method) + (f", {bits} bits" if isinstance(bits, int) else "")


def refuse_wrapper(name: str, declared: str, config: PreTrainedConfig) -> ModelError | None:
    """The refusal of a model that wraps a language model for images or sound; None for others."""
    inner = config.get_text_config(decoder=True)
    if inner is config or not _sees_or_hears(config):
        return None
    language_model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(inner), None)
    what = language_model.__name__ if language_model else inner.model_type
    return ModelError(
        f"{name} is a model for more than text ({shorten(declared)}). Its language model, "
        f"{what}, cannot be read out of it here: choose a text-only model of that kind."
    )


def refuse_unknown_type(name: str, model_type: str, own_code: bool) -> ModelError:
    """own_code: whether the repository brings Python code for it."""
    if own_code:
        return ModelError(
            f"{name} needs Python code from its repository (trust_remote_code). Such code is never "
            f"run here: choose a model of a type that transformers {transformers.__version__} "
            "knows."
        )
    return ModelError(
        f"{name} has the model type {shorten(model_type)}, which transformers "
        f"{transformers.__version__} does not know."
    )


def refuse_other_formats(name: str, files: Collection[str]) -> ModelError:
    """For a checkpoint that has neither safetensors nor GGUF."""
    endings = {PurePath(file).suffix for file in files}
    if endings & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
        return ModelError(
            f"{name} has pickled weights only. Opening those can run any code, so they are never "
            "read: choose a model that has model.safetensors."
        )
    return ModelError(f"{name} has no weights: there is no model.safetensors.")


def _sees_or_hears(config: PreTrainedConfig) -> bool:
    return any(
        getattr(config, f"{sense}_config", None) is not None for sense in ("vision", "audio")
    )

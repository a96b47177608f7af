"""From a config alone: is it a causal language model whose MLPs can be split, and how large?"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mlpmoe.core.errors import UserError
from mlpmoe.core.mlps import check_structure, context_length, located_mlps

from .checkpoint import CONFIG, Checkpoint, read_config
from .errors import ModelError, shorten
from .host import DTYPES
from .refusals import quantisation_in, refuse_quantised, refuse_unknown_type, refuse_wrapper
from .stored_config import read_stored_config

MAX_REPEATS = 1000  # layers, or experts per layer; the deepest published models have about 200
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")

_REPEATS = re.compile(r"(num|n)_.*(layer|expert)")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    name: str  # the model's class, e.g. "LlamaForCausalLM"
    parameters: int  # exact, tied weights counted once
    mlp_parameters: int  # those of all MLPs
    vocabulary: int  # rows of the output matrix
    d_model: int
    d_ff: int  # of the widest MLP
    saved_dtype: torch.dtype
    buffer_bytes: int = 0  # of what it computes once and keeps: causal masks, rotary tables


def inspect(checkpoint: Checkpoint) -> Architecture:
    """Build the model of a checkpoint's config.json without memory, and check what it is made of.

    Code of the repository is never run. Raises ModelError, and UnsupportedModelError if its MLPs
    cannot be split.
    """
    config, name = read_config(checkpoint), checkpoint.name
    _check_config(config, checkpoint)
    parsed = _parse(config, checkpoint.fetch(CONFIG).parent, name)
    declared = str((config.get("architectures") or [config["model_type"]])[0])
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(parsed), None)
    if model_class is None or not _is_causal(config, model_class.__name__):
        raise refuse_wrapper(name, declared, parsed) or ModelError(
            f"{name} is not a causal language model ({shorten(declared)}): it does not write "
            "text from left to right."
        )
    return build_empty(parsed, name, _saved_dtype(parsed))


def build_empty(config: PreTrainedConfig, name: str, saved_dtype: torch.dtype) -> Architecture:
    """What a model of this config is made of. Raises as `inspect`."""
    try:
        # The dtype does not matter on meta, but any other than float32 would change torch's
        # default dtype for every thread while the model is built.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        check_structure(model)
        context = context_length(model)
        if context is not None and not context > 1:
            raise ValueError(f"a context of {context} tokens")
    except UserError:
        raise
    except Exception as error:  # a config can be wrong in as many ways as there are models
        logger.debug("%s: the model cannot be built", name, exc_info=True)
        unknown = isinstance(error, KeyError) and error.args and isinstance(error.args[0], str)
        why = f"unknown: {shorten(error.args[0])}" if unknown else type(error).__name__
        raise ModelError(
            f"The config.json of {name} does not describe a working {config.model_type} model "
            f"({why})."
        ) from error
    head = model.get_output_embeddings() or model.get_input_embeddings()
    mlps = located_mlps(model).values()
    return Architecture(
        name=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        mlp_parameters=sum(p.numel() for mlp, _ in mlps for p in mlp.parameters()),
        vocabulary=head.weight.shape[0],
        d_model=head.weight.shape[1],
        d_ff=max(layout.d_ff(mlp) for mlp, layout in mlps),
        saved_dtype=saved_dtype,
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
    )


def _check_config(config: dict, checkpoint: Checkpoint) -> None:
    name = checkpoint.name
    method = quantisation_in(config, checkpoint.sizes)
    if method:
        raise refuse_quantised(name, method, checkpoint.base)
    for key, value in _repeats(config):
        if value > MAX_REPEATS:
            raise ModelError(
                f"The config.json of {name} asks for {value:,} in {shorten(key)}; "
                f"at most {MAX_REPEATS:,} are built."
            )


def _repeats(config: dict) -> Iterator[tuple[str, int]]:
    """How often modules are to be built, also in the configs nested one level down."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in part.items():
            if _REPEATS.match(key) and isinstance(value, int):
                yield key, value


def _parse(config: dict, folder: Path, name: str) -> PreTrainedConfig:
    model_type = config["model_type"]
    try:
        known = model_type in transformers.CONFIG_MAPPING
        if known:
            return read_stored_config(folder)
    except ModelError:
        raise
    except Exception as error:
        logger.debug("%s: config.json cannot be parsed", name, exc_info=True)
        field = re.search(r"for field '(\w+)'", str(error))
        such = f", such as that of {shorten(field[1])}" if field else ""
        raise ModelError(
            f"The config.json of {name} holds values that its model type, {model_type}, does not "
            f"allow{such}."
        ) from error
    raise refuse_unknown_type(name, model_type, own_code=bool(config.get("auto_map")))


def _is_causal(config: dict, class_name: str) -> bool:
    """Whether the checkpoint was saved from a causal model, as far as it says.

    A masked language model (BERT) could be built as a causal one, but was not trained as one.
    """
    saved_from = config.get("architectures")
    if not isinstance(saved_from, list) or not saved_from:
        return True
    return any(
        name == class_name or (isinstance(name, str) and name.endswith(CAUSAL_ENDINGS))
        for name in saved_from
    )


def _saved_dtype(config: PreTrainedConfig) -> torch.dtype:
    dtype = config.dtype or config.get_text_config(decoder=True).dtype
    # Configs from before the field existed belong to float32 checkpoints; and some name what the
    # weights were packed in, or what no weights are stored in.
    return dtype if dtype in DTYPES.values() else torch.float32

"""The configs of a checkpoint, without what they say of the machine that it was saved on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from ..core.files import write_reason
from .errors import ModelError
from .scratch import scratch_folder

CONFIG, GENERATION = "config.json", "generation_config.json"
# Which kernels compute attention and experts: a name may be of a package that is not here, or of
# code that transformers would download and run.
KERNELS = ("attn_implementation", "experts_implementation")
# How a model hands over what it computes: as tuples, or with more than anybody here asks for.
HANDING_OVER = ("return_dict", "use_return_dict", "output_attentions", "output_hidden_states")
LEFT_TO_THIS_MACHINE = {
    *(f"{mark}{name}{end}" for name in KERNELS for mark in ("", "_") for end in ("", "_internal")),
    *HANDING_OVER,
    "configuration_files",  # that are read in its place, by the version of transformers
    "torchscript",
    # of generation_config.json
    "cache_implementation", "cache_config", "compile_config", "disable_compile",
    "custom_generate", "assistant_model",
}  # fmt: skip
DTYPE_KEYS = ("dtype", "torch_dtype")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

logger = logging.getLogger(__name__)


def read_stored_config(folder: Path) -> PreTrainedConfig:
    """config.json in a folder, parsed. What is in LEFT_TO_THIS_MACHINE is at its default, whatever
    the file says. Raises as `AutoConfig.from_pretrained`, ValueError for what is not JSON,
    and ModelError if this machine has no room for a small file."""
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # a file, since a config that is parsed from fields is not put right as one from a file is
    with _as_file(CONFIG, fields) as place:
        config = AutoConfig.from_pretrained(
            str(place / CONFIG), trust_remote_code=False, local_files_only=True
        )
    config.name_or_path = str(folder)
    return config


def read_generation_config(folder: Path, config: PreTrainedConfig, name: str) -> GenerationConfig:
    """How a model says that it wants to write: generation_config.json, or what config.json has of
    that, without LEFT_TO_THIS_MACHINE. Where it cannot be used, the defaults hold, and the special
    tokens of the config."""
    own = (folder / GENERATION).is_file()
    try:
        fields = json.loads((folder / (GENERATION if own else CONFIG)).read_text(encoding="utf-8"))
        # from a file: what was read from one may be written again, whatever it says
        with _as_file(GENERATION, fields) as place:
            found = GenerationConfig.from_pretrained(
                place, local_files_only=True, _from_model_config=not own
            )
        found.validate()
        if all(_names_tokens(getattr(found, key, None)) for key in TOKENS):
            return found
        problem = "special tokens that are not numbers"
    except ModelError:
        raise
    except Exception as error:  # it can be wrong in as many ways as it has settings
        problem = type(error).__name__
    logger.warning("%s: its %s cannot be used (%s)", name, GENERATION, problem)
    return GenerationConfig.from_model_config(config)


@contextmanager
def _as_file(name: str, fields: Any) -> Iterator[Path]:
    """A folder that is gone afterwards, with a file of this name. Raises ModelError if it cannot
    be written: then the model is not to blame, nor is it to be read without these fields."""
    content = json.dumps(_plain(fields))
    with ExitStack() as stack:
        try:
            place = stack.enter_context(scratch_folder("config"))
            (place / name).write_text(content, encoding="utf-8")
        except OSError as error:
            reason = write_reason(error.__cause__ or error)
            raise ModelError(f"Temporary files cannot be written: {reason}") from error
        yield place


def _names_tokens(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(type(each) in (int, type(None)) for each in values)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without those of LEFT_TO_THIS_MACHINE, and without dtypes that are none, also in
    configs nested in them."""
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in LEFT_TO_THIS_MACHINE and (key not in DTYPE_KEYS or _is_dtype(value))
    }


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)

"""Load a causal language model and its tokenizer, or say in plain words why not."""

from __future__ import annotations

import errno
import gc
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mlpmoe.core.memory import return_memory

from . import gguf_reading, hub, packaged
from .checkpoint import (
    check_headers,
    companions,
    folder_checkpoint,
    small_files,
    total_bytes,
    weight_files,
)
from .errors import ModelError, format_bytes, shorten
from .gguf_header import read_header
from .origin import note_origin
from .places import left_out, refuse_missing, tell_own_head, without_place
from .preflight import Preflight, preflight
from .progress import OnProgress, Progress
from .quiet_dtype import default_dtype_stays
from .stored_config import read_generation_config, read_stored_config
from .tokens import fit_tokenizer

logger = logging.getLogger(__name__)


def load(
    id_or_folder: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_any: bool | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense model, in evaluation mode on its device, and its tokenizer.

    id_or_folder, revision, token, allow_any: see `preflight`. dtype: "auto", or float32,
    bfloat16, float16, float64; "auto" is the dtype as saved on a GPU (bfloat16 for a quantised
    GGUF), and on a CPU float32, or bfloat16 for more than 50 M parameters where the CPU is faster
    with it. device: "auto" (CUDA, then MPS, then CPU) or a torch device. on_progress(message,
    fraction): called with what is being done; an exception it raises cancels the load and comes
    out here.

    Reads safetensors and GGUF only, the latter into plain floats, and runs no code of the
    repository. Raises ModelError, UnsupportedModelError or UserError; nothing half-loaded is kept.
    """
    progress = Progress(on_progress)
    progress.report("checking")
    checked = preflight(
        id_or_folder,
        device=device,
        dtype=dtype,
        revision=revision,
        token=token,
        allow_any=allow_any,
    )
    return load_checked(checked, token=token, on_progress=on_progress)


def load_checked(
    checked: Preflight, *, token: str | None = None, on_progress: OnProgress | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `load` does after the preflight, for a caller that has shown its result first."""
    checked = prepared(checked, on_progress=on_progress)
    # The tokenizer first: what is wrong with it shows before the weights are downloaded. In a GGUF
    # file it comes with them, and was looked at in the header.
    tokenizer = None if checked.reads_gguf else read_tokenizer(checked, token=token)
    folder = fetch_weights(checked, token=token, on_progress=on_progress)
    Progress(on_progress).report("reading weights")
    tokenizer = tokenizer or _gguf_tokenizer(folder, checked)
    model = _read_model(folder, checked)
    fit_tokenizer(tokenizer, model, checked.name)
    files = {}
    if not checked.reads_gguf:
        apart = left_out(model, folder, checked.weight_files)
        files = {"folder": folder, "companions": checked.companions, "left_out": apart}
    origin = replace(checked.origin, tokens=len(tokenizer), **files)
    for note in origin.notes:
        logger.warning("%s: %s", checked.name, note)
    note_origin(model, origin)
    return model, tokenizer


def make_ready(
    name: str | os.PathLike[str],
    *,
    token: str | None = None,
    on_progress: OnProgress | None = None,
) -> Preflight:
    """Bring a model onto this machine, so that `load` finds all of it here: downloaded, or
    converted from its package. Nothing is loaded. Arguments and errors as for `load`."""
    checked = prepared(preflight(name, token=token, in_memory=False), on_progress=on_progress)
    if not checked.reads_gguf:
        read_tokenizer(checked, token=token)
    fetch_weights(checked, token=token, on_progress=on_progress)
    return checked


def prepared(checked: Preflight, *, on_progress: OnProgress | None = None) -> Preflight:
    """The same model as files that can be read at once: one that comes in a package is converted
    on its first use (some 20 seconds), any other is returned as it is."""
    if not (checked.package and checked.reads_gguf):
        return checked
    folder = packaged.prepare(checked.package, Progress(on_progress))
    made = folder_checkpoint(folder, checked.name)
    weights, small = weight_files(made), small_files(made)
    return replace(
        checked, folder=folder, weight_files=weights, small_files=small,
        bytes_on_disk=total_bytes(made, weights + small), companions=companions(made),
    )  # fmt: skip


def read_tokenizer(checked: Preflight, *, token: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer alone, of a model that is not a GGUF file."""
    return _read_tokenizer(_files(checked, checked.small_files, token, None), checked.name)


def fetch_weights(
    checked: Preflight, *, token: str | None = None, on_progress: OnProgress | None = None
) -> Path:
    """The folder with the weight files, which are downloaded if need be."""
    checked = prepared(checked, on_progress=on_progress)
    progress = Progress(on_progress)
    if checked.download:
        progress.report(f"downloading {format_bytes(checked.download)}", 0.0)
    try:
        bars = progress.bar_class(checked.download)
        return _files(checked, checked.weight_files, token, bars)
    except ModelError:
        if progress.cancelled is not None:
            raise progress.cancelled from None
        raise


def _files(
    checked: Preflight, files: tuple[str, ...], token: str | None, bars: type | None
) -> Path:
    if checked.folder is not None:
        return checked.folder
    folder = hub.download(checked.name, checked.revision, files, token, bars)
    if checked.gguf is None and files == checked.weight_files:
        check_headers(checked.name, folder, files)
    return folder


def _read_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        if (folder / "tokenizer.json").is_file():
            # As it is. A class by model type may split text in its own way, whatever the file says,
            # and every number measured would be wrong. And to parse a large one, which transformers
            # would do up to three times, holds all threads of Python for seconds.
            return PreTrainedTokenizerFast.from_pretrained(folder, **options)
        config = read_stored_config(folder)
        return AutoTokenizer.from_pretrained(folder, config=config, **options)
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception
        logger.debug("%s: the tokenizer cannot be read", name, exc_info=True)
        raise ModelError(
            f"The tokenizer of {name} cannot be read ({type(error).__name__})."
        ) from error


def _gguf_tokenizer(folder: Path, checked: Preflight) -> PreTrainedTokenizerBase:
    try:
        header = read_header(folder / checked.gguf, checked.name)
        return gguf_reading.read_tokenizer(folder, checked.gguf, header)
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception
        logger.debug("%s: the tokenizer cannot be read", checked.name, exc_info=True)
        raise ModelError(
            f"The tokenizer of {checked.name} cannot be read ({type(error).__name__})."
        ) from error


def _read_model(folder: Path, checked: Preflight) -> PreTrainedModel:
    """The weights on their device. Errors leave nothing behind that refers to a tensor."""
    if checked.reads_gguf:
        files = gguf_reading.weights_from(folder, checked.gguf, checked.name)
    else:
        config = read_stored_config(folder)
        files = {
            "use_safetensors": True,
            "config": config,
            "generation_config": read_generation_config(folder, config, checked.name),
        }
    try:
        with default_dtype_stays():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=checked.dtype,
                device_map={"": checked.device},
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told of, and refused here
                **files,
            )
        problem = (
            _missing_tensors(info, checked.name)
            or _other_shapes(info, checked.name)
            or without_place(info["unexpected_keys"], folder, checked.weight_files, checked.name)
            or _not_finite(model.named_parameters(), checked)
        )
        if problem is None:
            tell_own_head(model)
            if "generation_config" in files:  # the same object: transformers has made a copy
                model.generation_config = files["generation_config"]
            return_memory()  # reading may have taken as much again
            return model.eval()
    except Exception as error:
        logger.debug("%s: the weights cannot be read", checked.name, exc_info=True)
        problem = _explain(error, checked)
    # Outside of the handler: an error that is still being handled refers to the frames in which
    # it was raised, and so to everything that was loaded there.
    model = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
    raise ModelError(problem)


def _missing_tensors(info: dict, name: str) -> str | None:
    """transformers fills what it does not find with random numbers, and goes on."""
    missing = info["missing_keys"]
    return refuse_missing(missing, name) if missing else None


def _other_shapes(info: dict, name: str) -> str | None:
    """transformers fills these with random numbers, too."""
    differing = sorted(info["mismatched_keys"])
    if not differing:
        return None
    key, stored, expected = differing[0]
    return (
        f"The weights of {name} do not fit its config.json: {len(differing)} of its tensors "
        f"{'has' if len(differing) == 1 else 'have'} another shape, such as {shorten(key)}, which "
        f"is {tuple(stored)} and should be {tuple(expected)}."
    )


def _not_finite(parameters: Iterable[tuple[str, nn.Parameter]], checked: Preflight) -> str | None:
    for key, parameter in parameters:
        # One pass and no temporary tensor: NaN and infinity both reach the extremes.
        if parameter.numel() and not all(x.isfinite() for x in parameter.detach().aminmax()):
            dtype = str(checked.dtype).removeprefix("torch.")
            said = (
                f"The weights of {checked.name} hold values that are not finite numbers in "
                f"{dtype} ({shorten(key)})."
            )
            narrow = checked.dtype == torch.float16 != checked.saved_dtype
            return f"{said} Choose bfloat16 or float32." if narrow else said
    return None


def _explain(error: Exception, checked: Preflight) -> str:
    if _is_out_of_memory(error):
        return (
            f"The memory of {checked.device} ran out while {checked.name} was being read "
            f"(about {format_bytes(checked.memory_needed)} are needed). Choose a smaller model."
        )
    return (
        f"The weights of {checked.name} cannot be read ({type(error).__name__}). They are damaged "
        "or do not fit its config.json."
    )


def _is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or "can't allocate memory" in str(error)  # what torch's CPU allocator says
    )

"""Which files make up a checkpoint, and whether they are all there; no weight is read here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import metadata_load
from safetensors import SafetensorError, safe_open

from .errors import ModelError, format_bytes

CONFIG = "config.json"
CARD = "README.md"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 50_000_000  # of a config or an index; real ones stay below 10 MB
MAX_TOKENIZER_BYTES = 200_000_000  # of all tokenizer files; Gemma's, a large one, has 40 MB

# Any one of these sets makes a tokenizer.
VOCABULARIES = (
    {"tokenizer.json"},
    {"tokenizer.model"},
    {"spiece.model"},
    {"sentencepiece.bpe.model"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
)
SMALL_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
}.union(*VOCABULARIES)


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, before they are read: those of a folder, or of one commit on the hub."""

    name: str  # as messages call it
    sizes: dict[str, int]  # bytes, of every file at the top level
    fetch: Callable[[str], Path]  # local path of a small file, which is downloaded if need be
    revision: str | None = None  # commit; None for a folder
    folder: Path | None = None  # where the files lie; None if they have to be downloaded
    licence: str | None = None  # as the model's card names it


def folder_checkpoint(folder: Path, name: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint in `folder`, whose weight files are checked for truncation."""
    try:
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    except OSError:
        raise ModelError(f"The folder of {name} cannot be read.") from None
    licence = _licence(folder / CARD) if CARD in sizes else None
    checkpoint = Checkpoint(name, sizes, folder.joinpath, revision, folder, licence)
    if CONFIG in sizes:
        for file in weight_files(checkpoint):
            _check_header(checkpoint, file)
    return checkpoint


def read_config(checkpoint: Checkpoint) -> dict:
    """config.json as a dict that names its model type. Raises ModelError."""
    if CONFIG not in checkpoint.sizes:
        raise ModelError(
            f"{checkpoint.name} has no config.json, so it is not a transformers model."
        )
    if "adapter_config.json" in checkpoint.sizes:
        raise ModelError(
            f"{checkpoint.name} holds an adapter (PEFT), not a whole model. "
            "Merge it into its base model first."
        )
    config = _read_json(checkpoint, CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"The config.json of {checkpoint.name} does not name a model type.")
    return config


def weight_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the safetensors files that transformers will read. Raises ModelError.

    One file, or the shards that the index names. Other formats are refused: unpickling can run
    any code, and GGUF weights are quantised.
    """
    if WEIGHTS in checkpoint.sizes:
        return (WEIGHTS,)
    if INDEX not in checkpoint.sizes:
        _refuse_other_formats(checkpoint)
    weight_map = _read_json(checkpoint, INDEX).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) and weight_map else {None}
    if not all(isinstance(name, str) and name.endswith(".safetensors") for name in names):
        raise ModelError(f"The weight index of {checkpoint.name} cannot be read.")
    missing = sorted(names - checkpoint.sizes.keys())
    if missing:
        raise ModelError(
            f"{checkpoint.name} is incomplete: {len(missing)} of its {len(names)} weight files "
            f"{'is' if len(missing) == 1 else 'are'} missing."
        )
    return tuple(sorted(names))


def small_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of config and tokenizer files to load. Raises ModelError without a tokenizer."""
    present = checkpoint.sizes.keys()
    if not any(vocabulary <= present for vocabulary in VOCABULARIES):
        raise ModelError(
            f"{checkpoint.name} has no tokenizer (tokenizer.json, tokenizer.model or "
            "vocabulary files), so it cannot read text."
        )
    names = tuple(sorted(SMALL_FILES & present))
    size = total_bytes(checkpoint, names)
    if size > MAX_TOKENIZER_BYTES:
        raise ModelError(
            f"The tokenizer of {checkpoint.name} has {format_bytes(size)}; "
            f"at most {format_bytes(MAX_TOKENIZER_BYTES)} are read."
        )
    return names + ((INDEX,) if WEIGHTS not in present and INDEX in present else ())


def total_bytes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    return sum(checkpoint.sizes[name] for name in names)


def _read_json(checkpoint: Checkpoint, name: str) -> dict:
    problem = f"The {name} of {checkpoint.name} cannot be read: it is not valid JSON."
    if checkpoint.sizes[name] > MAX_JSON_BYTES:
        raise ModelError(problem)
    file = checkpoint.fetch(name)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ModelError(problem) from None
    if not isinstance(content, dict):
        raise ModelError(problem)
    return content


def _refuse_other_formats(checkpoint: Checkpoint) -> None:
    endings = {Path(name).suffix for name in checkpoint.sizes}
    if ".gguf" in endings:
        raise ModelError(
            f"{checkpoint.name} has GGUF weights only. Choose the original, unquantised model."
        )
    if endings & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
        raise ModelError(
            f"{checkpoint.name} has pickled weights only. Opening those can run any code, so they "
            "are never read: choose a model that has model.safetensors."
        )
    raise ModelError(f"{checkpoint.name} has no weights: there is no model.safetensors.")


def _licence(card: Path) -> str | None:
    """The licence that the head of a model card names, if it can be read."""
    try:
        licence = (metadata_load(card) or {}).get("license")
    except Exception:  # YAML and its reader have many ways to fail, and none matters here
        return None
    return licence if isinstance(licence, str) else None


def _check_header(checkpoint: Checkpoint, name: str) -> None:
    """A safetensors header says how long its file must be; reading it costs next to nothing."""
    try:
        with safe_open(checkpoint.folder / name, framework="pt"):
            pass
    except (SafetensorError, OSError):
        raise ModelError(
            f"{name} of {checkpoint.name} is damaged or cut off. Download or copy it again."
        ) from None

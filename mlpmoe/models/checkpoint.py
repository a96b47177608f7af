"""Which files make up a checkpoint, and whether they are all there; no weight is read here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from safetensors import SafetensorError, safe_open

from .errors import ModelError, format_bytes, shorten
from .refusals import ADAPTER, refuse_adapter, refuse_other_formats, refuse_quantised

CONFIG = "config.json"
CARD = "README.md"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 50_000_000  # of an index; real ones stay below 10 MB
MAX_CONFIG_BYTES = 2_000_000  # of a config, a chat template, a card; real ones stay below 200 kB
MAX_TOKENIZER_BYTES = 200_000_000  # of all tokenizer files; Gemma's, a large one, has 40 MB
FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors calls them
# Ends of the names of matrices, which masks and positions do not have.
PACKABLE = ("weight", "weight_packed", "W_q")

# Any one of these sets makes a tokenizer.
VOCABULARIES = (
    {"tokenizer.json"},
    {"tokenizer.model"},
    {"spiece.model"},
    {"sentencepiece.bpe.model"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
)
CONFIGS = {
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
}
# these two may list every token that was added
SMALL_FILES = {"tokenizer_config.json", "added_tokens.json"}.union(CONFIGS, *VOCABULARIES)
TEMPLATES = "additional_chat_templates"  # a folder, which tokenizers read beside their files

# Beginnings of the names of other files for tokenizers, and for processors of what is not text
COMPANION = re.compile(
    r"(?:tokeniz|vocab|merges|special_tokens|added_tokens|chat_template|spiece|sentencepiece|tekken"
    r"|tiktoken|normalizer|\w*processor|[\w.]+\.(?:tiktoken|spm)$)"
)
HEAVY = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".onnx", ".msgpack")


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, before they are read: those of a folder, or of one commit on the hub."""

    name: str  # as messages call it
    sizes: dict[str, int]  # bytes, of every file at the top level
    fetch: Callable[[str], Path]  # local path of a small file, which is downloaded if need be
    revision: str | None = None  # commit; None for a folder
    folder: Path | None = None  # where the files lie; None if they have to be downloaded
    licence: str | None = None  # as the model's card names it
    base: str | None = None  # the model that it was made from, as its card names it
    # the first so many bytes of a file; None if the files lie in `folder`
    beginning: Callable[[str, int], bytes] | None = None

    @property
    def has_safetensors(self) -> bool:
        return WEIGHTS in self.sizes or INDEX in self.sizes


def folder_checkpoint(
    folder: Path, name: str, revision: str | None = None, *, links: bool = False
) -> Checkpoint:
    """The checkpoint in `folder`, whose safetensors files are checked for truncation.

    links: whether its files may be links to anywhere, as those that package managers and the hub's
    client make; else ModelError for one that leaves the folder.
    """
    try:
        if not links:
            _check_folder(folder, name)
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    except OSError:
        raise ModelError(f"The folder of {name} cannot be read.") from None
    readable = 0 < sizes.get(CARD, 0) <= MAX_CONFIG_BYTES
    licence, base = card_facts(_card(folder / CARD) if readable else {})
    checkpoint = Checkpoint(name, sizes, folder.joinpath, revision, folder, licence, base)
    if CONFIG in sizes and checkpoint.has_safetensors:
        check_headers(name, folder, weight_files(checkpoint), base)
    return checkpoint


def read_config(checkpoint: Checkpoint) -> dict:
    """config.json as a dict that names its model type. Raises ModelError."""
    refuse_if_adapter(checkpoint)
    if CONFIG not in checkpoint.sizes:
        raise ModelError(
            f"{checkpoint.name} has no config.json, so it is not a transformers model."
        )
    config = _read_json(checkpoint, CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"The config.json of {checkpoint.name} does not name a model type.")
    return config


def refuse_if_adapter(checkpoint: Checkpoint) -> None:
    """Raise ModelError for what PEFT saved, with or without a config.json beside it."""
    if ADAPTER in checkpoint.sizes:
        raise refuse_adapter(checkpoint.name, _read_json(checkpoint, ADAPTER))


def weight_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the safetensors files that transformers will read. Raises ModelError.

    One file, or the shards that the index names. Pickled weights are refused: opening them can
    run any code.
    """
    if WEIGHTS in checkpoint.sizes:
        return (WEIGHTS,)
    if INDEX not in checkpoint.sizes:
        raise refuse_other_formats(checkpoint.name, checkpoint.sizes)
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
    for config in CONFIGS.intersection(names):
        _check_size(checkpoint, config)
    read = set(names)
    if checkpoint.folder is not None:
        read.update(
            companions(checkpoint)
        )  # which transformers may take if the usual ones are not there
    size = total_bytes(checkpoint, read)
    if size > MAX_TOKENIZER_BYTES:
        raise ModelError(
            f"The tokenizer of {checkpoint.name} has {format_bytes(size)}; "
            f"at most {format_bytes(MAX_TOKENIZER_BYTES)} are read."
        )
    return names + ((INDEX,) if WEIGHTS not in present and INDEX in present else ())


def companions(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of all files at the top level that are for the tokenizer or processors, sorted."""
    named = (name for name in checkpoint.sizes if COMPANION.match(name))
    return tuple(sorted(name for name in named if not name.endswith(HEAVY)))


def total_bytes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    return sum(checkpoint.sizes[name] for name in names)


def check_headers(name: str, folder: Path, files: Iterable[str], base: str | None = None) -> None:
    """Raise ModelError if a safetensors file in `folder` is cut off, if it holds matrices that are
    not plain floats: transformers would take packed numbers for weights; and if two files hold
    the same tensor, of which only one would count.

    A header says how long its file must be; reading it costs next to nothing.
    """
    seen: set[str] = set()
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                every = set(opened.keys())
                keys = (key for key in every if key.endswith(PACKABLE))
                formats = {opened.get_slice(key).get_dtype() for key in keys}
        except (SafetensorError, OSError):
            raise ModelError(
                f"{file} of {name} is damaged or cut off. Download or copy it again."
            ) from None
        packed = sorted(formats - FLOATS)
        if packed:
            raise refuse_quantised(name, ", ".join(packed), base)
        if twice := seen & every:
            raise ModelError(
                f"Two weight files of {name} hold the tensor {shorten(min(twice))}. One of them "
                "belongs to another model: download or copy the files again."
            )
        seen |= every


def card_facts(card: dict[str, Any]) -> tuple[str | None, str | None]:
    """The licence and the base model that the head of a model card names."""
    licence, base = card.get("license"), card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return tuple(value if isinstance(value, str) else None for value in (licence, base))


def _read_json(checkpoint: Checkpoint, name: str) -> dict:
    problem = f"The {name} of {checkpoint.name} cannot be read: it is not valid JSON."
    _check_size(checkpoint, name)
    file = checkpoint.fetch(name)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ModelError(problem) from None
    if not isinstance(content, dict):
        raise ModelError(problem)
    return content


def _check_size(checkpoint: Checkpoint, name: str) -> None:
    """Raise ModelError for a file that is too large to be parsed."""
    size, most = checkpoint.sizes[name], MAX_JSON_BYTES if name == INDEX else MAX_CONFIG_BYTES
    if size > most:
        raise ModelError(
            f"The {name} of {checkpoint.name} has {format_bytes(size)}; at most "
            f"{format_bytes(most)} are read."
        )


def _check_folder(folder: Path, name: str) -> None:
    """Raise ModelError if a file that may be read is a link to somewhere else: what is shown of a
    model, and written into its exports, is what lies in its folder. Also for chat templates, which
    lie in a folder of their own, that are too large to be read."""
    real = folder.resolve()
    # the hub's cache: snapshots/COMMIT/FILE is a link to blobs/DIGEST
    inside = real.parents[1] if real.parent.name == "snapshots" else real
    templates = folder / TEMPLATES
    more = [templates, *templates.iterdir()] if templates.is_dir() else []
    for file in (*folder.iterdir(), *more):
        if file.is_symlink() and (file.is_file() or file == templates):
            if not file.resolve().is_relative_to(inside):
                raise ModelError(
                    f"{shorten(file.name)} in the folder of {name} is a link to a place outside "
                    "of it, which is not followed. Put the file itself there."
                )
    if sum(file.stat().st_size for file in more[1:]) > MAX_CONFIG_BYTES:
        raise ModelError(
            f"The chat templates of {name} have more than {format_bytes(MAX_CONFIG_BYTES)}, which "
            "is the most that is read."
        )


def _card(card: Path) -> dict[str, Any]:
    """The head of a model card, as far as it can be read."""
    try:
        found = metadata_load(card)
    except Exception:  # YAML and its reader have many ways to fail, and none matters here
        return {}
    return found if isinstance(found, dict) else {}

"""What stands beside the weights of a checkpoint: the base model's files for its tokenizer and its
processors, and the names under which older software looks for what they and the config say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ...core.errors import UserError
from ...models import Origin, format_bytes
from ...models.checkpoint import CONFIG, MAX_TOKENIZER_BYTES, TEMPLATES
from ..check.reload import PROBE
from ..check.verification import ExportError

TOKENIZER_CONFIG = "tokenizer_config.json"
ANY_TOKENIZER = "PreTrainedTokenizerFast"  # the class that reads tokenizer.json in every version
NEW_NAMES = {"TokenizersBackend"}  # of it, which versions before 5 do not know


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, origin: Origin | None, folder: Path
) -> list[str]:
    """Write a tokenizer, and all that its model's files have for it and for processors beside.
    Returns notes: what was left out."""
    source = origin and origin.folder
    tokenizer.save_pretrained(folder)
    if source is None:
        return []
    own = tokenizer.name_or_path == str(source) and len(tokenizer) == origin.tokens
    return copy_beside(source, origin.companions, folder, own)


def tokenizer_notes(
    tokenizer: PreTrainedTokenizerBase, ids: list[int] | None, reason: str
) -> Iterator[str]:
    """What a person should know of the checkpoint's tokenizer. ids, reason: see
    `FreshProcess.probe`."""
    if ids is None:
        yield f"AutoTokenizer cannot read the tokenizer here ({reason or 'no files'})."
    elif ids != tokenizer(PROBE)["input_ids"]:
        yield (
            "AutoTokenizer splits text in another way than the tokenizer that was measured with: "
            f"open it as {ANY_TOKENIZER}."
        )


def copy_beside(source: Path, names: Iterable[str], folder: Path, own: bool = True) -> list[str]:
    """Copy those of `names`, and the additional chat templates, that `folder` does not have yet.

    names: of files that the base model has, not all of which need be in `source`. own: whether they
    are of the tokenizer that the checkpoint gets; else none is copied. Returns notes: what was left
    out. Raises ExportError for more than MAX_TOKENIZER_BYTES.
    """
    missing = [n for n in _with_templates(source, names) if not (folder / n).exists()]
    here = [n for n in missing if (source / n).is_file() and not n.endswith(".py")]
    size = sum((source / name).stat().st_size for name in here)
    if size > MAX_TOKENIZER_BYTES:
        raise ExportError(
            f"the base model's tokenizer has {format_bytes(size)}; at most "
            f"{format_bytes(MAX_TOKENIZER_BYTES)} are copied."
        )
    for name in here if own else ():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    left = [name for name in missing if not (folder / name).exists()]
    if not left:
        return []
    why = "" if own else ", since the tokenizer is not as it was loaded"
    return [f"Left out of the base model's files{why}: {', '.join(left)}."]


def _with_templates(source: Path, names: Iterable[str]) -> list[str]:
    found = sorted((source / TEMPLATES).glob("*.jinja"))
    return [*names, *(f"{TEMPLATES}/{file.name}" for file in found)]


def name_for_older(folder: Path) -> None:
    """Say in the checkpoint's JSON files, beside the names that transformers 5 gives, what earlier
    versions and other software look for; each means the same under both names."""
    _change(folder / CONFIG, _older_config)
    _change(folder / TOKENIZER_CONFIG, _older_tokenizer)


def _older_config(values: dict) -> None:
    """Before rope_parameters there were rope_theta and rope_scaling, and without them a reader
    takes its usual frequencies."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), int | float):
        return  # none, or of several kinds of layers
    values.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        values.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})


def _older_tokenizer(values: dict) -> None:
    if values.get("tokenizer_class") in NEW_NAMES:
        values["tokenizer_class"] = ANY_TOKENIZER
    extra = values.get("extra_special_tokens")
    if isinstance(extra, list):  # which there is a dict of named tokens
        del values["extra_special_tokens"]
        if extra:
            values.setdefault("additional_special_tokens", extra)


def _change(file: Path, change: Callable[[dict], None]) -> None:
    if not file.is_file():
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file.name} of the base model is not valid JSON.") from error
    before = json.dumps(values)
    change(values)
    if json.dumps(values) != before:
        text = json.dumps(values, indent=2, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")

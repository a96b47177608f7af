"""export_files(): a checkpoint from a checkpoint, without ever holding a model in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.conversion import convert
from ...core.errors import UserError
from ...core.spec import ConversionSpec
from ...measure.quality.encoding import EncodedText, windows
from ...measure.quality.perplexity import summarise
from ...models import Preflight, load_checked
from ...models.checkpoint import CARD, CONFIG, INDEX
from ...models.host import parse_dtype
from ...models.loading import fetch_weights, prepared, read_tokenizer
from ...models.stored_config import GENERATION, read_generation_config
from ...models.tokens import fit_tokenizer
from ...version import VERSION
from ..check.record import Measured, Record
from ..check.reload import answers
from ..check.verification import (
    FreshProcess,
    Progress,
    Verification,
    compared,
    fresh_process,
    pieces_of,
    verify_and_score,
)
from ..forms.dense import NAME
from .beside import copy_beside, name_for_older, tokenizer_notes
from .export import SAVED, SMALL_FILES, Exported, folder_size, refuse_unless_same
from .source import PiecewiseError, Source
from .streaming import STATE, FileConversion, streams
from .target import check_target, target_folder

Encode = Callable[[PreTrainedTokenizerBase, PreTrainedModel], EncodedText]
# Of what `load` needs, so that the checkpoint fits beside it, opened in the other process.
ROOM = 1.5
FORWARD_TOKENS = 512  # compared where the model does not fit: one pass over its files


def export_files(
    checked: Preflight,
    folder: str | os.PathLike[str],
    spec: ConversionSpec,
    *,
    dtype: str | torch.dtype = SAVED,
    encode: Encode | None = None,
    text_name: str | None = None,
    token: str | None = None,
    on_progress: Progress | None = None,
) -> Exported:
    """Convert the checkpoint that a preflight found, layer by layer, write it to `folder`, and
    prove it as `export` does.

    For static specs that need no calibration. Beside the largest layer hardly anything is in
    memory. Where the model fits, it is then loaded and converted as usual, and the checkpoint is
    compared with that on all of the text that `encode(tokenizer, model)` gives; where not, both
    run from their files, as does the dense one, on FORWARD_TOKENS tokens of its longest window.
    text_name: what the card calls it. What was written before an interrupt is kept in
    FOLDER.partial, and another call goes on from there. Raises PiecewiseError for files that can
    be read as a whole only, as GGUF, else as `export`.
    """
    if not streams(spec):
        raise UserError(f"{spec.to_flags()} looks at activations, for which the model has to run.")
    report = on_progress or (lambda message, share: None)
    final = check_target(folder)
    checked = prepared(checked, on_progress=on_progress)
    if checked.reads_gguf:
        raise PiecewiseError(
            "a GGUF file is unpacked as a whole, not layer by layer; it has to fit into memory."
        )
    tokenizer = read_tokenizer(checked, token=token)
    files = fetch_weights(checked, token=token, on_progress=on_progress)
    wanted = None if dtype == SAVED else parse_dtype(dtype)
    conversion = FileConversion(Source(files, checked.weight_files, checked.name), spec, wanted)
    fit_tokenizer(tokenizer, conversion.source.model, checked.name)
    with target_folder(folder, conversion.bytes + SMALL_FILES, keep_partial=True) as partial:
        conversion.write(partial, report)
        small = {*checked.small_files, *checked.companions} - {CONFIG, INDEX, CARD}
        notes = copy_beside(files, sorted(small), partial)
        if GENERATION in checked.small_files:  # as `load` takes it
            config = conversion.source.model.config
            read_generation_config(files, config, checked.name).save_pretrained(partial)
        name_for_older(partial)
        with fresh_process() as other:
            found, measured = _verified(
                other, conversion, checked, partial, tokenizer, encode, report
            )
            notes += tokenizer_notes(tokenizer, *other.probe())
        origin = replace(checked.origin, left_out=conversion.source.left_out)
        record = Record(
            version=VERSION, spec=spec, origin=origin, form=NAME,
            architecture=type(conversion.plan.skeleton).__name__, remote_code=False,
            notes=(*conversion.plan.notes, *notes, *origin.notes),
            text=text_name or (encode and "a text"), calibration=None,
            verification=found, measured=measured,
        )  # fmt: skip
        record.write(partial, Path(folder).name)
        (partial / STATE).unlink()  # complete
    return Exported(final, folder_size(final), record)


def _verified(
    other: FreshProcess,
    conversion: FileConversion,
    checked: Preflight,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    encode: Encode | None,
    report: Progress,
) -> tuple[Verification, Measured | None]:
    """The checkpoint beside the same conversion in memory, or beside one that runs from files; and
    the dense model, if there is a text."""
    room = checked.memory_available
    if room is None or checked.memory_needed * ROOM <= room:
        report("loading the base model to compare", None)
        dense, _ = load_checked(checked)
        model = convert(dense, conversion.spec)
        encoded = None if encode is None else encode(tokenizer, dense)
        found, perplexity = verify_and_score(other, model, folder, encoded, on_progress=report)
        refuse_unless_same(found, NAME)
        if perplexity is None:
            return found, None
        return found, Measured.of(dense, model, encoded, perplexity, report)
    model = conversion.source.model
    parts = None
    if encode is not None:
        text = encode(tokenizer, model)
        longest = max(range(len(text.documents)), key=lambda n: len(text.documents[n]))
        parts = windows(model, text.beginnings([longest], FORWARD_TOKENS))[:1]
    pieces = pieces_of(parts, model)
    dtype = conversion.source.dtype
    other.ask(folder, pieces, dtype, "disk", code=False)
    report("running the conversion from the base model's files", None)
    mine = answers(conversion.source.running(conversion.as_saved), pieces, "cpu")
    theirs, dtypes = other.answers(report)
    found = compared(mine, theirs, dtypes, dtype, parts=parts)
    refuse_unless_same(found, NAME)
    if parts is None:
        return found, None
    report("running the base model from its files", None)
    dense = answers(conversion.source.running(), pieces, "cpu")
    before, after = (summarise(said["losses"], parts) for said in (dense, mine))
    return found, Measured(before, after, parameters=None)

"""export(): a converted model as a checkpoint, proven to be the model that was measured."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.conversion import recovery_of, spec_of
from ...core.errors import UserError
from ...core.one_device import check_one_device
from ...measure.quality.encoding import EncodedText, encode_text, windows
from ...measure.quality.perplexity import Perplexity
from ...models import origin_of
from ...models.host import parse_dtype
from ...models.scratch import scratch_folder
from ...version import VERSION
from ..check.record import Measured, Record
from ..check.verification import (
    ExportError,
    FreshProcess,
    Progress,
    Verification,
    fresh_process,
    verify_and_score,
)
from ..forms.choose import AUTO, make_form
from ..forms.form import Form, FormError, converted_mlps, rounded_to
from .beside import name_for_older, save_tokenizer, tokenizer_notes
from .target import check_space, check_target, target_folder

SAVED = "saved"  # the dtype of the base model's own files
SHARD = "5GB"  # as large as a file of the checkpoint becomes
SMALL_FILES = 20_000_000  # bytes, for tokenizer and configs
HALVES = {"BF16", "F16"}  # dtypes of 16 bits, as safetensors calls them
SCALING_TOKENS = 2048  # of the text, by which routers are scaled


@dataclass(frozen=True)
class Exported:
    """A checkpoint that was written and verified."""

    folder: Path
    bytes: int  # of its files
    record: Record

    @property
    def verification(self) -> Verification:
        return self.record.verification


def export(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | EncodedText | None = None,
    text_name: str | None = None,
    dense: PreTrainedModel | None = None,
    known: tuple[Perplexity | None, Perplexity | None] = (None, None),
    calibration_name: str | None = None,
    form: str = AUTO,
    dtype: str | torch.dtype | None = None,
    on_progress: Progress | None = None,
) -> Exported:
    """Write a converted model to `folder` as a checkpoint, reload it in a fresh process, compare.

    model: from `convert`; unchanged. tokenizer: saved beside the weights, and needed for `text`,
    on which the perplexities of both are taken (without: random tokens are compared). dense: the
    model it was made from, to put the cost into the card. known: the perplexities of `dense` and
    of `model` on this text, where they were measured before, and so are not again. text_name,
    calibration_name: what the card calls the texts. form: see FORMS; "auto" is a stock
    architecture wherever one computes the same. dtype: of the files; None is that of `model`, which
    repeats it exactly, and "saved" that of the base model's own files, unless a routed model is
    another one when it is rounded: then that of `model`. on_progress(message, share) may raise to
    cancel.

    Raises ExportError if the folder is not free or does not fit, and if the checkpoint does not
    repeat the model: then it is deleted. FormError if the form cannot hold the conversion, and
    UnsupportedModelError for a model that is spread over several devices.
    """
    report = on_progress or (lambda message, share: None)
    check_one_device(model)
    check_target(folder)
    converted_mlps(model)  # or there is nothing to export
    if text is not None and not isinstance(text, EncodedText):
        if tokenizer is None:
            raise UserError("a text can be measured with its tokenizer only: give both.")
        text = encode_text(tokenizer, text)
    saved = saved_dtype(model, dtype)
    report("taking the weights apart", None)
    with scratch_folder("form") as workspace, ExitStack() as stack:
        # It imports transformers while the checkpoint is made.
        other = stack.enter_context(fresh_process())
        ids = None
        if text is not None:
            ids = torch.cat([part.ids for part in windows(model, text)])[:SCALING_TOKENS]
        made = make_form(model, form, workspace, ids, saved)
        tensors = as_dtype(made, saved)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with target_folder(folder, size + SMALL_FILES) as partial:
            notes = []
            if tokenizer is not None:
                notes += save_tokenizer(tokenizer, origin_of(model), partial)

            def write(dtype: torch.dtype, tensors: Mapping[str, Tensor], other: FreshProcess):
                report("writing the checkpoint", None)
                write_weights(made, tensors, partial, dtype, model)
                name_for_older(partial)
                return verify_and_score(
                    other, model, partial, text, known=known[1], exact=made.exact,
                    trust_remote_code=made.remote_code, on_progress=report,
                )  # fmt: skip

            found, perplexity = write(saved, tensors, other)
            del tensors
            notes += rounding_notes(found)
            if not found.passed and dtype == SAVED and saved != model.dtype:
                rounded, other = found, stack.enter_context(fresh_process())
                check_space(partial, 2 * size)
                for file in partial.glob("*.safetensors*"):
                    file.unlink()
                made = make_form(model, form, workspace, ids, model.dtype)
                found, perplexity = write(model.dtype, as_dtype(made, model.dtype), other)
                notes.append(kept_note(rounded, found))
            refuse_unless_same(found, made.name)
            if tokenizer is not None:
                notes += tokenizer_notes(tokenizer, *other.probe())
            measured = None
            if dense is not None and perplexity is not None:
                measured = Measured.of(dense, model, text, perplexity, report, known[0])
            origin = origin_of(model)
            record = Record(
                version=VERSION, spec=spec_of(model), origin=origin,
                form=made.name, architecture=made.architecture, remote_code=made.remote_code,
                notes=(*made.notes, *notes, *(origin.notes if origin else ())),
                text=text_name or ("a text" if text is not None else None),
                calibration=calibration_name, verification=found, measured=measured,
                recovery=recovery_of(model),
            )  # fmt: skip
            record.write(partial, Path(folder).name)
    final = Path(folder).expanduser().absolute()
    return Exported(final, folder_size(final), record)


def saved_dtype(model: PreTrainedModel, dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype that the files get. Raises UserError for an unknown name."""
    origin = origin_of(model)
    if dtype is None:
        return model.dtype
    if dtype == SAVED:
        return origin.saved_dtype if origin else model.dtype
    found = parse_dtype(dtype)
    return model.dtype if found is None else found


def as_dtype(form: Form, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors as they will lie on disk: in `dtype`, but for what the architecture keeps in
    float32."""
    kept = [
        *(getattr(form.skeleton, "_keep_in_fp32_modules", None) or ()),
        *(getattr(form.skeleton, "_keep_in_fp32_modules_strict", None) or ()),
        *form.float32,
    ]

    def cast(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach()
        wanted = torch.float32 if any(part in name for part in kept) else dtype
        rounded = rounded_to(wanted, name, tensor.detach()).contiguous()
        if wanted == torch.float16 and tensor.any() and not rounded.any():
            raise FormError(
                f"float16 rounds {name} to zero, which the form {form.name} needs. Save it as "
                "bfloat16 or float32."
            )
        return rounded

    return {name: cast(name, tensor) for name, tensor in form.tensors.items()}


def write_weights(
    form: Form,
    tensors: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype,
    model: PreTrainedModel,
) -> None:
    """Weights, config and generation config."""
    skeleton = form.skeleton.to(dtype)  # on meta: config.json names its dtype
    skeleton.generation_config = model.generation_config
    skeleton.save_pretrained(folder, state_dict=dict(tensors), max_shard_size=SHARD)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes them readable by their owner alone


def refuse_unless_same(found: Verification, form: str) -> None:
    """Raise ExportError for a checkpoint that is not the model that was measured."""
    if found.passed:
        return
    difference = found.relative_difference if found.strict else found.typical_difference
    whose = "its logits differ by" if found.strict else "the logits of the median token differ by"
    advice = "" if form in ("dense", "branches") else " The form branches keeps the routing exact."
    if (
        not found.strict
        and found.dtype == "float32"
        and set(found.saved_dtypes.split(",")) & HALVES
    ):
        advice = " Saved as float32 it does: choose that number format."
    raise ExportError(
        f"the checkpoint does not repeat the model and was deleted: {whose} {difference:.1e} of "
        f"the largest ({found.allowed:.1e} are allowed), and {found.argmax_agreement:.1%} of the "
        f"tokens keep their likeliest next token (form {form}, saved as {found.saved_dtypes})."
        + advice
    )


def rounding_notes(found: Verification) -> Iterator[str]:
    """What a routed model that was rounded does not share with the one in memory."""
    if found.passed and not found.repeats:
        yield (
            f"As {found.saved_dtypes}, tokens get another expert than in memory where scores are "
            f"close: {found.argmax_agreement:.1%} keep their likeliest next token, and the text is "
            f"predicted as well: its perplexity is × {found.ratio:.4f} ± {found.ratio_stderr:.4f}."
        )


def kept_note(rounded: Verification, found: Verification) -> str:
    """Why the files are not in the base model's format."""
    return (
        f"Saved as {found.saved_dtypes}: rounded to {rounded.saved_dtypes}, as the base model is, "
        f"tokens get other experts, and {rounded.argmax_agreement:.1%} of them keep their "
        "likeliest next token."
    )


def folder_size(folder: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

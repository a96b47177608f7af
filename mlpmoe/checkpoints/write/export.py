"""export(): a converted model as a checkpoint, proven to be the model that was measured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
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
from ...version import VERSION
from ..check.record import Measured, Record
from ..check.verification import (
    ExportError,
    Progress,
    Verification,
    fresh_process,
    verify_and_score,
)
from ..forms.choose import AUTO, make_form
from ..forms.form import Form, FormError, converted_mlps
from .target import check_target, target_folder

SAVED = "saved"  # the dtype of the base model's own files
SHARD = "5GB"  # as large as a file of the checkpoint becomes
SMALL_FILES = 20_000_000  # bytes, for tokenizer and configs
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
    repeats it exactly, and "saved" that of the base model's own files. on_progress(message, share)
    may raise to cancel.

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
    with (
        tempfile.TemporaryDirectory(prefix="mlpmoe-form-") as workspace,
        fresh_process() as other,  # which imports transformers while the checkpoint is made
    ):
        ids = None
        if text is not None:
            ids = torch.cat([part.ids for part in windows(model, text)])[:SCALING_TOKENS]
        made = make_form(model, form, Path(workspace), ids)
        tensors = as_dtype(made, saved)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with target_folder(folder, size + SMALL_FILES) as partial:
            report("writing the checkpoint", None)
            write_weights(made, tensors, partial, saved, model)
            del tensors
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            found, perplexity = verify_and_score(
                other, model, partial, text, known=known[1], exact=made.exact,
                trust_remote_code=made.remote_code, on_progress=report,
            )  # fmt: skip
            refuse_unless_same(found, made.name)
            measured = None
            if dense is not None and perplexity is not None:
                measured = Measured.of(dense, model, text, perplexity, report, known[0])
            record = Record(
                version=VERSION, spec=spec_of(model), origin=origin_of(model),
                form=made.name, architecture=made.architecture, remote_code=made.remote_code,
                notes=made.notes, text=text_name or ("a text" if text is not None else None),
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
        rounded = tensor.detach().to(wanted).contiguous()
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
    raise ExportError(
        f"the checkpoint does not repeat the model and was deleted: {whose} {difference:.1e} of "
        f"the largest ({found.allowed:.1e} are allowed), and {found.argmax_agreement:.1%} of the "
        f"tokens keep their likeliest next token (form {form}, saved as {found.saved_dtypes})."
        + advice
    )


def folder_size(folder: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

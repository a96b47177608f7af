"""What an export will write, before it is made: the form and why, the size, and the command that
does the same on one's own machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

from ...checkpoints.forms.choose import AUTO, BRANCHES, DENSE, FORMS, stock_moe
from ...checkpoints.forms.dense import plan_of
from ...checkpoints.forms.form import FormError, converted_mlps
from ...checkpoints.forms.moe_targets import TARGETS
from ...checkpoints.write.export import SAVED, saved_dtype
from ...checkpoints.write.target import DISK_RESERVE
from ...core.errors import UserError
from ...core.spec import ConversionSpec
from ...models import CALIBRATIONS, format_bytes
from ...models.host import available_memory, free_disk
from ...models.names import serves_visitors
from ..server.asked import Calibrated, Conversion, spec_of
from ..server.loaded import LoadedModel
from ..server.texts import OWN_PREFIX
from ..shell.run_words import model_name, short_recipe

# Bytes of a checkpoint made on a public host, whose disk and memory are shared by its visitors;
# twice this lies on the disk for a moment.
PUBLIC_LIMIT = 2_000_000_000
PROCESS_BYTES = 600_000_000  # that the fresh process takes beside the weights
MEASURED = "measured"  # the dtype that the model computes in here
ELSEWHERE = "Make it on your own machine with the command at the bottom of this tab."
WHERE_BRANCHES = (
    "{name} with its {what} as they are, and the Python code that runs them: to train on, and to "
    "open with trust_remote_code=True only"
)


@dataclass(frozen=True)
class Wanted:
    """What is to be exported."""

    model: str  # key
    asked: Conversion
    form: str  # one of FORMS
    dtype: str  # SAVED or MEASURED

    @property
    def spec(self) -> ConversionSpec:
        return spec_of(self.asked)

    def check(self) -> None:
        """Raise UserError for what the controls do not offer."""
        if self.form not in FORMS or self.dtype not in (SAVED, MEASURED):
            raise UserError("choose a form and a number format of the lists.")


def wanted_dtype(loaded: LoadedModel, dtype: str) -> torch.dtype:
    """The dtype that the files get."""
    return saved_dtype(loaded.model, SAVED if dtype == SAVED else None)


def dtype_choices(loaded: LoadedModel) -> list[tuple[str, str]]:
    """Labels and values of the number formats."""
    saved, measured = (_name(wanted_dtype(loaded, dtype)) for dtype in (SAVED, MEASURED))
    return [
        (f"as the base model was saved ({saved})", SAVED),
        (f"as it is measured here ({measured})", MEASURED),
    ]


def expected_bytes(loaded: LoadedModel, wanted: Wanted) -> int:
    """Bytes of the checkpoint, from the parameters: of the dense model while the conversion is
    not made."""
    made = loaded.is_converted(wanted.asked)
    report = loaded.structure.report(wanted.asked) if made else loaded.report
    return report.total * wanted_dtype(loaded, wanted.dtype).itemsize


def check_room(loaded: LoadedModel, wanted: Wanted, folder: Path) -> None:
    """Raise UserError if the checkpoint is too large for a public host, or does not fit into the
    disk or the memory here. folder: where it will be written, twice: as a folder and as a zip."""
    size = expected_bytes(loaded, wanted)
    if serves_visitors() and size > PUBLIC_LIMIT:
        raise UserError(
            f"this checkpoint would have {format_bytes(size)}, and this public page makes up to "
            f"{format_bytes(PUBLIC_LIMIT)}. {ELSEWHERE}"
        )
    free = free_disk(folder)
    if 2 * size + DISK_RESERVE > free:
        raise UserError(
            f"the checkpoint and its zip take {format_bytes(2 * size)}, but the disk here has "
            f"{format_bytes(free)} free. {ELSEWHERE}"
        )
    # rounded copies of the weights, and the model once more in the process that verifies it
    needed = size + loaded.report.total * loaded.checked.dtype.itemsize + PROCESS_BYTES
    available = available_memory(loaded.checked.device)
    if available is not None and needed > available:
        raise UserError(
            f"writing and verifying this checkpoint takes {format_bytes(needed)} of memory, but "
            f"{format_bytes(available)} are free here. {ELSEWHERE}"
        )


def plan(loaded: LoadedModel, wanted: Wanted) -> str:
    """What will be exported, as HTML: model and recipe, the form and why, the size."""
    size, dtype = expected_bytes(loaded, wanted), _name(wanted_dtype(loaded, wanted.dtype))
    words, problem = form_words(loaded, wanted)
    recipe = (
        f"<strong>{escape(model_name(loaded.key))}</strong>, {escape(short_recipe(wanted.spec))}"
    )
    shown = f'<p class="problem">{escape(words)}</p>' if problem else f"<p>{escape(words)}</p>"
    about = f"About {format_bytes(size)} in {dtype}."
    if serves_visitors() and size > PUBLIC_LIMIT:
        about += (
            f" That is more than this public page makes ({format_bytes(PUBLIC_LIMIT)}): {ELSEWHERE}"
        )
    return f'<p>{recipe}</p>{shown}<p class="note">{escape(about)}</p>'


def form_words(loaded: LoadedModel, wanted: Wanted) -> tuple[str, bool]:
    """The form that the checkpoint will take and why, in a sentence or two, and whether it is a
    refusal."""
    family = loaded.checked.architecture.removesuffix("ForCausalLM")
    routed, form = bool(wanted.spec.routed), wanted.form
    if wanted.spec.router == "oracle":
        return "The oracle is a bound, not a router: choose another one to export.", True
    if form == BRANCHES:
        return _branches(family, routed), False
    if form == DENSE and routed:
        return "Experts are chosen per token, so no plain dense model says the same.", True
    if form in TARGETS and not routed:
        return (
            f"{TARGETS[form].title} holds experts that are chosen per token; these are not.",
            True,
        )
    if not loaded.is_converted(wanted.asked):
        if routed:
            return (
                "A stock Mixture-of-Experts architecture that holds these experts: which one is "
                "seen once they are made from the calibration text."
            ), False
        return (
            f"A plain {family} model, which opens everywhere; how wide its MLPs become is seen "
            "once the calibration text has been looked at."
        ), False
    try:
        return (_routed if routed else _static)(loaded, wanted, family), False
    except FormError as error:
        return str(error), True


def _static(loaded: LoadedModel, wanted: Wanted, family: str) -> str:
    model, spec = loaded.converted(wanted.asked), wanted.spec
    try:
        found = plan_of(model)
    except FormError as error:
        if wanted.form == DENSE:
            raise
        return f"{_branches(family, False)} {error}"
    name = type(found.skeleton).__name__.removesuffix("ForCausalLM")
    narrow = max(sum(mlp.sizes) for mlp in converted_mlps(model).values())
    whole = loaded.d_ff
    neurons = f" with {narrow:,} of {whole:,} neurons per MLP" if narrow < whole else ""
    zeros = spec.fades and spec.fade_unit != "neuron"
    if narrow < whole:
        gain = "opens everywhere, is smaller and runs faster"
        gain += "; what fade zeroed stays in place as zeros" if zeros else ""
    elif zeros:
        gain = "opens everywhere; zeros stay in place, so it has the same size and speed"
    else:
        gain = "opens everywhere, as large and as fast as before: nothing is removed yet"
    return " ".join([f"A plain {name} model{neurons}: {gain}.", *found.notes])


def _routed(loaded: LoadedModel, wanted: Wanted, family: str) -> str:
    form, reason = stock_moe(loaded.converted(wanted.asked), wanted.form)
    if form is None:
        return f"{_branches(family, True)} {reason}"
    _, note = TARGETS[form].in_files(wanted_dtype(loaded, wanted.dtype))
    return f"A stock {TARGETS[form].title} model: {note}"


def _branches(family: str, routed: bool) -> str:
    what = "experts and routers" if routed else "branches and their α"
    return f"{WHERE_BRANCHES.format(name=family, what=what)}."


def folder_name(wanted: Wanted) -> str:
    """A short name for the checkpoint, such as demo-b16-k12 or demo-cmoe-75."""
    spec = wanted.spec
    base = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(wanted.model).name).strip("-.")[:60] or "model"
    if spec.routed:
        return f"{base}-{spec.method}-{100 * spec.active:.3g}"
    parts = [base, f"b{spec.branches}"]
    if spec.fade:
        parts.append(f"fade{100 * spec.fade:.3g}")
    if spec.pattern:
        parts.append("of".join(map(str, spec.pattern)))
    if spec.kept < spec.branches:
        parts.append(f"k{spec.kept}")
    return "-".join(parts)


def command(loaded: LoadedModel, wanted: Wanted, text: str) -> str:
    """The shell commands that make the same checkpoint and push it."""
    name = folder_name(wanted)
    parts = ["python -m mlpmoe convert", shlex.quote(wanted.model), name, wanted.spec.to_flags()]
    parts += _more_flags(loaded, wanted)
    parts.append(f"--text {'own-text.txt' if text.startswith(OWN_PREFIX) else text}")
    return f"{' '.join(parts)}\nhf upload OWNER/{name} {name}  # OWNER: your name on the hub"


def _more_flags(loaded: LoadedModel, wanted: Wanted) -> Iterator[str]:
    if wanted.form != AUTO:
        yield f"--form {wanted.form}"
    if wanted.dtype != SAVED:
        yield f"--dtype {_name(wanted_dtype(loaded, wanted.dtype))}"
    asked = wanted.asked
    if isinstance(asked, Calibrated) and wanted.spec.needs_calibration:
        yield f"--calibration {asked.key if asked.key in CALIBRATIONS else 'own-calibration.txt'}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

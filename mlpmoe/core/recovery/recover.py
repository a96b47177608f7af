"""recover(): a converted model learns the dense model's next-token distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..checks import real
from ..errors import SpecError
from ..memory import available_memory
from ..mlps import context_length
from ..spec import ConversionSpec
from ..stopping import stoppable
from .course import Course, at_once
from .divergence import AT_ONCE
from .kinds import RECOVERIES
from .masks import MaskStudent
from .recount import recount
from .report import RecoveryReport
from .samples import Samples
from .saved import Saved, key_of
from .student import Student
from .tensors import TensorStudent

# Bytes of each trained number in float32: itself, its gradient, two moments, the best so far.
BYTES_EACH = 20
STATES = 12  # numbers per token and d_model that a layer keeps for its gradient
LONGEST = 1e7  # seconds that a limit may be
STUDENTS: dict[str, type[Student]] = {"masks": MaskStudent}  # others train tensors


@torch.no_grad()
def recover(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    spec: ConversionSpec,
    calibration: Calibration,
    on_progress: Callable[[str, float], None] | None = None,
    state: Path | None = None,
    seconds: float | None = None,
    on_look: Callable[[RecoveryReport], None] | None = None,
) -> RecoveryReport:
    """Train what `spec.recover` names in `converted`, in place, so that it predicts the next token
    as `dense` does: the least KL(dense ‖ converted) on the calibration text, and of what the
    student adds to it.

    AdamW without weight decay, the rate warmed up and then lowered along a cosine, BATCH_TOKENS
    tokens per step, gradients cut to length 1. Some rows of the text are never trained on; the
    weights with the least KL there are kept, those of before included, so it is never worse there.
    dense: unchanged, also where both share tensors: what is trained becomes a tensor of its own.
    on_progress(message, share) may raise to end it: then `converted` is as before. on_look(report)
    is told what was done so far after each look at the held-out text, and where it goes on from a
    file. state: a folder where it is kept every SAVE_EVERY steps, and when it is ended by raising;
    what was begun there goes on, on a CPU to the same bits. A loss that is not finite ends it; the
    report says so, and the best weights are kept.

    seconds: of training, at most. From the time that a first step takes the course is made of as
    many steps as fit, and the result is that of a spec with so many, `report.done(spec)`. Where
    steps get slower it ends in time all the same, with the best weights so far, and the report
    says `cut_short`: such a result has no spec.

    Raises SpecError where there is nothing to train, the text is too short, or memory is; UserError
    for a limit that holds no step.
    """
    if seconds is not None:
        seconds = real("the time limit of training", seconds, 0, LONGEST)
    steps, seed = spec.recover_steps, spec.seed
    samples = Samples.of(calibration, steps, seed, context_length(dense))
    student = STUDENTS.get(spec.recover, TensorStudent)(converted, spec)
    _check_memory(spec, student, samples, converted)
    saved = None
    if state is not None:
        key = key_of(converted, student.begins_with, spec, calibration, seconds)
        saved = Saved(state, key)
    tell = on_progress or _tell_nobody, on_look or _tell_nobody
    course = Course(dense, student, samples, spec, *tell, saved, seconds)
    with stoppable(course.tell):
        report = course.run()
    report = replace(report, result=student.fingerprint())
    if report.best or student.draft:
        student.write(converted)
        recount(converted, calibration.samples)
    if saved:
        saved.remove()
    return report


def _tell_nobody(*said: object) -> None: ...


def _check_memory(
    spec: ConversionSpec, student: Student, samples: Samples, model: PreTrainedModel
) -> None:
    """SpecError, with both numbers, unless there is room for the optimiser and for what a step
    keeps of the model."""
    config = model.config.get_text_config(decoder=True)
    tokens, size = samples.train.shape[1], model.dtype.itemsize
    pieces = at_once(config.vocab_size, tokens) * tokens
    pieces = min(pieces, samples.order.shape[1] * tokens)  # tokens that are run at a time
    kept = STATES * config.hidden_size + student.kept_per_neuron * student.widest
    needed = (
        BYTES_EACH * sum(p.numel() for p in student.trained)
        + student.bytes_of_a_pass()
        + 4 * pieces * config.vocab_size * size  # logits of both, gradients
        + 16 * AT_ONCE
        + pieces * config.num_hidden_layers * kept * size
    )
    available = available_memory(model.device)
    if available is not None and needed > available:
        raise SpecError(
            f"training {RECOVERIES[spec.recover].label} needs about {needed / 1e9:.1f} GB beside "
            f"the models, and {available / 1e9:.1f} GB are free. Train less: alpha, router or lora."
        )

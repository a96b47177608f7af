"""recover(): a converted model learns the dense model's next-token distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..descent import BETAS, CLIP, height
from ..errors import SpecError
from ..memory import available_memory
from ..spec import ConversionSpec
from ..stopping import may_stop, stoppable
from .divergence import AT_ONCE, divergence
from .kinds import RECOVERIES
from .masks import MaskStudent
from .recount import recount
from .report import Look, RecoveryReport
from .samples import Samples
from .saved import Saved, key_of
from .student import Student, frozen_twin
from .tensors import TensorStudent

LOOKS = 8  # at the held-out text, beside the first
SAVE_EVERY = 20  # steps
LOGITS = 2**25  # of a piece of a batch
FLOAT16_SCALE = 2.0**10  # of the loss: float16 has no room for small gradients
# Bytes of each trained number in float32: itself, its gradient, two moments, the best so far.
BYTES_EACH = 20
STATES = 12  # numbers per token and d_model that a layer keeps for its gradient
STUDENTS: dict[str, type[Student]] = {"masks": MaskStudent}  # others train tensors


@torch.no_grad()
def recover(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    spec: ConversionSpec,
    calibration: Calibration,
    on_progress: Callable[[str, float], None] | None = None,
    state: Path | None = None,
) -> RecoveryReport:
    """Train what `spec.recover` names in `converted`, in place, so that it predicts the next token
    as `dense` does: the least KL(dense ‖ converted) on the calibration text, and of what the
    student adds to it.

    AdamW without weight decay, the rate warmed up and then lowered along a cosine, BATCH_TOKENS
    tokens per step, gradients cut to length 1. The text's last samples are never trained on; the
    weights that do best on them are kept, those of before included, so it is never worse there.
    dense: unchanged, also where both share tensors: what is trained becomes a tensor of its own.
    on_progress(message, share) may raise to end it: then `converted` is as before. state: a folder
    where it is kept every SAVE_EVERY steps; what was begun there goes on, on a CPU to the same
    bits. A loss that is not finite ends it; the report says so, and the best weights are kept.

    Raises SpecError where there is nothing to train, the text is too short, or memory is.
    """
    samples = Samples.of(calibration, spec.recover_steps, spec.seed)
    student = STUDENTS.get(spec.recover, TensorStudent)(converted, spec)
    _check_memory(spec, student, samples, converted)
    saved = None
    if state is not None:
        saved = Saved(state, key_of(converted, student.begins_with, spec, calibration))
    course = _Course(dense, student, samples, spec, on_progress or (lambda *said: None), saved)
    with stoppable(course.tell):
        report = course.run()
    if report.best or student.draft:
        student.write(converted)
        recount(converted, calibration.samples)
    if saved:
        saved.remove()
    return report


@dataclass
class _Course:
    """One recovery under way."""

    dense: PreTrainedModel
    student: Student
    samples: Samples
    spec: ConversionSpec
    on_progress: Callable[[str, float], None]
    saved: Saved | None
    step: int = 0  # that are done
    looks: list[Look] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # since the last look
    best: int = 0
    best_weights: list[Tensor] = field(default_factory=list)
    before: float = 0.0  # seconds, of the process that was killed

    def __post_init__(self) -> None:
        self.steps, self.started = self.spec.recover_steps, monotonic()
        self.teacher = frozen_twin(self.dense)
        vocabulary = self.dense.config.get_text_config(decoder=True).vocab_size
        self.at_once = max(1, LOGITS // (vocabulary * self.samples.train.shape[1]))
        self.looked_at = {round(self.steps * part / LOOKS) for part in range(1, LOOKS + 1)}
        rate = self.spec.recover_rate or RECOVERIES[self.spec.recover].rate
        groups = [
            {"params": [p], "lr": rate * pace, "most": rate * pace}
            for p, pace in zip(self.student.trained, self.student.paces, strict=True)
        ]
        half = self.dense.dtype == torch.float16
        self.scale = FLOAT16_SCALE if half else 1.0
        optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
        # Rounding to 16 bits is the student's, and tensors stay on the model's device; so models
        # of several dtypes and devices can be trained in one process, which has one such state.
        self.accelerator = Accelerator(device_placement=False, mixed_precision="no")
        self.student, self.optimizer = self.accelerator.prepare(self.student, optimizer)

    def run(self) -> RecoveryReport:
        stopped = None
        if not self._resume():
            self._look()
            if not isfinite(self.looks[0].held_out):
                stopped = "the converted model's outputs are not finite."
        while stopped is None and self.step < self.steps:
            if not self._train():
                stopped = f"the loss is not finite at step {self.step + 1}."
                break
            self.step += 1
            if self.step in self.looked_at and not self._look():
                stopped = f"the loss is not finite after step {self.step}."
            elif self.step % SAVE_EVERY == 0 and self.step < self.steps:
                self._save()
        with torch.no_grad():
            for own, best in zip(self._trained(), self.best_weights, strict=True):
                own.copy_(best)
        return RecoveryReport(
            what=self.spec.recover,
            steps=self.step,
            parameters=sum(p.numel() for p in self._trained()),
            seconds=self.before + monotonic() - self.started,
            tokens=self.step * self.samples.order.shape[1] * self.samples.train.shape[1],
            held_out_tokens=self.samples.held_out.numel(),
            looks=tuple(self.looks),
            best=self.best,
            stopped=stopped,
            active=self._plain().active,
        )

    def _train(self) -> bool:
        """One step; False, and nothing changed, if the loss or its gradient is not finite."""
        ids = self.samples.train[self.samples.order[self.step]]
        total = 0.0
        for some in ids.split(self.at_once):
            may_stop()
            with torch.enable_grad():
                found = loss = self._divergence(some, self.step) / ids.numel()
                if (penalty := self._plain().penalty) is not None:
                    loss = found + penalty * (some.numel() / ids.numel())
                self.accelerator.backward(self.scale * loss.float())
            total += float(found)
        for parameter in self._trained():
            parameter.grad.div_(self.scale)
        length = self.accelerator.clip_grad_norm_(self._trained(), CLIP)
        fine = isfinite(total) and bool(torch.isfinite(length))
        if fine:
            for group in self.optimizer.param_groups:
                group["lr"] = group["most"] * height(self.step, self.steps)
            self.optimizer.step()
            self.losses.append(total)
        self.optimizer.zero_grad()
        return fine

    def _divergence(self, ids: Tensor, step: int | None = None) -> Tensor:
        """Σ KL over the tokens of (samples, tokens); of the model as it is now, or as a step of
        the training sees it."""
        ids = ids.to(self.dense.device)
        with torch.no_grad():
            wanted = self.teacher(ids, use_cache=False).logits
        return divergence(self.student(ids, step), wanted)

    def _look(self) -> bool:
        """At the held-out text, keeping the weights if they are the best so far; False if the
        result is not finite."""
        held_out, total = self.samples.held_out, 0.0
        for some in held_out.split(self.at_once):
            may_stop()
            total += float(self._divergence(some))
        found = total / held_out.numel()
        train = sum(self.losses) / len(self.losses) if self.losses else None
        best = min((look.held_out for look in self.looks), default=None)
        self.looks.append(Look(self.step, train, found))
        self.losses = []
        if best is None or found < best:
            self.best = self.step
            self.best_weights = [p.detach().clone() for p in self._trained()]
        self.tell()
        return isfinite(found)

    def tell(self) -> None:
        """Say how far it is, which may end it."""
        message = f"training {self.spec.recover}, step {self.step} of {self.steps}"
        if self.looks:
            message += f", held-out KL {self.looks[-1].held_out:.4g}"
        if len(self.looks) > 1:
            message += f" (before {self.looks[0].held_out:.4g})"
        self.on_progress(message, self.step / self.steps)

    def _plain(self) -> Student:
        return self.accelerator.unwrap_model(self.student)

    def _trained(self) -> list[torch.nn.Parameter]:
        return self._plain().trained

    def _save(self) -> None:
        if self.saved:
            self.saved.write(
                {
                    "step": self.step,
                    "weights": [p.detach() for p in self._trained()],
                    "optimizer": self.optimizer.state_dict(),
                    "looks": [tuple(look) for look in self.looks],
                    "losses": self.losses,
                    "best": self.best,
                    "best_weights": self.best_weights,
                    "seconds": self.before + monotonic() - self.started,
                }
            )

    def _resume(self) -> bool:
        """Go on from the file, if there is one. What is drawn on the way depends on the seed and
        the step only, so there is no state of a random generator to restore."""
        values: dict[str, Any] | None = self.saved.read() if self.saved else None
        if values is None:
            return False
        own = self._trained()
        for parameter, value in zip(own, values["weights"], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(values["optimizer"])
        self.looks = [Look(*look) for look in values["looks"]]
        self.losses, self.step, self.best = values["losses"], values["step"], values["best"]
        pairs = zip(values["best_weights"], own, strict=True)
        self.best_weights = [value.to(parameter.device) for value, parameter in pairs]
        self.before = values["seconds"]
        return True


def _check_memory(
    spec: ConversionSpec, student: Student, samples: Samples, model: PreTrainedModel
) -> None:
    """SpecError, with both numbers, unless there is room for the optimiser and for what a step
    keeps of the model."""
    config = model.config.get_text_config(decoder=True)
    tokens, size = samples.train.shape[1], model.dtype.itemsize
    pieces = max(1, LOGITS // (config.vocab_size * tokens)) * tokens
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
            f"recover {spec.recover} needs about {needed / 1e9:.1f} GB beside the models, and "
            f"{available / 1e9:.1f} GB are free. Train less: alpha, router or lora."
        )

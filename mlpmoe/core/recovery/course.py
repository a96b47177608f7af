"""One training under way: its steps, its looks at the held-out text, its limit of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from time import monotonic
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from ..descent import BETAS, CLIP, height
from ..errors import UserError, not_finite
from ..spec import ConversionSpec
from ..stopping import may_stop
from .divergence import divergence
from .kinds import RECOVERIES
from .report import Look, RecoveryReport
from .samples import BATCH_TOKENS, HELD_OUT_SHARE, MOST_HELD_OUT, Samples
from .saved import Saved
from .student import Student, frozen_twin

LOOKS = 8  # at the held-out text, beside the first
SAVE_EVERY = 20  # steps
LOGITS = 2**25  # of a piece of a batch
FLOAT16_SCALE = 2.0**10  # of the loss: float16 has no room for small gradients
PASSES = 4  # forward passes that a step takes as long as: of both models, and backwards
PLANNED = 0.9  # of a limit of time; the rest is for steps that take longer than the first


def looked_at(steps: int) -> set[int]:
    """The numbers of steps after which the held-out text is looked at."""
    return {round(steps * part / LOOKS) for part in range(LOOKS + 1)}


def forward_tokens(steps: int, samples: int, length: int) -> int:
    """Tokens of forward passes that so many steps on a calibration text take about as long as, with
    the looks at what is held out."""
    held_out = max(length, min(MOST_HELD_OUT, samples * length // HELD_OUT_SHARE))
    step = max(length, BATCH_TOKENS)
    return PASSES * steps * step + 2 * len(looked_at(steps)) * held_out


def at_once(vocabulary: int, length: int) -> int:
    """Samples of so many tokens that are run at a time."""
    return max(1, LOGITS // (vocabulary * length))


@dataclass
class Course:
    """See `recover`. Everything a run needs, and what it has come to."""

    dense: PreTrainedModel
    student: Student
    samples: Samples
    spec: ConversionSpec
    on_progress: Callable[[str, float], None]
    on_look: Callable[[RecoveryReport], None]
    saved: Saved | None = None
    seconds: float | None = None  # that it may take
    step: int = 0  # that are done
    looks: list[Look] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # since the last look
    rate: float = 0.0  # at its highest
    best: int = 0
    best_weights: list[Tensor] = field(default_factory=list)
    before: float = 0.0  # seconds, of the process that was stopped
    kept: int = 0  # the step that the file has
    whole: bool = True  # whether all of the above is of the same step
    look_seconds: float = 0.0  # that a look takes
    cut_short: bool = False  # by the limit

    def __post_init__(self) -> None:
        self.steps, self.started = self.spec.recover_steps, monotonic()
        self.teacher = frozen_twin(self.dense)
        vocabulary = self.dense.config.get_text_config(decoder=True).vocab_size
        self.at_once = at_once(vocabulary, self.samples.train.shape[1])
        groups = [
            {"params": [p], "pace": pace}
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
        """To the end; then the student has the best weights. What ends it early by raising leaves
        the file as of the last step that was done."""
        try:
            stopped = self._go_on() if self._resume() else self._begin()
        except BaseException:
            if self.whole and self.step > self.kept:
                self._save()
            raise
        for own, best in zip(self._trained(), self.best_weights, strict=True):
            own.copy_(best)
        return self.report(stopped)

    def report(self, stopped: str | None = None) -> RecoveryReport:
        """What was done so far."""
        return RecoveryReport(
            what=self.spec.recover,
            steps=self.step,
            planned=self.steps,
            asked=self.spec.recover_steps,
            rate=self.rate,
            parameters=sum(p.numel() for p in self._trained()),
            seconds=self._elapsed(),
            tokens=self.step * self.samples.order.shape[1] * self.samples.train.shape[1],
            held_out_tokens=self.samples.held_out.numel(),
            looks=tuple(self.looks),
            best=self.best,
            stopped=stopped,
            cut_short=self.cut_short,
            active=self._plain().active,
        )

    def tell(self) -> None:
        """Say how far it is, which may end it."""
        message = f"training {self.spec.recover}, step {self.step} of {self.steps}"
        self.on_progress(message, self.step / self.steps)

    def _begin(self) -> str | None:
        if not self._look():
            if self.dense.dtype == torch.float16:
                raise not_finite("this model", self.dense.dtype)
            return "the converted model's outputs are not finite."
        before = self.looks[0].held_out
        self.rate = self.spec.recover_rate or RECOVERIES[self.spec.recover].rate_at(before)
        self._plan()
        return self._go_on()

    def _go_on(self) -> str | None:
        """The steps that are left; why it ends before the last, if it does."""
        due = looked_at(self.steps)
        while True:
            if self.step in due and self.looks[-1].step < self.step and not self._look():
                return f"the loss is not finite after step {self.step}."
            if self.step == self.steps:
                return None
            if self._is_late():
                if self.looks[-1].step < self.step:
                    self._look()
                self.cut_short = True
                return f"the time limit of {self.seconds:.0f} s ended it at step {self.step}."
            if self.step % SAVE_EVERY == 0 and self.step > self.kept:
                self._save()
            if not self._train():
                return f"the loss is not finite at step {self.step + 1}."

    def _plan(self) -> None:
        """As many steps as fit into the time, from one that is tried and leaves no trace. The rate
        falls over these, so the result is that of a spec with so many steps."""
        if self.seconds is None:
            return
        started = monotonic()
        self._gradients()
        self.optimizer.zero_grad()
        each = monotonic() - started
        left = PLANNED * self.seconds - self._elapsed()
        steps = (left - LOOKS * self.look_seconds) / max(each, 1e-9)
        if steps < LOOKS:  # which are looked at one by one
            steps = left / max(each + self.look_seconds, 1e-9)
        if steps < 1:
            needed = (self._elapsed() + each + self.look_seconds) / PLANNED
            raise UserError(
                f"the time limit of {self.seconds:.0f} s is too short for a step of training, "
                f"which needs about {needed:.0f} s here with what has to be computed before it."
            )
        self.steps = min(self.steps, int(steps))

    def _elapsed(self) -> float:
        """Seconds of training, in all."""
        return self.before + monotonic() - self.started

    def _is_late(self) -> bool:
        return self.seconds is not None and self._elapsed() + self.look_seconds > self.seconds

    def _train(self) -> bool:
        """One step; False, and nothing changed, if the loss or its gradient is not finite."""
        total = self._gradients()
        length = self.accelerator.clip_grad_norm_(self._trained(), CLIP)
        fine = isfinite(total) and bool(torch.isfinite(length))
        if fine:
            self.whole = False
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * group["pace"] * height(self.step, self.steps)
            self.optimizer.step()
            self.losses.append(total)
            self.step += 1
            self.whole = True
        self.optimizer.zero_grad()
        return fine

    def _gradients(self) -> float:
        """Those of the next step's samples; returns the divergence per token."""
        ids = self.samples.train[self.samples.order[self.step]]
        total = 0.0
        for some in ids.split(self.at_once):
            may_stop()
            with torch.enable_grad():
                found = loss = self._divergence(some, self.step) / ids.numel()
                if (penalty := self._plain().penalty) is not None:
                    share = some.numel() / ids.numel()
                    loss = found + (penalty * share).to(found.device)
                self.accelerator.backward(self.scale * loss.float())
            total += float(found)
        for parameter in self._trained():
            parameter.grad.div_(self.scale)
        return total

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
        started, held_out, total = monotonic(), self.samples.held_out, 0.0
        for some in held_out.split(self.at_once):
            may_stop()
            total += float(self._divergence(some))
        self.look_seconds = monotonic() - started
        found = total / held_out.numel()
        train = sum(self.losses) / len(self.losses) if self.losses else None
        best = min((look.held_out for look in self.looks), default=None)
        self.whole = False
        self.looks.append(Look(self.step, train, found))
        self.losses = []
        if best is None or found < best:
            self.best = self.step
            self.best_weights = [p.detach().clone() for p in self._trained()]
        self.whole = True
        self.on_look(self.report())
        self.tell()
        return isfinite(found)

    def _plain(self) -> Student:
        return self.accelerator.unwrap_model(self.student)

    def _trained(self) -> list[torch.nn.Parameter]:
        return self._plain().trained

    def _save(self) -> None:
        if self.saved:
            self.saved.write(
                {
                    "step": self.step,
                    "steps": self.steps,
                    "weights": [p.detach() for p in self._trained()],
                    "optimizer": self.optimizer.state_dict(),
                    "looks": [tuple(look) for look in self.looks],
                    "losses": self.losses,
                    "rate": self.rate,
                    "best": self.best,
                    "best_weights": self.best_weights,
                    "seconds": self._elapsed(),
                }
            )
            self.kept = self.step

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
        self.losses, self.best, self.rate = values["losses"], values["best"], values["rate"]
        self.step, self.steps, self.kept = values["step"], values["steps"], values["step"]
        pairs = zip(values["best_weights"], own, strict=True)
        self.best_weights = [value.to(parameter.device) for value, parameter in pairs]
        self.before = values["seconds"]
        self.on_look(self.report())
        return True

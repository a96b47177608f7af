"""Proof that a checkpoint is the model that was measured: reload it elsewhere and compare."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import IO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.conversion import twin_of
from ...core.errors import UserError, not_finite
from ...core.routed import ROUTED_TYPES
from ...measure.quality.encoding import EncodedText, Window, encode_text, windows
from ...measure.quality.perplexity import Perplexity, summarise
from ...models.scratch import scratch_folder
from . import reload
from .sameness import Verification, compared

Progress = Callable[[str, "float | None"], None]
RANDOM_TOKENS = 128  # compared where no text is given
POLL = 0.2  # seconds between looks at the other process


class ExportError(UserError):
    """A checkpoint was not made, or is not what it should be; the message says why."""


def verify(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | EncodedText | None = None,
    *,
    exact: bool = True,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
) -> Verification:
    """Open the checkpoint in `folder` in a fresh process with transformers alone, and compare it
    with `model` on the same tokens, both in the dtype of `model`.

    text: what perplexity is taken on, with the tokenizer; without, random tokens are compared.
    exact: whether the checkpoint is to compute the same, which is max|Δlogit| at most EXACT of the
    largest logit; where it is not, and where something was rounded to 16 bits, the median token
    and the agreement count, or for a routed model the text, see `sameness`. trust_remote_code:
    whether the checkpoint may run its own code. Raises ExportError if it cannot be opened,
    UserError if `model` itself computes infinite or undefined numbers.
    """
    encoded = encode_text(tokenizer, text) if isinstance(text, str) and tokenizer else text
    with fresh_process() as other:
        return verify_and_score(
            other, model, folder, encoded if isinstance(encoded, EncodedText) else None,
            exact=exact, trust_remote_code=trust_remote_code, on_progress=on_progress,
        )[0]  # fmt: skip


def verify_and_score(
    other: FreshProcess,
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    text: EncodedText | None,
    *,
    known: Perplexity | None = None,
    exact: bool = True,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
) -> tuple[Verification, Perplexity | None]:
    """`verify` in a process that waits for it, and the perplexity of the model in memory. known:
    that perplexity, where it was measured before on this text: then only the logits are taken."""
    report = on_progress or (lambda message, share: None)
    parts = None if text is None else windows(model, text)
    pieces = pieces_of(parts, model)
    report("opening the checkpoint in a fresh process", None)
    other.ask(folder, pieces, model.dtype, str(model.device), trust_remote_code)

    def on_share(share: float) -> None:
        other.check()
        report("comparing with the model in memory", share)

    mine = reload.answers(
        twin_of(model).eval(), _with_logits(pieces) if known else pieces, model.device, on_share
    )
    if not mine["logits"].isfinite().all():
        raise not_finite("this model", model.dtype)
    if known:
        mine["losses"] = known.losses
    theirs, dtypes = other.answers(report)
    routed = any(isinstance(module, ROUTED_TYPES) for module in model.modules())
    found = compared(mine, theirs, dtypes, model.dtype, exact, parts, routed)
    return found, known or (None if parts is None else summarise(mine["losses"], parts))


def _with_logits(pieces: Sequence[tuple[Tensor, int]]) -> Sequence[tuple[Tensor, int]]:
    """The first of them, of which `reload.answers` gives logits."""
    tokens = 0
    for count, (ids, _) in enumerate(pieces, 1):
        tokens += len(ids)
        if tokens >= reload.LOGIT_TOKENS:
            return pieces[:count]
    return pieces


def pieces_of(parts: Sequence[Window] | None, model: PreTrainedModel) -> list[tuple[Tensor, int]]:
    """Ids and first scored token of each window; without a text, of random tokens."""
    if parts is None:
        return [(random_ids(model), 1)]
    return [(part.ids, part.first) for part in parts]


@dataclass(frozen=True)
class FreshProcess:
    """A Python of its own, with transformers alone, that opens one checkpoint and runs it while
    this process does something else."""

    process: Popen
    room: Path  # its folder
    errors: IO[bytes]  # what it says

    def ask(
        self, folder: str | os.PathLike[str], pieces: Sequence[tuple[Tensor, int]],
        dtype: torch.dtype, device: str, code: bool,
    ) -> None:  # fmt: skip
        """Let it open the checkpoint, which is whole by now, and score these windows."""
        asked = self.room / "windows.safetensors"
        tensors = {f"ids.{index}": ids.clone() for index, (ids, _) in enumerate(pieces)}
        try:
            save_file(tensors | {"firsts": torch.tensor([first for _, first in pieces])}, asked)
        except Exception as error:  # safetensors raises its own
            raise _no_room() from error
        request = [
            os.path.abspath(folder), str(asked), str(self._answered),
            str(dtype).removeprefix("torch."), device, code,
        ]  # fmt: skip
        with suppress(BrokenPipeError):  # it ended: `check` says why
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()  # and left open: it ends when this process does

    def check(self) -> None:
        """Raise ExportError if it failed."""
        if self.process.poll() == reload.NO_ROOM:
            raise _no_room()
        if self.process.poll():
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").split("\n")
            reason = next((line for line in reversed(said) if line.strip()), "no reason given")
            raise ExportError(f"the checkpoint cannot be opened again: {reason.strip():.300}")

    def answers(self, report: Progress) -> tuple[dict[str, Tensor], str]:
        """Losses and logits, and the dtypes on disk, once it is done. Raises ExportError if it
        fails."""
        while self.process.poll() is None:
            report("waiting for the fresh process", None)
            try:
                self.process.wait(POLL)
            except TimeoutExpired:
                continue
        self.check()
        with safe_open(self._answered, framework="pt") as found:
            dtypes = found.metadata()["dtypes"]
            return {name: found.get_tensor(name) for name in ("losses", "logits")}, dtypes

    def probe(self) -> tuple[list[int] | None, str]:
        """The token ids that the checkpoint's tokenizer makes of `reload.PROBE`, once answers are
        there; None without a tokenizer that can be read, and why."""
        with safe_open(self._answered, framework="pt") as found:
            ids = found.get_tensor("probe").tolist() if "probe" in found.keys() else None
            return ids, found.metadata()["tokenizer"]

    @property
    def _answered(self) -> Path:
        return self.room / "answers.safetensors"


def _no_room() -> ExportError:
    return ExportError(
        "the checkpoint cannot be compared: the disk for temporary files is full, or takes nothing."
    )


@contextmanager
def fresh_process() -> Iterator[FreshProcess]:
    """A process that imports what it needs, which takes seconds, and waits to be asked; it ends
    with the block, whatever it is doing."""
    with scratch_folder("verify") as room, open(room / "errors", "w+b") as errors:
        # its own module cache: code of a checkpoint leaves nothing behind
        settings = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(room)}
        process = Popen(
            [sys.executable, "-P", reload.__file__], cwd=room, env=os.environ | settings,
            stdin=PIPE, stdout=errors, stderr=errors,
        )  # fmt: skip
        try:
            yield FreshProcess(process, room, errors)
        finally:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()


def random_ids(model: PreTrainedModel) -> Tensor:
    """(RANDOM_TOKENS,) int64, always the same: what is compared without a text."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (RANDOM_TOKENS,), generator=generator)

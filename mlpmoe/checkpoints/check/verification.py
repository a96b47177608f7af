"""Proof that a checkpoint is the model that was measured: reload it elsewhere and compare."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import IO, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.conversion import twin_of
from ...core.errors import UserError
from ...core.routed import ROUTED_TYPES
from ...measure.quality.encoding import EncodedText, Window, encode_text, windows
from ...measure.quality.perplexity import Perplexity, compare, summarise
from ...models.scratch import scratch_folder
from ..forms.form import EXACT
from . import reload

Progress = Callable[[str, "float | None"], None]
# Where a token may get another expert, that token's logits say nothing about the others: the
# difference of the median token counts, and how many keep their likeliest next token.
TYPICAL, AGREEMENT = 2e-3, 0.97
# What rounding to 16 bits may add: some times the rounding step of the dtype (2^-8 and 2^-11),
# since it grows over the layers. Random models have near ties where trained ones are sure.
ROUNDING, ROUNDED_AGREEMENT = {torch.bfloat16: 0.05, torch.float16: 0.007}, 0.85
# Rounding gives tokens other experts where scores are close, in 30 layers most of them: they say
# something else, and predict a text as well. So there a text may decide: its loss changes by less
# than so many nats per token, or than so many of its standard errors, which are small themselves.
SAME_LOSS, SAME_ERRORS, MOST_ERROR = 0.01, 3.0, 0.03
LEAST_AGREEMENT = 0.5
RANDOM_TOKENS = 128  # compared where no text is given
POLL = 0.2  # seconds between looks at the other process


class ExportError(UserError):
    """A checkpoint was not made, or is not what it should be; the message says why."""


@dataclass(frozen=True)
class Verification:
    """How exactly a checkpoint, opened in a fresh process, repeats the model in memory.

    Differences are relative to the largest logit of all compared tokens, but for the first.
    """

    max_logit_difference: float  # max|Δlogit|
    relative_difference: float  # the same, relative
    typical_difference: float  # max|Δlogit| of the median token, relative
    argmax_agreement: float  # share of the compared tokens whose likeliest next token is the same
    kl: float  # nats per token, from the model in memory to the reloaded one
    compared_tokens: int
    strict: bool  # whether every token counts; else the median one and the agreement
    allowed: float  # of the relative, or of the typical difference
    allowed_agreement: float
    perplexity: float | None  # of the model in memory; None without a text
    reloaded_perplexity: float | None
    stderr: float | None  # of the first
    scored_tokens: int
    saved_dtypes: str  # of the matrices on disk, as safetensors calls them: F32, BF16, ...
    dtype: str  # that both computed in
    # perplexity reloaded to that in memory and its error, where these may decide; else None
    ratio: float | None = None
    ratio_stderr: float | None = None

    @property
    def passed(self) -> bool:
        return self.repeats or self.predicts_as_well

    @property
    def repeats(self) -> bool:
        """Whether it says the same for each token, or for nearly all where not `strict`."""
        judged = self.relative_difference if self.strict else self.typical_difference
        return judged <= self.allowed and self.argmax_agreement >= self.allowed_agreement

    @property
    def predicts_as_well(self) -> bool:
        """Whether it is a routed model that was rounded, or nearly holds, and predicts the text as
        well as the one in memory."""
        if self.ratio is None or not self.ratio_stderr <= MOST_ERROR:  # NaN is no error
            return False
        same = max(SAME_LOSS, SAME_ERRORS * self.ratio_stderr)
        return abs(math.log(self.ratio)) <= same and self.argmax_agreement >= LEAST_AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


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
    and the agreement count, see TYPICAL and ROUNDING, or for a routed model the text, see
    SAME_LOSS. trust_remote_code: whether the checkpoint may run its own code. Raises ExportError
    if it cannot be opened.
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


def compared(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], dtypes: str, dtype: torch.dtype,
    exact: bool = True, parts: Sequence[Window] | None = None, routed: bool = False,
) -> Verification:  # fmt: skip
    """The two sets of answers side by side; parts: the windows of the text they are for, if any.
    routed: whether tokens choose experts, so that a text may decide."""
    logits, other = mine["logits"], theirs["logits"]
    by_token = (logits - other).abs().amax(-1)  # (tokens,)
    largest = logits.abs().max().item() or 1.0
    same = (logits.argmax(-1) == other.argmax(-1)).float().mean().item()
    values: list[Perplexity | None] = [None, None]
    if parts is not None:
        values = [summarise(said["losses"], parts) for said in (mine, theirs)]
    rounding = _rounding(dtypes, dtype)
    strict = exact and not rounding
    changed = compare(*values) if routed and not strict and parts is not None else None
    return Verification(
        max_logit_difference=by_token.max().item(),
        relative_difference=by_token.max().item() / largest,
        typical_difference=by_token.median().item() / largest,
        argmax_agreement=same,
        kl=F.kl_div(
            other.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean", log_target=True
        ).item(),
        compared_tokens=len(logits),
        strict=strict,
        allowed=(EXACT if strict else TYPICAL) + rounding,
        allowed_agreement=0.0 if strict else ROUNDED_AGREEMENT if rounding else AGREEMENT,
        perplexity=values[0] and values[0].value,
        reloaded_perplexity=values[1] and values[1].value,
        stderr=values[0] and values[0].stderr,
        scored_tokens=0 if parts is None else len(mine["losses"]),
        saved_dtypes=dtypes,
        dtype=str(dtype).removeprefix("torch."),
        ratio=changed and changed.ratio,
        ratio_stderr=changed and changed.stderr,
    )


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
        save_file(tensors | {"firsts": torch.tensor([first for _, first in pieces])}, asked)
        request = [
            os.path.abspath(folder), str(asked), str(self._answered),
            str(dtype).removeprefix("torch."), device, code,
        ]  # fmt: skip
        with suppress(BrokenPipeError):  # it ended: `check` says why
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()  # and left open: it ends when this process does

    def check(self) -> None:
        """Raise ExportError if it failed."""
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


def _rounding(dtypes: str, dtype: torch.dtype) -> float:
    """What rounding may do: the coarsest of the formats on disk and the one computed in."""
    names = {"BF16": torch.bfloat16, "F16": torch.float16}
    formats = [dtype, *(names[name] for name in dtypes.split(",") if name in names)]
    return max(ROUNDING.get(format, 0.0) for format in formats)


def random_ids(model: PreTrainedModel) -> Tensor:
    """(RANDOM_TOKENS,) int64, always the same: what is compared without a text."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (RANDOM_TOKENS,), generator=generator)

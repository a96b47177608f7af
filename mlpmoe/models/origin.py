"""Where a loaded model comes from: what a checkpoint made from it has to say."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

_ATTRIBUTE = "mlpmoe_origin"


@dataclass(frozen=True)
class Origin:
    """The base model of a conversion."""

    name: str  # hub id, key of the catalogue, or the last part of a folder's path
    on_hub: bool
    revision: str | None  # commit on the hub
    saved_dtype: torch.dtype  # of its files, whatever it was loaded as
    licence: str | None  # as its card names it
    gguf: str | None = None  # the GGUF file that the weights were read from
    left_out: tuple[str, ...] = ()  # tensors of its files on which the next token does not depend
    # where its other files lie on this machine, and which of them are for tokenizer and processors
    folder: Path | None = field(default=None, compare=False, repr=False)
    companions: tuple[str, ...] = field(default=(), compare=False, repr=False)
    tokens: int | None = field(default=None, compare=False, repr=False)  # of the tokenizer as read

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the person who will use a checkpoint made from it."""
        if not self.left_out:
            return ()
        count = len(self.left_out)
        return (
            f"{count} {'tensor' if count == 1 else 'tensors'} of the base model's files "
            f"{'is' if count == 1 else 'are'} left out, such as {self.left_out[0]}: the next token "
            "does not depend on them, and transformers does not read them.",
        )


def note_origin(model: PreTrainedModel, origin: Origin) -> None:
    """Let `model`, and what is converted from it, know where it comes from."""
    setattr(model, _ATTRIBUTE, origin)


def origin_of(model: PreTrainedModel) -> Origin | None:
    """Where `model`, or the dense model it was converted from, was loaded from; None if it was
    not loaded by `mlpmoe.load`."""
    return getattr(model, _ATTRIBUTE, None)

"""How much memory work with a model takes, before it is loaded."""

from __future__ import annotations

import torch

from .architecture import Architecture
from .errors import ModelError, format_bytes, format_parameters

WINDOW = 2048  # tokens that are scored at a time, at most
# Logits that are held at a time: as many as LOGITS_AT_ONCE of measure/head.py.
LOGITS = 2**24
LOGIT_BYTES = 12  # of each, beside its own dtype: as float32, and twice inside the loss
MLP_COPIES = 4  # of the neurons' values of a window: gate, up, activated, product
STATE_COPIES = 12  # of the hidden states of a window: attention, norms, residual stream
TOKENIZER_BYTES = 1_000  # for each token that it knows
SLACK = 100_000_000  # bytes: buffers of the libraries, key-value caches, what allocators keep
# transformers' GGUF reader makes objects of every token and merge, keeps some of them while it
# reads weights, and unpacks a tensor to float32 twice.
GGUF_PARSING = 11_000  # bytes for each token, before the weights
GGUF_PARSED = 2_300  # bytes for each token, beside the weights
GGUF_UNPACKING = 8  # bytes for each weight of the largest tensor, the table of tokens


def memory_needed(architecture: Architecture, dtype: torch.dtype, *, gguf: bool = False) -> int:
    """Bytes to hold a model and one conversion of it, and to run both.

    Weights (a tied head once) and buffers, a converted copy of the MLPs, activations and logits of
    a window; or, for what is read from a GGUF file, what its reader takes, if that is more. Weight
    files that are mapped do not count: the system takes their pages back when it needs them.
    Measured peaks are lower: by 12 and 19 percent for 268 M parameters over 262,144 tokens
    (float32, bfloat16), by 41 and 47 for the two small models of tests/models/test_memory.py.
    """
    size, tokens = dtype.itemsize, architecture.vocabulary
    weights = architecture.parameters * size + architecture.buffer_bytes
    states = MLP_COPIES * architecture.d_ff + STATE_COPIES * architecture.d_model
    logits = min(WINDOW * tokens, LOGITS) * (size + LOGIT_BYTES)
    needed = weights + architecture.mlp_parameters * size + WINDOW * states * size + logits
    if gguf:
        table = tokens * architecture.d_model
        unpacking = tokens * GGUF_PARSED + weights + table * GGUF_UNPACKING
        needed = max(needed, tokens * GGUF_PARSING, unpacking)
    return needed + tokens * TOKENIZER_BYTES + SLACK


def check_memory(
    name: str,
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    available: int | None,
    *,
    gguf: bool = False,
) -> None:
    """Raise ModelError unless the model fits into `available` bytes (None: unknown, go on)."""
    needed = memory_needed(architecture, dtype, gguf=gguf)
    if available is None or needed <= available:
        return
    smaller = memory_needed(architecture, torch.bfloat16, gguf=gguf)
    advice = (
        f"In bfloat16 it would fit ({format_bytes(smaller)})."
        if smaller <= available and smaller < needed
        else "Choose a smaller model."
    )
    place = "this machine" if device.type != "cuda" else f"the GPU ({device})"
    raise ModelError(
        f"{name} ({format_parameters(architecture.parameters)} parameters) needs about "
        f"{format_bytes(needed)} in {str(dtype).removeprefix('torch.')}, {place} has "
        f"{format_bytes(available)} free. {advice}"
    )

"""Opens a checkpoint in a process of its own, with transformers alone, and says what it computes.

    python reload.py < REQUEST

REQUEST: a line of JSON, a list FOLDER, WINDOWS, ANSWERS, DTYPE, DEVICE, CODE. WINDOWS: a
safetensors file with the token ids of each window, "ids.0", "ids.1", ..., and "firsts", the index
of the first token to score in each. ANSWERS gets the losses of the scored tokens, the logits of the
first LOGIT_TOKENS tokens, the ids of PROBE if there is a tokenizer, and as metadata the dtypes
on disk and why the tokenizer cannot be read; where they cannot be written, the
exit status is NO_ROOM. DEVICE: "disk" reads each part of the model when it is
needed. CODE: whether the checkpoint may run its own code. The process ends, whatever it is doing,
when its standard input does: then whoever asked is gone. Nothing of mlpmoe is imported: this is
what another person's software sees.
"""

# ruff: noqa: E402 – it listens before the imports that take seconds

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue

asked: SimpleQueue[str] = SimpleQueue()


def listen() -> None:
    """Put the request into `asked`, and end the process at the end of the input."""
    request = b""
    while part := os.read(0, 2**16):
        request += part
        if request.endswith(b"\n"):
            asked.put(request.decode())
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=listen, daemon=True).start()

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

LOGIT_TOKENS = 256
NO_ROOM = 74  # exit status
PROBE = "Once upon a time, 3 cats didn't sleep.\n\tÜber 北京  schläft 🦊; x = 10**-3"
ROWS = 256  # positions turned into float32 losses at a time: bounds the memory


def opened(folder: str, dtype: str, device: str, code: bool) -> PreTrainedModel:
    """The model of the checkpoint; the process ends if a tensor is missing or too many."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        device_map={"": device},
        offload_folder="offloaded",
        use_safetensors=True,
        trust_remote_code=code,
        local_files_only=True,
        output_loading_info=True,
    )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        sys.exit(f"{len(wrong)} tensors are missing or too many, such as {wrong[0]}")
    return model.eval()


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    pieces: Sequence[tuple[torch.Tensor, int]],
    device: str | torch.device,
    on_share: Callable[[float], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Losses of the scored tokens (tokens,), and logits of the first LOGIT_TOKENS (n, vocabulary),
    float32. pieces: the ids of each window, and the index of the first scored one. on_share: told
    before each window how much is done."""
    losses, logits, kept = [], [], 0
    for index, (ids, first) in enumerate(pieces):
        if on_share:
            on_share(index / len(pieces))
        ids = ids.to(device)
        said = model(ids[None], use_cache=False).logits[0]
        if kept < LOGIT_TOKENS:
            logits.append(said[: LOGIT_TOKENS - kept].float().cpu())
            kept += len(logits[-1])
        rows = zip(said[first - 1 : -1].split(ROWS), ids[first:].split(ROWS), strict=True)
        losses += [F.cross_entropy(x.float(), y, reduction="none").cpu() for x, y in rows]
    return {"losses": torch.cat(losses), "logits": torch.cat(logits)}


def saved_dtypes(folder: str) -> str:
    """The dtypes of the matrices on disk, joined by commas."""
    found = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                part = tensors.get_slice(name)
                if len(part.get_shape()) > 1:
                    found.add(part.get_dtype())
    return ",".join(sorted(found))


def probed(folder: str, code: bool) -> tuple[dict[str, torch.Tensor], str]:
    """What the checkpoint's tokenizer makes of PROBE, (tokens,) int64, or why it makes nothing."""
    if not list(Path(folder).glob("tokenizer*")):
        return {}, ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=code, local_files_only=True
        )
        return {"probe": torch.tensor(tokenizer(PROBE)["input_ids"])}, ""
    except Exception as error:  # tokenizers raises a bare Exception
        return {}, f"{type(error).__name__}: {error}"[:300]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, windows, target, dtype, device, code = json.loads(asked.get())
    given = load_file(windows)
    pieces = [(given[f"ids.{i}"], first) for i, first in enumerate(given["firsts"].tolist())]
    model = opened(folder, dtype, device, code)
    found = answers(model, pieces, "cpu" if device == "disk" else device)
    ids, reason = probed(folder, code)
    about = {"dtypes": saved_dtypes(folder), "tokenizer": reason}
    try:
        save_file(found | ids, target, metadata=about)
    except Exception:  # safetensors raises its own
        os._exit(NO_ROOM)  # what is said at a usual end goes to the same disk, and would change it

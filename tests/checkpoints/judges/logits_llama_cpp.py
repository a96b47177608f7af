"""What llama.cpp computes from a GGUF file.

    python logits_llama_cpp.py FILE ASKED ANSWERS

ASKED: JSON with "ids", the token ids of a window, and "text", to be encoded. ANSWERS: a safetensors
file that gets "logits" (tokens, vocabulary) float32 of the ids, and "encoded", the ids of the text.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import torch
from safetensors.torch import save_file

file, asked, answers = sys.argv[1:]
question = json.loads(Path(asked).read_text())
# by default keys and values are rounded to 16 bits
exact = llama_cpp.GGML_TYPE_F32
model = llama_cpp.Llama(
    file, n_ctx=512, n_batch=512, n_threads=1, n_threads_batch=1, n_gpu_layers=0,
    type_k=exact, type_v=exact, flash_attn=False, logits_all=True, verbose=False,
)  # fmt: skip
model.eval(question["ids"])
logits = torch.tensor(model.scores[: len(question["ids"])])
encoded = torch.tensor(model.tokenize(question["text"].encode(), add_bos=True))
save_file({"logits": logits, "encoded": encoded}, answers)

"""Opens a checkpoint with transformers alone and lets its `generate` go on from a prompt.

    python generate_alone.py FOLDER TOKENS CODE PROMPT

TOKENS: new ones, at most. CODE: "yes" lets the checkpoint run its own code. Prints the new text
as JSON.
"""

import json
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, tokens, code, prompt = sys.argv[1:]
trusted = code == "yes"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted)
# unless told so too, it asks whether it may read the config with the checkpoint's code
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
said = model.generate(ids, do_sample=False, max_new_tokens=int(tokens))[0]
print(json.dumps(tokenizer.decode(said[ids.shape[1] :], skip_special_tokens=True)))

"""The real model is what the catalogue says of it."""

from __future__ import annotations

import pytest

from mlpmoe.models.catalogue import find_entry
from mlpmoe.models.loading import load
from mlpmoe.models.origin import origin_of

pytestmark = pytest.mark.real


def test_it_is_what_the_catalogue_promises(real_model):
    model, tokenizer = load(real_model, dtype="bfloat16", device="cpu")
    entry, origin = find_entry(real_model), origin_of(model)
    assert model.num_parameters() == entry.parameters
    assert "weights as in its Q4_1 GGUF" in entry.label
    assert origin.name == entry.hub_id and origin.gguf.endswith(".Q4_1.gguf")
    ids = tokenizer("<|im_start|>In  1995 ½<|im_end|>")["input_ids"]
    # each digit by itself, also behind spaces and beyond ASCII
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|im_start|>", "In", "ĠĠ", "1", "9", "9", "5", "Ġ", "Â½", "<|im_end|>",
    ]  # fmt: skip
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert said.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

"""The real model: perplexity against a plain loop that shares no code with ours."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlpmoe import convert, load
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.quality.encoding import encode_stream
from mlpmoe.measure.quality.perplexity import measure
from mlpmoe.models.catalogue import find_entry
from mlpmoe.models.texts import named_text

pytestmark = [pytest.mark.real, pytest.mark.slow]

SHARED = Path(__file__).resolve().parents[3] / "shared/text/wikitext-2-raw-valid.txt"
WINDOW, WINDOWS = 1024, 20  # 20,460 scored tokens


@torch.inference_mode()
def plain_perplexity(model, ids: list[int]) -> float:
    total = 0.0
    for start in range(0, len(ids), WINDOW):
        piece = torch.tensor([ids[start : start + WINDOW]])
        logits = model(piece).logits[0, :-1].double()
        total -= logits.log_softmax(-1).gather(1, piece[0, 1:, None]).sum().item()
    return math.exp(total / (len(ids) // WINDOW * (WINDOW - 1)))


def test_perplexity_equals_a_plain_loop(real_model: str):
    """20,460 tokens of WikiText-2 where it is at hand, of our prose elsewhere, as often as needed,
    in the dtype that this machine is quick in; all 16 branches are the same model."""
    text = SHARED.read_text(encoding="utf-8")[:200_000] if SHARED.exists() else ""
    text = text or named_text("prose") * 4
    model, tokenizer = load(real_model)
    folder = find_entry(real_model).package.converted
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][: WINDOW * WINDOWS]
    assert len(ids) == WINDOW * WINDOWS
    expected = plain_perplexity(plain, ids)
    del plain
    encoded = encode_stream(tokenizer, text, window=WINDOW, most_windows=WINDOWS)
    measured = measure(model, encoded)
    assert measured.tokens == WINDOWS * (WINDOW - 1)
    assert measured.value == pytest.approx(expected, rel=1e-4)
    few = encode_stream(tokenizer, text, window=WINDOW, most_windows=2)
    same = measure(convert(model, ConversionSpec(branches=16)), few)
    assert same.value == pytest.approx(measure(model, few).value, rel=1e-4)

"""A text that was encoded by the tokenizer of another model: said, wherever it is run."""

import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, observe
from mlpmoe.core.errors import UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.quality.perplexity import Perplexity, compare, perplexity
from mlpmoe.measure.text.generation import write_side_by_side
from tests.tiny import byte_tokenizer, tiny_model

SAID = r"^token 221 has no row in this model's embedding, which has 100: .* another model\.$"
TEXT = "Once upon a time there was a fox. " * 200


@pytest.mark.parametrize(
    "run",
    [
        lambda model, tokenizer: perplexity(model, tokenizer, TEXT),
        lambda model, tokenizer: list(write_side_by_side([model], tokenizer, TEXT[:33], 2)),
        lambda model, tokenizer: observe(model, Calibration.from_text(tokenizer, TEXT)),
        lambda model, tokenizer: convert(
            model,
            ConversionSpec(branches=4, keep=3, allocation="sensitivity"),
            Calibration.from_text(tokenizer, TEXT),
        ),
        lambda model, tokenizer: convert(
            model,
            ConversionSpec(branches=4, keep=3, recover="lora", recover_steps=1),
            Calibration.from_text(tokenizer, TEXT),
        ),
    ],
    ids=["perplexity", "writing", "observing", "sensitivity", "training"],
)
def test_it_is_refused(run):
    with pytest.raises(UserError, match=SAID):
        run(tiny_model(vocab_size=100), byte_tokenizer())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_compared_with_a_broken_dense_model(value):
    good = perplexity(tiny_model(), byte_tokenizer(), TEXT[:99])
    losses = good.losses.clone()
    losses[3] = value
    bad = Perplexity(good.value, good.stderr, good.tokens, 1.0, losses, good.blocks)
    with pytest.raises(UserError, match="the dense model has infinite or undefined losses"):
        compare(bad, good)
    assert compare(good, bad).ratio == torch.inf  # as of a conversion that broke it

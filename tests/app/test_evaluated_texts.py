"""/evaluate on every text that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch
from gradio_client.exceptions import AppError

from mlpmoe import ConversionSpec, convert, named_text, perplexity
from mlpmoe.core.calibration import DOCUMENT_SEPARATOR
from mlpmoe.explorer.server.texts import SHIPPED
from mlpmoe.models.texts import TEXTS
from tests.app.calls import SPEC, refused


@pytest.mark.parametrize("text", [key for key in SHIPPED if key != "prose"])
def test_evaluate_streams_and_ends_with_the_library_s_perplexity(app, client, text):
    job = client.submit(**SPEC, text=text, api_name="/evaluate")
    result = job.result(timeout=120)
    steps = job.outputs()
    assert steps[-1] == result
    content = named_text(text)
    dense = perplexity(app.demo.model, app.demo.tokenizer, content)
    done = [step["done"] for step in steps[:-1]]
    assert done == sorted(done)
    assert not done or done[-1] < dense.tokens == steps[0]["total"]
    spec = ConversionSpec(**SPEC)
    converted = perplexity(convert(app.demo.model, spec), app.demo.tokenizer, content)
    assert result["spec"] == spec.to_dict()
    assert result["tokens"] == dense.tokens
    assert result["dense"] == pytest.approx(dense.value, rel=1e-5)
    assert result["converted"] == pytest.approx(converted.value, rel=1e-5)
    assert result["converted_stderr"] == pytest.approx(converted.stderr, rel=1e-4)
    assert result["ratio"] == pytest.approx(converted.value / dense.value, rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(converted.bits_per_byte, rel=1e-5)


def test_the_longest_text_streams_too(app, client):
    job = client.submit(**SPEC, text="prose", api_name="/evaluate")
    begun, later = islice(job, 2)
    job.cancel()
    documents = (part.strip() for part in named_text("prose").split(DOCUMENT_SEPARATOR))
    ids = [app.demo.tokenizer(part).input_ids for part in documents if part]
    window = app.demo.model.config.max_position_embeddings
    # without overlap the first token of each window is context
    assert begun["total"] == later["total"] == sum(len(i) - -(-len(i) // window) for i in ids)
    assert 0 == begun["done"] < later["done"] < later["total"]


@pytest.fixture
def public_text(app, monkeypatch) -> Iterator[str]:
    """What the server takes for C4."""
    content = named_text("stories")
    monkeypatch.setitem(TEXTS, "c4", replace(TEXTS["c4"], read=lambda: content, most_windows=3))
    yield content
    for known in (app.demo._texts, app.demo._plans, app.demo._losses):
        known.clear()


def test_evaluate_cuts_a_public_text_into_windows(app, client, public_text):
    result = client.predict(**SPEC, text="c4", api_name="/evaluate")
    context = app.demo.model.config.max_position_embeddings
    ids = app.demo.tokenizer(public_text, verbose=False).input_ids[: 3 * context]
    windows = torch.tensor(ids).view(-1, context)
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(app.demo.model(w[None]).logits[0, :-1], w[1:])
                  for w in windows]  # fmt: skip
    assert result["text"] == "c4"
    assert result["tokens"] == len(windows) * (context - 1)
    assert result["dense"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)


def test_evaluate_takes_the_key_of_a_visitor_s_text(app, client):
    content = "The ferry left at nine, and nobody had told the gulls.\n" * 5
    key = app.workbench.texts.add(content)
    result = client.predict(**SPEC, text=key, api_name="/evaluate")
    expected = perplexity(app.demo.model, app.demo.tokenizer, content)
    assert result["dense"] == pytest.approx(expected.value, rel=1e-5)
    assert "not on the server" in refused(client, "/evaluate", text="own-0123456789ab")


def test_evaluate_says_why_a_public_text_cannot_be_had(client):
    """Tests run without a network."""
    assert "WikiText-2" in refused(client, "/evaluate", text="wikitext2")


def test_without_a_text_it_is_that_of_the_model_s_kind(client):
    """Of the demo model, stories."""
    expected = client.predict(**SPEC, text="stories", api_name="/evaluate")
    assert client.predict(**SPEC, text=None, api_name="/evaluate") == expected
    assert client.predict(**SPEC, api_name="/evaluate") == expected


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "text", ["", "Stories", "../evaluation.txt", "/etc/passwd", 3, ["stories"], "x" * 10**6]
)
def test_unknown_texts_are_refused(client, text):
    message = refused(client, "/evaluate", text=text) if text != "/etc/passwd" else ""
    if message:
        assert "text is called" in message
        assert "stories, prose, proxy, wikitext2, c4" in message
    else:
        with pytest.raises(AppError, match="text is called"):
            client.predict(text=text, api_name="/evaluate")

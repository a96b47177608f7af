"""Perplexity against plain computations that share no code with it."""

import math

import numpy as np
import pytest
import torch
from tokenizers import processors

from mlpmoe.core.errors import UserError
from mlpmoe.measure.quality.encoding import encode_stream, encode_text
from mlpmoe.measure.quality.perplexity import measure, perplexity, window_losses
from tests.tiny import CONTEXT, byte_tokenizer, tiny_model

TEXT = "Two cats sat on the wall, and a third – the grey one – slept below it."  # 74 bytes


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def tokenizer_without_bos():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


@torch.no_grad()
def loss_after(model, context, token):
    """Nats that `token` costs after exactly this context; lists of ids, one forward pass."""
    scores = model(torch.tensor([context])).logits[0, -1].double()
    return float(scores.logsumexp(0) - scores[token])


def losses_one_by_one(model, ids, window, stride):
    """Each token with the context of the first window that reaches it, in a pass of its own;
    a token that no window reaches but as its first is left out."""
    losses = []
    for t in range(1, len(ids)):
        start = max(0, math.ceil((t + 1 - window) / stride) * stride)
        if start < t:
            losses.append(loss_after(model, ids[start:t], ids[t]))
    return losses


# Losses ------------------------------------------------------------------------------------


def test_text_that_fits_one_window_equals_one_plain_forward(model, tokenizer):
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()  # as transformers computes it
    measured = perplexity(model, tokenizer, TEXT)
    assert measured.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert measured.tokens == len(TEXT.encode()) == 74
    assert measured.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    ("window", "stride"),
    [(2, 1), (8, 4), (8, 1), (8, 7), (5, 3), (74, 30), (75, 74), (200, 3)]
    + [(window, window) for window in (2, 8, 37, 74, 75, 200)],
)
def test_windows_equal_a_loop_over_tokens(model, tokenizer, window, stride):
    ids = tokenizer(TEXT).input_ids
    expected = losses_one_by_one(model, ids, window, stride)
    encoded = encode_text(tokenizer, TEXT)
    losses = torch.cat(list(window_losses(model, encoded, window, stride)))
    assert losses.tolist() == pytest.approx(expected, abs=1e-4)
    measured = perplexity(model, tokenizer, TEXT, window=window, stride=stride)
    assert measured.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_text_longer_than_the_context(tokenizer):
    model = tiny_model(max_position_embeddings=16)
    ids = tokenizer(TEXT).input_ids
    measured = perplexity(model, tokenizer, TEXT)
    expected = losses_one_by_one(model, ids, window=16, stride=16)
    assert measured.tokens == len(expected) == 70  # of 75, but the first of each window
    assert measured.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


@pytest.mark.parametrize("length", [15, 16, 17, 23, 24, 25])
def test_every_token_counts_once_whatever_is_left_for_the_last_window(model, tokenizer, length):
    text = "x" * (length - 1)  # and BOS
    pieces = list(window_losses(model, encode_text(tokenizer, text), window=16, stride=8))
    assert sum(map(len, pieces)) == length - 1
    assert all(len(piece) > 0 for piece in pieces)
    assert len(pieces) == 1 + max(0, math.ceil((length - 16) / 8))


def test_bfloat16_logits_become_float32_losses(tokenizer):
    measured = perplexity(tiny_model().bfloat16(), tokenizer, TEXT)
    assert measured.losses.dtype == torch.float32
    exact = perplexity(tiny_model(), tokenizer, TEXT)
    assert measured.value == pytest.approx(exact.value, rel=0.05)


# Documents, tokens and bytes ---------------------------------------------------------------


def test_documents_do_not_see_each_other(model, tokenizer):
    parts = ["One day, a fox.", "A hedgehog was there too.", "Grüße 🙂"]
    together = perplexity(model, tokenizer, "\n<|endoftext|>\n".join(parts))
    alone = [perplexity(model, tokenizer, part) for part in parts]
    assert torch.equal(together.losses, torch.cat([one.losses for one in alone]))
    size = sum(len(part.encode()) for part in parts)
    assert together.tokens == size
    assert together.bits_per_byte == pytest.approx(
        float(together.losses.double().sum()) / math.log(2) / size
    )


def test_empty_documents_and_white_space_around_documents_do_not_count(model, tokenizer):
    plain = perplexity(model, tokenizer, "One.<|endoftext|>Two.")
    spaced = perplexity(model, tokenizer, "<|endoftext|>\n One.\n\n<|endoftext|> <|endoftext|>Two.")
    assert torch.equal(plain.losses, spaced.losses)
    assert plain.bits_per_byte == spaced.bits_per_byte


def test_without_bos_the_first_token_of_a_document_is_context(model, tokenizer_without_bos):
    ids = tokenizer_without_bos(TEXT).input_ids
    assert len(ids) == len(TEXT.encode())
    measured = perplexity(model, tokenizer_without_bos, TEXT)
    expected = losses_one_by_one(model, ids, CONTEXT, CONTEXT)
    assert measured.losses.tolist() == pytest.approx(expected, abs=1e-4)
    assert measured.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / (len(ids) - 1))


def test_bos_is_never_scored_and_always_seen(model, tokenizer):
    measured = perplexity(model, tokenizer, "ab")
    a, b = tokenizer("ab", add_special_tokens=False).input_ids
    expected = [loss_after(model, [0], a), loss_after(model, [0, a], b)]
    assert measured.losses.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("text", ["", " \n\t ", "<|endoftext|>", " <|endoftext|>\n<|endoftext|> "])
def test_empty_text_is_refused(model, tokenizer, text):
    with pytest.raises(UserError, match="too short"):
        perplexity(model, tokenizer, text)


def test_one_token_is_refused_where_nothing_comes_before_it(model, tokenizer_without_bos):
    with pytest.raises(UserError, match="too short"):
        perplexity(model, tokenizer_without_bos, "a<|endoftext|>b")


# Windows without overlap -------------------------------------------------------------------

LONG = "".join(f"{n}. Grüße – {n * n % 97} geese 🙂\n" for n in range(40))  # 1,226 bytes


@torch.no_grad()
def published_perplexity(model, ids, window, most=None):
    """As code bases for pruning compute it: the mean loss of each window, weighed alike."""
    count = len(ids) // window if most is None else min(most, len(ids) // window)
    loss, total = torch.nn.CrossEntropyLoss(), 0.0
    for start in range(0, count * window, window):
        piece = torch.tensor([ids[start : start + window]])
        logits = model(piece).logits[0].double()
        total += loss(logits[:-1], piece[0, 1:]).item() * window
    return math.exp(total / (count * window))


@pytest.mark.parametrize(
    ("window", "most"), [(None, None), (2, None), (50, None), (50, 7), (50, 10**6), (256, 1)]
)
def test_streams_equal_the_published_computation(model, tokenizer, window, most):
    ids = tokenizer(LONG).input_ids
    text = encode_stream(tokenizer, LONG, CONTEXT, most, window)
    measured = measure(model, text)
    window = window or CONTEXT
    count = min(most or len(ids), len(ids) // window)
    assert text.window == window
    assert measured.tokens == count * (window - 1)
    expected = published_perplexity(model, ids, window, most)
    assert measured.value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (16, 3), (CONTEXT, 1)])
def test_a_stream_is_scored_window_by_window_whatever_is_asked_for(
    model, tokenizer, window, stride
):
    text = encode_stream(tokenizer, LONG, window=50)
    pieces = list(window_losses(model, text, window, stride))
    assert [len(piece) for piece in pieces] == [49] * len(text.documents)
    ids = tokenizer(LONG).input_ids[50:100]
    expected = [loss_after(model, ids[:i], ids[i]) for i in range(1, 50)]
    assert pieces[1].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("window", [2, 50, 256])
def test_a_document_without_overlap_is_scored_as_published(model, tokenizer, window):
    """The published computation leaves out what does not fill a window; a document does not."""
    content = LONG.strip()
    ids, text = tokenizer(content).input_ids, encode_text(tokenizer, content)
    losses = torch.cat(list(window_losses(model, text, window)))  # stride = window
    full = len(ids) // window * (window - 1)
    value = math.exp(losses[:full].double().mean())
    assert value == pytest.approx(published_perplexity(model, ids, window), rel=1e-6)
    rest = ids[len(ids) // window * window :]
    expected = [loss_after(model, rest[:i], rest[i]) for i in range(1, len(rest))]
    assert losses[full:].tolist() == pytest.approx(expected, abs=1e-4)


def test_without_bos_a_stream_begins_with_its_first_token(model, tokenizer_without_bos):
    text = encode_stream(tokenizer_without_bos, LONG, window=30)
    assert torch.cat(text.documents).tolist() == list(
        tokenizer_without_bos(LONG).input_ids[: 30 * len(text.documents)]
    )
    expected = published_perplexity(model, tokenizer_without_bos(LONG).input_ids, 30)
    assert measure(model, text).value == pytest.approx(expected, rel=1e-6)

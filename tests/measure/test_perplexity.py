"""Perplexity against plain computations that share no code with it."""

import logging
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from mlpmoe.core.conversion import convert
from mlpmoe.core.errors import UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.encoding import (
    DEFAULT_WINDOW,
    STREAM_WINDOW,
    choose_window,
    encode_protocol,
    encode_stream,
    encode_text,
)
from mlpmoe.measure.perplexity import compare, measure, perplexity, summarise, window_losses
from mlpmoe.models.catalogue import assets_folder
from tests.families import build
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
    """Each token with the context of the first window that reaches it, in a pass of its own."""
    losses = []
    for t in range(1, len(ids)):
        start = max(0, math.ceil((t + 1 - window) / stride) * stride)
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
    ("window", "stride"), [(2, 1), (8, 4), (8, 1), (8, 7), (5, 3), (74, 30), (75, 74), (200, 3)]
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
    expected = losses_one_by_one(model, ids, window=16, stride=8)
    assert measured.tokens == len(ids) - 1
    assert measured.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


@pytest.mark.parametrize("length", [15, 16, 17, 23, 24, 25])
def test_every_token_counts_once_whatever_is_left_for_the_last_window(model, tokenizer, length):
    text = "x" * (length - 1)  # and BOS
    pieces = list(window_losses(model, encode_text(tokenizer, text), window=16, stride=8))
    assert sum(map(len, pieces)) == length - 1
    assert all(len(piece) > 0 for piece in pieces)
    assert len(pieces) == 1 + max(0, math.ceil((length - 16) / 8))


def test_long_windows_are_scored_in_pieces(tokenizer):
    """More positions in a window than are turned into losses at a time."""
    model = tiny_model(max_position_embeddings=1024)
    text = "".join(chr(33 + i * i % 90) for i in range(600))
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        chances = model(ids).logits[0, :-1].log_softmax(-1)
    expected = -chances.gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(perplexity(model, tokenizer, text).losses, expected, atol=1e-4)


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
    expected = losses_one_by_one(model, ids, CONTEXT, CONTEXT // 2)
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


def test_one_scored_token_has_no_known_error(model, tokenizer):
    measured = perplexity(model, tokenizer, "a")
    assert measured.tokens == 1
    assert math.isfinite(measured.value)
    assert math.isnan(measured.stderr)


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
    assert measured.tokens == text.scored_tokens == count * (window - 1)
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


def test_without_bos_a_stream_begins_with_its_first_token(model, tokenizer_without_bos):
    text = encode_stream(tokenizer_without_bos, LONG, window=30)
    assert torch.cat(text.documents).tolist() == list(
        tokenizer_without_bos(LONG).input_ids[: 30 * len(text.documents)]
    )
    expected = published_perplexity(model, tokenizer_without_bos(LONG).input_ids, 30)
    assert measure(model, text).value == pytest.approx(expected, rel=1e-6)


def test_length_of_windows(tokenizer):
    text = "a" * 9000
    for context, window in [(None, 2048), (10**6, 2048), (2048, 2048), (512, 512)]:
        encoded = encode_stream(tokenizer, text, context)
        assert encoded.window == window
        assert encoded.comparable == (window == STREAM_WINDOW)
        assert {len(document) for document in encoded.documents} == {window}
    assert encode_stream(tokenizer, text, 8192, window=4096).window == 4096
    assert not encode_text(tokenizer, text).comparable


def test_a_text_shorter_than_a_window(tokenizer):
    full = "a" * 99  # and BOS
    assert encode_stream(tokenizer, full, window=100).scored_bytes == 99
    for text in (full[:-1], ""):
        words = f"has {len(text) + 1} tokens; at least one window of 100 is needed"
        with pytest.raises(UserError, match=words):
            encode_stream(tokenizer, text, window=100)


@pytest.mark.parametrize(
    ("context", "window", "words"),
    [
        (CONTEXT, CONTEXT + 1, f"between 2 and .* {CONTEXT} tokens, not {CONTEXT + 1}"),
        (CONTEXT, 1, f"between 2 and .* {CONTEXT} tokens, not 1"),
        (None, 1, "at least 2 tokens, not 1"),
        (None, 0, "at least 2 tokens, not 0"),
        (None, -5, "at least 2 tokens, not -5"),
    ],
)
def test_windows_of_a_stream_out_of_range_are_refused(tokenizer, context, window, words):
    with pytest.raises(UserError, match=words):
        encode_stream(tokenizer, LONG, context, window=window)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=12), st.integers(2, 9))
def test_a_character_counts_where_it_begins(text, window):
    tokenizer = byte_tokenizer()
    count = (1 + len(text.encode())) // window  # BOS, then bytes
    expected, begins = 0, 1  # the token with the first byte of a character
    for character in text:
        size = len(character.encode())
        expected += size if begins < count * window and begins % window else 0
        begins += size
    assert encode_stream(tokenizer, text, window=window).scored_bytes == expected


def test_bytes_of_longer_tokens():
    """The demo's tokens are parts of words; its plain ASCII text decodes exactly."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets_folder() / "demo")
    text = (assets_folder() / "texts" / "proxy.txt").read_text(encoding="utf-8")
    text = text.encode("ascii", "ignore").decode()
    encoded = encode_stream(tokenizer, text, window=16)
    assert len(encoded.documents) > 5
    decoded = [tokenizer.decode(d[1:], skip_special_tokens=True) for d in encoded.documents]
    assert encoded.scored_bytes == sum(map(len, decoded))
    whole = encode_stream(tokenizer, text, window=len(tokenizer(text).input_ids))
    assert whole.scored_bytes == len(text)


def test_a_tokenizer_that_does_not_know_where_its_tokens_lie():
    """ByT5's is plain Python: one token per byte, and one that ends the text."""
    tokenizer = transformers.ByT5Tokenizer()
    assert not tokenizer.is_fast
    text = encode_stream(tokenizer, "ab" * 50, window=10)
    assert text.scored_tokens == 90
    assert text.scored_bytes == pytest.approx(90, abs=1)


def test_a_text_longer_than_the_context_does_not_warn():
    told, handler = [], logging.Handler()
    handler.emit = told.append
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.add_handler(handler)
    try:
        byte_tokenizer()(LONG)
        assert len(told) == 1  # so warnings arrive here
        encode_stream(byte_tokenizer(), LONG, CONTEXT)
        assert len(told) == 1
    finally:
        transformers.logging.remove_handler(handler)
        transformers.logging.set_verbosity(before)


def test_protocols(tokenizer):
    parts = f"{LONG}<|endoftext|>{LONG}"
    documents = encode_protocol(tokenizer, parts, "documents", CONTEXT)
    assert (len(documents.documents), documents.window) == (2, None)
    stream = encode_protocol(tokenizer, parts, "stream", CONTEXT, 3, 64)
    assert (len(stream.documents), stream.window) == (3, 64)
    with pytest.raises(UserError, match="protocol must be documents or stream, not 'lines'"):
        encode_protocol(tokenizer, parts, "lines")


# Window and stride -------------------------------------------------------------------------


def test_defaults(model):
    assert choose_window(model) == (CONTEXT, CONTEXT // 2)
    assert choose_window(model, 100) == (100, 50)
    assert choose_window(model, 100, 7) == (100, 7)
    long = tiny_model(max_position_embeddings=4096)
    assert choose_window(long) == (DEFAULT_WINDOW, DEFAULT_WINDOW // 2)
    unlimited = build("bloom")  # positions are distances here, so there is no limit
    del unlimited.config.max_position_embeddings
    assert choose_window(unlimited) == (DEFAULT_WINDOW, DEFAULT_WINDOW // 2)
    assert choose_window(unlimited, 10**6)[0] == 10**6
    with pytest.raises(UserError, match="window must be at least 2 tokens, not 1"):
        choose_window(unlimited, 1)


@pytest.mark.parametrize("window", [-1, 0, 1, CONTEXT + 1])
def test_windows_out_of_range_are_refused(model, tokenizer, window):
    with pytest.raises(UserError, match=f"between 2 and .* {CONTEXT} tokens, not {window}"):
        perplexity(model, tokenizer, TEXT, window=window)


@pytest.mark.parametrize(("window", "stride"), [(8, 0), (8, -1), (8, 8), (8, 9), (2, 2)])
def test_strides_out_of_range_are_refused(model, tokenizer, window, stride):
    with pytest.raises(UserError, match=f"between 1 and window - 1 = {window - 1}, not {stride}"):
        perplexity(model, tokenizer, TEXT, window=window, stride=stride)


# Uncertainty and comparison ----------------------------------------------------------------


def test_standard_error(model, tokenizer):
    measured = perplexity(model, tokenizer, TEXT)
    losses = measured.losses.double().numpy()
    expected = math.exp(losses.mean()) * losses.std(ddof=1) / math.sqrt(len(losses))
    assert measured.stderr == pytest.approx(expected)


def test_comparison_is_pairwise(model, tokenizer):
    converted = convert(model, ConversionSpec(branches=4, fade=0.9))
    dense, other = (perplexity(m, tokenizer, TEXT) for m in (model, converted))
    difference = (other.losses - dense.losses).double().numpy()
    change = compare(dense, other)
    assert change.ratio == pytest.approx(other.value / dense.value, rel=1e-6)
    stderr = difference.std(ddof=1) / math.sqrt(len(difference))
    assert change.stderr == pytest.approx(change.ratio * stderr, rel=1e-5)
    assert change.measurable == (abs(difference.mean()) > 1.96 * stderr)


def test_what_all_tokens_share_is_measurable_however_noisy_the_text():
    noise = torch.linspace(0, 9, 100)
    dense, other = summarise(noise, 300), summarise(noise + 0.01, 300)
    assert other.value - dense.value < dense.stderr / 10
    change = compare(dense, other)
    assert change.measurable
    assert change.ratio == pytest.approx(math.exp(0.01), rel=1e-4)


def test_the_same_model_has_not_changed(model, tokenizer):
    measured = perplexity(model, tokenizer, TEXT)
    change = compare(measured, measured)
    assert (change.ratio, change.stderr, change.measurable) == (1.0, 0.0, False)


def test_different_texts_are_not_compared(model, tokenizer):
    one, other = (perplexity(model, tokenizer, text) for text in (TEXT, TEXT[:-1]))
    with pytest.raises(UserError, match="different texts"):
        compare(one, other)


def test_a_hopeless_model_has_infinite_perplexity_and_finite_bits():
    hopeless = summarise(torch.full((10,), 800.0), scored_bytes=20)
    assert hopeless.value == math.inf
    assert hopeless.bits_per_byte == pytest.approx(400 / math.log(2))
    assert compare(summarise(torch.ones(10), 20), hopeless).ratio == math.inf

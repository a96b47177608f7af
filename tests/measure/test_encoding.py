"""A text as tokens and windows, against plain descriptions of both."""

import logging

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.core.errors import UserError
from mlpmoe.measure.quality.encoding import (
    DEFAULT_WINDOW,
    STREAM_WINDOW,
    EncodedText,
    choose_window,
    encode_protocol,
    encode_stream,
    encode_text,
    scored_tokens,
    windows,
)
from mlpmoe.models.catalogue import assets_folder
from tests.families import build
from tests.tiny import CONTEXT, byte_tokenizer, tiny_model

TEXT = "Two cats sat on the wall, and a third – the grey one – slept below it."
LONG = "".join(f"{n}. Grüße – {n * n % 97} geese 🙂\n" for n in range(40))  # 1,226 bytes


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def scored_bytes(model, text):
    return sum(part.size for part in windows(model, text))


# Streams -----------------------------------------------------------------------------------


def test_length_of_windows(tokenizer):
    text = "a" * 9000
    assert STREAM_WINDOW == 2048  # of SparseGPT and CMoE
    for context, window in [(None, 2048), (10**6, 2048), (2048, 2048), (512, 512)]:
        encoded = encode_stream(tokenizer, text, context)
        assert encoded.window == window
        assert {len(document) for document in encoded.documents} == {window}
    assert encode_stream(tokenizer, text, 8192, window=4096).window == 4096


def test_a_text_shorter_than_a_window(model, tokenizer):
    full = "a" * 99  # and BOS
    assert scored_bytes(model, encode_stream(tokenizer, full, window=100)) == 99
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
def test_a_character_counts_where_it_begins(model, tokenizer, text, window):
    count = (1 + len(text.encode())) // window  # BOS, then bytes
    expected, begins = 0, 1  # the token with the first byte of a character
    for character in text:
        size = len(character.encode())
        expected += size if begins < count * window and begins % window else 0
        begins += size
    assert scored_bytes(model, encode_stream(tokenizer, text, window=window)) == expected


def test_bytes_of_longer_tokens(model):
    """The demo's tokens are parts of words; its plain ASCII text decodes exactly."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets_folder() / "demo")
    text = (assets_folder() / "texts" / "proxy.txt").read_text(encoding="utf-8")
    text = text.encode("ascii", "ignore").decode()
    encoded = encode_stream(tokenizer, text, window=16)
    assert len(encoded.documents) > 5
    decoded = [tokenizer.decode(d[1:], skip_special_tokens=True) for d in encoded.documents]
    assert scored_bytes(model, encoded) == sum(map(len, decoded))
    whole = encode_stream(tokenizer, text, window=len(tokenizer(text).input_ids))
    assert scored_bytes(model, whole) == len(text)


def test_a_tokenizer_that_does_not_know_where_its_tokens_lie(model):
    """ByT5's is plain Python: one token per byte, and one that ends the text."""
    tokenizer = transformers.ByT5Tokenizer()
    assert not tokenizer.is_fast
    text = encode_stream(tokenizer, "ab" * 50, window=10)
    assert scored_tokens(windows(model, text)) == 90
    assert scored_bytes(model, text) == pytest.approx(90, abs=1)


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


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=4),
    window=st.integers(2, 70),
    data=st.data(),
)
def test_every_token_is_scored_once_with_all_the_context_there_is(model, lengths, window, data):
    stride = data.draw(st.one_of(st.just(window), st.integers(1, window)))
    documents = tuple(torch.arange(n) + 100 * i for i, n in enumerate(lengths))
    text = EncodedText(documents, tuple(d + 1 for d in documents))
    parts, seen, size = windows(model, text, window, stride), [], 0
    for part in parts:
        document = documents[part.document].tolist()
        assert len(part.ids) <= window
        assert part.ids.tolist() == document[part.start : part.start + len(part.ids)]
        assert part.start % stride == 0
        for place in range(part.start + part.first, part.start + len(part.ids)):
            assert place - part.start >= max(1, min(place, window - stride))
            seen.append((part.document, place))
            size += document[place] + 1
    # the first token of a document is context only; without overlap, that of every window
    left_out = window if stride == window else 10**6
    assert seen == [(i, t) for i, n in enumerate(lengths) for t in range(1, n) if t % left_out]
    assert scored_tokens(parts) == len(seen)
    assert sum(part.size for part in parts) == size


def test_defaults(model):
    assert choose_window(model) == (CONTEXT, CONTEXT)
    assert choose_window(model, 100) == (100, 100)
    assert choose_window(model, 100, 7) == (100, 7)
    long = tiny_model(max_position_embeddings=4096)
    assert choose_window(long) == (DEFAULT_WINDOW, DEFAULT_WINDOW)
    unlimited = build("bloom")  # positions are distances here, so there is no limit
    del unlimited.config.max_position_embeddings
    assert choose_window(unlimited) == (DEFAULT_WINDOW, DEFAULT_WINDOW)
    assert choose_window(unlimited, 10**6)[0] == 10**6
    with pytest.raises(UserError, match="window must be at least 2 tokens, not 1"):
        choose_window(unlimited, 1)


@pytest.mark.parametrize("window", [-1, 0, 1, CONTEXT + 1])
def test_windows_out_of_range_are_refused(model, tokenizer, window):
    with pytest.raises(UserError, match=f"between 2 and .* {CONTEXT} tokens, not {window}"):
        windows(model, encode_text(tokenizer, TEXT), window)


@pytest.mark.parametrize(("window", "stride"), [(8, 0), (8, -1), (8, 9), (2, 3)])
def test_strides_out_of_range_are_refused(model, tokenizer, window, stride):
    with pytest.raises(UserError, match=f"between 1 and the window of {window}, not {stride}"):
        windows(model, encode_text(tokenizer, TEXT), window, stride)

"""Where a text breaks: every token keeps its text, its loss, and its sentence."""

from __future__ import annotations

from math import inf, isnan, nan

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mlpmoe import ConversionSpec, UserError, convert
from mlpmoe.measure.quality.encoding import (
    EncodedText,
    encode_stream,
    encode_text,
    scored_tokens,
    windows,
)
from mlpmoe.measure.quality.perplexity import Perplexity, measure, summarise
from mlpmoe.measure.quality.tokens import HALF_A_CHARACTER as HALF
from mlpmoe.measure.quality.tokens import (
    LONGEST,
    Sentence,
    TokenChange,
    sentences,
    token_changes,
    worst,
)
from tests.parts import parts_of
from tests.tiny import byte_tokenizer, tiny_model

MODEL = tiny_model()

CORPUS = [
    "Ein Fuchs – ein grauer – schlief. “Näher!”, rief sie.\n",
    "The old clock struck nine, and nobody moved. 🦊🦊🐻 done.",
    "One fox, two foxes; three foxes? Four!",
]


KNOWN = st.text(sorted(set("".join(CORPUS))), min_size=3, max_size=60)


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of several characters a token: over bytes, or with ▁ for spaces."""
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet = sorted(set("".join(CORPUS)))
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False,
        special_tokens=["<s>", "<unk>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2: ▁ for spaces, and the bytes of a character that is no token. Its decoder takes
    bytes in a row either all or, if they are not all whole characters, not at all."""
    known = ["▁", *"abcdefghijklmnopqrstuvwxyzOFTN.,;?!–", "▁f", "▁fo", "▁fox"]
    symbols = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *known]
    merges = [("▁", "f"), ("▁f", "o"), ("▁fo", "x")]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "byte-fallback": byte_fallback(),
    "byte-level": trained("byte-level"),
    "metaspace": trained("metaspace"),
}


def random_losses(text: EncodedText, seed: int) -> Perplexity:
    generator, parts = torch.Generator().manual_seed(seed), windows(MODEL, text)
    return summarise(torch.rand(scored_tokens(parts), generator=generator), parts)


def changes_of(text: EncodedText, tokenizer: PreTrainedTokenizerFast) -> list[TokenChange]:
    """The changes of random losses, for their texts."""
    losses = random_losses(text, 1), random_losses(text, 2)
    return token_changes(*losses, text, windows(MODEL, text), tokenizer)


def one_document(ids: list[int], window: int | None = None) -> EncodedText:
    return EncodedText((torch.tensor(ids),), (torch.ones(len(ids), dtype=torch.long),), window)


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(content=st.one_of(st.sampled_from(CORPUS), st.text(min_size=3, max_size=60), KNOWN))
def test_the_texts_of_the_tokens_are_the_document(kind, content):
    tokenizer = TOKENIZERS[kind]
    if kind == "metaspace" and not set(content) <= set("".join(CORPUS)):
        return  # it has no token for them
    try:
        text = encode_text(tokenizer, content)
    except UserError:
        return  # nothing to predict
    changes = changes_of(text, tokenizer)
    assert len(changes) == sum(len(document) - 1 for document in text.documents)
    for number, document in enumerate(text.documents):
        found = "".join(change.text for change in changes if change.document == number)
        context = decoded(tokenizer, document[:1].tolist())
        # a character that the context cuts counts to what is predicted
        assert context.rstrip(HALF) + found == decoded(tokenizer, document.tolist())


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "byte-fallback"])
def test_a_character_stands_where_it_becomes_whole(kind):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer("One fox. 日🦊🐻 语")["input_ids"]
    texts = [change.text for change in changes_of(one_document(ids), tokenizer)]
    for end in range(1, len(ids) + 1):
        whole = decoded(tokenizer, ids[:end])
        if not whole.endswith(HALF):  # these tokens say whole characters
            assert decoded(tokenizer, ids[:1]) + "".join(texts[: end - 1]) == whole
    assert not any(HALF in piece for piece in texts)


@pytest.mark.parametrize("kind", ["bytes", "byte-level"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), content=st.text("a 🦊–日é\N{REPLACEMENT CHARACTER}", min_size=3))
def test_windows_may_cut_characters(kind, data, content):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(content)["input_ids"]
    first = data.draw(st.integers(0, len(ids) - 2))
    window = ids[first : data.draw(st.integers(first + 2, len(ids)))]
    changes = changes_of(one_document(window, len(window)), tokenizer)
    found = "".join(change.text for change in changes)
    context = decoded(tokenizer, window[:1])
    assert context.rstrip(HALF) + found == decoded(tokenizer, window)


def test_a_window_that_cuts_a_character_keeps_those_before_it():
    tokenizer = TOKENIZERS["byte-fallback"]
    ids = tokenizer("fox 🦊🐻")["input_ids"][:-1]
    assert HALF * 7 in decoded(tokenizer, ids)  # decoded in one go, both are lost
    changes = changes_of(one_document(ids, len(ids)), tokenizer)
    found = "".join(change.text for change in changes)
    assert found == "fox 🦊" + HALF * 3


@pytest.mark.parametrize("kind", ["bytes", "byte-level"])
def test_a_long_run_of_unreadable_characters_is_not_waited_for(kind):
    tokenizer = TOKENIZERS[kind]
    content = "a" + HALF * 150 + "🦊 b"
    text = encode_text(tokenizer, content)
    pieces = [change.text for change in changes_of(text, tokenizer)]
    assert "".join(pieces) == content.removeprefix(decoded(tokenizer, text.documents[0][:1]))
    assert max(map(len, pieces)) <= LONGEST


@torch.no_grad()
def loss_after(model, context, token):
    return float(F.cross_entropy(model(context[None]).logits[0, -1].double(), token))


TWO = "A grey fox slept.\n<|endoftext|>\nThe wall – cold."


@pytest.mark.parametrize(
    ("text", "window", "stride"),
    [
        (encode_text(byte_tokenizer(), TWO), None, None),  # a window holds each document
        (encode_text(byte_tokenizer(), TWO), 8, 8),
        (encode_text(byte_tokenizer(), TWO), 8, 3),
        (encode_stream(byte_tokenizer(), TWO, window=6), 6, 6),
    ],
    ids=["documents", "without-overlap", "with-overlap", "stream"],
)
def test_changes_are_those_of_a_plain_loop(text, window, stride):
    """One token after the other, with the context that its window gives it."""
    tokenizer, other = byte_tokenizer(), convert(MODEL, ConversionSpec(branches=4, keep=2))
    parts = windows(MODEL, text, window, stride)
    measured = (measure(model, text, window, stride) for model in (MODEL, other))
    changes = token_changes(*measured, text, parts, tokenizer)
    expected = []
    for number, ids in enumerate(text.documents):
        for position in range(1, len(ids)):
            start = 0
            while window and start + window <= position:  # the first window that reaches it
                start += stride
            dense = converted = 0.0
            if start < position:
                dense, converted = (
                    loss_after(one, ids[start:position], ids[position]) for one in (MODEL, other)
                )
            expected.append((number, position, dense, converted - dense))
    assert [(c.document, c.position) for c in changes] == [e[:2] for e in expected]
    assert [c.dense for c in changes] == pytest.approx([e[2] for e in expected], abs=1e-4)
    assert [c.change for c in changes] == pytest.approx([e[3] for e in expected], abs=1e-4)


def test_perplexities_of_another_text_are_refused():
    tokenizer = byte_tokenizer()
    one, two = (encode_text(tokenizer, text) for text in ("One fox.", "Two grey foxes."))
    losses, others = random_losses(one, 1), random_losses(two, 1)
    with pytest.raises(UserError, match="not measured on this text"):
        token_changes(losses, losses, two, windows(MODEL, two), tokenizer)
    with pytest.raises(UserError, match="not measured on this text"):
        token_changes(losses, others, one, windows(MODEL, one), tokenizer)


def test_infinite_and_undefined_losses_are_passed_on():
    tokenizer = byte_tokenizer()
    text = encode_text(tokenizer, "a. bcd")
    before = summarise(torch.tensor([1.0, inf, 1.0, 1.0, nan, 1.0]), parts_of(6))
    after = summarise(torch.tensor([inf, inf, nan, 3.0, 1.0, 1.0]), parts_of(6))
    changes = token_changes(before, after, text, windows(MODEL, text), tokenizer)
    expected = [inf, nan, nan, 2.0, nan, 0.0]
    assert [change.change for change in changes] == pytest.approx(expected, nan_ok=True)
    first, second = sentences(changes)
    assert isnan(first.mean)
    assert isnan(second.total)
    assert worst([second, first], 5) == [second, first]  # as they stand: both undefined


def tokens(*texts: str, document: int = 0) -> list[TokenChange]:
    return [TokenChange(text, 0.1, 1.0, document, i) for i, text in enumerate(texts, 1)]


def test_sentences_end_where_a_reader_ends_them():
    story = tokens("One", " fox", ".", " Two", " foxes", "?!", "”", " “", "Three", "!”", "\n", "4")
    cut = sentences([*story, *tokens("Five", ".", document=1)])
    said = ["".join(token.text for token in sentence.tokens) for sentence in cut]
    assert said == ["One fox.", " Two foxes?!”", " “Three!”\n", "4", "Five."]


def said(*texts: str) -> list[str]:
    return ["".join(t.text for t in one.tokens) for one in sentences(tokens(*texts))]


def test_a_sentence_ends_after_quotes_of_several_tokens():
    assert said("no", ".", "", "", "”", ")", " ", "T") == ["no.”) ", "T"]


def test_blank_lines_are_no_sentences():
    assert said("\n", "One", "\n", "\n", "\n", " ", "Two", ".\n", "\nThree") == [
        "\nOne\n\n\n ", "Two.\n", "\nThree",
    ]  # fmt: skip


def test_however_wide_the_space_a_sentence_ends():
    assert said("One", ".", *" " * 50, "Two") == ["One." + " " * 50, "Two"]


def test_parts_of_a_character_belong_to_its_sentence():
    story = tokens("One", ".", "", "", " 🦊", " ran", ".", "", "")
    first, second = sentences(story)
    assert (list(first.tokens), list(second.tokens)) == (story[:2], story[2:])


def test_points_inside_words_end_nothing():
    (one,) = sentences(tokens("It", " costs", " 3", ".", "14", " or", " e", ".", "g", ".", "x"))
    assert len(one.tokens) == 11


@given(st.lists(st.text("ab .!?\n\r\t\x1c\u3000”", max_size=4), max_size=40))
def test_sentences_lose_no_token(texts):
    story = tokens(*texts) + tokens(*texts[::2], document=1)
    found = sentences(story)
    assert [token for one in found for token in one.tokens] == story
    assert all(len({token.document for token in one.tokens}) == 1 for one in found)


def sentence(*changes: float) -> Sentence:
    return Sentence(tuple(TokenChange("x", c, 1.0, 0, i) for i, c in enumerate(changes)))


def test_the_worst_sentences_come_first():
    mild, bad, short = sentence(0.1, 0.2, 0.3), sentence(3.0, 1.0, -1.0), sentence(9.0, 9.0)
    assert bad.total == pytest.approx(3.0)
    assert bad.mean == pytest.approx(1.0)
    assert worst([mild, bad, short], 2) == [bad, mild]
    assert worst([mild, bad, short], 1, least_tokens=1) == [short]


def test_broken_losses_are_worst():
    mild, undefined, endless = sentence(1, 1, 1), sentence(nan, 0, 0), sentence(inf, 0, 0)
    assert worst([mild, undefined, endless], 2) == [undefined, endless]

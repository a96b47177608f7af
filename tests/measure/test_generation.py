"""Writing side by side against `generate`, and against models that say what they are told."""

from types import SimpleNamespace

import pytest
import torch

from mlpmoe.core.conversion import convert
from mlpmoe.core.errors import UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.text.generation import TOP_P, encode_prompt, parted_at, write_side_by_side
from tests.tiny import VOCABULARY, byte_tokenizer, tiny_model

PROMPT = "Once upon a time"


class Parrot:
    """Stands in for a model: writes the tokens it was given, then the first of them for ever."""

    device = torch.device("cpu")

    def __init__(self, tokens, eos=None, context=1000):
        self.tokens = list(tokens)
        self.generation_config = SimpleNamespace(eos_token_id=eos)
        text_config = SimpleNamespace(max_position_embeddings=context)
        self.config = SimpleNamespace(get_text_config=lambda decoder: text_config)
        self.get_input_embeddings = lambda: SimpleNamespace(num_embeddings=VOCABULARY)

    def parameters(self):
        return iter(())

    def forward(self, ids, use_cache, **state):
        (name, said) = state.popitem()
        said = said or 0
        logits = torch.zeros(1, ids.shape[1], VOCABULARY)
        logits[0, -1, self.tokens[said] if said < len(self.tokens) else self.tokens[0]] = 99.0
        return {"logits": logits, name: said + 1}

    __call__ = forward


@pytest.fixture(scope="module")
def dense():
    return tiny_model(eos_token_id=None)


@pytest.fixture(scope="module")
def converted(dense):
    return convert(dense, ConversionSpec(branches=8, fade=0.9, keep=6))


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def endless():
    """A tokenizer whose texts have no end token."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def write(models, tokenizer, prompt=PROMPT, **options):
    """The state at the end."""
    for writings in write_side_by_side(models, tokenizer, prompt, **options):
        last = writings
    return last


def byte_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


# Greedy ------------------------------------------------------------------------------------


def test_greedy_text_equals_generate(dense, converted, endless):
    ids = endless(PROMPT, return_tensors="pt").input_ids
    for model, writing in zip(
        (dense, converted),
        write([dense, converted], endless, max_new_tokens=40),
        strict=True,
    ):
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40
        )[0, ids.shape[1] :]
        assert writing.tokens == expected.tolist()
        assert not writing.finished


def test_one_state_per_token(dense, converted, endless):
    lengths = [
        [len(writing.tokens) for writing in writings]
        for writings in write_side_by_side([dense, converted], endless, PROMPT, max_new_tokens=5)
    ]
    assert lengths == [[n, n] for n in range(1, 6)]


def test_speed_leaves_out_the_token_that_reads_the_prompt(dense, endless):
    states = write_side_by_side([dense], endless, PROMPT, max_new_tokens=3)
    (first,) = next(states)
    assert (first.seconds, first.tokens_per_second) == (0.0, None)
    *_, (last,) = states
    assert last.tokens_per_second == pytest.approx(2 / last.seconds)


# Sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_equal_models_never_part(dense, endless, temperature):
    """Their seeds are equal, and so are the numbers: α = 1 changes no bit."""
    same = convert(dense, ConversionSpec(branches=1))
    one, other = write([dense, same], endless, temperature=temperature, max_new_tokens=60)
    assert one.tokens == other.tokens
    assert one.text == other.text


def test_the_seed_decides(dense, endless):
    def tokens(seed):
        options = {"temperature": 1.0, "max_new_tokens": 20, "seed": seed}
        return write([dense], endless, **options)[0].tokens

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)


def test_sampled_tokens_follow_the_models_chances(dense, endless):
    """400 first tokens against the distribution cut at top-p, within 4 standard deviations."""
    with torch.no_grad():
        chances = dense(encode_prompt(endless, PROMPT)).logits[0, -1].div(1.3).softmax(-1)
    ordered, order = chances.sort(descending=True)
    nucleus = order[: int((ordered.cumsum(0) < TOP_P).sum()) + 1]
    draws = [
        write([dense], endless, temperature=1.3, seed=seed, max_new_tokens=1)[0].tokens[0]
        for seed in range(400)
    ]
    assert set(draws) <= set(nucleus.tolist())
    likely = nucleus[: len(nucleus) // 4]
    expected = float(chances[likely].sum() / chances[nucleus].sum())
    share = sum(token in set(likely.tolist()) for token in draws) / len(draws)
    assert abs(share - expected) < 4 * (expected * (1 - expected) / len(draws)) ** 0.5


# The end -----------------------------------------------------------------------------------


def test_a_model_stops_at_its_end_token_and_the_other_goes_on(endless):
    a, b, c = byte_ids(endless, "abc")
    stopping, going = Parrot([a, b, c], eos=b), Parrot([a, b, c])
    one, other = write([stopping, going], endless, max_new_tokens=6)
    assert one.finished
    assert one.tokens == [a, b]
    assert not other.finished
    assert len(other.tokens) == 6


def test_writing_ends_when_all_have_ended(tokenizer):
    a, b, c = byte_ids(tokenizer, "abc")
    models = [Parrot([a, a, b], eos=[b, c]), Parrot([c], eos=[b, c])]
    states = list(write_side_by_side(models, tokenizer, PROMPT, max_new_tokens=99))
    assert len(states) == 3
    assert [writing.tokens for writing in states[-1]] == [[a, a, b], [c]]


def test_the_tokenizers_end_token_ends_a_text_and_is_not_part_of_it(tokenizer):
    a = byte_ids(tokenizer, "a")[0]
    (writing,) = write([Parrot([a, tokenizer.eos_token_id])], tokenizer, max_new_tokens=9)
    assert writing.finished
    assert writing.text == "a"


def test_a_text_ends_at_the_context_of_the_model(endless):
    model = tiny_model(eos_token_id=None, max_position_embeddings=12)
    (writing,) = write([model], endless, prompt="12345678", max_new_tokens=99)
    assert len(writing.tokens) == 12 - 9  # BOS and 8 bytes were read


def test_the_shortest_context_counts(endless):
    models = [Parrot([5], context=40), Parrot([5], context=12)]
    one, other = write(models, endless, prompt="12345678", max_new_tokens=99)
    assert len(one.tokens) == len(other.tokens) == 3


def test_prompts_that_fill_the_context_are_refused(endless):
    model = tiny_model(max_position_embeddings=12)
    write([model], endless, prompt="x" * 10, max_new_tokens=1)
    with pytest.raises(UserError, match="12 tokens long; this model reads at most 11"):
        write([model], endless, prompt="x" * 11, max_new_tokens=1)


# Text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "  ", "\n\t"])
def test_empty_prompts_are_refused(dense, tokenizer, prompt):
    with pytest.raises(UserError, match="empty"):
        write([dense], tokenizer, prompt=prompt)


def test_a_character_of_several_tokens_appears_when_it_is_whole(endless):
    said = " é🙂日"
    tokens = byte_ids(endless, said)
    assert len(tokens) == 1 + 2 + 4 + 3
    texts = [
        writing.text
        for (writing,) in write_side_by_side(
            [Parrot(tokens)], endless, PROMPT, max_new_tokens=len(tokens)
        )
    ]
    assert texts[0] == " "
    assert texts[2] == " é"
    assert texts[6] == " é🙂"
    assert texts[9] == said


def test_plain_prompts_begin_as_the_tokenizer_begins_a_text(tokenizer):
    ids = encode_prompt(tokenizer, "Hi")
    assert ids.shape == (1, 3)
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids[0]) == "<s>Hi"


def test_chat_models_get_their_format(dense, tokenizer):
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}: {{ message.content }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    ids = encode_prompt(tokenizer, "Hi")
    assert tokenizer.decode(ids[0]) == "[user: Hi]>"
    (writing,) = write([Parrot(byte_ids(tokenizer, "Hello"))], tokenizer, "Hi", max_new_tokens=5)
    assert writing.text == "Hello"


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}",
        {"rag": "{{ messages[0].content }}", "tool_use": "x"},
        "{% for m in messages %}{{ m.content + nothing.at_all }}{% endfor %}",
        "{% if messages",
    ],
    ids=["wants a system message", "has no default", "names nothing", "is cut off"],
)
def test_a_chat_format_that_refuses_leaves_the_plain_prompt(tokenizer, template):
    plain = encode_prompt(tokenizer, "Hi")
    tokenizer.chat_template = template
    assert torch.equal(encode_prompt(tokenizer, "Hi"), plain)


# Parting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "index"),
    [
        ([], [], None),
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 2, 3], None),
        ([1, 2, 3], [1, 5, 3], 1),
        ([1], [2], 0),
    ],
)
def test_parted_at(first, second, index):
    assert parted_at(first, second) == parted_at(second, first) == index

"""The shipped demo model is what its card says, and loads with nothing but transformers."""

import copy
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DEMO = ASSETS / "demo"
SEPARATOR = "\n<|endoftext|>\n"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def stories():
    return (
        (ASSETS / "texts" / "evaluation.txt").read_text(encoding="utf-8").strip().split(SEPARATOR)
    )


def test_folder_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) <= 16 * 2**20


def test_loads_as_a_stock_llama_in_float32(model):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings
    assert model.config.intermediate_size % 64 == 0
    assert model.generation_config.eos_token_id is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Once upon a time",
        " two  spaces, a\ttab\r\n\n and an end ",
        "".join(map(chr, range(128))),
        "Grüße, 日本語 🙂 e\u0301 \u200d \ufeff \U0010ffff",
    ],
)
def test_tokenizer_gives_every_text_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == tokenizer.bos_token + text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[1:]


def test_every_token_has_an_embedding(model, tokenizer):
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings


def losses_alone(model, tokenizer, stories):
    """Total nats and tokens, counted one story at a time with no code of the project."""
    nats, tokens = 0.0, 0
    for story in stories:
        ids = tokenizer(story, return_tensors="pt").input_ids  # (1, tokens)
        assert ids.shape[1] <= model.config.max_position_embeddings
        with torch.no_grad():
            chances = model(ids).logits[0, :-1].log_softmax(-1)  # (tokens - 1, vocab_size)
        nats -= chances.gather(1, ids[0, 1:, None]).sum().item()
        tokens += ids.shape[1] - 1
    return nats, tokens


@pytest.fixture(scope="module")
def card():
    return (DEMO / "README.md").read_text(encoding="utf-8")


def test_bits_per_byte_are_those_of_the_card(model, tokenizer, stories, card):
    nats, tokens = losses_alone(model, tokenizer, stories)
    size = sum(len(story.encode("utf-8")) for story in stories)
    (stated,) = re.findall(r"^\| `evaluation.txt` \|.*\| ([\d.]+) \| ([\d.]+) \|$", card, re.M)
    assert nats / tokens == pytest.approx(float(stated[0]), rel=0.001)
    assert nats / math.log(2) / size == pytest.approx(float(stated[1]), rel=0.001)


def stated_perplexities(card):
    """{"K = 12": perplexity on evaluation.txt, ...} as the card's table has it."""
    return {
        name: float(value)
        for name, value in re.findall(r"^\| (K = \d+|fade [\d.]+) \| ([\d.]+) \|", card, re.M)
    }


def test_card_shows_damage_that_rises_with_every_step(card):
    stated = stated_perplexities(card)
    by_keep = [stated[f"K = {keep}"] for keep in range(16, 3, -1)]
    by_fade = [stated["K = 16"]] + [stated[f"fade {fade}"] for fade in (0.3, 0.6, 0.9, 1.2)]
    for values in (by_keep, by_fade):
        assert all(before < after for before, after in itertools.pairwise(values))


@pytest.mark.parametrize("keep", [16, 12, 8])
def test_keeping_branches_costs_what_the_card_says(model, tokenizer, stories, card, keep):
    """A stock Llama with the first neurons only and a scaled down_proj, built here."""
    config = copy.deepcopy(model.config)
    config.intermediate_size = width = model.config.intermediate_size * keep // 16
    narrow = LlamaForCausalLM(config).eval()
    weights = dict(model.state_dict())
    for name, weight in weights.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            weights[name] = weight[:width]
        elif name.endswith("down_proj.weight"):
            weights[name] = weight[:, :width] * math.sqrt(16 / keep)
    narrow.load_state_dict(weights)
    nats, tokens = losses_alone(narrow, tokenizer, stories)
    stated = stated_perplexities(card)[f"K = {keep}"]
    assert math.exp(nats / tokens) == pytest.approx(stated, rel=0.001)


def test_writes_a_story(model, tokenizer, stories):
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        ids = model.generate(prompt, do_sample=False, max_new_tokens=100)[0]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    known = set(re.findall(r"[a-z]+", " ".join(stories).lower()))
    words = re.findall(r"[a-z]+", text.lower())
    assert len(ids) >= 40
    assert text.isascii()
    assert sum(word in known for word in words) > 0.6 * len(words)


def test_evaluation_text_is_long_enough(stories):
    assert len(stories) >= 14
    assert sum(len(story.split()) for story in stories) >= 2000
    assert all(story == story.strip() and "<|" not in story for story in stories)


def test_proxy_text_is_one_document_that_repeats_itself():
    text = (ASSETS / "texts" / "proxy.txt").read_text(encoding="utf-8")
    assert 300 <= len(text.split()) <= 400
    assert "<|" not in text
    paragraphs = text.strip().split("\n\n")
    assert len(set(paragraphs)) <= len(paragraphs) / 3

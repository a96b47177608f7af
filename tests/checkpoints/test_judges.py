"""Software of other people opens what was exported, and finds what was measured.

lm-eval measures its perplexity, transformers writes with it, llama.cpp computes its logits. Each
runs in a process of its own, which sees the checkpoint alone.
"""

import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mlpmoe import Calibration, ConversionSpec, convert, export, load, write_side_by_side
from mlpmoe.core.calibration import DOCUMENT_SEPARATOR
from mlpmoe.measure.quality.encoding import encode_text
from mlpmoe.measure.quality.perplexity import measure
from mlpmoe.models import named_text
from tests import forked
from tests.forked import reloading

pytestmark = pytest.mark.slow

JUDGES = Path(__file__).with_name("judges")
STATIC = ConversionSpec(branches=16, keep=12, fade=0.9)
ROUTED = ConversionSpec(method="expertweaver", shared=0.5, active=0.75)
TOKENS = 128  # new ones, which the page's slider begins with
LENGTH = 128  # tokens that lm-eval predicts in one window


@pytest.fixture(scope="module")
def demo():
    return load("demo", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def stories():
    documents = (part.strip() for part in named_text("stories").split(DOCUMENT_SEPARATOR))
    return [document for document in documents if document]


@pytest.fixture(scope="module")
def made(demo, tmp_path_factory):
    """The conversion in memory and the folder of its dense checkpoint, float32."""
    model, tokenizer = demo
    converted = convert(model, STATIC)
    folder = tmp_path_factory.mktemp("judged") / "dense"
    with reloading():
        export(converted, folder, tokenizer=tokenizer)
    return converted, folder


def needs(package):
    found = importlib.util.find_spec(package)
    return pytest.mark.skipif(found is None, reason=f"the package {package} is not installed")


def run(folder, *command):
    """Run Python offline in `folder`, with caches of its own there; what it printed."""
    own = {"HF_HOME": str(folder / "cache"), "HF_MODULES_CACHE": str(folder / "modules")}
    env = os.environ | own | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = forked.run([sys.executable, *command], cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def same_windows(model, tokenizer, document):
    """(total loss in nats, bytes) of a document, over the windows that lm-eval lays.

    lm-eval begins a document of n tokens with the BOS and predicts LENGTH tokens from LENGTH
    tokens, which makes windows of LENGTH + 1 with the last one predicted. Its last window is not
    shorter but begins earlier, so that it ends with the document. Ours begin `stride` apart;
    where there are two, the second begins and ends as lm-eval's if stride = n - LENGTH. Of the
    stories none is longer than two windows. More windows agree where n is a multiple of LENGTH:
    then lm-eval's last one begins where the one before it ended, as do ours with stride = LENGTH.
    """
    encoded = encode_text(tokenizer, document)
    assert encoded.documents[0][0] == tokenizer.bos_token_id
    n = len(encoded.documents[0]) - 1
    stride = n - LENGTH if LENGTH < n < 2 * LENGTH else LENGTH
    assert n <= 2 * LENGTH or n % LENGTH == 0
    found = measure(model, encoded, window=LENGTH + 1, stride=stride)
    assert found.tokens == n
    return found.losses.double().sum().item(), len(document.encode())


def of_tokens(tokenizer, document, count):
    """The beginning of a document that has so many tokens, encoded by itself."""
    ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"][:count]
    cut = tokenizer.decode(ids)
    assert tokenizer(cut, add_special_tokens=False)["input_ids"] == ids and len(ids) == count
    return cut


@needs("lm_eval")
def test_lm_eval_finds_our_perplexity(demo, made, stories, tmp_path):
    _, tokenizer = demo
    converted, folder = made
    # the stories fill a window and part of another; these, four windows and half of one
    documents = [
        *stories,
        of_tokens(tokenizer, "\n".join(stories), 4 * LENGTH),
        of_tokens(tokenizer, stories[0], LENGTH // 2),
    ]
    rows = [json.dumps({"text": document}) for document in documents]
    (tmp_path / "stories.jsonl").write_text("\n".join(rows))
    # add_bos_token=False: else the BOS, which begins every window, were itself predicted
    run(
        tmp_path, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
        f"pretrained={folder},dtype=float32,max_length={LENGTH},add_bos_token=False",
        "--tasks", JUDGES / "stories_judged.yaml", "--device", "cpu", "--batch_size", "1",
        "--output_path", tmp_path / "found.json",
    )  # fmt: skip
    (file,) = tmp_path.glob("found*.json")
    found = json.loads(file.read_text())["results"]["stories_judged"]

    totals = [same_windows(converted, tokenizer, document) for document in documents]
    loss, size = (sum(column) for column in zip(*totals, strict=True))
    words = sum(len(re.split(r"\s+", document)) for document in documents)
    ours = {
        "byte_perplexity": math.exp(loss / size),
        "word_perplexity": math.exp(loss / words),
        "bits_per_byte": loss / math.log(2) / size,
    }
    for name, value in ours.items():
        theirs = found[f"{name},none"]
        print(f"{name}: lm-eval {theirs:.8g}, ours {value:.8g}: {theirs / value - 1:+.1e}")
        assert theirs == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "form", "prompt"),
    [
        (STATIC, "dense", "Once upon a time"),
        (STATIC, "branches", "Nina had a blue sweater"),
        (ROUTED, "granite-moe", "The old clock stopped"),
    ],
    ids=["dense", "branches", "granite-moe"],
)
def test_generate_writes_what_the_page_shows(demo, spec, form, prompt, tmp_path):
    model, tokenizer = demo
    calibration = Calibration.from_text(tokenizer, named_text("calibration"), tokens=4096)
    converted = convert(model, spec, calibration=calibration if spec.routed else None)
    folder = tmp_path / form
    made = export(converted, folder, tokenizer=tokenizer, form=form)
    code = "yes" if made.record.remote_code else "no"
    assert code == ("yes" if form == "branches" else "no")
    printed = run(tmp_path, JUDGES / "generate_alone.py", folder, TOKENS, code, prompt)
    text = json.loads(printed.splitlines()[-1])
    # the page writes with both models and shows the text of each
    *_, (_, shown) = write_side_by_side((model, converted), tokenizer, prompt, TOKENS)
    assert len(text) > 100
    assert text == shown.text


@pytest.fixture(scope="module")
def gguf_file(made):
    from tests.gguf_writing import write_gguf  # needs the package gguf

    _, folder = made
    file = folder.with_name("gguf") / "judged.gguf"
    file.parent.mkdir()
    write_gguf(folder, file)
    return file


@pytest.fixture(scope="module")
def answered(demo, made, stories):
    """Token ids (1, tokens) of a story, and the checkpoint's logits (tokens, vocabulary) on it."""
    ids = demo[1](stories[0], return_tensors="pt")["input_ids"]
    return ids, logits_on(AutoModelForCausalLM.from_pretrained(made[1]), ids)


def logits_on(model, ids):
    with torch.no_grad():
        return model(ids).logits[0]


def relative_difference(expected, found):
    assert expected.shape == found.shape
    return ((expected - found).abs().max() / expected.abs().max()).item()


@needs("gguf")
def test_transformers_reads_the_gguf_file(gguf_file, answered):
    ids, expected = answered
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    assert model.config.intermediate_size == 768 * STATIC.keep // STATIC.branches
    difference = relative_difference(expected, logits_on(model, ids))
    print(f"GGUF through transformers: max|Δlogit| {difference:.1e} of the largest")
    assert difference <= 1e-5


@needs("gguf")
@needs("llama_cpp")  # a C++ compiler builds it for minutes: no requirement of the tests
def test_llama_cpp_computes_the_same(demo, gguf_file, answered, stories, tmp_path):
    ids, expected = answered
    text = "\n".join(stories)
    asked, answers = tmp_path / "asked.json", tmp_path / "answers.safetensors"
    asked.write_text(json.dumps({"ids": ids[0].tolist(), "text": text}))
    run(tmp_path, JUDGES / "logits_llama_cpp.py", gguf_file, asked, answers)
    found = load_file(answers)
    assert found["encoded"].tolist() == demo[1](text, verbose=False)["input_ids"]
    difference = relative_difference(expected, found["logits"])
    print(f"llama.cpp: max|Δlogit| {difference:.1e} of the largest, {ids.shape[1]} tokens")
    assert difference <= 1e-5
    assert torch.equal(found["logits"].argmax(-1), expected.argmax(-1))

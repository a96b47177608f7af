"""How the demo model's stories are read, renamed and packed, and that its training still runs."""

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch
import train
from hypothesis import given
from hypothesis import strategies as st
from measure import longest_copy
from stories import HE, SHE, Renaming, read_stories
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import forked

DEMO = Path(train.__file__).parent
WIDTH = 12


@pytest.fixture(scope="module")
def own():
    return read_stories(DEMO / "stories.txt")


def test_stories_are_cut_at_separators_and_at_openings(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_text(
        "One.\n\n Two. \n<|endoftext|>\n\n<|endoftext|>\n"
        'Once upon a time, there was a cat.\nShe sat.\nOne day, a dog came.\n"Hi," said the dog.'
    )
    assert read_stories(file) == [
        "One.\nTwo.",
        "Once upon a time, there was a cat.\nShe sat.",
        'One day, a dog came.\n"Hi," said the dog.',
    ]


def test_own_stories_are_many_plain_and_all_different(own):
    assert len(own) == len(set(own)) > 1000
    assert all(story.isascii() and "<|" not in story for story in own)
    openings = [story[:80] for story in own]
    assert len(set(openings)) > 0.98 * len(own)


def test_own_stories_share_no_long_run_with_the_evaluation_text(own):
    shared = longest_copy(own, read_stories(DEMO.parent / "texts" / "evaluation.txt"))
    assert max(len(run.split()) for run in shared) <= 10


def test_longest_copy_is_the_longest_run_of_words():
    sources = ["The cat sat. On the mat", "the dog ran off"]
    texts = ["A cat sat on the log", "The dog RAN!", "zebra"]
    assert longest_copy(texts, sources) == ["cat sat on the", "the dog ran", ""]


def test_renaming_is_consistent_keeps_pronouns_and_never_merges_two_characters():
    story = "Lily met Tom. Tom's dog Max liked Lily, but Timmy did not. Lilypads grew."
    rename = Renaming([story, " ".join(HE + SHE)])
    for seed in range(50):
        told = rename(story, random.Random(seed))
        assert told == rename(story, random.Random(seed))
        words = told.replace("'s", "").replace(",", "").replace(".", "").split()
        she, tom, tom_again, dog, she_again, timmy = (words[i] for i in (0, 2, 3, 5, 7, 9))
        assert she == she_again in SHE
        assert tom == tom_again in HE
        assert dog in HE
        assert timmy in HE
        assert len({tom, dog, timmy}) == 3
        assert told.endswith("did not. Lilypads grew.")
        assert not {she, tom, dog, timmy} & {"Lily", "Tom", "Max", "Timmy"}


stories = st.lists(st.lists(st.integers(1, 99), min_size=2, max_size=40), min_size=1, max_size=20)


@given(stories)
def test_packing_predicts_each_token_of_each_story_once_from_its_own_story(told):
    told = [[1000 + number, *story] for number, story in enumerate(told)]  # tell the stories apart
    rows = train.pack(told, WIDTH)
    inputs, targets, positions, seen = train.batch(rows, WIDTH)
    pairs = sorted((x, y) for x, y in zip(inputs[targets >= 0], targets[targets >= 0], strict=True))
    expected = [pair for story in told for pair in itertools.pairwise(story)]
    assert [(int(x), int(y)) for x, y in pairs] == sorted(expected)
    for r, row in enumerate(rows):
        at = 0
        for piece in row:  # every token sees those before it in its piece and no other
            for i in range(len(piece)):
                assert positions[r, at + i] == i
                assert seen[r, 0, at + i].nonzero().flatten().tolist() == [*range(at, at + i + 1)]
            at += len(piece)


def test_packed_rows_give_the_losses_of_stories_alone():
    torch.manual_seed(0)
    config = train.Config(vocab_size=300, context=16, d_model=16, d_ff=64, layers=2, heads=2)
    model = train.build_model(config).eval()
    told = [[0, *random.Random(i).choices(range(300), k=n)] for i, n in enumerate((9, 4, 11, 6))]
    inputs, targets, *where = train.batch(train.pack(told, 16), 16)
    with torch.no_grad():
        together = train.loss_of(model, inputs, targets, *where)
        nats = 0.0
        for story in told:
            chances = model(torch.tensor([story])).logits[0, :-1].log_softmax(-1)
            nats -= chances.gather(1, torch.tensor(story[1:])[:, None]).sum().item()
    assert together.item() == pytest.approx(nats / (9 + 4 + 11 + 6), rel=1e-5)


@pytest.mark.slow
def test_training_runs_repeats_itself_and_leaves_a_stock_checkpoint(tmp_path):
    tiny = "--vocab-size 300 --context 64 --d-model 32 --d-ff 64 --layers 2 --heads 2 --rows 4"
    command = [sys.executable, str(DEMO / "train.py"), str(DEMO / "stories.txt"), *tiny.split()]
    command += ["--compile", "0", "--share", "0.02", "--held-out", "0.005", "--epochs", "0.5"]
    for out in ("one", "two"):
        done = forked.run([*command, "--out", tmp_path / out], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "held-out bits per byte" in done.stdout
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / out, dtype="auto") for out in ("one", "two")
    )
    assert one.dtype == torch.bfloat16
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    text = "Once upon a time"
    assert AutoTokenizer.from_pretrained(tmp_path / "one")(text).input_ids[0] == 0

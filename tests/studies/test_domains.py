"""The domains of the studies: two parts each, that share nothing."""

from itertools import combinations

import pytest

from mlpmoe.core.calibration import DOCUMENT_SEPARATOR, check_disjoint
from mlpmoe.core.errors import UserError
from mlpmoe.studies.domains import DOMAINS, Domain
from tests.tiny import byte_tokenizer


def documents(text):
    return [document.strip() for document in text.split(DOCUMENT_SEPARATOR) if document.strip()]


@pytest.mark.parametrize("name", DOMAINS)
def test_what_is_trained_on_is_not_measured_on(name):
    domain = DOMAINS[name]
    check_disjoint(domain.train(), domain.test())
    assert not set(documents(domain.train())) & set(documents(domain.test()))


def test_no_text_belongs_to_two_domains():
    texts = [domain.train() + DOCUMENT_SEPARATOR + domain.test() for domain in DOMAINS.values()]
    for one, other in combinations(texts, 2):
        check_disjoint(one, other)


def test_dialogues_are_scenes_between_two_to_four_people():
    scenes = documents(DOMAINS["dialogue"].train()) + documents(DOMAINS["dialogue"].test())
    assert len(set(scenes)) == len(scenes)
    for scene in scenes:
        names = [line.split(": ")[0] for line in scene.splitlines()]
        assert 2 <= len(set(names)) <= 4, scene[:80]
        assert all(line.split(": ", 1)[1].strip() for line in scene.splitlines())
    lines = [line.split(": ", 1)[1] for scene in scenes for line in scene.splitlines()]
    long = [line for line in lines if len(line) > 30]
    assert len(set(long)) == len(long)  # nobody says a sentence twice


def test_samples_are_the_text_and_begin_as_texts_do():
    tokenizer = byte_tokenizer()
    domain = Domain("letters", lambda: "ab" * 20 + DOCUMENT_SEPARATOR + "c" * 30, lambda: "d" * 100)
    train, test = domain.parts(tokenizer, length=5)
    assert (train[:, 0] == 0).all() and (test == test[0]).all()
    whole = tokenizer("ab" * 20)["input_ids"] + tokenizer("c" * 30)["input_ids"]
    assert train[:, 1:].flatten().tolist() == whole[1:][: len(train) * 4]
    assert (len(train), len(test)) == (17, 25)


def test_a_short_part_is_named():
    domain = Domain("notes", lambda: "a" * 1000, lambda: "short")
    with pytest.raises(UserError, match=r"^notes: .* at least"):
        domain.parts(byte_tokenizer(), length=8)

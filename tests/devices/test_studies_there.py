"""The studies train on another device as they do here."""

import pytest

from mlpmoe.studies import apart, downcycling, moore
from mlpmoe.studies.domains import Domain
from tests.devices.stand_in import another_device, moved
from tests.studies.texts import LENGTH, WORDS, text
from tests.tiny import byte_tokenizer, tiny_model

STEPS, BATCH = 4, 2


def short(words):
    return Domain(words[0], lambda: text(words, 0, 50), lambda: text(words, 1, 50))


SHORT = {name: short(words) for name, words in WORDS.items()}


def tell(message, share):
    """Nobody listens."""


def small_model():
    return tiny_model(num_hidden_layers=1, intermediate_size=128)


def study_of(name, model):
    tokenizer = byte_tokenizer()
    if name == "moore":
        rows = moore.study(
            model, tokenizer, STEPS, on_progress=tell, rates=(1e-2,), unseen="signs",
            reflections=2, width=2, length=LENGTH,
        )  # fmt: skip
    else:
        module = {"apart": apart, "downcycling": downcycling}[name]
        rows = module.study(model, tokenizer, STEPS, 0, tell, SHORT, LENGTH)
    return [{key: v for key, v in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("name", ["apart", "downcycling", "moore"])
def test_a_study_has_the_same_rows_there(name, monkeypatch):
    for module in (apart, downcycling):
        monkeypatch.setattr(module, "batch_of", lambda length: BATCH)
    for setting, value in {"RATES": (1e-3,), "LOOKS": 2, "LOOKED_AT": 3}.items():
        monkeypatch.setattr(downcycling, setting, value)
    monkeypatch.setattr(moore, "TEST_TOKENS", 4 * LENGTH)
    monkeypatch.setattr(moore, "DOMAINS", SHORT)
    expected = study_of(name, small_model())
    with another_device() as device:
        rows = study_of(name, moved(small_model(), device))
    for row, due in zip(rows, expected, strict=True):
        assert row.keys() == due.keys()
        for key, value in due.items():
            number = isinstance(value, float)
            assert row[key] == (pytest.approx(value, rel=1e-2, nan_ok=True) if number else value)

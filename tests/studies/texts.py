"""Domains of a few hundred bytes for the tests of the studies, each with its own letters."""

import random

from mlpmoe.studies.domains import Domain

LENGTH = 16  # tokens of a sample
WORDS = {
    "vowels": ("aeio", "uai", "oie", "eau"),
    "digits": ("12", "345", "90", "8617"),
    "signs": ("+-", "==", "!?", "*/*"),
}


def text(words, seed, count=90):
    draw = random.Random(seed)
    return " ".join(draw.choice(words) for _ in range(count))


DOMAINS = {
    name: Domain(name, lambda words=words: text(words, 0), lambda words=words: text(words, 1))
    for name, words in WORDS.items()
}

"""Read stories from text files, and give their characters other names.

Both are deterministic: the order of what is drawn comes from the generator that is passed in.
"""

import itertools
import random
import re
from collections import Counter
from pathlib import Path

SEPARATOR = "<|endoftext|>"
OPENING = re.compile(
    r"Once[ ,]|One (\w+ )?(day|morning|night),? (a|an|two|three|there)\b"
    r"|There (was|were|once|lived)\b"
)
INSIDE = re.compile(  # how a paragraph begins that goes on with a story
    r"[\"']|(The|His|Her|He|She|It|They|But|So|Then|When|After)\b"
    r"|[^.\n]{,60}\b(said|asked|replied|smiled)\b"
)
# Names that the stories use, by pronoun. Left out are those that are words too (Rose, Will, Bill).
SHE = """
    Lily Lucy Sue Sarah Anna Mia Sally Molly Amy Emma Sara Mary Jenny Emily Lila Jane Jill Alice
    Sophie Maria Lisa Jen Susie Rosie Polly Ella Mandy Kitty Betty Annie Lola Katie Nina Zoe
    Tina Lizzy Ellie Kate Julia Clara Nora
""".split()
HE = """
    Tim Timmy Tom Jack Ben Max Sam Bob John Joe Tommy Benny Billy Jimmy Jake Pete Bobby Jim
    Peter Andy Sammy Johnny James Fred Toby Leo George Danny Mike Charlie Paul David Daniel Alex
    Joey Freddy Harry Henry Oscar Adam
""".split()
NAME = re.compile(rf"\b({'|'.join(SHE + HE)})\b")


def read_stories(path: str | Path) -> list[str]:
    """The stories of a text, one line per paragraph; what follows the last separator has none."""
    *pieces, last = Path(path).read_text(encoding="utf-8").split(SEPARATOR)
    pieces += split_unmarked(last)
    stories = [re.sub(r"\s*\n\s*", "\n", piece.strip()) for piece in pieces]
    return [story for story in stories if story]


def split_unmarked(text: str) -> list[str]:
    """Stories that only a newline separates. Most have blank lines between their paragraphs, so a
    single newline between two such pieces is a border, unless the second goes on like the inside of
    a story; otherwise only a usual opening is."""
    pieces = re.split(r"(?<!\n)\n(?!\n)", re.sub(r"[ \t]+\n", "\n", text.strip()))
    stories = pieces[:1]
    for before, piece in itertools.pairwise(pieces):
        spaced = "\n\n" in before and "\n\n" in piece
        if OPENING.match(piece) or (spaced and not INSIDE.match(piece)):
            stories.append(piece)
        else:
            stories[-1] += "\n" + piece
    return stories


class Renaming:
    """Gives the characters of a story other names: the same one throughout, of the same pronoun,
    drawn as often as the stories use it, and none that the story already has."""

    def __init__(self, stories: list[str]):
        self.used = Counter(name for story in stories for name in NAME.findall(story))

    def __call__(self, story: str, rng: random.Random) -> str:
        present = sorted(set(NAME.findall(story)))
        new, taken = {}, set(present)
        for name in present:
            group = SHE if name in SHE else HE
            free = [other for other in group if other not in taken and self.used[other]]
            if free:
                new[name] = rng.choices(free, [self.used[other] for other in free])[0]
                taken.add(new[name])
        return NAME.sub(lambda match: new.get(match[0], match[0]), story)

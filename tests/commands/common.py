"""What the tests of the command line share: texts, and how to read what it wrote."""

import json
from pathlib import Path

TEXT = "One day, a fox – a grey one – slept.\n<|endoftext|>\nA cat sat on the wall."
ANIMALS = ("heron", "badger", "newt", "mole", "wren")
# other text than is measured, of 1,024 bytes and more: tokens of the tiny model
STORIES = "\n<|endoftext|>\n".join(
    f"Stone {number}: the {ANIMALS[number % 5]} took it along and put "
    f"{number % 7} dots on its flat back."
    for number in range(30)
)
ROOT = Path(__file__).resolve().parents[2]


def strictly(out):
    """The one JSON value that `out` is; NaN and Infinity are no JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(out, parse_constant=refuse)


def row(out, name):
    """The cells of a table's row."""
    line = next(line for line in out.splitlines() if line.strip().startswith(name))
    return [cell.strip() for cell in line.strip().split("  ") if cell.strip()]


def refused(done, words):
    """Whether (status, stdout, stderr) is a refusal in one line that says these words."""
    status, out, err = done
    assert (status, out) == (2, "")
    assert err.startswith("mlpmoe: ")
    assert words in err
    assert err.count("\n") == 1
    return True

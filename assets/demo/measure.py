"""Measure the demo model: every figure and sample of its card, from one command.

    python assets/demo/measure.py --train TRAINING-TEXT [...] --unseen OTHER-TEXT [...]

Prints Markdown: the loss on each text, what conversion costs on each unseen one, texts from ten
prompts, dense and converted, and the longest run of words that those copy from the training texts.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from stories import SEPARATOR, read_stories

from mlpmoe import ConversionSpec, compare, convert, load, perplexity, write_side_by_side
from mlpmoe.measure.generation import parted_at

PROMPTS = (
    "Once upon a time",
    "One day, a little bird",
    "Tom and his sister",
    "There was once a small blue boat who",
    "Nina wanted to bake a cake, but",
    '"Where is my hat?" asked Grandpa.',
    "It was a rainy day, and the dog",
    "A mouse and an elephant were best friends.",
    "Ben found a strange key under his bed.",
    "The old tree in the garden was sad because",
)
NEW_TOKENS = 200
SPECS = (
    [ConversionSpec(branches=16, keep=keep) for keep in range(16, 3, -1)]
    + [ConversionSpec(branches=16, fade=fade) for fade in (0.3, 0.6, 0.9, 1.2)]
)  # fmt: skip
SHOWN = {"dense": ConversionSpec(branches=16), "K = 12 of 16": ConversionSpec(branches=16, keep=12)}


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def longest_copy(texts: list[str], sources: list[str]) -> list[str]:
    """The longest run of words of each text that stands in one of the sources."""
    sources = [words_of(source) for source in sources]
    texts, best = [words_of(text) for text in texts], [[] for _ in texts]
    size, grew = 1, True
    while grew:
        known = set(runs(sources, size))
        grew = False
        for i, text in enumerate(texts):
            found = next((run for run in runs([text], size) if run in known), None)
            if found:
                best[i], grew = list(found), True
        size += 1
    return [" ".join(run) for run in best]


def runs(texts: list[list[str]], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(t[i : i + size]) for t in texts for i in range(len(t) - size + 1))


def write(model, tokenizer, prompt: str) -> tuple[str, list[int]]:
    *_, (writing,) = write_side_by_side([model], tokenizer, prompt, max_new_tokens=NEW_TOKENS)
    return prompt + writing.text, writing.tokens


def main() -> None:
    verbatim = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=verbatim)
    parser.add_argument("--model", default="demo", help="a name or folder")
    parser.add_argument("--train", nargs="*", default=[], help="texts that it was trained on")
    parser.add_argument("--unseen", nargs="*", default=[], help="texts that it never saw")
    args = parser.parse_args()
    model, tokenizer = load(args.model, dtype="float32", device="cpu")
    told = {path: read_stories(path) for path in [*args.train, *args.unseen]}
    joined = {path: f"\n{SEPARATOR}\n".join(stories) for path, stories in told.items()}

    print("| text | stories | bytes | tokens | nats per token | bits per byte |")
    print("|---|---|---|---|---|---|")
    dense = {}
    for path, stories in told.items():
        dense[path] = perplexity(model, tokenizer, joined[path])
        size, nats = sum(len(s.encode()) for s in stories), dense[path].losses.double().mean()
        row = f"{len(stories):,} | {size:,} | {dense[path].tokens:,} | {nats:.4f}"
        print(f"| `{Path(path).name}` | {row} | {dense[path].bits_per_byte:.4f} |", flush=True)

    print("\n| B = 16 | " + " | ".join(f"`{Path(path).name}`" for path in args.unseen) + " |")
    print("|---" * (1 + len(args.unseen)) + "|")
    for spec in SPECS:
        converted, cells = convert(model, spec), []
        for path in args.unseen:
            other = perplexity(converted, tokenizer, joined[path])
            change = compare(dense[path], other)
            cells.append(f"{other.value:.2f} (× {change.ratio:.3f} ± {change.stderr:.3f})")
        name = f"fade {spec.fade:g}" if spec.fade else f"K = {spec.keep or spec.branches}"
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    written = {
        name: [write(convert(model, spec), tokenizer, prompt) for prompt in PROMPTS]
        for name, spec in SHOWN.items()
    }
    sources = [story for path in args.train for story in told[path]]
    copies = longest_copy([text for text, _ in written["dense"]], sources) if sources else []
    for i, prompt in enumerate(PROMPTS):
        print(f"\n### {prompt}")
        for name, texts in written.items():
            print(f"\n{name}:\n\n> " + texts[i][0].replace("\n", "  \n> "))
        if copies:
            print(f"\nLongest copy, {len(copies[i].split())} words: {copies[i]}")
        parted = parted_at(*(texts[i][1] for texts in written.values()))
        print(f"\nThe texts part at token {parted}.")


if __name__ == "__main__":
    main()

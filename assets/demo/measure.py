"""Measure the demo model: every figure and sample of its card, from one command.

    python assets/demo/measure.py --train TRAINING-TEXT [...] --unseen OTHER-TEXT [...]

Prints Markdown: what conversion costs, texts from ten prompts, dense and converted, the longest
runs of words that those copy from the training texts, and the loss on each text. The losses take
longest: about 10 minutes for a million tokens on one core.
"""

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path

from stories import SEPARATOR, read_stories

from mlpmoe import ConversionSpec, compare, convert, load, perplexity, write_side_by_side

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
EVALUATION = str(Path(__file__).parent.parent / "texts" / "evaluation.txt")
SPECS = (
    [ConversionSpec(branches=16, keep=keep) for keep in range(16, 3, -1)]
    + [ConversionSpec(branches=16, fade=fade) for fade in (0.3, 0.6, 0.9, 1.2)]
)  # fmt: skip
TEMPERATURE = 0.6  # of the page
SHOWN = {  # what is written how: spec, temperature
    "dense, greedy": (ConversionSpec(branches=16), 0.0),
    "dense": (ConversionSpec(branches=16), TEMPERATURE),
    "K = 12 of 16": (ConversionSpec(branches=16, keep=12), TEMPERATURE),
    "K = 8 of 16": (ConversionSpec(branches=16, keep=8), TEMPERATURE),
}


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


def write(model, tokenizer, prompt: str, temperature: float) -> str:
    *_, (writing,) = write_side_by_side([model], tokenizer, prompt, NEW_TOKENS, temperature)
    return prompt + writing.text


def print_losses(model, tokenizer, told: dict[str, list[str]]) -> None:
    print("| text | stories | bytes | tokens | nats per token | bits per byte |")
    print("|---|---|---|---|---|---|")
    for path, stories in told.items():
        loss = perplexity(model, tokenizer, f"\n{SEPARATOR}\n".join(stories))
        size = sum(len(story.encode()) for story in stories)
        row = f"{len(stories):,} | {size:,} | {loss.tokens:,} | {math.log(loss.value):.4f}"
        print(f"| `{Path(path).name}` | {row} | {loss.bits_per_byte:.4f} |", flush=True)


def print_trade_off(model, tokenizer, path: str) -> None:
    text = Path(path).read_text(encoding="utf-8")
    dense = perplexity(model, tokenizer, text)
    print(f"\n| B = 16 | perplexity of `{Path(path).name}` | ratio to dense |\n|---|---|---|")
    for spec in SPECS:
        other = perplexity(convert(model, spec), tokenizer, text)
        change = compare(dense, other)
        name = f"fade {spec.fade:g}" if spec.fade else f"K = {spec.keep or spec.branches}"
        row = f"{other.value:.2f} | × {change.ratio:.3f} ± {change.stderr:.3f}"
        print(f"| {name} | {row} |", flush=True)


def print_copies(texts: list[str], unseen: dict[str, list[str]], sources: list[str]) -> None:
    print("\n| prompt | words | longest run of words copied from a training story |\n|---|---|---|")
    for prompt, copy in zip(PROMPTS, longest_copy(texts, sources), strict=True):
        print(f"| {prompt} | {len(copy.split())} | {copy} |")
    for path, stories in unseen.items():
        sizes = [len(copy.split()) for copy in longest_copy(stories, sources)]
        mean, most = sum(sizes) / len(sizes), max(sizes)
        print(f"\nStories of `{Path(path).name}`: {mean:.1f} words on average, at most {most}.")


def print_texts(written: dict[str, list[str]]) -> None:
    for prompt, *versions in zip(PROMPTS, *written.values(), strict=True):
        print(f"\n### {prompt}")
        for name, text in zip(written, versions, strict=True):
            print(f"\n{name}:\n\n> " + text.replace("\n", "  \n> "))


def main() -> None:
    verbatim = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=verbatim)
    parser.add_argument("--model", default="demo", help="a name or folder")
    parser.add_argument("--train", nargs="*", default=[], help="texts that it was trained on")
    parser.add_argument("--unseen", nargs="*", default=[], help="texts that it never saw")
    parser.add_argument("--trade-off", default=EVALUATION, help="text to measure conversions on")
    args = parser.parse_args()
    model, tokenizer = load(args.model, dtype="float32", device="cpu")
    train, unseen = (
        {path: read_stories(path) for path in paths} for paths in (args.train, args.unseen)
    )
    written = {
        name: [write(convert(model, spec), tokenizer, p, temperature) for p in PROMPTS]
        for name, (spec, temperature) in SHOWN.items()
    }
    print_trade_off(model, tokenizer, args.trade_off)
    print_texts(written)
    if sources := [story for stories in train.values() for story in stories]:
        print_copies(written["dense, greedy"], unseen, sources)
    print_losses(model, tokenizer, train | unseen)


if __name__ == "__main__":
    main()

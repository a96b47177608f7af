"""Step 1: the output of an MLP as a sum of branches, added up like a column of figures."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from math import floor, log10

from torch import Tensor

from ...core.branched import branch_sizes
from ...measure.notation import number
from .reading import Reading
from .step import Question, Step, View

MOST_BRANCHES = 8  # rows of the table
OUTPUTS = 5  # columns: numbers of the d_model that an MLP says for a token
WORDS = 16  # the first, among which the longest is the example
SHUFFLED = 8  # branches of the question


@dataclass(frozen=True)
class Addition:
    """What the branches add to some numbers of one token."""

    word: str
    outputs: tuple[int, ...]  # which of the d_model numbers: the largest
    said: Tensor  # (B, outputs)
    total: Tensor  # (outputs,): the sum by the paper's loop
    whole: Tensor  # (outputs,): the MLP in one piece
    error: float  # max |sum - whole| / max |whole|, over all tokens and numbers


def addition(reading: Reading, branches: int) -> Addition:
    said, total = reading.looped(branches)
    whole = reading.whole()
    token = max(range(min(WORDS, len(whole))), key=lambda t: len(reading.words[t]))
    outputs = whole[token].abs().topk(min(OUTPUTS, whole.shape[1])).indices.sort().values
    return Addition(
        word=reading.words[token],
        outputs=tuple(outputs.tolist()),
        said=said[:, token, outputs],
        total=total[token, outputs],
        whole=whole[token, outputs],
        error=rounding(total, whole),
    )


def rounding(total: Tensor, whole: Tensor) -> float:
    return float((total - whole).abs().max() / whole.abs().max())


def words(reading: Reading) -> str:
    inner = r"\phi\left(W_{\text{gate}}^{(b)}x\right)\odot W_{\text{up}}^{(b)}x"
    rows = "rows of gate and up"
    if reading.weights.gate is None:
        inner, rows = r"\phi\left(W_{\text{up}}^{(b)}x\right)", "row of up"
    return f"""
$$\\mathrm{{MLP}}(x)=\\sum_{{b=0}}^{{B-1}}\\alpha_b\\,W_{{\\text{{down}}}}^{{(b)}}\\left[{inner}\\right]$$

This MLP has {reading.weights.d_ff:,} neurons. Each reads the token through its own {rows}, and \
adds its own column of down to the output. So the neurons can be cut into B groups, the \
**branches**: what the branches say adds up to what the whole MLP says, as long as every factor α \
is 1. The table adds it up for one word, and for {OUTPUTS} of the {reading.weights.d_model} \
numbers that the MLP says about it.
"""


def view(reading: Reading, branches: float) -> View:
    found = addition(reading, int(branches))
    sizes = branch_sizes(reading.weights.d_ff, int(branches))
    each = f"{sizes[0]}" if sizes[0] == sizes[-1] else f"{sizes[-1]} or {sizes[0]}"
    numbers = (
        f"<p>{len(sizes)} {'branch' if len(sizes) == 1 else 'branches'} of {each} neurons. Over "
        f"all {len(reading.x)} tokens and {reading.weights.d_model} numbers, the sum differs from "
        f"the whole by at most <strong>{number(found.error, 2)}</strong> of the largest number: "
        f"{escape(reading.dtype)} rounding, nothing else.</p>"
    )
    return View(table(found), numbers)


def table(found: Addition) -> str:
    """A column of figures for each output: branches, then their sum, then the whole."""
    largest = max(float(found.said.abs().max()), float(found.whole.abs().max()), 1e-30)
    decimals = max(0, 2 - floor(log10(largest)))
    head = "".join(f'<th scope="col">{output}</th>' for output in found.outputs)
    rows = [(f"branch {b}", "part", row) for b, row in enumerate(found.said.tolist())]
    rows += [("their sum", "total", found.total.tolist())]
    rows += [("whole MLP", "whole", found.whole.tolist())]
    body = "".join(
        f'<tr class="{kind}"><th scope="row">{name}</th>'
        + "".join(f"<td>{_signed(value, decimals)}</td>" for value in row)
        + "</tr>"
        for name, kind, row in rows
    )
    return (
        f"<table><caption>What is said about the word “{escape(found.word)}”</caption>"
        f'<thead><tr><th scope="col">number</th>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def _signed(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}".replace("-", "−")


def judge(reading: Reading) -> tuple[int, str]:
    _, total = reading.looped(SHUFFLED, order="random")
    error = rounding(total, reading.whole())
    return 1, (
        f"Measured at layer {reading.layer}: with the neurons shuffled and cut into {SHUFFLED}, "
        f"the sum differs by at most {number(error, 2)} of the largest number, which is rounding. "
        "A sum does not care about the order of its terms. Which neurons share a branch matters "
        "only once something is removed."
    )


STEP = Step(
    key="split",
    title="Split",
    words=words,
    control={
        "minimum": 1, "maximum": MOST_BRANCHES, "value": 4, "step": 1, "precision": 0,
        "label": "B: branches",
    },
    view=view,
    question=Question(
        "All neurons are shuffled before they are cut into branches. What happens to the sum?",
        (
            "It becomes another one, since other neurons share a branch",
            "It stays the same, up to rounding",
            "It stays the same on average, not for every token",
        ),
    ),
    judge=judge,
    plots=False,
)  # fmt: skip

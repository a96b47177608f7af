"""Step 1: one MLP as a drawing, cut into branches whose outputs add up to what it says."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from ....core.spec import ConversionSpec
from ....core.static.branched import branch_sizes
from ....measure.notation import number
from ..lesson_drawing import LINES, mlp_drawing
from .reading import Reading
from .step import BRANCHES, Question, Step, View

SHUFFLED = 8  # branches of the question


@dataclass(frozen=True)
class Addition:
    """What the branches say, and how well it adds up."""

    said: tuple[float, ...]  # norm of what each branch says, over all tokens
    error: float  # max |sum - whole| / max |whole|, over all tokens and numbers


def addition(reading: Reading, branches: int, order: str = "contiguous") -> Addition:
    said, total = reading.looped(branches, order)
    whole = reading.whole()
    error = float((total - whole).abs().max() / whole.abs().max())
    return Addition(tuple(said.flatten(1).norm(dim=1).tolist()), error)


def neuron_sizes(reading: Reading) -> dict[str, Tensor]:
    """(d_ff,) per matrix: how large the weights of each neuron are."""
    matrices = {
        "gate": reading.weights.gate, "up": reading.weights.up, "down": reading.weights.down.T,
    }  # fmt: skip
    return {
        name: torch.linalg.vector_norm(matrix.detach().float(), dim=1).cpu()
        for name, matrix in matrices.items()
        if matrix is not None
    }


def words(reading: Reading) -> str:
    inner = r"\phi\left(W_{\text{gate}}^{(b)}x\right)\odot W_{\text{up}}^{(b)}x"
    rows = "rows of gate and up"
    if reading.weights.gate is None:
        inner, rows = r"\phi\left(W_{\text{up}}^{(b)}x\right)", "row of up"
    return f"""
$$\\mathrm{{MLP}}(x)=\\sum_{{b=0}}^{{B-1}}\\alpha_b\\,W_{{\\text{{down}}}}^{{(b)}}\\left[{inner}\\right]$$

This MLP has {reading.weights.d_ff:,} **neurons**. Each reads the token x through its own {rows}, \
and adds its own column of down to the output y. So they can be cut into B groups, the \
**branches**. Cut it: as long as every factor α is 1, the branches add up to the whole.
"""


def view(reading: Reading, branches: float, answered: bool) -> View:
    found = addition(reading, int(branches))
    sizes = branch_sizes(reading.weights.d_ff, int(branches))
    each = f"{sizes[0]}" if sizes[0] == sizes[-1] else f"{sizes[-1]} or {sizes[0]}"
    numbers = (
        f"<p>{len(sizes)} {'branch' if len(sizes) == 1 else 'branches'} of {each} neurons. Over "
        f"{len(reading.x)} tokens, their sum differs from the whole by at most "
        f"<strong>{number(found.error, 2)}</strong> of the largest number: "
        f"{escape(reading.dtype)} rounding, nothing else.</p>"
    )
    drawing = mlp_drawing(
        neuron_sizes(reading), reading.weights.d_model, reading.activity(), sizes, found.said
    )
    shown = max(1, round(reading.weights.d_ff / LINES))
    key = (
        f"<p>A line is about {shown} neurons: stronger in a block for larger weights, stronger "
        "before down for neurons that fire more. The wider a curve, the more its branch says.</p>"
    )
    return View(drawing + key, numbers)


def judge(reading: Reading) -> tuple[int, str]:
    found = addition(reading, SHUFFLED, order="random")
    return 2, (
        f"Measured at layer {reading.layer}: with the neurons shuffled and cut into {SHUFFLED}, "
        f"the sum differs by at most {number(found.error, 2)} of the largest number, which is "
        "rounding. A sum does not care about the order of its terms. Which neurons share a branch "
        "matters only once something is removed."
    )


STEP = Step(
    key="cut",
    title="Cut",
    words=words,
    control={
        "minimum": 1, "maximum": BRANCHES, "value": 4, "step": 1, "precision": 0,
        "label": "B: branches",
    },
    view=view,
    spec=lambda reading, branches: ConversionSpec(branches=int(branches)),
    question=Question(
        "All neurons are shuffled before they are cut into branches. What happens to the sum?",
        (
            "It becomes another one, since other neurons share a branch",
            "It stays the same on average, not for every token",
            "It stays the same, up to rounding",
        ),
    ),
    judge=judge,
    plots=False,
)  # fmt: skip

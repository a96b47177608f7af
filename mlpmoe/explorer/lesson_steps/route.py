"""Step 4: other branches for every token, chosen by a router, against the same ones for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.conversion import convert_mlp
from ...core.routed.partition import expert_count
from ...core.spec import ConversionSpec
from ..lesson_plots import routed_words
from .reading import Reading, relative_error
from .step import BRANCHES, Question, Step, View

SHOWN_WORDS = 14
QUARTER = BRANCHES // 4
NEAR = 0.05  # errors that differ by less count as the same


@dataclass(frozen=True)
class Routed:
    """Which experts run for each token, and how far the output is from the whole."""

    running: int  # experts per token
    size: Tensor  # (tokens, experts): norm of what each expert says
    chosen: Tensor  # (tokens, experts) bool: by the router
    error: float  # size of the difference / size of the whole
    fixed_error: float  # the same experts for all tokens, those that say most on this text
    oracle_error: float  # those that say most about each token, found by running all


@torch.inference_mode()
def routed(reading: Reading, running: int) -> Routed:
    experts = expert_count(reading.weights.d_ff, BRANCHES)
    running = min(running, experts)
    said, _ = reading.looped(experts)
    size = said.norm(dim=2).T  # (tokens, experts)

    def choice(router: str) -> Tensor:
        spec = ConversionSpec(
            method="contiguous", experts=experts, active=running / experts, router=router
        )
        return convert_mlp(reading.weights, spec).select(reading.x)

    fixed = torch.zeros_like(size, dtype=torch.bool)
    fixed[:, size.mean(0).topk(running).indices] = True
    chosen = choice("centroid")
    whole = said.sum(0)
    errors = [
        relative_error(torch.einsum("te,etd->td", which.float(), said), whole)
        for which in (chosen, fixed, choice("oracle"))
    ]
    return Routed(running, size.cpu(), chosen.cpu(), *errors)


def words(reading: Reading) -> str:
    matrix = "up" if reading.weights.gate is None else "gate"
    return f"""
$$y(x)=\\sum_{{e\\,\\in\\,\\mathrm{{Top}}_k(Rx)}}y_e(x)$$

Why the same branches for every token? Here each branch is an **expert**, and a **router** R picks \
k of them for each token. It scores an expert by the mean of its {matrix} rows: a guess that \
needs no training. Compared are the same k experts for all tokens, those that say most on this \
text, and an **oracle**: it runs all experts first and takes the k that say most. That saves \
nothing, and shows what a router could gain.
"""


def view(reading: Reading, running: float) -> View:
    found = routed(reading, int(running))
    experts = found.size.shape[1]
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td class="bar"><span class="{kind}" '
        f'style="width:{min(100.0, 100 * error):.1f}%"></span></td>'
        f"<td>{100 * error:.0f}\N{NO-BREAK SPACE}%</td></tr>"
        for name, kind, error in (
            ("same for all", "fixed", found.fixed_error),
            ("router", "router", found.error),
            ("oracle, a bound", "oracle", found.oracle_error),
        )
    )
    numbers = (
        f"<table><caption>Error of the output, {found.running} of {experts} experts per token, on "
        f"{len(reading.x)} tokens</caption><tbody>{rows}</tbody></table>"
    )
    shown = slice(SHOWN_WORDS)
    return View(routed_words(reading.words[shown], found.size[shown], found.chosen[shown]), numbers)


def judge(reading: Reading) -> tuple[int, str]:
    found = routed(reading, QUARTER)
    gain = found.fixed_error - found.error
    right = 2 if abs(gain) < NEAR else 0 if gain > 0 else 1
    return right, (
        f"Measured at layer {reading.layer} with {found.running} of {found.size.shape[1]} "
        f"experts: the router misses {100 * found.error:.0f} % of the output, the same experts for "
        f"all {100 * found.fixed_error:.0f} %, the oracle {100 * found.oracle_error:.0f} %. "
        "Routing pays only if the router knows in advance who has something to say: try other "
        "layers here, and better routers on the tab Experts."
    )


STEP = Step(
    key="route",
    title="Route",
    words=words,
    control={
        "minimum": 1, "maximum": BRANCHES, "value": QUARTER, "step": 1, "precision": 0,
        "label": f"k: experts that run for a token, of {BRANCHES}",
    },
    view=view,
    question=Question(
        f"{QUARTER} experts run per token. Which output is nearer to the whole on this text?",
        (
            "The router's, by 5 points or more",
            "That of the same experts for all, by 5 points or more",
            "They differ by less than 5 points",
        ),
    ),
    judge=judge,
)  # fmt: skip

"""Step 4: other branches for every token, chosen by a router, against the same ones for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....core.conversion import convert_mlp
from ....core.routed.partition import expert_count
from ....core.spec import ConversionSpec
from ...plots.lesson_plots import routed_words
from .reading import Reading, relative_error
from .step import BRANCHES, Question, Step, View

SHOWN_WORDS = 14
QUARTER = BRANCHES // 4
START = 3 * BRANCHES // 4  # as many as K keeps in the step before
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
k of them for each token, by the mean of each one's {matrix} rows: a guess that needs no training. \
Beside it stand the same k experts for all tokens, and an **oracle** that runs all of them first: \
it saves nothing, and is a bound.
"""


def view(reading: Reading, running: float, answered: bool) -> View:
    found = routed(reading, int(running))
    experts = found.size.shape[1]
    rows = "".join(
        _row(name, kind, error if answered else None)
        for name, kind, error in (
            ("same for all", "fixed", found.fixed_error),
            ("router", "router", found.error),
            ("oracle, a bound", "oracle", found.oracle_error),
        )
    )
    after = " per token" if answered else ": answer first"
    numbers = (
        f"<table><caption>Error of the output, {found.running} of {experts} experts{after}"
        f"</caption><tbody>{rows}</tbody></table>"
    )
    shown = slice(SHOWN_WORDS)
    return View(routed_words(reading.words[shown], found.size[shown], found.chosen[shown]), numbers)


def _row(name: str, kind: str, error: float | None) -> str:
    """A bar as long as the error; None: not shown yet."""
    if error is None:
        bar, said = "", "?"
    else:
        bar = f'<span class="{kind}" style="width:{min(100.0, 100 * error):.1f}%"></span>'
        said = f"{100 * error:.0f}\N{NO-BREAK SPACE}%"
    return f'<tr><th scope="row">{name}</th><td class="bar">{bar}</td><td>{said}</td></tr>'


def spec(reading: Reading, running: float) -> ConversionSpec:
    experts = expert_count(reading.weights.d_ff, BRANCHES)
    active = min(int(running), experts) / experts
    return ConversionSpec(method="contiguous", experts=experts, active=active)


def judge(reading: Reading) -> tuple[int, str]:
    found = routed(reading, QUARTER)
    gain = found.fixed_error - found.error
    right = 1 if abs(gain) < NEAR else 2 if gain > 0 else 0
    return right, (
        f"Measured at layer {reading.layer} with {found.running} of {found.size.shape[1]} "
        f"experts: the router misses {100 * found.error:.0f} % of the output, the same experts for "
        f"all {100 * found.fixed_error:.0f} %, the oracle {100 * found.oracle_error:.0f} %. "
        "Routing pays only if the router knows in advance who has something to say: try other "
        "layers here, and better methods in the last step."
    )


STEP = Step(
    key="route",
    title="Route",
    words=words,
    control={
        "minimum": 1, "maximum": BRANCHES, "value": START, "step": 1, "precision": 0,
        "label": f"k: experts that run for a token, of {BRANCHES}",
    },
    view=view,
    spec=spec,
    question=Question(
        f"{QUARTER} experts run per token. Which output is nearer to the whole on this text?",
        (
            "That of the same experts for all, by 5 points or more",
            "They differ by less than 5 points",
            "The router's, by 5 points or more",
        ),
    ),
    judge=judge,
)  # fmt: skip

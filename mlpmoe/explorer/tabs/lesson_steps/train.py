"""Step 5: what a little training wins back, by what is trained. A training takes minutes, so the
figures are runs that come with the project (assets/sweeps)."""

from __future__ import annotations

import json
from functools import lru_cache

from ....core.recovery.kinds import NOTHING
from ....core.spec import ConversionSpec
from ....measure.notation import NBSP, number
from ....measure.runs.sweep import Run
from ....models import assets_folder
from ...plots.lesson_plots import training_lines
from .reading import Reading
from .step import BRANCHES, Question, Step, View

FILE = "demo-training.jsonl"
KEPT = BRANCHES // 2
MOST, EVERY, START = 40, 10, 20  # steps of training
NEAR = 0.05  # of what was lost: gains that differ by less count as the same
# what is trained -> its name, and how many numbers of the demo model that are
KINDS = {
    "all": ("all MLP weights", 2_359_360),
    "down": ("down", 786_432),
    "alpha": ("the factors α", 64),
}
ASKED = ("down", "alpha")  # that the question is about


@lru_cache(maxsize=1)
def recorded() -> dict[str, dict[int, Run]]:
    """What is trained -> steps -> the run of the demo model that was trained so; with 0 steps, the
    one that was not."""
    lines = (assets_folder() / "sweeps" / FILE).read_text(encoding="utf-8").splitlines()
    runs = [Run.from_dict(json.loads(line)) for line in lines]
    (untrained,) = (run for run in runs if not run.spec.recovers)
    found = {kind: {0: untrained} for kind in KINDS}
    for run in runs:
        if run.spec.recovers:
            found[run.spec.recover][run.spec.recover_steps] = run
    return {kind: dict(sorted(some.items())) for kind, some in found.items()}


def won(kind: str, steps: int) -> float:
    """The share of what the conversion cost that training won back."""
    untrained, trained = (recorded()[kind][n].ratio for n in (0, steps))
    return (untrained - trained) / (untrained - 1)


def words(reading: Reading) -> str:
    return f"""
$$\\min_{{\\theta}}\\;\\mathrm{{KL}}\\left(p_{{\\text{{dense}}}}\\,\\|\\,p_{{\\theta}}\\right)$$

**Distillation**: the dense model, the teacher, says how likely each next word is. Step by step \
the weights of the cut one, the student, are moved until it says nearly the same; nobody has to \
label anything. Recorded with {KEPT} of {BRANCHES} branches of the demo model: each point is a \
training of its own.
"""


def view(reading: Reading, steps: float, answered: bool) -> View:
    shown = [kind for kind in KINDS if answered or kind not in ASKED]
    rows = "".join(_row(kind, int(steps), kind in shown) for kind in KINDS)
    numbers = (
        f"<table><caption>After {int(steps)} steps{'' if answered else ': answer first'}</caption>"
        '<thead><tr><th scope="col"></th><th scope="col">numbers</th>'
        f'<th scope="col">perplexity</th></tr></thead><tbody>{rows}</tbody></table>'
    )
    lines = {KINDS[kind][0]: recorded()[kind] for kind in shown}
    return View(training_lines(lines, int(steps)), numbers)


def _row(kind: str, steps: int, shown: bool) -> str:
    name, count = KINDS[kind]
    ratio = f"×{NBSP}{number(recorded()[kind][steps].ratio, 3)}" if shown else "?"
    return f'<tr><th scope="row">{name}</th><td>{count:,}</td><td>{ratio}</td></tr>'


def spec(reading: Reading, steps: float) -> ConversionSpec:
    trained = {"recover": "all", "recover_steps": int(steps)} if steps else {"recover": NOTHING}
    return ConversionSpec(branches=BRANCHES, keep=KEPT, **trained)


def judge(reading: Reading) -> tuple[int, str]:
    factors, down = won("alpha", MOST), won("down", MOST)
    right = 1 if abs(factors - down) < NEAR else 0 if factors > down else 2
    everything = won("all", MOST)
    return right, (
        f"Recorded after {MOST} steps: of what was lost, α wins back {100 * factors:.0f} %, down "
        f"{100 * down:.0f} %, all MLP weights {100 * everything:.0f} %. A factor can only make its "
        "branch louder or softer; down can change what each neuron that is left says."
    )


STEP = Step(
    key="train",
    title="Train",
    words=words,
    control={
        "minimum": 0, "maximum": MOST, "value": START, "step": EVERY, "precision": 0,
        "label": "Steps of training",
    },
    view=view,
    spec=spec,
    question=Question(
        f"{MOST} steps: what wins back more, training the factors α or training down?",
        (
            "α: so few numbers are learnt quickly",
            "Both the same, within 5 % of what was lost",
            "down: it can make up for what is gone",
        ),
    ),
    judge=judge,
)  # fmt: skip

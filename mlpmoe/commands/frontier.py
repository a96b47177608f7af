"""The command `frontier`: search for the best recipe at a budget."""

from __future__ import annotations

import argparse
from contextlib import suppress
from dataclasses import asdict

from ..core.calibration import warn_of_few_tokens
from ..measure.notation import change, signed_percent
from ..measure.quality.encoding import scored_tokens, windows
from ..measure.runs.deadline import Deadline, TimeUp
from ..measure.runs.search import COSTS, Budget, best, finalists, front, search
from ..measure.runs.sweep import Run, sweep
from ..measure.runs.trials import prepare
from ..measure.words import in_words
from ..models import load
from .arguments import MODEL_HELP, add_setting, at_least
from .terminal import print_json, print_table, progress
from .texts import calibration_text_for, evaluation_text, in_windows

NAME, HELP = "frontier", "search for the best recipe at a budget"
EXAMPLES = """examples:
  python -m mlpmoe frontier demo --budget 0.9,0.75,0.5
  python -m mlpmoe frontier demo --cost compute --budget 0.75 --no-calibration
  python -m mlpmoe frontier demo --ratio 1.05 --seconds 120

The search goes by the last stories of the calibration text; what it finds is then measured on the
evaluation text, beside the presets.
"""
DEFAULT_BUDGETS = "0.9,0.75,0.5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_setting(parser)
    parser.add_argument(
        "--cost", choices=tuple(COSTS), default="nonzero",
        help="what is spent: MLP parameters that are not zero, or MLP multiply-adds per token "
        "(default: %(default)s)",
    )  # fmt: skip
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--budget", default=DEFAULT_BUDGETS, metavar="SHARES",
        help="shares of the dense cost, with commas (default: %(default)s)",
    )  # fmt: skip
    goal.add_argument(
        "--ratio", type=float, metavar="R", help="instead: the least cost at this perplexity ratio"
    )
    parser.add_argument(
        "--no-calibration", dest="calibrated", action="store_false",
        help="only recipes that look at no text",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=at_least(1), default=60, metavar="N",
        help="for the search, shared among the budgets; the finds are measured after that "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of the search")


def run(arguments: argparse.Namespace) -> None:
    budgets = _budgets(arguments)
    text = evaluation_text(arguments)
    seen = calibration_text_for(arguments, text.content)
    model, tokenizer = load(
        arguments.model, arguments.dtype, arguments.device, on_progress=progress
    )
    encoded, window, stride = text.encode(tokenizer, model)
    deadline = Deadline(arguments.seconds)
    calibration = seen.encode(tokenizer, model) if arguments.calibrated else None
    trials, tried = None, []
    with suppress(TimeUp):
        trials = prepare(model, tokenizer, seen.content, calibration, deadline, progress)
        for number, budget in enumerate(budgets):
            part = deadline.share(len(budgets) - number)
            tried += search(trials, budget, part, seed=arguments.seed, report=progress)
    specs = list(dict.fromkeys(s for b in budgets for s in finalists(tried, b)))
    if calibration:
        warn_of_few_tokens(model, specs, calibration)
    runs = list(sweep(model, encoded, specs, calibration, window, stride, progress))
    progress("")
    searched = trials.tokens if trials else 0
    tokens = scored_tokens(windows(model, encoded, window, stride))
    found = [(budget, best(runs, budget)) for budget in budgets]
    shown = front(runs, budgets[0])
    if arguments.json:
        setting = {
            "model": arguments.model, "text": text.name, "text_digest": text.digest,
            "protocol": text.protocol, "tokens": tokens,
            "searched_on": seen.name, "searched_tokens": searched,
            "calibrated": arguments.calibrated, "seconds": arguments.seconds,
            "seed": arguments.seed, "tried": len(tried), "window": window, "stride": stride,
        }  # fmt: skip
        suggested = [
            {"budget": asdict(budget), "run": run.to_dict() if run else None}
            for budget, run in found
        ]
        return print_json(
            {"setting": setting, "front": [r.to_dict() for r in shown], "suggested": suggested}
        )
    print(
        f"{arguments.model}: {len(tried)} recipes tried on {searched:,} tokens of "
        f"{seen.name}; {len(runs)} measured on {text.name}, "
        f"{tokens:,} tokens, {in_windows(window, stride)}\n"
    )
    rows = [["perplexity", "to dense", "MLP non-zero", "MLP compute", "conversion"]]
    rows += [_row(run) for run in shown]
    print_table(rows, align=">>>><")
    for budget, run in found:
        print(f"\n{_goal(budget)}: ", end="")
        if run is None:
            print("nothing found; give the search more seconds or a larger budget.")
        else:
            changed = change(run.ratio, run.stderr)
            print(f"{in_words(run.spec)} ({changed}).\n  {run.spec.to_flags()}")


def _budgets(arguments: argparse.Namespace) -> list[Budget]:
    if arguments.ratio is not None:
        return [Budget(arguments.cost, None, arguments.ratio)]
    return [Budget.from_text(arguments.cost, share) for share in arguments.budget.split(",")]


def _goal(budget: Budget) -> str:
    if budget.share is not None:
        return f"At most {budget.share:.4g} of the {COSTS[budget.cost]}"
    return f"Perplexity at most × {budget.ratio:g}, least {COSTS[budget.cost]}"


def _row(run: Run) -> list[str]:
    return [
        f"{run.perplexity:,.2f}",
        change(run.ratio, run.stderr),
        signed_percent(run.mlp_nonzero_share - 1),
        signed_percent(run.mlp_macs_share - 1),
        run.spec.to_flags(),
    ]

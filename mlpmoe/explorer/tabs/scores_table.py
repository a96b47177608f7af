"""What runs reach on tasks of lm-eval, as a table; `evaluate --tasks` in the shell measures it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ...measure.notation import score_difference, scores
from ...measure.quality.tasks import TaskScore
from ..shell.records import Record
from ..shell.run_words import model_name, short_recipe

MOST_ROWS = 200  # of tasks; more runs than fill them are only counted
HEAD = (
    ("task", ' class="text"'),
    ("metric", ' class="text"'),
    ("questions", ' class="wide"'),
    ("dense", ""),
    ("converted", ""),
    ("difference", ""),
)
NOTE = (
    "Differences of shares are in points of percent; their errors come from the differences "
    "question by question. With †, both models count as independent, which makes them too large."
)


def scores_table(records: Sequence[Record]) -> str:
    """The scores of each run that has some, in the order of the runs; nothing without any."""
    scored = [record for record in records if record.run.tasks]
    if not scored:
        return ""
    several = len({record.model for record in records}) > 1
    body, rows, shown = "", 0, 0
    for record in scored:
        if shown and rows + len(record.run.tasks) > MOST_ROWS:
            break
        body += _group(record, several)
        rows, shown = rows + len(record.run.tasks), shown + 1
    left = len(scored) - shown
    more = f" {left} older run{'s' if left > 1 else ''} with tasks not shown." if left else ""
    head = "".join(f'<th scope="col"{cls}>{name}</th>' for name, cls in HEAD)
    return (
        '<div class="rows" tabindex="0" role="region" aria-label="Tasks"><table><thead><tr>'
        f'{head}</tr></thead>{body}</table></div><p class="note">{NOTE}{more}</p>'
    )


def _group(record: Record, several: bool) -> str:
    model = f" · {model_name(record.model)}" if several else ""
    title = escape(f"{short_recipe(record.run.spec)}{model}")
    rows = "".join(map(_row, record.run.tasks[:MOST_ROWS]))
    return (
        f'<tbody><tr><th colspan="{len(HEAD)}" scope="rowgroup" class="text">{title}</th></tr>'
        f"{rows}</tbody>"
    )


def _row(score: TaskScore) -> str:
    shots = "shots differ" if score.shots is None else f"{score.shots}-shot"
    mark = "" if score.paired or score.difference_stderr is None else " †"
    dense, converted = scores(score)
    return (
        f'<tr><th scope="row" class="text">{escape(score.task)}</th>'
        f'<td class="text">{escape(score.metric)}</td>'
        f'<td class="wide">{score.samples:,} × {shots}</td>'
        f"<td>{dense}</td><td>{converted}</td><td>{score_difference(score)}{mark}</td></tr>"
    )

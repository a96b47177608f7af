"""The runs as a table, and two of them side by side. Buttons carry what page.js does on a click."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import hypot, isfinite

from ...measure.notation import NBSP, change, number, signed_percent
from ..server.texts import text_name
from ..shell.records import Record
from ..shell.run_words import model_name, recipe_of, short_recipe

EMPTY = (
    '<p class="empty">No runs yet. Move a slider: whatever is measured becomes a row here, and '
    "stays in this browser.</p>"
)
NOTHING_PINNED = (
    '<p class="empty">Pin two runs with ☆ to see their figures, branches and texts side by '
    "side.</p>"
)


def runs_table(records: Sequence[Record]) -> str:
    """All runs, the newest first. A click on a recipe restores it."""
    if not records:
        return EMPTY
    several = len({record.model for record in records}) > 1
    head = "".join(
        f'<th scope="col"{cls}>{name}</th>'
        for name, cls in (
            ('<span class="hidden-label">compare</span>', ""),
            ("recipe", ' class="text"'),
            ("perplexity", ""),
            ("non-zero", ""),
            ("compute", ""),
            ("speed", ' class="wide"'),
            ("text", ' class="wide text"'),
            ("measured", ' class="wide"'),
            ('<span class="hidden-label">delete</span>', ""),
        )
    )
    body = "".join(_row(record, several) for record in records)
    return (
        f'<div class="rows" tabindex="0" role="region" aria-label="Runs"><table><thead><tr>{head}'
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(record: Record, several: bool) -> str:
    run, key = record.run, escape(record.id, quote=True)
    recipe = escape(short_recipe(run.spec))
    star, verb = ("★", "do not compare") if record.pinned else ("☆", "compare")
    model = f"<small>{escape(model_name(record.model))}</small>" if several else ""
    return (
        f"<tr{' class=pinned' if record.pinned else ''}>"
        f"<td>{_button('pin', key, star, f'{verb}: {recipe}', bool(record.pinned))}</td>"
        f'<th scope="row" class="text">'
        f'<button type="button" data-run-action="restore" data-run="{escape(record.query)}" '
        f'title="{escape(recipe_of(run.spec))}">{recipe}</button>{model}</th>'
        f"<td>{escape(change(run.ratio, run.stderr))}</td>"
        f"<td>{signed_percent(run.nonzero_share - 1)}</td>"
        f"<td>{signed_percent(run.macs_share - 1)}</td>"
        f'<td class="wide">{_speed(record)}</td>'
        f'<td class="wide text">{escape(text_name(record.text))}<small>{record.tokens:,} tokens'
        f"</small></td>"
        f'<td class="wide"><time datetime="{escape(record.when)}">{_when(record)}</time></td>'
        f"<td>{_button('remove', key, '✕', f'delete: {recipe}')}</td></tr>"
    )


def _button(action: str, run: str, face: str, label: str, pressed: bool | None = None) -> str:
    state = "" if pressed is None else f' aria-pressed="{str(pressed).lower()}"'
    return (
        f'<button type="button" data-run-action="{action}" data-run="{run}" '
        f'aria-label="{label}" title="{label}"{state}>{face}</button>'
    )


def comparison_table(pair: Sequence[Record]) -> str:
    """Two runs beside dense; the last column is the second against the first."""
    if len(pair) < 2:
        return NOTHING_PINNED
    first, second = pair
    same = (first.model, first.text, first.tokens) == (second.model, second.text, second.tokens)
    rows = [
        ("Perplexity", number(first.dense) if same else "",
         *(number(r.run.perplexity) for r in pair), _relative(first, second) if same else ""),
        ("… to dense", "", *(change(r.run.ratio, r.run.stderr) for r in pair), ""),
        ("Bits per byte", "", *(number(r.run.bits_per_byte) for r in pair), ""),
        ("Non-zero parameters", "100 %", *(_share(r.run.nonzero_share) for r in pair),
         signed_percent(second.run.nonzero_share / first.run.nonzero_share - 1) if same else ""),
        ("… in MLPs", "100 %", *(_share(r.run.mlp_nonzero_share) for r in pair),
         signed_percent(second.run.mlp_nonzero_share / first.run.mlp_nonzero_share - 1)
         if same else ""),
        ("Compute per token", "100 %", *(_share(r.run.macs_share) for r in pair),
         signed_percent(second.run.macs_share / first.run.macs_share - 1) if same else ""),
        ("Writing speed", "× 1", *map(_speed, pair), ""),
    ]  # fmt: skip
    body = "".join(
        f'<tr><th scope="row">{name}</th><td class="dense">{dense}</td>'
        f"<td>{escape(a)}</td><td>{escape(b)}</td><td>{escape(against)}</td></tr>"
        for name, dense, a, b, against in rows
    )
    names = "".join(
        f'<th scope="col">{letter}<small>{escape(short_recipe(record.run.spec))}</small></th>'
        for letter, record in zip("AB", pair, strict=True)
    )
    note = "" if same else (
        '<p class="note">A and B were measured on different models or texts, so their '
        "perplexities cannot be compared.</p>"
    )  # fmt: skip
    return (
        '<div class="rows"><table><thead><tr><td></td><th scope="col" class="dense">dense</th>'
        f'{names}<th scope="col">B against A</th></tr></thead><tbody>{body}</tbody></table></div>'
        f"{note}"
    )


def _relative(first: Record, second: Record) -> str:
    """Perplexity of the second to the first. Errors are added as if independent, which they are
    not quite: an upper bound."""
    if not isfinite(first.run.ratio) or not isfinite(second.run.ratio):
        return ""
    ratio = second.run.ratio / first.run.ratio
    error = ratio * hypot(*(r.run.stderr / r.run.ratio for r in (first, second)))
    return change(ratio, error) if isfinite(error) else ""


def _share(share: float) -> str:
    return f"{100 * share:.1f}{NBSP}%"


def _speed(record: Record) -> str:
    return "–" if record.speed is None else f"×{NBSP}{number(record.speed.median)}"


def _when(record: Record) -> str:
    return f"{escape(record.when[5:10])}{NBSP}{escape(record.when[11:16])}"

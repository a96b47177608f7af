"""The paper's tables, their counterpart for the loaded model, and what to know of both, as HTML.

Plain functions from figures to HTML; every text that is not ours is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, isfinite, log10

from ...measure.cost.parameters import ParameterReport
from ...measure.cost.speed import Ratio
from ...measure.notation import NBSP, NO_CHANGE, NOISY, number
from ...measure.quality.estimate import Evaluation
from ...measure.runs.paper import (
    ASKED,
    BRANCHES,
    DENSE,
    SOURCE,
    STRENGTH,
    TABLES,
    WRITTEN,
    PublishedRow,
    PublishedTable,
    ReproducedRow,
    ZeroShares,
)

PENDING = "<td>…</td>"  # what is not known yet


@dataclass(frozen=True)
class ModelFigures:
    """What the rows of a model stand beside."""

    label: str
    dtype: str
    device: str
    report: ParameterReport  # of the dense model
    faded_weights: int  # in the matrices that fade works on
    texts: tuple[str, ...]  # as the page names them, the proxy text first
    perplexities: tuple[Evaluation | None, ...]  # of the dense model with itself, on each
    published: PublishedTable | None  # of this very model

    @property
    def asked(self) -> ZeroShares:
        """The zeros that fade is asked for."""
        return self.shares(ASKED * self.faded_weights)

    def shares(self, zeros: float) -> ZeroShares:
        return ZeroShares.of(zeros, self.faded_weights, self.report.mlp_total, self.report.total)

    def added_zeros(self, row: ReproducedRow) -> int:
        """Zeros of a conversion that the dense model has not; α are none."""
        return (row.report.total - row.report.nonzero) - (self.report.total - self.report.nonzero)


# the paper's


def published_tables() -> str:
    """Both, one below the other in the same columns."""
    names = ("parameters", "non-zero", "proxy perplexity", "generation time")
    body = "".join(map(_published_body, TABLES))
    return _sheet(SOURCE, names, body)


def _published_body(table: PublishedTable) -> str:
    dense, rows = table.dense, ""
    for row in table.rows:
        figures = [
            f"{row.total:,}", f"{row.nonzero:,}", f"{row.perplexity:.4f}", f"{row.seconds:.3f} s",
        ]  # fmt: skip
        below = [""] * 4
        if row.variant != DENSE:
            below = [
                _alphas(row.total - dense.total),
                _times(row.nonzero / dense.nonzero, 4),
                _times(row.perplexity / dense.perplexity, 4),
                _times(row.seconds / dense.seconds, 2),
            ]
        rows += _row(row.variant, *map(_cell, figures, below))
    title = f"Table {table.number}: {table.model}"
    return f'<tbody><tr><th colspan="5" scope="rowgroup">{title}</th></tr>{rows}</tbody>'


def published_notes() -> str:
    """What the tables do not say themselves."""
    small, large = (table.zeros for table in TABLES)
    slower = [row.seconds / table.dense.seconds for table in TABLES for row in table.rows[1:]]
    apart = [abs(table.rows[2].seconds / table.rows[1].seconds - 1) for table in TABLES]
    return (
        "<ul><li><strong>“About 20 %” is of all parameters,</strong> where the abstract says of "
        f"the MLPs'. Branch i loses the smallest {STRENGTH}·i/{BRANCHES} of gate and up, in the "
        f"mean {_percent(ASKED)}; these are two thirds of an MLP, so {_percent(ASKED * 2 / 3)} of "
        f"its weights. Zeroed are {_percent(small.mlps, 2)} and {_percent(large.mlps, 2)}, since "
        "weights equal to a threshold go as well, of which bfloat16 has many. Of all parameters "
        f"these are {_percent(small.whole)} and {_percent(large.whole)}.</li>"
        "<li><strong>Proxy perplexity is a health check.</strong> A value near 1.08 means that "
        "the model knows the artificial text almost by heart: it shows whether a model broke, not "
        "how well it models language.</li>"
        f"<li><strong>Generation got slower, {_times(min(slower), 2)} to {max(slower):.2f},"
        "</strong> as branches run in a loop and zeros in place save nothing. The lower two rows "
        "of a table run the same matrix products, so what their times differ by "
        f"({_percent(min(apart), 0)} and {_percent(max(apart), 0)}) is an error of timing.</li>"
        "</ul>"
    )


# the loaded model's


def reproduced_table(model: ModelFigures, rows: Sequence[ReproducedRow]) -> str:
    """The same rows for a model; what is not known yet is "…"."""
    names = (
        "parameters", "non-zero", *(f"perplexity, {escape(name)}" for name in model.texts),
        f"time, loop over {BRANCHES}", "time, fused",
    )  # fmt: skip
    body = _dense_row(model, rows) + "".join(_reproduced_row(model, row) for row in rows)
    caption = f"{model.label}, {model.dtype} on {model.device}"
    return _sheet(caption, names, f"<tbody>{body}</tbody>")


def _dense_row(model: ModelFigures, rows: Sequence[ReproducedRow]) -> str:
    theirs = model.published and model.published.dense
    proxy, *others = model.perplexities
    time = next((row.time for row in rows if row.time), None)
    shown, of_paper = "…", ""
    if time:
        shown = f"{1000 * time.dense / WRITTEN:,.1f}{NBSP}ms a token"
        of_paper = f"paper {theirs.seconds:.3f} s, length not stated" if theirs else ""
    return _row(
        DENSE,
        *_counts(model.report, theirs),
        _dense_perplexity(proxy, theirs and theirs.perplexity),
        *map(_dense_perplexity, others),
        _cell(shown, of_paper, span=2),
    )


def _reproduced_row(model: ModelFigures, row: ReproducedRow) -> str:
    theirs = model.published and model.published.row(row.variant)
    dense = model.published and model.published.dense
    counts, loop, fused = [PENDING] * 2, PENDING, PENDING
    if row.report:
        alphas = _alphas(row.report.total - model.report.total)
        share = _times(row.report.nonzero / model.report.nonzero, 4)
        counts = _counts(row.report, theirs, alphas, share)
    if row.time:
        loop = _time(row.time.loop, theirs and theirs.seconds / dense.seconds)
        fused = _time(row.time.fused)
    proxy, *others = row.perplexities
    proxy_cell = _change(proxy, theirs and theirs.perplexity / dense.perplexity)
    return _row(row.variant, *counts, proxy_cell, *map(_change, others), loop, fused)


def _counts(report: ParameterReport, theirs: PublishedRow | None, *below: str) -> tuple[str, str]:
    """Cells of all and of non-zero parameters."""
    total, nonzero = below or ("", "")
    return (
        _cell(f"{report.total:,}", total, _of_paper(report.total, theirs and theirs.total, ",")),
        _cell(
            f"{report.nonzero:,}", nonzero,
            _of_paper(report.nonzero, theirs and theirs.nonzero, ","),
        ),
    )  # fmt: skip


def _dense_perplexity(known: Evaluation | None, theirs: float | None = None) -> str:
    if known is None:
        return PENDING
    value, error = known.dense.value, _value(known.dense.stderr)
    return _cell(_value(value), f"±{NBSP}{error}", _so_far(known), _of_paper(value, theirs, ".4f"))


def _change(known: Evaluation | None, theirs: float | None = None) -> str:
    """Perplexity and its ratio to dense. theirs: the published ratio."""
    if known is None:
        return PENDING
    change = known.change
    ratio = f"×{NBSP}{number(change.ratio)}"
    if isfinite(change.ratio) and change.ratio < 1e5:
        digits = _digits(change.ratio)
        ratio = f"{_times(change.ratio, digits)} ±{NBSP}{change.stderr:,.{digits}f}"
    return _cell(
        _value(known.converted.value),
        ratio,
        "" if change.measurable else NO_CHANGE,
        _so_far(known),
        _of_paper(change.ratio, theirs, ".4f", "×"),
    )


def _so_far(evaluation: Evaluation) -> str:
    if evaluation.complete:
        return ""
    return f"{evaluation.dense.tokens:,} of {evaluation.total:,} tokens"


def _time(measured: Ratio, theirs: float | None = None) -> str:
    """A ratio of times with its quartiles. theirs: the published ratio."""
    said = ""
    if measured.high > NOISY * measured.low:
        said = "too noisy to tell"
    elif not measured.measurable:
        said = NO_CHANGE
    return _cell(
        _times(measured.median, 2),
        f"{measured.low:.2f} to{NBSP}{measured.high:.2f}",
        said,
        _of_paper(measured.median, theirs, ".2f", "×"),
    )


def reproduced_notes(model: ModelFigures, rows: Sequence[ReproducedRow]) -> str:
    """What of it can be compared with the paper, and where the zeros are."""
    if model.published:
        compared = (
            f"This is the model of table {model.published.number}: below each figure stands the "
            "paper's, with ours minus the paper's in brackets. Parameters can agree to the last "
            "digit. The proxy text is ours, as the paper's is not published, and the machine is "
            "another: of perplexity and time only ratios to dense can be held against the "
            "paper's, and only roughly."
        )
    else:
        compared = (
            "This is not one of the paper's two models: no figure can be held against the "
            "paper's, only shares of zeros and, roughly, the ratio of time in the loop. The "
            "proxy text is ours, as the paper's is not published, so not even ratios of proxy "
            "perplexity compare."
        )
    asked, faded = model.asked, rows[-1]
    where = (
        f"Fade is asked for {_percent(ASKED)} of the matrices it works on. They hold "
        f"{_percent(model.faded_weights / model.report.mlp_total)} of this model's MLP weights, "
        f"and its MLPs {_percent(model.report.mlp_total / model.report.total)} of all parameters: "
        f"so {_percent(asked.mlps)} of the MLPs and {_percent(asked.whole)} of the whole."
    )
    if faded.report:
        zeros = model.added_zeros(faded)
        found = model.shares(zeros)
        where += (
            f" It adds {zeros:,} zeros, {_percent(found.faded, 2)} of these matrices, "
            f"{_percent(found.mlps, 2)} of the MLPs and {_percent(found.whole, 2)} of the whole."
        )
        if found.faded > ASKED:
            where += " What goes beyond is weights equal to a threshold."
    if there := model.report.total - model.report.nonzero:
        where += f" {there:,} parameters of the dense model are zero already."
    tokens = " and ".join(f"{e.total:,}" for e in model.perplexities if e)
    how = (
        f"Perplexity ± standard error{f', on {tokens} tokens' if tokens else ''}. Time: {WRITTEN} "
        "tokens written one by one, as a ratio to dense in the same rounds, with quartiles. Zeros "
        "in place do not change it. The loop is timed here only, and by <code>python -m mlpmoe "
        "bench</code> at the shape of the paper's small model."
    )
    return f"<ul><li>{compared}</li><li>{where}</li><li>{how}</li></ul>"


# HTML


def _sheet(caption: str, names: Sequence[str], bodies: str) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        f'<div class="sheet" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr><td></td>{head}</tr></thead>{bodies}"
        "</table></div>"
    )


def _row(variant: str, *cells: str) -> str:
    kind = "dense" if variant == DENSE else "converted"
    return f'<tr><th scope="row" class="{kind}">{variant}</th>{"".join(cells)}</tr>'


def _cell(figure: str, *below: str, span: int = 1) -> str:
    small = "".join(f"<small>{text}</small>" for text in below if text)
    columns = f' colspan="{span}"' if span > 1 else ""
    return f"<td{columns}>{figure}{small}</td>"


def _of_paper(ours: float, theirs: float | None, form: str, sign: str = "") -> str:
    """A published figure and, in brackets, ours minus the published one; nothing without one."""
    if theirs is None:
        return ""
    difference = f"{ours - theirs:+{form}}".replace("-", "−") if ours != theirs else "±0"
    return f"paper {sign}{NBSP if sign else ''}{theirs:{form}} ({difference})"


def _alphas(count: int) -> str:
    return f"+{count:,} α"


def _times(ratio: float, digits: int) -> str:
    return f"×{NBSP}{ratio:,.{digits}f}"


def _value(perplexity: float) -> str:
    """With the digits of the paper where it is as small as in the paper."""
    return f"{perplexity:.4f}" if perplexity < 10 else number(perplexity, 4)


def _digits(ratio: float) -> int:
    """Decimals of a ratio: the paper's four below a doubling, three digits above."""
    return 4 if ratio < 2 else max(0, 2 - floor(log10(ratio)))


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}{NBSP}%"

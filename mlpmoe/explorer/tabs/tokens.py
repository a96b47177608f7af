"""What happens on the tab Tokens: where the text breaks, and where in the model that starts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr
import torch

from ...core.spec import ConversionSpec
from ...measure.notation import number
from ...measure.quality.correlations import BranchStatistics, branch_statistics
from ...measure.quality.drift import drift
from ...measure.quality.estimate import Evaluation
from ...measure.quality.tokens import Sentence, TokenChange, sentences, token_changes, worst
from ..plots.token_plots import correlations_plot, drift_plot, norms_plot
from ..server.asked import Conversion, spec_of
from ..server.loaded import LoadedModel
from ..server.workbench import Workbench
from ..shell.settings import parted, read_asked
from ..shell.tint import Tint, nats
from .tokens_panel import EMPTY

WORST = 10  # sentences
SHOWN_TOKENS = 4000  # of the text
DRIFT_TOKENS = 384  # of its first document
SHOWN = 7  # outputs of `show`


class TokenHandlers:
    """The events of the tab over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench

    def show(self, model: str, *values: Any) -> tuple:
        """Worst sentences, text, drift, and what `branches` gives."""
        settings, (text, layer) = parted(values)
        loaded = self.workbench.loaded(model)
        asked = read_asked(loaded, settings)
        measured = loaded.known_evaluation(asked, text)
        if measured is None or not loaded.is_converted(asked):
            return EMPTY, "", *(gr.skip(),) * (SHOWN - 2)
        encoded = loaded.text(text)
        changes = token_changes(
            measured.dense, measured.converted, encoded, measured.parts, loaded.tokenizer
        )
        tint = Tint.of(changes)
        ids = encoded.documents[0][:DRIFT_TOKENS]
        return (
            worst_html(worst(sentences(changes), WORST), measured.dense.tokens, tint),
            so_far(measured) + text_html(changes, tint),
            drift_plot(_drift(loaded, asked, ids)),
            *_branches(loaded, asked, ids, layer),
        )

    def branches(self, model: str, *values: Any) -> tuple:
        """What `_branches` gives."""
        settings, (text, layer) = parted(values)
        loaded = self.workbench.loaded(model)
        asked = read_asked(loaded, settings)
        if not loaded.has_text(text) or not loaded.is_converted(asked):
            return (gr.skip(),) * 4
        return _branches(loaded, asked, loaded.text(text).documents[0][:DRIFT_TOKENS], layer)

    def another_model(self, model: str) -> dict:
        layers = len(self.workbench.loaded(model).mlps)
        return gr.update(maximum=max(1, layers - 1), value=0)


def _drift(loaded: LoadedModel, asked: Conversion, ids: torch.Tensor) -> Any:
    converted = loaded.converted(asked)
    with loaded.turns.turn(long=True):
        return drift(loaded.model, converted, ids)


def _branches(
    loaded: LoadedModel, asked: Conversion, ids: torch.Tensor, layer: int
) -> tuple[Any, ...]:
    """Whether there are branches, then figures, norms and correlations of those of one layer."""
    if spec_of(asked).routed:
        return gr.update(visible=False), *(gr.skip(),) * 3
    whole = loaded.converted(loaded.structure.whole(asked))
    spec = spec_of(asked)
    with loaded.turns.turn(long=True):
        found = branch_statistics(whole, min(layer, len(loaded.mlps) - 1), ids, spec.kept)
    return (
        gr.update(visible=True), branches_html(found, spec), norms_plot(found),
        correlations_plot(found),
    )  # fmt: skip


def worst_html(found: Sequence[Sentence], tokens: int, tint: Tint) -> str:
    """The worst sentences as a list, each with the change of its loss."""
    if not found or found[0].mean <= 0:  # undefined, of a broken model, is neither
        return (
            f'<p class="empty">No sentence became harder: over {tokens:,} tokens the loss has not '
            "grown anywhere.</p>"
        )
    rows = "".join(
        f"<li><b>{nats(sentence.mean)}</b>"
        f'<span class="loss">{tint.spans(_trimmed(sentence.tokens))}</span></li>'
        for sentence in found
        if not sentence.mean <= 0
    )
    return f"{tint.legend()}<ol>{rows}</ol>"


def so_far(measured: Evaluation) -> str:
    """That only a part is coloured, where the measurement has not come to the end."""
    if measured.complete:
        return ""
    return (
        f'<p class="note">{measured.dense.tokens:,} of {measured.total:,} tokens are measured; the '
        "others have no colour. Measure goes on to the end.</p>"
    )


def text_html(changes: Sequence[TokenChange], tint: Tint) -> str:
    """The text from its beginning, document by document."""
    shown = changes[:SHOWN_TOKENS]
    documents: dict[int, list[TokenChange]] = {}
    for token in shown:
        documents.setdefault(token.document, []).append(token)
    body = "".join(f'<p class="loss">{tint.spans(some)}</p>' for some in documents.values())
    rest = len(changes) - len(shown)
    more = f'<p class="note">{rest:,} more tokens are not shown.</p>' if rest else ""
    return f"{tint.legend()}{body}{more}"


def branches_html(found: BranchStatistics, spec: ConversionSpec) -> str:
    """What √(B/K) assumes beside what was measured, and the α that would have been right."""
    count = len(found.norms)
    assumed = (count / found.kept) ** 0.5
    mean = 100 * float((found.mean_share * found.norms.square()).sum() / found.norms.square().sum())
    rows = [
        ("correlation between branches, mean", "0", f"{found.mean_correlation:+.3f}"),
        ("share of the outputs that is their mean", "0 %", f"{mean:.1f} %"),
        (f"size of the first {found.kept} of {count}, whole = 1", number(1 / assumed),
         number(found.size)),
        ("α that restores the size", f"{assumed:.3f}", f"{found.alpha_size:.3f}"),
        ("α of least error", "", f"{found.alpha_fit:.3f}"),
    ]  # fmt: skip
    body = "".join(
        f'<tr><th scope="row">{name}</th><td>{before}</td><td class="converted">{after}</td></tr>'
        for name, before, after in rows
    )
    hint = " All branches are kept now: lower K to compare." if found.kept == count else ""
    order = "" if spec.order == "contiguous" else f", in the order {escape(spec.order)}"
    return (
        '<table><thead><tr><td></td><th scope="col">√(B/K) assumes</th>'
        f'<th scope="col">measured</th></tr></thead><tbody>{body}</tbody></table>'
        f'<p class="note">{found.tokens} tokens of the text, dense weights{order}.{hint}</p>'
    )


def _trimmed(tokens: Sequence[TokenChange]) -> list[TokenChange]:
    """Without the line breaks at the ends, which would break the list."""
    return [token for token in tokens if token.text.strip("\n")]

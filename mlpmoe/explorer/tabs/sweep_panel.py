"""The part of the trade-offs that measures many settings at once: its components and events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import gradio as gr

from ...core.choices import ALLOCATIONS, METHODS, SELECTIONS, unit_choices
from ...core.registry import choices
from ...core.routed.routers import ROUTERS
from ...core.static.compensation import COMPENSATIONS, FILLS
from ...core.static.order import ORDERS
from ...core.static.schedule import SCHEDULES
from ...core.static.scores import SCORES
from ..server.events import IN_TURNS, QUIET, readable

if TYPE_CHECKING:
    from .sweeping import SweepHandlers

# field of the spec -> label, first value, what to write; in the order of the stages
WRITTEN = {
    "branches": ("B", "8, 16, 32", "such as 8, 16 or 4:32:4"),
    "fade": ("Fade", "0", "such as 0, 0.5 or 0:0.9:0.3"),
    "keep": ("K", "all, 75%, 50%", "all, a number, or a share of B"),
}
# field of the spec -> label, what gives labels and names, first values
CHOSEN = {
    "order": ("Order", partial(choices, ORDERS), ["contiguous"]),
    "fade_projections": (
        "Fade: matrices",
        lambda: ["gate-up", "gate-up-down", "up-down", "gate-down", "gate", "up", "down"],
        ["gate-up"],
    ),
    "fade_schedule": (
        "Fade: schedule",
        # there is no field for an exponent
        lambda: choices({n: s for n, s in SCHEDULES.items() if s.exponent is None}),
        ["linear"],
    ),
    "fade_score": ("Fade: score", partial(choices, SCORES), ["magnitude"]),
    "fade_unit": ("Fade: unit", unit_choices, ["weight"]),
    "allocation": ("Allocation", partial(choices, ALLOCATIONS), ["uniform"]),
    "progressive": ("Layer by layer", lambda: [("no", "false"), ("yes", "true")], ["false"]),
    "compensation": ("Compensation", partial(choices, COMPENSATIONS), ["sqrt"]),
}
STATIC = (*WRITTEN, *CHOSEN)
# the same of routed methods; what is left empty is the method's own choice
ROUTED_WRITTEN = {
    "active": ("Active share", "0.75, 0.5", "such as 0.75 or 0.5:0.9:0.1"),
    "experts": ("Experts", "", "empty: the method’s own"),
    "shared": ("Shared share", "", "empty: the method’s own"),
}
ROUTED_CHOSEN = {
    "router": ("Router", partial(choices, ROUTERS), []),
    "selection": ("Selection", partial(choices, SELECTIONS), ["topk"]),
    "compensation": ("Output of the others", partial(choices, FILLS), ["none"]),
}
ROUTED = (*ROUTED_WRITTEN, *ROUTED_CHOSEN)


@dataclass(frozen=True)
class SweepPanel:
    values: tuple[gr.Textbox | gr.Dropdown, ...]  # methods, then as in STATIC and ROUTED
    plan: gr.HTML
    start: gr.Button
    stop: gr.Button
    status: gr.HTML
    snippet: gr.Code


def sweep_panel() -> SweepPanel:
    with gr.Accordion("Sweep: measure many settings at once", open=False, elem_id="sweep"):
        gr.Markdown(
            "Every combination of the values below is measured on the chosen text and appears in "
            "plot and table as it comes. What is there already is not measured again, so a "
            "stopped sweep goes on where it was."
        )
        methods = _chosen("method", "Method", partial(choices, METHODS), ["mlpmoe"])
        gr.Markdown("Static branches (MLPMoE)")
        static = _fields(WRITTEN, CHOSEN, "sweep")
        gr.Markdown("Routed methods, if some are chosen")
        routed = _fields(ROUTED_WRITTEN, ROUTED_CHOSEN, "sweep-routed")
        plan = gr.HTML("", elem_id="sweep-plan")
        with gr.Row():
            start = gr.Button("Sweep", variant="primary", min_width=120, elem_id="start-sweep")
            stop = gr.Button("Stop", min_width=80, elem_id="stop-sweep")
        status = gr.HTML("", elem_id="sweep-status")
        with gr.Accordion("The same in the shell", open=False):
            snippet = gr.Code(
                language="shell", show_label=False, buttons=["copy"], interactive=False, lines=4,
                wrap_lines=True, show_line_numbers=False, elem_id="sweep-snippet",
            )  # fmt: skip
    return SweepPanel((methods, *static, *routed), plan, start, stop, status, snippet)


def _fields(written: dict, chosen: dict, prefix: str) -> list[gr.Textbox | gr.Dropdown]:
    with gr.Row():
        made = [
            gr.Textbox(
                value, label=label, info=info, max_lines=1, max_length=200, min_width=150,
                elem_id=f"{prefix}-{name}",
            )
            for name, (label, value, info) in written.items()
        ]  # fmt: skip
    with gr.Accordion("Other stages", open=False), gr.Row():
        made += [_chosen(name, *entry, prefix=prefix) for name, entry in chosen.items()]
    return made


def _chosen(
    name: str, label: str, found: Callable[[], list], value: list, prefix: str = "sweep"
) -> gr.Dropdown:
    return gr.Dropdown(
        found(), value=value, multiselect=True, label=label, min_width=260,
        elem_id=f"{prefix}-{name.replace('_', '-')}",
    )  # fmt: skip


def wire_sweep(
    handlers: SweepHandlers, model: gr.State, text: gr.Dropdown, stored: gr.Textbox,
    measured: gr.Textbox, panel: SweepPanel, told: gr.Textbox,
) -> None:  # fmt: skip
    """The plan follows the values; the sweep itself is started and stopped by its buttons. told:
    changes with the model, the text and what is stored, while the tab is open."""
    inputs = [model, text, stored, *panel.values]
    gr.on(
        [c.change for c in (told, *panel.values)],
        readable(handlers.plan), inputs, [panel.plan, panel.snippet],
        trigger_mode="always_last", concurrency_limit=1, **QUIET,
    )  # fmt: skip
    panel.start.click(
        readable(handlers.sweep), inputs, [panel.status, measured], trigger_mode="once",
        **IN_TURNS, **QUIET,
    )  # fmt: skip
    panel.stop.click(readable(handlers.jobs.press_stop), None, panel.status, **QUIET)

"""The controls of a conversion: the first minute's, and under "More" the others, in the order in
which the stages run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import gradio as gr

from ...core.choices import ALLOCATIONS, METHODS, SELECTIONS, unit_choices
from ...core.presets import PRESETS
from ...core.recovery.kinds import NOTHING, RECOVERIES
from ...core.registry import choices
from ...core.routed import ROUTED_METHODS
from ...core.routed.routers import ROUTERS
from ...core.spec import MAX_FADE, PROJECTIONS, ConversionSpec
from ...core.static.compensation import COMPENSATIONS, FILLS
from ...core.static.order import ORDERS
from ...core.static.schedule import DEFAULT_EXPONENT, SCHEDULES
from ...core.static.scores import SCORES
from ...models import default_calibration, default_text
from ...models.catalogue import DEMO_KEY
from ...models.texts import MAX_OWN_TEXT
from ..server.texts import calibration_choices, text_choices
from .inputs import LimitedSlider, OpenDropdown, OpenSlider
from .settings import (
    ACTIVE_STEP,
    CONTROLS,
    EXPONENTS,
    LEAST_ACTIVE,
    MAX_BRANCHES,
    MAX_EXPERTS,
    MOST_STEPS,
    OWN,
    USUAL_EXPERTS,
    USUAL_SHARED,
)

CUSTOM = "custom"
AWAY = "away"  # the class of what is not seen, but stays in the page with its values


@dataclass(frozen=True)
class ConvertPanel:
    method: gr.Dropdown
    preset: gr.Dropdown
    branches: gr.Slider
    fade: gr.Slider
    keep: gr.Slider
    experts: gr.Slider
    active: gr.Slider
    shared: gr.Slider
    own_share: gr.Checkbox
    budget: gr.Slider
    measure: gr.Button
    stop: gr.Button
    order: gr.Dropdown
    fade_unit: gr.Dropdown
    fade_projections: gr.CheckboxGroup
    fade_schedule: gr.Dropdown
    fade_exponent: gr.Slider
    fade_score: gr.Dropdown
    allocation: gr.Radio
    compensation: gr.Dropdown
    router: gr.Dropdown
    selection: gr.Radio
    fill: gr.Radio
    progressive: gr.Checkbox
    spared: gr.Textbox
    recover: gr.Dropdown
    recover_steps: gr.Slider
    training_note: gr.HTML
    calibration: gr.Dropdown
    text: gr.Dropdown
    own_text: gr.Textbox
    use_text: gr.Button
    use_calibration: gr.Button
    own_file: gr.File
    link: gr.Textbox
    snippet: gr.Code
    static: tuple[gr.Column, ...]  # what static methods use
    routed: tuple[gr.Column, ...]

    @property
    def settings(self) -> list:
        """The inputs that make the conversion, see `settings.SETTINGS`."""
        return [*(getattr(self, name) for name in CONTROLS), self.calibration]


def convert_panel() -> ConvertPanel:
    """The controls in one column; those of static and of routed methods stand in the same place."""
    made: dict[str, object] = {}
    made["method"] = gr.Dropdown(
        choices(METHODS), value="mlpmoe", label="Method", info=METHODS["mlpmoe"].about,
        filterable=False, elem_id="method",
    )  # fmt: skip
    made["preset"] = gr.Dropdown(
        [*PRESETS, CUSTOM], label="Preset", filterable=False, elem_id="preset"
    )
    static, routed = [], []
    with gr.Column(elem_classes=["sliders"]) as column:
        made |= _static_sliders()
    static.append(column)
    with gr.Column(elem_classes=["sliders", AWAY]) as column:
        made |= _routed_sliders()
    routed.append(column)
    made["budget"] = LimitedSlider(
        5, 100, 100, step=1, precision=0, label="MLP compute, % of dense", elem_id="budget",
        info="a budget: moves the sliders above, and they move it",
    )  # fmt: skip
    with gr.Row():
        made["measure"] = gr.Button("Measure", variant="primary", min_width=100, elem_id="measure")
        made["stop"] = gr.Button("Stop", min_width=80, elem_id="stop-measuring")
    with gr.Accordion("More: every stage, in order", open=False, elem_id="more"):
        with gr.Column(elem_classes=["stages"]) as column:
            made |= _static_stages()
        static.append(column)
        with gr.Column(elem_classes=["stages", AWAY]) as column:
            made |= _routed_stages()
        routed.append(column)
        made |= _common_stages()
        made |= _training()
    made |= _texts()
    made |= _sharing()
    return ConvertPanel(**made, static=tuple(static), routed=tuple(routed))


def router_choices(allowed: Collection[str] | None = None) -> list[tuple[str, str]]:
    """Labels and names of these routers, or of all; first the one that the method has by itself."""
    named = {n: router for n, router in ROUTERS.items() if allowed is None or n in allowed}
    return [("the method's own", OWN), *choices(named)]


def show_method(method: str, anew: bool = False) -> tuple:
    """What is said of the method; whether the columns of static and of routed methods are seen;
    which choices, sliders and routers it has. anew: with its authors' settings."""
    routed, about = ROUTED_METHODS.get(method), METHODS[method].about if method in METHODS else ""
    seen = {True: True, False: "hidden"}
    columns = [
        gr.update(elem_classes=[name, *([] if here else [AWAY])])
        for here in (routed is None, routed is not None)
        for name in ("sliders", "stages")
    ]
    if routed is None:
        return gr.update(info=about), *columns, *(gr.skip(),) * 5
    selects, visible, shares = (
        seen[name in routed.fields] for name in ("selection", "experts", "shared")
    )
    experts = routed.defaults.get("experts", USUAL_EXPERTS)
    return (
        gr.update(info=about), *columns, gr.update(visible=selects),
        gr.update(visible=visible, **({"value": experts} if anew else {})),
        gr.update(visible=shares),
        gr.update(visible=shares, **({"value": True} if anew else {})),
        gr.update(choices=router_choices(routed.routers), **({"value": OWN} if anew else {})),
    )  # fmt: skip


def _static_sliders() -> dict[str, object]:
    return {
        "branches": OpenSlider(
            1, MAX_BRANCHES, 16, step=1, precision=0, label="B, branches", elem_id="branches",
            info="parts each MLP is cut into",
        ),
        "fade": OpenSlider(
            0, MAX_FADE, 0, step=0.05, label="Fade", elem_id="fade",
            info="zeroes small weights, more in later branches",
        ),
        "keep": OpenSlider(
            1, 16, 16, step=1, precision=0, label="K, branches kept", elem_id="keep",
            info="the others are dropped",
        ),
    }  # fmt: skip


def _routed_sliders() -> dict[str, object]:
    return {
        "experts": LimitedSlider(
            2, MAX_EXPERTS, USUAL_EXPERTS, step=1, precision=0, label="Experts per MLP",
            elem_id="experts", info="of equal size; fewer where d_ff forbids it",
        ),
        "active": LimitedSlider(
            LEAST_ACTIVE, 1, 0.75, step=ACTIVE_STEP, label="Active share", elem_id="active",
            info="of the neurons, inputs or multiply-adds, for each token",
        ),
        "shared": LimitedSlider(
            0, 0.95, USUAL_SHARED, step=0.05, label="Shared share", elem_id="shared",
            info="of the neurons, which run for every token", interactive=False,
        ),
        "own_share": gr.Checkbox(
            True, label="Share as much as the method does by itself", elem_id="own-share",
        ),
    }  # fmt: skip


def _static_stages() -> dict[str, object]:
    return {
        "order": gr.Dropdown(
            choices(ORDERS), value="contiguous", label="1 · Order of the neurons",
            info="decides which are in the first branches, and so which K keeps",
            filterable=False, elem_id="order",
        ),
        "fade_unit": gr.Dropdown(
            unit_choices(), value="weight", label="2 · Fade: what is removed",
            info="whole neurons save compute; “of every” fixes the share, without Fade",
            allow_custom_value=True, elem_id="fade-unit",
        ),
        "fade_projections": gr.CheckboxGroup(
            list(PROJECTIONS), value=["gate", "up"], label="Fade: from which matrices",
            info="whole neurons go from all three", elem_id="fade-projections",
        ),
        "fade_schedule": gr.Dropdown(
            choices(SCHEDULES), value="linear",
            label="Fade: how branches share the zeros",
            info="all schedules ask for the same number in all",
            filterable=False, elem_id="fade-schedule",
        ),
        "fade_exponent": LimitedSlider(
            *EXPONENTS, DEFAULT_EXPONENT, step=0.25, label="Fade: power", visible=False,
            info="1 is equal steps; more: the last branches lose most", elem_id="fade-exponent",
        ),
        "fade_score": gr.Dropdown(
            choices(SCORES), value="magnitude", label="Fade: which weights go first",
            info="SparseGPT also changes those that stay", filterable=False, elem_id="fade-score",
        ),
        "allocation": gr.Radio(
            choices(ALLOCATIONS), value="uniform", label="3 · K (or Fade) per layer",
            info="the mean over the layers stays", elem_id="allocation",
        ),
        "compensation": gr.Dropdown(
            choices(COMPENSATIONS), value="sqrt", label="4 · Compensation",
            info="how what stays makes up for what is lost",
            filterable=False, elem_id="compensation",
        ),
    }  # fmt: skip


def _routed_stages() -> dict[str, object]:
    return {
        "router": OpenDropdown(
            router_choices(), value=OWN, label="Router", filterable=False, elem_id="router",
            info="what scores experts, neurons, inputs or directions",
        ),
        "selection": gr.Radio(
            choices(SELECTIONS), value="topk", label="Which experts run", elem_id="selection",
        ),
        "fill": gr.Radio(
            choices(FILLS), value="none", label="What stands in for the others", elem_id="fill",
        ),
    }  # fmt: skip


def _common_stages() -> dict[str, object]:
    return {
        "progressive": gr.Checkbox(
            False, label="Layer by layer *", elem_id="progressive",
            info="what looks at the text sees each layer on the converted ones before it",
        ),
        "spared": gr.Textbox(
            "", label="Layers kept dense", placeholder="such as 0, 11", max_lines=1,
            max_length=400, elem_id="spared",
            info="numbers, from 0; or spare a layer in the picture of the network",
        ),
        "calibration": OpenDropdown(
            calibration_choices(), value=default_calibration(DEMO_KEY), label="Calibration text *",
            info="what choices with a * look at; the same kind of text as is measured on is best",
            filterable=False, elem_id="calibration-text",
        ),
    }  # fmt: skip


def _training() -> dict[str, object]:
    with gr.Accordion("Train a little", open=False, elem_id="training"):
        recover = gr.Dropdown(
            choices(RECOVERIES), value=NOTHING, label="What is trained", filterable=False,
            elem_id="recover",
            info="to predict on the calibration text what the dense model predicts",
        )  # fmt: skip
        steps = LimitedSlider(
            1, MOST_STEPS, ConversionSpec().recover_steps, step=1, precision=0, label="Steps",
            elem_id="recover-steps", info="of 512 tokens each",
        )  # fmt: skip
        note = gr.HTML("", elem_id="training-note")
    return {"recover": recover, "recover_steps": steps, "training_note": note}


def _texts() -> dict[str, object]:
    with gr.Accordion("Evaluation text", open=False, elem_id="text-choice"):
        text = OpenDropdown(
            text_choices(), value=default_text(DEMO_KEY), label="Text", filterable=False,
            elem_id="text", info="WikiText-2 and C4 need a network once, and patience",
        )  # fmt: skip
        own_text = gr.Textbox(
            label="Own text", lines=3, max_lines=8, max_length=MAX_OWN_TEXT, elem_id="own-text",
            info="a few hundred tokens at least, or the error hides every effect; stays in this "
            "server's memory, and whoever has the link can use it",
        )  # fmt: skip
        with gr.Row():
            use_text = gr.Button("Measure on it", size="sm", min_width=100, elem_id="use-own-text")
            use_calibration = gr.Button(
                "Calibrate on it", size="sm", min_width=100, elem_id="calibrate-on-own-text"
            )
        own_file = gr.File(
            label="… or a text file, UTF-8", file_types=[".txt", ".md"], height=120,
            elem_id="own-file",
        )  # fmt: skip
    return {
        "text": text, "own_text": own_text, "use_text": use_text,
        "use_calibration": use_calibration, "own_file": own_file,
    }  # fmt: skip


def _sharing() -> dict[str, object]:
    with gr.Accordion("Share and reproduce", open=False, elem_id="share"):
        link = gr.Textbox(
            label="Link to these settings", interactive=False, buttons=["copy"], elem_id="link",
            lines=1, max_lines=3, info="model, settings, text and tab",
        )  # fmt: skip
        snippet = gr.Code(
            language="python", label="The same in Python and in the shell", buttons=["copy"],
            elem_id="snippet",
            interactive=False, lines=6, wrap_lines=True, show_line_numbers=False,
        )  # fmt: skip
    return {"link": link, "snippet": snippet}

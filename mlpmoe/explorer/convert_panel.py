"""The controls of a static conversion: the first minute's, and under "More" the others, in the
order in which the stages run."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from ..core.choices import ALLOCATIONS, unit_choices
from ..core.compensation import COMPENSATIONS
from ..core.order import ORDERS
from ..core.presets import PRESETS
from ..core.registry import choices
from ..core.schedule import DEFAULT_EXPONENT, SCHEDULES
from ..core.scores import SCORES
from ..core.spec import MAX_FADE, PROJECTIONS
from ..models import default_calibration, default_text
from ..models.catalogue import DEMO_KEY
from ..models.texts import MAX_OWN_TEXT
from .settings import CONTROLS, EXPONENTS, MAX_BRANCHES
from .sliders import LimitedSlider, OpenSlider
from .texts import calibration_choices, text_choices

CUSTOM = "custom"


@dataclass(frozen=True)
class ConvertPanel:
    preset: gr.Dropdown
    branches: gr.Slider
    fade: gr.Slider
    keep: gr.Slider
    compensation: gr.Dropdown
    order: gr.Dropdown
    fade_schedule: gr.Dropdown
    fade_exponent: gr.Slider
    fade_projections: gr.CheckboxGroup
    fade_score: gr.Dropdown
    fade_unit: gr.Dropdown
    allocation: gr.Radio
    progressive: gr.Checkbox
    calibration: gr.Dropdown
    text: gr.Dropdown
    own_text: gr.Textbox
    use_text: gr.Button
    use_calibration: gr.Button
    own_file: gr.File
    measure: gr.Button
    stop: gr.Button
    link: gr.Textbox
    snippet: gr.Code

    @property
    def settings(self) -> list:
        """The inputs that make the conversion, see `settings.SETTINGS`."""
        return [*(getattr(self, name) for name in CONTROLS), self.calibration]


def convert_panel() -> ConvertPanel:
    gr.Markdown("### Convert")
    preset = gr.Dropdown([*PRESETS, CUSTOM], label="Preset", filterable=False, elem_id="preset")
    branches = OpenSlider(
        1, MAX_BRANCHES, 16, step=1, precision=0, label="B, branches", elem_id="branches",
        info="parts each MLP is cut into",
    )  # fmt: skip
    fade = OpenSlider(
        0, MAX_FADE, 0, step=0.05, label="Fade", elem_id="fade",
        info="zeroes small weights",
    )  # fmt: skip
    keep = OpenSlider(
        1, 16, 16, step=1, precision=0, label="K, branches kept", elem_id="keep",
        info="the others are dropped",
    )  # fmt: skip
    with gr.Row():
        measure = gr.Button("Measure", variant="primary", min_width=100, elem_id="measure")
        stop = gr.Button("Stop", min_width=80, elem_id="stop-measuring")
    with gr.Accordion("More: every stage, in order", open=False, elem_id="more"):
        order = gr.Dropdown(
            choices(ORDERS), value="contiguous", label="1 · Order of the neurons",
            info="decides which are in the first branches, and so which K keeps",
            filterable=False, elem_id="order",
        )  # fmt: skip
        fade_unit = gr.Dropdown(
            unit_choices(), value="weight", label="2 · Fade: what is removed",
            info="whole neurons save compute; “of every” fixes the share, without Fade",
            allow_custom_value=True, elem_id="fade-unit",
        )  # fmt: skip
        fade_projections = gr.CheckboxGroup(
            list(PROJECTIONS), value=["gate", "up"], label="Fade: from which matrices",
            info="whole neurons go from all three", elem_id="fade-projections",
        )  # fmt: skip
        fade_schedule = gr.Dropdown(
            choices(SCHEDULES), value="linear",
            label="Fade: how branches share the zeros",
            info="all schedules ask for the same number in all",
            filterable=False, elem_id="fade-schedule",
        )  # fmt: skip
        fade_exponent = LimitedSlider(
            *EXPONENTS, DEFAULT_EXPONENT, step=0.25, label="Fade: power", visible=False,
            info="1 is equal steps; more: the last branches lose most", elem_id="fade-exponent",
        )  # fmt: skip
        fade_score = gr.Dropdown(
            choices(SCORES), value="magnitude", label="Fade: which weights go first",
            info="SparseGPT also changes those that stay", filterable=False, elem_id="fade-score",
        )  # fmt: skip
        allocation = gr.Radio(
            choices(ALLOCATIONS), value="uniform", label="3 · K (or Fade) per layer",
            info="the mean over the layers stays", elem_id="allocation",
        )  # fmt: skip
        compensation = gr.Dropdown(
            choices(COMPENSATIONS), value="sqrt", label="4 · Compensation",
            info="how what stays makes up for what is lost",
            filterable=False, elem_id="compensation",
        )  # fmt: skip
        progressive = gr.Checkbox(
            False, label="Layer by layer *", elem_id="progressive",
            info="stages with a * see each layer on the converted ones before it",
        )  # fmt: skip
        calibration = gr.Dropdown(
            calibration_choices(), value=default_calibration(DEMO_KEY), label="Calibration text *",
            info="what choices with a * look at; the same kind of text as is measured on is best",
            filterable=False, elem_id="calibration-text",
        )  # fmt: skip
    with gr.Accordion("Evaluation text", open=False, elem_id="text-choice"):
        text = gr.Dropdown(
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
    return ConvertPanel(
        preset, branches, fade, keep, compensation, order, fade_schedule, fade_exponent,
        fade_projections, fade_score, fade_unit, allocation, progressive, calibration, text,
        own_text, use_text, use_calibration, own_file, measure, stop, link, snippet,
    )  # fmt: skip

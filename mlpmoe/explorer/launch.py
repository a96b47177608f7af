"""What the page is launched with: its style and scripts, and what Gradio is to leave out."""

from __future__ import annotations

from typing import Any

import gradio as gr
from plotly.offline import get_plotlyjs
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ..models import assets_folder
from .plots.style import CSS_VARIABLES
from .server.refusals import exception_handlers

# Who waits for a turn keeps a thread: with fewer, thirty visitors who measure would leave none for
# what is answered at once.
THREADS = 400
COMPONENTS = {"network"}  # scripts that a component of the page runs by itself


def launch_kwargs() -> dict[str, Any]:
    """What every launch of the page passes, so that tests and hosts serve the same one."""
    return {
        "theme": _theme(),
        "css": CSS_VARIABLES,
        "css_paths": sorted(assets_folder().glob("*.css")),
        "head": "".join(f"<script>{script}</script>" for script in _scripts()),
        # a saved plot carries plotly with it, so that it opens without a network
        "app_kwargs": {
            "routes": [Route("/plotly.js", _plotly_js)],
            "exception_handlers": exception_handlers(),
        },
        "footer_links": ["api", "settings"],
        "enable_monitoring": False,
        "run_history": False,  # it would keep all that events give, in the place of the runs
        "max_file_size": "1mb",
        "max_threads": THREADS,
        "strict_cors": True,
    }


def _scripts() -> list[str]:
    """page.js first, whose functions the others use."""
    files = sorted(assets_folder().glob("*.js"), key=lambda file: (file.stem != "page", file))
    return [file.read_text(encoding="utf-8") for file in files if file.stem not in COMPONENTS]


def _plotly_js(_: object) -> PlainTextResponse:
    return PlainTextResponse(get_plotlyjs(), media_type="text/javascript")


def _theme() -> gr.themes.Base:
    """Fonts of the visitor's own system, and secondary text that stays readable on a projector."""
    subdued = {"body_text_color_subdued": "#565b63", "block_info_text_color": "#565b63"}
    subdued |= {f"{name}_dark": "#b6bbc4" for name in list(subdued)}
    return gr.themes.Default(
        primary_hue=gr.themes.colors.slate,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(**subdued)

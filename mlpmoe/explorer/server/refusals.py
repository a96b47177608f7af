"""What programs send that comes to no handler of ours: answered in a sentence all the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from gradio.block_function import BlockFunction
from gradio.route_utils import FnIndexInferError

logger = logging.getLogger(__name__)


def exception_handlers() -> dict[type[Exception], Callable]:
    """For the app around the page: by what Gradio raises while it makes out who is called."""
    unknown = "There is no such endpoint. This page has /models, /preview, /evaluate and /generate."
    odd = (
        "This request cannot be read: an endpoint takes a JSON object, of its parameters by name "
        'or of {"data": [...]} in their order.'
    )
    return {
        FnIndexInferError: _saying(404, unknown),
        KeyError: _saying(404, unknown),
        RequestValidationError: _saying(422, odd),
        **{kind: _saying(400, odd) for kind in (TypeError, ValueError)},
    }


def _saying(status: int, sentence: str) -> Callable:
    async def answer(request: Request, error: Exception) -> JSONResponse:
        logger.info("%s refused: %.200r", request.url.path, error)
        return JSONResponse({"detail": sentence}, status)

    return answer


def refuse_too_few(demo: gr.Blocks) -> None:
    """Say how many values are missing; Gradio would log it, and answer nothing."""

    def validate_inputs(fn: BlockFunction, inputs: Sequence[Any]) -> None:
        if len(inputs) < len(fn.inputs):
            raise gr.Error(
                f"/{fn.api_name} takes {len(fn.inputs)} values, and {len(inputs)} came.",
                title="Not possible", print_exception=False,
            )  # fmt: skip

    demo.validate_inputs = validate_inputs

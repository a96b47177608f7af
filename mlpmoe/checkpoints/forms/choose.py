"""The forms that a conversion can leave in, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from . import dense as dense_form
from .branches import branch_form
from .form import Form, FormError, is_static
from .moe import MOE_FORMS, moe_form, possible_moe_forms, score_bounds

AUTO, DENSE, BRANCHES = "auto", dense_form.NAME, "branches"
FORMS = (AUTO, DENSE, *MOE_FORMS, BRANCHES)
FORM_WORDS = {  # what a person chooses between
    AUTO: "the best stock architecture",
    DENSE: "plain dense model (static conversions)",
    "granite-moe": "GraniteMoeShared, exact (routed, as many shared neurons in every layer)",
    "glm4-moe": "Glm4Moe (routed, layers share more or less)",
    "mixtral": "Mixtral (routed, nothing shared)",
    "qwen2-moe": "Qwen2Moe (routed, dense layers anywhere)",
    BRANCHES: "branches or experts as they are, to train on: needs trust_remote_code",
}
# tried by auto: exact first, then what holds most, then what holds dense layers anywhere
STOCK_ORDER = ("granite-moe", "glm4-moe", "qwen2-moe")


def make_form(
    model: PreTrainedModel, name: str, workspace: Path, ids: Sequence | None = None,
    dtype: torch.dtype | None = None,
) -> Form:  # fmt: skip
    """The form `name` of a converted model; "auto" is the best that other software knows.

    workspace: a folder for files that are made on the way. ids: (tokens,) int64, a text by which
    routers are scaled, where the form asks for it. dtype: of the files; None is that of the model.
    Raises FormError, with the reason.
    """
    if name not in FORMS:
        raise FormError(f"there is no form {name!r:.60}; allowed: {', '.join(FORMS)}.")
    if name == BRANCHES:
        return branch_form(model, workspace)
    if name not in MOE_FORMS and is_static(model):
        try:
            return dense_form.dense_form(model)
        except FormError as error:
            if name == DENSE:
                raise FormError(f"{error} The form {BRANCHES} has.") from None
            return branch_form(model, workspace, str(error))
    if name == DENSE:
        return dense_form.dense_form(model)  # which refuses it
    stock, reason = stock_moe(model, name)
    if stock is None:
        return branch_form(model, workspace, reason)
    return moe_form(model, stock, None if ids is None else score_bounds(model, ids), dtype)


def stock_moe(model: PreTrainedModel, name: str) -> tuple[str | None, str | None]:
    """The one of MOE_FORMS that `name`, itself one or "auto", stands for; None, and why, where
    auto finds none. Raises FormError if `name` cannot hold the model."""
    possible = possible_moe_forms(model)
    if reason := possible.get(name):
        raise FormError(reason)
    for stock in (name,) if name in MOE_FORMS else STOCK_ORDER:
        if possible[stock] is None:
            return stock, None
    return None, possible["glm4-moe"]

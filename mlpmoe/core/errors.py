"""Errors whose message is written for the person in front of the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class UserError(ValueError):
    """Something was asked for that cannot be done; the message says what is allowed."""


class SpecError(UserError):
    """A conversion spec holds a value that is not allowed, alone or for this model."""


class UnsupportedModelError(UserError):
    """The model's MLPs cannot be split into branches; the message names module and reason."""


class CalibrationWarning(UserWarning):
    """The calibration text holds too few tokens for what is fitted on it."""


def not_finite(what: str, dtype: torch.dtype) -> UserError:
    """For infinite or undefined numbers that come of finite weights. what: what computes them, in
    which dtype: float16 ends at 65,504, and then it is to blame."""
    name = str(dtype).removeprefix("torch.")
    if name == "float16":
        return UserError(
            f"{what} computes numbers beyond 65,504, where float16 ends: load it in bfloat16 or "
            "float32."
        )
    return UserError(f"{what} computes infinite or undefined numbers in {name}.")

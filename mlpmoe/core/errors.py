"""Errors whose message is written for the person in front of the page."""


class UserError(ValueError):
    """Something was asked for that cannot be done; the message says what is allowed."""


class SpecError(UserError):
    """A conversion spec holds a value that is not allowed, alone or for this model."""


class UnsupportedModelError(UserError):
    """The model's MLPs cannot be split into branches; the message names module and reason."""


class CalibrationWarning(UserWarning):
    """The calibration text holds too few tokens for what is fitted on it."""

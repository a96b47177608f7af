"""A registry: the named choices of one field of a spec, each an entry that says all about itself.

Command line, sweeps, recipes in words and menus read the registries whenever they are asked, so
that an entry is all that a new choice needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True)
class Choice:
    """A named choice: its texts, and whether it needs a calibration text."""

    label: str  # in a menu
    about: str  # what it does: words within a sentence; of a method, a sentence
    _: KW_ONLY
    short: str = ""  # in a recipe of a few words, such as "× √(B/K)"; by default the label
    calibrated: bool = False  # whether it looks at activations
    by_loss: bool = False  # whether it looks at the sensitivity of the model's loss, too

    def __post_init__(self) -> None:
        if not self.short:
            object.__setattr__(self, "short", self.label)


def choices(registry: Mapping[str, Choice], star: str = " *") -> list[tuple[str, str]]:
    """Labels and names, as a menu wants them. star: behind what needs a calibration text."""
    return [
        (f"{choice.label}{star if choice.calibrated else ''}", name)
        for name, choice in registry.items()
    ]

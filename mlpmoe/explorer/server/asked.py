"""What is asked of a model: a spec, with the text that it may look at if it needs one."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...core.spec import ConversionSpec


@dataclass(frozen=True)
class Calibrated:
    """A spec together with the text it may look at; stands where a spec does."""

    spec: ConversionSpec
    text: str = field(repr=False)
    key: str = field(default="stories", compare=False)  # of the text, for links and runs


Conversion = ConversionSpec | Calibrated


def spec_of(asked: Conversion) -> ConversionSpec:
    return asked.spec if isinstance(asked, Calibrated) else asked

"""The four steps of the lesson, in the order in which they are walked."""

from . import fade, keep, route, split
from .reading import Reading, read_layers
from .step import Question, Step, View, feedback

STEPS: tuple[Step, ...] = (split.STEP, fade.STEP, keep.STEP, route.STEP)

__all__ = ["STEPS", "Question", "Reading", "Step", "View", "feedback", "read_layers"]

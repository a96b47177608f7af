"""The steps of the lesson that teach, in the order in which they are walked."""

from . import cut, fade, keep, route, train
from .reading import Reading, read_layers
from .step import Question, Step, View, feedback

STEPS: tuple[Step, ...] = (cut.STEP, fade.STEP, keep.STEP, route.STEP, train.STEP)

__all__ = ["STEPS", "Question", "Reading", "Step", "View", "feedback", "read_layers"]

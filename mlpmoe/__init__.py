"""mlpmoe: turn the dense MLPs of a language model into a mixture of experts, and measure it.

from mlpmoe import ConversionSpec, convert, load, perplexity
model, tokenizer = load("demo")
converted = convert(model, ConversionSpec(branches=16, fade=0.9))
print(perplexity(converted, tokenizer, text))
"""

import os
import signal
import sys

# Before torch is imported: threads that wait for work sleep soon. Those of OpenMP would look for it
# for milliseconds, and where another program wants their core everything takes many times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# As a program, `python -m mlpmoe` or `mlpmoe`: while the libraries are read, which takes seconds,
# an interrupt ends it without a traceback.
if os.path.basename((sys.argv or [""])[0]) in ("-m", "mlpmoe", "mlpmoe.exe"):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

from .checkpoints.check.verification import ExportError, verify
from .checkpoints.write.export import export
from .core.calibration import Calibration
from .core.conversion import convert
from .core.errors import CalibrationWarning, SpecError, UnsupportedModelError, UserError
from .core.presets import PRESETS
from .core.spec import ConversionSpec
from .measure.cost.magnitudes import magnitudes
from .measure.cost.parameters import parameter_report
from .measure.quality.perplexity import compare, perplexity
from .measure.text.generation import write_side_by_side
from .models import CATALOGUE, ModelError, load
from .models.texts import named_calibration, named_text
from .version import VERSION

__version__ = VERSION

__all__ = [
    "CATALOGUE",
    "PRESETS",
    "Calibration",
    "CalibrationWarning",
    "ConversionSpec",
    "ExportError",
    "ModelError",
    "SpecError",
    "UnsupportedModelError",
    "UserError",
    "compare",
    "convert",
    "export",
    "load",
    "magnitudes",
    "named_calibration",
    "named_text",
    "parameter_report",
    "perplexity",
    "verify",
    "write_side_by_side",
]

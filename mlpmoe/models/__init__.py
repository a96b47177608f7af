"""Which models there are, whether one can be loaded here, and loading it. Imports core only."""

from .catalogue import CATALOGUE, CatalogueEntry, assets_folder, find_entry
from .default import default_model
from .errors import ModelError, format_bytes, format_parameters
from .hub import offline_models
from .loading import load, load_checked, make_ready
from .memory import memory_needed
from .names import host_allows_any_model, open_page_to
from .origin import Origin, origin_of
from .preflight import Preflight, preflight
from .texts import (
    CALIBRATIONS,
    MAX_OWN_TEXT,
    TEXTS,
    TextEntry,
    check_own_text,
    decode_text,
    default_calibration,
    default_text,
    named_calibration,
    named_text,
    text_digest,
)
from .training import host_training_seconds, recovery_folder

__all__ = [
    "CALIBRATIONS",
    "CATALOGUE",
    "MAX_OWN_TEXT",
    "TEXTS",
    "CatalogueEntry",
    "ModelError",
    "Origin",
    "Preflight",
    "TextEntry",
    "assets_folder",
    "check_own_text",
    "decode_text",
    "default_calibration",
    "default_model",
    "default_text",
    "find_entry",
    "format_bytes",
    "format_parameters",
    "host_allows_any_model",
    "host_training_seconds",
    "load",
    "load_checked",
    "make_ready",
    "memory_needed",
    "named_calibration",
    "named_text",
    "offline_models",
    "open_page_to",
    "origin_of",
    "preflight",
    "recovery_folder",
    "text_digest",
]

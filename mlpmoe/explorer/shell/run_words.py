"""A run's recipe, model and text as the page names them, static and routed alike."""

from __future__ import annotations

from functools import lru_cache
from pathlib import PurePath

from ...core.spec import ConversionSpec
from ...measure.words import in_short, in_words
from ...models.catalogue import find_entry
from .preview import preset_name


def short_recipe(spec: ConversionSpec) -> str:
    """In a few words, e.g. "B 16 · K 12, × √(B/K)" or "CMoE · 75 % active"."""
    return in_short(spec).replace(" · fade 0.00", "")


@lru_cache(maxsize=1024)  # a curve asks for those of all its runs, several times a second
def recipe_of(spec: ConversionSpec) -> str:
    """The whole recipe: the preset's name, if it is one, and what is done."""
    if spec.routed:
        return f"{short_recipe(spec)} ({spec.to_flags()})"
    name = preset_name(spec)
    return f"{name.rstrip(' *')}: {in_words(spec)}" if name else in_words(spec)


def model_name(key: str) -> str:
    """Of the list as it is there, of the hub by its id, of this machine by its folder or file."""
    entry = find_entry(key)
    if entry:
        return entry.label
    path = PurePath(key)
    return path.name if path.is_absolute() or key.startswith((".", "~")) else key

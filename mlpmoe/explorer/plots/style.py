"""Colours of the page, the same in plots, cards and style sheet."""

from __future__ import annotations

DENSE = "#3f6fb0"  # blue and orange stay apart for all common kinds of colour blindness
CONVERTED = "#d9741a"
GREY = "#888888"  # text on plots: readable on white and on black
GRID = "rgba(128,128,128,0.25)"
# one scale for damage: nothing lost to everything lost
DAMAGE = ["#e9e7ef", "#cdb4d6", "#b07cb6", "#8f4792", "#661a66", "#3b0a3f"]

CSS_VARIABLES = f":root {{ --dense: {DENSE}; --converted: {CONVERTED}; --damage: {DAMAGE[2]}; }}"

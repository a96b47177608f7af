"""Presets: a recipe with a name is a spec with a name."""

from __future__ import annotations

from .spec import ConversionSpec

# The published recipes, then the best ones; a star marks what needs a calibration text.
PRESETS = {
    "All 16 branches": ConversionSpec(branches=16),
    "Fractal Fade (paper)": ConversionSpec(branches=16, fade=0.9),
    "Keep 12 of 16 (paper)": ConversionSpec(branches=16, keep=12),
    "Fade 0.9 and keep 12 of 16": ConversionSpec(branches=16, fade=0.9, keep=12),
    "Keep 12 of 16, not scaled": ConversionSpec(branches=16, keep=12, compensation="none"),
    "Fade all three matrices evenly": ConversionSpec(
        branches=16, fade=0.6, fade_schedule="uniform", fade_projections="gate-up-down"
    ),
    "Fade evenly, by relative size": ConversionSpec(
        branches=16, fade=0.6, fade_schedule="uniform", fade_projections="gate-up-down",
        fade_score="relative",
    ),
    "Fade by SparseGPT *": ConversionSpec(
        branches=16, fade=0.6, fade_schedule="uniform", fade_projections="gate-up-down",
        fade_score="sparsegpt", compensation="refit",
    ),
    "Keep 12 of 16, least squares *": ConversionSpec(
        branches=16, keep=12, order="least-squares", compensation="refit"
    ),
    "Keep 8 of 16, least squares *": ConversionSpec(
        branches=16, keep=8, order="least-squares", compensation="refit"
    ),
    "Keep 24 of 32, by the model's loss *": ConversionSpec(
        branches=32, keep=24, order="loss", compensation="refit", allocation="sensitivity"
    ),
}  # fmt: skip

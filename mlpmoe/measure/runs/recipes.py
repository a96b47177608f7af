"""What each stage of a static recipe contributes: recipes that grow by one choice at a time."""

from __future__ import annotations

from typing import Any

from ...core.spec import ConversionSpec

KEPT = (12, 8)  # of 16 branches: 75 % and 50 % of the neurons
RAMP = 0.9  # the published fade, which zeroes 28.1 % of the MLP weights of a gated model
EVEN = 0.6  # the same zeros over three matrices in place of two


def recipes() -> dict[str, ConversionSpec]:
    """Name -> spec. The same neurons kept, or the same share of weights zeroed (in gated MLPs),
    within a group, from the published recipe to the best."""
    found: dict[str, ConversionSpec] = {}
    for keep in KEPT:
        share = f"{100 * keep // 16} % kept"

        def add(name: str, share: str = share, keep: int = keep, **choices: Any) -> None:
            found[f"{share}: {name}"] = ConversionSpec(branches=16, keep=keep, **choices)

        add("as stored, × √(B/K) (MLPMoE)")
        add("as stored", compensation="none")
        add("by weight norm", order="norm", compensation="none")
        add("by activation", order="activation", compensation="none")
        add("by fluctuation", order="fluctuation", compensation="none")
        add("… and a fitted α per branch", order="fluctuation", compensation="alpha")
        add("… and the mean as a bias (FLAP)", order="fluctuation", compensation="mean")
        add(
            "… and ranked over all layers (FLAP)", order="fluctuation", compensation="mean",
            allocation="global",
        )  # fmt: skip
        add("by fluctuation, down refitted", order="fluctuation", compensation="refit")
        add("by activation × gradient, down refitted", order="gradient", compensation="refit")
        add("by least squares, down refitted", order="least-squares", compensation="refit")
        best = {"order": "loss", "compensation": "refit"}
        add("by the model's loss, down refitted", **best)
        add("… shared out among layers", **best, allocation="sensitivity")
        add("… layer by layer", **best, progressive=True)
        add("… both", **best, allocation="sensitivity", progressive=True)

    def fade(name: str, **choices: Any) -> None:
        found[f"28.1 % zeroed: {name}"] = ConversionSpec(branches=16, **choices)

    fade("gate and up, more in later branches (MLPMoE)", fade=RAMP)
    fade("gate and up, evenly", fade=RAMP, fade_schedule="uniform")
    even = {"fade": EVEN, "fade_schedule": "uniform", "fade_projections": "gate-up-down"}
    fade("gate, up and down, evenly", **even)
    fade("… relative to others on an input", **even, fade_score="relative")
    fade("… by Wanda's score", **even, fade_score="wanda")
    fade("… by SparseGPT", **even, fade_score="sparsegpt")
    fade("… and down refitted", **even, fade_score="sparsegpt", compensation="refit")
    last = {"fade_score": "sparsegpt", "compensation": "refit"}
    fade("… shared out among layers", **even, **last, allocation="sensitivity")
    fade("… layer by layer", **even, **last, progressive=True)
    return found

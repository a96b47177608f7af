"""What the benchmark runs on, which routed models it times, and what is hoped for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...core.spec import ConversionSpec

KEEP = 8
EXPERTS = 64
HALF = ConversionSpec(method="contiguous", experts=EXPERTS, active=0.5)
QUARTER = ConversionSpec(method="contiguous", experts=EXPERTS, active=0.25)
NEURONS = ConversionSpec(method="neurons", active=0.25)
INPUTS = ConversionSpec(method="inputs", active=0.25)
ROUTED = {  # branches kept by the static conversion of the same width -> what is timed beside it
    8: {f"half of {EXPERTS} experts": HALF},
    4: {
        f"a quarter of {EXPERTS} experts": QUARTER,
        "a quarter of the neurons by their gate": NEURONS,
        "a quarter of all inputs": INPUTS,
    },
}
TARGETS = {  # of generation, to dense
    f"half of {EXPERTS} experts": 0.8,
    f"a quarter of {EXPERTS} experts": 0.66,
    "a quarter of the neurons by their gate": 0.85,
}
FEWER = (32, 16)  # experts: larger ones, with which a prompt is read faster
READING = {"float32": 0.7, "bfloat16": 0.85}  # target of a prompt, half of 32 experts, to dense
HALF_OF_FEWER = f"half of {FEWER[0]} experts"
# the same on a GPU
ROUTED_ON_GPU = ROUTED | {8: {HALF_OF_FEWER: replace(HALF, experts=FEWER[0])}}


@dataclass(frozen=True)
class Shape:
    """Of a model."""

    layers: int
    d_model: int
    d_ff: int
    vocabulary: int
    heads: int
    key_value_heads: int


SHAPES = {
    "demo": Shape(8, 256, 768, 2048, 8, 8),
    "smollm2": Shape(30, 576, 1536, 49152, 9, 3),  # SmolLM2-135M
    "0.5b": Shape(24, 896, 4864, 151936, 14, 2),  # Qwen2.5-0.5B
}
LARGE = {"8b": Shape(32, 4096, 14336, 128256, 32, 8)}  # Llama-3-8B; for a GPU
HOPED_FOR = {"cpu": SHAPES["0.5b"], "cuda": LARGE["8b"]}  # the shape that times are hoped for


@dataclass(frozen=True)
class Goals:
    """What is hoped for: times, to dense, of writing and of a forward pass of many tokens."""

    split_writing: float
    split_reading: float
    kept_writing: float
    routed_writing: Mapping[str, float]
    routed_reading: float | None  # half of 32 experts


def goals(device: str, dtype: str) -> Goals:
    """device: "cpu" or "cuda". dtype: such as "bfloat16"."""
    if device == "cuda":
        return Goals(1.01, 1.01, 0.70, {HALF_OF_FEWER: 0.8}, 0.75)
    return Goals(1.02, 1.05, 0.68, TARGETS, READING.get(dtype))

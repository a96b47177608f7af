"""Conversion from files to files, a layer at a time: for models larger than the memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...core.conversion import convert_mlp
from ...core.mlps import MLPWeights, decoder_layers, located_mlps, write_mlp
from ...core.spec import ConversionSpec
from ...core.static.branched import BranchedMLP, branch_sizes
from ...core.static.pipeline import build_static
from ...models.checkpoint import INDEX, WEIGHTS
from ...version import VERSION
from ..check.verification import Progress
from ..forms.dense import DensePlan, plan_dense
from ..forms.form import rounded_to
from .source import Source

STATE = "progress.json"  # which conversion a partial folder belongs to
SHARD_BYTES = 500_000_000  # a file gets at least one layer, and more up to this size


def streams(spec: ConversionSpec) -> bool:
    """Whether a conversion looks at the weights of one MLP at a time, and at nothing else."""
    return not spec.routed and not spec.needs_calibration


@dataclass(frozen=True)
class FileConversion:
    """A dense checkpoint, and what a data-free static spec makes of it, file by file.

    dtype: of what is written; None keeps that of each tensor.
    """

    source: Source
    spec: ConversionSpec
    dtype: torch.dtype | None = None

    @cached_property
    def _specs(self) -> dict[str, ConversionSpec]:
        """What is asked of each MLP, by its path."""
        paths = located_mlps(self.source.model)
        return {path: self.spec.at(layer) for layer, path in enumerate(paths)}

    def convert(self, path: str, weights: MLPWeights) -> BranchedMLP:
        """One MLP, with α in float32: it is rounded once, when it is multiplied into down."""
        made = convert_mlp(weights, self._specs[path])
        made.alpha = nn.Parameter(torch.full((len(made.sizes),), self._specs[path].alpha))
        return made

    def as_saved(self, path: str, weights: MLPWeights) -> BranchedMLP:
        """One MLP with α in down, rounded as in the files."""
        folded = self.convert(path, weights).folded()
        down = folded.down.to(self._dtype(f"{path}.down"))
        return BranchedMLP(replace(folded, down=down), (folded.d_ff,))

    @cached_property
    def plan(self) -> DensePlan:
        """The architecture that the result has. Raises SpecError if the spec does not fit."""
        model = self.source.model
        located = list(located_mlps(model).values())
        sizes = [layout.d_ff(module) for module, layout in located]
        self.spec.check_fits(min(sizes), len(sizes))
        biased = any(getattr(m, layout.down).bias is not None for m, layout in located)
        widths = [_width(*one) for one in zip(sizes, self._specs.values(), strict=True)]
        return plan_dense(model.config, type(model), widths, biased)

    @cached_property
    def shards(self) -> dict[str, list[str]]:
        """The tensors of each file: layers stay whole, since an MLP is converted as a whole."""
        skeleton = self.plan.skeleton
        path, _ = decoder_layers(skeleton)
        tied = skeleton.all_tied_weights_keys
        groups: dict[str, list[str]] = {}
        for name in skeleton.state_dict():
            if name not in tied:
                inside = name.removeprefix(f"{path}.").split(".")[0]
                whole = name.startswith(f"{path}.") and inside.isdecimal()
                groups.setdefault(f"{path}.{inside}" if whole else name, []).append(name)
        files: list[list[str]] = []
        size = SHARD_BYTES
        for names in groups.values():
            more = sum(self.sizes[name] for name in names)
            if size + more > SHARD_BYTES:
                files.append([])
                size = 0
            files[-1] += names
            size += more
        if len(files) == 1:
            return {WEIGHTS: files[0]}
        stem = WEIGHTS.removesuffix(".safetensors")
        return {
            f"{stem}-{index:05}-of-{len(files):05}.safetensors": names
            for index, names in enumerate(files, 1)
        }

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor that is written."""
        places = self.plan.skeleton.state_dict()
        return {name: places[name].numel() * self._dtype(name).itemsize for name in places}

    @cached_property
    def bytes(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(self.sizes[name] for names in self.shards.values() for name in names)

    def _dtype(self, name: str) -> torch.dtype:
        return self.dtype or self.source.dtypes.get(name, self.source.dtype)

    @property
    def fingerprint(self) -> str:
        """What tells this conversion from any other, so that only its own files are kept."""
        files = [
            (str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.source.files
        ]
        known = [VERSION, self.spec.to_dict(), str(self.dtype), files, sorted(self.shards.items())]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def write(self, folder: Path, report: Progress) -> None:
        """Write weights and config to `folder`; what an interrupted run of the same conversion has
        written there already stays. `report` may raise to cancel."""
        _claim(folder, self.fingerprint, keep=self.shards)
        located = located_mlps(self.plan.skeleton)
        readers = {path: read for path, read in self.source.mlps()}
        done = 0
        for file, names in self.shards.items():
            report("converting", done / self.bytes)
            done += sum(self.sizes[name] for name in names)
            if (folder / file).exists():
                continue
            tensors = dict(self._tensors(names, located, readers))
            part = folder / f"{file}.part"
            save_file(tensors, part, metadata={"format": "pt"})
            part.chmod(0o644)  # safetensors makes it readable by its owner alone
            os.replace(part, folder / file)
            del tensors
        if len(self.shards) > 1:
            self._write_index(folder)
        skeleton = self.plan.skeleton
        config = skeleton.config
        config.dtype = self.dtype or self.source.dtype
        config.architectures = [type(skeleton).__name__]
        config.save_pretrained(folder)

    def _tensors(
        self,
        names: list[str],
        located: Mapping,
        readers: Mapping[str, Callable[[], MLPWeights]],
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of one file."""
        inside = [p for p in located if any(name.startswith(f"{p}.") for name in names)]
        for path in inside:
            module, layout = located[path]
            made = self.convert(path, readers[path]())
            write_mlp(module, layout, made.folded(layout.d_ff(module)))
            for name, tensor in module.state_dict().items():
                yield self._saved(f"{path}.{name}", tensor)
            module.to("meta")
        prefixes = tuple(f"{path}." for path in inside)
        for name in names:
            if not name.startswith(prefixes):
                yield self._saved(name, self.source.read(name))

    def _saved(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return name, rounded_to(self._dtype(name), name, tensor).contiguous()

    def _write_index(self, folder: Path) -> None:
        weight_map = {name: file for file, names in self.shards.items() for name in names}
        index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _claim(folder: Path, fingerprint: str, keep: Mapping[str, object]) -> None:
    """Make `folder` this conversion's: files of another, and half-written ones, go."""
    state = folder / STATE
    try:
        same = json.loads(state.read_text()) == fingerprint
    except (OSError, ValueError):
        same = False
    for item in folder.glob("*.safetensors*"):
        if not same or item.name not in keep:
            item.unlink()
    state.write_text(json.dumps(fingerprint))


def _width(d_ff: int, spec: ConversionSpec) -> int:
    """Neurons that are left of an MLP, which no weight decides."""
    if spec.fade_unit != "neuron":
        return sum(branch_sizes(d_ff, spec.branches)[: spec.kept])
    row = torch.ones(d_ff, 1)
    stand_in = MLPWeights(row, row, row.T, None, None, None, nn.functional.silu)
    return sum(build_static(stand_in, spec).sizes)

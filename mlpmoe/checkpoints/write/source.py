"""A dense checkpoint on disk, of which only what is looked at is in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...core.errors import UserError
from ...core.mlps import MLPWeights, decoder_layers, located_mlps, read_mlp
from ...models.errors import ModelError
from ...models.places import has_no_part, is_computed, refuse_extra, refuse_missing, untie
from ...models.stored_config import read_stored_config

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip

Replace = Callable[[str, MLPWeights], nn.Module]


class PiecewiseError(UserError):
    """A checkpoint whose files cannot be read piece by piece; as a whole they may."""


class Source:
    """The model of a checkpoint's folder without weights, and its tensors one at a time.

    files: its safetensors files. name: as messages call it. Raises PiecewiseError if their tensors
    do not have the names and shapes of the model: transformers may know how to turn them into it,
    but only as a whole. ModelError if they hold less or more than the model.
    """

    def __init__(self, folder: Path, files: Iterable[str], name: str = "this checkpoint") -> None:
        self._name = name
        config = read_stored_config(folder)
        files = tuple(files)
        self._find(config, folder, files)
        if any(self._differs(name) for name in self._tied):
            untie(config)  # it has a head of its own, whatever the flag says
            self._find(config, folder, files)

    def _find(self, config: PreTrainedConfig, folder: Path, files: Sequence[str]) -> None:
        """Build the model of a config, and find its tensors."""
        with init_empty_weights(include_buffers=False):  # buffers are computed, not read
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            ).eval()
        self.dtypes: dict[str, torch.dtype] = {}  # by the model's names, without tied ones
        self._places: dict[str, tuple[Path, str]] = {}
        self.left_out: tuple[str, ...] = ()  # tensors on which the next token does not depend
        self._extra: set[str] = set()
        self._tied = dict(self.model.all_tied_weights_keys)
        expected = self.model.state_dict()
        for file in files:
            with safe_open(folder / file, framework="pt") as found:
                for key in found.keys():
                    self._place(folder / file, key, found.get_slice(key), expected)
        missing = [n for n in expected if n not in self._places and n not in self._tied]
        if missing and self._extra:  # maybe the same under other names
            raise _foreign(f"{missing[0]} is missing, there is no place for {min(self._extra)}")
        if missing:
            raise ModelError(refuse_missing(missing, self._name))
        if self._extra:
            raise ModelError(refuse_extra(self._extra, self._name))

    def _place(self, file: Path, key: str, part, expected: dict[str, Tensor]) -> None:
        name = key if key in expected else f"{self.model.base_model_prefix}.{key}"
        if name not in expected:
            if is_computed(key, part.get_shape()):
                return
            if has_no_part(key, self.model):
                self.left_out += (key,)
            else:
                self._extra.add(key)
            return
        if tuple(part.get_shape()) != tuple(expected[name].shape):
            raise _foreign(f"{key} has another shape than the model's")
        if part.get_dtype() not in DTYPES:
            raise _foreign(f"{key} is stored as {part.get_dtype()}")
        if name not in self._tied:
            self.dtypes[name] = DTYPES[part.get_dtype()]
        self._places[name] = file, key

    def _differs(self, tied: str) -> bool:
        """Whether the files hold a tensor of its own for one that the config ties to another."""
        if tied not in self._places or self._tied[tied] not in self._places:
            return False
        return not torch.equal(self.read(tied), self.read(self._tied[tied]))

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor, and so of most."""
        return next(iter(self.dtypes.values()))

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors of the model, sorted."""
        return sorted({file for file, _ in self._places.values()})

    def read(self, name: str) -> Tensor:
        """The tensor that the model calls `name`. It is a view of the file, which stays in memory
        for as long as the tensor is used, and no longer."""
        while name not in self._places:
            name = self._tied[name]
        file, key = self._places[name]
        with safe_open(file, framework="pt") as found:
            return found.get_tensor(key)

    def mlps(self) -> Iterator[tuple[str, Callable[[], MLPWeights]]]:
        """Path of each MLP, in order of the layers, and what reads its weights."""
        for path, (module, layout) in located_mlps(self.model).items():
            yield path, partial(self._read_mlp, path, module, layout)

    def _read_mlp(self, path: str, module: nn.Module, layout) -> MLPWeights:
        twin = copy.deepcopy(module)
        names = module.state_dict()
        twin.load_state_dict({n: self.read(f"{path}.{n}") for n in names}, assign=True)
        return read_mlp(path, twin, layout)

    def running(self, replace: Replace | None = None) -> PreTrainedModel:
        """A model that reads a layer when it is needed and forgets it again, with its own MLPs or
        those that `replace(path, weights)` makes of them. It computes in the dtype of the files."""
        dtype = self.dtype
        model = copy.deepcopy(self.model)
        for parameter in model.parameters():  # not buffers: rotary frequencies stay float32
            parameter.data = parameter.data.to(dtype)
        for path, read in self.mlps() if replace else ():
            model.set_submodule(path, _OnDemand(path, read, replace))
        path, layers = decoder_layers(model)
        inside = f"{path}."
        units = {f"{inside}{index}": layer for index, layer in enumerate(layers)}
        units |= {
            name: module
            for name, module in model.named_modules()
            if not name.startswith(inside) and any(True for _ in module.parameters(recurse=False))
        }
        for name, module in units.items():
            module.register_forward_pre_hook(partial(self._fill, name, dtype))
            module.register_forward_hook(_forget)
        return model

    def _fill(self, path: str, dtype: torch.dtype, module: nn.Module, *_: object) -> None:
        tensors = {n: self.read(f"{path}.{n}").to(dtype) for n in module.state_dict()}
        module.load_state_dict(tensors, assign=True)


class _OnDemand(nn.Module):
    """Stands in for an MLP and makes it anew each time it runs."""

    def __init__(self, path: str, read: Callable[[], MLPWeights], replace: Replace) -> None:
        super().__init__()
        self.path, self.read, self.replace = path, read, replace

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.replace(self.path, self.read())(*inputs)


def _forget(module: nn.Module, *_: object) -> None:
    module.load_state_dict({n: t.to("meta") for n, t in module.state_dict().items()}, assign=True)


def _foreign(reason: str) -> PiecewiseError:
    return PiecewiseError(
        f"this checkpoint cannot be converted file by file ({reason}); it has to fit into memory."
    )

"""Any conversion as a checkpoint with its own code: branches with their α, experts with routers."""

from __future__ import annotations

import importlib.util
import sys
import uuid
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from ...core.routed import ClusterMLP, InputMLP, LowRankMLP, NeuronMLP
from ...core.routed.low_rank_mlp import Factors
from ...core.routed.routers import LinearRouter, RepresentativeRouter
from ...core.static.branched import BranchedMLP
from .form import Form, FormError, converted_mlps, other_tensors, skeleton_of

NAME = "branches"
MODELING = Path(__file__).with_name("modeling_mlpmoe.py")
# The lines of it that name the base family.
BASE_CONFIG = "from transformers import {} as BaseConfig\n"
BASE_MODEL = "from transformers import {} as BaseModel\n"
# What a config says of its class and of how it was written, not of the model.
OF_THE_CLASS = ("model_type", "architectures", "auto_map", "transformers_version")


def branch_form(model: PreTrainedModel, workspace: Path, reason: str | None = None) -> Form:
    """Any conversion as it is, in an architecture whose code travels with the weights.

    workspace: an existing temporary folder for that code; it must stay until the form is written.
    reason: the sentence that says why no stock architecture is taken, if none can be.
    Tensors are the converted model's own. Raises FormError for the oracle router, and for a base
    model whose classes transformers does not have.
    """
    mlps = converted_mlps(model)
    skeleton = _skeleton(model, [describe_mlp(path, mlp) for path, mlp in mlps.items()], workspace)
    tensors = other_tensors(model)
    for path, mlp in mlps.items():
        own = mlp.state_dict()  # may hold an activation function twice, once in the router
        wanted = skeleton.get_submodule(path).state_dict()
        tensors |= {f"{path}.{name}": own[name] for name in wanted}
    routed = any(not isinstance(mlp, BranchedMLP) for mlp in mlps.values())
    return Form(NAME, skeleton, tensors, notes=_notes(routed, reason), remote_code=True)


def describe_mlp(path: str, mlp: nn.Module) -> dict[str, Any]:
    """The entry of config.json for one converted MLP, as modeling_mlpmoe.py explains it. Raises
    FormError for a router that needs the answer to give it."""
    if isinstance(mlp, BranchedMLP):
        linears = mlp.projections
        return {
            "path": path,
            "kind": "branched",
            "d_model": mlp.up_proj.in_features,
            "gated": mlp.gate_proj is not None,
            "biases": [name for name, linear in linears.items() if linear.bias is not None],
            "sizes": list(mlp.sizes),
        }
    if isinstance(mlp, LowRankMLP):
        return {"path": path, "kind": "lowrank"} | {
            name: _describe_factors(factors) for name, factors in mlp.projections.items()
        }
    names = ("gate", "up", "down")
    entry = {
        "path": path,
        "kind": "neurons",
        "d_model": mlp.up.shape[1],
        "gated": mlp.gate is not None,
        "biases": [name for name in names if getattr(mlp, f"{name}_bias") is not None],
        "d_ff": mlp.d_ff,
        "idle_mean": mlp.idle_mean is not None,
    }
    if isinstance(mlp, InputMLP):
        thresholds = mlp.thresholds
        return entry | {
            "kind": "inputs",
            "opens": mlp.opens,
            "importance": mlp.importance is not None,
            "active": mlp.active._asdict(),
            "thresholds": None if thresholds is None else thresholds._asdict(),
        }
    if isinstance(mlp, ClusterMLP):
        router = _describe_router(mlp.router)
        return entry | {
            "kind": "clusters", "experts": mlp.experts, "size": mlp.size, "router": router,
        }  # fmt: skip
    entry |= {"active": mlp.active, "threshold": mlp.threshold}
    if isinstance(mlp, NeuronMLP):
        return entry | {"importance": mlp.importance is not None}
    return entry | {
        "kind": "routed",
        "shared": mlp.shared,
        "experts": mlp.experts,
        "size": mlp.size,
        # if all run, nothing is asked
        "router": _describe_router(mlp.router) if mlp.chooses else None,
    }


def _describe_factors(factors: Factors) -> dict[str, Any]:
    return {
        "inputs": factors.first.shape[1],
        "outputs": factors.second.shape[1],
        "directions": factors.directions,
        "kept": factors.kept,
        "offset": factors.offset is not None,
        "bias": factors.bias is not None,
    }


def _describe_router(router: nn.Module) -> dict[str, Any]:
    if isinstance(router, LinearRouter):
        return {
            "kind": "linear",
            "bias": router.bias is not None,
            "normalise": router.normalise,
        }
    if isinstance(router, RepresentativeRouter):
        biases = [n for n in ("gate", "up") if getattr(router, f"{n}_bias") is not None]
        return {"kind": "representative", "gated": router.gate is not None, "biases": biases}
    raise FormError(
        f"{type(router).__name__} is a bound, not a router: it computes all experts to choose some "
        "of them. Convert with another router to export."
    )


def _skeleton(
    model: PreTrainedModel, entries: list[dict[str, Any]], workspace: Path
) -> PreTrainedModel:
    """The model that modeling_mlpmoe.py builds for these MLPs, without memory."""
    # The last part of the name is what config.json calls the file; the first keeps two apart.
    name = f"mlpmoe_form_{uuid.uuid4().hex}.{MODELING.stem}"
    try:
        code = _import_code(name, model, workspace)
        values = {k: v for k, v in model.config.to_dict().items() if k not in OF_THE_CLASS}
        config = code.MLPMoEConfig(**values, mlps=entries)
        # the config will say the dtype of the skeleton
        skeleton = skeleton_of(config, code.MLPMoEForCausalLM).to(model.dtype)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    weakref.finalize(skeleton, sys.modules.pop, name, None)
    skeleton.generation_config = model.generation_config
    return skeleton


def _import_code(name: str, model: PreTrainedModel, workspace: Path) -> ModuleType:
    """modeling_mlpmoe.py for the family of `model`, written to the workspace and imported as
    `name`. It is left in sys.modules, where save_pretrained looks for the file to copy."""
    source = MODELING.read_text(encoding="utf-8")
    for line, stock, wanted in (
        (BASE_CONFIG, "LlamaConfig", type(model.config)),
        (BASE_MODEL, "LlamaForCausalLM", type(model)),
    ):
        if getattr(transformers, wanted.__name__, None) is not wanted:
            raise FormError(
                f"{wanted.__name__} is not one of the classes of transformers, so a checkpoint "
                "cannot be built on it."
            )
        source = source.replace(line.format(stock), line.format(wanted.__name__))
    file = workspace / MODELING.name
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    code = importlib.util.module_from_spec(spec)
    sys.modules[name] = code
    spec.loader.exec_module(code)
    return code


def _notes(routed: bool, reason: str | None) -> tuple[str, ...]:
    lines = len(MODELING.read_text(encoding="utf-8").splitlines())
    opens = (
        f"It opens with trust_remote_code=True only, which runs {MODELING.name} of the folder: "
        f"read it ({lines} lines) before you allow that."
    )
    if reason is None:
        reason = (
            "it keeps the experts and their routers as they are."
            if routed
            else "it keeps the branches and a learnable α for each, for fine-tuning. To serve the "
            "model, take the dense form, which computes the same."
        )
    elsewhere = "Software that runs stock architectures only, such as llama.cpp, cannot open it."
    return f"This is not a stock checkpoint: {reason}", opens, elsewhere

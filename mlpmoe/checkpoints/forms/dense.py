"""Static conversions as plain dense checkpoints: α in down, a narrower MLP, zeros in place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from ...core.mlps import located_mlps, write_mlp
from .form import (
    BLOCK,
    Form,
    FormError,
    block_note,
    converted_mlps,
    is_static,
    other_tensors,
    quantisable,
    skeleton_of,
)

NAME = "dense"
# Fields of a config that may say how wide the MLPs are; whether one does is tried.
WIDTH_FIELDS = (
    "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "shared_intermediate_size",
)  # fmt: skip
# What has to be said beside for the width to be taken as it is (LFM2).
WIDTH_AS_IS = {"block_auto_adjust_ff_dim": False}
BIAS_FIELD = "mlp_bias"  # of some forty configs: a bias on all matrices of the MLP
# Families whose every weight has a place in a Llama, which has one for a bias of the MLP too:
# Mistral is a Llama with a window, Qwen2 one with biases on q, k and v.
LLAMA_LIKE = {"mistral": False, "qwen2": True}  # whether with biases in the attention

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DensePlan:
    """The architecture that holds a static conversion."""

    skeleton: PreTrainedModel
    notes: tuple[str, ...]

    def zeros(self, present: Collection[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Biases of the attention that the base model lacks, for what is not `present`."""
        tied = self.skeleton.all_tied_weights_keys
        missing = {
            name: place
            for name, place in self.skeleton.state_dict().items()
            if name not in present and name not in tied
        }
        if others := [name for name in missing if not name.endswith("_proj.bias")]:
            raise FormError(f"the checkpoint would lack {len(others)} tensors ({others[0]}, ...).")
        return {name: torch.zeros(place.shape, dtype=dtype) for name, place in missing.items()}


def dense_form(model: PreTrainedModel) -> Form:
    """A static conversion as a dense model: α multiplied into down, which changes nothing but
    rounding; layers filled up with zeros to the widest; biases where a compensation has them.

    Tensors that did not change are the model's own. Raises FormError for a routed conversion, and
    if no dense architecture has a place for the biases.
    """
    if not is_static(model):
        raise FormError(
            "routed experts are chosen per token, so no dense checkpoint says the same."
        )
    plan = plan_of(model)
    tensors = other_tensors(model)
    located, mlps = located_mlps(plan.skeleton).items(), converted_mlps(model).values()
    for (path, (module, layout)), mlp in zip(located, mlps, strict=True):
        write_mlp(module, layout, mlp.folded(layout.d_ff(module)))
        tensors |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
        module.to("meta")  # again: the weights are in `tensors` now
    return Form(NAME, plan.skeleton, tensors | plan.zeros(tensors, model.dtype), notes=plan.notes)


def plan_of(model: PreTrainedModel) -> DensePlan:
    """The dense architecture for a static conversion in memory. Raises FormError."""
    mlps = converted_mlps(model).values()
    widths = [sum(mlp.sizes) for mlp in mlps]
    biased = any(mlp.down_proj.bias is not None for mlp in mlps)
    return plan_dense(model.config, type(model), widths, biased)


def plan_dense(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], widths: Sequence[int],
    biased: bool,
) -> DensePlan:  # fmt: skip
    """The dense architecture for MLPs of these widths, with or without a bias on down.

    The base model's own where it has a place for everything, else a Llama where that holds all
    the rest, else the base model's own at its full width. What a config promises is not believed
    but looked at, on the model built from it. Raises FormError.
    """
    full = _width_of(config)
    width = max(widths)
    if full is not None and full % BLOCK == 0:
        width = min(full, quantisable(width))
    for candidate, kind, narrow in _candidates(config, model_class, width, biased):
        skeleton = _built(candidate, kind)
        if skeleton is None:
            continue
        found = list(located_mlps(skeleton).values())
        sizes = [layout.d_ff(module) for module, layout in found]
        if narrow:  # or the field meant something else
            wide = set(sizes) == {width}
        else:
            wide = all(size >= one for size, one in zip(sizes, widths, strict=True))
        if wide and not (biased and any(getattr(m, a.down).bias is None for m, a in found)):
            return DensePlan(skeleton, tuple(_notes(model_class, skeleton, widths, full)))
    raise FormError(
        f"{model_class.__name__} has no place for the bias that this compensation gives each MLP."
    )


def _candidates(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], width: int, biased: bool
) -> Iterator[tuple[PreTrainedConfig, type[PreTrainedModel], bool]]:
    """Configs to try, the best first, with the class of each, and whether it is to have this
    width exactly."""
    flags = [{BIAS_FIELD: True}] if biased else []
    for field in WIDTH_FIELDS:
        for more in ({}, *flags):
            if candidate := _changed(config, WIDTH_AS_IS | {field: width} | more):
                yield candidate, model_class, True
    if biased and (llama := _as_llama(config, width)):
        yield llama, LlamaForCausalLM, True
    for more in ({}, *flags):
        if candidate := _changed(config, more):
            yield candidate, model_class, False


def _width_of(config: PreTrainedConfig) -> int | None:
    """How wide the config says that the MLPs are."""
    text = config.get_text_config(decoder=True)
    said = (getattr(text, field, None) for field in WIDTH_FIELDS)
    return next((width for width in said if isinstance(width, int)), None)


def _changed(config: PreTrainedConfig, changes: dict[str, object]) -> PreTrainedConfig | None:
    """A copy of `config` with other values in the fields that it has; None if it lacks any but
    those of WIDTH_AS_IS."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config(decoder=True)
    for field, value in changes.items():
        if hasattr(text, field):
            setattr(text, field, value)
        elif field not in WIDTH_AS_IS:
            return None
    return changed


def _as_llama(config: PreTrainedConfig, width: int) -> LlamaConfig | None:
    """The Llama that computes what this model does, with biases; None if there is none."""
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if config.model_type not in LLAMA_LIKE or windows:
        return None
    if config.model_type == "mistral" and config.sliding_window is not None:
        return None
    known = {field.name for field in fields(LlamaConfig)}
    values = {name: value for name, value in config.to_dict().items() if name in known}
    changes = {
        "intermediate_size": width,
        BIAS_FIELD: True,
        "attention_bias": LLAMA_LIKE[config.model_type],
        "architectures": None,
    }
    return LlamaConfig(**values | changes)


def _built(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedModel | None:
    try:
        return skeleton_of(config, model_class)
    except Exception:  # a config may refuse a width in as many ways as there are models
        logger.debug("%s cannot be built", model_class.__name__, exc_info=True)
        return None


def _notes(
    base: type[PreTrainedModel], skeleton: PreTrainedModel, widths: Sequence[int], full: int | None
) -> Iterator[str]:
    if type(skeleton) is not base:
        yield (
            f"Saved as {type(skeleton).__name__}, which computes the same and has a place for the "
            f"biases that {base.__name__} lacks."
        )
    has = [layout.d_ff(module) for module, layout in located_mlps(skeleton).values()]
    if full is not None and full % BLOCK == 0 and (note := block_note(max(has))):
        yield note
    if has == list(widths):
        return
    if len(set(widths)) > 1:
        yield (
            f"Layers keep {min(widths):,} to {max(widths):,} neurons, but the architecture has one "
            f"width: narrower ones are filled up to {max(has):,} with zeros and save nothing there."
        )
    elif max(has) == quantisable(max(widths)):
        yield (
            f"{max(has) - max(widths):,} of {max(has):,} neurons per layer are zeros, so that "
            f"other software can quantise them in blocks of {BLOCK}."
        )
    else:
        yield (
            f"The architecture has a fixed width: {max(has) - max(widths):,} of {max(has):,} "
            "neurons per layer are zeros, so nothing is saved."
        )

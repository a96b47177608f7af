"""A model is on one device: what is spread over several is refused in a sentence."""

from __future__ import annotations

from torch import nn

from .errors import UnsupportedModelError


def check_one_device(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model whose parameters lie on several devices, or which
    accelerate has spread over some, with the CPU's memory or the disk among them."""
    spread = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    found = {parameter.device for parameter in model.parameters()}
    places = spread if len(spread) > 1 else found
    if len(places) > 1:
        named = ", ".join(sorted(map(str, places)))
        raise UnsupportedModelError(
            f"the weights of this model lie on several devices ({named}), as "
            'device_map="auto" may put them. Load it on one that has room for all of them, such as '
            'device_map={"": "cuda:0"} or device_map={"": "cpu"}.'
        )

"""The front of recipes: each at its budget, on MLPs with a gate and without."""

from __future__ import annotations

import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert_all, mlp_modules, observe
from mlpmoe.measure.cost.parameters import parameter_report
from mlpmoe.measure.runs.front import front
from tests.families import build
from tests.tiny import tiny_model

D_FF = 192  # experts and branches divide it


def text():
    generator = torch.Generator().manual_seed(1)
    return Calibration(torch.randint(1, 64, (12, 48), generator=generator))


def share_of_zeros(model):
    weights = [
        weight
        for module in mlp_modules(model)
        for weight in module.parameters()
        if weight.ndim == 2
    ]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_every_recipe_takes_what_its_name_says(gated):
    model = tiny_model(intermediate_size=D_FF) if gated else build("gpt2", n_inner=D_FF)
    specs = front(D_FF, gated)
    observed, dense = observe(model, text()), parameter_report(model).mlp_macs_per_token
    for name, spec in specs.items():
        (converted,) = convert_all(model, [spec], observed)
        left = parameter_report(converted).mlp_macs_per_token / dense
        if "zeros" in name:
            wanted = 0.28125 if name.startswith("28.1 %") else 0.5
            # fade is shared out in steps, and a row has few weights here
            assert share_of_zeros(converted) == pytest.approx(wanted, abs=0.03), name
            assert left == 1
        else:
            wanted = 0.75 if name.startswith("75 %") else 0.5
            # routers of narrow experts take a part too
            assert left == pytest.approx(wanted, abs=0.13 if "Co-activation" in name else 0.03), (
                name
            )

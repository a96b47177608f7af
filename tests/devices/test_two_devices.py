"""A model that is spread over two devices is refused in a sentence, wherever it is given."""

import re

import pytest
import torch
from accelerate import dispatch_model

from mlpmoe import ConversionSpec, UserError, convert, export, load, parameter_report, perplexity
from mlpmoe import write_side_by_side as write
from mlpmoe.core.conversion import observe
from mlpmoe.measure.quality.drift import drift
from mlpmoe.measure.quality.encoding import encode_text
from mlpmoe.measure.runs.sweep import sweep
from tests.devices.cases import calibration
from tests.devices.stand_in import another_device, moved
from tests.tiny import byte_tokenizer, save_tiny_model, tiny_model

TEXT = "A sentence to measure, of some length. " * 4
SPEC = ConversionSpec(branches=8)
GIVEN = {
    "convert": lambda model, folder: convert(model, SPEC),
    "observe": lambda model, folder: observe(model, calibration()),
    "perplexity": lambda model, folder: perplexity(model, byte_tokenizer(), TEXT),
    "parameters": lambda model, folder: parameter_report(model),
    "drift": lambda model, folder: drift(model, model, torch.arange(9)),
    "write": lambda model, folder: next(write((model, model), byte_tokenizer(), "Once")),
    "sweep": lambda model, folder: next(
        sweep(model, encode_text(byte_tokenizer(), TEXT), [SPEC, SPEC])
    ),
    "export": lambda model, folder: export(model, folder / "out"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_model_on_two_devices_is_refused(name, tmp_path):
    with another_device() as device:
        model = tiny_model()
        if name == "export":  # of what was moved afterwards
            model = convert(model, SPEC)
        model.model.layers[1] = moved(model, device).model.layers[1].to("cpu")
        with pytest.raises(UserError) as caught:
            GIVEN[name](model, tmp_path)
    said = str(caught.value)
    assert re.search(r"several devices \(cpu, mps:0\)", said) and 'device_map={"": "cpu"}' in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", GIVEN)
def test_what_accelerate_has_spread_is_refused_by_its_map(name, tmp_path):
    model = convert(tiny_model(), SPEC) if name == "export" else tiny_model()
    places = {"model": "cpu", "lm_head": "disk"}
    dispatch_model(model, places, offload_dir=tmp_path / "parts", force_hooks=True)
    with pytest.raises(UserError, match=r"several devices \(cpu, disk\)"):
        GIVEN[name](model, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_map_of_one_place_is_no_spread(tmp_path):
    model, tokenizer = load(save_tiny_model(tmp_path / "tiny"), device="cpu")
    model.hf_device_map = {"": torch.device("cpu")}
    assert perplexity(convert(model, SPEC), tokenizer, TEXT).value > 1


@pytest.mark.parametrize("device", ["balanced", "cuda:0,cuda:1", {"": 0}, "sequential"])
def test_to_load_onto_several_is_refused(device, tmp_path):
    folder = save_tiny_model(tmp_path / "tiny")
    with pytest.raises(UserError, match=r"^device is .*; this machine has .*cpu, and auto chooses"):
        load(folder, device=device)

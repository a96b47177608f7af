"""What float16 has no numbers for is said, before a checkpoint of infinite weights is there."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlpmoe import ConversionSpec, UserError, convert, export
from mlpmoe.checkpoints.forms.form import FormError
from mlpmoe.checkpoints.write.file_export import export_files
from mlpmoe.models import preflight
from tests.tiny import byte_tokenizer, save_tiny_model, tiny_model

SPEC = ConversionSpec(branches=4, fade=0.1)
NAME = "model.layers.0.mlp.up_proj.weight"
SAID = rf"^{NAME.replace('.', '[.]')} holds numbers beyond 65,504, .* bfloat16 or float32\."


def enlarge(weight):
    weight[0, 0] = 1e5


def test_weights_in_memory(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        enlarge(model.get_parameter(NAME))
    with pytest.raises(FormError, match=SAID):
        export(convert(model, SPEC), tmp_path / "made", dtype="float16")
    assert not any(tmp_path.iterdir())


def test_weights_file_by_file(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    enlarge(tensors[NAME])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormError, match=SAID):
        export_files(preflight(base, device="cpu"), tmp_path / "made", SPEC, dtype="float16")
    assert [item.name for item in tmp_path.iterdir()] == ["base"]


def test_a_model_that_computes_more_is_not_said_to_differ(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight *= 30_000
    with pytest.raises(UserError, match="this model computes numbers beyond 65,504"):
        export(convert(model.half(), SPEC), tmp_path / "made", tokenizer=byte_tokenizer())
    assert not any(tmp_path.iterdir())

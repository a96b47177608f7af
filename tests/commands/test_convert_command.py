"""The command `convert`: from a model's name to a checkpoint that stock software opens."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from mlpmoe import ConversionSpec, convert, load
from mlpmoe.__main__ import main
from mlpmoe.checkpoints.write import target
from mlpmoe.commands import convert as convert_command
from mlpmoe.models import format_bytes
from tests.commands.common import STORIES, TEXT, refused, row, strictly
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with a model, an evaluation text and a calibration text."""
    room = tmp_path_factory.mktemp("convert")
    save_tiny_model(room / "model")
    (room / "text.txt").write_text(TEXT, encoding="utf-8")
    (room / "stories.txt").write_text(STORIES, encoding="utf-8")
    return room


@pytest.fixture
def run(room, capsys):
    """Run `convert MODEL FOLDER ...` on the short text; (status, stdout, stderr)."""

    def run(folder, *flags, model="model"):
        command = ["convert", str(room / model), str(folder), "--text", str(room / "text.txt")]
        try:
            status = main([*command, *map(str, flags)])
        except SystemExit as stopped:  # argparse
            status = stopped.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_what_is_written_is_the_conversion(run, room, tmp_path):
    status, out, err = run(tmp_path / "out", "--branches", 8, "--keep", 6, "--fade", 0.5)
    assert (status, err) == (0, "")
    assert "converted with --branches 8 --fade 0.5 --keep 6" in out
    assert float(row(out, "of the largest logit")[1]) <= 1e-5
    assert f'from_pretrained("{tmp_path / "out"}")' in out
    model, tokenizer = load(room / "model")
    wanted = convert(model, ConversionSpec(branches=8, keep=6, fade=0.5))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, wanted(ids).logits, atol=1e-5)


def test_json_and_a_spec_from_a_file(run, tmp_path):
    status, out, _ = run(tmp_path / "a", "--branches", 8, "--keep", 6, "--json")
    first = strictly(out)
    assert status == 0 and first["verification"]["passed"] is True
    assert first["spec"]["keep"] == 6 and first["dense_perplexity"] > 0
    assert json.loads((tmp_path / "a" / "conversion.json").read_text())["spec"] == first["spec"]
    status, out, _ = run(
        tmp_path / "b", "--spec-file", tmp_path / "a" / "conversion.json", "--fade", 0.25, "--json"
    )
    assert status == 0
    assert strictly(out)["spec"] == first["spec"] | {"fade": 0.25}  # flags win
    faded = ["--spec-file", tmp_path / "b" / "conversion.json"]
    status, out, _ = run(tmp_path / "c", *faded, "--sparsity", 0.3125, "--json")
    assert (status, strictly(out)["spec"]) == (0, first["spec"] | {"fade": 1.0})
    file = tmp_path / "share.json"
    file.write_text('{"branches": 8, "keep": 6, "sparsity": 0.3125}', encoding="utf-8")
    status, out, _ = run(tmp_path / "d", "--spec-file", file, "--json")
    assert (status, strictly(out)["spec"]) == (0, first["spec"] | {"fade": 1.0})


def test_a_calibrated_spec(run, room, tmp_path):
    flags = "--branches 8 --keep 6 --order activation --compensation refit".split()
    status, out, _ = run(tmp_path / "out", *flags, "--calibration", room / "stories.txt", "--json")
    made = strictly(out)
    assert status == 0 and made["calibration_text"] == "stories.txt"
    assert made["verification"]["relative_difference"] <= 1e-5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.mlp_bias is True


def test_routed_experts_and_branches(run, tmp_path):
    routed = ["--method", "random", "--experts", 6, "--active", 0.5, "--json"]
    status, out, _ = run(tmp_path / "experts", *routed)
    assert status == 0 and strictly(out)["architecture"] == "GraniteMoeSharedForCausalLM"
    status, out, _ = run(tmp_path / "branches", "--branches", 8, "--form", "branches")
    assert status == 0 and "trust_remote_code=True" in out


def test_the_dtype_of_the_files(run, tmp_path):
    status, out, _ = run(tmp_path / "out", "--branches", 8, "--dtype", "bfloat16", "--json")
    assert status == 0 and strictly(out)["verification"]["saved_dtypes"] == "BF16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_refusals_in_one_line(run, room, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    assert refused(run(full, "--keep", 6), "exists and is not empty")
    assert refused(run(tmp_path / "out", "--keep", 99), "keep (K) is 99")
    assert refused(run(tmp_path / "out", "--branches", 99), "48 neurons")
    assert refused(run(tmp_path / "out", "--form", "mixtral"), "static")
    routed = ["--method", "random", "--experts", 6, "--form", "dense"]
    assert refused(run(tmp_path / "out", *routed), "chosen per token")
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"twigs": 3}')
    assert refused(run(tmp_path / "out", "--spec-file", wrong), "unknown field")
    wrong.write_text("no json")
    assert refused(run(tmp_path / "out", "--spec-file", wrong), "not valid JSON")
    for status, _, err in (
        run(tmp_path / "out", "--form", "gguf"),
        run(tmp_path / "out", "--dtype", "int4"),
    ):
        assert status == 2 and "invalid choice" in err
    status, out, err = run(tmp_path / "out", model="missing")
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert {file.name for file in tmp_path.iterdir()} == {"full", "wrong.json"}


def test_an_interrupt_is_no_traceback(run, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlpmoe.commands.convert.export_files", interrupted)
    assert run(tmp_path / "out", "--branches", 8) == (130, "", "mlpmoe: interrupted\n")


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    out = capsys.readouterr().out
    assert "python -m mlpmoe convert demo" in out and "--spec-file" in out
    assert "granite-moe" in out and "the same command goes on" in out


def test_a_disk_that_is_too_small_is_known_before_the_training(run, room, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "free_disk", lambda folder: target.DISK_RESERVE + 1000)
    monkeypatch.setattr(convert_command, "convert", None)
    flags = ("--branches", 8, "--keep", 6, "--order", "activation", "--recover", "all")
    status, out, err = run(tmp_path / "out", *flags)
    assert (status, out) == (2, "")
    model, _ = load(room / "model")
    mlps = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    least = 4 * (model.num_parameters() - mlps + 0.75 * mlps)
    assert f"the checkpoint takes at least {format_bytes(least)}, but the disk has" in err

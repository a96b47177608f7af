"""`sweep` on a tiny saved model: what it measures, and the file that it goes on from."""

import csv
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from mlpmoe.commands import sweep as sweep_command
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.cost.parameters import parameter_report
from mlpmoe.measure.quality.perplexity import perplexity
from mlpmoe.measure.runs.front import front
from mlpmoe.measure.runs.recipes import recipes
from mlpmoe.measure.runs.sweep import comparison
from tests.commands.common import ROOT, STORIES, TEXT, refused, strictly
from tests.forked import Forked
from tests.tiny import CONTEXT, D_FF, byte_tokenizer, tiny_model


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs.jsonl"


def written(file):
    """The runs in a file, one of strict JSON a line."""
    return [strictly(line) for line in file.read_text(encoding="utf-8").splitlines()]


PRODUCT = ["--branches", "4,8", "--fade", "0,0.9", "--compensation", "none"]
PRODUCT_SPECS = [
    ConversionSpec(branches=branches, fade=fade, compensation="none")
    for branches in (4, 8)
    for fade in (0, 0.9)
]


def test_a_sweep_of_all_combinations(sweep, runs):
    status, out, err = sweep(*PRODUCT, "--out", str(runs), "--json")
    assert (status, err) == (0, "")
    found = strictly(out)
    assert [run["spec"] for run in found["runs"]] == [spec.to_dict() for spec in PRODUCT_SPECS]
    for run, spec in zip(found["runs"], PRODUCT_SPECS, strict=True):
        expected = perplexity(convert(tiny_model(), spec), byte_tokenizer(), TEXT)
        assert run["perplexity"] == pytest.approx(expected.value, rel=1e-6)
        assert run["mlp_macs_share"] == 1
    setting = found["setting"]
    assert (setting["protocol"], setting["window"]) == ("documents", CONTEXT)
    assert setting["stride"] == CONTEXT
    assert setting["text"].startswith("mine.txt ")
    lines = written(runs)
    assert len(lines) == 4
    for line, run in zip(lines, found["runs"], strict=True):
        assert line.items() >= setting.items()
        assert line["perplexity"] == run["perplexity"]
        assert line["tokens"] == 62


def test_the_table_of_a_sweep(sweep):
    status, out, err = sweep(*PRODUCT, "--keep", "4")
    assert (status, err) == (0, "")
    header, columns, *body = out.splitlines()
    assert "on mine.txt, 62 tokens" in header
    assert header.endswith("4 measured now, 0 before")
    assert columns.split("  ")[-1] == "conversion"
    assert len(body) == 4
    assert "--branches 4 --fade 0.9 --keep 4 --compensation none" in body[1]
    assert "±0.0 %" in body[1]
    assert "−50.0 %" in body[2]


def test_a_sweep_goes_on_from_its_file(sweep, runs):
    _, first, _ = sweep(*PRODUCT, "--out", str(runs))
    content = runs.read_bytes()
    assert "4 measured now, 0 before" in first
    _, second, _ = sweep(*PRODUCT, "--out", str(runs))
    assert "0 measured now, 4 before" in second
    assert second.splitlines()[1:] == first.splitlines()[1:]
    assert runs.read_bytes() == content
    _, more, _ = sweep("--branches", "4,8,2", *PRODUCT[2:], "--out", str(runs))
    assert "2 measured now, 4 before" in more
    assert runs.read_bytes().startswith(content)


def test_what_was_measured_before_is_in_the_json(sweep, runs):
    _, first, _ = sweep(*PRODUCT, "--out", str(runs), "--json")
    _, second, _ = sweep(*PRODUCT, "--out", str(runs), "--json")
    for old, new in zip(strictly(first)["runs"], strictly(second)["runs"], strict=True):
        assert new.items() >= old.items()


@pytest.mark.parametrize("left", [0.5, 1])
def test_a_line_cut_short_is_measured_again(sweep, runs, left):
    """A sweep was killed while it wrote: half of its last line, or all but its end."""
    sweep(*PRODUCT, "--out", str(runs))
    lines = runs.read_text(encoding="utf-8").splitlines()
    cut = lines[-1][: int(left * len(lines[-1]))]
    runs.write_text("\n".join([*lines[:-1], cut]), encoding="utf-8")
    _, out, _ = sweep(*PRODUCT, "--out", str(runs))
    assert ("0 measured now, 4" if left == 1 else "1 measured now, 3") in out
    again = runs.read_text(encoding="utf-8").splitlines()
    assert again == [*lines[:-1], cut, *([] if left == 1 else [lines[-1]])]
    _, out, _ = sweep(*PRODUCT, "--out", str(runs))
    assert "0 measured now, 4 before" in out


def test_lines_that_are_no_runs_are_passed_over(sweep, runs):
    runs.write_text('5\n\n[]\n{"model": 1}\nnull\nnotes\n', encoding="utf-8")
    content = runs.read_text(encoding="utf-8")
    status, out, _ = sweep("--out", str(runs))
    assert status == 0
    assert "1 measured now, 0 before" in out
    assert runs.read_text(encoding="utf-8").startswith(content)


def test_other_settings_are_not_mixed_up(sweep, runs, text, stories):
    """One file may hold them all: another text, calibration text, protocol, window or stride."""
    flags = ["--method", "cmoe", "--out", str(runs), "--json"]
    seen = set()

    def changed(*more):
        status, out, _ = sweep(*flags, *more)
        assert status == 0
        (run,) = strictly(out)["runs"]
        assert run["perplexity"] not in seen
        seen.add(run["perplexity"])
        assert len(written(runs)) == len(seen)

    changed()
    changed("--window", "16", "--stride", "8")
    changed("--window", "16", "--stride", "4")
    changed("--window", "16")
    changed("--window", "16", "--protocol", "stream")
    changed("--seqlen", "32")
    changed("--seqlen", "32", "--nsamples", "9")
    text.write_text(TEXT.replace("fox", "dog"), encoding="utf-8")
    changed()
    stories.write_text(STORIES[300:].replace("dots", "rings"), encoding="utf-8")
    changed()
    text.write_text(TEXT, encoding="utf-8")
    stories.write_text(STORIES, encoding="utf-8")
    _, out, _ = sweep(*flags)  # the first one again
    assert strictly(out)["runs"][0]["perplexity"] == written(runs)[0]["perplexity"]
    assert len(written(runs)) == len(seen) == 9


def test_values_go_to_the_methods_that_use_them(sweep):
    flags = ["--method", "mlpmoe,contiguous,neurons", "--keep", "8,8", "--active", "0.5,0.25"]
    status, out, err = sweep(*flags, "--experts", "16", "--json")
    assert (status, err) == (0, "")
    assert [run["spec"] for run in strictly(out)["runs"]] == [
        ConversionSpec(keep=8).to_dict(),
        ConversionSpec(method="contiguous", active=0.5).to_dict(),
        ConversionSpec(method="contiguous", active=0.25).to_dict(),
        ConversionSpec(method="neurons", active=0.5).to_dict(),
        ConversionSpec(method="neurons", active=0.25).to_dict(),
    ]


def test_a_sweep_of_inputs(sweep):
    flags = ["--method", "inputs", "--router", "inputs,inputs-norm", "--active", "0.5"]
    status, out, err = sweep(*flags, "--json")
    assert (status, err) == (0, "")
    runs = strictly(out)["runs"]
    assert [run["spec"]["router"] for run in runs] == ["inputs", "inputs-norm"]
    assert all(math.isfinite(run["perplexity"]) for run in runs)


def test_a_sweep_of_every_method(sweep):
    status, out, err = sweep("--compare", "--active", "0.75,0.5", "--json")
    assert (status, err) == (0, "")
    found = [(run["name"], run["spec"]) for run in strictly(out)["runs"]]
    assert found == [
        (name, spec.to_dict())
        for active in (0.75, 0.5)
        for name, (_, spec) in comparison(active).items()
    ]
    assert all(math.isfinite(run["perplexity"]) for run in strictly(out)["runs"])


def test_a_sweep_of_the_front(sweep, runs):
    _, out, _ = sweep("--front", "--out", str(runs), "--dry-run", "--json")
    assert strictly(out)["runs"] == len(front(D_FF))
    _, table, _ = sweep("--front", "--out", str(runs))
    for name, spec in front(D_FF).items():
        assert f"  {name}: {spec.to_flags()}\n" in table


def test_a_sweep_of_the_recipes(sweep, runs):
    status, out, err = sweep("--recipes", "--out", str(runs), "--json")
    assert (status, err) == (0, "")
    found = strictly(out)["runs"]
    assert [(run["name"], run["spec"]) for run in found] == [
        (name, spec.to_dict()) for name, spec in recipes().items()
    ]
    assert all(math.isfinite(run["perplexity"]) for run in found)
    by_name = {run["name"]: run for run in found}
    calibration = Calibration.from_text(byte_tokenizer(), STORIES)
    for name in ("50 % kept: … both", "28.1 % zeroed: … by SparseGPT"):
        converted = convert(tiny_model(), recipes()[name], calibration)
        expected = perplexity(converted, byte_tokenizer(), TEXT)
        assert by_name[name]["perplexity"] == pytest.approx(expected.value, rel=1e-6)
    _, table, _ = sweep("--recipes", "--out", str(runs))
    assert "0 measured now, 39 before" in table
    for name, spec in recipes().items():
        assert f"  {name}: {spec.to_flags()}\n" in table


def test_the_shares_of_what_is_left(sweep):
    flags = ["--branches", "16", "--keep", "16,8", "--fade", "0,0.9", "--compensation", "none"]
    _, out, _ = sweep(*flags, "--json")
    dense = parameter_report(tiny_model())
    found = strictly(out)["runs"]
    for run in found:
        report = parameter_report(convert(tiny_model(), ConversionSpec.from_dict(run["spec"])))
        left = report.mlp_nonzero / dense.mlp_nonzero
        assert run["mlp_nonzero_share"] == pytest.approx(left)
        assert run["mlp_macs_share"] == pytest.approx(run["spec"]["keep"] / 16)
    _, out, _ = sweep(*flags)
    header, *body = out.splitlines()[1:]
    assert header.index("MLP non-zero") < header.index("MLP compute")
    for line, run in zip(body, found, strict=True):
        *_, nonzero, compute, _ = (cell.strip() for cell in line.split("  ") if cell.strip())
        assert nonzero == f"{100 * run['mlp_nonzero_share'] - 100:+.1f} %".replace(
            "-", "−"
        ).replace("+0.0", "±0.0")
        assert compute == ("±0.0 %" if run["spec"]["keep"] == 16 else "−50.0 %")


def test_lines_of_an_older_version_are_measured_again(sweep, runs):
    """They lack the share of what is not zero."""
    _, first, _ = sweep(*PRODUCT, "--out", str(runs))
    lines = written(runs)
    for line in lines[:2]:
        assert 0 < line.pop("mlp_nonzero_share") < 1.01
    old = "".join(json.dumps(line) + "\n" for line in lines)
    runs.write_text(old, encoding="utf-8")
    _, out, _ = sweep(*PRODUCT, "--out", str(runs))
    assert "2 measured now, 2 before" in out
    assert out.splitlines()[1:] == first.splitlines()[1:]
    assert runs.read_text(encoding="utf-8").startswith(old)
    assert len(written(runs)) == 6
    assert all("mlp_nonzero_share" in line for line in written(runs)[2:])
    _, out, _ = sweep(*PRODUCT, "--out", str(runs))
    assert "0 measured now, 4 before" in out


def test_a_sweep_of_the_static_stages(sweep):
    flags = ["--fade", "0.5", "--fade-schedule", "linear,power", "--fade-unit", "weight,neuron"]
    status, out, err = sweep(*flags, "--json")
    assert (status, err) == (0, "")
    found = [run["spec"] for run in strictly(out)["runs"]]
    assert found == [
        ConversionSpec(fade=0.5, fade_schedule=schedule, fade_unit=unit).to_dict()
        for schedule in ("linear", "power")
        for unit in ("weight", "neuron")
    ]


def test_fields_without_use_in_a_combination_are_left_out(sweep):
    flags = ["--fade", "0.5", "--fade-unit", "weight,2:4", "--fade-schedule", "linear,power"]
    _, out, _ = sweep(*flags, "--json")
    assert [run["spec"] for run in strictly(out)["runs"]] == [
        ConversionSpec(fade=0.5).to_dict(),
        ConversionSpec(fade_unit="2:4").to_dict(),
        ConversionSpec(fade=0.5, fade_schedule="power").to_dict(),
    ]


def test_branches_that_are_not_there_are_counted(sweep):
    status, out, _ = sweep("--branches", "4:12:4", "--keep", "75%,7", "--fade", "0.9")
    assert status == 0
    assert out.splitlines()[0].endswith("5 measured now, 0 before, 1 left out with K above B")


# A sweep file ------------------------------------------------------------------------------


@pytest.fixture
def spec_file(tmp_path):
    file = tmp_path / "sweep.json"
    content = {"branches": "4,8", "fade": "0:0.9:0.9", "compensation": "none"}
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def test_a_sweep_file_is_the_same_as_flags(sweep, runs, spec_file):
    _, flags, _ = sweep(*PRODUCT, "--out", str(runs), "--json")
    before = runs.read_bytes()
    _, file, _ = sweep("--spec-file", str(spec_file), "--out", str(runs), "--json")
    assert strictly(file) == strictly(flags)
    assert runs.read_bytes() == before


def test_flags_replace_the_values_of_a_sweep_file(sweep, spec_file):
    flags = ["--branches", "2", "--order", "norm"]
    _, out, _ = sweep("--spec-file", str(spec_file), *flags, "--json")
    assert [run["spec"] for run in strictly(out)["runs"]] == [
        ConversionSpec(branches=2, fade=fade, order="norm", compensation="none").to_dict()
        for fade in (0, 0.9)
    ]


def test_fade_and_a_share_of_zeros_replace_each_other(sweep, spec_file):
    def fades(*flags):
        _, out, _ = sweep("--spec-file", str(spec_file), *flags, "--branches", "2", "--json")
        return [run["spec"]["fade"] for run in strictly(out)["runs"]]

    assert fades("--sparsity", "0:0.25:0.125") == [0, 0.5, 1]
    content = {"sparsity": [0.125], "compensation": "none"}
    spec_file.write_text(json.dumps(content), encoding="utf-8")
    assert fades() == [0.5]
    assert fades("--fade", "0.25") == [0.25]


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ("{", [], "is not valid JSON"),
        ('{"speed": 1}', [], "no field of a conversion is called 'speed'"),
        ('{"branches": null}', [], "--branches in the sweep file must be a text"),
        ('{"branches": 8}', ["--recipes"], "--recipes takes no spec flags"),
        ('{"branches": 8}', ["--compare"], "--compare takes no other spec flag"),
    ],
)
def test_sweep_files_that_are_refused(sweep, spec_file, content, flags, words):
    spec_file.write_text(content, encoding="utf-8")
    assert refused(sweep("--spec-file", str(spec_file), *flags), words)


def test_a_sweep_file_that_is_not_there(sweep, tmp_path):
    status, out, err = sweep("--spec-file", str(tmp_path / "none.json"))
    assert (status, out) == (1, "")
    assert "none.json cannot be read: No such file" in err


# Tables and plans --------------------------------------------------------------------------


def test_a_sweep_as_csv(sweep, folder):
    status, out, err = sweep(*PRODUCT, "--csv")
    assert (status, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out), strict=True))
    _, as_json, _ = sweep(*PRODUCT, "--json")
    found = strictly(as_json)["runs"]
    assert len(rows) == len(found) == 4
    for row, run in zip(rows, found, strict=True):
        spec = run.pop("spec")
        assert (row["name"], row["model"], row["text"], row["tokens"]) == (
            "", str(folder), "mine.txt", "62",
        )  # fmt: skip
        for name, value in (spec | run).items():
            assert row[name] == ("" if value is None else str(value))


def test_csv_of_named_runs(sweep):
    _, out, _ = sweep("--recipes", "--csv")
    rows = list(csv.DictReader(io.StringIO(out), strict=True))
    assert [row["name"] for row in rows] == list(recipes())


def test_a_plan_measures_nothing(sweep, runs):
    flags = ["--branches", "4,8", "--keep", "2,6", "--out", str(runs)]
    status, out, err = sweep(*flags, "--dry-run")
    assert (status, err) == (0, "")
    assert out.startswith("3 runs, 0 known and 3 to measure, 1 left out with K above B; about ")
    assert not runs.exists()
    sweep("--branches", "8", "--keep", "2", "--out", str(runs))
    before = runs.read_bytes()
    _, out, _ = sweep(*flags, "--dry-run", "--json")
    plan = strictly(out)
    assert plan.pop("seconds") > 0
    assert plan == {"runs": 3, "known": 1, "left_out": 1}
    sweep(*flags)
    _, out, _ = sweep(*flags, "--dry-run")
    assert out == "3 runs, 3 known and 0 to measure, 1 left out with K above B\n"
    assert len(runs.read_bytes()) > len(before)


def test_a_person_sees_the_time_left(sweep, monkeypatch):
    said = []
    monkeypatch.setattr(sweep_command, "progress", lambda message, share=None: said.append(message))
    sweep(*PRODUCT)
    assert any(re.fullmatch(r"perplexity, 1 of 4 measured, about \d+ s left", m) for m in said)
    assert said[-1] == ""


# Killed, and gone on -----------------------------------------------------------------------

MANY = ["--branches", "2:48:1", "--fade", "0.5,0.9"]


class Started:
    """A sweep in a process of its own, and what it writes to stdout and stderr."""

    def __init__(self, folder, text, runs, *flags):
        self.files = [runs.with_name(name) for name in ("stdout", "stderr")]
        command = [sys.executable, "-m", "mlpmoe", "sweep", folder, "--text", text, *MANY, "--out",
                   runs, *flags]  # fmt: skip
        with open(self.files[0], "wb") as out, open(self.files[1], "wb") as err:
            self.process = Forked(command, cwd=ROOT, env=os.environ, stdout=out, stderr=err)

    def said(self):
        return [file.read_text() for file in self.files]

    def wait_for_lines(self, runs, count):
        """Until the file has that many whole lines; fails if the process ends before."""
        deadline = time.monotonic() + 240
        while not runs.exists() or runs.read_bytes().count(b"\n") < count:
            assert time.monotonic() < deadline
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"ended with {self.process.wait(0.02)}: {self.said()}")


def test_a_killed_sweep_goes_on_where_it_was(sweep, folder, text, runs):
    started = Started(folder, text, runs)
    try:
        started.wait_for_lines(runs, 3)
    finally:
        started.process.kill()
        started.process.wait()
    left = runs.read_bytes()
    known = left.count(b"\n")
    assert 3 <= known < 94
    status, out, _ = sweep(*MANY, "--out", str(runs), "--json")
    assert status == 0
    assert runs.read_bytes().startswith(left)
    lines = runs.read_bytes().split(b"\n")
    if not left.endswith(b"\n"):  # killed while it wrote
        del lines[known]
    entries = [strictly(line.decode()) for line in lines if line]
    found = strictly(out)["runs"]
    assert len(found) == 94
    specs = [ConversionSpec.from_dict(entry["spec"]) for entry in entries]
    assert len(set(specs)) == len(specs) == 94  # none lost, none measured twice
    by_spec = dict(zip(specs, entries, strict=True))
    for run in found:
        entry = by_spec[ConversionSpec.from_dict(run["spec"])]
        assert entry.items() >= {k: v for k, v in run.items() if k != "name"}.items()
    some = found[0]
    expected = perplexity(
        convert(tiny_model(), ConversionSpec.from_dict(some["spec"])), byte_tokenizer(), TEXT
    )
    assert some["perplexity"] == pytest.approx(expected.value, rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_an_interrupted_sweep_on_ray_goes_on_here(sweep, folder, text, runs):
    started = Started(folder, text, runs, "--engine", "ray", "--workers", "1")
    try:
        started.wait_for_lines(runs, 2)
        children = psutil.Process(started.process.pid).children(recursive=True)
        os.kill(started.process.pid, signal.SIGINT)
        status = started.process.wait(timeout=120)
    finally:
        started.process.kill()
    assert not psutil.wait_procs(children, timeout=60)[1]  # nothing is left running
    if status == 0:
        pytest.skip("the sweep was done before the interrupt came")
    out, err = started.said()
    assert (status, out) == (130, "")
    assert err.endswith("mlpmoe: interrupted\n")
    known = runs.read_bytes().count(b"\n")
    status, out, _ = sweep(*MANY, "--out", str(runs))
    assert status == 0
    assert f"{94 - known} measured now, {known} before" in out
    entries = written(runs)
    assert len({json.dumps(entry["spec"]) for entry in entries}) == len(entries) == 94


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--experts", "8"], "--experts does not belong to mlpmoe"),
        (["--method", "cmoe,neurons", "--keep", "8"], "--keep does not belong to cmoe, neurons"),
        (["--method", "cmoe", "--order", "norm"], "--order does not belong to cmoe"),
        (["--method", "magic"], "must be one of"),
        (["--branches", "4,x"], "--branches must be a whole number or a range"),
        (["--branches", "4,"], "such as 4:32:4, not ''"),
        (["--fade", "0,7"], "--fade 7: fade must be a number between 0 and 2"),
        (["--fade", "0:7"], "start:stop:step such as 0:0.9:0.3, not '0:7'"),
        (["--keep", "half"], "all, a percentage of B such as 75%"),
        (["--branches", "4", "--keep", "5"], "--keep (K) above its --branches (B)"),
        (["--branches", "1:48:1", "--fade", "0:2:0.001"], "96,048 combinations"),
        (["--branches", "4,500"], "between 1 and 48"),
        (["--method", "cmoe", "--active", "0.2", "--shared", "0.5"], "at most"),
        (["--compare", "--fade", "0.5"], "--compare takes no other spec flag than --active"),
        (["--compare", "--active", "1.5"], "between"),
        (["--compare", "--active", "0.5", "--method", "cmoe"], "--compare takes no other"),
        (["--fade-schedule", "linear,magic"], "linear, uniform, reverse, power"),
        (["--fade-unit", "2:4", "--fade", "0.5"], "leave fade at 0"),
        (["--method", "cmoe", "--fade-score", "wanda"], "--fade-score does not belong to cmoe"),
        (["--recipes", "--keep", "12"], "--recipes takes no spec flags and no --compare"),
        (["--recipes", "--method", "cmoe"], "--recipes takes no spec flags and no --compare"),
        (["--recipes", "--fade-unit", "2:4"], "--recipes takes no spec flags"),
        (["--front", "--active", "0.5"], "--front takes no spec flags"),
        (["--front", "--compare"], "--front takes no spec flags and no --compare"),
        (["--recipes", "--front"], "give one of --compare, --recipes and --front"),
        (["--recipes", "--compare"], "--recipes takes no spec flags and no --compare"),
        (["--recipes", "--compare", "--active", "0.5"], "--recipes takes no spec flags"),
        (["--json", "--csv"], "--csv stands alone"),
        (["--dry-run", "--csv"], "--csv stands alone"),
        (["--workers", "2"], "--workers is for --engine ray"),
    ],
)
def test_wrong_values_of_a_sweep_are_refused(sweep, runs, flags, words):
    assert refused(sweep(*flags, "--out", str(runs)), words)
    assert not runs.exists()

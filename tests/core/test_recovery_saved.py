"""A recovery that was killed or stopped goes on where it was, and ends as if nothing had been."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, recovery_of
from mlpmoe.core.recovery import course as courses
from mlpmoe.core.recovery import saved
from mlpmoe.core.spec import ConversionSpec
from tests.families import VOCABULARY, build

SPECS = {
    "all": ConversionSpec(branches=4, keep=2, recover="all", recover_steps=48),
    "lora": ConversionSpec(branches=4, keep=2, recover="lora", recover_steps=48),
    "router": ConversionSpec(method="random", experts=4, active=0.5, recover="router", seed=2,
                             recover_steps=48),
    "masks": ConversionSpec(method="tokenclusters", experts=4, active=0.5, recover="masks", seed=2,
                            recover_steps=48),
}  # fmt: skip


class Killed(BaseException):
    pass


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(5)
    return Calibration(torch.randint(2, VOCABULARY, (40, 32), generator=generator))


@pytest.fixture(scope="module")
def dense():
    return build("llama")


@pytest.fixture(scope="module")
def whole(dense, text):
    """Each of SPECS without a break."""
    return {name: convert(dense, spec, text) for name, spec in SPECS.items()}


def convert_until(step, *args, state, **kwargs):
    """Convert, and be killed when so many steps are done: the disk stays as it is then."""
    then = state.with_name("then")

    def tell(message, share):
        if f"step {step} of" in message and not then.exists():
            state.mkdir(parents=True, exist_ok=True)
            shutil.copytree(state, then)
            raise Killed

    with pytest.raises(Killed):
        convert(*args, on_progress=tell, state=state, **kwargs)
    shutil.rmtree(state)
    then.rename(state)


def stop_at(step, *args, **kwargs):
    """Convert, and stop when so many steps are done."""

    def tell(message, share):
        if f"step {step} of" in message:
            raise Stopped

    with pytest.raises(Stopped):
        convert(*args, on_progress=tell, **kwargs)


def assert_same(one, other):
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    mine, theirs = (recovery_of(m) for m in (one, other))
    assert replace(mine, seconds=0) == replace(theirs, seconds=0)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("killed", [(23,), (47, 41), (21, 22, 45), (5,)])
def test_it_ends_with_the_same_bits(dense, text, whole, tmp_path, name, killed, monkeypatch):
    spec, folder = SPECS[name], tmp_path / "not" / "there"
    for step in killed:
        convert_until(step, dense, spec, text, state=folder)
    assert len(list(folder.glob("*"))) == (max(killed) > 20)
    steps = steps_taken(monkeypatch)
    resumed = convert(dense, spec, text, state=folder)
    assert steps[0] == (40 if 40 <= max(killed) else 20 if 20 <= max(killed) else 0)
    assert_same(resumed, whole[name])
    assert not list(folder.glob("*"))  # it is done


def test_a_fingerprint_is_of_every_bit(dense, text, whole):
    mine = recovery_of(whole["all"]).result
    again = recovery_of(convert(dense, SPECS["all"], text)).result
    other = recovery_of(convert(dense, replace(SPECS["all"], seed=1), text)).result
    assert mine == again != other and len(mine) == 12


def steps_taken(monkeypatch):
    """The numbers of the steps that are taken from now on, as they come."""
    steps, train = [], courses.Course._train

    def counted(course):
        steps.append(course.step)
        return train(course)

    monkeypatch.setattr(courses.Course, "_train", counted)
    return steps


@pytest.mark.parametrize("name", SPECS)
def test_a_stop_keeps_every_step(dense, text, whole, tmp_path, name, monkeypatch):
    spec = SPECS[name]
    for step in (5, 23, 24, 45):
        stop_at(step, dense, spec, text, state=tmp_path)
    steps = steps_taken(monkeypatch)
    assert_same(convert(dense, spec, text, state=tmp_path), whole[name])
    assert steps == [45, 46, 47]


def test_a_stop_within_a_look_costs_the_look_only(dense, text, whole, tmp_path, monkeypatch):
    spec, divergence = SPECS["all"], courses.Course._divergence

    def stopping(course, ids, step=None):
        if course.step == 12 and not torch.is_grad_enabled():
            raise Stopped
        return divergence(course, ids, step)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(courses.Course, "_divergence", stopping)
        convert(dense, spec, text, state=tmp_path)
    steps = steps_taken(monkeypatch)
    assert_same(convert(dense, spec, text, state=tmp_path), whole["all"])
    assert steps[0] == 12


def test_what_breaks_within_an_update_is_not_kept(dense, text, whole, tmp_path, monkeypatch):
    """The numbers may be of two steps then: the file of before stays."""
    spec, step, done = SPECS["all"], torch.optim.AdamW.step, []

    def breaking(optimizer, *args, **kwargs):
        done.append(step(optimizer, *args, **kwargs))
        if len(done) == 31:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", breaking)
        convert(dense, spec, text, state=tmp_path)
    steps = steps_taken(monkeypatch)
    assert_same(convert(dense, spec, text, state=tmp_path), whole["all"])
    assert steps[0] == 20


@pytest.mark.parametrize("what", ["spec", "text", "dense model"])
def test_another_recovery_is_not_continued(dense, text, tmp_path, what):
    spec = SPECS["all"]
    convert_until(30, dense, spec, text, state=tmp_path)
    if what == "spec":
        spec = replace(spec, seed=1)
    elif what == "text":
        text = Calibration(text.samples.flip(0))
    else:
        dense = build("llama", rms_norm_eps=1e-3)
    assert_same(convert(dense, spec, text, state=tmp_path), convert(dense, spec, text))
    assert len(list(tmp_path.glob("*"))) == 1  # of the first


@pytest.mark.parametrize("damage", [b"", b"no file of torch", None])
def test_a_damaged_file_is_passed_over(dense, text, whole, tmp_path, damage):
    spec = SPECS["all"]
    convert_until(30, dense, spec, text, state=tmp_path)
    (file,) = tmp_path.glob("*")
    file.write_bytes(file.read_bytes()[:-1000] if damage is None else damage)
    assert_same(convert(dense, spec, text, state=tmp_path), whole["all"])


def test_a_file_runs_nothing_and_holds_plain_values(dense, text, tmp_path):
    convert_until(30, dense, SPECS["all"], text, state=tmp_path)
    (file,) = tmp_path.glob("*")
    found = torch.load(file, weights_only=True)
    assert found["step"] == 20 and found["key"].startswith(file.stem)


def test_a_folder_that_cannot_be_written_to_costs_the_way_back_only(dense, text, whole, tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    assert_same(convert(dense, SPECS["all"], text, state=blocked), whole["all"])


def test_what_nobody_came_back_to_goes(dense, text, tmp_path):
    old, new, other = (tmp_path / name for name in ("a.recovery", "b.recovery", "c.txt"))
    for file in (old, new, other):
        file.write_text("")
    long_ago = time.time() - saved.OLD - 60
    os.utime(old, (long_ago, long_ago))
    os.utime(other, (long_ago, long_ago))
    convert(dense, SPECS["all"], text, state=tmp_path)
    assert sorted(tmp_path.glob("*")) == [new, other]


def test_few_are_kept_and_the_disk_is_not_filled(dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "KEPT", 2)
    for seed in range(4):
        stop_at(20, dense, replace(SPECS["lora"], seed=seed), text, state=tmp_path)
        for file in tmp_path.glob("*"):  # a second passes
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 1))
    assert len(list(tmp_path.glob("*"))) == 2
    steps = steps_taken(monkeypatch)
    convert(dense, replace(SPECS["lora"], seed=2), text, state=tmp_path)
    assert steps[0] == 20  # one of the two latest
    free = namedtuple("Usage", "free")(saved.RESERVE)
    monkeypatch.setattr(saved.shutil, "disk_usage", lambda folder: free)
    stop_at(30, dense, SPECS["all"], text, state=tmp_path / "full")
    assert not list((tmp_path / "full").glob("*"))


def test_what_was_being_written_as_a_process_was_killed_goes(dense, text, tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as done:
        pass
    dead, alive = (tmp_path / f"{'a' * 32}.{pid}.partial" for pid in (done.pid, os.getpid()))
    for file in (dead, alive):
        file.write_bytes(b"half")
    stop_at(20, dense, SPECS["all"], text, state=tmp_path)
    assert not dead.exists() and alive.exists()


def test_an_interrupt_within_the_writing_leaves_nothing_half(dense, text, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def interrupted(values, file):
        calls.append(values["step"])
        save(values, file)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", interrupted)
        convert(dense, SPECS["all"], text, state=tmp_path)
    assert calls == [20, 20]
    (file,) = tmp_path.glob("*")
    assert torch.load(file, weights_only=True)["step"] == 20

"""A recovery that was killed goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, recovery_of
from mlpmoe.core.recovery import recover as recovering
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


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(5)
    return Calibration(torch.randint(2, VOCABULARY, (40, 32), generator=generator))


@pytest.fixture(scope="module")
def dense():
    return build("llama")


def convert_until(step, *args, **kwargs):
    """Convert, and be killed when so many steps are done."""

    def tell(message, share):
        if f"step {step} of" in message:
            raise Killed

    with pytest.raises(Killed):
        convert(*args, on_progress=tell, **kwargs)


def assert_same(one, other):
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    mine, theirs = (recovery_of(m) for m in (one, other))
    assert replace(mine, seconds=0) == replace(theirs, seconds=0)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("killed", [(23,), (47, 41), (21, 22, 45), (5,)])
def test_it_ends_with_the_same_bits(dense, text, tmp_path, name, killed, monkeypatch):
    spec, folder = SPECS[name], tmp_path / "not" / "there"
    whole = convert(dense, spec, text)
    for step in killed:
        convert_until(step, dense, spec, text, state=folder)
    assert len(list(folder.glob("*"))) == (max(killed) > 20)
    steps, train = [], recovering._Course._train

    def counted(course):
        steps.append(course.step)
        return train(course)

    monkeypatch.setattr(recovering._Course, "_train", counted)
    resumed = convert(dense, spec, text, state=folder)
    assert steps[0] == (40 if 40 <= max(killed) else 20 if 20 <= max(killed) else 0)
    assert_same(resumed, whole)
    assert not list(folder.glob("*"))  # it is done


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
def test_a_damaged_file_is_passed_over(dense, text, tmp_path, damage):
    spec = SPECS["all"]
    convert_until(30, dense, spec, text, state=tmp_path)
    (file,) = tmp_path.glob("*")
    file.write_bytes(file.read_bytes()[:-1000] if damage is None else damage)
    assert_same(convert(dense, spec, text, state=tmp_path), convert(dense, spec, text))


def test_a_file_runs_nothing_and_holds_plain_values(dense, text, tmp_path):
    convert_until(30, dense, SPECS["all"], text, state=tmp_path)
    (file,) = tmp_path.glob("*")
    found = torch.load(file, weights_only=True)
    assert found["step"] == 20 and found["key"].startswith(file.stem)


def test_a_folder_that_cannot_be_written_to_costs_the_way_back_only(dense, text, tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    assert_same(
        convert(dense, SPECS["all"], text, state=blocked), convert(dense, SPECS["all"], text)
    )


def test_what_nobody_came_back_to_goes(dense, text, tmp_path):
    old, new, other = (tmp_path / name for name in ("a.recovery", "b.recovery", "c.txt"))
    for file in (old, new, other):
        file.write_text("")
    long_ago = time.time() - saved.OLD - 60
    os.utime(old, (long_ago, long_ago))
    os.utime(other, (long_ago, long_ago))
    convert(dense, SPECS["all"], text, state=tmp_path)
    assert sorted(tmp_path.glob("*")) == [new, other]

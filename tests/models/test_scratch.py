"""Temporary folders go with their process, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlpmoe.models import scratch
from mlpmoe.models.ending import GRACE
from mlpmoe.models.scratch import LOCK, PREFIX, scratch_folder, scratch_root, sweep_scratch
from tests.interrupts import take_interrupts

# The two modules alone: neither needs torch.
BUSY = """
import multiprocessing, sys, time, types
from pathlib import Path
sys.path.insert(0, {models!r})
package = types.ModuleType("models")
package.__path__ = [{models!r}]
sys.modules["models"] = package
from models.ending import end_when_asked
from models.scratch import scratch_folder
end_when_asked()
try:
    with scratch_folder("work", Path(sys.argv[1])) as folder:
        if sys.argv[2] == "forks":
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            time.sleep(0.3)
            child.terminate()
            child.join()
            assert child.exitcode == -15
        (folder / "weights").write_bytes(b"w" * 1000)
        said = str(folder)
        while True:
            try:
                print(said, flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                if sys.argv[2] == "obeys":
                    raise
except KeyboardInterrupt:
    print("tidied up", flush=True)
"""


@pytest.fixture
def busy(tmp_path):
    """Start a process that works in a scratch folder below tmp_path; it and that folder."""
    started = []

    def start(manner="obeys"):
        code = BUSY.format(models=str(Path(scratch.__file__).parent))
        process = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path, manner],
            stdout=subprocess.PIPE, text=True, preexec_fn=take_interrupts,
        )  # fmt: skip
        started.append(process)
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_below_the_root_of_this_process(tmp_path):
    with scratch_folder("work", tmp_path) as folder:
        assert folder.is_dir() and folder.parent == scratch_root(tmp_path)
        assert folder.parent.name.startswith(PREFIX)
        assert os.stat(folder).st_mode & 0o077 == 0  # nobody else's business
    assert not folder.exists()
    with scratch_folder("work", tmp_path) as other:
        assert other.parent == folder.parent
    scratch.remove_scratch()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_asked_process_tidies_up(busy, tmp_path, number):
    process, folder = busy()
    assert folder.is_dir()
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    assert process.stdout.read() == "tidied up\n"
    assert list(tmp_path.iterdir()) == []


def test_who_does_not_end_is_cut_off(busy, tmp_path):
    process, _ = busy("goes on")
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 3
    assert list(tmp_path.iterdir()) == []


def test_a_second_request_cuts_off_at_once(busy, tmp_path):
    process, _ = busy("goes on")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(1) == 130
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_a_forked_process_is_its_own(busy, tmp_path):
    process, folder = busy("forks")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(GRACE + 0.5)
    assert folder.is_dir()


def test_the_next_process_removes_what_a_killed_one_left(busy, tmp_path):
    (dead, left), (_, alive) = busy(), busy()
    dead.kill()
    dead.wait()
    assert (left / "weights").is_file()
    others = tmp_path / "somebody-elses"
    others.mkdir()
    sweep_scratch(tmp_path)
    assert not left.parent.exists()
    assert alive.is_dir() and others.is_dir()


def test_a_sweep_follows_no_link_and_waits_for_who_has_no_lock_yet(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / LOCK).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(precious)
    new, old = (tmp_path / f"{PREFIX}{age}" for age in ("new", "old"))
    for folder in (new, old):
        folder.mkdir()
    os.utime(old, (0, 0))
    sweep_scratch(tmp_path)
    assert precious.is_dir() and new.is_dir() and not old.exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the folder for temporary files, .*, cannot be written"):
        scratch_root(tmp_path / "file")

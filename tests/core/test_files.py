"""Reading with a limit, trying an output, and the words for what any library failed to write."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlpmoe.core.errors import UserError
from mlpmoe.core.files import check_output, read_limited, write_reason


def test_a_file_or_a_pipe_up_to_the_limit(tmp_path):
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_bytes(b"four")
    assert read_limited(file, 4) == b"four"
    os.mkfifo(pipe)
    with subprocess.Popen(["cp", file, pipe]):
        assert read_limited(pipe, 4) == b"four"
    for endless in (file, Path("/dev/zero")):
        with pytest.raises(UserError, match="too large: at most 3 bytes"):
            read_limited(endless, 3)
    with pytest.raises(OSError, match=r"none cannot be read: No such file or directory\.$"):
        read_limited(tmp_path / "none", 3)


def test_an_output_is_tried_and_left_as_it_was(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_bytes(b"runs")
    for file in (new, old):
        check_output(file)
    assert old.read_bytes() == b"runs"
    assert sorted(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize(
    ("name", "words"),
    [(".", "name one in a folder that exists"), ("none/new", "name one in a folder that exists"),
     ("old/new", "name one in a folder that exists"), ("n" * 300, "File name too long"),
     ("/dev/full", "not an ordinary file"), ("/proc/new", "cannot be written")],
)  # fmt: skip
def test_what_cannot_be_an_output(tmp_path, name, words):
    (tmp_path / "old").touch()
    with pytest.raises(UserError, match=words):
        check_output(tmp_path / name)


LIMITED = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from mlpmoe.core.files import write_reason
vocabulary = {f"{number:0100}": number for number in range(1000)}
writers = [
    lambda file: Path(file).write_bytes(b"w" * 100_000),
    lambda file: save_file({"w": torch.zeros(100_000)}, file),
    lambda file: torch.save(torch.zeros(100_000), file),
    lambda file: Tokenizer(models.WordLevel(vocabulary, unk_token="0")).save(file),
]
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for number, write in enumerate(writers):
    try:
        write(f"{sys.argv[1]}/{number}")
    except Exception as error:
        print(write_reason(error))
"""


def test_every_library_has_the_same_words(tmp_path):
    said = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    large = "a file may not become as large here."
    assert said == [large, large, "the disk is full, or took only a part.", large]


def test_words_for_what_the_system_says():
    assert write_reason(OSError(errno.ENOSPC, "No space left on device")) == "the disk is full."
    assert write_reason(Exception("IoError: x (os error 28)")) == "the disk is full."
    assert "read-only" in write_reason(OSError(errno.EROFS, "Read-only file system"))
    assert write_reason(OSError(errno.EIO, "Input/output error")) == "Input/output error."
    assert write_reason(ValueError("no file at all")) is None

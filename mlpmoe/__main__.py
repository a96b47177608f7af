"""The command line: `python -m mlpmoe COMMAND`. Each command is thin over one of the library's."""

from __future__ import annotations

import io
import os
import sys
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import transformers

from .commands import bench, convert, evaluate, frontier, models, study, sweep
from .commands.terminal import progress
from .core.errors import CalibrationWarning, UnsupportedModelError, UserError
from .core.files import write_reason
from .models import ModelError
from .models.ending import Terminated, end_when_asked
from .models.scratch import sweep_scratch

COMMANDS = (models, evaluate, sweep, frontier, convert, study, bench)
EXAMPLES = """examples:
  python -m mlpmoe models
  python -m mlpmoe evaluate demo --branches 16 --fade 0.9
  python -m mlpmoe evaluate qwen2.5-0.5b --keep 12 --compensation none --text mine.txt --json
  python -m mlpmoe sweep demo --compare --active 0.75,0.5 --out runs.jsonl
  python -m mlpmoe frontier demo --budget 0.7
  python -m mlpmoe convert demo demo-12 --keep 12
  python -m mlpmoe study apart
  python -m mlpmoe bench --quick
"""
EXIT_STATUS = (
    "exit status: 0 done, 1 failed, 2 wrong usage or a value out of range, 130 interrupted"
)


def process() -> int:
    """`main` as a process of its own, which ends soon after it is asked to, and removes what killed
    ones have left."""
    try:
        end_when_asked()
        sweep_scratch()
        return main()
    except KeyboardInterrupt as asked:  # before a command has begun
        return _interrupted(asked)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± or √ gets a ?
    arguments = _parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with _warnings_as_sentences():
            arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(_in_words(error), 1)
    except (ModelError, UnsupportedModelError, UnicodeError) as error:
        return _fail(error, 1)
    except UserError as error:
        return _fail(error, 2)
    except KeyboardInterrupt as asked:
        return _interrupted(asked)


@contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """What a person should know of their calibration text, without Python's ornaments."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: object) -> None:
            if not issubclass(category, CalibrationWarning):
                return usual(message, category, *where)
            progress("")
            print(f"mlpmoe: {message}", file=sys.stderr)

        warnings.simplefilter("always", CalibrationWarning)
        warnings.showwarning = show
        yield


def _interrupted(asked: KeyboardInterrupt) -> int:
    return _fail("ended", 143) if isinstance(asked, Terminated) else _fail("interrupted", 130)


def _in_words(error: OSError) -> str:
    """The message of an error of ours, or what the system says, without its number."""
    if error.errno is None:
        return str(error)
    if error.filename is None:  # what this command prints
        return f"the output cannot be written: {write_reason(error)}"
    return f"{error.filename}: {error.strerror}."


def _fail(reason: object, status: int) -> int:
    progress("")
    print(f"mlpmoe: {' '.join(str(reason).split())}", file=sys.stderr)
    return status


def _parser() -> ArgumentParser:
    layout = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser(
        "python -m mlpmoe",
        description="Turn the dense MLPs of a language model into a mixture of experts, and "
        "measure it.",
        epilog=f"{EXAMPLES}\n{EXIT_STATUS}",
        **layout,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        examples = getattr(command, "EXAMPLES", None)
        made = commands.add_parser(
            command.NAME, help=command.HELP, description=command.HELP, epilog=examples, **layout
        )
        made.add_argument("--json", action="store_true", help="one JSON object, nothing rounded")
        command.add_arguments(made)
        made.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(process())

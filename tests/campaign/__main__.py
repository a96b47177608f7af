"""Run a part of the campaign; see the package."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tests.campaign.clients import campaign as clients
from tests.campaign.faults import campaign as faults
from tests.campaign.hostile import campaign as hostile


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign")
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("clients", help="many programs at once")
    part.add_argument("--model", default="demo")
    part.add_argument("--count", type=int, default=20)
    part.add_argument("--minutes", type=float, default=10.0)
    part.add_argument("--calibrated", action="store_true", help="calibrated conversions too")
    part.set_defaults(
        run=lambda at, got: clients(at, got.model, got.count, got.minutes, got.calibrated)
    )
    part = parts.add_parser("hostile", help="input that nobody's program means to send")
    part.set_defaults(run=lambda at, got: hostile(at))
    part = parts.add_parser("faults", help="sudden ends, full disks, two writers")
    part.add_argument("--model", default="demo")
    part.add_argument("--moments", type=int, default=20, help="at which each work is killed")
    part.add_argument("--only", nargs="*", default=(), help="of these works, app and disks")
    part.set_defaults(run=lambda at, got: faults(at, got.model, got.moments, tuple(got.only)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background too: see `faults`
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlpmoe-campaign-") as folder:
        table = chosen.run(Path(folder), chosen)
    print(table)
    return 0 if table.fine else 1


if __name__ == "__main__":
    sys.exit(main())

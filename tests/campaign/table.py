"""What a campaign found, as a table for the docs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass
class Table:
    title: str
    rows: list[tuple[str, str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # for whoever runs it, not for the docs

    def row(self, what: str, found: str, fine: bool = True) -> None:
        self.rows.append((what, found, fine))
        print(f"{what}: {found}", file=sys.stderr, flush=True)

    def fault(self, note: str) -> None:
        """What is wrong, said at once: the rest may take long."""
        self.notes.append(note)
        print(f"  fault: {note}", file=sys.stderr, flush=True)

    def ends(self, what: str, signal: str, faults: Iterable[str], found: Callable[[], str]) -> None:
        """The row of a work that was ended by a signal again and again. faults: as they are found.
        found: what there is to say once it is over."""
        wrong = 0
        for each in faults:
            self.fault(f"{what}, {each}")
            wrong += 1
        self.row(f"{what}, {signal}", found() + (f"; {wrong} faults" if wrong else ""), not wrong)

    @property
    def fine(self) -> bool:
        return all(fine for *_, fine in self.rows)

    def __str__(self) -> str:
        lines = [f"| {self.title} | |", "|---|---|"]
        lines += [
            f"| {what} | {found}{'' if fine else ' **(not as it should be)**'} |"
            for what, found, fine in self.rows
        ]
        return "\n".join([*lines, *(f"<!-- {note} -->" for note in self.notes)])

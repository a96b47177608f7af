"""What a campaign found, as a table for the docs."""

from __future__ import annotations

import sys
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

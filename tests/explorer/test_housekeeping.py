"""Memory that was freed goes back to the system once it is worth it."""

from __future__ import annotations

from mlpmoe.explorer.server.housekeeping import GROWTH, look_after_memory

LEAST = 10 * GROWTH


def looked(*in_use: int) -> tuple[int, int]:
    """What is known as the least afterwards, and how often memory was returned."""
    left, returned = list(in_use), []
    least = look_after_memory(LEAST, lambda: left.pop(0), lambda: returned.append(1))
    return least, len(returned)


def test_it_is_returned_after_growth_and_what_stays_counts_from_then_on():
    assert looked(LEAST + GROWTH + 1, LEAST + 5) == (LEAST + 5, 1)
    assert looked(LEAST + GROWTH) == (LEAST, 0)
    assert looked(LEAST - 7) == (LEAST - 7, 0)

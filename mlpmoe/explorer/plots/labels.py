"""Where names stand in a plot: beside what they name, over as little else as can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import ceil

SIZE = 12  # pixels of the letters
LETTER, ROW = 6.6, 15.0  # pixels that a letter takes across, and a line of letters down
GAP = 9  # pixels between a point and its name
LEADER = 9  # pixels across, of the line from a point to a name that had to move
COLUMN = 60  # pixels across, within which points share a column of names
Pixels = tuple[float, float]  # from the left and from the top


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    right: float
    top: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """In square pixels."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, across) * max(0.0, down)

    def stacks(self, other: Box) -> bool:
        """Whether one is above or below the other, or on it."""
        return min(self.right, other.right) > max(self.left, other.left)

    def shifted(self, down: float) -> Box:
        return Box(self.left, self.right, self.top + down, self.bottom + down)

    @property
    def middle(self) -> float:
        return (self.top + self.bottom) / 2

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class Place:
    """Of a name: the point it stands at, and how."""

    point: Pixels
    box: Box
    xanchor: str  # the side of the name that is towards the point
    yanchor: str
    leader: Pixels | None = None  # from the point to the name, if it stands further off

    def annotation(self) -> dict:
        """As plotly wants it; the texts and coordinates are left to the caller."""
        side = {"left": 1, "right": -1}.get(self.xanchor, 0)
        anchors = {"xanchor": self.xanchor, "yanchor": self.yanchor, "align": self.xanchor}
        if self.leader is not None:
            return anchors | {
                "showarrow": True, "arrowhead": 0, "arrowwidth": 1, "standoff": GAP - 2,
                "ax": self.leader[0], "ay": self.leader[1], "borderpad": 1,
            }  # fmt: skip
        up = {"bottom": 1, "top": -1}.get(self.yanchor, 0)
        shifts = {"xshift": side * GAP, "yshift": up * GAP}
        return anchors | shifts | {"showarrow": False, "borderpad": 0}


def columns(names: Sequence[tuple[str, Pixels]], height: float) -> list[Place]:
    """Names of points, to their left: points that are not far from each other across share a
    column of names, which make room for each other and are then joined to their points by lines.
    height: pixels of the plot, which no name leaves."""
    order = sorted(range(len(names)), key=lambda i: names[i][1])
    groups: list[list[int]] = []
    for i in order:
        if not groups or names[i][1][0] - names[groups[-1][0]][1][0] > COLUMN:
            groups.append([])
        groups[-1].append(i)
    ends = {i: min(names[j][1][0] for j in group) - GAP for group in groups for i in group}
    rooms = []  # with the lines to the points
    for i, (text, (_, y)) in enumerate(names):
        wide, high = _size(text)
        rooms.append(Box(ends[i] - LEADER - wide, ends[i], y - high / 2, y + high / 2))
    rooms = _apart(rooms, height)
    far = {
        i for i, (_, (x, y)) in enumerate(names)
        if abs(rooms[i].middle - y) > 1 or x - GAP - ends[i] > 4
    }  # fmt: skip
    found: dict[int, Place] = {}
    for group in groups:
        for i in group:
            (text, (x, y)), room = names[i], rooms[i]
            right = ends[i] - (LEADER if far & set(group) else 0)
            leader = (right - x, room.middle - y) if far & set(group) else None
            box = Box(right - _size(text)[0], right, room.top, room.bottom)
            found[i] = Place((x, y), box, "right", "middle", leader)
    return [found[i] for i in range(len(names))]


def beside(text: str, point: Pixels, taken: Sequence[Box], frame: Box) -> Place:
    """A place for one more name beside its point, over as little as can be of what is there."""
    (wide, high), (x, y) = _size(text), point
    places = []
    for xanchor, yanchor in (
        ("right", "middle"), ("left", "middle"), ("center", "bottom"), ("center", "top"),
        ("left", "bottom"), ("right", "bottom"), ("left", "top"), ("right", "top"),
    ):  # fmt: skip
        left = {"right": x - GAP - wide, "center": x - wide / 2, "left": x + GAP}[xanchor]
        top = {"bottom": y - GAP - high, "middle": y - high / 2, "top": y + GAP}[yanchor]
        box = Box(left, left + wide, top, top + high)
        places.append(Place(point, box, xanchor, yanchor))
    return min(places, key=lambda one: _cost(one.box, taken, frame))


def around(point: Pixels, reach: float) -> Box:
    x, y = point
    return Box(x - reach, x + reach, y - reach, y + reach)


def along_line(corners: Sequence[Pixels]) -> list[Box]:
    """Small boxes that cover a line."""
    boxes = []
    for (xa, ya), (xb, yb) in pairwise(corners):
        steps = max(1, ceil(max(abs(xb - xa), abs(yb - ya)) / 4))
        for step in range(steps):
            at = step / steps
            boxes.append(around((xa + (xb - xa) * at, ya + (yb - ya) * at), 2))
    return boxes


def _size(text: str) -> tuple[float, float]:
    """Pixels across and down."""
    rows = text.replace("<b>", "").replace("</b>", "").split("<br>")
    return LETTER * max(map(len, rows)), ROW * len(rows)


def _apart(boxes: Sequence[Box], height: float) -> list[Box]:
    """The same boxes further up or down, so that none lies on another: those that do are pushed
    apart, both as far, as long as none leaves the plot."""
    boxes = list(boxes)
    order = sorted(range(len(boxes)), key=lambda i: boxes[i].middle)
    for _ in range(200):
        for upper, lower in combinations(order, 2):
            lack = boxes[upper].bottom - boxes[lower].top
            if lack > 0 and boxes[upper].stacks(boxes[lower]):
                boxes[upper] = boxes[upper].shifted(-lack / 2)
                boxes[lower] = boxes[lower].shifted(lack / 2)
        for i, box in enumerate(boxes):
            boxes[i] = box.shifted(max(0.0, -box.top) - max(0.0, box.bottom - height))
    return boxes


def _cost(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """How much a name would cover, and how much of it would leave the plot, which is worse."""
    return sum(map(box.overlap, taken)) + 10 * (box.area - box.overlap(frame))

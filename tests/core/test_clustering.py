"""Balanced clustering: the parallel assignment is the plain greedy one, and groups are equal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.core.routed.clustering import assign_balanced, balanced_kmeans, group_means, members


def greedy(distances):
    """All pairs from the smallest distance up; each point takes the first group with a place."""
    count, groups = distances.shape
    free = [count // groups] * groups
    group_of = [None] * count
    pairs = [(float(distances[p, g]), p, g) for p in range(count) for g in range(groups)]
    for _, point, group in sorted(pairs):
        if group_of[point] is None and free[group]:
            group_of[point] = group
            free[group] -= 1
    return torch.tensor(group_of)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def distances(draw, values):
    groups, places = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    count = groups * places
    flat = draw(st.lists(values, min_size=count * groups, max_size=count * groups))
    return torch.tensor(flat, dtype=torch.float32).view(count, groups)


# Assignment --------------------------------------------------------------------------------


@given(distances(st.floats(0, 100, width=32)) | distances(st.integers(0, 2)))
def test_assignment_is_the_greedy_one(distances):
    """Also where most distances are equal: then the order of points, then of groups, decides."""
    assert torch.equal(assign_balanced(distances), greedy(distances))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [3, 10**6])
def test_assignment_of_many_points_is_the_greedy_one(seed, levels):
    distances = torch.randint(levels, (96, 12), generator=generator(seed)).float()
    assigned = assign_balanced(distances)
    assert torch.equal(assigned, greedy(distances))
    assert torch.bincount(assigned).tolist() == [8] * 12


def test_a_group_that_everyone_prefers_takes_the_nearest():
    distances = torch.tensor([[3.0, 9], [1, 9], [2, 9], [4, 9]])
    assert assign_balanced(distances).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("count, groups", [(7, 3), (3, 4), (10, 4)])
def test_groups_that_cannot_be_equal_are_refused(count, groups):
    with pytest.raises(ValueError, match=f"{count} points do not make {groups} equal groups"):
        assign_balanced(torch.rand(count, groups, generator=generator(0)))


# k-means -----------------------------------------------------------------------------------


@given(
    groups=st.integers(1, 6), places=st.integers(1, 6), levels=st.sampled_from([1, 2, 1000]),
    seed=st.integers(0, 50),
)  # fmt: skip
def test_groups_are_equal_and_the_same_for_the_same_seed(groups, places, levels, seed):
    points = torch.randint(levels, (groups * places, 3), generator=generator(seed)).float()
    assigned = balanced_kmeans(points, groups, generator(seed))
    assert torch.bincount(assigned, minlength=groups).tolist() == [places] * groups
    assert torch.equal(balanced_kmeans(points, groups, generator(seed)), assigned)


def test_other_seeds_start_elsewhere():
    points = torch.rand(60, 4, generator=generator(0))
    found = {tuple(balanced_kmeans(points, 6, generator(seed)).tolist()) for seed in range(4)}
    assert len(found) > 1


@pytest.mark.parametrize("seed", range(10))
def test_two_separated_blobs_are_found(seed):
    """Whatever the starting points, also where both lie in one blob."""
    blob = torch.arange(2).repeat(15)
    points = torch.randn(30, 3, generator=generator(seed)) + 50.0 * blob[:, None]
    assigned = balanced_kmeans(points, 2, generator(seed))
    assert len(set(zip(blob.tolist(), assigned.tolist(), strict=True))) == 2


def spread(points, assigned, groups):
    """Sum of squared distances to the means of the groups."""
    parts = [points[assigned == group] for group in range(groups)]
    return float(sum((part - part.mean(0)).square().sum() for part in parts))


def test_groups_are_tighter_than_those_of_the_starting_points():
    """The result is at least as good as a single assignment to the points drawn first."""
    for seed in range(5):
        points = torch.rand(48, 3, generator=generator(seed))
        centres = points[torch.randperm(48, generator=generator(seed))[:6]]
        first = greedy(torch.cdist(points, centres))
        assigned = balanced_kmeans(points, 6, generator(seed))
        assert spread(points, assigned, 6) <= spread(points, first, 6)


def test_means_and_members_of_groups():
    points = torch.tensor([[0.0, 2], [10, 10], [2, 4], [20, 30]])
    assigned = torch.tensor([1, 0, 1, 0])
    assert group_means(points, assigned, 2).tolist() == [[15, 20], [1, 3]]
    assert members(assigned, 2).tolist() == [[1, 3], [0, 2]]

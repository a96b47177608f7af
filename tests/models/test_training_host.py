"""How long a visitor's training may take, and where it is kept."""

from __future__ import annotations

import pytest

from mlpmoe.models import host_training_seconds, recovery_folder


@pytest.mark.parametrize(
    ("space", "minutes", "seconds"),
    [
        ("", None, None), ("owner/space", None, 600), ("", "2.5", 150), ("owner/space", "0", None),
        ("owner/space", "long", 600), ("", "inf", None), ("", "nan", None), ("", "-3", None),
        ("owner/space", "  ", 600),
    ],
)  # fmt: skip
def test_a_host_limits_training(monkeypatch, space, minutes, seconds):
    monkeypatch.setenv("SPACE_ID", space)
    monkeypatch.delenv("MLPMOE_TRAINING_MINUTES", raising=False)
    if minutes is not None:
        monkeypatch.setenv("MLPMOE_TRAINING_MINUTES", minutes)
    assert host_training_seconds() == seconds


def test_it_is_kept_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MLPMOE_CACHE", str(tmp_path))
    assert recovery_folder() == tmp_path / "recovery"

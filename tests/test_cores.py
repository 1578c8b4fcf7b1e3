import os

import pytest

from jvae import cores


def test_only_the_cores_of_this_process_count(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = {0: {1, 4, 5}}
    monkeypatch.setattr(os, "sched_getaffinity", allowed.__getitem__, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cores.count() == 3


def test_without_affinity_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cores.count() == 7

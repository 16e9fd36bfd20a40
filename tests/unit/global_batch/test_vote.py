"""The vote of one process: numbers come back as they were sent, whatever their bits."""

from __future__ import annotations

import math

import torch

from dalr_scale.global_batch import Vote

CPU = torch.device("cpu")


def test_numbers_and_integers_travel_exactly() -> None:
    sent = {"loss": torch.tensor(0.1, dtype=torch.float64), "con": torch.tensor(1e-30)}
    integers = {"key": 2**63 - 1, "none": -1, "stop": 0}
    found = Vote(sent, integers, CPU).result()
    assert found.means == {"loss": 0.1, "con": float(torch.tensor(1e-30))}
    assert found.integers == {name: [value] for name, value in integers.items()}
    assert found.largest("key") == 2**63 - 1


def test_what_is_not_finite_stays_so() -> None:
    found = Vote({"a": torch.tensor(math.nan), "b": torch.tensor(-math.inf)}, {}, CPU).result()
    assert math.isnan(found.means["a"]) and found.means["b"] == -math.inf


def test_a_vote_without_numbers() -> None:
    assert Vote({}, {"stop": 3}, CPU).result().integers == {"stop": [3]}

"""Two processes give the plan of one process with the same batches, and stay together in everything else."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from processes import written
from training import distributed_worker as worker

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes wrote, in the order of their ranks."""
    return written(worker.__file__, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return json.loads(json.dumps(worker.plans()))


PLANS = [
    *worker.CRITERIA,
    *worker.LEARNERS,
    "taylor in steps",
    "scratch without labels",
    "a loop of one's own",
    "gsm",
    "gsm, a loop of one's own",
    "gsm of channels",
]


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_is_that_of_one_process(name: str, ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert ranks[0]["plans"][name] == ranks[1]["plans"][name] == alone[name]
    assert len({str(alone[other]) for other in PLANS}) > 5  # they are not all the same


def test_the_ranking_of_sparse_momentum_is_one_over_all_processes(alone: dict[str, Any]) -> None:
    """What is equal in the test above: in every step exactly so many active weights, and not always the same ones."""
    for name in ("gsm", "gsm, a loop of one's own"):
        active, left, _ = alone[name]
        count = sum(p.numel() for p in worker.network().parameters() if p.ndim > 1) // 8
        assert [sum(map(len, step)) for step in active] == [count] * len(active)
        assert len({str(step) for step in active}) == len(active) > worker.STEPS
        assert sum(map(len, left)) == count


def test_the_weights_stay_the_same_in_all_processes(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for name in worker.LEARNERS:
        first, second = (rank["plans"][f"{name}, sum of weights"] for rank in ranks)
        assert first == second
        assert first == pytest.approx(alone[f"{name}, sum of weights"], abs=1e-4)


def test_a_run_of_two_processes_is_resumed_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert set(rank["interrupted"]) == {"whole", "resumed"}
        assert rank["interrupted"]["whole"] == rank["interrupted"]["resumed"]
    seen = [rank["interrupted"]["whole"][-4:] for rank in ranks]
    assert seen[0] != seen[1]  # each its own share
    state = [rank["interrupted"]["whole"][:-4] for rank in ranks]
    assert state[0] == state[1]  # running statistics too


def test_shares_of_different_length(ranks: list[dict[str, Any]]) -> None:
    text = (
        "InputError: data= has 3 batches in one process and more in another: give every process equally many "
        "(torch.utils.data.DistributedSampler does)."
    )
    for rank in ranks:
        assert rank["uneven"] == {"slimming": text, "taylor": text, "fisher": "no error"}


@pytest.mark.parametrize("name", ["obs", "refit", "steps", "depth"])
def test_what_takes_no_sums_over_processes_needs_the_same_data_in_all(name: str, ranks: list[dict[str, Any]]) -> None:
    text = r"InputError: The processes differ in data=: 16 samples \(checksum \d+\) in process 0, 16 samples \(checksum"
    for rank in ranks:
        assert re.match(text, rank["apart"][f"{name} of shares"])
        assert rank["apart"][f"{name} of all"] == "no error"

"""A model of which every process holds a share is pruned like one that is whole, and is never whole anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import sharded_worker as worker
from processes import written

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes wrote, in the order of their ranks."""
    return written(worker.__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", ["apart", "tied"])
def test_as_if_it_were_whole(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        found = rank[kind]
        assert found["same plan"]
        assert found["names"]
        assert found["oracle"] <= 1e-5
        for what in ("weights", "outputs", "applied", "together", "again", "gradients", "trained"):
            assert found[what] <= 1e-5, what
        assert found["notes"] == ["the recording was not compared with the model, which is sharded"]


def test_half_precision_is_proven_in_double(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["half"]
        assert found["same plan"]
        assert found["error"] > 1e-5
        assert found["double"] <= 1e-9
        assert found["outputs"] <= 1e-2
        assert found["dtype"] == "torch.bfloat16"


def test_the_model_stays(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["apart"]["model as it was"] for rank in ranks)


def test_one_layer_is_gathered_at_a_time(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["apart"]
        layer = found["largest"] + 4 * (3 * worker.WIDTH + worker.WIDTH)  # its bias, the scale of a norm
        assert found["gatherings"] > 20
        assert found["gathered"] <= layer < found["of the whole"] / 4


def test_every_process_holds_its_share_of_the_result(ranks: list[dict[str, Any]]) -> None:
    own = [rank["apart"]["own entries"] for rank in ranks]
    assert sum(own) == ranks[0]["apart"]["entries"]
    assert max(own) < 0.55 * sum(own)


def test_refitted_as_if_it_were_whole(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["reconstructed"]
        for what in ("weights", "outputs", "alone", "in steps"):
            assert found[what] <= 1e-5, what
        assert found["moved by"] > 1e-2
        assert found["layers"] == found["expected layers"]
        assert {kept for _, kept, _ in found["layers"]} == {True, False}
        assert found["errors"] == pytest.approx(found["expected errors"], rel=1e-5)
        assert found["errors"][1] < found["errors"][0]
        assert found["trains"]


def test_a_refit_gathers_one_layer_at_a_time(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        largest = rank["apart"]["largest"]
        assert rank["reconstructed"]["gathered"] <= largest + 4 * (5 * worker.WIDTH + 2 * worker.HIDDEN)


def test_what_one_process_finds_worse_is_put_back_in_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        gap, note = rank["reconstructed"]["put back"]
        assert gap == 0
        assert note.startswith("all is as it was cut")


REFITS_REFUSED = {
    "data": "InputError: The processes differ in data=: 30 samples (checksum ",
    "seed": "InputError: The processes differ in seed=: 0 in process 0, 1 in process 1.",
    "no data": "InputError: data=None needs the whole model in one process",
    "tune": "InputError: tune= needs the whole model in one process",
    "one whole": "InputError: Of the model every process holds a share, and of small not: shard both, or neither.",
}


@pytest.mark.parametrize("kind", REFITS_REFUSED)
def test_a_refit_says_what_it_refuses(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        assert rank["reconstructed"][kind].startswith(REFITS_REFUSED[kind])


REFUSED = {
    "budgets": "InputError: The processes differ in params=: 0.5 in process 0, 0.6 in process 1. Make the same call",
    "inputs": "InputError: The processes differ in the example inputs: (Tensor[2, 5] int64) in process 0",
    "plans": "InputError: The processes differ in what the plan keeps of words.weight: 18 in dim 1",
    "noise": "InputError: reconstruct=True without data= needs all of the model in one process",
    "tune": "InputError: tune= needs all of the model in one process",
    "refit": "InputError: The processes differ in reconstruct=: False in process 0, True in process 1.",
    "taylor": "InputError: method='taylor' needs all of the model in one process",
    "attach": "ModelError: words.weight is a DTensor, of which this process holds a share, and only prune, apply and",
    "record": "ModelError: words.weight is a DTensor, of which this process holds a share, and only prune, apply and",
    "save": "ModelError: Of the parameters of pruned every process holds a share, and whole ones are needed.",
    "save_pretrained": "ModelError: Of the parameters of pruned every process holds a share",
    "export": "ModelError: Of the parameters of module every process holds a share",
    "into": "ModelError: Of the parameters of model every process holds a share",
    "broken": "ModelError: head.weight holds NaN or inf.",
    "placement": "ModelError: head.weight is placed as P(sum), which cannot be made again",
    "no group": "ModelError: The model's parameters are shares of several processes, and there is no process group",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_every_process_says_what_it_refuses(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        assert rank["refusals"][kind].startswith(REFUSED[kind])


def test_a_forward_that_reads_its_weights(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "prune the whole model and shard the result" in rank["refusals"]["reading"]

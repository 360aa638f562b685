"""Calls beyond the example: every state of an answer, every call, the command. All networks are made up here."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxprune.errors import RecordError
from model_zoo import runner
from model_zoo.checks import calls
from model_zoo.checks.answers import Cell, answer, compare, values_in
from model_zoo.checks.calls import CALLS, measure
from model_zoo.checks.parting import parting
from model_zoo.networks import libraries, transformers_list
from model_zoo.networks.subject import NoCacheError, Subject
from model_zoo.pages import beyond as page
from model_zoo.records import Record, read
from model_zoo.runner import main
from model_zoo.studies import beyond

pytestmark = pytest.mark.usefixtures("one_thread")


class Cache:
    def __init__(self, *layers: Tensor) -> None:
        self.layers = list(layers)
        self.owner = self


@dataclass
class Out:
    logits: Tensor
    cache: Cache


class Decoder(nn.Module):
    """Sums over the tokens so far; the sum goes into the cache. ``fault`` makes it a bad recording of itself."""

    def __init__(self, fault: str = "", seen: Any = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.fault, self.seen, self.count = fault, seen, 0

    def forward(self, ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Out:
        self.count += 1
        if self.fault == "second" and self.count > 1:
            ids = ids + 1
        if self.fault in ("batch", "size") and ids.shape[self.fault == "size"] != self.seen:
            raise RuntimeError(f"shape [2, 6] is invalid for {list(ids.shape)}")
        if self.fault == "guard" and ids.shape[1] != self.seen:
            raise RecordError("ids are 6 long in the recording (decoder.py:12 in forward)")
        if self.fault == "values":
            ids = self.seen
        x = self.embed(ids)
        if self.fault != "padded":
            x = x * attention_mask[:, -x.shape[1] :, None]
        total = x.cumsum(1) if cache is None else x.cumsum(1) + cache.layers[0]
        if cache is not None and self.fault == "caches in":
            total = total + 1
        return Out(total, Cache(total[:, -1:]) if self.fault != "caches out" else Cache(torch.zeros(2, 1, 4)))


def make(batch: int, length: int, seed: int) -> Any:
    ids = torch.randint(0, 18, (batch, length), generator=torch.Generator().manual_seed(seed))
    return (ids,), {"attention_mask": torch.ones(batch, length, dtype=torch.long)}


def step(before: Any, outputs: Out, seed: int) -> Any:
    (ids,), kwargs = before
    mask = torch.ones(len(ids), kwargs["attention_mask"].shape[1] + 1, dtype=torch.long)
    return make(len(ids), 1, seed)[0], {"attention_mask": mask, "cache": outputs.cache}


def subject() -> Subject:
    torch.manual_seed(0)
    return Subject(Decoder().eval(), make, 2, 6, [9], step)


def states(monkeypatch: pytest.MonkeyPatch, fault: str, seen: Any = None) -> dict[str, str]:
    def untouched(model: nn.Module, inputs: Any) -> nn.Module:
        pruned = copy.deepcopy(model)
        pruned.fault, pruned.seen = fault, seen
        return pruned

    monkeypatch.setattr(calls, "untouched", untouched)
    monkeypatch.setattr(calls, "parting", lambda *_: "decoder.py:1")
    cells, why = measure(subject())
    assert why == ""
    return {name: cell.state for name, cell in cells.items()}


# -- the calls --------------------------------------------------------------------------------------------------------


def test_a_faithful_copy_is_free_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(monkeypatch, "") == dict.fromkeys(CALLS, "free")


@pytest.mark.parametrize(
    ("fault", "seen", "expected"),
    [
        ("second", None, {"second": "wrong"}),
        ("batch", 2, {"batch": "raw"}),
        ("values", make(2, 6, 0)[0][0], {"values": "wrong", "caches out": "wrong", "size": "wrong"}),
        ("padded", None, {"left-padded": "wrong", "right-padded": "wrong"}),
        ("caches out", None, {"values": "wrong", "caches out": "wrong", "second": "wrong"}),
        ("caches in", None, {"caches in": "wrong", "longer caches in": "wrong"}),
    ],
)
def test_a_fault_shows_in_the_calls_that_it_is_about(
    monkeypatch: pytest.MonkeyPatch, fault: str, seen: Any, expected: dict[str, str]
) -> None:
    found = states(monkeypatch, fault, seen)
    assert {name: found[name] for name in expected} == expected
    if fault not in ("values", "caches out"):  # these show in nearly all
        assert {name for name, state in found.items() if state != "free"} == {*expected}


def test_sizes_are_tried_until_the_model_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] % 2:
                raise ValueError("an odd length")
            return 2 * x

    def of(others: list[int]) -> Cell:
        even = Subject(Even(), lambda batch, size, seed: ((torch.randn(batch, size) + seed,), {}), 1, 4, others)
        return measure(even)[0]["size"]

    monkeypatch.setattr(calls, "untouched", lambda model, inputs: model)
    assert of([5, 6]).state == "free"
    refused = of([5, 7])
    assert (refused.state, refused.message) == ("model refuses", "ValueError: an odd length")


def test_a_free_answer_that_any_result_would_give_is_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(3)

    monkeypatch.setattr(calls, "untouched", lambda model, inputs: model)
    constant = Subject(Constant(), lambda batch, size, seed: ((torch.full((batch, 2), float(seed)),), {}), 1, None)
    cells, _ = measure(constant)
    assert {*cells} == {"second", "batch", "values"}, "no other sizes, masks, objects or steps"
    assert cells["values"].blind
    assert not cells["second"].blind


def test_what_has_no_cache_has_no_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_step(*_: Any) -> Any:
        raise NoCacheError

    monkeypatch.setattr(calls, "untouched", lambda model, inputs: model)
    cells, _ = measure(Subject(Decoder().eval(), make, 2, 6, [9], no_step))
    assert "caches in" not in cells


def test_a_refusal_of_the_network_or_of_its_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(model: nn.Module, inputs: Any) -> nn.Module:
        if "cache" in inputs[1]:
            raise RecordError("the cache is written to (cache.py:136 in update)")
        return model

    monkeypatch.setattr(calls, "untouched", untouched)
    cell = measure(subject())[0]["caches in"]
    assert (cell.state, cell.line) == ("refused", "cache.py:136")
    monkeypatch.setattr(calls, "untouched", lambda *_: untouched(nn.Identity(), ((), {"cache": 0})))
    assert measure(subject()) == ({}, "RecordError: the cache is written to (cache.py:136 in update)")


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_guard_is_told_with_its_line() -> None:
    cell = answer(Decoder(), Decoder("guard", 6), lambda: make(2, 9, 0))
    assert (cell.state, cell.line) == ("guarded", "decoder.py:12")


def test_another_exception_is_told_with_the_line_of_its_node() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_method("view", (x, 2, 6))
    view.meta["source"] = "net.py:7 in forward"
    graph.output(view)
    cell = answer(nn.Identity(), fx.GraphModule(nn.Module(), graph), lambda: ((torch.ones(3, 6),), {}))
    assert (cell.state, cell.line) == ("raw", "net.py:7 in forward")
    assert "invalid for input of size 18" in cell.message


def test_what_the_model_refuses_is_not_asked() -> None:
    assert answer(Decoder("guard", 6), Decoder(), lambda: make(2, 9, 0)).state == "model refuses"


def test_tensors_and_numbers_in_objects_are_compared() -> None:
    one, other = (Out(torch.ones(2), Cache(torch.full((2,), value))) for value in (1.0, 1.5))
    assert [*values_in(one)] == [".logits", ".cache.layers[0]"]
    cell = compare(one, other)
    assert (cell.state, cell.where, cell.plain) == ("wrong", ".cache.layers[0]", 0.0)
    assert cell.error == pytest.approx(1 / 3)
    assert compare(one, copy.deepcopy(one)) == Cell("free", 0.0, 0.0)
    assert compare({"a": 1}, {"a": 2}).error == float("inf")
    assert compare([torch.ones(2)], [torch.ones(2), torch.ones(1)]).where == "[1]"
    assert compare(torch.ones(2), torch.ones(2, dtype=torch.float64)).state == "wrong"
    assert compare(torch.tensor([True, False]), torch.tensor([True, True])).state == "wrong"


def test_what_is_held_twice_is_compared_twice() -> None:
    shared = [torch.ones(2)]
    assert [*values_in({"a": shared, "b": shared})] == ["['a'][0]", "['b'][0]"]
    assert compare({"a": shared, "b": [torch.ones(2)]}, {"a": shared, "b": shared}).state == "free"


def test_inputs_that_are_written_to_are_compared() -> None:
    class Writes(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: Tensor) -> int:
            x += self.by
            return 1

    assert answer(Writes(1), Writes(1), lambda: ((torch.ones(2),), {})).state == "free"
    assert answer(Writes(1), Writes(2), lambda: ((torch.ones(2),), {})).where == "['in'][0][0][0]"


def test_recordings_part_where_the_model_branches() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = self.layer(x)
            if not mask.all():
                x = x.masked_fill(~mask[..., None], 0.0)
            return x.relu()

    ones, zeros = (((torch.randn(2, 3, 4), torch.full((2, 3), value)), {}) for value in (True, False))
    found = parting(Branches().eval(), ones, zeros)
    assert "test_beyond.py:" in found.split(": ")[0] + ":"
    assert parting(Branches().eval(), ones, ones) == "no node: a value outside the graph"


# -- networks and the command -----------------------------------------------------------------------------------------


def test_names_are_unique_and_many() -> None:
    names = [*libraries.names([*libraries.GROUPS])]
    assert len({*names}) == len(names)
    assert len(transformers_list.names()) >= 60
    assert {"mamba2", "jamba", "lfm2", "qwen3_next"} <= {name.partition(":")[2] for name in transformers_list.names()}


def test_configurations_are_made_small_in_their_parts_too() -> None:
    class Config:
        sub_configs: dict[str, Any] = {}  # noqa: RUF012  as in transformers

        def __init__(self, hidden_size: int = 768, vocab_size: int = 50000, rope: float = 1e4, **more: Any) -> None:
            self.hidden_size, self.vocab_size, self.rope = hidden_size, vocab_size, rope
            self.__dict__ |= more

        def to_dict(self) -> dict[str, Any]:
            return dict(vars(self))

    class Outer(Config):
        sub_configs = {"vision_config": Config}  # noqa: RUF012

        def __init__(self, vision_config: Any = None, **more: Any) -> None:
            super().__init__(**more)
            self.vision_config = Config(**vision_config) if isinstance(vision_config, dict) else Config()

    found = transformers_list.small(Outer, vocab_size=200, vision_config={"hidden_size": 16})
    assert (found.hidden_size, found.vocab_size, found.rope) == (32, 200, 1e4)
    assert (found.vision_config.hidden_size, found.vision_config.vocab_size) == (16, 99)


NETWORKS = """
import os
import torch
from torch import nn
from model_zoo.networks.subject import Subject

def image(batch, size, seed):
    return (torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)),), {}

def convolutions():
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *pool)
    return Subject(model.eval(), image, 1, (8, 8), [(12, 10)])

def dies():
    os._exit(3)

def hangs():
    import time
    time.sleep(60)
"""


def test_the_command_writes_a_line_and_a_page_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets.py").write_text(NETWORKS)
    names, out = [f"{tmp_path}/nets.py:{name}" for name in ("convolutions", "dies")], tmp_path / "beyond.jsonl"
    assert main(["run", "beyond", *names, "--out", str(out)]) == 1
    head, records = read(out)
    assert {"torch", "cpu", "command"} <= {*head}
    fine, dead = (records[name] for name in names)
    assert {name: cell["state"] for name, cell in fine.figures["cells"].items()} == dict.fromkeys(
        ("second", "batch", "size", "values"), "free"
    )
    assert fine.passed
    assert dead.failures["process"].startswith("exit code 3")
    page = out.with_suffix(".md").read_text()
    assert "1 of 2 networks are recorded, 1 of them are nowhere wrong." in page
    assert "Another batch: free in 1 of the 1 networks whose model takes it." in page
    assert "| second, batch, size, values |  |  |" in page
    monkeypatch.setattr(runner, "run", lambda _, cases, done, __: (Record(c) for c in cases if c not in done))
    capsys.readouterr()
    main(["run", "beyond", *names, "more", "--out", str(out), "--resume"])
    assert next(line.split(":")[0] for line in capsys.readouterr().out.splitlines()) == "more"
    assert len(read(out)[1]) == 3


def test_a_network_that_hangs_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETWORKS)
    out = tmp_path / "beyond.jsonl"
    assert main(["run", "beyond", f"{tmp_path}/nets.py:hangs", "--out", str(out), "--timeout", "2"]) == 1
    assert next(iter(read(out)[1].values())).failures == {"process": "no end within 2 s"}


def test_shards_share_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(*words: str) -> list[str]:
        found: list[str] = []
        monkeypatch.setattr(runner, "execute", lambda *given: found.extend(runner.chosen(*given)))
        main(["run", "beyond", *words])
        return found

    assert chosen("a", "b", "c", "d", "--shard", "1/2") == ["a", "c"]
    assert chosen("a", "b", "c", "d", "--shard", "2/2") == ["b", "d"]
    assert {name.partition(":")[0] for name in chosen("--group", "diffusers")} == {"diffusers"}
    with pytest.raises(SystemExit):
        chosen("--shard", "3/2")


def test_a_raised_error_of_another_kind_at_prune_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(*_: Any) -> Any:
        raise KeyError("index_put")

    monkeypatch.setattr(calls, "untouched", untouched)
    monkeypatch.setattr(libraries, "load", lambda spec: subject())
    record = beyond.measure("stub:decoder", argparse.Namespace())
    assert record.failures["prune"].startswith("KeyError: 'index_put' (")
    assert "test_beyond.py" in record.failures["prune"]


def test_the_page_counts_columns() -> None:
    cells = {"batch": {"state": "free"}, "size": {"state": "guarded", "line": "net.py:3"}}
    worse = {"batch": {"state": "wrong", "error": 0.5, "where": ".cache"}, "size": {"state": "model refuses"}}
    records = [Record("a:x", {"cells": cells}), Record("a:y", {"cells": worse}, checks={"batch": "off by 0.5"})]
    found = page.columns(records)
    assert (found["batch"]["free"], found["batch"]["wrong"], found["batch"]["in objects"]) == (1, 1, 1)
    assert "Another size: free in 0 of the 1 networks whose model takes it." in page.summary(records)
    assert "| a:x | batch | size: net.py:3 |  |" in page.networks_table(records)

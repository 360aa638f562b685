"""Data of a wrong form is refused where it is read, with the place and the reason; nothing else ever comes out."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import Shuffled, image, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fxprune
from fxprune.errors import ArtifactError, FxpruneError, PlanError
from fxprune.io import artifact
from fxprune.io.forms import Either, FormError, Map, Real, Such, Whole, anything, check, json_of
from fxprune.selection import plan
from fxprune.training import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def wrong(value: Any, form: Any) -> str:
    with pytest.raises(FormError) as caught:
        check(value, form)
    return str(caught.value)


def node() -> Any:
    return Either(None, str, {"list": [node]}, {"dict": Map(node)})


def test_what_has_the_form() -> None:
    for value, form in (
        ("x", str), (True, bool), (3, 3), (None, None), (5, Whole(5)), (-2.5, Real()), (2, Real()), ([], [Whole()]),
        ([1, "x"], (Whole(), str)), ({"a": 1}, {"a": Whole()}), ({3: "x"}, Map(str, keys=Whole())), ([[1]], anything),
        ({"list": [{"dict": {"a": None}}]}, node), (math.inf, Real(finite=False)), ([3], Either([str], [Whole()])),
    ):  # fmt: skip
        check(value, form)


def test_what_has_it_not() -> None:
    for value, form, text in (
        (True, Whole(), "it must be a whole number of at least 0, and is True"),
        (7, Whole(1, 5), "it must be a whole number from 1 to 5, and is 7"),
        (10**400, Real(), "it must be a finite number, and is a number of more than 30 digits"),
        (math.nan, Real(), "it must be a finite number, and is nan"),
        (1, bool, "it must be true or false, and is 1"),
        (1.0, 1, "it must be 1, and is 1.0"),
        ({"a": {"b": [0, None]}}, {"a": Map([Whole()])},
         "a['b'][1] must be a whole number of at least 0, and is null"),
        ({"a": 1}, {"a": Whole(), "b": str}, "'b' is missing"),
        ({"a": {"c": 1}}, {"a": {}}, "'c' is unknown in a"),
        ({"a": {"01": 1}}, {"a": Map(Whole(), keys="0|[1-9]")}, "'01' in a is no name that can be there"),
        ([1, 2], (Whole(),), "it must be a list of 1, and is a list of 2"),
        ({"list": [{"dict": {"a": 1}}]}, node, "list[0]['dict']['a'] must be null or text or an object, and is 1"),
        ([[1, "x"]], Either([Whole()], [[Whole()]]), "[0][1] must be a whole number of at least 0, and is 'x'"),
        ([2, 1], Such((Whole(), Whole()), lambda pair: pair[0] < pair[1], "ascending"),
         "it must be ascending, and is a list of 2"),
        ("x" * 200, Whole(), f"it must be a whole number of at least 0, and is '{'x' * 76}…'"),
    ):  # fmt: skip
        assert wrong(value, form) == text


def test_depth_is_bounded_and_costs_no_time() -> None:
    value: Any = None
    for _ in range(5000):
        value = {"list": [value]}
    assert wrong(value, node).endswith("… is nested too deeply")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0)"),
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ("9" * 5000, "Exceeds the limit"),
    ],
    ids=["deep", "twice", "bytes", "bom", "empty", "digits"],
)
def test_text_that_is_no_json(text: str | bytes, reason: str) -> None:
    with pytest.raises(FormError) as caught:
        json_of(text)
    assert str(caught.value).startswith(reason)


# -- valid files, changed in one place


VALUES = [None, True, -1, 0, 2**63, 10**400, 0.5, math.nan, math.inf, "", "x", "float32", [], [[]], {}, {"a": None}]
VALUES += [[10**12], [10**6, 10**6], {"tensor": [[10**12], "float32", 0, 0]}]


def changed(data: Any, draw: Callable[..., Any]) -> Any:
    """A copy with one part replaced, left out, put in again, or given a name of its own."""
    data = copy.deepcopy(data)
    holder, key = None, None
    part = data
    while isinstance(part, (dict, list, tuple)) and part and (holder is None or draw(st.integers(0, 3))):
        if isinstance(part, tuple):
            break
        holder, key = part, draw(st.sampled_from(sorted(part, key=str) if isinstance(part, dict) else range(len(part))))
        part = holder[key]
    assert holder is not None
    action = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
    if action == "remove":
        del holder[key]
    elif action == "repeat":
        if isinstance(holder, list):
            holder.append(copy.deepcopy(part))
        else:
            holder[draw(st.sampled_from(["", "0", "00", "more", "a.b", "\ud800"]))] = part
    else:
        holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return data


FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    small = fxprune.prune(make(Shuffled), image(), channels=0.5, progress=False)
    small.meta["fxprune"].plan.save(folder / "plan.json")
    fxprune.save(small, folder / "small.safetensors")
    return folder


@pytest.fixture(scope="module")
def graph() -> fxprune.ChannelGraph:
    return fxprune.analyze(make(Shuffled), image())


@FUZZ
@given(data=st.data())
def test_plans(saved: Path, graph: fxprune.ChannelGraph, data: st.DataObject) -> None:
    content = json.loads((saved / "plan.json").read_text())
    content.pop("digest")
    content = changed(content, data.draw)
    path = saved / "changed.json"
    path.write_text(json.dumps({**content, "digest": plan._digest(content)}))
    try:
        found = fxprune.PruningPlan.load(path)
        found.channels(graph)
    except PlanError:
        return
    assert found._content() == content


def rewritten(saved: Path, change: Callable[[Any], Any]) -> Path:
    with safe_open(saved / "small.safetensors", framework="pt") as file:
        content = json.loads(file.metadata()["fxprune"])
    content.pop("digest")
    content = change(content)
    tensors = load_file(saved / "small.safetensors")
    text = json.dumps({**content, "digest": artifact.digest_of(content, tensors)})
    save_file(tensors, saved / "changed.safetensors", {"fxprune": text})
    return saved / "changed.safetensors"


@FUZZ
@given(data=st.data())
def test_artifacts(saved: Path, data: st.DataObject) -> None:
    def change(content: Any) -> Any:
        part = data.draw(st.sampled_from(["all", "inputs", "outputs", "orders", "buffers", "budget"]))
        if part == "all" or not content[part]:
            return changed(content, data.draw)
        return {**content, part: changed({"": content[part]}, data.draw).get("")}

    path = rewritten(saved, change)
    try:
        found = fxprune.load(path, make(Shuffled))
    except FxpruneError:
        return
    whole = fxprune.load(saved / "small.safetensors", make(Shuffled))
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in found.state_dict().items())


def test_an_artifact_that_claims_more_than_memory(saved: Path) -> None:
    for shape in ([10**12], [1, 3, 10**6, 10**6], [0, 2**62, 2**62]):
        spec = {"tensor": [shape, "float32", 0, 0]}
        path = rewritten(
            saved, lambda c, s=spec: {**c, "inputs": {"dict": {"args": {"tuple": [s]}, "kwargs": {"dict": {}}}}}
        )
        with pytest.raises(ArtifactError, match=r"inputs must be example inputs of at most 268435456 entries; larger"):
            fxprune.load(path, make(Shuffled))


def test_an_order_that_is_none(saved: Path) -> None:
    path = rewritten(saved, lambda c: {**c, "orders": {"stem.weight": [0, 0, 1, 2]}})
    with pytest.raises(ArtifactError, match=r"\[0, 0, 1, 2\] is no order of the 4 dimensions of 'stem.weight'"):
        fxprune.load(path, make(Shuffled))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run.pt"
    resumed(checkpoint=path)
    return path


def resumed(**loop: Path) -> Any:
    batches, options = [(image(), torch.tensor([0, 1]))], fxprune.Options(loop=fxprune.Loop(**loop))
    return fxprune.prune(make(), image(), method="slimming", flops=0.6, round_to=1, verify=False, epochs=1,
                         data=batches, progress=False, options=options)  # fmt: skip


@settings(FUZZ, max_examples=40)
@given(data=st.data())
def test_checkpoints(trained: Path, data: st.DataObject) -> None:
    content = torch.load(trained, weights_only=True)
    other = trained.with_name("changed.pt")
    torch.save(changed(content, data.draw), other)
    try:
        resumed(resume=other)
    except FxpruneError:
        return


def test_a_checkpoint_names_what_is_wrong_in_it(trained: Path) -> None:
    other = trained.with_name("other.pt")
    for part, value, reason in (
        ("epoch", -1, "epoch must be a whole number of at least 0, and is -1"),
        ("model", {"a": 1}, "model['a'] must be a Tensor, and is 1"),
        ("random", None, "random must be a list, and is null"),
    ):
        torch.save({**torch.load(trained, weights_only=True), part: value}, other)
        with pytest.raises(fxprune.errors.InputError) as caught:
            checkpoint.load(other, torch.device("cpu"))
        assert str(caught.value) == f"{other} is damaged, or no checkpoint of fxprune's training loop: {reason}."

"""A pruned network as a file: everything comes back, in a new process too, and what is not whole is refused."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Attentive, Shuffled, Small, chain, image, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import ArtifactError, ExportError, FxpruneError, InputError, PlanError, WriteError
from fxprune.io import artifact
from fxprune.recording.inputs import DIMS_KEY, TensorSpec, from_json, to_json

pytestmark = pytest.mark.usefixtures("one_thread")

NETS = [Small, Shuffled, Attentive]


def pruned(model: nn.Module | None = None, inputs: Any = None, **options: Any) -> Any:
    """A pruned network whose weights are no longer those it was cut from."""
    small = fxprune.prune(make() if model is None else model, image() if inputs is None else inputs,
                          **{"flops": 0.5, "progress": False, **options})  # fmt: skip
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(1 + 0.1 * torch.rand_like(p))
    return small.eval()


def run(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(x)
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "small.safetensors"
    fxprune.save(pruned(), path)
    return path


def message(path: Path, *args: Any, error: type[Exception] = ArtifactError, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        fxprune.load(path, *args, **kwargs)
    return str(caught.value)


# -- there and back


@pytest.mark.parametrize("kind", NETS)
def test_weights_after_fine_tuning_come_back(kind: type[nn.Module], tmp_path: Path) -> None:
    small, model = pruned(make(kind)), make(kind, seed=3)
    fxprune.save(small, tmp_path / "a.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = fxprune.load(tmp_path / "a.safetensors", model)
    assert isinstance(loaded, fx.GraphModule)
    assert list(loaded.state_dict()) == list(small.state_dict())
    assert all(torch.equal(t, small.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert torch.equal(run(loaded.eval(), image(5)), run(small, image(5)))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    report, then = loaded.meta["fxprune"], small.meta["fxprune"]
    assert (report.plan.kept, report.method, report.oracle_error) == (then.plan.kept, "l2", then.oracle_error)
    assert report.budget == then.budget == ("flops", 0.5)
    assert (report.macs_before, report.macs_after) == (then.macs_before, then.macs_after)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_file_is_a_plain_state_dict_to_others(saved: Path) -> None:
    small = fxprune.load(saved, make())
    assert {name: t.shape for name, t in load_file(saved).items()} == {
        name: t.shape for name, t in small.state_dict().items()
    }


class Odd(nn.Module):
    """Tied weights, buffers that share memory, of several dtypes, one of them left out of the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.again = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.again.weight = self.two.weight
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)
        table = torch.arange(12.0)
        self.register_buffer("whole", table)
        self.register_buffer("view", table[4:8])
        self.register_buffer("even", table[::2])
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("shift", torch.linspace(0, 1, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.again(torch.relu(self.two(torch.relu(self.one(x))))))
        return self.head(x.mean((2, 3))) + self.shift + self.view + self.even.sum() + self.steps.sum() * self.flag


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tied_shared_strided_and_integer_tensors(dtype: torch.dtype, layout: Any, tmp_path: Path) -> None:
    small = pruned(make(Odd)).to(dtype=dtype, memory_format=layout)
    small.two.weight.requires_grad_(False)
    small.view = small.whole[4:8]  # memory of another buffer's
    fxprune.save(small, tmp_path / "odd.safetensors")
    assert "again.weight" not in load_file(tmp_path / "odd.safetensors")
    loaded = fxprune.load(tmp_path / "odd.safetensors", make(Odd, seed=1)).eval()
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        other = loaded.get_parameter(name) if isinstance(tensor, nn.Parameter) else loaded.get_buffer(name)
        assert torch.equal(other, tensor), name
        assert (other.dtype, other.stride()) == (tensor.dtype, tensor.contiguous().stride() if name == "even" else
                                                 tensor.stride()), name  # fmt: skip
    assert loaded.again.weight is loaded.two.weight
    assert torch.equal(run(loaded, image(3).to(dtype)), run(small, image(3).to(dtype)))


def test_a_new_process_gives_identical_outputs_and_exports(tmp_path: Path) -> None:
    small = pruned()
    fxprune.save(small, tmp_path / "small.safetensors")
    fxprune.save(small, tmp_path / "small.pt2")
    torch.save({"x": image(5), "y": run(small, image(5))}, tmp_path / "expected.pt")
    script = """
import sys, torch, fxprune, onnxruntime
sys.path.insert(0, "tests")
from nets import make
torch.set_num_threads(1)
given = torch.load("expected.pt", weights_only=True)
with torch.no_grad():
    loaded = fxprune.load("small.safetensors", make(seed=9)).eval()
    assert torch.equal(loaded(given["x"]), given["y"]), "the loaded module differs"
    assert "nets" in sys.modules
    program = fxprune.load("small.pt2")
    torch.testing.assert_close(program(given["x"]), given["y"])
fxprune.export(loaded, "small.onnx")
session = onnxruntime.InferenceSession("small.onnx", providers=["CPUExecutionProvider"])
(found,) = session.run(None, {session.get_inputs()[0].name: given["x"].numpy()})
torch.testing.assert_close(torch.from_numpy(found), given["y"], rtol=1e-4, atol=1e-5)
"""
    root = Path(__file__).parents[2]
    script = script.replace('"tests"', repr(str(root / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=_environment(root),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _environment(root: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(root)}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = chain(6, 16, 16, 8), nn.Linear(8, 3)

    def forward(self, batch: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(batch["x"]) * scale) + batch["ids"][:, None]}


def test_nested_inputs_come_from_the_file(tmp_path: Path) -> None:
    given = {"x": torch.randn(2, 6), "ids": torch.arange(2)}
    small = fxprune.prune(make(Pair), ({**given},), example_kwargs={"scale": 0.5}, params=0.5, progress=False)
    for name in ("pair.safetensors", "pair.pt2"):
        fxprune.save(small, tmp_path / name)
    other = {"x": torch.randn(4, 6), "ids": torch.arange(4)}
    loaded, program = fxprune.load(tmp_path / "pair.safetensors", make(Pair, 2)), fxprune.load(tmp_path / "pair.pt2")
    expected = small(other, scale=0.5)["logits"]
    assert torch.equal(loaded(other, scale=0.5)["logits"], expected)
    torch.testing.assert_close(program(other, scale=0.5)["logits"], expected)


class Ordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(9, 6), chain(6, 16, 8)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.body(x + self.table(positions))


def in_order(positions: Tensor) -> Tensor:
    if bool((positions.diff() < 0).any()):
        raise ValueError("positions must be in order")
    return positions


def ordered() -> fx.GraphModule:
    """As pruned, with a node in its graph that takes positions in their order only."""
    small = fxprune.prune(make(Ordered), (torch.randn(2, 5, 6), torch.arange(4, 9)[None]), params=0.5, progress=False)
    node = next(n for n in small.graph.nodes if n.op == "placeholder" and n.name == "positions")
    with small.graph.inserting_after(node):
        checked = small.graph.call_function(in_order, (node,))
    node.replace_all_uses_with(checked, delete_user_cb=lambda user: user is not checked)
    small.recompile()
    return small


def test_a_network_that_refuses_integers_near_the_examples_is_sampled_on_its_own(tmp_path: Path) -> None:
    path = tmp_path / "ordered.safetensors"
    small = ordered()
    fxprune.save(small, path)
    written = artifact.read_artifact(path)
    assert from_json(written.inputs)["args"][1].values == (4, 5, 6, 7, 8)
    assert written.outputs == artifact.sample_of(small, from_json(written.inputs))
    # The class has no such node: there the positions are in another order, and the outputs are not those of the file.
    assert "does not compute what it did when it was saved" in message(path, make(Ordered))
    assert fxprune.load(path, make(Ordered), verify=False).meta["fxprune_inputs"]["args"][1].values == (4, 5, 6, 7, 8)


def test_files_that_keep_no_values_are_loaded(tmp_path: Path) -> None:
    """As they were written before: integers are then drawn from their range, for the sample too."""
    path = tmp_path / "older.safetensors"
    small = fxprune.prune(make(Ordered), (torch.randn(2, 5, 6), torch.arange(4, 9)[None]), params=0.5, progress=False)
    args = small.meta["fxprune_inputs"]["args"]
    small.meta["fxprune_inputs"] = {"args": (args[0], replace(args[1], values=None)), "kwargs": {}}
    fxprune.save(small, path)
    assert artifact.read_artifact(path).inputs["dict"]["args"]["tuple"][1] == {"tensor": [[1, 5], "int64", 4, 8]}
    fxprune.load(path, make(Ordered))


def test_a_pruned_part_of_a_model(tmp_path: Path) -> None:
    given = {"x": torch.randn(2, 6), "ids": torch.arange(2)}
    whole = fxprune.prune_submodule(make(Pair), "body", (given,), params=0.5, progress=False)
    fxprune.save(whole, tmp_path / "part.safetensors")
    loaded = fxprune.load(tmp_path / "part.safetensors", make(Pair, 4))
    assert isinstance(loaded, Pair)
    given = {"x": torch.randn(3, 6), "ids": torch.arange(3)}
    assert torch.equal(loaded(given)["logits"], whole(given)["logits"])
    with pytest.raises(InputError, match=r"A program is written of a whole network: save Pair as .safetensors"):
        fxprune.save(whole, tmp_path / "part.pt2")
    assert message(tmp_path / "part.safetensors", make()) == (
        f"'{tmp_path}/part.safetensors' holds a Pair of which 'body' was pruned; this Small has no such part."
    )


def test_a_network_pruned_more_than_once_is_loaded_into_the_dense_class(tmp_path: Path) -> None:
    path, model = tmp_path / "third.safetensors", make()
    second = pruned(pruned(model, flops=0.7), flops=0.7, attention="heads")
    third = pruned(second, flops=0.7)
    fxprune.save(third, path)
    loaded = fxprune.load(path, make(seed=1))
    assert loaded.meta["fxprune"].plan == third.meta["fxprune"].plan
    assert torch.equal(run(loaded.eval(), image(5)), run(third, image(5)))
    on_second = fxprune.load(path, second)  # a fresh instance of what was pruned last is as good
    assert on_second.meta["fxprune"].plan == third.meta["fxprune"].plan
    assert torch.equal(run(on_second.eval(), image(5)), run(third, image(5)))
    assert "had been pruned before (2x)" in " ".join(third.meta["fxprune"].notes)
    assert "The plan belongs to another model" in message(path, make(Shuffled), error=PlanError)


def test_a_part_pruned_twice(tmp_path: Path) -> None:
    given = ({"x": torch.randn(2, 6), "ids": torch.arange(2)},)
    once = fxprune.prune_submodule(make(Pair), "body", given, params=0.7, progress=False)
    twice = fxprune.prune_submodule(once, "body", given, params=0.7, progress=False)
    fxprune.save(twice, tmp_path / "part.safetensors")
    loaded = fxprune.load(tmp_path / "part.safetensors", make(Pair, 4))
    assert torch.equal(loaded(*given)["logits"], twice(*given)["logits"])


def test_loading_what_was_loaded_and_saved_again(saved: Path, tmp_path: Path) -> None:
    once = fxprune.load(saved, make())
    fxprune.save(once, tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(saved).keys()
    assert torch.equal(run(fxprune.load(tmp_path / "again.safetensors", make(seed=1)).eval(), image()),
                       run(once.eval(), image()))  # fmt: skip


def test_a_head_that_was_exchanged_after_the_pruning_is_refused(tmp_path: Path) -> None:
    small = pruned()
    features = small.get_submodule("head").in_features
    for head, found in ((nn.Linear(features, 3), f"[3, {features}]"), (nn.Identity(), "gone")):
        small.set_submodule("head", head)
        with pytest.raises(InputError) as caught:
            fxprune.save(small, tmp_path / "new.safetensors")
        assert str(caught.value) == (
            f"The weight of head is {found}, and was [10, {features}] when the network was pruned. A file is loaded "
            "into the class of that: exchange layers before pruning, or save a program (.pt2)."
        )
    fxprune.save(small, tmp_path / "new.pt2")
    assert run(fxprune.load(tmp_path / "new.pt2"), image(5)).shape == (5, features)


def test_inputs_as_json() -> None:
    record = {"args": (TensorSpec((1, 3), torch.int64, 2, 5), [None, 1, 0.5, True]), "kwargs": {"a": {"b": "c"}}}
    assert from_json(json.loads(json.dumps(to_json(record)))) == record
    with pytest.raises(TypeError, match="a slice among the example inputs"):
        to_json({"args": (slice(1),), "kwargs": {}})


# -- programs


def test_a_program_has_the_batch_that_the_recording_fixes(tmp_path: Path) -> None:
    small = pruned()
    small.meta[DIMS_KEY] = [{"tensor": 0, "dim": 0, "size": 2, "free": False, "why": "net.py:7"}]
    fxprune.save(small, tmp_path / "fixed.pt2")
    program = fxprune.load(tmp_path / "fixed.pt2")
    torch.testing.assert_close(run(program, image()), run(small, image()))
    with pytest.raises((AssertionError, RuntimeError), match=r"shape\[0\]|size\(\)\[0\]"):
        run(program, torch.cat([image(), image()]))


def test_a_program_runs_without_the_class_at_any_batch_size(tmp_path: Path) -> None:
    small = pruned()
    small.train()
    fxprune.save(small, tmp_path / "small.pt2")
    assert small.training
    small.eval()
    program = fxprune.load(tmp_path / "small.pt2")
    for batch in (1, 2, 7):
        torch.testing.assert_close(run(program, image(batch)), run(small, image(batch)))
    assert program.eval() is program
    with pytest.raises(InputError, match=r"A \.pt2 program is for inference\. To fine-tune, load a \.safetensors file"):
        program.train()
    assert message(tmp_path / "small.pt2", make(), error=InputError) == (
        f"'{tmp_path}/small.pt2' is a program that needs no class: leave out the model."
    )


class TwoOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = chain(4, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).view(2, 4)


def test_a_program_of_a_network_with_one_batch_size_has_that_size(tmp_path: Path) -> None:
    small = fxprune.prune(make(TwoOnly), torch.randn(2, 4), params=0.6, progress=False)
    (batch,) = (dim for dim in small.meta["fxprune"].inputs if dim.dim == 0)
    assert not batch.free
    assert batch.why.startswith("the model takes no other size that was tried (3, 4)")
    fxprune.save(small, tmp_path / "two.pt2")
    x = torch.randn(2, 4)
    torch.testing.assert_close(fxprune.load(tmp_path / "two.pt2")(x), small(x))


class RefusesOthers(TwoOnly):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 2:
            raise ValueError("two, please")
        return self.body(x)


def test_a_program_has_the_batch_of_a_recording_that_refuses_others(tmp_path: Path) -> None:
    small = fxprune.prune(make(RefusesOthers), torch.randn(2, 4), params=0.6, progress=False, verify=False)
    assert DIMS_KEY not in small.meta  # nothing was tried
    fxprune.save(small, tmp_path / "two.pt2")
    x = torch.randn(2, 4)
    torch.testing.assert_close(fxprune.load(tmp_path / "two.pt2")(x), small(x))


class OthersWhenLarge(TwoOnly):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return result + 1 if len(x) > 63 else result


def test_a_program_refuses_batches_for_which_the_network_does_something_else(tmp_path: Path) -> None:
    small = fxprune.prune(make(OthersWhenLarge), torch.randn(2, 4), params=0.6, progress=False)
    fxprune.save(small, tmp_path / "small.pt2")
    program = fxprune.load(tmp_path / "small.pt2")
    x = torch.randn(64, 4)
    torch.testing.assert_close(program(x[:63]), small(x[:63]))
    with pytest.raises((AssertionError, RuntimeError), match="63"):
        program(x)


def test_a_program_that_torch_cannot_capture(tmp_path: Path) -> None:
    small = fxprune.prune(make(TwoOnly), torch.randn(2, 4), params=0.6, progress=False, verify=False)
    with pytest.raises(ExportError, match=r"torch\.export cannot capture TwoOnly with a dynamic batch: "):
        fxprune.save(small, tmp_path / "two.pt2")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_programs(tmp_path: Path) -> None:
    path = tmp_path / "small.pt2"
    fxprune.save(pruned(), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert message(path).startswith(f"'{path}' is damaged or no .pt2 file (")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    assert message(path) == f"'{path}' was not written by fxprune.save: it has no fxprune.json."
    at = content.index(b'"format"')
    path.write_bytes(content[:at] + b"x" + content[at + 1 :])
    assert message(path) == f"'{path}' is damaged: archive/extra/fxprune.json in it was changed. Save or copy it again."


# -- what is refused on loading


def test_a_truncated_file(saved: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "cut.safetensors", saved.read_bytes()
    for length in (0, 4, 100, len(content) - 1):
        path.write_bytes(content[:length])
        text = message(path, make())
        assert text.startswith(f"'{path}' is damaged or no safetensors file (")
        assert text.endswith("Save or copy it again.")


def test_a_flipped_bit(saved: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "bit.safetensors", bytearray(saved.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert message(path, make()) == (
        f"'{path}' was changed after it was saved (its digest differs). Save or copy it again."
    )


def rewritten(saved: Path, path: Path, change: Any = None, **tensors: Tensor | None) -> Path:
    """The file with other metadata or tensors, and a digest that fits."""
    with safe_open(saved, framework="pt") as file:
        data = json.loads(file.metadata()["fxprune"])
    data.pop("digest")
    if change is not None:
        change(data)
    stored = {name: t for name, t in {**load_file(saved), **tensors}.items() if t is not None}
    text = json.dumps({**data, "digest": artifact.digest_of(data, stored)})
    save_file(stored, path, {"fxprune": text})
    return path


def test_missing_unexpected_and_misshapen_tensors_are_named(saved: Path, tmp_path: Path) -> None:
    path = rewritten(saved, tmp_path / "a.safetensors", **{"head.bias": None, "more": torch.ones(2),
                                                            "head.weight": torch.ones(10, 3)})  # fmt: skip
    kept = load_file(saved)["head.weight"].shape[1]
    assert message(path, make()) == (
        f"the weights in '{path}' are not those of this Small; missing: head.bias; unexpected: more; of another shape: "
        f"head.weight ([10, 3] in the file, [10, {kept}] in the model)"
    )


def test_other_models_formats_and_kinds(saved: Path, tmp_path: Path) -> None:
    assert message(saved, make(Shuffled), error=PlanError).startswith(
        f"'{saved}' holds a pruned Small, and model is a Shuffled. The plan belongs to another model"
    )
    newer = rewritten(saved, tmp_path / "new.safetensors", lambda data: data.update(format=99))
    assert message(newer, make()) == f"'{newer}' has format 99; fxprune {fxprune.__version__} reads 1."
    short = rewritten(saved, tmp_path / "short.safetensors", lambda data: data.pop("inputs"))
    assert message(short, make()).startswith(f"'{short}' is damaged: its metadata cannot be read (")
    plain = tmp_path / "plain.safetensors"
    save_file({"x": torch.ones(2)}, plain)
    assert message(plain, make()) == (
        f"'{plain}' holds tensors, but no plan: fxprune.save did not write it. Load plain weights into the "
        "model before fxprune.prune."
    )
    pickled = tmp_path / "p.safetensors"
    torch.save(make().state_dict(), pickled)
    assert message(pickled, make()).startswith(f"'{pickled}' is damaged or no safetensors file (")
    assert message(saved, error=InputError) == (
        f"'{saved}' holds weights and a plan: pass a fresh, unpruned instance of Small as model."
    )
    assert (
        message(tmp_path / "no.safetensors", make(), error=InputError)
        == f"there is no file '{tmp_path}/no.safetensors'"
    )
    assert message(tmp_path / "a.pth", make(), error=InputError) == (
        f"'{tmp_path}/a.pth' must end in .safetensors (data, for a fresh instance of the class) or .pt2 (a program)"
    )
    with torch.device("meta"):
        empty = Small()
    assert message(saved, empty, error=InputError).startswith("The model is on the meta device; make it on a real one")


class Other(Small):
    """The same parameters, another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(x))


def test_a_class_that_computes_something_else(saved: Path) -> None:
    text = message(saved, make(Other))
    assert text.startswith(
        f"the network in '{saved}' does not compute what it did when it was saved (relative difference "
    )
    assert f"the code of Small is another one. Saved with fxprune {fxprune.__version__}, torch" in text
    fxprune.load(saved, make(Other), verify=False)


# -- what is refused on saving


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    def said(module: Any, name: str = "x.safetensors") -> str:
        with pytest.raises(InputError) as caught:
            fxprune.save(module, tmp_path / name)
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    assert said(make()).startswith("Small holds no part that fxprune pruned. Pass what fxprune.prune, apply or load")
    assert said(None) == "pruned is None; pass what fxprune.prune, apply or load returned."
    for wrong in (3, None, b"x.pt2"):
        for call in (lambda path: fxprune.save(make(), path), fxprune.load, fxprune.PruningPlan.load):
            with pytest.raises(FxpruneError, match="is no path: pass a str or a pathlib"):
                call(wrong)
    small = pruned()
    assert said(nn.DataParallel(small)) == "DataParallel wraps the pruned module: pass its .module."
    compiled = torch.compile(small, backend="eager")
    assert said(compiled) == "OptimizedModule wraps the pruned module: pass its ._orig_mod."
    assert said(nn.DataParallel(compiled)) == "DataParallel wraps the pruned module: pass its .module._orig_mod."
    assert said(small, "x.bin").endswith("or .pt2 (a program)")
    assert said(small, "no/x.pt2").endswith("does not exist; create it first")
    with torch.device("meta"):
        model = Small()
    empty = fxprune.prune(model, image().to("meta"), method="random", flops=0.5, progress=False)
    assert said(empty) == "stem.0.weight is on the meta device and has no values to save."


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: what a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", ["safetensors", "pt2"])
def test_a_full_disk_leaves_what_was_there(suffix: str, tmp_path: Path) -> None:
    small, path = pruned(), tmp_path / f"x.{suffix}"
    fxprune.save(small, path)
    before = path.read_bytes()
    with small_files(len(before) // 4), pytest.raises(WriteError, match=f"'{path}' could not be written: "):
        fxprune.save(small, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    fxprune.save(pruned(), path)
    before = path.read_bytes()

    def interrupted(draft: Path, content: Any) -> None:
        with draft.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxprune.save(pruned(), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


# -- what into returned


def test_an_instance_of_the_class_comes_back_as_one(tmp_path: Path) -> None:
    small = pruned(for_class=True)
    network: Any = fxprune.into(make(), small)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    fxprune.save(network, tmp_path / "a.safetensors")
    assert artifact.read_artifact(tmp_path / "a.safetensors").own_class
    loaded: Any = fxprune.load(tmp_path / "a.safetensors", make(seed=3))
    assert type(loaded) is Small
    assert torch.equal(run(loaded.eval(), image(5)), run(network.eval(), image(5)))
    report = loaded.fxprune_meta["fxprune"]
    assert (report.plan, report.macs_after) == (small.meta["fxprune"].plan, small.meta["fxprune"].macs_after)


def test_an_instance_of_the_class_that_was_pruned_twice_comes_back_as_one(tmp_path: Path) -> None:
    once = fxprune.into(make(), pruned(for_class=True))
    twice = fxprune.into(once, pruned(once, for_class=True, flops=0.8)).eval()
    fxprune.save(twice, tmp_path / "a.safetensors")
    loaded = fxprune.load(tmp_path / "a.safetensors", make(seed=3))
    assert type(loaded) is Small
    assert torch.equal(run(loaded.eval(), image(5)), run(twice, image(5)))


def test_an_instance_of_the_class_is_no_program_and_no_graph_of_several_calls(tmp_path: Path) -> None:
    network = fxprune.into(make(), pruned(for_class=True))
    with pytest.raises(InputError, match=r"^A program is written of a graph: save Small as \.safetensors, or"):
        fxprune.save(network, tmp_path / "a.pt2")
    model = make()
    several = fxprune.prune(model, {"one": image(), "other": {"x": image()}}, flops=0.5, for_class=True, progress=False)
    with pytest.raises(InputError, match="Small was pruned for several calls, of which a file holds the graph alone"):
        fxprune.save(fxprune.into(model, several), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


class Categories(nn.Module):
    """Its first column is a category, whole or a quarter of one: random floats are none."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.table, self.a, self.b, self.times = nn.Embedding(4, 8), nn.Linear(15, 32), nn.Linear(32, 3), times

    def forward(self, x: Tensor) -> Tensor:
        category = (self.times * x[:, 0]).long()
        found: Tensor = self.b(self.a(torch.cat([self.table(category), x[:, 1:]], 1)).relu())
        return found


def test_categories_in_a_column_of_floats_are_saved_and_exported(tmp_path: Path) -> None:
    x = torch.cat([torch.tensor([[1.0], [3.0]]), torch.randn(2, 7)], 1)
    model = Categories().eval()
    small = fxprune.prune(model, x, flops=0.5, progress=False)
    fxprune.save(small, tmp_path / "small.safetensors")
    torch.testing.assert_close(fxprune.load(tmp_path / "small.safetensors", model)(x), small(x))
    assert fxprune.export(small, tmp_path / "small.onnx").max_rel_error < 1e-4


def test_a_network_that_fails_on_random_inputs_is_refused_when_saved_and_told_what_to_do(tmp_path: Path) -> None:
    x = torch.cat([torch.tensor([[0.25], [0.75]]), torch.randn(2, 7)], 1)
    small = fxprune.prune(Categories(times=4).eval(), x, flops=0.5, progress=False)
    with pytest.raises(FxpruneError, match=r"fails on random inputs.*Save its plan"):
        fxprune.save(small, tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())

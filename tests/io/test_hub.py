"""A pruned network as a folder: weights, plan and card, whole or not at all; sent to a hub and taken from it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Small, chain, image, make
from torch import nn

import fxprune
from fxprune.errors import ArtifactError, ExampleInputsError, InputError, PlanError, WriteError
from fxprune.io.files import filling
from fxprune.io.text import quantity

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
FILES = ["README.md", "model.safetensors", "plan.json"]


@pytest.fixture(scope="module")
def small() -> Any:
    return fxprune.prune(make(Small), image(), flops=0.5, progress=False).eval()


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# -- there and back


@pytest.mark.parametrize("own_class", [False, True])
def test_a_folder_holds_weights_plan_and_card(small: Any, own_class: bool, tmp_path: Path) -> None:
    network: Any = fxprune.into(make(Small), small).eval() if own_class else small
    with torch.no_grad():
        for parameter in network.parameters() if own_class else ():
            parameter.mul_(1.1)  # as fine-tuning would
    fxprune.save_pretrained(network, tmp_path / "half")
    assert names(tmp_path / "half") == FILES
    assert fxprune.PruningPlan.load(tmp_path / "half/plan.json") == small.meta["fxprune"].plan
    loaded = fxprune.load_pretrained(str(tmp_path / "half"), make(Small, seed=3))
    assert type(loaded) is (Small if own_class else type(loaded))
    assert torch.equal(loaded.eval()(image(5)), network(image(5)))
    fxprune.save_pretrained(loaded, tmp_path / "again")
    assert torch.equal(fxprune.load_pretrained(tmp_path / "again", make(Small)).eval()(image(5)), network(image(5)))


def test_the_card_tells_what_was_measured(small: Any, tmp_path: Path) -> None:
    latency = fxprune.Latency(8.0, 5.0, "CPUExecutionProvider", "AMD EPYC", 1, 1, 31, "onnxruntime 1.31.1")
    validation = fxprune.export(small, tmp_path / "s.onnx", image(), provider="CPUExecutionProvider")
    fxprune.save_pretrained(
        small, tmp_path / "half", accuracy={"top-1": (81.2, 80.5), "a|\nb": 3}, latency=latency, validation=validation,
        command="python prune.py",
    )  # fmt: skip
    card = (tmp_path / "half/README.md").read_text()
    report = small.meta["fxprune"]
    assert card.startswith("---\nlibrary_name: fxprune\ntags:\n- fxprune\n- pruning\n---\n\n# Small, pruned\n")
    for line in (
        "method `l2`, budget `flops=0.5`",
        f"| MACs | 547 k | {quantity(report.macs_after)} | {report.macs_after / report.macs_before:.1%} |",
        "| milliseconds (AMD EPYC, CPUExecutionProvider, batch size 1, onnxruntime 1.31.1) | 8.00 | 5.00 | 62.5% |",
        "| top-1 | 81.2 | 80.5 |  |",
        "| a\\| b | – | 3 |  |",
        f"relative error {report.oracle_error:.1e}",
        f"error {validation.max_abs_error:.1e} absolute, {validation.max_rel_error:.1e} relative, against torch",
        'network = fxprune.load_pretrained("half", dense)',
        "```sh\npython prune.py\n```",
        f"torch {torch.__version__}",
    ):
        assert line in card, line


def test_the_card_says_what_was_not_measured_and_how_to_make_it_again(small: Any, tmp_path: Path) -> None:
    fxprune.save_pretrained(small, tmp_path / "half")
    card = (tmp_path / "half/README.md").read_text()
    assert "onnxruntime: not run." in card
    assert "milliseconds" not in card
    assert 'small = fxprune.prune(dense, example_inputs, method="l2", flops=0.5)' in card
    code = 'small = fxprune.apply(dense, fxprune.PruningPlan.load("plan.json"), example_inputs)'
    assert code in card
    given: dict[str, Any] = {"fxprune": fxprune, "dense": make(Small), "example_inputs": image()}
    exec(code.replace("plan.json", str(tmp_path / "half/plan.json")), given)
    assert given["small"].meta["fxprune"].plan == small.meta["fxprune"].plan


def test_the_card_of_a_network_that_was_pruned_twice(small: Any, tmp_path: Path) -> None:
    twice = fxprune.prune(small, image(), flops=0.8, progress=False)
    fxprune.save_pretrained(twice, tmp_path / "twice")
    card = (tmp_path / "twice/README.md").read_text()
    assert "budget `flops=0.8`, of a network that had been pruned before (1x), against which the figures are." in card
    assert (
        f"| | before | pruned | stays |\n|---|---:|---:|---:|\n| MACs | {quantity(twice.meta['fxprune'].macs_before)}"
        in card
    )
    assert "fxprune.prune(" not in card, "one call makes another network"
    assert torch.equal(fxprune.load_pretrained(tmp_path / "twice", make(Small)).eval()(image(5)), twice(image(5)))


def test_a_folder_that_is_there_keeps_what_is_not_the_networks(small: Any, tmp_path: Path) -> None:
    for name in ("notes.txt", "plan.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("old")
    fxprune.save_pretrained(small, tmp_path)
    assert names(tmp_path) == sorted([*FILES, "notes.txt"])
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert fxprune.PruningPlan.load(tmp_path / "plan.json") == small.meta["fxprune"].plan


# -- what goes wrong


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("failing", FILES)
def test_a_full_disk_in_the_middle(
    small: Any, failing: str, is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "half"
    if is_there:
        fxprune.save_pretrained(small, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()} if is_there else None

    def full(method: Any) -> Any:
        def write(self: Path, *args: Any, **kwargs: Any) -> Any:
            if self.name == failing:
                raise OSError(28, "No space left on device")
            return method(self, *args, **kwargs)

        return write

    for method in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, method, full(getattr(Path, method)))
    with pytest.raises(WriteError, match=r"could not be written: No space left on device$") as caught:
        fxprune.save_pretrained(small, folder)
    assert str(caught.value).startswith(f"'{folder}"), "the folder that was asked for, not where it was prepared"
    assert names(tmp_path) == (["half"] if is_there else [])
    assert before is None or before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_is_made_or_filled_and_refused_where_it_cannot_be(tmp_path: Path) -> None:
    with filling(tmp_path / "new") as draft:
        (draft / "a").write_text("1")
        assert not (tmp_path / "new").exists()
    assert names(tmp_path / "new") == ["a"]
    (tmp_path / "file").touch()
    for path, message in [
        (tmp_path / "file", f"cannot write to '{tmp_path}/file': it is a file; give the name of a folder"),
        (
            tmp_path / "no" / "x",
            f"cannot write to '{tmp_path}/no/x': the folder '{tmp_path}/no' does not exist; create it first",
        ),
        (3, "3 is no path of a folder: pass a str or a pathlib.Path"),
    ]:
        with pytest.raises(InputError) as caught, filling(path):  # type: ignore[arg-type]
            pass
        assert str(caught.value) == message


def test_arguments_that_cannot_be_used(small: Any, tmp_path: Path) -> None:
    def said(network: Any = small, **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            fxprune.save_pretrained(network, tmp_path / "half", **options)
        assert names(tmp_path) == []
        return str(caught.value)

    assert said(accuracy=0.8).startswith("accuracy=0.8 must be a dict of what was measured: {'ImageNet top-1': 80.6}")
    assert said(accuracy={"top-1": "80"}).startswith("accuracy={'top-1': '80'} must be a dict")
    assert said(accuracy={"a": float("nan")}) == "accuracy={'a': nan}: 'a' is nan, which is no result; leave it out."
    assert "'b' is inf, which is no result" in said(accuracy={"a": 1, "b": (np.float32("inf"), 80.1)})
    assert said(latency=3.0) == "latency is float; pass what fxprune.bench returned."
    assert said(validation=1e-5) == "validation is float; pass what fxprune.export or validate returned."
    assert said(command=3) == "command=3 must be text."
    assert said(private="no") == "private='no' must be True or False."
    assert said(max_shard_size=3) == "max_shard_size: for a class of transformers only, for its save_pretrained."
    assert said(make()).startswith("Small holds no part that fxprune pruned.")
    weights = make().state_dict()
    assert said(weights) == "pruned is of type OrderedDict; pass what fxprune.prune, apply, load or into returned."
    assert said(3) == "pruned is 3; pass what fxprune.prune, apply, load or into returned."
    assert said(push_to_hub="a/b/c").startswith("push_to_hub='a/b/c' is no name of a repository, such as 'user/name': ")


def refusal(folder: Any, error: type[Exception], *args: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        fxprune.load_pretrained(folder, *args, **options)
    return str(caught.value)


def test_folders_that_are_none(small: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for folder, message in [
        (tmp_path / "no", f"there is no folder '{tmp_path}/no'"),
        ("./no", "there is no folder './no'"),
        (tmp_path / "file", f"'{tmp_path}/file' is a file; pass the folder, or the file to fxprune.load."),
        (3, "3 is no folder: pass a path, or the name of a repository, 'user/name'."),
    ]:
        assert refusal(folder, InputError) == message
    said = refusal(tmp_path / "empty", ArtifactError)
    assert said.endswith(
        "is no folder that fxprune.save_pretrained wrote: it has no model.safetensors. There is nothing."
    )
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "empty/model.safetensors")
    assert "holds tensors, but no plan" in refusal(tmp_path / "empty", ArtifactError, make())


def test_a_plan_that_is_damaged_or_of_another_network(small: Any, tmp_path: Path) -> None:
    fxprune.save_pretrained(small, tmp_path / "half")
    plan = tmp_path / "half/plan.json"
    fxprune.prune(make(Small), image(), flops=0.8, progress=False).meta["fxprune"].plan.save(plan)
    said = refusal(tmp_path / "half", ArtifactError, make())
    assert said == f"'{plan}' is not the plan of model.safetensors beside it. Copy the folder again."
    plan.write_text("{")
    assert "plan.json" in refusal(tmp_path / "half", PlanError, make())
    plan.unlink()
    assert fxprune.load_pretrained(tmp_path / "half", make()).meta["fxprune"].plan == small.meta["fxprune"].plan


def test_a_folder_of_another_model(small: Any, tmp_path: Path) -> None:
    fxprune.save_pretrained(small, tmp_path / "half")
    assert "pass a fresh, unpruned instance of Small as model" in refusal(tmp_path / "half", InputError)
    other: nn.Module = chain()
    said = refusal(tmp_path / "half", PlanError, other)
    assert said.startswith(
        f"'{tmp_path}/half/model.safetensors' holds a pruned Small, and model is a Sequential. The plan"
    )
    said = refusal(tmp_path / "half", ExampleInputsError, nn.Linear(3, 4))
    assert "holds a pruned Small, and model is a Linear. Linear.forward raised RuntimeError" in said
    said = refusal(tmp_path / "half", InputError, make(), dtype="auto")
    assert said == "dtype: for a class of transformers only, for its from_pretrained."
    (tmp_path / "half/model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    said = refusal(tmp_path / "half", ArtifactError, make())
    assert said == f"'{tmp_path}/half/model.safetensors' is a pointer of Git LFS, not the file: run git lfs pull."
    (tmp_path / "half/model.safetensors").write_bytes(b"half of it")
    assert "is damaged or no safetensors file" in refusal(tmp_path / "half", ArtifactError, make())


def test_without_the_library_of_hubs(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    missing = r"^This needs huggingface_hub: pip install 'fxprune\[hub\]'\.$"
    with pytest.raises(InputError, match=missing):
        fxprune.save_pretrained(small, tmp_path / "half", push_to_hub="user/half")
    with pytest.raises(InputError, match=missing):
        fxprune.load_pretrained("user/half")
    fxprune.save_pretrained(small, tmp_path / "half")  # a local folder needs none
    fxprune.load_pretrained(tmp_path / "half", make())


# -- a hub on this machine, for the real library ----------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """One repository, as far as ``huggingface_hub`` asks for it: made, filled by a commit of small files, and read."""

    protocol_version = "HTTP/1.1"
    made: dict[str, Any]
    files: dict[str, bytes]
    SHA = "0123456789" * 4

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", headers.pop("size", str(len(body))))
        self.end_headers()
        self.wfile.write(body)

    def say(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        page = f"http://{self.headers['Host']}/user/half"
        if self.path.endswith("/repos/create"):
            self.made.update(json.loads(body))
            self.say({"url": page, "id": "user/half", "name": "user/half"})
        elif self.path.endswith("/validate-yaml"):
            self.say({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            given = json.loads(body)["files"]
            self.say({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in given]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.say({"commitUrl": f"{page}/commit/{self.SHA}", "commitOid": self.SHA, "success": True})
        else:
            self.answer(404)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/models/user/half"):
            siblings = [{"rfilename": file, "size": len(content)} for file, content in self.files.items()]
            entries = [{"type": "file", "path": f, "size": len(c), "oid": f} for f, c in self.files.items()]
            info = {"id": "user/half", "modelId": "user/half", "sha": self.SHA, "siblings": siblings}
            self.say(entries if "/tree/" in self.path else info)
        elif "/resolve/" in self.path and name in self.files:
            body = self.files[name]
            kept = {"ETag": f'"{name}"', "X_Repo_Commit": self.SHA}
            self.answer(200, b"" if self.command == "HEAD" else body, size=str(len(body)), **kept)
        else:
            self.answer(404, X_Error_Code="RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], str]]:
    class Own(Hub):
        made: dict[str, Any] = {}  # noqa: RUF012
        files: dict[str, bytes] = {}  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Own, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


PUSHED = """
import torch, fxprune
from nets import image, make
small = fxprune.prune(make(), image(), flops=0.5, progress=False).eval()
fxprune.save_pretrained(small, "local", push_to_hub="user/half", private=True)  # which holds a secret
loaded = fxprune.load_pretrained("user/half", make(seed=3)).eval()
assert torch.equal(loaded(image(5)), small(image(5)))
for name, call in {
    "save": lambda: fxprune.save_pretrained(small, "local", push_to_hub="user/other/one"),
    "load": lambda: fxprune.load_pretrained("user/other"),
}.items():
    try:
        call()
    except fxprune.FxpruneError as error:
        print(name, type(error).__name__, error)
"""


def test_a_folder_goes_to_a_hub_and_comes_back(hub: tuple[type[Hub], str], tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="hubs are an extra: pip install '.[hub]'")
    kind, address = hub
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    own = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_TOKEN": "none", "HF_HUB_DISABLE_XET": "1"}
    (tmp_path / "local").mkdir()
    (tmp_path / "local/secret.txt").touch()
    run = subprocess.run(
        [sys.executable, "-c", PUSHED], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, **own},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (kind.made["name"], "private" in json.dumps(kind.made)) == ("half", True)
    assert sorted(kind.files) == [*FILES]
    assert kind.files["plan.json"] == (tmp_path / "local/plan.json").read_bytes()
    assert b'fxprune.load_pretrained("user/half", dense)' in kind.files["README.md"]
    assert "load InputError there is no folder 'user/other', and the hub does not give one: " in run.stdout

"""The study of ONNX files: what is exported, at which batch sizes, and what is not. All networks are made up."""

from __future__ import annotations

from pathlib import Path

from model_zoo.records import read
from model_zoo.runner import main

NETWORKS = """
import torch
from torch import nn
from model_zoo.networks.subject import Subject, normal

class Net(nn.Module):
    def __init__(self, solves=False):
        super().__init__()
        self.one, self.two, self.solves = nn.Linear(6, 8), nn.Linear(8, 4), solves

    def forward(self, x):
        y = self.two(self.one(x).relu())
        return torch.linalg.solve(torch.eye(4) * 2, y.mT).mT if self.solves else y

def rows(batch, size, seed):
    return (normal((batch, *size), seed),), {}

def written():
    return Subject(Net().eval(), rows, 2, (6,))

def unwritten():
    return Subject(Net(solves=True).eval(), rows, 2, (6,))
"""


def test_the_command_counts_files_and_names_what_has_none(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETWORKS)
    names = [f"{tmp_path}/nets.py:{name}" for name in ("written", "unwritten")]
    out = tmp_path / "exported.jsonl"
    assert main(["run", "exported", *names, "--out", str(out)]) == 1
    written, unwritten = (read(out)[1][name] for name in names)
    assert written.checks == {"load": "", "prune": "", "export": ""}
    assert written.figures["error"] < 1e-5
    assert len(written.figures["batches"]) > 1
    assert "linalg_solve" in unwritten.failures["export"]
    assert "- export: 1 of 2" in out.with_suffix(".md").read_text()

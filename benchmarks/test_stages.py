"""The hot pieces, with pytest-benchmark, outside the test gate:

pip install ".[bench,test]" && python -m pytest benchmarks -n 0 --override-ini filterwarnings=default
"""

from itertools import pairwise
from typing import Any

import pytest
import timm
import torch

from fxprune import recording
from fxprune.groups import analyse_graph
from fxprune.labels.classes import Classes
from fxprune.methods import ModelState, resolve, score_groups
from fxprune.recording.inputs import resolve_inputs
from fxprune.rewriting import check_rewrite, draft
from fxprune.selection.budget import Budget, select

NETWORKS = ["resnet50", "mobilenetv3_large_100", "vit_small_patch16_224"]


class Prepared:
    """A network, and what each stage is given."""

    def __init__(self, name: str):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = timm.create_model(name).eval()
        self.args, self.kwargs = resolve_inputs(self.model, None, None)
        self.module = recording.record(self.model, self.args, self.kwargs)
        self.graph = analyse_graph(self.module, self.args, self.kwargs)
        tensors = dict([*self.module.named_parameters(), *self.module.named_buffers()])
        self.state = ModelState(self.graph, tensors, 0)
        self.scores = score_groups(resolve("l2"), self.state)
        self.keep = select(self.graph, self.scores, Budget("flops", 0.5)).keep


@pytest.fixture(scope="module", params=NETWORKS)
def prepared(request: pytest.FixtureRequest) -> Prepared:
    return Prepared(request.param)


def test_record(benchmark: Any, prepared: Prepared) -> None:
    benchmark(recording.record, prepared.model, prepared.args, prepared.kwargs)


def test_label(benchmark: Any, prepared: Prepared) -> None:
    benchmark(analyse_graph, prepared.module, prepared.args, prepared.kwargs)


def test_score(benchmark: Any, prepared: Prepared) -> None:
    graph, tensors = prepared.graph, prepared.state.tensors
    benchmark(lambda: score_groups(resolve("l2"), ModelState(graph, tensors, 0)))


def test_select(benchmark: Any, prepared: Prepared) -> None:
    benchmark(select, prepared.graph, prepared.scores, Budget("flops", 0.5))


def test_cost_of_a_plan(benchmark: Any, prepared: Prepared) -> None:
    benchmark(prepared.graph.cost.macs, prepared.keep)


def test_draft_and_check(benchmark: Any, prepared: Prepared) -> None:
    def both() -> None:
        drafted = draft(prepared.module, prepared.graph, prepared.keep, {})
        assert check_rewrite(drafted.module, prepared.graph, prepared.keep, prepared.args, prepared.kwargs) is None

    benchmark(both)


def test_fill(benchmark: Any, prepared: Prepared) -> None:
    def drafted() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (draft(prepared.module, prepared.graph, prepared.keep, {}),), {}

    benchmark.pedantic(lambda found: found.finished(), setup=drafted, rounds=5)


def test_joins(benchmark: Any) -> None:
    def chain() -> None:
        classes = Classes()
        rows = classes.allocate(1000 * 512).reshape(1000, 512)
        for one, other in pairwise(rows):
            classes.join(one, other)

    benchmark(chain)

"""Functions that decide on what layers computed are called by the graph, where nothing that could be cut goes in."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nets import scripted
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import GuardError
from fxprune.recording.leaf_functions import leaf_functions_of


def suppressed(boxes: Tensor, scores: Tensor, overlap: float) -> tuple[Tensor, Tensor]:
    """Intervals, best first, without those that overlap a better one."""
    order, kept = scores.argsort(descending=True), []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        both = torch.minimum(boxes[order, 1], boxes[best, 1]) - torch.maximum(boxes[order, 0], boxes[best, 0])
        order = order[both < overlap]
    chosen = torch.stack(kept)
    return boxes[chosen], scores[chosen]


def counted(boxes: Tensor, scores: Tensor) -> Tensor:
    """The boxes of scores above their mean, one by one."""
    kept = scores > scores.mean()
    total = boxes[0] * 0
    for i in range(int(kept.sum())):
        total = total + boxes[kept][i]
    return total


def shifted(hidden: Tensor) -> Tensor:
    """Shifts features where that takes their mean below zero."""
    return hidden - 1 if hidden.mean() < 0.5 else hidden


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.boxes, self.scores = nn.Conv1d(3, 16, 3, padding=1), nn.Conv1d(16, 2, 1), nn.Conv1d(16, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.stem(x).relu()
        start, length = self.boxes(hidden)[0]
        start = torch.arange(len(start), dtype=x.dtype, device=x.device) / 4 + start
        return suppressed(torch.stack([start, start + length.abs()], 1), self.scores(hidden)[0, 0], 0.1)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(shifted(self.a(x)))


def detector() -> tuple[Detector, Tensor]:
    torch.manual_seed(0)
    return Detector().eval(), torch.randn(1, 3, 40)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, one, other))


def test_a_loop_over_what_layers_chose_is_called_and_follows_other_inputs() -> None:
    model, x = detector()
    small = fxprune.prune(model, x, flops=0.5, progress=False)
    assert [name.rpartition(":")[2] for name in leaf_functions_of(small.graph)] == ["suppressed"]
    dense = fxprune.into(model, small)
    for factor in (1, 3, 10):
        y = torch.randn(1, 3, 56) * factor
        assert same(small(y), dense(y))
    assert len({len(small(torch.randn(1, 3, 40))[0]) for _ in range(5)}) > 1


def test_what_reaches_it_is_locked_and_told() -> None:
    model, x = detector()
    report = fxprune.prune(model, x, flops=0.5, progress=False).meta["fxprune"]
    assert {row.name: row.after[0] for row in report.rows if row.name != "stem"} == {"boxes": 2, "scores": 1}
    assert any("what it does depends on values" in note and "test_leaf_functions.py" in note for note in report.notes)


def test_gradients_run_through_it() -> None:
    model, x = detector()
    small = fxprune.prune(model, x, flops=0.5, progress=False).train()
    sum(part.sum() for part in small(x)).backward()
    assert small.stem.weight.grad is not None
    assert float(small.stem.weight.grad.abs().sum()) > 0


def test_the_plan_names_it_so_that_other_weights_are_loaded_alike(tmp_path) -> None:
    model, x = detector()
    small = fxprune.prune(model, x, flops=0.5, progress=False)
    plan = small.meta["fxprune"].plan
    assert plan.leaf_functions == leaf_functions_of(small.graph)
    plan.save(tmp_path / "plan.json")
    assert fxprune.PruningPlan.load(tmp_path / "plan.json").leaf_functions == plan.leaf_functions
    fxprune.save(small, tmp_path / "small.safetensors")
    fresh = Detector().eval()
    nn.init.constant_(fresh.scores.weight, 0.0)
    loaded = fxprune.load(tmp_path / "small.safetensors", fresh)
    y = torch.randn(1, 3, 40)
    assert same(loaded(y), small(y))


def test_it_can_be_pruned_again_copied_and_pickled() -> None:
    model, x = detector()
    small = fxprune.prune(model, x, flops=0.5, progress=False)
    smaller = fxprune.prune(small, x, flops=0.6, progress=False)
    assert leaf_functions_of(smaller.graph) == leaf_functions_of(small.graph)
    y = 3 * torch.randn(1, 3, 40)
    for each in (copy.deepcopy(smaller), pickle.loads(pickle.dumps(smaller))):
        assert same(each(y), smaller(y))


def test_a_scripted_one_is_called_and_saved(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setitem(globals(), "counted", scripted(counted))
    model, small = ends(lambda model, boxes, scores: counted(boxes, scores))
    assert [name.rpartition(":")[2] for name in leaf_functions_of(small.graph)] == ["counted"]
    fxprune.save(small, tmp_path / "small.safetensors")
    y = 3 * torch.randn(1, 3, 56)
    for each in (fxprune.load(tmp_path / "small.safetensors", model), pickle.loads(pickle.dumps(small))):
        assert same(each(y), small(y))
    assert same(small(y), fxprune.into(model, small)(y))


def test_weights_are_refitted_around_it() -> None:
    model, x = detector()
    small = fxprune.prune(model, x, flops=0.5, progress=False)
    images = torch.randn(64, 3, 40)
    fitted = fxprune.reconstruct(small, model, [images[i : i + 1] for i in range(64)])
    assert leaf_functions_of(fitted.graph) == leaf_functions_of(small.graph)


def test_where_channels_could_be_cut_the_branch_is_a_guard() -> None:
    torch.manual_seed(0)
    model, x = Shifted().eval(), torch.randn(4, 8)
    small = fxprune.prune(model, x, flops=0.5, progress=False)
    assert leaf_functions_of(small.graph) == ()
    other = 100 * model.a.weight.sum(0).sign() * (1 if model.a(x).mean() < 0.5 else -1)
    with pytest.raises(GuardError, match="in shifted"):
        small(x + other)


def test_a_function_that_is_given_weights_is_no_leaf() -> None:
    def rounds(hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden @ weight if hidden.sum() > 0 else hidden @ weight * 2

    globals()["rounds"] = rounds

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.weight = nn.Linear(8, 16), nn.Parameter(torch.randn(16, 2))

        def forward(self, x: Tensor) -> Tensor:
            return rounds(self.a(x), self.weight)

    torch.manual_seed(0)
    small = fxprune.prune(Given().eval(), torch.randn(4, 8), channels=0.5, progress=False)
    assert leaf_functions_of(small.graph) == ()


def perhaps_itself(boxes: Tensor, scores: Tensor) -> Tensor:
    return boxes if (scores > scores.mean()).sum() % 2 else boxes * 1


def perhaps_written(boxes: Tensor, scores: Tensor) -> Tensor:
    if (scores > scores.mean()).sum() % 2:
        boxes += 1
    return boxes.clone()


def many(boxes: Tensor, scores: Tensor) -> list[Tensor]:
    return [box for box, score in zip(boxes, scores, strict=True) if score > scores.mean()]


def chosen(boxes: Tensor, scores: Tensor) -> Tensor:
    return torch.stack(many(boxes, scores))


def dropped(boxes: Tensor, scores: Tensor, training: bool) -> Tensor:
    kept = [i for i, score in enumerate(scores) if score > scores.mean()]
    return nn.functional.dropout(boxes[kept], 0.5, training)


def turned(scores: Tensor) -> None:
    """Turns scores around if they are above zero, which they are no longer then."""
    if scores.sum() > 0:
        scores.neg_()


class Ends(Detector):
    """A detector that ends otherwise."""

    def __init__(self, end) -> None:
        super().__init__()
        self.end = end

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.stem(x).relu()
        boxes, scores = self.boxes(hidden)[0].T.clone(), self.scores(hidden)[0, 0]
        return self.end(self, boxes, scores), scores


def ends(end, seed: int = 0) -> tuple[Ends, fx.GraphModule]:
    torch.manual_seed(seed)
    model = Ends(end).eval()
    return model, fxprune.prune(model, torch.randn(1, 3, 40), flops=0.5, progress=False)


@pytest.mark.parametrize("seed", range(4))
def test_what_may_be_an_argument_itself_is_written_to_as_in_the_model(seed: int) -> None:
    def written(model, boxes, scores):
        perhaps_itself(boxes, scores).add_(1)
        return boxes * 2

    def read(model, boxes, scores):
        result = perhaps_itself(boxes, scores)
        boxes.add_(1)
        return result * 2

    for end in (written, read):
        model, small = ends(end, seed)
        assert len(leaf_functions_of(small.graph)) == 1
        dense = fxprune.into(model, small)
        for y in torch.randn(6, 1, 3, 40):
            assert same(small(y), dense(y))


@pytest.mark.parametrize("seed", range(4))
def test_a_call_that_may_write_stays_where_nothing_takes_its_result(seed: int) -> None:
    def end(model, boxes, scores):
        perhaps_written(boxes, scores)
        return boxes * 2

    model, small = ends(end, seed)
    dense = fxprune.into(model, small)
    for y in torch.randn(6, 1, 3, 40):
        assert same(small(y), dense(y))


def test_a_list_of_another_length_is_left_to_what_calls_the_function() -> None:
    model, small = ends(lambda model, boxes, scores: chosen(boxes, scores))
    assert [name.rpartition(":")[2] for name in leaf_functions_of(small.graph)] == ["chosen"]
    dense, y = fxprune.into(model, small), torch.randn(1, 3, 56)
    assert same(small(y), dense(y))


def test_two_ways_are_seen_where_another_example_goes_the_same_by_chance() -> None:
    def end(model, boxes, scores):
        return perhaps_written(boxes, scores)

    for seed in range(6):
        assert len(leaf_functions_of(ends(end, seed)[1].graph)) == 1


def test_a_function_that_a_layer_keeps_is_found_there() -> None:
    def end(model, boxes, scores):
        return model.suppress(boxes, scores, 0.1)[0]

    torch.manual_seed(0)
    model, x = Ends(end).eval(), torch.randn(1, 3, 40)
    model.suppress = suppressed
    small = fxprune.prune(model, x, flops=0.5, progress=False)
    assert [name.rpartition(":")[2] for name in leaf_functions_of(small.graph)] == ["suppressed"]
    assert model.suppress is suppressed


def test_it_is_told_whether_the_model_trains() -> None:
    model, small = ends(lambda model, boxes, scores: dropped(boxes, scores, model.training))
    assert [name.rpartition(":")[2] for name in leaf_functions_of(small.graph)] == ["dropped"]
    dense, y = fxprune.into(model, small), torch.randn(1, 3, 56)
    assert same(small(y), dense(y))
    outputs = [(torch.manual_seed(3), each.train()(y))[1] for each in (small, dense)]
    assert same(*outputs)


def test_it_stays_in_a_graph_that_others_trace() -> None:
    model, x = detector()
    small = fxprune.prune(model, x, flops=0.5, progress=False)
    traced, y = fx.symbolic_trace(small), 3 * torch.randn(1, 3, 56)
    assert leaf_functions_of(traced.graph) == leaf_functions_of(small.graph)
    assert same(traced(y), small(y))


def test_what_is_no_leaf_after_all_writes_once() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.scores(x)
            turned(scores)
            return scores, self.b(self.a(x).relu())

    torch.manual_seed(0)
    model, x = Turned().eval(), torch.randn(4, 8)
    x = x if model.scores(x).sum() > 0 else x + 10 * model.scores.weight.sum(0).sign()
    small = fxprune.prune(model, x, channels=0.5, progress=False)
    assert leaf_functions_of(small.graph) == ()
    torch.testing.assert_close(small(x)[0], model(x)[0])

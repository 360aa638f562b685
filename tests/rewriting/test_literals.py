"""Arguments that name sizes: new ones where the tensor is cut, the dense ones where only their origin is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import BudgetError, ModelError
from fxprune.groups import analyse_graph
from fxprune.recording.guards import guards_of, holds
from fxprune.rewriting import UnrepairableError, draft

# ``size`` is that of channels that are cut, 8 in the dense model; ``y`` [batch, 16, 5] is not cut.
USES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "split": lambda y, size: y.split([size, 16 - size], 1)[1],
    "split into equal parts": lambda y, size: y.split(size, dim=1)[1],
    "chunk": lambda y, size: y.chunk(size // 4, 1)[1],
    "slice": lambda y, size: y[:, :size],
    "slice from": lambda y, size: y[:, size - 3 : 16],
    "item": lambda y, size: y[:, size - 1],
    "narrow": lambda y, size: y.narrow(1, size // 2, size),
    "select": lambda y, size: y.select(1, size - 1),
    "pad": lambda y, size: F.pad(y, (0, 0, size, 0)),
    "group norm": F.group_norm,
    "roll": lambda y, size: y.roll(size, 1),
}


class Borrowing(nn.Module):
    """Does something to one tensor with a number that is the size of another."""

    def __init__(self, use: Callable[[Tensor, int], Tensor]):
        super().__init__()
        self.use = use
        self.first, self.whole = nn.Conv1d(3, 8, 1), nn.Conv1d(3, 16, 1)
        self.head = nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        return self.head(h.relu()), self.use(self.whole(x), h.shape[1])


@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_a_size_borrowed_from_channels_that_are_cut_stays_what_it_was(use: Callable[[Tensor, int], Tensor]) -> None:
    model, x = randomise(Borrowing(use)).eval(), torch.randn(2, 3, 5)
    pruned = fxprune.prune(model, x, channels=0.5, ignore=("whole", "head"), progress=False)
    assert pruned.first.weight.shape[0] == 4
    assert not [note for note in pruned.meta["fxprune"].notes if note.startswith("locked")]
    torch.testing.assert_close(pruned(x)[1], model(x)[1])


class EveryOther(nn.Module):
    """Even channels go one way, odd ones another. The kept ones are 0, 1, 3 and 6, of which no slice takes 0 and 6."""

    def __init__(self, relu: nn.Module) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv1d(3, 8, 1), relu
        self.even, self.odd = nn.Conv1d(4, 2, 1), nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        return self.even(h[..., ::2, :]) + self.odd(h[:, 1::2])


def without_even_spaces(inplace: bool) -> fx.GraphModule:
    model = randomise(EveryOther(nn.ReLU(inplace))).eval()
    with torch.no_grad():
        for channel in (2, 4, 5, 7):
            model.get_parameter("first.weight")[channel] *= 0.01
            model.get_parameter("first.bias")[channel] *= 0.01
            side = model.get_parameter("odd.weight" if channel % 2 else "even.weight")
            side[:, channel // 2] *= 0.01
    options = {"channels": 0.5, "round_to": 1, "progress": False, "ignore": ("even.bias", "odd.bias")}
    return fxprune.prune(model, torch.randn(2, 3, 5), **options)


def test_what_is_left_of_a_slice_is_picked_one_by_one() -> None:
    pruned = without_even_spaces(inplace=False)
    assert pruned.meta["fxprune"].plan.kept["first.weight"][0] == [0, 1, 3, 6]
    assert next(pruned.buffers()).tolist() == [0, 3]


def test_what_is_left_of_a_slice_is_not_picked_where_the_model_writes_to_tensors() -> None:
    with pytest.raises(BudgetError, match="the channels that stay of a slice are not evenly spaced"):
        without_even_spaces(inplace=True)


def compared(relation: str, recorded: int | None) -> fx.GraphModule:
    """Half of the channels are cut of a graph that compares how many there are, 8. None: with 8 heads of one width."""
    net, x = randomise(nn.Sequential(nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1))).eval(), torch.randn(2, 3, 5)
    module = fxprune.record(net, x)
    first = next(node for node in module.graph.nodes if node.target == "0")
    with module.graph.inserting_after(first):
        size = module.graph.call_method("size", (first, 1))
    with module.graph.inserting_before(size.next):
        other: Any = recorded
        if recorded is None:
            other = module.graph.call_function(operator.floordiv, (size, 8))
            other = module.graph.call_function(operator.mul, (other, 8))
        module.graph.call_function(holds, (size, relation, other, "net.py:7"))
    module.recompile()
    graph = analyse_graph(module, (x,), {})
    keep = graph.everything()
    keep[next(group.channels for group in graph.prunable if group.name == "0")[0, :4]] = False
    return draft(module, graph, keep, {}).module


@pytest.mark.parametrize(("relation", "recorded", "now"), [("==", 8, 4), (">=", 3, 3), ("!=", 20, 20), ("==", None, 4)])
def test_a_size_that_is_compared_may_be_cut(relation: str, recorded: int | None, now: int) -> None:
    (guard,) = guards_of(compared(relation, recorded).graph)
    assert guard.args[1:] == (relation, now, "net.py:7")


def test_a_size_that_is_compared_and_would_go_the_other_way_stays() -> None:
    with pytest.raises(UnrepairableError, match="forward compares a size with 6"):
        compared(">", 6)


class AsLongAsWide(nn.Module):
    """Branches on whether there are as many positions as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(h.relu() if x.shape[2] == h.shape[1] else h)


def test_channels_that_are_compared_with_a_size_of_the_input_stay() -> None:
    model, x = randomise(AsLongAsWide()).eval(), torch.randn(2, 3, 8)
    with pytest.raises(ModelError, match="first: forward compares a size with 8"):
        fxprune.prune(model, x, channels=0.5, round_to=1, progress=False)


class Indexed(nn.Module):
    """Rows are written or picked by an index, then attention whose heads are counted together with the batch."""

    def __init__(self, use: Callable[[Tensor], Tensor]):
        super().__init__()
        self.use = use
        self.enter, self.attention, self.head = nn.Linear(6, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.use(self.enter(x)).transpose(0, 1)
        return self.head(self.attention(h, h, h)[0])


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h.index_fill(1, torch.tensor([0]), 0.5),
        lambda h: h.masked_select(torch.tensor([True, False, True, False]).view(1, 4, 1)).view(-1, 2, 4),
    ],
    ids=["index on the processor", "as many as the values say"],
)
def test_numbers_behind_an_op_that_does_not_run_on_meta_still_follow_the_batch(use: Callable[[Tensor], Tensor]) -> None:
    model, x = randomise(Indexed(use)).eval(), torch.randn(2, 4, 6)
    options = {"attention": "heads", "round_to": 1, "ignore": ("enter",), "progress": False}
    pruned = fxprune.prune(model, x, channels=0.5, **options)
    assert pruned.attention.in_proj_weight.shape == (6, 4)
    assert pruned(torch.randn(5, 4, 6)).shape == model(torch.randn(5, 4, 6)).shape

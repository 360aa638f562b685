"""Sequences of several lengths, packed: channels pass through them, whatever the lengths are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxprune
from fxprune.groups.channels import ChannelGraph


class Steps(nn.Module):
    """What a recurrent layer gives for every step, in both directions."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.front, self.rnn = nn.Linear(6, 16), kind(16, 20, batch_first=True, bidirectional=True)
        self.after, self.head = nn.Linear(40, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.front(x).relu(), lengths.cpu(), batch_first=True, enforce_sorted=False)
        steps, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(self.after(steps).relu())


class Last(nn.Module):
    """The last state of two layers, time first, of sequences that are sorted by length."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.front, self.rnn = nn.Linear(6, 16), kind(16, 20, num_layers=2)
        self.after, self.head = nn.Linear(20, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        _, state = self.rnn(pack_padded_sequence(self.front(x).relu().transpose(0, 1), lengths))
        last = state[0] if isinstance(state, tuple) else state
        return self.head(self.after(last[-1]).relu())


def made(model: type[Steps | Last], kind: Callable[..., nn.RNNBase]) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return model(kind).eval(), (torch.randn(3, 9, 6), torch.tensor([9, 5, 2]))


def cut(graph: ChannelGraph) -> set[str]:
    return {group.name for group in graph.prunable}


KINDS = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])


@KINDS
@pytest.mark.parametrize("model", [Steps, Last])
def test_other_batches_and_lengths(model: type[Steps | Last], kind: Callable[..., nn.RNNBase]) -> None:
    dense, x = made(model, kind)
    small = fxprune.prune(dense, x, flops=0.5, progress=False)
    report = small.meta["fxprune"]
    assert report.notes == ()
    assert {row.name.partition(".")[0] for row in report.rows if row.after[0] < row.before[0]} >= {"rnn"}
    own = fxprune.into(dense, small)
    for sizes in ([9, 5, 2], [4, 4, 4], [9, 1], [12, 11, 7, 7, 3]):
        y, lengths = torch.randn(len(sizes), sizes[0], 6), torch.tensor(sizes)
        torch.testing.assert_close(small(y, lengths), own(y, lengths))


@KINDS
def test_what_goes_in_and_comes_out_can_be_cut(kind: Callable[..., nn.RNNBase]) -> None:
    dense, x = made(Steps, kind)
    assert cut(fxprune.analyze(dense, x)) == {"front", "rnn.weight_ih_l0", "after"}


def test_it_trains_and_is_loaded(tmp_path) -> None:
    dense, x = made(Steps, nn.GRU)
    small = fxprune.prune(dense, x, flops=0.5, progress=False)
    small.train()(*x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum()) for p in small.parameters())
    fxprune.save(small, tmp_path / "small.safetensors")
    loaded = fxprune.load(tmp_path / "small.safetensors", Steps(nn.GRU))
    assert torch.equal(loaded.eval()(*x), small.eval()(*x))


def test_what_is_cut_along_time_is_locked() -> None:
    class Swapped(nn.Module):
        """Channels where time is."""

        def __init__(self) -> None:
            super().__init__()
            self.front, self.rnn, self.head = nn.Linear(6, 9), nn.GRU(4, 8, batch_first=True), nn.Linear(8, 5)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(self.front(x).transpose(1, 2), lengths.cpu(), batch_first=True)
            return self.head(self.rnn(packed)[1][-1])

    torch.manual_seed(0)
    graph = fxprune.analyze(Swapped().eval(), (torch.randn(3, 4, 6), torch.tensor([9, 5, 2])))
    (group,) = (group for group in graph.groups if group.name == "front")
    assert "packed by lengths" in str(group.locked)

"""The limits that docs/limits.md states: what is locked is locked and reported, what is refused is refused in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import GuardError, ModelError


class Net(nn.Module):
    """Two prunable layers with something between them."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 5)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.middle(self.first(x)))))


def report(model: nn.Module, x: Tensor | None = None, flops: float = 0.5) -> fxprune.Report:
    x = torch.randn(2, 16) if x is None else x
    return fxprune.prune(model.eval(), x, flops=flops, progress=False).meta["fxprune"]


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        (lambda h: h.sort(-1).values, "sort across channels"),
        (lambda h: h.cumsum(-1), "cumsum across channels"),
        (lambda h: h + h.max(-1, keepdim=True).indices, "the index of the largest channel"),
        (lambda h: torch.fft.fft(h).real, "a Fourier transform over channels"),
        (lambda h: h + torch.renorm(h, 2, 0, 1.0).mean(), "no rule for aten.renorm.default"),
        (torch.triu, "triu works by position"),
    ],
)
def test_locked_with_the_reason_and_the_line(middle: Callable[[Tensor], Tensor], why: str) -> None:
    result = report(Net(middle))
    (first,) = (row for row in result.rows if row.name == "first")
    assert first.after == (32, 16)
    assert first.locked.startswith(why)
    assert "test_limits.py:" in first.locked
    (second,) = (row for row in result.rows if row.name == "second")
    assert second.after[0] < 24, "what lies beyond is pruned all the same"


def test_an_op_without_a_rule_is_in_the_notes() -> None:
    notes = report(Net(lambda h: h + torch.renorm(h, 2, 0, 1.0).mean())).notes
    why = "no rule for aten.renorm.default: its channels are locked"
    assert any(note.startswith(why) for note in notes)


def test_local_response_norm_is_locked() -> None:
    with pytest.raises(ModelError, match="along channels"):
        report(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3), nn.Conv2d(8, 5, 3)), torch.randn(1, 3, 8, 8))


def test_a_branch_on_a_value_is_guarded() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h.relu() if h.sum() > -1e9 else h)

    small = fxprune.prune(Branch().eval(), torch.randn(2, 16), channels=0.5, round_to=1, progress=False)
    small(torch.randn(3, 16))
    with torch.no_grad():
        small.a.bias.fill_(-1e9)
    with pytest.raises(GuardError, match=r"test_limits.py:\d+ in forward: .*, where False == True would have held"):
        small(torch.randn(3, 16))


def test_branches_for_training_only_keep_their_names_and_take_no_part() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(16, 32), nn.Linear(32, 5), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            return self.b(h) + self.aux(h) if self.training else self.b(h)

    pruned = fxprune.prune(Auxiliary(), torch.randn(2, 16), flops=0.5, progress=False)
    assert "aux.weight" in pruned.state_dict()
    assert "aux" not in {str(node.target) for node in pruned.graph.nodes}
    assert any("a branch on self.training was recorded as it goes in eval" in n for n in pruned.meta["fxprune"].notes)


def test_a_batch_size_written_as_a_number_stays(capsys: pytest.CaptureFixture[str]) -> None:
    pruned = fxprune.prune(Net(lambda h: h.view(2, 32)), torch.randn(2, 16), flops=0.5, progress=False)
    assert pruned.meta["fxprune"].oracle_error <= 1e-5
    assert capsys.readouterr().err == "", "that another batch size fails is no news to the user"
    assert pruned(torch.randn(2, 16)).shape == (2, 5)
    with pytest.raises(RuntimeError):
        pruned(torch.randn(3, 16))


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))


def test_sparse_meta_and_quantised_weights() -> None:
    sparse = layers()
    sparse[0].weight = nn.Parameter(sparse[0].weight.detach().to_sparse(), requires_grad=False)
    with pytest.raises(ModelError) as error:
        report(sparse)
    assert str(error.value) == "0.weight is sparse; fxprune prunes dense weights. Prune first, then make them sparse."
    with pytest.raises(ModelError) as error:
        report(layers().to("meta"), torch.randn(2, 16, device="meta"))
    assert str(error.value).startswith("0.weight is on the meta device and has no values. Load the weights before")
    with pytest.raises(ModelError) as error:
        report(nn.Sequential(nn.ReLU(), nn.Flatten()))  # as quantised layers are: without parameters
    assert str(error.value) == "The model has no prunable channels: it has no convolution or linear layer."


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floating_point_types_are_kept(dtype: torch.dtype) -> None:
    pruned = fxprune.prune(layers().to(dtype), torch.randn(2, 16, dtype=dtype), flops=0.5, progress=False)
    assert pruned(torch.randn(4, 16, dtype=dtype)).dtype == dtype

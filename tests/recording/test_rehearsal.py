"""A graph recorded without data is the graph of a run for real, and whatever needs data gets it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import compiled, scripted
from networks import NETWORKS
from torch import Tensor, fx, nn

from fxprune.errors import ExampleInputsError
from fxprune.ops.table import OPS, load
from fxprune.recording.rehearsal import Rehearsal

recording: Any = importlib.import_module("fxprune.recording.record")
A = torch.ops.aten


@pytest.fixture
def real_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every recording for real leaves an entry."""
    runs: list[str] = []
    record_for_real = recording._recorded

    def counted(model: nn.Module, *rest: Any) -> Any:
        runs.append(type(model).__name__)
        return record_for_real(model, *rest)

    monkeypatch.setattr(recording, "_recorded", counted)
    return runs


def _nodes(gm: fx.GraphModule) -> list[Any]:
    """What there is to compare of every node; custom functions by their class, which is patched while recording."""
    targets = [getattr(node.target, "cls", node.target) for node in gm.graph.nodes]
    nodes = [(node.op, node.name, str(node.args), str(node.kwargs), node.meta) for node in gm.graph.nodes]
    return list(zip(targets, nodes, strict=True))


def _check_same(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """Both ways of recording give the same; returns what was recorded without data, where that was enough."""
    torch.manual_seed(0)
    rehearsed = recording.recorded(model, args, kwargs)
    for_real = recording.recorded(model, args, kwargs, rehearse=False)
    assert _nodes(rehearsed) == _nodes(for_real)
    assert rehearsed.code == for_real.code
    assert rehearsed.meta == for_real.meta
    ours, theirs = dict(rehearsed.named_buffers()), dict(for_real.named_buffers())
    assert ours.keys() == theirs.keys()
    assert not any(tensor.is_meta for tensor in ours.values())
    return rehearsed


# --- the same graph --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "convnext_atto", "levit_128s", "mobilevit_xxs",
                                  "swin_tiny_patch4_window7_224"])  # fmt: skip
def test_known_architectures_need_no_data(name: str, real_runs: list[str]) -> None:
    model = timm.create_model(name).eval()
    size = 224 if name.startswith(("levit", "swin")) else 64
    _check_same(model, torch.randn(1, 3, size, size))
    assert len(real_runs) == 1  # that of the comparison


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks(name: str) -> None:
    if name == "Rearranged":
        pytest.importorskip("einops")
    args, kwargs = NETWORKS[name].inputs()
    _check_same(NETWORKS[name].build().eval(), *args, **kwargs)


# --- nets of one trap each -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """``follow`` is what comes after a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("index", torch.tensor([0, 3, 1]))

    def forward(self, x: Tensor) -> Any:
        return self.follow(self.linear(x))

    def follow(self, x: Tensor) -> Any:
        raise NotImplementedError


def net(follow: Callable[[Any, Tensor], Any]) -> nn.Module:
    """A net of a class of its own, as a user writes it."""
    return type(follow.__name__, (Net,), {"follow": follow})().eval()


def _check(follow: Callable[[Any, Tensor], Any], real_runs: list[str], *, needs_data: bool) -> fx.GraphModule:
    model, x = net(follow), torch.randn(2, 4)
    gm = _check_same(model, x)
    assert len(real_runs) == 1 + needs_data
    with torch.no_grad():
        expected = model(x.clone())
        for got, want in zip(_tensors(gm(x.clone())), _tensors(expected), strict=True):
            torch.testing.assert_close(got, want)
    return gm


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def swallowing(read: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    def follow(self: Any, x: Tensor) -> Any:
        try:
            found = read(x)
        except Exception:
            return x
        return x * 2 if found is not None else x

    return follow


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.sum() > -1e9),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "equal": lambda x: torch.equal(x, x),
    "isfinite": lambda x: torch.isfinite(x).all().item(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "unique": torch.unique,
    "str": str,
    "address": lambda x: x.data_ptr(),
    "type": lambda x: x.type(),
    "strides": lambda x: x.is_contiguous(),
    "version": lambda x: x._version,
    "cholesky": lambda x: torch.linalg.cholesky(x.T @ x + torch.eye(4)),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "position": lambda x: x[:, x.argmax(1)],
    "bits": lambda x: (x > 0) & (x < 1),
    "half": lambda x: x.half(),
    "complex": lambda x: torch.fft.fft(x).real,
    "deep": lambda x: x.__reduce_ex__(2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READS)
def test_a_read_of_values_gets_them_also_where_the_model_catches_errors(name: str, real_runs: list[str]) -> None:
    model = net(swallowing(READS[name]))
    _check_same(model, torch.randn(2, 4))
    assert len(real_runs) == 2


@pytest.mark.parametrize("read", ["device.type", "is_cpu", "not_meta", "get_device"])
def test_the_device_is_that_of_the_model(read: str, real_runs: list[str]) -> None:
    tests: dict[str, Callable[[Tensor], bool]] = {
        "device.type": lambda x: x.device.type == "cpu" and x.device == torch.device("cpu"),
        "is_cpu": lambda x: x.is_cpu,
        "not_meta": lambda x: not x.is_meta,
        "get_device": lambda x: x.get_device() == -1,
    }

    def follow(self: Any, x: Tensor) -> Tensor:
        assert tests[read](x)
        assert tests[read](self.linear.weight)
        return x * 2

    _check(follow, real_runs, needs_data=read == "get_device")


def test_moves_to_where_the_tensor_is_hand_it_back(real_runs: list[str]) -> None:
    def follow(self: Any, x: Tensor) -> Tensor:
        x.to("cpu").add_(1)
        x.to(torch.device("cpu"), torch.float32).add_(2)
        x.to(device=self.linear.weight.device).add_(3)
        x.to(self.linear.weight).add_(4)
        x.cpu().add_(5)
        x.type_as(self.linear.weight).add_(6)
        return x

    gm = _check(follow, real_runs, needs_data=False)
    assert str(gm.graph).count("add_") == 12  # six nodes, each with its name and target


def test_factories_are_written_as_the_model_wrote_them(real_runs: list[str]) -> None:
    def follow(self: Any, x: Tensor) -> Tensor:
        ramp = torch.arange(4, device=x.device).float() + torch.zeros(4, device="cpu") + torch.tensor([1.0])
        grid = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij")).to(x.device).to(x.dtype).sum((0, 1))
        return x * grid + torch.ones_like(x) + x.new_full((4,), 2.0) + 0 * torch.rand(4) + torch.tensor(0.5)

    _check(follow, real_runs, needs_data=False)


def test_known_positions_are_looked_up_without_data(real_runs: list[str]) -> None:
    def follow(self: Any, x: Tensor) -> Tensor:
        return x[:, self.index] + F.embedding(self.index, self.linear.weight)[:2, :3]

    _check(follow, real_runs, needs_data=False)


def test_empty_tensors_are_moved_and_joined_without_data(real_runs: list[str]) -> None:
    def follow(self: Any, x: Tensor) -> Any:
        return torch.cat([x[:, :0], x, x[:, 4:].reshape(2, 0)], 1), torch.stack([x[:0], x[:0]])

    _check(follow, real_runs, needs_data=False)


def test_a_maximum_of_nothing_is_refused_as_ever() -> None:
    model = net(lambda self, x: x[:, :0].amax(1))
    with pytest.raises(ExampleInputsError):
        recording.record(model, torch.randn(2, 4))


def test_values_that_no_stand_in_went_into_may_be_read(real_runs: list[str]) -> None:
    def follow(self: Any, x: Tensor) -> Tensor:
        rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        return x * rates[1] * int(self.index.max())

    gm = _check(follow, real_runs, needs_data=False)
    assert any(note.endswith("a value read from a tensor is kept as a constant") for note in gm.meta["notes"])


def test_positions_that_are_not_there_are_reported() -> None:
    def follow(self: Any, x: Tensor) -> Tensor:
        return x[:, self.index + 1]

    with pytest.raises(ExampleInputsError, match="index 4 is out of bounds"):
        recording.record(net(follow), torch.randn(2, 4))


def test_tokens_that_are_not_in_the_table_are_reported(real_runs: list[str]) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    _check_same(model, torch.tensor([[0, 4]]))
    assert len(real_runs) == 1
    with pytest.raises(ExampleInputsError, match="index out of range"):
        recording.record(model, torch.tensor([[0, 5]]))


@pytest.mark.parametrize("place", [lambda x: torch.zeros(2, 4), torch.zeros_like, lambda x: x.new_zeros(2, 4)])
def test_a_real_tensor_is_not_filled_from_a_stand_in(place: Callable[[Tensor], Tensor], real_runs: list[str]) -> None:
    def follow(self: Any, x: Tensor) -> Tensor:
        y = place(x)
        y[:, :2] = x[:, 2:]
        return y

    _check(follow, real_runs, needs_data=True)


def test_in_place_writes_of_stand_ins(real_runs: list[str]) -> None:
    def follow(self: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[..., 0] = x[..., 1]
        y[:, 1].mul_(x[:, 0])
        y[0] += 1
        torch.mul(x, 2, out=(z := x.clone()))
        unused = x.clone()
        unused.add_(1)
        return F.hardswish(y, inplace=True).relu_() + z

    _check(follow, real_runs, needs_data=False)


@functools.lru_cache
def _grid(width: int, device: torch.device) -> Tensor:
    return torch.linspace(0, 1, width, device=device).view(1, -1)


def test_what_is_memoised_outside_the_model_is_real(real_runs: list[str]) -> None:
    _grid.cache_clear()

    def follow(self: Any, x: Tensor) -> Tensor:
        return x + _grid(4, x.device)

    model = net(follow)
    recording.record(model, torch.randn(2, 4))
    assert not _grid(4, torch.device("cpu")).is_meta
    assert model(torch.ones(2, 4)).device.type == "cpu"


def test_what_a_hook_keeps_outside_the_model_stays_the_callers() -> None:
    kept: dict[str, Tensor] = {}
    model = net(lambda self, x: x * 2)
    model.linear.register_forward_hook(lambda module, args, output: kept.update(output=output))
    gm = recording.record(model, torch.randn(2, 4))
    assert not kept
    gm(torch.randn(3, 4))
    assert kept["output"].shape == (3, 4)


def test_tensors_from_elsewhere_stay_the_very_objects(real_runs: list[str]) -> None:
    table = torch.arange(4.0)
    gm = _check(lambda self, x: x + table, real_runs, needs_data=False)
    assert gm._constant_0 is table


@pytest.mark.parametrize("kind", ["list", "view"])
def test_parameters_reached_by_another_way(kind: str, real_runs: list[str]) -> None:
    def follow(self: Any, x: Tensor) -> Tensor:
        return x @ self.kept[0]

    model = net(follow)
    model.kept = [model.linear.weight if kind == "list" else model.linear.weight.data.t()]
    _check_same(model, torch.randn(2, 4))
    assert len(real_runs) == (1 if kind == "list" else 2)


def test_ties_and_attributes_of_parameters_are_seen(real_runs: list[str]) -> None:
    def follow(self: Any, x: Tensor) -> Tensor:
        assert self.linear.weight.kind == "dense"
        return self.tied(x)

    model = net(follow)
    model.tied = nn.Linear(4, 4)
    model.tied.weight = model.linear.weight
    model.linear.weight.kind = "dense"
    _check_same(model, torch.randn(2, 4))
    assert len(real_runs) == 1


def test_gradients_of_parameters_are_seen(real_runs: list[str]) -> None:
    def follow(self: Any, x: Tensor) -> Tensor:
        return x if self.linear.weight.grad is None else x * 2

    model = net(follow)
    model.linear.weight.grad = torch.ones(4, 4)
    assert "mul" in _check_same(model, torch.randn(2, 4)).code
    assert len(real_runs) == 2


class Peeking(nn.Module):
    """A leaf of the user's: it reads ``training``, and values."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            scale = float(x.detach().abs().max().numpy())
        except Exception:
            scale = 0.0
        return x if self.training else x + scale


class _Peeking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2 if x.data_ptr() else x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


_traced = compiled(torch.jit.trace, lambda x: (x + 1) * 2, torch.zeros(2, 4))


@scripted
def _scripted(x: Tensor) -> Tensor:
    if x.is_cpu:
        x = x + 1
    return x * 2


def _autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.linear(x).float()


def _without_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self.linear(x)


def _sets_data(self: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y.data = y.data * 2
    return y


UNSEEN: dict[str, tuple[Callable[[Any, Tensor], Any], bool]] = {
    "a leaf's own code": (lambda self, x: self.more(x), True),
    "custom function": (lambda self, x: _Peeking.apply(x), True),
    "scripted": (lambda self, x: _scripted(x), False),
    "traced": (lambda self, x: _traced(x), True),
    "autocast": (_autocast, True),
    "no autocast": (_without_autocast, False),
    "data": (_sets_data, True),
    "meta": (lambda self, x: x * torch.empty(4, device="meta").dim(), True),
    "attention": (lambda self, x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0], False),
    "eye": (lambda self, x: x @ torch.eye(4), False),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_cannot_be_watched_runs_for_real(name: str, real_runs: list[str]) -> None:
    follow, needs_data = UNSEEN[name]
    model = net(follow)
    model.more = Peeking().eval()
    _check_same(model, torch.randn(2, 4))
    assert len(real_runs) == 1 + needs_data


def test_hooks_of_layers_are_watched(real_runs: list[str]) -> None:
    model = net(lambda self, x: x * 2)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        try:
            return output * output.numpy().size
        except RuntimeError:
            return output

    model.linear.register_forward_hook(hook)
    _check_same(model, torch.randn(2, 4))
    assert len(real_runs) == 2


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail: bool) -> None:
    def follow(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.history.append(x)
        self.index += 1
        self.mean = self.mean + x.mean(0)
        self.linear.bias.add_(1)
        if fail:
            raise ValueError("no such thing")
        return x + self.mean

    model = net(follow)
    model.calls, model.history = 0, []
    model.register_buffer("mean", torch.zeros(4))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values, attributes = {name: tensor.clone() for name, tensor in tensors.items()}, dict(model.__dict__)
    if fail:
        with pytest.raises(ExampleInputsError, match="no such thing"):
            recording.record(model, torch.randn(2, 4))
    else:
        _check_same(model, torch.randn(2, 4))
    assert model.__dict__ == attributes
    assert model.history == []
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor and torch.equal(tensor, values[name]) for name, tensor in tensors.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- models that run for real from the start -------------------------------------------------------------------------


def _half(model: nn.Module) -> nn.Module:
    return model.bfloat16()


def _views(model: nn.Module) -> nn.Module:
    model.half_of_it = nn.Parameter(model.linear.weight.data[:2])
    return model


def _scripted_child(model: nn.Module) -> nn.Module:
    model.child = scripted(nn.ReLU())
    return model


@pytest.mark.parametrize("change", [_half, _views, _scripted_child])
def test_models_that_no_stand_ins_are_made_for(
    change: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_rehearsed", lambda *_: pytest.fail("there is nothing to gain"))
    model = change(net(lambda self, x: x * 2))
    recording.record(model, torch.randn(2, 4, dtype=model.linear.weight.dtype))


def test_modes_of_the_users_see_a_run_for_real(real_runs: list[str]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        recording.record(net(lambda self, x: x * 2), torch.randn(2, 4))
    assert real_runs
    assert counter.get_total_flops() > 0


# --- the kernels -----------------------------------------------------------------------------------------------------

X, CONV = (1, 4, 6, 6), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
TRANSPOSED = ([1, 1], [0, 0], [1, 1], True, [0, 0], 1)
# (op, a call that all kernels take, calls that the real ones refuse); a tuple of numbers is a tensor of this shape
KERNELS: list[tuple[Any, tuple[Any, ...], list[tuple[Any, ...]]]] = [
    (A.convolution, (X, (8, 4, 3, 3), (8,), *CONV), [
        (X, (8, 3, 3, 3), (8,), *CONV), (X, (8, 4, 3, 3), (7,), *CONV), ((4, 6, 6), (8, 4, 3, 3), (8,), *CONV),
        (X, (8, 4, 7, 7), None, *CONV), (X, (8, 2, 3, 3), None, *CONV[:-1], 3), (X, (8, 2, 3, 3), None, *CONV),
        (X, (4, 8, 3, 3), None, [1, 1], [0, 0], [1, 1], True, [1, 1], 1), (X, (3, 8, 3, 3), None, *TRANSPOSED),
    ]),
    (A.mm, ((2, 3), (3, 4)), [((2, 3), (4, 3)), ((2, 3, 1), (3, 4))]),
    (A.addmm, ((4,), (2, 3), (3, 4)), [((5,), (2, 3), (3, 4)), ((4,), (2, 3), (4, 4)), ((1, 1, 4), (2, 3), (3, 4))]),
    (A.bmm, ((2, 3, 4), (2, 4, 5)), [((2, 3, 4), (2, 5, 4)), ((2, 3, 4), (3, 4, 5))]),
    (A.baddbmm, ((2, 3, 5), (2, 3, 4), (2, 4, 5)), [((2, 3, 6), (2, 3, 4), (2, 4, 5))]),
    (A.mv, ((2, 3), (3,)), [((2, 3), (2,))]),
    (A.dot, ((3,), (3,)), [((3,), (4,))]),
    (A.native_layer_norm, ((2, 3, 4), [4], (4,), (4,), 1e-5), [((2, 3, 4), [3], None, None, 1e-5),
                                                              ((2, 3, 4), [4], (3,), None, 1e-5)]),
    (A.native_group_norm, (X, (4,), (4,), 1, 4, 36, 2, 1e-5), [(X, (3,), (4,), 1, 4, 36, 2, 1e-5),
                                                              (X, (4,), (4,), 1, 4, 36, 3, 1e-5)]),
    (A.mean.dim, ((2, 3), [1]), [((2, 3), [2]), ((2, 3), [0, 0])]),
    (A.sum.dim_IntList, ((2, 3), [1]), [((2, 3), [2])]),
    (A.amax, ((2, 3), [1]), [((2, 3), [2])]),
    (A.amin, ((2, 3), [1]), [((2, 3), [2])]),
    (A.var.correction, ((2, 3), [1]), [((2, 3), [2])]),
    (A.var_mean.correction, ((2, 3), [1]), [((2, 3), [2])]),
    (A.std.correction, ((2, 3), [1]), [((2, 3), [2])]),
    (A.std_mean.correction, ((2, 3), [1]), [((2, 3), [2])]),
    (A.linalg_vector_norm, ((2, 3), 2, [1]), [((2, 3), 2, [2])]),
    (A.logsumexp, ((2, 3), [1]), [((2, 3), [2])]),
    (A._softmax, ((2, 3), 1, False), [((2, 3), 2, False), ((2, 3), -3, False)]),
    (A._log_softmax, ((2, 3), 1, False), [((2, 3), 2, False)]),
    (A._safe_softmax, ((2, 3), 1), [((2, 3), 2)]),
    (A.cumsum, ((2, 3), 1), [((2, 3), 2)]),
    (A.max_pool2d_with_indices, (X, [2, 2]), [(X, [7, 7]), ((6, 6), [2, 2]), (X, [2, 2], [1, 1], [2, 2])]),
    (A.max_pool3d_with_indices, ((1, *X), [2, 2, 2]), [((1, *X), [2, 7, 2])]),
    (A.avg_pool2d, (X, [2, 2]), [
        (X, [7, 7]), (X, [2, 2], [1, 1], [2, 2]), (X, [2, 2], [1, 1], [0, 0], False, True, 0),
    ]),
    (A.avg_pool3d, ((1, *X), [2, 2, 2]), [((1, *X), [2, 7, 2])]),
    (A._adaptive_avg_pool2d, (X, [1, 1]), [((6, 6), [1, 1]), ((1, 4, 0, 6), [1, 1])]),
    (A._adaptive_avg_pool3d, ((1, *X), [1, 1, 1]), [((4, 6, 6), [1, 1, 1])]),
    (A.adaptive_max_pool2d, (X, [1, 1]), [((6, 6), [1, 1]), ((1, 4, 0, 6), [1, 1])]),
    (A.upsample_nearest1d.vec, ((1, 4, 6), [8], None), [(X, [8], None), ((1, 4, 6), [0], None)]),
    (A.upsample_nearest2d.vec, (X, [8, 8], None), [((4, 6, 6), [8, 8], None), (X, [8, 0], None)]),
    (A.upsample_nearest3d.vec, ((1, *X), [8, 8, 8], None), [((1, *X), [8, 8, 0], None)]),
    (A._upsample_nearest_exact2d.vec, (X, [8, 8], None), [((4, 6, 6), [8, 8], None), (X, [8, 0], None)]),
    (A.upsample_linear1d.vec, ((1, 4, 6), [8], False, None), [(X, [8], False, None), ((1, 4, 6), [0], False, None)]),
    (A.upsample_bilinear2d.vec, (X, [8, 8], False, None), [((4, 6, 6), [8, 8], False, None), (X, [8, 0], False, None)]),
    (A.upsample_bicubic2d.vec, (X, [8, 8], False, None), [((4, 6, 6), [8, 8], False, None), (X, [8, 0], False, None)]),
    (A.upsample_trilinear3d.vec, ((1, *X), [8, 8, 8], False, None), [((1, *X), [8, 8, 0], False, None)]),
    (A.reflection_pad1d, ((1, 4, 6), [2, 2]), [((1, 4, 6), [6, 6])]),
    (A.reflection_pad2d, (X, [2, 2, 2, 2]), [(X, [6, 6, 2, 2])]),
    (A.replication_pad1d, ((1, 4, 6), [2, 2]), [((1, 4, 6), [-6, 0])]),
    (A.replication_pad2d, (X, [2, 2, 2, 2]), [(X, [-6, 0, 0, 0])]),
    (A.im2col, (X, [2, 2], [1, 1], [0, 0], [1, 1]), [(X, [8, 8], [1, 1], [0, 0], [1, 1])]),
    (A.col2im, ((1, 12, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]), [
        ((1, 7, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]), ((1, 12, 5), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]),
    ]),
    (A.grid_sampler_2d, (X, (1, 5, 5, 2), 0, 0, False), [
        (X, (2, 5, 5, 2), 0, 0, False), (X, (1, 5, 5, 3), 0, 0, False),
    ]),
    (A.glu, ((2, 4), 1), [((2, 3), 1)]),
    (A.pixel_shuffle, (X, 2), [((1, 3, 6, 6), 2)]),
    (A.pixel_unshuffle, (X, 2), [((1, 4, 5, 6), 2)]),
    (A.native_channel_shuffle, (X, 2), [((1, 3, 6, 6), 2)]),
    (A._fused_rms_norm, ((2, 3, 4), [4], (4,), 1e-5), []),
    (A._unsafe_view, ((2, 3), [3, 2]), [((2, 3), [4, 2])]),
    (A.as_strided, ((5,), [2], [4]), [((5,), [3], [4]), ((5,), [2], [4], 1)]),
    (A.roll, ((2, 3), [1], [0]), [((2, 3), [1, 2], [0]), ((2, 3), [1], [2])]),
    (A.flip, ((2, 3), [1]), [((2, 3), [2]), ((2, 3), [1, 1])]),
    (A.repeat, ((2, 3), [2, 1]), [((2, 3), [2]), ((2, 3), [2, -1])]),
    (A.constant_pad_nd, ((2, 3), [1, 1]), [((2, 3), [1, 1, 1]), ((2, 3), [-2, -2])]),
    (A._prelu_kernel, ((2, 3), (1, 3)), [((2, 3), (1, 4))]),
    (A.add.Tensor, ((2, 3), (3,)), [((2, 3), (2,))]),
    (A.add_.Tensor, ((2, 3), (3,)), [((3,), (2, 3)), ((3,), (2,))]),
    (A.copy_, ((2, 3), (3,)), [((3,), (2, 3))]),
    (A.view, ((2, 3), [3, 2]), [((2, 3), [4, 2])]),
    (A.select.int, ((2, 3), 0, 1), [((2, 3), 0, 2)]),
    (A.split_with_sizes, ((5,), [2, 3]), [((5,), [2, 2])]),
    (A.expand, ((1, 3), [2, 3]), [((2, 3), [4, 3])]),
]  # fmt: skip


def _kernel(op: Any) -> Any:
    return op.default if isinstance(op, torch._ops.OpOverloadPacket) else op


def _called(op: Any, call: tuple[Any, ...], device: str, run: Callable[..., Any]) -> Any:
    return run(_kernel(op), *(torch.rand(v, device=device) if isinstance(v, tuple) else v for v in call))


def _is_refused(op: Any, call: tuple[Any, ...], device: str, run: Callable[..., Any]) -> bool:
    """Whether it raises, and that not because the call does not fit the op's signature."""
    try:
        _called(op, call, device, run)
    except Exception as error:
        return "for argument" not in str(error)
    return False


@pytest.mark.parametrize(("op", "good", "bad"), KERNELS, ids=lambda value: str(value) if callable(value) else "")
def test_stand_ins_are_refused_where_real_tensors_are(op: Any, good: Any, bad: Any) -> None:
    def for_real(func: Any, *args: Any) -> Any:
        return func(*args)

    rehearsal = Rehearsal()
    for expected, got in zip(
        _tensors(_called(op, good, "cpu", for_real)), _tensors(_called(op, good, "meta", rehearsal.op)), strict=True
    ):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert not rehearsal.needs_data
    for call in bad:
        rehearsal = Rehearsal()
        assert _is_refused(op, call, "cpu", for_real), call
        assert _is_refused(op, call, "meta", rehearsal.op), call
        assert rehearsal.needs_data


@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_lay_out_their_results_like_real_ones(x_last: bool, weight_last: bool, kernel: int) -> None:
    def laid_out(last: bool, *shape: int) -> Tensor:
        return torch.rand(shape).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    x, weight = laid_out(x_last, 2, 4, 6, 6), laid_out(weight_last, 8, 4, kernel, kernel)
    expected = A.convolution.default(x, weight, None, *CONV)
    assert (
        Rehearsal().op(A.convolution.default, x.to("meta"), weight.to("meta"), None, *CONV).stride()
        == expected.stride()
    )


def test_every_op_that_stand_ins_are_given_to_is_among_them() -> None:
    tried = {_kernel(op).overloadpacket.__name__ for op, *_ in KERNELS}
    norms_of_batches = {"native_batch_norm", "_native_batch_norm_legit_no_training"}  # the real kernel reads beyond
    load("aten")
    blind = {op.name.removeprefix("aten::") for op in OPS.values() if op.takes == "floats of one kind"}
    assert len(blind) > 50
    assert tried >= blind - norms_of_batches


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(5), nn.GroupNorm(1, 5)], ids=["batch", "group"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_a_norm_gives_lies_in_memory_as_the_kernels_lay_it(norm: nn.Module, channels_last: bool) -> None:
    """Of a turned tensor it does not lie turned, so that flattening it makes no copy, and what is written stays."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 8), norm

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            h = h.contiguous(memory_format=torch.channels_last) if channels_last else h.transpose(2, 3)
            h = self.norm(h)
            h.flatten(1).add_(1.5)
            return h

    model, x = Turned().eval(), torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(_check_same(model, x)(x), model(x))

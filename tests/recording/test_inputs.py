import json
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import randomise
from torch import Tensor, nn

from fxprune.errors import ExampleInputsError
from fxprune.recording.inputs import (
    RECORD_KEY,
    TensorSpec,
    describe_inputs,
    from_json,
    infer_inputs,
    input_names,
    make_inputs,
    normalise_inputs,
    other_values,
    resized,
    resolve_inputs,
    specs_of,
    tensors_of,
    to_json,
    with_sizes,
    with_values,
)


@dataclass
class Batch:
    ids: Tensor
    scale: float


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return x * scale if mask is None else x * mask * scale


def message_of(example_inputs: Any, example_kwargs: Any = None) -> str:
    with pytest.raises(ExampleInputsError) as caught:
        normalise_inputs(example_inputs, example_kwargs)
    return str(caught.value)


# -- what the user passes


def test_a_tensor_is_one_argument_and_a_tuple_or_list_is_all() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert normalise_inputs(x) == ((x,), {})
    assert normalise_inputs((x, None, 2)) == ((x, None, 2), {})
    assert normalise_inputs([x, y]) == ((x, y), {})
    assert normalise_inputs(({"ids": x},)) == (({"ids": x},), {})
    assert normalise_inputs(None, {"x": x}) == ((), {"x": x})
    assert normalise_inputs(x, {"mask": None}) == ((x,), {"mask": None})
    assert normalise_inputs((Batch(x, 1.0),))[0][0].ids is x


def test_what_is_no_input_is_refused_with_the_remedy() -> None:
    assert message_of({"x": torch.zeros(1)}) == (
        "example_inputs is a dict; pass keyword arguments as example_kwargs=..., "
        "or, if forward takes the dict itself, wrap it: example_inputs=(the_dict,)"
    )
    assert message_of(np.zeros(3)) == (
        "example_inputs is a ndarray; pass a torch tensor, for instance torch.as_tensor(example_inputs)"
    )
    assert message_of("x") == (
        "example_inputs is a str; pass a tensor, or a tuple of all positional arguments of forward"
    )
    assert message_of(3).startswith("example_inputs is an int; pass a tensor")
    no_tensor = (
        "the example inputs hold no tensor; pass the tensors that the model's forward takes, "
        "as example_inputs=(x, ...) or example_kwargs={'x': ...}"
    )
    assert message_of(()) == message_of((3, None)) == message_of(None) == no_tensor
    bad_kwargs = "pass a dict from argument names of forward to values"
    assert message_of(torch.zeros(1), [1]) == f"example_kwargs is a list; {bad_kwargs}"
    assert message_of(torch.zeros(1), {1: 2}) == f"example_kwargs is a dict; {bad_kwargs}"


# -- what is inferred


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: timm.create_model("resnet18"), (1, 3, 224, 224)),
        (lambda: timm.create_model("resnet18", in_chans=1), (1, 1, 224, 224)),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=(96, 64)), (1, 3, 96, 64)),
        (lambda: timm.create_model("mixer_s32_224", img_size=64), (1, 3, 64, 64)),
        (lambda: timm.create_model("inception_v3"), (1, 3, 299, 299)),
        (lambda: timm.create_model("resnet18", features_only=True), (1, 3, 224, 224)),
        (torchvision.models.shufflenet_v2_x0_5, (1, 3, 224, 224)),
        (lambda: torchvision.models.inception_v3(init_weights=False), (1, 3, 299, 299)),
        (lambda: torchvision.models.quantization.inception_v3(init_weights=False), (1, 3, 299, 299)),
        (lambda: torchvision.models.googlenet(init_weights=False), (1, 3, 224, 224)),
        (lambda: torchvision.models.VisionTransformer(96, 16, 1, 2, 32, 64), (1, 3, 96, 96)),
        (lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None), (1, 3, 224, 224)),
    ],
)
def test_inferred_inputs_are_what_the_model_runs_on(model: Any, shape: tuple[int, ...]) -> None:
    network = model().eval()
    (x,) = infer_inputs(network)[0]
    assert tuple(x.shape) == shape
    assert x.std() > 0.9
    with torch.no_grad():
        network(x)


def test_inferred_inputs_have_the_dtype_of_the_parameters_and_never_change() -> None:
    model = timm.create_model("resnet18").to(torch.float64)
    (x,) = infer_inputs(model)[0]
    assert x.dtype == torch.float64
    torch.manual_seed(1)
    assert torch.equal(x, infer_inputs(model)[0][0])


@pytest.mark.gpu
def test_inferred_inputs_are_on_the_device_of_the_parameters() -> None:
    assert infer_inputs(timm.create_model("resnet18").cuda())[0][0].is_cuda


def test_a_model_that_says_nothing_is_an_error_that_says_what_to_pass() -> None:
    with pytest.raises(ExampleInputsError) as caught:
        infer_inputs(Masked())
    assert str(caught.value) == (
        "cannot tell what Masked.forward(x, mask, scale) takes: example inputs are inferred for timm models and for "
        "torchvision's classification and segmentation models only; pass example_inputs, a tensor or a tuple of "
        "tensors with the batch first, for instance example_inputs=torch.randn(1, 3, 224, 224)"
    )


@pytest.mark.parametrize(
    "model",
    [
        lambda: torchvision.models.resnet18().layer1[0],
        lambda: torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights_backbone=None),
        torchvision.models.video.r3d_18,
    ],
)
def test_parts_of_networks_and_other_tasks_are_not_guessed(model: Any) -> None:
    with pytest.raises(ExampleInputsError, match="cannot tell what"):
        infer_inputs(model())


def test_a_recorded_graph_knows_its_inputs() -> None:
    graph = torch.fx.symbolic_trace(Masked())
    graph.meta[RECORD_KEY] = describe_inputs((torch.zeros(4, 3),), {"mask": torch.zeros(4, 1, dtype=torch.bool)})
    (x,), kwargs = infer_inputs(graph)
    assert x.shape == (4, 3)
    assert kwargs["mask"].dtype == torch.bool
    assert [tensor.shape for tensor in resolve_inputs(graph)[0]] == [(4, 3)]


def test_resolve_prefers_what_was_passed() -> None:
    model = timm.create_model("resnet18")
    x = torch.zeros(2, 3, 64, 64)
    assert resolve_inputs(model, x) == ((x,), {})
    assert resolve_inputs(Masked(), None, {"x": x}) == ((), {"x": x})


# -- made again


def test_made_inputs_are_like_those_described() -> None:
    Pair = namedtuple("Pair", "left right")
    ids = torch.tensor([[5, 9], [7, 6]])
    args = (torch.zeros(2, 3), {"pair": Pair(ids, None)}, [torch.zeros(4, 2, dtype=torch.float64)])
    kwargs = {
        "batch": Batch(torch.zeros(2, dtype=torch.bool), 0.5),
        "flag": True,
        "z": torch.zeros(2, 1, dtype=torch.cfloat),
    }
    record = describe_inputs(args, kwargs)
    assert record["args"][0] == TensorSpec((2, 3), torch.float32)
    assert record["args"][1]["pair"].left == TensorSpec((2, 2), torch.int64, 5, 9, (5, 9, 7, 6))
    assert len(specs_of(record)) == 5

    made_args, made_kwargs = make_inputs(record, batch=50)
    assert [(tuple(each.shape), each.dtype) for each in tensors_of((made_args, made_kwargs))] == [
        ((50, 3), torch.float32),
        ((50, 2), torch.int64),
        ((4, 2), torch.float64),
        ((50,), torch.bool),
        ((50, 1), torch.complex64),
    ]
    assert made_args[1]["pair"].right is None
    assert made_kwargs["flag"] is True
    assert made_kwargs["batch"].scale == 0.5
    assert [sorted(row) for row in made_args[1]["pair"].left.tolist()] == 25 * [[5, 9], [6, 7]]
    assert {tuple(row) for row in made_args[1]["pair"].left.tolist()} == {(5, 9), (9, 5), (6, 7), (7, 6)}
    assert made_kwargs["batch"].ids.tolist() == 50 * [False]
    assert 0.7 < made_args[0].std() < 1.3


class Cache:
    def __init__(self, keys: Tensor) -> None:
        self.layers, self.length = [{"keys": keys}], 3


def test_objects_are_described_and_made_like_containers() -> None:
    cache, x = Cache(torch.randn(2, 4)), torch.randn(2, 3)
    record = describe_inputs((x, [x, Batch(x, 1.0)]), {"cache": cache})
    assert specs_of(record) == 3 * [TensorSpec((2, 3), torch.float32)] + [TensorSpec((2, 4), torch.float32)]
    (_, (_, batch)), kwargs = make_inputs(record, batch=3)
    made = kwargs["cache"]
    assert type(made) is Cache
    assert (made.length, made.layers[0]["keys"].shape, batch.ids.shape) == (3, (3, 4), (3, 3))
    assert cache.layers[0]["keys"].shape == (2, 4)
    assert isinstance(record["kwargs"]["cache"].layers[0]["keys"], TensorSpec)
    assert normalise_inputs((cache,)) == ((cache,), {})
    assert input_names(record) == ["input_0", "input_1[0]", "input_1[1].ids", "cache.layers[0]['keys']"]
    assert input_names(record, ["x"])[:2] == ["x", "input_1[0]"]


def test_made_inputs_depend_on_the_seed_alone() -> None:
    record = describe_inputs((torch.zeros(2, 3),), {})
    ((first,), _), ((again,), _), ((other,), _) = (make_inputs(record, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (2, 3)


# -- near the example's values


def spec_of(values: Any, dtype: torch.dtype | None = None) -> TensorSpec:
    return TensorSpec.of(torch.tensor(values, dtype=dtype))


def made(spec: TensorSpec, seed: int = 0, **options: Any) -> Any:
    return spec.make(torch.Generator().manual_seed(seed), "cpu", **options).tolist()


MASKS = [
    [[1, 1, 1, 0], [1, 1, 1, 1]],
    [[True, True, False, False]],
    [[0.0, 1.0, 1.0]],
    [[[0.0, -float("inf")], [0.0, 0.0]]],
    [[0.0, torch.finfo(torch.float32).min, -float("inf")]],
    [[0.0, -100.0]],
    [0, 0, 0],
]


@pytest.mark.parametrize("values", MASKS)
def test_masks_stay_what_they_are(values: Any) -> None:
    spec = spec_of(values)
    assert spec.is_mask
    assert made(spec) == made(spec, 1) == torch.tensor(values).tolist()
    twice = made(spec, batch=2 * len(values))
    assert twice == 2 * torch.tensor(values).tolist()
    assert from_json(json.loads(json.dumps(to_json(spec), allow_nan=False))) == spec


def test_an_attention_mask_hides_no_whole_row_at_any_seed_and_batch_size() -> None:
    record = describe_inputs((torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),), {})
    for seed in range(20):
        ((mask,), _) = make_inputs(record, batch=1 + seed % 5, seed=seed)
        assert mask.any(-1).all()


@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[1.0, 1.0]], [[0.0, 2.0]], [[0.0, -3.0]], [[0.5, 1.0]]])
def test_floats_that_may_be_an_image_are_no_mask(values: Any) -> None:
    spec = spec_of(values)
    assert spec.values is None
    assert made(spec, 0) != made(spec, 1)


def test_ids_are_the_examples_in_another_order() -> None:
    rows = [list(range(10, 20)), [7] * 9 + [3]]
    spec = spec_of(rows)
    assert spec.is_ids
    assert made(spec, 1) == made(spec, 1) != made(spec, 2)
    for seed in range(5):
        assert [sorted(row) for row in made(spec, seed)] == [sorted(row) for row in rows]
    assert made(spec, permute=False, batch=3) == [*rows, rows[0]]
    assert [sorted(row) for row in made(spec, batch=3)] == [sorted(row) for row in (*rows, rows[0])]
    assert made(spec_of(7)) == 7
    assert made(spec_of([[7]]), batch=2) == [[7], [7]]
    assert made(spec_of([], torch.int64)) == []


def test_large_tensors() -> None:
    causal = torch.ones(1, 1, 400, 400, dtype=torch.bool).tril()
    spec = TensorSpec.of(causal)
    assert spec.is_mask
    assert len(spec.values or ()) < 1000, "a mask of few runs is kept, whatever its size"
    assert torch.equal(spec.make(torch.Generator(), "cpu"), causal)
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec
    ids = TensorSpec.of(torch.arange(3, 70_003))
    assert (ids.values, ids.low, ids.high) == (None, 3, 70_002)
    assert 3 <= min(made(ids)) <= max(made(ids)) <= 70_002
    assert TensorSpec.of(torch.rand(600, 600) > 0.5).values is None
    assert TensorSpec.of(torch.zeros(2, 3, device="meta", dtype=torch.int64)).values is None


def test_floats_of_which_none_is_negative_stay_in_their_range() -> None:
    powers, times = torch.rand(2, 80, 30) + 0.01, torch.tensor([10.0])
    for example, least in ((powers, float(powers.min())), (times, 5.0)):
        spec = TensorSpec.of(example)
        new = spec.make(torch.Generator().manual_seed(1), "cpu", batch=4)
        assert least <= float(new.min()) <= float(new.max()) <= float(example.max())
        assert new.unique().numel() > 0.99 * new.numel()
        assert from_json(json.loads(json.dumps(to_json(spec)))) == spec
    for example in (torch.randn(2, 80, 30), torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([1.0, float("inf")])):
        assert TensorSpec.of(example) == TensorSpec(tuple(example.shape), torch.float32)


def test_whole_numbers_in_a_column_of_floats_stay_whole() -> None:
    table = torch.cat([torch.tensor([[4.0], [0.0], [2.0]]), torch.randn(3, 2), torch.tensor([[-1.0], [7.0], [3.0]])], 1)
    for example in (table, table[:, None].expand(3, 5, 4)):
        spec = TensorSpec.of(example)
        assert spec.columns == ((0, 0, 4), (3, -1, 7))
        new = spec.make(torch.Generator().manual_seed(1), "cpu", batch=200)
        assert new[..., 0].unique().tolist() == [0, 1, 2, 3, 4]
        assert new[..., 3].unique().tolist() == [*range(-1, 8)]
        assert new[..., 1:3].unique().numel() == new[..., 1:3].numel()
        assert from_json(json.loads(json.dumps(to_json(spec)))) == spec
        assert spec.with_shape((*spec.shape[:-1], 2)).make(torch.Generator(), "cpu").shape[-1] == 2
    assert TensorSpec.of(1e30 * table).columns == ()
    assert TensorSpec.of(table[:1]).columns == ((0, 0, 4), (3, -1, 0))
    for damaged in ([[4, 0, 1]], [[1, 0, 1], [0, 0, 1]], [[0, 1, 0]], [[0, 1]], 3):
        with pytest.raises((ValueError, TypeError)):
            from_json({"tensor": [[3, 4], "float32", 0, 0, None, None, damaged]})


def test_specs_are_values() -> None:
    ids, same, other = spec_of([[1, 2]]), spec_of([[1, 2]]), spec_of([[2, 1]])
    assert ids == same != other
    assert len({ids, same, other}) == 2
    assert repr(ids) == "TensorSpec(shape=(1, 2), dtype=torch.int64, low=1, high=2)"


def test_records_of_older_files_are_read() -> None:
    spec = from_json({"tensor": [[1, 3], "int64", 2, 5]})
    assert spec == TensorSpec((1, 3), torch.int64, 2, 5)
    assert to_json(spec) == {"tensor": [[1, 3], "int64", 2, 5]}
    generator = torch.Generator().manual_seed(0)
    expected = torch.randint(2, 6, (1, 3), generator=generator).tolist()
    assert made(spec) == made(spec, permute=False) == expected, "as they were made when the file was written"
    for damaged in ([1, 2], [1, 2, "x"], [1, 2, None], [[1], [2], [3]], 3):
        with pytest.raises((ValueError, TypeError)):
            from_json({"tensor": [[1, 3], "int64", 2, 5, damaged]})


# -- other sizes


def test_other_sizes_of_any_dim() -> None:
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    record = describe_inputs((torch.zeros(2, 3, 8, 8), [ids]), {"mask": mask, "n": 3})
    new = with_sizes(record, {(0, -1): 16, (1, 1): 5, (2, 0): 3, (2, 1): 5})
    assert [spec.shape for spec in specs_of(new)] == [(2, 3, 8, 16), (2, 5), (3, 5)]
    (_, (found,)), kwargs = make_inputs(new, permute=False)
    assert found.tolist() == [[1, 2, 3, 1, 2], [4, 5, 6, 4, 5]]
    assert kwargs["mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert kwargs["n"] == 3
    smaller = make_inputs(with_sizes(record, {(1, 1): 2, (1, 0): 1}), permute=False)
    assert smaller[0][1][0].tolist() == [[1, 2]]
    assert with_sizes(record, {}) == record
    assert resized(record, (4, 6)) == with_sizes(record, {(0, 2): 4, (0, 3): 6})
    assert [spec.shape for spec in specs_of(record)] == [(2, 3, 8, 8), (2, 3), (2, 3)], "a record is never changed"
    for wrong in ((3, 0), (1, 2), (-1, 0), (1, -3)):
        with pytest.raises(IndexError, match=rf"^the inputs have no dim {wrong[1]} of a tensor {wrong[0]}$"):
            with_sizes(record, {wrong: 1})


@pytest.mark.parametrize(
    ("mask", "size", "expected"),
    [
        ([[1, 1, 1, 1]], 2, [[1, 1]]),
        ([[0, 0, 1, 1]], 2, [[0, 1]]),
        ([[0, 0, 0, 0, 0, 0, 1, 1]], 4, [[0, 0, 0, 1]]),
        ([[1, 1, 0, 0]], 2, [[1, 0]]),
        ([[True, True, False, False, False]], 2, [[True, False]]),
        ([[0.0, 0.0, -1e9, -1e9]], 2, [[0.0, -1e9]]),
        ([[0, 0, 0, 1], [1, 0, 0, 0]], 2, [[0, 1], [1, 0]]),
        ([[0, 1, 1], [1, 1, 1]], 1, [[1], [1]]),
    ],
)
def test_a_mask_that_is_cut_shows_something_in_every_row(mask: Any, size: int, expected: Any) -> None:
    assert made(spec_of(mask).with_shape((len(mask), size))) == torch.tensor(expected).tolist()


@pytest.mark.parametrize("inverse", [False, True])
def test_a_causal_mask_stays_causal(inverse: bool) -> None:
    def causal(size: int) -> Tensor:
        return torch.ones(1, 1, size, size, dtype=torch.bool).tril() ^ inverse

    record = describe_inputs((causal(6),), {})
    for size in (2, 3):
        new = with_sizes(record, {(0, 2): size, (0, 3): size})
        assert torch.equal(make_inputs(new)[0][0], causal(size))
    larger = make_inputs(with_sizes(record, {(0, 2): 8, (0, 3): 8}))[0][0]
    assert torch.equal(larger[..., :6, :6], causal(6))
    assert (larger ^ inverse).any(-1).all()


# -- other values


def test_masks_and_ids_are_varied_near_the_example() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]]), torch.ones(2, 4, dtype=torch.int64)
    x = torch.randn(2, 4)
    record = describe_inputs((ids, x), {"attention_mask": mask, "start": torch.tensor([3])})
    varied = other_values(record, ["input_ids"])
    assert [text for text, _ in varied] == [
        "attention_mask with zeros at its end",
        "attention_mask with zeros at its start",
        "input_ids permuted",
    ]
    masks = []
    for _, new in varied:
        (new_ids, new_x), kwargs = with_values(new, (ids, x), {"attention_mask": mask, "start": torch.tensor([3])})
        assert new_x is x
        assert kwargs["start"].tolist() == [3]
        masks.append(kwargs["attention_mask"].tolist())
        again = make_inputs(new, permute=False)
        assert torch.equal(again[0][0], new_ids)
        assert torch.equal(again[1]["attention_mask"], kwargs["attention_mask"])
    assert masks == [[[1, 1, 1, 1], [1, 1, 1, 0]], [[1, 1, 1, 1], [0, 1, 1, 1]], [[1, 1, 1, 1], [1, 1, 1, 1]]]
    assert not torch.equal(new_ids, ids)
    assert torch.equal(new_ids.sort(-1).values, ids.sort(-1).values)
    assert [text for text, _ in other_values(record)][-1] == "input_0 permuted"


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        ([[1, 1, 0]], {"zeros at its start": [[0, 1, 0]]}),
        ([[0, 1]], {}),
        ([[0, 0, 0]], {"ones at its end": [[0, 0, 1]], "ones at its start": [[1, 0, 0]]}),
        ([True, True], {"False at its end": [True, False], "False at its start": [False, True]}),
        ([False, False], {"True at its end": [False, True], "True at its start": [True, False]}),
        (
            [[[0.0, -float("inf")], [0.0, 0.0]]],
            {"-inf at its end": [[[0, -float("inf")], [0, -float("inf")]]],
             "-inf at its start": [[[0, -float("inf")], [-float("inf"), 0]]]},
        ),
        (
            [[-1e9, 0.0, -float("inf")], [0.0, 0.0, 0.0]],
            {"-inf at its end": [[-1e9, 0, -float("inf")], [0, 0, -float("inf")]],
             "-inf at its start": [[-1e9, 0, -float("inf")], [-float("inf"), 0, 0]]},
        ),
        ([[0.5, 1.0]], {}),
        ([[1]], {}),
        (1, {}),
        ([[7]], {}),
        ([[7, 7]], {}),
    ],
)  # fmt: skip
def test_what_hides_depends_on_the_mask_and_no_row_loses_all(mask: Any, found: dict[str, Any]) -> None:
    tensor = torch.tensor(mask)
    varied = other_values(describe_inputs((), {"mask": tensor}))
    values = {text: with_values(new, (), {"mask": tensor})[1]["mask"] for text, new in varied}
    assert {text: value.tolist() for text, value in values.items()} == {
        f"mask with {text}": torch.tensor(value).tolist() for text, value in found.items()
    }
    assert all(value.dtype == tensor.dtype for value in values.values())


def test_several_masks_are_varied_together_and_ids_too() -> None:
    ids, zeros = torch.tensor([[5, 6, 7, 8]]), torch.zeros(1, 4, dtype=torch.int64)
    record = describe_inputs((), {"ids": ids, "types": zeros, "mask": zeros + 1, "positions": torch.arange(4)[None]})
    assert [text for text, _ in other_values(record)] == [
        "types with ones at its end, mask with zeros at its end",
        "types with ones at its start, mask with zeros at its start",
        "ids, positions permuted",
    ]
    assert other_values(describe_inputs((torch.randn(2, 3),), {})) == []


# -- the helper of the other tests


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vgg11_bn", "convnext_atto", "vit_tiny_patch16_224"])
def test_randomised_networks_neither_vanish_nor_explode(name: str) -> None:
    model = randomise(timm.create_model(name)).eval()
    x = make_inputs(describe_inputs((torch.zeros(2, 3, 224, 224),), {}))[0][0]
    with torch.no_grad():
        y = model(x)
    assert 1e-2 < y.std() < 1e2
    # The second image gives another answer: the biases do not drown the signal.
    assert (y[0] - y[1]).std() > 1e-3 * y.std()
    small = [parameter for parameter in model.parameters() if parameter.numel() <= 10_000]
    assert all(parameter.unique().numel() > 0.9 * parameter.numel() for parameter in small)

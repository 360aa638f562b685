import enum
import types
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.recording.structure import Part, leaves_of, map_leaves, parts, path_text, paths, rebuilt, tensors_of


class Config:
    size = 3


class Layer:
    def __init__(self, number: float, config: Config) -> None:
        self.keys, self.values = torch.full((1,), number), torch.full((1,), number + 1)
        self.length, self.config, self.name = 4, config, "layer"


class Cache:
    """As libraries keep the keys and values of earlier tokens."""

    made = 0

    def __init__(self, numbers: tuple[float, ...] = (0.0, 2.0)) -> None:
        Cache.made += 1
        self.config = Config()
        self.layers = [Layer(number, self.config) for number in numbers]


class Slotted:
    __slots__ = ("__hidden", "empty", "number")

    def __init__(self) -> None:
        self.number, self.__hidden = 5, torch.zeros(1)

    @property
    def hidden(self) -> Tensor:
        return self.__hidden


class SlottedMore(Slotted):
    __slots__ = ("extra",)


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    table: dict[str, Any] = field(default_factory=dict)


class Registered:
    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = left, right


pytree.register_pytree_node(
    Registered, lambda value: ([value.left, value.right], None), lambda items, _: Registered(*items)
)

Pair = namedtuple("Pair", "left right")


class Named(list):  # type: ignore[type-arg]
    name = ""


def texts(value: Any) -> list[str]:
    return [path_text(value, path) for path, leaf in paths(value) if isinstance(leaf, Tensor)]


def test_an_object_comes_apart_where_its_attributes_hold_tensors() -> None:
    cache = Cache()
    assert [tensor.item() for tensor in tensors_of(cache)] == [0, 1, 2, 3]
    assert texts(cache) == [".layers[0].keys", ".layers[0].values", ".layers[1].keys", ".layers[1].values"]
    # What is known of it is a leaf; the configuration, which nothing can be told of, is none.
    assert [leaf for leaf in leaves_of(cache) if not isinstance(leaf, Tensor)] == [4, "layer", 4, "layer"]
    (layers,) = parts(cache) or []
    assert layers == Part("attribute", "layers", cache.layers)
    assert [part.key for part in parts(cache.layers[0]) or []] == ["keys", "values", "length", "name"]


def test_a_copy_of_an_object_shares_nothing_that_holds_tensors() -> None:
    cache = Cache()
    made = Cache.made
    copy = map_leaves(lambda leaf: leaf + 10 if isinstance(leaf, Tensor) else leaf, cache)
    assert type(copy) is Cache
    assert type(copy.layers[0]) is Layer
    assert [tensor.item() for tensor in tensors_of(copy)] == [10, 11, 12, 13]
    assert [tensor.item() for tensor in tensors_of(cache)] == [0, 1, 2, 3]
    assert copy.layers is not cache.layers
    assert copy.config is cache.config
    assert copy.layers[1].length == 4
    assert Cache.made == made, "no __init__ runs"
    copy.layers[0].keys = copy.layers.pop()
    assert len(cache.layers) == 2


def test_circles_and_objects_that_occur_twice() -> None:
    cache = Cache()
    cache.owner = cache  # type: ignore[attr-defined]
    for layer in cache.layers:
        layer.cache = cache  # type: ignore[attr-defined]
    cache.last = cache.layers[-1]  # type: ignore[attr-defined]
    assert len(tensors_of((cache, cache))) == 4
    one, other = map_leaves(lambda leaf: leaf, (cache, cache))
    assert one is other
    assert one is not cache
    assert one.owner is one
    assert one.layers[0].cache is one
    assert one.last is one.layers[1]
    x = torch.zeros(1)
    assert len(tensors_of([x, x])) == len(tensors_of(2 * ([x],))) == 2, "a tensor counts as often as it occurs"


def test_slots() -> None:
    value = SlottedMore()
    value.extra = [torch.ones(1)]
    copy = map_leaves(lambda leaf: leaf + 1, value)
    assert (copy.hidden.item(), copy.extra[0].item(), copy.number) == (1, 2, 6)
    assert value.hidden.item() == 0
    assert not hasattr(copy, "empty")


def test_containers_keep_their_types() -> None:
    x = torch.zeros(1)
    named = Named([x])
    named.name = "n"
    values = {
        "dict": {"a": x, 1: [x]},
        "ordered": OrderedDict(b=x, a=2),
        "user": UserDict(a=x),
        "read only": types.MappingProxyType({"a": x}),
        "pair": Pair(x, None),
        "named": named,
        "largest": torch.ones(2, 2).max(0),
        "size": torch.Size([2, 3]),
        "frozen": Frozen(x, {"y": x}),
        "registered": Registered([x], {"a": Frozen(x)}),
    }
    copy = map_leaves(lambda leaf: leaf, values)
    assert [type(item) for item in copy.values()] == [type(item) for item in values.values()]
    assert [id(leaf) for leaf in leaves_of(copy)] == [id(leaf) for leaf in leaves_of(values)]
    assert copy["named"].name == "n"
    assert copy["size"] == (2, 3)
    assert copy["frozen"] is not values["frozen"]
    assert texts(values["pair"]) == [".left"]
    assert texts(values["frozen"]) == [".x", ".table['y']"]
    assert len(texts(values["registered"])) == 2
    kinds = [part.kind for part in parts(values["registered"]) or []]
    assert kinds == ["attribute", "attribute"], "its attributes hold tensors, so that writes to it can be followed"
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    assert map_leaves(lambda leaf: leaf if leaf is None else "x", packed).data == "x", "its __new__ would read a tensor"


def test_what_is_never_taken_apart() -> None:
    class Colour(enum.Enum):
        RED = 1

    def function() -> None: ...

    function.tensor = torch.zeros(1)  # type: ignore[attr-defined]

    class Number(int):
        pass

    number = Number(3)
    number.origin = torch.zeros(1)  # type: ignore[attr-defined]
    layer = nn.Linear(1, 1)
    for value in (
        number,
        torch.zeros(1),
        None,
        "x",
        Colour.RED,
        Config(),
        Config,
        function,
        layer,
        layer.forward,
        torch,
    ):
        assert parts(value) is None
        assert leaves_of(value) == [value]
        assert map_leaves(lambda leaf: leaf, value) is value


def test_symbolic_sizes_are_leaves() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes = {"sizes": [x.shape[0]], "x": x}
            assert leaves_of(sizes) == [x.shape[0], x]
            assert map_leaves(lambda leaf: leaf, sizes) == sizes
            return x

    torch.export.export(Sizes(), (torch.zeros(3),), dynamic_shapes=({0: torch.export.Dim("n")},))


def test_one_level_at_a_time() -> None:
    for value in ({"a": 1}, [1, 2], (1,), Pair(1, 2), Frozen(torch.zeros(1)), Cache(), Registered(1, 2)):
        found = parts(value)
        assert found
        new = rebuilt(value, [part.holding(index) for index, part in enumerate(found)])
        assert type(new) is type(value)
        assert [part.value for part in parts(new) or []] in ([], list(range(len(found))))
    assert rebuilt({}, parts({}) or []) == {}

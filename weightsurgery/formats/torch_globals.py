"""What PyTorch's pickles may name, and what stands for it here: tensors as descriptions.

No function of torch is called, and none is imported. A tensor is where its numbers lie in which
storage; what holds no plain numbers (sparse, quantized, distributed tensors) is `Foreign`, and
everything that is not a tensor `Opaque`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weightsurgery.dtypes import DTYPES, DType
from weightsurgery.formats.pickle_values import Charge, DamagedError, Global, Opaque
from weightsurgery.formats.safetensors import MAX_DIMENSION, MAX_ELEMENTS, MAX_RANK

_ENTRY = 112  # bytes that an item of a dictionary costs at most


@dataclass(frozen=True, slots=True)
class TorchType:
    """A dtype of torch's.

    Attributes:
        name: Torch's.
        width: Bytes of an element.
        dtype: The format's; None if safetensors cannot hold it.
    """

    name: str
    width: int
    dtype: DType | None


_PLAIN = {  # torch's name to the format's
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    "bfloat16": "BF16",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
_OTHERS = {  # bytes of an element
    **dict.fromkeys(("qint8", "quint8", "quint4x2", "quint2x4", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("bits8", "bits1x8", "bits2x4", "bits4x2"), 1),
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
    "bits16": 2,
    "qint32": 4,
    "complex32": 4,
    "complex128": 16,
}
TYPES: Mapping[str, TorchType] = {
    **{name: TorchType(name, DTYPES[own].bits // 8, DTYPES[own]) for name, own in _PLAIN.items()},
    **{name: TorchType(name, width, None) for name, width in _OTHERS.items()},
}
UNTYPED = TorchType("untyped bytes", 1, None)
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QInt32": "qint32",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
}


@dataclass(eq=False, slots=True)
class Storage:
    """The bytes that one or several tensors are views of.

    Attributes:
        key: Its name in the file.
        type: As which it was saved.
        count: Elements of that type.
        location: The device that it was on.
        used: As which types its tensors read it.
    """

    key: str
    type: TorchType
    count: int
    location: str
    used: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A storage, or a run of its elements, which files before PyTorch 1.6 have.

    Attributes:
        storage: The storage.
        start: The first element of the run.
    """

    storage: Storage
    start: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor: elements of a storage.

    Attributes:
        storage: The storage.
        type: Its dtype.
        offset: Its first element in the storage.
        shape: Its shape.
        strides: Elements between neighbors in each dimension.
        conjugated: Whether its numbers are the conjugates of those stored.
        negated: Whether they are the negatives.
    """

    storage: Storage
    type: TorchType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conjugated: bool = False
    negated: bool = False


class Foreign(Opaque):
    """A tensor that safetensors cannot hold; its name says what it is."""

    __slots__ = ()


def _numbers(value: Any, what: str) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > MAX_RANK:
        raise DamagedError(f"a tensor's {what} is not a tuple of at most {MAX_RANK} integers")
    for number in value:
        if type(number) is not int or not 0 <= number < MAX_DIMENSION:
            raise DamagedError(f"a tensor's {what} holds what is not from 0 to 2**48 - 1")
    return value


def _view(given: tuple[Any, ...], type_: TorchType | None, metadata: Any) -> Any:
    part, offset, shape, strides = given
    if not isinstance(part, Part) or type(offset) is not int or not 0 <= offset < 1 << 60:
        raise DamagedError("a tensor without a storage, or with an offset that cannot be")
    shape, strides = _numbers(shape, "shape"), _numbers(strides, "stride")
    if len(shape) != len(strides):
        raise DamagedError("a tensor with more or fewer strides than dimensions")
    elements = 1
    for size in shape:
        elements *= size or 1
        if elements >= MAX_ELEMENTS:
            raise DamagedError("a tensor of 2**60 elements or more")
    storage = part.storage
    kind = storage.type if type_ is None else type_
    if storage.location == "meta":
        return Foreign("on the meta device, without numbers")
    if kind.name not in storage.used:
        storage.used += (kind.name,)
    said = metadata if type(metadata) is dict else {}
    conjugated, negated = said.get("conj") is True, said.get("neg") is True
    return Tensor(storage, kind, part.start + offset, shape, strides, conjugated, negated)


def _rebuild(given: tuple[Any, ...], _charge: Charge) -> Any:
    """`_rebuild_tensor`, `_rebuild_tensor_v2`: a storage that has a dtype."""
    if not 4 <= len(given) <= 7:
        raise DamagedError(f"a tensor of {len(given)} arguments")
    return _view(given[:4], None, given[6] if len(given) == 7 else None)


def _rebuild_v3(given: tuple[Any, ...], _charge: Charge) -> Any:
    """`_rebuild_tensor_v3`: a storage of bytes, and the dtype beside it."""
    if not 7 <= len(given) <= 8 or not isinstance(given[6], Global):
        raise DamagedError("a tensor without a dtype")
    if not isinstance(given[6].value, TorchType):
        raise DamagedError("a tensor without a dtype")
    return _view(given[:4], given[6].value, given[7] if len(given) == 8 else None)


def _first(given: tuple[Any, ...], _charge: Charge) -> Any:
    """A parameter is the tensor that it is made of."""
    if not given or not isinstance(given[0], Tensor | Foreign):
        raise DamagedError("a parameter of what is not a tensor")
    return given[0]


def _from_type(given: tuple[Any, ...], charge: Charge) -> Any:
    """`_rebuild_from_type_v2`: a tensor of a class, with attributes, which are left out."""
    if len(given) != 4 or not isinstance(given[0], Global) or not isinstance(given[1], Global):
        raise DamagedError("a tensor without a class")
    function, kind, arguments = given[:3]
    if kind.name in _SUBCLASSES:
        return Foreign(f"a {kind.name.rpartition('.')[2]}, of which one process saves a part")
    # Of tensors alone: a call of this function itself could go on to any depth.
    known = kind.name in _CLASSES and function.name.startswith("torch._utils._rebuild_")
    if not known or function.make is None or type(arguments) is not tuple:
        raise DamagedError(f"a tensor of class {kind.name}, made by {function.name}")
    return function.make(arguments, charge)


def _size(given: tuple[Any, ...], _charge: Charge) -> Any:
    if len(given) != 1 or type(given[0]) not in (tuple, list):
        raise DamagedError("a torch.Size of what is not a tuple")
    return given[0]


def _dictionary(given: tuple[Any, ...], charge: Charge) -> Any:
    """An OrderedDict; Python 2 gives its items as a list of pairs, each a list."""
    if not given:
        return {}
    items = given[0]
    if len(given) != 1 or type(items) not in (tuple, list):
        raise DamagedError("an OrderedDict of what are not pairs")
    charge(_ENTRY * len(items))
    found = {}
    for pair in items:
        if type(pair) not in (tuple, list) or len(pair) != 2 or type(pair[0]) is not str:
            raise DamagedError("an OrderedDict of what are not pairs with a text first")
        found[pair[0]] = pair[1]
    return found


def _empty(_given: tuple[Any, ...], _charge: Charge) -> Any:
    return {}


def _foreign(what: str) -> Callable[[tuple[Any, ...], Charge], Any]:
    return lambda _given, _charge: Foreign(what)


_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_SUBCLASSES = (
    "torch.distributed.tensor.DTensor",
    "torch.distributed._tensor.DTensor",
    "torch.distributed._tensor.api.DTensor",
)
_MAKES: Mapping[str, Callable[[tuple[Any, ...], Charge], Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": _empty,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_qtensor": _foreign("a quantized tensor"),
    "torch._utils._rebuild_sparse_tensor": _foreign("a sparse tensor"),
    "torch._utils._rebuild_sparse_csr_tensor": _foreign("a sparse tensor"),
    "torch._utils._rebuild_nested_tensor": _foreign("a nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _foreign("on the meta device, without numbers"),
    "torch._utils._rebuild_wrapper_subclass": _foreign("a tensor subclass"),
    "torch._utils._rebuild_device_tensor_from_numpy": _foreign("a tensor of another device"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _foreign("a tensor of another device"),
}
# Data that lie beside weights: settings, counters, states of random numbers. What they hold is
# not looked at, and a call of them is not made.
_INERT = (
    *_CLASSES,
    *_SUBCLASSES,
    *("argparse.Namespace", "types.SimpleNamespace", "_codecs.encode", "_io.BytesIO"),
    *("collections.Counter", "collections.deque", "uuid.UUID"),
    *("datetime.datetime", "datetime.date", "datetime.timedelta", "datetime.timezone"),
    *(f"pathlib.{p}" for p in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"pathlib._local.{path}" for path in ("PosixPath", "WindowsPath")),
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in (
            *("set", "frozenset", "bytearray", "bytes", "complex", "slice", "range", "object"),
            *("int", "float", "bool", "str", "list", "dict", "tuple"),
        )
    ),
    *("numpy.ndarray", "numpy.dtype"),
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    *("numpy.random._pickle.__randomstate_ctor", "numpy.random._pickle.__generator_ctor"),
    *("numpy.random._pickle.__bit_generator_ctor", "numpy.random._mt19937.MT19937"),
    *("numpy.random._pcg64.PCG64", "numpy.random.bit_generator.SeedSequence"),
    *("numpy.random.bit_generator.__pyx_unpickle_SeedSequence",),
    *("torch.device", "torch.serialization._get_layout"),
    *(f"torch.per_{kind}" for kind in ("tensor_affine", "tensor_symmetric", "channel_affine")),
    *("torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams"),
    *(f"torch.distributed.device_mesh.{name}" for name in ("DeviceMesh", "_MeshEnv")),
    *(f"torch.distributed._mesh_layout.{name}" for name in ("_MeshLayout", "_FlatLayout")),
    *(
        f"torch.distributed.{module}.{name}"
        for module in ("tensor._dtensor_spec", "_tensor._dtensor_spec", "_tensor.placement_types")
        for name in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")
    ),
    *(
        f"torch.distributed.{module}.placement_types.{name}"
        for module in ("tensor", "_tensor")
        for name in ("Shard", "_StridedShard", "Replicate", "Partial", "_Partial")
    ),
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
GLOBALS: Mapping[str, Global] = {
    **{name: Global(name) for name in _INERT},
    **{name: Global(name, make) for name, make in _MAKES.items()},
    **{f"torch.{name}": Global(f"torch.{name}", None, kind) for name, kind in TYPES.items()},
    **{
        f"{module}.{name}Storage": Global(f"{module}.{name}Storage", None, TYPES[kind])
        for module in ("torch", "torch.cuda")
        for name, kind in _STORAGES.items()
    },
    **{
        name: Global(name, None, UNTYPED)
        for name in ("torch.storage.UntypedStorage", "torch.UntypedStorage")
    },
}

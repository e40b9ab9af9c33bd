"""A network as a list of operations, read off by `torch.fx`; what is not understood is refused by name.

The network is traced symbolically, so that control flow that depends on the image cannot hide. Every traced node becomes an
operation of `lipnext.certificates.operations`, made from the stored weights. Shapes are taken from runs on batches of two
and of three images: whatever mixes images, or keeps no batch in front, shows there.
"""

import copy
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from lipnext.certificates import operations as ops
from lipnext.certificates.activations import GroupSort, MaxMin, MaxMinReLU
from lipnext.certificates.operations import Operation, Shape
from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import LipnextError, UnsoundError

PROBES = (2, 3)
"""Sizes of the batches that shapes are taken from."""


@dataclass(frozen=True)
class Place:
    """One place of the network.

    Attributes:
        path: the module, and the function called in it if it is not the module itself.
        operation: None where it is refused.
        inputs: places whose results it takes; 0 is the image, k + 1 the result of place k.
        shape: of its result for one image.
        lipschitz: the proved constant from the image to its result; None behind a refused one.
        problem: why it is refused.
    """

    path: str
    operation: Operation | None
    inputs: tuple[int, ...]
    shape: Shape
    lipschitz: LipschitzBound | None
    problem: str | None = None


@dataclass(frozen=True)
class Graph:
    """A network as places in the order of computation; the last one gives the logits."""

    places: tuple[Place, ...]
    input_shape: Shape

    def shape(self, slot: int) -> Shape:
        """The shape of the image (slot 0) or of the result of place `slot - 1`, for one image."""
        return self.places[slot - 1].shape if slot else self.input_shape

    def require(self) -> None:
        """Refuse a graph with a place that is not understood.

        Raises:
            UnsoundError: naming the first such place and what to do.
        """
        for place in self.places:
            if place.problem is not None:
                raise UnsoundError(f"cannot certify {place.path}: {place.problem}")

    def evaluate(self, images: Tensor) -> Tensor:
        """Compute the last result in float64; for graphs without a refused place."""
        values = [images]
        for place in self.places:
            assert place.operation is not None
            values.append(place.operation.evaluate(*(values[k] for k in place.inputs)))
        return values[-1]


def trace(net: nn.Module, input_shape: tuple[int, int, int]) -> Graph:
    """Read a network in evaluation mode as a graph, every place with its bound or the reason for refusal.

    Args:
        net: from images `(n, C, H, W)` to logits; not changed.
        input_shape: (C, H, W).

    Raises:
        UnsoundError: where the whole cannot be read: it cannot be traced, takes several inputs, does not run on such
            images or returns no tensor.
    """
    net = copy.deepcopy(net)
    tracer = _Tracer()
    try:
        traced = fx.GraphModule(net, tracer.trace(net))
    except Exception as error:  # torch.fx raises whatever the traced code does with a symbolic value
        raise UnsoundError(
            f"torch.fx cannot trace {type(net).__name__} ({_first_line(error)}); write its forward without control "
            "flow that depends on the image or its shape, or replace the module (docs/bring-your-own.md)"
        ) from error
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise UnsoundError(
            f"{type(net).__name__} takes {len(inputs)} inputs, an image classifier takes one; wrap it in a module "
            "that passes the others"
        )
    return _Reader(traced, input_shape).read()


class _Tracer(fx.Tracer):
    """Stops at modules that are understood as a whole, and keeps track of stored tensors."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _kind(m) is not None or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Ref:
    """The result of a place: slot 0 is the image, slot k + 1 the result of place k."""

    slot: int
    shape: Shape


@dataclass(frozen=True)
class _Use:
    """An operation on results; `alias`: the result shares memory with the input; `writes`: the input is overwritten."""

    operation: Operation
    inputs: tuple[_Ref, ...]
    alias: bool = False
    writes: bool = False


class _Reader:
    """Turns the nodes of a traced module into places."""

    def __init__(self, traced: fx.GraphModule, input_shape: tuple[int, int, int]) -> None:
        self.traced = traced
        self.input_shape = input_shape
        self.runs = [_run(traced, (batch, *input_shape)) for batch in PROBES]
        self.known: dict[fx.Node, Any] = {}  # a _Ref, or what a node gives whatever the image is
        self.places: list[Place] = []
        self.aliases: set[fx.Node] = set()

    def read(self) -> Graph:
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self.known[node] = _Ref(0, tuple(self.runs[0][node].shape[1:]))
            elif node.op == "output":
                self._finish(node.args[0])
            elif self._is_constant(node):
                self._constant(node)
            else:
                self._place(node)
        return Graph(tuple(self.places), self.input_shape)

    def _is_constant(self, node: fx.Node) -> bool:
        """Stored tensors, and sizes: of all that images decide, their shape alone is no data."""
        if node.op == "get_attr" or _is_size(node):
            return True
        return not any(isinstance(self.known[n], _Ref) for n in node.all_input_nodes)

    def _constant(self, node: fx.Node) -> None:
        value = self.runs[0][node]
        if isinstance(value, Tensor) and node.op != "get_attr" and node.target not in _MOVES:
            self._refuse(
                node,
                f"{_name(node)} computes with stored tensors when it runs, and its rounding is not followed; store the "
                "result as a buffer",
            )
        self.known[node] = value

    def _place(self, node: fx.Node) -> None:
        """Add a place for a node that depends on the image."""
        shapes: list[Any] = [getattr(run[node], "shape", None) for run in self.runs]
        if any(shape is None for shape in shapes):
            self._refuse(node, f"{_name(node)} does not return one tensor; {_ADVICE}")
            return
        keeps_batch = all(len(s) >= 2 and s[0] == n for s, n in zip(shapes, PROBES, strict=True))
        if not keeps_batch or shapes[0][1:] != shapes[1][1:]:
            self._refuse(
                node, "its result is not a batch with the images in front; keep dimension 0 as it is"
            )
            return
        shape = tuple(shapes[0][1:])
        try:
            use = self._use(node, shape)
            self._check_writes(node, use)
        except LipnextError as error:
            self._refuse(node, str(error), shape)
            return
        if use.alias or use.writes:
            self.aliases.add(node)
        before = [self._lipschitz(ref) for ref in use.inputs]
        known = [k for k in before if k is not None]
        lipschitz = use.operation.bound(*known) if len(known) == len(before) else None
        slots = tuple(ref.slot for ref in use.inputs)
        self._append(node, Place(_path(node), use.operation, slots, shape, lipschitz))

    def _use(self, node: fx.Node, shape: Shape) -> _Use:
        """Find the handler of a node and call it with known values in place of nodes."""
        module = self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        kind: Any = node.target if module is None else _kind(module)
        if kind in _RESHAPES:
            return _reshape(self.known.get(node.all_input_nodes[0]), shape)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._argument)
        if module is not None:
            if kind is None:
                raise UnsoundError(f"{type(module).__name__} has no proved bound; {_ADVICE}")
            return _MODULES[kind](module, *args)
        handler = _FUNCTIONS.get(node.target)
        if handler is None:
            raise UnsoundError(f"{_name(node)} has no proved bound; {_ADVICE}")
        try:
            inspect.signature(handler).bind(*args, **kwargs)
        except TypeError as error:
            raise UnsoundError(
                f"{_name(node)} is called in a way that is not understood ({error}); {_ADVICE}"
            ) from error
        return handler(*args, **kwargs)

    def _argument(self, node: fx.Node) -> Any:
        """A result, or a value that is the same whatever the batch."""
        known = self.known[node]
        if isinstance(known, _Ref | Tensor):
            return known
        if self.runs[1][node] != known:
            raise UnsoundError("it computes with the size of the batch; use sizes of one image")
        return known

    def _check_writes(self, node: fx.Node, use: _Use) -> None:
        """Allow overwriting only what nobody else reads, through any chain of views."""
        source = node.all_input_nodes[0]
        while use.writes:
            if len(source.users) > 1 or source.op == "placeholder":
                raise UnsoundError("it overwrites its input, which is used elsewhere; do not work in place")
            if source not in self.aliases:
                return
            source = source.all_input_nodes[0]

    def _lipschitz(self, ref: _Ref) -> LipschitzBound | None:
        if ref.slot == 0:
            return LipschitzBound(value=1.0, norm=2.0, proof="isometry")
        return self.places[ref.slot - 1].lipschitz

    def _refuse(self, node: fx.Node, problem: str, shape: Shape = ()) -> None:
        self._append(node, Place(_path(node), None, (), shape, None, problem))

    def _append(self, node: fx.Node, place: Place) -> None:
        self.places.append(place)
        self.known[node] = _Ref(len(self.places), place.shape)

    def _finish(self, output: Any) -> None:
        known = self.known.get(output) if isinstance(output, fx.Node) else None
        if not isinstance(known, _Ref):
            raise UnsoundError(
                "the network must return one tensor of logits (n, K) that depends on the image"
            )
        if known.slot != len(self.places):  # what comes later is not used for the logits
            self.places = self.places[: known.slot]


def _run(traced: fx.GraphModule, shape: tuple[int, ...]) -> dict[fx.Node, Any]:
    """Run on black images and return what every node gives."""
    like = next((t for t in traced.parameters() if t.is_floating_point()), torch.zeros(1))
    results: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            results[n] = super().run_node(n)
            return results[n]

    recorder = Recorder(traced)
    recorder.extra_traceback = False
    try:
        with torch.no_grad():
            recorder.run(torch.zeros(shape, dtype=like.dtype, device=like.device))
    except Exception as error:  # whatever the network raises
        raise UnsoundError(
            f"the network does not run on images {('n', *shape[1:])}: {_first_line(error)}; check input_shape"
        ) from error
    return results


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The understood class that a module is, or inherits `forward` from unchanged."""
    for kind in type(module).__mro__:
        if kind in _MODULES or kind in _RESHAPES:
            own = ("forward", "_conv_forward", "__call__")
            same = all(getattr(type(module), name, None) is getattr(kind, name, None) for name in own)
            return kind if same else None
    return None


def _path(node: fx.Node) -> str:
    """The module's path; for a function, the path of the module that calls it and the function's name."""
    if node.op == "call_module":
        return str(node.target)
    stack = list(node.meta.get("nn_module_stack", {}).values())
    inside = stack[-1][0] if stack else ""
    return f"{inside or 'forward'}: {_name(node)}"


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".;")


def _is_size(node: fx.Node) -> bool:
    """Whether a node gives a size of its input, or computes with such sizes alone."""
    if node.op == "call_method" and node.target in ("size", "dim"):
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    arithmetic = (operator.getitem, operator.floordiv, operator.mul, operator.add, operator.sub)
    return (
        node.op == "call_function" and node.target in arithmetic and all(map(_is_size, node.all_input_nodes))
    )


_ADVICE = "build it from the operations in docs/bring-your-own.md"


def _image(x: Any) -> Any:
    """Refuse anything but a result that depends on the image."""
    if not isinstance(x, _Ref):
        raise UnsoundError("it must be applied to something that depends on the image")
    return x


def _planes(x: Any) -> tuple[int, int]:
    """Height and width of results `(C, H, W)`."""
    if len(_image(x).shape) != 3:
        raise UnsoundError(f"it needs (n, C, H, W), got {('n', *x.shape)}")
    return x.shape[1], x.shape[2]


def _one(operation: Operation, x: Any, *, alias: bool = False, writes: bool = False) -> _Use:
    return _Use(operation, (_image(x),), alias, writes)


def _pair(value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise UnsoundError(f"{value!r} is no number or pair of numbers")
    return pair


def _reshape(x: Any, shape: Shape) -> _Use:
    """Rows stay rows: the runs showed the batch in front, and torch reshapes in row-major order."""
    if torch.Size(shape).numel() != torch.Size(_image(x).shape).numel():
        raise UnsoundError("it changes how many numbers belong to an image; keep dimension 0 as it is")
    function = lambda v: v.reshape(len(v), *shape)  # noqa: E731
    return _one(ops.one_lipschitz(f"reshape to {shape}", function, "isometry"), x, alias=True)


def _identity(x: Any, *settings: Any, **more: Any) -> _Use:
    return _one(ops.one_lipschitz("identity", ops.unchanged, "isometry"), x, alias=True)


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> _Use:
    if training is not False:
        raise UnsoundError("dropout with training=True is random; pass training=self.training")
    return _identity(x)


def _relu(x: Any, inplace: bool = False) -> _Use:
    return _one(ops.one_lipschitz("ReLU", torch.relu), x, writes=inplace)


def _leaky_relu(x: Any, negative_slope: float = 0.01, inplace: bool = False) -> _Use:
    return _one(ops.leaky_relu(float(negative_slope)), x, writes=inplace)


def _abs(x: Any) -> _Use:
    return _one(ops.one_lipschitz("Abs", torch.abs), x)


def _tanh(x: Any) -> _Use:
    return _one(ops.saturating("Tanh", torch.tanh, 1.0), x)


def _sigmoid(x: Any) -> _Use:
    return _one(ops.saturating("Sigmoid", torch.sigmoid, 0.25), x)


def _sort(module: nn.Module, x: Any) -> _Use:
    return _one(ops.one_lipschitz(repr(module), module), x)


def _linear(x: Any, weight: Tensor, bias: Tensor | None = None) -> _Use:
    return _one(ops.linear(weight, bias), x)


def _conv2d(
    x: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> _Use:
    pad = padding if isinstance(padding, str) else _pair(padding)
    size = _planes(x)
    step = ops.convolution(weight, bias, size, _pair(stride), pad, _pair(dilation), groups, padding_mode)
    return _one(step, x)


def _conv2d_module(module: Any, x: Any) -> _Use:
    m = module
    return _conv2d(x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)


def _batch_norm(module: Any, x: Any) -> _Use:
    if module.running_mean is None:
        raise UnsoundError(
            "batch norm without stored statistics mixes the images of a batch; set track_running_stats"
        )
    if module.training:
        raise UnsoundError("batch norm in train mode mixes the images of a batch; call .eval() first")
    dim = len(_image(x).shape) + 1
    m = module
    return _one(ops.batch_norm(m.running_mean, m.running_var, m.weight, m.bias, m.eps, dim), x)


def _max_pool2d(
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> _Use:
    if return_indices:
        raise UnsoundError("return_indices=True gives no activations; leave it out")
    kernel = _pair(kernel_size)
    strides = kernel if stride is None else _pair(stride)
    size = _planes(x)
    return _one(ops.max_pooling(size, kernel, strides, _pair(padding), _pair(dilation), ceil_mode), x)


def _avg_pool2d(
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> _Use:
    kernel = _pair(kernel_size)
    strides = kernel if stride is None else _pair(stride)
    size = _planes(x)
    step = ops.average_pooling(
        size, kernel, strides, _pair(padding), ceil_mode, count_include_pad, divisor_override
    )
    return _one(step, x)


def _lp_pool2d(
    x: Any, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
) -> _Use:
    if norm_type != 2 or ceil_mode:
        raise UnsoundError(
            f"LPPool2d is understood for norm_type 2 without ceil_mode, got {norm_type}, {ceil_mode}"
        )
    kernel = _pair(kernel_size)
    return _one(ops.l2_pooling(_planes(x), kernel, kernel if stride is None else _pair(stride)), x)


def _adaptive_avg_pool2d(x: Any, output_size: Any) -> _Use:
    if output_size not in (1, (1, 1), [1, 1]):
        raise UnsoundError(
            f"AdaptiveAvgPool2d is understood for output_size 1, got {output_size}; use AvgPool2d"
        )
    return _one(ops.global_average_pooling(_planes(x)), x)


def _pixel_unshuffle(x: Any, downscale_factor: int) -> _Use:
    _planes(x)
    function = lambda v: functional.pixel_unshuffle(v, downscale_factor)  # noqa: E731
    return _one(ops.one_lipschitz(f"PixelUnshuffle({downscale_factor})", function, "isometry"), x)


def _add(x: Any, y: Any) -> _Use:
    if isinstance(x, _Ref) and isinstance(y, _Ref):
        return _branches(ops.Sum("sum", 1), x, y)
    return _shifted(x, y, 1) if isinstance(x, _Ref) else _shifted(y, x, 1)


def _subtract(x: Any, y: Any) -> _Use:
    if isinstance(x, _Ref) and isinstance(y, _Ref):
        return _branches(ops.Sum("difference", -1), x, y)
    if isinstance(x, _Ref):
        return _shifted(x, y, -1)
    return _one(ops.shift(_checked(y, x), 1, mirror=True), y)


def _multiply(x: Any, y: Any) -> _Use:
    if isinstance(x, _Ref) and isinstance(y, _Ref):
        raise UnsoundError("a product of two activations has no Lipschitz constant; multiply by constants")
    result, constant = (x, y) if isinstance(x, _Ref) else (y, x)
    return _one(ops.scale(_checked(result, constant)), result)


def _divide(x: Any, y: Any) -> _Use:
    if isinstance(y, _Ref):
        raise UnsoundError("a division by an activation has no Lipschitz constant; divide by constants")
    return _one(ops.scale(_checked(x, y), divide=True), x)


def _negate(x: Any) -> _Use:
    return _one(ops.one_lipschitz("negation", torch.neg, "isometry"), x)


def _cat(tensors: Sequence[Any], dim: int = 0) -> _Use:
    parts = tuple(_image(part) for part in tensors)
    axis = dim + len(parts[0].shape) + 1 if dim < 0 else dim
    if axis == 0:
        raise UnsoundError("a concatenation along dimension 0 mixes the images; join along another one")
    return _Use(ops.Concatenation(f"concatenation along {axis}", axis), parts)


def _branches(operation: Operation, x: _Ref, y: _Ref) -> _Use:
    if x.shape != y.shape:
        raise UnsoundError(
            f"branches of different shape, {x.shape} and {y.shape}, would be broadcast; expand none"
        )
    return _Use(operation, (x, y))


def _shifted(x: Any, constant: Any, sign: int) -> _Use:
    return _one(ops.shift(_checked(x, constant), sign), x)


def _checked(x: Any, constant: Any) -> Any:
    """Refuse constants that are no numbers or real tensors, or would enlarge a result."""
    if isinstance(constant, Tensor) and not constant.is_complex():
        full = (1, *_image(x).shape)
        try:
            same = torch.broadcast_shapes(constant.shape, full) == full
        except RuntimeError:
            same = False
        if not same:
            raise UnsoundError(
                f"a constant of shape {tuple(constant.shape)} does not fit one image's {x.shape}"
            )
        return constant
    if isinstance(constant, bool) or not isinstance(constant, int | float):
        raise UnsoundError(f"its constant is a {type(constant).__name__}; use a number or a stored tensor")
    return constant


def _writing(handler: Callable[..., _Use]) -> Callable[..., _Use]:
    """The in-place form of a handler."""

    def handle(x: Any, *args: Any) -> _Use:
        use = handler(x, *args)
        return _Use(use.operation, use.inputs, writes=True)

    return handle


_MODULES: dict[type[nn.Module], Callable[..., _Use]] = {
    nn.Linear: lambda m, x: _linear(x, m.weight, m.bias),
    nn.Conv2d: _conv2d_module,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: lambda m, x: _relu(x, m.inplace),
    nn.LeakyReLU: lambda m, x: _leaky_relu(x, m.negative_slope, m.inplace),
    nn.Tanh: lambda m, x: _tanh(x),
    nn.Sigmoid: lambda m, x: _sigmoid(x),
    nn.Identity: lambda m, x: _identity(x),
    nn.Dropout: lambda m, x: _dropout(x, m.p, m.training),
    nn.Dropout2d: lambda m, x: _dropout(x, m.p, m.training),
    nn.MaxPool2d: lambda m, x: _max_pool2d(
        x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AvgPool2d: lambda m, x: _avg_pool2d(
        x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.LPPool2d: lambda m, x: _lp_pool2d(x, m.norm_type, m.kernel_size, m.stride, m.ceil_mode),
    nn.AdaptiveAvgPool2d: lambda m, x: _adaptive_avg_pool2d(x, m.output_size),
    nn.PixelUnshuffle: lambda m, x: _pixel_unshuffle(x, m.downscale_factor),
    MaxMin: _sort,
    GroupSort: _sort,
    MaxMinReLU: _sort,
}

_FUNCTIONS: dict[Any, Callable[..., _Use]] = {
    functional.linear: _linear,
    functional.conv2d: _conv2d,
    torch.conv2d: _conv2d,
    functional.relu: _relu,
    torch.relu: _relu,
    "relu": _relu,
    "relu_": _writing(_relu),
    functional.leaky_relu: _leaky_relu,
    torch.abs: _abs,
    operator.abs: _abs,
    "abs": _abs,
    torch.tanh: _tanh,
    functional.tanh: _tanh,
    "tanh": _tanh,
    torch.sigmoid: _sigmoid,
    functional.sigmoid: _sigmoid,
    "sigmoid": _sigmoid,
    functional.dropout: _dropout,
    functional.dropout2d: _dropout,
    functional.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    functional.avg_pool2d: _avg_pool2d,
    functional.lp_pool2d: _lp_pool2d,
    functional.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    functional.pixel_unshuffle: _pixel_unshuffle,
    torch.pixel_unshuffle: _pixel_unshuffle,
    torch.cat: _cat,
    torch.concat: _cat,
    operator.neg: _negate,
    torch.neg: _negate,
    "neg": _negate,
    "contiguous": _identity,
    **dict.fromkeys((operator.add, torch.add, "add"), _add),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _subtract),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), _multiply),
    **dict.fromkeys((operator.truediv, torch.div, "div"), _divide),
    **dict.fromkeys((operator.iadd, "add_"), _writing(_add)),
    **dict.fromkeys((operator.isub, "sub_"), _writing(_subtract)),
    **dict.fromkeys((operator.imul, "mul_"), _writing(_multiply)),
    **dict.fromkeys((operator.itruediv, "div_"), _writing(_divide)),
}

_RESHAPES: frozenset[Any] = frozenset(
    (nn.Flatten, nn.Unflatten, torch.flatten, torch.reshape, "flatten", "unflatten", "view", "reshape")
)

_MOVES: frozenset[Any] = _RESHAPES | {
    operator.getitem,
    torch.unsqueeze,
    torch.squeeze,
    "unsqueeze",
    "squeeze",
}
"""What may be done with stored tensors: it moves numbers and computes none."""

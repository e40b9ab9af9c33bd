"""What a training would take: memory, communication and time of a step, before a GPU is rented.

Nothing is computed. The very network, loss and backward pass of the training run on tensors without content (PyTorch's fake
tensors), under a meter that reads the shapes: products, bytes moved, bytes alive. The optimisers are metered on small real
matrices, and scaled. Only rates of devices are from tables, and the share of them that is reached is an assumption.
"""

import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lipnext import systems
from lipnext.core.errors import ConfigError, nearest
from lipnext.core.experiment import Experiment, TrainSpec
from lipnext.core.network import LipschitzNetwork
from lipnext.core.world import World
from lipnext.data.dataset import load as load_data
from lipnext.nn.reversible import Reversible
from lipnext.optim.groups import split_parameters
from lipnext.optim.orthogonal import MAX_STACK, MAX_STACK_ELSEWHERE
from lipnext.optim.owner import SMALL, Owners
from lipnext.optim.sharding import find_shardable
from lipnext.training.activations import stored_activations
from lipnext.training.loop import make_euclidean_optimizer, make_orthogonal_optimizer
from lipnext.training.objective import Objective

MODES = ("keep", "checkpoint", "reverse")


@dataclass(frozen=True)
class Device:
    """Rates of one device: products in flop/s by dtype, memory and links in bytes/s."""

    flops: dict[torch.dtype, float]
    bandwidth: float
    memory: float
    link: float
    """To the other devices of its machine, one way."""
    network: float
    """To other machines, one way."""
    machine: int
    """Devices in a machine."""
    efficiency: float
    """Share of the product rate and the bandwidth that is assumed to be reached."""


def _gpu(half: float, single: float, double: float, bandwidth: float, memory: int, link: float) -> Device:
    rates = {torch.bfloat16: half, torch.float32: single, torch.float64: double}
    return Device(rates, bandwidth, memory * 1e9, link, 50e9, 8, 0.6)


DEVICES: dict[str, Device] = {
    "h100": _gpu(989e12, 67e12, 67e12, 3.35e12, 80, 450e9),
    "h200": _gpu(989e12, 67e12, 67e12, 4.8e12, 141, 450e9),
    "a100": _gpu(312e12, 19.5e12, 19.5e12, 2.039e12, 80, 300e9),
}
"""As published by NVIDIA for the SXM variants (dense, float32 without TF32); the network is one 400 Gbit/s port a GPU."""

DATA: dict[str, tuple[tuple[int, int, int], int, int]] = {
    "tiny-imagenet": ((3, 64, 64), 200, 100_000),
    "imagenet": ((3, 224, 224), 1000, 1_281_167),
    "cifar100": ((3, 32, 32), 100, 50_000),
    "cifar10": ((3, 32, 32), 10, 50_000),
    "fashion-mnist": ((1, 28, 28), 10, 60_000),
    "digits": ((1, 8, 8), 10, 1_437),
}
"""Shape, classes and training images of the data sets that presets are named after."""


class Meter(TorchDispatchMode):
    """Reads what passes: products, bytes moved, and the bytes of tensors made since it was entered and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[torch.dtype, int, int]] = []
        """Of each operation that is no view: dtype, flops of products, bytes read and written."""
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    @property
    def flops(self) -> int:
        """Of all products, two for a multiplication with its addition."""
        return sum(flops for _, flops, _ in self.operations)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in results:
            if _address(tensor) not in inputs | self._seen:
                self._born(tensor)
        if results and not func.is_view:
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            moved = sum(
                t.numel() * t.element_size()
                for t in tree_leaves((args, kwargs, out))
                if isinstance(t, Tensor)
            )
            self.operations.append((results[0].dtype, int(flops), moved))
        return out

    def _born(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = _address(tensor), storage.nbytes()
        self._seen.add(address)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def died() -> None:
            self._seen.discard(address)
            self.alive -= size

        weakref.finalize(storage, died)

    def seconds(self, device: Device) -> float:
        """A roofline: each operation takes as long as its products or its bytes, whichever is longer."""
        return (
            sum(
                max(flops / device.flops.get(dtype, device.bandwidth), moved / device.bandwidth)
                for dtype, flops, moved in self.operations
            )
            / device.efficiency
        )


def plan(
    experiment: Experiment, *, gpus: int = 1, gpu: str = "h100", data: str | None = None
) -> dict[str, Any]:
    """Plan a training with owner-sharded optimisers on equal devices.

    Args:
        experiment: resolved or not; precision "auto" is taken for bfloat16.
        gpus: number of devices, each with one process.
        gpu: one of `DEVICES`, or "cpu", whose rates are measured here.
        data: folder with the data set, where the experiment is not named after a known one.

    Returns:
        parameters, sizes in bytes for each rank, flops, seconds of a step and of an epoch, and for those of `MODES` that apply
        what `train.activations` would change. Estimates, all of them.

    Raises:
        ConfigError: one line, for a device, a number or a data set that cannot be planned for.
    """
    if gpu not in DEVICES and gpu != "cpu":
        raise ConfigError(f"--gpu: unknown device '{gpu}'; {nearest(gpu, [*DEVICES, 'cpu'])}")
    spec = experiment.train
    if not 1 <= gpus * spec.accumulate <= spec.batch_size:
        raise ConfigError(
            f"--gpus: a batch of {spec.batch_size} images cannot be cut into {gpus} x {spec.accumulate} parts (gpus x "
            "train.accumulate); take from 1 to as many as there are images, or a larger train.batch_size"
        )
    shape, classes, count = _data_set(experiment, data)
    images = -(-spec.batch_size // (gpus * spec.accumulate))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if spec.precision == "float64" else torch.float32)
    try:
        with FakeTensorMode():
            network = systems.build_network(experiment, shape, classes)
            modes = {mode: _metered(network, experiment, images, mode) for mode in _modes(network, spec)}
            names = list(Owners(network, World(0, gpus)).held)
            orthogonal, euclidean = split_parameters(network)
            shardable = find_shardable(network, SMALL) if spec.shard and gpus > 1 else []
        matrices = [orthogonal[name] for name in names if name in orthogonal]
        others = sum(euclidean[name].numel() for name in names if name in euclidean)
        step, state, workspace = _optimiser(matrices, experiment, gpu)
        rest = _euclidean_state(experiment) * others
    finally:
        torch.set_default_dtype(default)

    size = next(network.parameters()).element_size()
    parameters = sum(p.numel() for p in network.parameters())
    owned = sum(p.numel() for p in matrices) + others
    sizes = {name: network.get_parameter(name).numel() * size for name in shardable}
    # rows are kept of the sharded ones, and all of those that are owned; while layers compute, two of them are whole
    elsewhere = sum(sizes.values()) * (gpus - 1) // gpus
    twice = sum(sizes.get(name, 0) for name in names)
    in_flight = 2 * max((_of_layer(name, sizes) for name in sizes), default=0)
    fixed = {
        "weights": parameters * size
        - elsewhere
        + twice
        + in_flight
        + sum(b.numel() * b.element_size() for b in network.buffers()),
        "moments": round(state + rest) * size,
        "average": owned * size if spec.ema else 0,
    }
    device = _this_cpu(network, modes["keep"][0]) if gpu == "cpu" else DEVICES[gpu]
    link = device.link if gpus <= device.machine else device.network
    sent = parameters * size if gpus > 1 else 0
    # sharded, weights travel before both passes and gradients behind the second; then rows to their owner and back
    hidden, open_ = (3 * sent, 2 * sent // gpus) if shardable else (sent, sent)
    manifold = _manifold_step(matrices, experiment) if gpu == "cpu" else step.seconds(device)
    steps = max(1, int(count * (1 - experiment.data.validation)) // spec.batch_size)
    rows = {}
    for mode, (meter, stored) in modes.items():
        passes = meter.seconds(device) * spec.accumulate
        # gradients travel during the backward pass, two thirds of the time; weights after the step
        waiting = max(0.0, hidden / link - passes * (1 if shardable else 2 / 3)) + open_ / link
        seconds = passes + manifold + waiting
        gradients = parameters * size - elsewhere + twice
        memory = sum(fixed.values()) + max(meter.peak - elsewhere + twice + in_flight, gradients + workspace)
        rows[mode] = {
            "activations": stored,
            "memory": memory,
            "fits": memory <= device.memory,
            "flops": meter.flops * spec.accumulate,
            "seconds": {"passes": passes, "manifold": manifold, "waiting": waiting, "step": seconds},
            "epoch_hours": seconds * steps / 3600,
            "epoch_device_hours": seconds * steps / 3600 * gpus,
        }
    return {
        "system": experiment.system,
        "preset": experiment.preset,
        "device": gpu,
        "devices": gpus,
        "efficiency_assumed": device.efficiency,
        "device_memory": device.memory,
        "parameters": parameters,
        "images_per_pass": images,
        "flops_per_image": modes["keep"][0].flops / images,
        "bytes": fixed | {"gradients": parameters * size - elsewhere + twice},
        "sent_per_step": hidden + open_,
        "seconds_sending": (hidden + open_) / link,
        "manifold_flops": step.flops,
        "activations": rows,
    }


def _data_set(experiment: Experiment, data: str | None) -> tuple[tuple[int, int, int], int, int]:
    if data is not None or experiment.data.path is not None:
        training = load_data(experiment.data).train
        return training.shape, len(training.classes), len(training)
    for name, found in DATA.items():
        if (experiment.preset or "").startswith(name):
            return found
    if experiment.data.name == "digits":
        return DATA["digits"]
    raise ConfigError(
        f"plan: the data set of '{experiment.preset or experiment.system}' is not known; name its folder with --data"
    )


def _modes(network: LipschitzNetwork, spec: TrainSpec) -> tuple[str, ...]:
    if not any(isinstance(layer, Reversible) for layer in network.body):
        return ("keep",)
    return tuple(mode for mode in MODES if not (spec.shard and mode == "reverse"))


def _of_layer(name: str, sizes: dict[str, int]) -> int:
    """Bytes of the sharded parameters of a parameter's layer."""
    layer = name.rpartition(".")[0]
    return sum(size for other, size in sizes.items() if other.rpartition(".")[0] == layer)


def _metered(network: LipschitzNetwork, experiment: Experiment, images: int, mode: str) -> tuple[Meter, int]:
    """Forward and backward pass of one part of a batch; and the bytes that wait for the backward pass."""
    network.zero_grad(set_to_none=True)
    objective = Objective(experiment.loss, systems.get(experiment.system).losses)
    x = torch.rand(images, *network.input_shape)
    y = torch.zeros(images, dtype=torch.int64)
    half = experiment.train.precision in ("bfloat16", "auto")
    spec = experiment.train.model_copy(update={"activations": mode})
    with Meter() as meter, stored_activations(network.train(), spec):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
        loss = objective.of(network, x, y, 0.5, autocast)
        stored = meter.alive
        loss.backward()
    network.zero_grad(set_to_none=True)
    return meter, stored


SAMPLE = 64
"""Side of the small matrices on which the optimiser is metered."""


def _optimiser(matrices: list[nn.Parameter], experiment: Experiment, device: str) -> tuple[Meter, float, int]:
    """A step on all matrices: products as the cube of a side, everything else as its square."""
    scaled, state, workspace = Meter(), 0.0, 0
    for side in sorted({p.shape[-1] for p in matrices}):
        entries = sum(p.numel() for p in matrices if p.shape[-1] == side)
        sample = nn.Parameter(torch.eye(SAMPLE))
        optimizer = make_orthogonal_optimizer([sample], experiment)
        rng = torch.Generator().manual_seed(0)
        for _ in range(2):
            # small, so that Adam's exponential is as short as it is once the training runs
            sample.grad = 1e-3 * torch.randn(SAMPLE, SAMPLE, generator=rng)
            with Meter() as meter:
                optimizer.step()
        area = entries / SAMPLE**2
        scaled.operations += [
            (dtype, int(flops * area * side / SAMPLE), int(moved * area))
            for dtype, flops, moved in meter.operations
        ]
        tensors = [value for value in optimizer.state[sample].values() if isinstance(value, Tensor)]
        state += entries * sum(t.numel() for t in tensors if t.dim() > 1) / SAMPLE**2
        stacked = min(entries, max(MAX_STACK.get(device, MAX_STACK_ELSEWHERE), side * side))
        workspace = max(workspace, int(meter.peak * stacked / SAMPLE**2))
    return scaled, state, workspace


def _euclidean_state(experiment: Experiment) -> float:
    """Entries of state for each entry of a parameter."""
    sample = nn.Parameter(torch.zeros(SAMPLE))
    optimizer = make_euclidean_optimizer([sample], experiment.optim)
    sample.grad = torch.ones(SAMPLE)
    optimizer.step()
    tensors = [value for value in optimizer.state[sample].values() if isinstance(value, Tensor)]
    kept = sum(t.numel() for t in tensors if t.dim() > 0) / SAMPLE
    return kept + (1 if experiment.optim.lookahead else 0)


MOST_ROWS = 2**16
"""Of the product whose rate is measured; longer ones are no faster."""


def _this_cpu(network: LipschitzNetwork, meter: Meter) -> Device:
    """Rates of this machine, measured as a step meets them.

    Products: the three that a layer needs (forward, gradient of the input, gradient of the weight) on the network's largest
    shape, together. Bandwidth: an operation that makes new activations of that shape, more of them than a cache holds.
    """
    side = max((p.shape[-1] for p in split_parameters(network)[0].values()), default=256)
    largest = max((flops for _, flops, _ in meter.operations), default=0)
    rows = min(max(largest // (2 * side * side), side), MOST_ROWS)
    rates = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x, w = torch.randn(rows, side).to(dtype), torch.randn(side, side).to(dtype)
        seconds = _fastest(lambda x=x, w=w: (x @ w.T, x @ w, x.T @ x))  # type: ignore[misc]
        rates[dtype] = 3 * 2 * rows * side * side / seconds
    source = torch.zeros(2**24)
    activations = source.split(rows * side)
    bandwidth = 2 * source.nbytes / _fastest(lambda: [activation + 1 for activation in activations])
    return Device(rates, bandwidth, _machine_memory(), bandwidth, bandwidth, 1, 1.0)


def _manifold_step(matrices: list[nn.Parameter], experiment: Experiment) -> float:
    """Seconds of the orthogonal optimiser's step on this machine, from one stack of each size."""
    seconds = 0.0
    for side in sorted({p.shape[-1] for p in matrices}):
        alike = [p for p in matrices if p.shape[-1] == side]
        entries = sum(p.numel() for p in alike)
        stacked = [nn.Parameter(torch.eye(side, dtype=alike[0].dtype)) for _ in range(_stack(side, entries))]
        rng = torch.Generator().manual_seed(0)
        for p in stacked:
            p.grad = 1e-3 * torch.randn(side, side, generator=rng, dtype=p.dtype)
        optimizer = make_orthogonal_optimizer(stacked, experiment)
        optimizer.step()  # makes the state
        seconds += _fastest(optimizer.step, 3) * entries / (len(stacked) * side * side)
    return seconds


def _stack(side: int, entries: int) -> int:
    """Matrices that the optimiser steps together on a CPU."""
    return max(1, min(entries, MAX_STACK["cpu"]) // (side * side))


CLOCK: Callable[[], float] = time.perf_counter
"""By which this machine is measured."""


def _fastest(action: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = CLOCK()
        action()
        times.append(CLOCK() - start)
    return min(times)


def _machine_memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return float("inf")


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

"""Export: the network as an ONNX graph, a `torch.export` program or a safetensors file, with the manifest inside.

What is exported is the materialised network of the bundle, weights unchanged: in float64 they are widened, which is exact. A
program is read back, run on random images and compared with the float64 network before its file appears under its name.
"""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lipnext.core.classifier import Classifier
from lipnext.core.errors import BundleError, ConfigError, UnsoundError, nearest
from lipnext.core.files import atomic_write
from lipnext.core.network import LipschitzNetwork
from lipnext.deployment.bundle import WEIGHTS
from lipnext.deployment.manifest import KEY, make_manifest, margin_error
from lipnext.deployment.products import PRODUCTS

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
CHECKED = 64
"""Random images on which a program is compared."""
# A float32 program that is further off than this share of the largest margin is another function, whatever its bound allows.
_LARGEST_DIFFERENCE = 1e-3
_LARGEST_ONNX = 2**31

Run = Callable[[Tensor], Tensor]


def export(model: Classifier, folder: Path, to: str, out: Path, dtype: str = "float64") -> dict[str, Any]:
    """Write one file, and for programs the manifest beside it as `OUT.json`.

    Args:
        model: loaded from `folder`.
        folder: the bundle.
        to: a key of `SUFFIXES`.
        out: the file; its name ends accordingly.
        dtype: in which the program computes, a key of `DTYPES`; a safetensors file holds the weights as stored, float32.

    Returns:
        file, to, arithmetic, bytes, model_sha256; for programs `checked` images and the largest `difference` of a margin
        that was seen, with the largest one `allowed`.

    Raises:
        ConfigError: if an argument is not allowed or the extra "onnx" is missing.
        UnsoundError: if no bound is proved for the program, or it computes something else than the network.
    """
    check_target(to, out, dtype)
    if out.resolve() == (folder / WEIGHTS).resolve():
        raise ConfigError(f"{out} is the bundle's own file, which must stay as it is; choose another --out")
    manifest = make_manifest(model, folder, dtype)
    text = json.dumps(manifest, allow_nan=False)
    report = {"file": str(out), "to": to, "arithmetic": dtype, "model_sha256": manifest["model_sha256"]}
    if to == "safetensors":
        data = _safetensors(folder, text)
    else:
        network = cast(LipschitzNetwork, model.net)  # `make_manifest` refuses every other
        if to == "onnx":
            _check_onnx(network, DTYPES[dtype])
        program = _trace(plain(network, DTYPES[dtype]), model.input_shape)
        data, run = _onnx(program, text) if to == "onnx" else _torch(program, text)
        report |= compare(run, copy.deepcopy(network).cpu().double(), DTYPES[dtype], margin_error(manifest))
        with atomic_write(f"{out}.json") as file:
            file.write(text + "\n")
    with atomic_write(out, "wb") as file:
        file.write(data)
    return report | {"bytes": len(data)}


def check_target(to: str, out: Path, dtype: str) -> None:
    """Refuse what needs no model to be refused.

    Raises:
        ConfigError: for an unknown target or dtype, a name with another ending, or a folder that does not exist.
    """
    if to not in SUFFIXES:
        raise ConfigError(f"cannot export to '{to}'; {nearest(to, SUFFIXES)}")
    if dtype not in DTYPES:
        raise ConfigError(f"cannot export in '{dtype}'; {nearest(dtype, DTYPES)}")
    if out.suffix != SUFFIXES[to]:
        raise ConfigError(f"a file for {to} must end in {SUFFIXES[to]}, got '{out}'")
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"the folder {out.resolve().parent} does not exist; create it first")


def plain(network: LipschitzNetwork, dtype: torch.dtype) -> nn.Module:
    """Return the network as a chain of plain operations in a dtype, in evaluation mode, with the same weights.

    Raises:
        UnsoundError: if one of its layers is unknown.
    """
    frozen = network.materialise().cpu().to(dtype)
    layers = [layer.unfused() for _, layer in frozen.named_layers()]
    return nn.Sequential(*layers, frozen.head.unfused()).eval().requires_grad_(False)


@torch.no_grad()
def compare(run: Run, network: LipschitzNetwork, dtype: torch.dtype, bound: Tensor) -> dict[str, Any]:
    """Compare the margins of a program on random images with those of the float64 network.

    Args:
        run: images (n, C, H, W) of the dtype to logits (n, k).
        network: in float64.
        dtype: in which the program computes.
        bound: on the error of its margins, float64 (k, k).

    Raises:
        UnsoundError: if a margin differs by more than both errors together allow.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(CHECKED, *network.input_shape, generator=generator, dtype=dtype)
    # Other batches than the one it was traced with: the batch must be free.
    parts = [run(part).double() for part in (images[:1], images[1:4], images[4:])]
    logits, expected = torch.cat(parts), network(images.double())
    if logits.shape != expected.shape or not bool(torch.isfinite(logits).all()):
        raise UnsoundError(
            f"the exported program returns {tuple(logits.shape)} or numbers that are not finite, the network "
            f"{tuple(expected.shape)}; nothing was written"
        )
    difference = (_margins(logits) - _margins(expected)).abs().amax(0)
    allowed = (2 * bound).clamp(max=_LARGEST_DIFFERENCE * float(_margins(expected).abs().max()))
    if bool((difference > allowed).any()):
        raise UnsoundError(
            f"the exported program is not the network: a margin differs by {difference.max():.3g}, "
            f"at most {allowed.max():.3g} can be rounding; nothing was written"
        )
    return {"checked": CHECKED, "difference": difference.max().item(), "allowed": allowed.max().item()}


def _margins(logits: Tensor) -> Tensor:
    return logits[:, :, None] - logits[:, None, :]


def _safetensors(folder: Path, manifest: str) -> bytes:
    """The weights as they are stored, with the manifest in the header."""
    from safetensors.torch import load, save

    weights = load((folder / WEIGHTS).read_bytes())
    data = save(weights, metadata={"format": "pt", KEY: manifest})
    again = load(data)
    if again.keys() != weights.keys() or any(not torch.equal(again[name], weights[name]) for name in weights):
        raise BundleError(f"{folder / WEIGHTS} does not survive being written; copy the bundle again")
    return data


def _trace(program: nn.Module, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """Trace for batches of any size."""
    image = torch.full((2, *shape), 0.5, dtype=next(program.parameters()).dtype)
    traced = torch.export.export(
        program, (image,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    for part in traced.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it names folders of this machine
    return traced


def _torch(program: torch.export.ExportedProgram, manifest: str) -> tuple[bytes, Run]:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={KEY: manifest})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def _onnx(program: torch.export.ExportedProgram, manifest: str) -> tuple[bytes, Run]:
    import onnx
    import onnxruntime

    with _quiet():
        if any(tensor.dtype == torch.float64 for tensor in program.state_dict.values()):
            program = program.run_decompositions(PRODUCTS)
        try:
            exported = torch.onnx.export(
                program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ConfigError(
                f"the network cannot be written as ONNX: {_first_line(error.__cause__ or error)}; export to torch instead"
            ) from error
    assert exported is not None
    model = exported.model_proto
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    del graph.value_info[:]
    for value in (graph.input[0], graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.helper.set_model_props(model, {KEY: manifest})
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors have no common base
        raise ConfigError(
            f"onnxruntime cannot run this graph: {_first_line(error)}; take another --dtype or export to torch"
        ) from error
    return data, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says about packages and functions that are not ours to mend."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_onnx(network: nn.Module, dtype: torch.dtype) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'export to onnx needs {name}; install it with: pip install "lipnext[onnx]"')
    size = sum(p.numel() for p in network.parameters()) * dtype.itemsize
    if size >= _LARGEST_ONNX:
        raise ConfigError(
            f"an ONNX file holds at most 2 GiB and the weights take {size / 2**30:.1f}; export to torch instead"
        )

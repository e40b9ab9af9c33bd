"""Certificates for a network of one's own, in real arithmetic or for the program that is deployed.

For logits `z = W g + w` of features `g`, `rho_ij = ||w_i - w_j||` and the state `K, c, a, b` of the features (see
`lipnext.certificates.operations`), every logit k is computed with an error of at most

    centre     gamma_m(2^-53) V_k                                   V_k = |w_k| |g| + |bias_k|
    executed   gamma_m(u) (V_k + ||w_k|| (c + a + (K + b) r))        beyond w_k times the features' error

so that the margin of label i over j, `m_ij` at the centre, stays positive everywhere in the ball as long as

    real       r < (m_ij - E_c) / (K rho_ij)                E_c = rho_ij c + both logits' centre errors
    deployed   r < (m_ij - E_c - E_a) / (K rho_ij + E_b)    E_a + E_b r = rho_ij (a + b r) + both logits' executed errors

The radius is the smallest of these over all rivals j, rounded down. Where the last operation is no matrix, `rho = sqrt(2)`
and the state of the logits themselves take their places.
"""

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lipnext.certificates.dense import find_tail
from lipnext.certificates.graph import Graph, trace
from lipnext.certificates.margin import head_distances
from lipnext.certificates.operations import ARITHMETIC, CENTRE, SAFE, Linear, State, norms_up, start
from lipnext.core.bound import PROOFS, LipschitzBound
from lipnext.core.certificate import Certificate, Semantics
from lipnext.core.eps import round_down, round_up
from lipnext.core.errors import ConfigError, UnsoundError
from lipnext.core.files import sha256_tensors
from lipnext.core.guard import check_certifiable, check_images
from lipnext.core.rounding import gamma, sqrt_up


def certify_module(
    net: nn.Module,
    input_shape: tuple[int, int, int],
    classes: tuple[str, ...] | int,
    *,
    semantics: Semantics = "real",
    dtype: torch.dtype = torch.float64,
) -> "CertifiedModule":
    """Prove the bounds of any network made of understood operations; `certify(images)` of the result gives radii.

    Args:
        net: in evaluation mode, float32 or float64 weights, from images `(n, C, H, W)` in [0, 1] to logits `(n, K)`. It
            is copied, and may change afterwards.
        input_shape: (C, H, W).
        classes: names of the K >= 2 classes, or their number.
        semantics: "real" speaks of the network in real arithmetic with the stored weights. "deployed" speaks of the
            program `net.to(dtype)`, applied to images in `dtype`: its label is the same at every point of the ball that
            is representable in `dtype`, for any order of summation.
        dtype: of the deployed program: float64, float32 or float16, in which all stored weights must be exact.

    Raises:
        UnsoundError: naming the module that is not understood and what to do, or the setting of the environment that
            breaks the error bounds.
        ConfigError: for a semantics or dtype that does not exist, or classes that do not fit the logits.
    """
    names = tuple(str(k) for k in range(classes)) if isinstance(classes, int) else tuple(classes)
    frozen = copy.deepcopy(net)
    certifier = ModuleCertifier(frozen, input_shape, semantics=semantics, dtype=dtype)
    if certifier.classes != len(names) or len(set(names)) != len(names):
        raise ConfigError(
            f"the network gives {certifier.classes} logits; classes must be as many different names, got {classes!r}"
        )
    return CertifiedModule(frozen, certifier, names)


class CertifiedModule:
    """A network with its certifier; made by `certify_module`.

    Attributes:
        net: the copy that the certificates speak of; not to be changed.
        certifier: holds the proved bounds.
        classes: names of the classes.
    """

    def __init__(self, net: nn.Module, certifier: "ModuleCertifier", classes: tuple[str, ...]) -> None:
        self.net = net
        self.certifier = certifier
        self.classes = classes

    @torch.no_grad()
    def certify(
        self, images: Tensor, batch_size: int = 256, progress: Callable[[int], None] | None = None
    ) -> Certificate:
        """Return labels with proved radii.

        Args:
            images: float32 or float64 (n, C, H, W) in [0, 1], n >= 0.
            batch_size: images that are evaluated together; decides the memory, never the proof.
            progress: called after each batch with the number of images in it.

        Raises:
            DataError: where the images are not of that form.
            UnsoundError: where the environment breaks the error bounds.
            ConfigError: where the batch size is below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        check_images(images, self.certifier.input_shape)
        check_certifiable(self.net)
        device = next((t.device for t in (*self.net.parameters(), *self.net.buffers())), images.device)
        parts = []
        for first in range(0, max(len(images), 1), batch_size):
            batch = images[first : first + batch_size].to(device)
            parts.append(self.certifier(batch))
            if progress is not None:
                progress(len(batch))
        return Certificate.cat(parts)


class _Precision(TorchDispatchMode):
    """Refuses results of less precision than the program's: autocast inside of forward leaves no trace in a graph."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if torch.finfo(tensor.dtype).eps > torch.finfo(self.dtype).eps:
                raise UnsoundError(
                    f"the network computes in {tensor.dtype} where {self.dtype} is certified; take autocast and "
                    "casts out of its forward"
                )
        return result


@dataclass(frozen=True)
class _Rows:
    """What the last operation tells about pairs of logits; tensors in float64."""

    distances: Tensor  # rho, (K, K), rounded up
    lipschitz: LipschitzBound  # of what the distances are multiplied by


class ModuleCertifier:
    """Certifies batches of images with a network whose operations are all understood.

    Args:
        net: as in `certify_module`; what is certified is its present state.
        input_shape: (C, H, W).
        semantics: "real" or "deployed".
        dtype: of the deployed program.

    Raises:
        UnsoundError, ConfigError: as `certify_module`.
    """

    def __init__(
        self,
        net: nn.Module,
        input_shape: tuple[int, int, int],
        *,
        semantics: Semantics = "real",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if semantics not in ("real", "deployed"):
            raise ConfigError(f"semantics must be 'real' or 'deployed', got {semantics!r}")
        if dtype not in ARITHMETIC or (semantics == "real" and dtype != torch.float64):
            allowed = (
                "float64 (real arithmetic has no dtype)"
                if semantics == "real"
                else "float64, float32 or float16"
            )
            raise ConfigError(f"dtype must be {allowed} for semantics '{semantics}', got {dtype}")
        check_certifiable(net)
        self.input_shape = input_shape
        self.semantics = semantics
        self.dtype = dtype
        tensors = dict(net.named_parameters()) | dict(net.named_buffers())
        self.model_sha256 = sha256_tensors(tensors)
        self.graph = trace(net, input_shape)
        self.graph.require()
        if (
            not self.graph.places
            or len(self.graph.places[-1].shape) != 1
            or self.graph.places[-1].shape[0] < 2
        ):
            raise UnsoundError("the network must return logits (n, K) with K >= 2; flatten its result")
        self.classes = self.graph.places[-1].shape[0]
        _check_stored(self.graph, dtype)
        self._rows = _rows(self.graph)
        self._tail = find_tail(self.graph)
        self._last_use = self._find_last_uses()
        with torch.no_grad():
            self._check_same(net)
        self._warned = False

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Certificate:
        """Certify images `(n, c, h, w)` in [0, 1], float32 or float64: labels, and radii rounded down.

        Ties, margins within the rounding error, overflow and non-finite logits get radius 0.

        Raises:
            DataError: if the images are not of that form.
        """
        check_images(images, self.input_shape)
        # Not every operation takes an empty batch.
        batch = images.double() if len(images) else images.new_zeros(1, *self.input_shape).double()
        with torch.autocast(images.device.type, enabled=False):
            states = self._follow(batch)
        logits = states[len(self.graph.places)]
        label = logits.value.argmax(dim=1)
        margins = logits.value.gather(1, label[:, None]) - logits.value
        radius, rival, slack = self._radii(states, label, margins)
        radius = torch.where(torch.isfinite(logits.value).all(dim=1) & (radius > 0), radius, 0.0)
        margin = margins.gather(1, rival[:, None]).squeeze(1)
        n = len(images)
        self._warn_if_vacuous(radius[:n], margin[:n])
        return Certificate(
            label=label[:n],
            radius=radius[:n],
            margin=torch.nan_to_num(margin[:n], posinf=0.0, neginf=0.0),
            slack=torch.nan_to_num(slack[:n], posinf=0.0),
            norm=2.0,
            kind="deterministic",
            confidence=1.0,
            semantics=self.semantics,
            arithmetic=str(self.dtype).removeprefix("torch."),
            lipschitz=self._rows.lipschitz,
            model_sha256=self.model_sha256,
        )

    def describe(self) -> dict[str, Any]:
        """Return the evidence as plain numbers, text, lists and dictionaries."""
        places = []
        for place in self.graph.places:
            assert place.operation is not None
            assert place.lipschitz is not None
            factor = getattr(place.operation, "factor", place.lipschitz)
            places.append(
                {
                    "name": place.path,
                    "operation": place.operation.label,
                    "inputs": list(place.inputs),
                    "bound": factor.value,
                    "proof": factor.proof,
                    "statement": PROOFS[factor.proof],
                    "lipschitz": place.lipschitz.value,
                }
            )
        bound = self._rows.lipschitz
        return {
            "kind": "deterministic",
            "semantics": self.semantics,
            "lipschitz": {"bound": bound.value, "proof": bound.proof},
            "layers": places,
            "head_distances": self._rows.distances.tolist(),
            "arithmetic": str(self.dtype).removeprefix("torch."),
        }

    def _follow(self, images: Tensor) -> dict[int, State]:
        """Return the states that the proof reads, by slot: 0 for the image, k + 1 for the result of place k."""
        kind = ARITHMETIC[self.dtype]
        states: dict[int, State] = {0: start(images, self.dtype)}
        for k, place in enumerate(self.graph.places):
            assert place.operation is not None
            assert place.lipschitz is not None
            inputs = [states[slot] for slot in place.inputs]
            states[k + 1] = place.operation.follow(inputs, place.lipschitz.value, kind)
            for slot in [slot for slot in states if self._last_use[slot] <= k]:
                del states[slot]
        return states

    def _find_last_uses(self) -> dict[int, float]:
        """The last place that takes the result of a slot; infinity where the proof reads it in the end."""
        end = len(self.graph.places)
        uses: dict[int, float] = dict.fromkeys(range(end + 1), -1)
        for k, place in enumerate(self.graph.places):
            uses |= dict.fromkeys(place.inputs, k)
        kept = {end, *self.graph.places[-1].inputs, *(self._tail.slots if self._tail else ())}
        return uses | dict.fromkeys(kept, math.inf)

    def _radii(
        self, states: dict[int, State], label: Tensor, margins: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return radius, closest rival and what was subtracted from its margin, each (n,)."""
        logits = states[len(self.graph.places)]
        distance = self._rows.distances.to(label.device)[label]
        drift = self._rows.lipschitz.value * distance
        centre = self._centre_errors(states, label)
        # No image in [0, 1]^n lies further away than this.
        cap = torch.full_like(logits.fixed, math.sqrt(math.prod(self.input_shape)))
        real = _smallest(margins, centre, drift, torch.zeros_like(drift), label, cap)
        if self.semantics == "real":
            return real
        kind = ARITHMETIC[self.dtype]
        cap = torch.minimum(cap, logits.limit)
        fixed, slope = self._executed_errors(states, label)
        found = _smallest(margins, (centre + fixed) * SAFE, drift, slope, label, cap)
        if self._tail is None or self.dtype == torch.float64:
            return found
        reach = torch.minimum(real[0], cap).nan_to_num(nan=0.0)
        worth = torch.where(found[0] < 0.999 * reach, reach, 0.0)
        local = (centre + self._tail.errors(states, label, worth, kind)) * SAFE
        other = _smallest(margins, local, drift, torch.zeros_like(drift), label, torch.minimum(cap, worth))
        better = other[0] > found[0]
        radius, rival, slack = (torch.where(better, b, a) for a, b in zip(found, other, strict=True))
        return radius, rival, slack

    def _centre_errors(self, states: dict[int, State], label: Tensor) -> Tensor:
        """Bound the float64 errors of the margins of `label` at the image, (n, K)."""
        last = self.graph.places[-1]
        if not isinstance(last.operation, Linear):
            logits = states[len(self.graph.places)]
            own = 2 * CENTRE.unit * logits.value.abs().amax(dim=1)
            return ((sqrt_up(2.0) * logits.centre + own) * SAFE)[:, None].expand_as(logits.value)
        features = states[last.inputs[0]]
        # Two more roundings than in a logit: those of the margin and of its size here.
        rounding = gamma(last.operation.terms + 2, CENTRE.unit)
        logit = rounding * last.operation.size(features.value) + last.operation.stray_error(CENTRE)
        distance = self._rows.distances.to(label.device)[label]
        return (distance * features.centre[:, None] + _pairs(logit, label)) * SAFE

    def _executed_errors(self, states: dict[int, State], label: Tensor) -> tuple[Tensor, Tensor]:
        """Bound the executed errors of the margins in a ball of radius r by `fixed + slope r`, each (n, K)."""
        last, kind = self.graph.places[-1], ARITHMETIC[self.dtype]
        distance = self._rows.distances.to(label.device)[label]
        if not isinstance(last.operation, Linear):
            logits = states[len(self.graph.places)]
            return distance * logits.fixed[:, None], distance * logits.slope[:, None]
        features = states[last.inputs[0]]
        row, rounding = norms_up(last.operation.rows), gamma(last.operation.terms, kind.unit)
        away = (features.centre + features.fixed)[:, None]
        logit = rounding * (last.operation.size(features.value) + row * away) + last.operation.stray_error(
            kind
        )
        growth = rounding * row * features.spread()[:, None]
        fixed = distance * features.fixed[:, None] + _pairs(logit, label)
        slope = distance * features.slope[:, None] + _pairs(growth, label)
        return fixed * SAFE, slope * SAFE

    def _check_same(self, net: nn.Module) -> None:
        """Compare with the module itself: whatever tracing has missed, such as writes through a view, shows here.

        Raises:
            UnsoundError: where the module's logits, in float64 or as deployed, lie outside of the proved error.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (4, *self.input_shape)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        device = next((t.device for t in (*net.parameters(), *net.buffers())), torch.device("cpu"))
        images = torch.cat([uniform, 3 * normal]).to(self.dtype).double().to(device)
        logits = self._follow(images)[len(self.graph.places)]
        for dtype in dict.fromkeys((torch.float64, self.dtype)):
            # Where the program may overflow its error is not bounded; such images get no radius either.
            bounded = (
                logits.limit >= 0 if dtype == self.dtype else torch.ones_like(logits.limit, dtype=torch.bool)
            )
            error = 2 * logits.centre if dtype == torch.float64 else logits.centre + logits.fixed
            program, inputs = copy.deepcopy(net).to(dtype), images.to(dtype)
            # Logits computed in less than float64 would show; a float32 bound may be too wide to tell.
            watch = nullcontext() if dtype == torch.float64 else _Precision(dtype)
            try:
                with watch:
                    ran = program(inputs).double()
            except (RuntimeError, TypeError) as problem:
                raise UnsoundError(
                    f"the network does not run in {dtype} ({str(problem).splitlines()[0][:200]}); write its forward "
                    "without a dtype of its own"
                ) from problem
            apart = norms_up(ran - logits.value)
            if not bool((apart <= error * SAFE + 1e-100)[bounded].all()):
                raise UnsoundError(
                    f"the traced network and the module give different logits in {dtype}, so that something is not "
                    "traced; look for work in place, global state and random numbers in forward"
                )

    def _warn_if_vacuous(self, radius: Tensor, margin: Tensor) -> None:
        """Say once where rounding in the deployed dtype eats all margins."""
        vacuous = len(radius) > 0 and not bool((radius > 0).any()) and bool((margin > 0).any())
        if vacuous and not self._warned and self.dtype != torch.float64:
            self._warned = True
            warnings.warn(
                f"no radius is proved: the bound on rounding errors in {self.dtype} exceeds every margin; deploy in "
                "torch.float64",
                stacklevel=3,
            )


def budget(certificate: Certificate, index: int) -> str:
    """Return one line on a sample: "margin 0.3121, float error 4.7e-8, K 1.0000021, radius 0.2206"."""
    bound = certificate.lipschitz
    constant = "" if bound is None else f"K {round_up(bound.value, 7)}, "
    return (
        f"margin {round_down(certificate.margin[index].item(), 4)}, "
        f"float error {certificate.slack[index].item():.1e}, "
        f"{constant}radius {round_down(certificate.radius[index].item(), 4)}"
    )


def _smallest(
    margins: Tensor, fixed: Tensor, drift: Tensor, slope: Tensor, label: Tensor, cap: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the least `(margin - fixed) / (drift + slope)`, rounded down, its rival, and `fixed + slope r` there."""
    # Numerator down, denominator up, quotient down; the floor is for rows that coincide.
    ratio = (margins - fixed) / ((drift + slope) * SAFE).clamp_min(1e-30) * (2 - SAFE)
    ratio = ratio.scatter(1, label[:, None], math.inf)
    radius, rival = ratio.min(dim=1)
    radius = torch.minimum(radius, cap)
    slack = (fixed + slope * radius.clamp_min(0)[:, None]) * SAFE
    return radius, rival, slack.gather(1, rival[:, None]).squeeze(1)


def _check_stored(graph: Graph, dtype: torch.dtype) -> None:
    """Refuse constants that the deployed program would round.

    Raises:
        UnsoundError: naming the place.
    """
    for place in graph.places:
        assert place.operation is not None
        try:
            place.operation.check(dtype)
            terms = getattr(place.operation, "terms", 0)
            gamma(terms, ARITHMETIC[dtype].unit)
        except UnsoundError as error:
            raise UnsoundError(f"cannot certify {place.path} in {dtype}: {error}") from error


def _pairs(logit: Tensor, label: Tensor) -> Tensor:
    """Add the error of the label's logit to that of every rival."""
    return logit + logit.gather(1, label[:, None])


def _rows(graph: Graph) -> _Rows:
    """Read the last operation."""
    last = graph.places[-1]
    assert last.lipschitz is not None
    if not isinstance(last.operation, Linear):
        k = last.shape[0]
        distances = torch.full((k, k), sqrt_up(2.0), dtype=torch.float64).fill_diagonal_(0.0)
        return _Rows(distances, last.lipschitz)
    slot = last.inputs[0]
    before = (
        graph.places[slot - 1].lipschitz if slot else LipschitzBound(value=1.0, norm=2.0, proof="isometry")
    )
    assert before is not None
    return _Rows(head_distances(last.operation.rows).cpu(), before)

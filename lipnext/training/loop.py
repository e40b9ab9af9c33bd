"""Training: one flat loop that reads top to bottom.

The loop is given the training and validation parts and nothing else: there is no path by which the test
set could influence a choice.
"""

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lipnext.core.errors import ConfigError, TrainingError
from lipnext.core.experiment import Experiment, OptimSpec, TrainSpec
from lipnext.core.network import LipschitzNetwork, in_turn
from lipnext.core.system import NetworkLoss
from lipnext.core.world import World, local_device
from lipnext.data.augment import Augment
from lipnext.data.batches import batches, count_batches
from lipnext.data.dataset import Dataset, ImageSet
from lipnext.manifold.polar import residual
from lipnext.optim.average import RetractedAverage
from lipnext.optim.groups import split_parameters
from lipnext.optim.lookahead import Lookahead
from lipnext.optim.muon import ManifoldMuon
from lipnext.optim.orthogonal import OrthogonalOptimizer
from lipnext.optim.orthogonal_adam import OrthogonalAdam
from lipnext.optim.owner import Owners
from lipnext.optim.schedule import warmup_cosine
from lipnext.training.activations import stored_activations
from lipnext.training.checkpoint import list_checkpoints, weights_are_finite
from lipnext.training.compiled import check_compile, compiled_layers
from lipnext.training.interrupt import StopRequest
from lipnext.training.log import LOG, RunLog
from lipnext.training.objective import Objective
from lipnext.training.progress import Reporter, Silent
from lipnext.training.running_loss import RunningLoss
from lipnext.training.saving import Checkpoints
from lipnext.training.state import Parts
from lipnext.training.validation import estimate_validation


class Interrupted(SystemExit):
    """A signal ended the run after its checkpoint was saved; `code` is 143 or 130."""


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    """Of batches and steps; validation and checkpoints come on top."""


def train(
    network: LipschitzNetwork,
    experiment: Experiment,
    training: ImageSet,
    validation: ImageSet,
    folder: Path,
    *,
    losses: Mapping[str, NetworkLoss] | None = None,
    reporter: Reporter | None = None,
    tensorboard: bool = False,
    world: World = World(),
) -> tuple[LipschitzNetwork, Progress]:
    """Train `network` in place, or go on from the newest checkpoint in `folder`.

    Several processes see the same batches as one, each its share of them, and end with the same network.

    Args:
        network: freshly built; in float32.
        experiment: resolved (no precision "auto").
        training: the part that is learned from.
        validation: the part that is looked at every few epochs.
        folder: gets `log.jsonl` and `checkpoints/`.
        losses: of the system's own, by name.
        reporter: told after every step.
        tensorboard: mirror the log for TensorBoard.
        world: the processes that train together; the first writes the files.

    Returns:
        The final network (the retracted average if `train.ema` is on) and the counters.

    Raises:
        ConfigError: if a batch cannot be cut into as many parts as are asked for, or the device or the data cannot do
            what `train` asks of them.
        TrainingError: if the loss or a weight is not finite, a checkpoint cannot be written, or another process is
            gone; the last good checkpoint is kept.
        Interrupted: after SIGTERM or Ctrl-C, once a checkpoint is saved.
    """
    spec, reporter = experiment.train, reporter or Silent()
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    device = resolve_device(spec.device)
    network.to(device, torch.float64 if spec.precision == "float64" else torch.float32)
    check_parts(network, experiment, len(training), world)
    check_shard(spec)
    check_device(experiment, training)
    if spec.data_on_device:
        training, validation = _on_device(training, device), _on_device(validation, device)

    # On the cores that train, a thread that prepares what lies in memory already would only be in the way.
    prefetch = 0 if device.type == "cpu" and isinstance(training, Dataset) else 2

    # ---- what is trained, and how ------------------------------------------------------------------------
    orthogonal, euclidean = (list(kind) for kind in split_parameters(network))
    # this process keeps state for what it owns, one alone for everything
    owners = Owners(network, world, shard=spec.shard)
    matrices, others = ([owners.held[n] for n in owners.mine(kind)] for kind in (orthogonal, euclidean))
    manifold = make_orthogonal_optimizer(matrices, experiment)
    rest = make_euclidean_optimizer(others, experiment.optim)
    ahead = Lookahead(others, experiment.optim.lookahead) if experiment.optim.lookahead else None
    average = RetractedAverage(owners.held, spec.ema) if spec.ema else None
    objective = Objective(experiment.loss, losses)
    per_epoch = count_batches(len(training), spec.batch_size)
    total = spec.epochs * per_epoch

    # ---- resume ------------------------------------------------------------------------------------------
    progress = Progress()
    checkpoints = Checkpoints(folder / "checkpoints", experiment, world)
    losses_of_steps = RunningLoss(device, spec.accumulate, world)
    parts: Parts = {
        "network": (owners, []),
        "manifold": (manifold, orthogonal),
        "rest": (rest, euclidean),
        "lookahead": (ahead, euclidean),
        "average": (average, owners.parameters),
    }
    if (saved := checkpoints.newest()) is not None:
        progress = Progress(**checkpoints.restore(saved, parts, owners))
        reporter.line(f"resumed from {saved.name}, epoch {progress.epoch + 1} of {spec.epochs}")
        reporter.resume(progress.step)
    owners.spread(network)  # the same to the last bit, whatever machine a process runs on

    def read_losses(last: int) -> float:
        """Add up what is unread, up to the step numbered `last` from 0; return the loss of that step."""
        values = losses_of_steps.read()
        for step, value in enumerate(values, last - len(values) + 1):
            if not math.isfinite(value):
                raise TrainingError(
                    _not_finite(f"the loss became {value}", replace(progress, step=step), checkpoints)
                )
            progress.loss_sum += value
        return values[-1] if values else math.nan

    def save() -> None:
        _check_weights(owners, progress, checkpoints)
        checkpoints.save(vars(progress).copy(), parts, owners)

    def augment(epoch: int) -> Augment:
        return Augment(experiment.augment.at(epoch / spec.epochs))

    def finished() -> LipschitzNetwork:
        """What is looked at and kept."""
        chosen = _averaged(cast(LipschitzNetwork, owners.whole_network()), average, owners)
        again = batches(
            training,
            spec.batch_size,
            seed=experiment.seed,
            epoch=0,
            augment=augment(progress.epoch - 1),  # as the last epoch saw them
            prefetch=prefetch,
            device=device,
        )
        chosen.finalise(images for images, _ in again)
        return chosen

    # ---- epochs ------------------------------------------------------------------------------------------
    kept: LipschitzNetwork | None = None
    board = folder / "tensorboard" if tensorboard and world.is_first else None
    file = folder / LOG if world.is_first else None
    with (
        RunLog(file, progress.step, board) as log,
        StopRequest() as stop,
        owners,
        checkpoints,
        stored_activations(network, spec),
        compiled_layers(network, spec),
    ):
        loss_read = math.nan
        while progress.epoch < spec.epochs:
            network.train()
            clock = time.perf_counter()
            for images, labels in batches(
                training,
                spec.batch_size,
                seed=experiment.seed,
                epoch=progress.epoch,
                augment=augment(progress.epoch),
                start=progress.batch,
                prefetch=prefetch,
                share=world.share,
                device=device,
            ):
                share = progress.step / total
                _set_rates(manifold, rest, experiment.optim, progress.step, total)
                network.zero_grad(set_to_none=True)
                pieces = world.parts(len(labels), spec.accumulate)
                for piece in pieces:
                    x, y = images[piece], labels[piece]
                    if spec.precision == "float64":
                        x = x.double()
                    loss = objective.of(network, x, y, share, _autocast(spec.precision, device))
                    # a mean over images: the parts of all processes add up to that of the batch
                    loss = loss * (len(y) / len(labels))
                    if piece is pieces[-1]:
                        owners.expect()
                    loss.backward()
                    losses_of_steps.add(loss)
                owners.reduce()
                if losses_of_steps.is_due:
                    loss_read = read_losses(progress.step)
                if experiment.optim.clip:
                    owners.clip(experiment.optim.clip)
                manifold.step()
                rest.step()
                if ahead is not None:
                    ahead.update()
                if average is not None:
                    average.update()
                owners.spread(network)
                progress.step += 1
                progress.batch += 1
                progress.seconds += (now := time.perf_counter()) - clock
                clock = now
                note = "" if math.isnan(loss_read) else f" loss {loss_read:.4f}"
                reporter.advance(1, f"epoch {progress.epoch + 1}/{spec.epochs}{note}")
                # a signal to one process stops all, at the same step
                if progress.batch < per_epoch and (code := int(world.largest(stop.exit_code))):
                    read_losses(progress.step - 1)
                    save()
                    checkpoints.wait()
                    reporter.line(_interrupted(progress))
                    raise Interrupted(code)

            # ---- end of an epoch: retract, look at validation, save --------------------------------------
            read_losses(progress.step - 1)
            progress.seconds += time.perf_counter() - clock  # a device may still have been computing
            _check_weights(owners, progress, checkpoints)
            progress.epoch += 1
            progress.batch = 0
            drift = world.largest(_drift(matrices))
            if progress.epoch % experiment.optim.retract_every == 0 or progress.epoch == spec.epochs:
                manifold.retract()
                owners.spread(network)
            last = progress.epoch == spec.epochs
            fields: dict[str, Any] = {
                "epoch": progress.epoch,
                "loss": progress.loss_sum / per_epoch,
                "drift": drift,
                "rate": manifold.param_groups[0]["lr"],
                "radius": objective.radius((progress.step - 1) / total),
                "temperature": objective.temperature((progress.step - 1) / total),
                "seconds": round(progress.seconds, 3),
            }
            if last or progress.epoch % spec.evaluate_every == 0:
                chosen = finished()
                kept = chosen if last else None
                fields["validation_estimate"] = estimate_validation(
                    chosen,
                    validation,
                    experiment.certify.eps,
                    experiment.certify.batch_size,
                    world,
                )
            progress.loss_sum = 0.0
            log.write(progress.step, "epoch", **fields)
            reporter.line(_epoch_line(fields, spec.epochs))
            code = int(world.largest(stop.exit_code))  # once: a signal while saving stops at the next step
            if last or code or progress.epoch % spec.checkpoint_every == 0:
                save()
            if code:
                checkpoints.wait()
                reporter.line(_interrupted(progress))
                raise Interrupted(code)

    return (kept or finished()).eval(), progress


def make_orthogonal_optimizer(params: list[nn.Parameter], experiment: Experiment) -> OrthogonalOptimizer:
    """Return the optimiser on the orthogonal group that the experiment names; `params` may be empty."""
    spec, groups = experiment.optim, [{"params": params}]
    if spec.name == "adam":
        return OrthogonalAdam(groups, lr=spec.lr, betas=spec.betas, lookahead=spec.lookahead)
    half = torch.bfloat16 if experiment.train.precision == "bfloat16" else None
    return ManifoldMuon(groups, lr=spec.lr, momentum=spec.momentum, sign_dtype=half, lookahead=spec.lookahead)


def make_euclidean_optimizer(params: list[nn.Parameter], spec: OptimSpec) -> torch.optim.Optimizer:
    """Return the optimiser of all other parameters; `params` may be empty."""
    groups, lr, decay = [{"params": params}], spec.euclidean_lr, spec.weight_decay
    if spec.euclidean == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=spec.momentum, weight_decay=decay, nesterov=True)
    if spec.euclidean == "adam":
        return torch.optim.AdamW(groups, lr=lr, betas=spec.betas, weight_decay=decay)
    return torch.optim.NAdam(groups, lr=lr, betas=spec.betas, weight_decay=decay, decoupled_weight_decay=True)


def resolve_device(name: str) -> torch.device:
    """Return the device that the experiment names.

    Raises:
        ConfigError: if this machine or this build of torch does not have it.
    """
    try:
        device = local_device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"train.device: '{name}' cannot be used here ({reason}); cpu always can") from None
    return device


def check_shard(spec: TrainSpec) -> None:
    """Refuse to shard what would be read while it is not there.

    Raises:
        ConfigError: if layers are run backwards or compiled.
    """
    if spec.shard and (spec.activations == "reverse" or spec.compile):
        other = "train.compile" if spec.compile else "train.activations=reverse"
        raise ConfigError(f"train.shard: does not go with {other}; set one of the two back")


def check_parts(network: LipschitzNetwork, experiment: Experiment, images: int, world: World) -> None:
    """Refuse a batch that cannot be cut into a part for each process and pass.

    Args:
        network: to be trained.
        experiment: says how large a batch is, and in how many passes it goes.
        images: of the training part.
        world: the processes.

    Raises:
        ConfigError: if the batch is too small, or several passes would change what a layer computes.
    """
    passes, batch = experiment.train.accumulate, min(experiment.train.batch_size, images)
    if batch < world.size * passes:
        raise ConfigError(
            f"train.batch_size: {batch} images cannot be cut into {world.size} x {passes} parts (processes x "
            "train.accumulate); take a larger batch or fewer parts"
        )
    for layer in network.modules():
        cut = getattr(layer, "batch_parts", "any")
        if (passes > 1 and cut != "any") or (world.size > 1 and cut == "none"):
            raise ConfigError(
                f"train: in a {type(layer).__name__} an image depends on the others of its batch, which cannot be cut into "
                f"{world.size} x {passes} parts (processes x train.accumulate); set train.accumulate to 1"
                + (", and start one process" if cut == "none" else "")
            )


def check_device(experiment: Experiment, training: ImageSet) -> None:
    """Refuse what the device or the data cannot do, before anything is trained.

    Args:
        experiment: asks for it.
        training: the part that is learned from.

    Raises:
        ConfigError: for `train.data_on_device` with images that stay on the disk, or `train.compile` where it cannot work.
    """
    if experiment.train.data_on_device and not isinstance(training, Dataset):
        raise ConfigError(
            f"train.data_on_device: the images of '{experiment.data.name}' stay on the disk; set it to false, or take a "
            "data.name that reads them into memory"
        )
    check_compile(experiment.train, resolve_device(experiment.train.device))


def resolve_precision(experiment: Experiment) -> Experiment:
    """Replace `train.precision: auto` by the faster on the device: bfloat16 where native, else float32.

    Raises:
        ConfigError: if the device cannot be used here.
    """
    resolve_device(experiment.train.device)
    if experiment.train.precision != "auto":
        return experiment
    if experiment.train.device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported()
    else:
        native = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return experiment.override([f"train.precision={'bfloat16' if native else 'float32'}"])


def _on_device(part: ImageSet, device: torch.device) -> ImageSet:
    return part.to(device) if isinstance(part, Dataset) else part


def _set_rates(
    manifold: OrthogonalOptimizer, rest: torch.optim.Optimizer, spec: OptimSpec, step: int, total: int
) -> None:
    factor = warmup_cosine(step, total, spec.warmup, spec.final)
    for group in manifold.param_groups:
        group["lr"] = spec.lr * factor
    for group in rest.param_groups:
        group["lr"] = spec.euclidean_lr * factor


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def _drift(matrices: list[nn.Parameter]) -> float:
    """The largest `||W^T W - I||_F` over all orthogonal matrices."""
    return max((residual(matrix.detach()).max().item() for matrix in matrices), default=0.0)


def _averaged(
    network: LipschitzNetwork, average: RetractedAverage | None, owners: Owners
) -> LipschitzNetwork:
    """The network that is looked at and kept: the retracted average if there is one."""
    if average is None:
        return network
    averaged = cast(LipschitzNetwork, average.network(network))
    averaged.walk = in_turn
    owners.spread(averaged)
    return averaged


def _interrupted(progress: Progress) -> str:
    return f"interrupted; saved at step {progress.step}; run the same command again to go on"


def _check_weights(owners: Owners, progress: Progress, checkpoints: Checkpoints) -> None:
    """Only finite weights may be retracted or become the newest checkpoint."""
    if owners.world.largest(not weights_are_finite(owners.own())):
        raise TrainingError(_not_finite("a weight is no longer finite", progress, checkpoints))


def _not_finite(what: str, progress: Progress, checkpoints: Checkpoints) -> str:
    checkpoints.wait()  # the last may still be under way
    kept = list_checkpoints(checkpoints.folder)
    where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written yet"
    return (
        f"{what} at step {progress.step} (epoch {progress.epoch + 1}); {where}; "
        "lower optim.lr or optim.euclidean_lr, or set optim.clip, and train into a new --out"
    )


def _epoch_line(fields: dict[str, Any], epochs: int) -> str:
    line = f"epoch {fields['epoch']}/{epochs}  loss {fields['loss']:.4f}  drift {fields['drift']:.1e}"
    estimate = fields.get("validation_estimate")
    if estimate:
        cra = "  ".join(f"{name} {value:.3f}" for name, value in estimate["cra"].items())
        line += f"  validation (estimate): clean {estimate['clean']:.3f}  {cra}  ACR {estimate['acr']:.3f}"
    return f"{line}  {fields['seconds']:.0f} s"

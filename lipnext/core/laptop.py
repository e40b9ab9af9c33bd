"""The small runs that most systems have: same data, augmentation and batches for all, so that their results compare."""

from collections.abc import Mapping
from typing import Literal

from lipnext.core.experiment import AugmentSpec, DataSpec, Experiment, LossSpec, OptimSpec, TrainSpec

_RUNS = {
    "tiny": (DataSpec(name="digits"), AugmentSpec(), 64, "float32"),
    "digits": (DataSpec(name="digits"), AugmentSpec(), 64, "float32"),
    "fashion-mnist-cpu": (DataSpec(name="idx"), AugmentSpec(flip=True), 256, "auto"),
    "cifar10-cpu": (DataSpec(name="parquet"), AugmentSpec(flip=True, crop=2), 256, "auto"),
}


def laptop_run(
    system: str,
    name: str,
    model: Mapping[str, bool | int | float | str],
    summary: str,
    *,
    epochs: int,
    optim: OptimSpec,
    loss: LossSpec,
    precision: Literal["float32", "auto"] | None = None,
) -> Experiment:
    """Return an experiment for two CPU cores: "tiny", "digits", "fashion-mnist-cpu" or "cifar10-cpu".

    Args:
        system: its name.
        name: of the experiment, one of those four.
        model: keyword arguments of the system's `build`.
        summary: cost, hardware and expected number.
        epochs: of training.
        optim: the optimiser.
        loss: the loss.
        precision: None takes bfloat16 for the larger two where the processor multiplies it natively.
    """
    data, augment, batch_size, usual = _RUNS[name]
    return Experiment(
        system=system,
        preset=name,
        summary=summary,
        model=dict(model),
        data=data,
        augment=augment,
        train=TrainSpec.model_validate(
            {"epochs": epochs, "batch_size": batch_size, "precision": precision or usual}
        ),
        optim=optim,
        loss=loss,
    )

"""The typed description of one training run: validated, frozen, read from and written to YAML."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from lipnext.core.eps import parse_eps_list
from lipnext.core.errors import ConfigError, nearest
from lipnext.core.files import atomic_write


def _as_text(value: object) -> object:
    """Keep `radius: 0.5` and `path: 2024` usable, which YAML reads as numbers."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_texts(value: object) -> object:
    """Read the eps list, given as "36/255,72/255", one number or a sequence."""
    value = _as_text(value)
    if isinstance(value, str):
        value = value.split(",")
    return tuple(_as_text(item) for item in value) if isinstance(value, list | tuple) else value


def _eps_text(value: str) -> str:
    return _eps_texts((value,))[0]


def _eps_texts(values: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(parse_eps_list(values))
    except ConfigError as error:
        # pydantic adds the name of the setting to a ValueError only.
        raise ValueError(str(error)) from None


Text = Annotated[str, BeforeValidator(_as_text)]
EpsText = Annotated[str, BeforeValidator(_as_text), AfterValidator(_eps_text)]
EpsTexts = Annotated[tuple[str, ...], BeforeValidator(_as_texts), AfterValidator(_eps_texts)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Decay, Decay], BeforeValidator(_as_tuple)]
AtLeastOne = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    """Strict and frozen; whatever pydantic refuses becomes a `ConfigError` of one line."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
    section: ClassVar[str] = ""

    @model_validator(mode="wrap")
    @classmethod
    def _one_line_errors(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise ConfigError(_sentence(error, cls)) from None


class DataSpec(_Section):
    """Where the images come from and how they are split."""

    section: ClassVar[str] = "data"

    name: str = "digits"
    """One of digits, two-moons, idx, parquet, shards (parquet files that stay on the disk), cifar-binary, folder."""
    path: Text | None = None
    validation: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training part that is held out for validation."""
    size: AtLeastOne | None = None
    """Side in pixels to which pictures of a folder or of shards are resized."""
    channels: Literal[1, 3] | None = None
    test: float = Field(default=0.2, gt=0, lt=1)
    """Share held out for test where the source has no test split."""
    seed: Seed = 0
    """Seed of the splits, apart from the seed of the training."""


class AugmentSpec(_Section):
    """Random changes of the training images."""

    section: ClassVar[str] = "augment"

    flip: bool = False
    crop: int = Field(default=0, ge=0)
    """Zero padding in pixels before the random crop."""
    randaugment: Share = 0.0
    """Probability for each image."""
    randaugment_ops: AtLeastOne = 2
    randaugment_magnitude: int = Field(default=9, ge=0, le=30)
    cutout: int = Field(default=0, ge=0)
    """Side in pixels of the square that is cut out."""
    until: Share = 1.0
    """Share of the epochs after which crops, RandAugment and cutout end; flips go on."""

    def at(self, progress: float) -> "AugmentSpec":
        """Return what is left of it at `progress`, the share of the epochs that are over."""
        gone = {"crop": 0, "randaugment": 0.0, "cutout": 0}
        return self if progress < self.until else self.model_copy(update=gone)


class TrainSpec(_Section):
    """The training loop."""

    section: ClassVar[str] = "train"

    epochs: AtLeastOne = 10
    batch_size: AtLeastOne = 256
    """Images between two steps, of all processes together."""
    accumulate: AtLeastOne = 1
    """Parts of the batch that each process sends through the network one after the other, to save memory."""
    activations: Literal["keep", "checkpoint", "reverse"] = "keep"
    """What is stored for the gradient: all that it needs, or the inputs of layers that are computed a second time, or the
    output of a chain of layers that are run backwards."""
    activations_every: AtLeastOne | None = None
    """Layers from one stored activation to the next; None is 1 for checkpoint, and a whole chain for reverse."""
    precision: Literal["float32", "float64", "bfloat16", "auto"] = "float32"
    """auto: bfloat16 where the processor multiplies it natively, else float32."""
    evaluate_every: AtLeastOne = 1
    """In epochs."""
    checkpoint_every: AtLeastOne = 1
    """In epochs."""
    keep: AtLeastOne = 2
    """Checkpoints that stay on the disk."""
    checkpoint_part: AtLeastOne | None = None
    """Largest file of a checkpoint in MB (10^6 bytes); None writes one file, however large."""
    checkpoints: Literal["whole", "distributed"] = "whole"
    """whole: the first process collects and writes everything. distributed: each process writes what it owns, in the
    background, while training goes on."""
    ema: Decay = 0.0
    """Decay of the averaged weights; 0 switches averaging off."""
    threads: AtLeastOne | None = None
    device: str = "cpu"
    data_on_device: bool = False
    """Keep the images, as bytes, in the memory of the device; they are augmented there in any case."""
    compile: bool = False
    """Compile the layers by torch.compile while training; needs `activations` keep."""
    shard: bool = False
    """Let each of several processes keep rows of the large matrices and their gradients; needs `activations` keep or
    checkpoint."""


class OptimSpec(_Section):
    """The optimiser and its schedule."""

    section: ClassVar[str] = "optim"

    name: Literal["adam", "muon"] = "muon"
    lr: float = Field(default=0.02, gt=0)
    """Peak learning rate of the orthogonal matrices; for muon the step angle in radians."""
    euclidean_lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of all other parameters."""
    euclidean: Literal["nadam", "adam", "sgd"] = "nadam"
    """Rule for all other parameters; sgd takes `momentum`, the others `betas`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of all other parameters, decoupled from the gradient except for sgd."""
    momentum: Decay = 0.95
    betas: Betas = (0.9, 0.999)
    warmup: Share = 0.05
    """Share of the steps."""
    final: Share = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""
    clip: float = Field(default=0.0, ge=0)
    """Largest gradient norm; 0 switches clipping off."""
    lookahead: int = Field(default=0, ge=0)
    """Steps between two merges of the slow and the fast weights, of all parameters; 0 switches Lookahead off."""
    retract_every: AtLeastOne = 1
    """In epochs."""


class LossSpec(_Section):
    """The loss and its schedules."""

    section: ClassVar[str] = "loss"

    name: str = "emma"
    """emma, cross-entropy, cll, hinge, or a loss of the system's own."""
    temperature: float = Field(default=1.0, gt=0)
    temperature_end: Annotated[float, Field(gt=0)] | None = None
    """Temperature at the end of training; None keeps it constant."""
    radius: EpsText = "36/255"
    """The training radius that the ramp multiplies."""
    ramp_from: float = Field(default=0.1, ge=0)
    ramp_to: float = Field(default=3.0, ge=0)
    ramp_share: Share = 0.5
    """Share of the training over which the ramp runs."""
    offset: float = Field(default=0.0, ge=0)
    """Margin that the right logit is asked to have: xi of cross-entropy, the margin of hinge."""
    annealing: float = Field(default=0.0, ge=0)
    """Exponent beta of logit annealing; 0 is the plain loss."""
    smoothing: Decay = 0.0
    """Label smoothing."""
    power: float = Field(default=0.0, ge=0)
    """k: the term `(1 - p)^k / k` takes the place of cross-entropy late in training; 0 keeps cross-entropy."""
    power_after: Share = 0.75
    """Share of the training after which it does; halfway from there to the end it has."""
    slack: float = Field(default=0.3, gt=0, lt=1)
    """Slack p of the calibrated loss: the share of the logistic mass left outside the margin."""
    penalty: float = Field(default=0.0, ge=0)
    """Weight of what the loss penalises beside errors: the squared constant for cll, the curvature for
    curvature; or of what it rewards: the radii for certificate."""


class CertifySpec(_Section):
    """What the table at the end of a run reports."""

    section: ClassVar[str] = "certify"

    eps: EpsTexts = ("36/255", "72/255", "108/255")
    semantics: Literal["real", "deployed"] = "real"
    arithmetic: Literal["float64", "float32"] = "float64"
    batch_size: AtLeastOne = 512
    images: AtLeastOne | None = None
    """How many images of the test part, evenly spaced; None takes all. For certificates that take long."""


class Experiment(_Section):
    """Everything that decides a training run. A variant is `override`, never an assignment.

    Raises:
        ConfigError: one line, on construction, for an unknown key or a value that is not allowed.
    """

    system: str
    preset: str | None = None
    """Name of the experiment that this one started from."""
    summary: str = ""
    """Cost, hardware and expected number."""
    seed: Seed = 0
    model: dict[str, bool | int | float | str] = {}
    """Keyword arguments of the system's `build`."""
    data: DataSpec = DataSpec()
    augment: AugmentSpec = AugmentSpec()
    train: TrainSpec = TrainSpec()
    optim: OptimSpec = OptimSpec()
    loss: LossSpec = LossSpec()
    certify: CertifySpec = CertifySpec()

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> "Experiment":
        """Read an experiment file.

        Raises:
            ConfigError: where the file is missing, no YAML mapping, or not a valid experiment.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"cannot read the experiment {path}: {reason}") from None
        try:
            data = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path} must hold lines such as 'system: lipnext', got {data!r:.40}")
        return cls.model_validate(data)

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write every field, defaults included, so that a later default cannot change the run.

        Raises:
            OSError: where the file cannot be written; an existing one is then left as it was.
        """
        with atomic_write(path) as file:
            yaml.dump(self.model_dump(mode="json"), file, Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """Return the sha256 of the canonical JSON text, equal in every process."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def override(self, assignments: Iterable[str]) -> "Experiment":
        """Return a copy with settings replaced, validated again.

        Args:
            assignments: such as ["train.epochs=2", "model.width=64", "seed=1"]; values are YAML scalars or
                lists, "null" is None.

        Raises:
            ConfigError: for an unknown key (with the nearest known one) or a value that is not allowed.
        """
        data = self.model_dump()
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise ConfigError(f"'{assignment}' sets nothing; write key=value, such as train.epochs=2")
            _assign(data, key.strip(), text.strip())
        return Experiment.model_validate(data)


def _assign(data: dict[str, Any], key: str, text: str) -> None:
    """Set one key of a dumped experiment to a value given as text."""
    section, dot, name = key.partition(".")
    if dot and section not in _SECTIONS:
        raise ConfigError(f"{key}: there is no section '{section}'; {nearest(section, _SECTIONS)}")
    if not dot and section in _SECTIONS:
        raise ConfigError(f"{key} is a section; write {key}.KEY=value")
    if section == "model":
        if not name:
            raise ConfigError("model: name the key to set, such as model.width=64")
        data["model"][name] = _scalar(text)
        return
    kind = _SECTIONS[section] if dot else Experiment
    target, name = (data[section], name) if dot else (data, key)
    if name not in kind.model_fields:
        raise ConfigError(_unknown_key(name, kind))
    # The text of a text field is taken as it stands: data.path=007 is a folder, not a number.
    is_text = kind.model_fields[name].annotation in (str, str | None, Text | None) and text != "null"
    target[name] = text if is_text else _scalar(text)


# The keys of `model` belong to the system's build and are checked there.
_SECTIONS: dict[str, type[_Section]] = {"model": Experiment} | {
    kind.section: kind for kind in (DataSpec, AugmentSpec, TrainSpec, OptimSpec, LossSpec, CertifySpec)
}


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-3 as a number, as YAML 1.2 does; PyYAML's 1.1 takes it for text."""


class _Dumper(yaml.SafeDumper):
    """Safe YAML that puts the text '1e-3' in quotes, so that `_Loader` reads it back as text."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def _scalar(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


_RULES = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "literal_error": "one of {expected}",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a section of 'key: value' lines",
    "model_type": "a section of 'key: value' lines",
}


def _sentence(error: ValidationError, kind: type[_Section]) -> str:
    """Turn the first complaint of pydantic into one line that names the key, the rule and the value."""
    first = error.errors(include_url=False)[0]
    place, value = [str(part) for part in first["loc"]], first["input"]
    if first["type"] == "extra_forbidden":
        return _unknown_key(place[0], kind)
    if kind is Experiment and place[:1] == ["model"] and len(place) > 1:
        return f"model.{place[1]}: must be true or false, a number or text, got {value!r}"
    key = ".".join(filter(None, [kind.section, *place[:1]])) or "experiment"
    if first["type"] == "missing" and len(place) == 1:
        return f"{key}: is required"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}"
    if first["type"] in _RULES:
        return f"{key}: must be {_RULES[first['type']].format(**first.get('ctx', {}))}, got {value!r}"
    return f"{key}: {first['msg']}, got {value!r}"


def _unknown_key(key: str, kind: type[_Section]) -> str:
    if kind is not Experiment:
        return f"{kind.section}.{key}: unknown key; {nearest(key, kind.model_fields)}"
    for section, fields in _SECTIONS.items():
        if section != "model" and key in fields.model_fields:
            return f"{key}: unknown key; did you mean '{section}.{key}'?"
    return f"{key}: unknown key; {nearest(key, kind.model_fields)}"

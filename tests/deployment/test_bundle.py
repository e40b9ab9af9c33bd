import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_runs import CLASSES, experiment, network, pictures
from torch import Tensor

from lipnext.core.errors import BundleError, TrainingError, UnsoundError
from lipnext.core.files import sha256_file, sha256_tensors
from lipnext.core.network import LipschitzNetwork
from lipnext.deployment import bundle
from lipnext.deployment.bundle import load_bundle, load_experiment, polish, save_bundle

FILES = ("model.safetensors", "config.json", "certificate.json")


def drifted() -> LipschitzNetwork:
    """Matrices off the manifold as after an epoch without retraction."""
    net = network(experiment()).float()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float32)
            parameter.add_(noise, alpha=1e-3)
    return net


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(drifted(), experiment(), CLASSES, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def reforge(folder: Path, **others: object) -> None:
    """Make all hashes of files right again, as somebody would who wants a changed bundle to pass."""

    def change(certificate: dict[str, Any]) -> None:
        certificate["weights_file_sha256"] = sha256_file(folder / "model.safetensors")
        certificate["config_sha256"] = sha256_file(folder / "config.json")
        certificate.update(others)
        certificate["certificate_sha256"] = bundle._hash(certificate)

    edit(folder / "certificate.json", change)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object], **others: object) -> None:
    """Change the weights and all hashes of files."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    reforge(folder, **others)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(BundleError) as error:
        load_bundle(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# ---- polish


def test_polishing_gives_the_same_logits_and_a_bound_of_one() -> None:
    net = drifted()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images = pictures().float_images()
    # What polishing may do: retract what drifted. A retracted net is what training ends with.
    with torch.no_grad():
        for block in net.body:
            for name in set(block.orthogonal) & dict(block.named_parameters()).keys():
                matrix = getattr(block, name)
                u, _, v = torch.linalg.svd(matrix.double())
                matrix.copy_((u @ v).float())
                before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        wanted = net.eval()(images)
    polished = polish(net)
    assert polished.lipschitz_bound().value <= 1 + 1e-6
    assert all(parameter.dtype == torch.float32 for parameter in polished.parameters())
    assert not polished.training
    with torch.no_grad():
        torch.testing.assert_close(polished(images), wanted, rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_polishing_heals_a_drift() -> None:
    net = drifted()
    assert net.lipschitz_bound().value > 1 + 1e-4
    assert polish(net).lipschitz_bound().value <= 1 + 1e-6


# ---- round trip


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_a_bundle_reads_back_with_the_same_certificates(saved: Path, default: torch.dtype) -> None:
    torch.set_default_dtype(default)
    images = pictures(50, seed=3).float_images()
    model = load_bundle(saved)
    direct = experiment_certificate(images)
    for batch_size in (50, 7):
        certificate = model.certify(images, batch_size)
        assert torch.equal(certificate.label, direct.label)
        torch.testing.assert_close(certificate.radius, direct.radius, rtol=1e-12, atol=0)
    certificate = model.certify(images)
    for field in ("label", "radius", "margin", "slack"):
        assert torch.equal(getattr(certificate, field), getattr(direct, field)), field
    assert certificate.model_sha256 == direct.model_sha256
    assert certificate.lipschitz == direct.lipschitz
    assert (certificate.radius > 0).any()
    assert model.classes == CLASSES
    assert model.input_shape == (1, 4, 4)
    assert model.system == "lipnext"
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert load_experiment(saved) == experiment()


def experiment_certificate(images: Tensor) -> Any:
    from lipnext.systems import get

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # as when the bundle was saved
    try:
        return get("lipnext").certify(polish(drifted()))(images)
    finally:
        torch.set_default_dtype(default)


def test_the_certificate_file_says_what_was_proved(saved: Path) -> None:
    document = json.loads((saved / "certificate.json").read_text())
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    assert document["model_sha256"] == sha256_tensors(weights)
    assert document["weights_file_sha256"] == hashlib.sha256((saved / FILES[0]).read_bytes()).hexdigest()
    assert document["config_sha256"] == hashlib.sha256((saved / FILES[1]).read_bytes()).hexdigest()
    assert document["norm"] == "l2"
    assert document["input"] == {"shape": [1, 4, 4], "range": [0, 1], "preprocessing": "none"}
    assert 1 <= document["lipschitz"]["bound"] <= 1 + 1e-6
    assert [layer["name"] for layer in document["layers"]] == [f"body.{k}" for k in range(4)]
    rows = weights["head.weight"].double()
    distances = torch.tensor(document["head_distances"])
    assert (distances >= (rows[:, None] - rows).norm(dim=-1)).all()
    assert len(list(saved.iterdir())) == 3


def test_saving_again_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    save_bundle(drifted(), experiment(), CLASSES, tmp_path / "again")
    for name in FILES:
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


# ---- what is refused


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    refused(folder, f"has no {name}: the run is not finished or no run at all; finish it with lipnext train")


@pytest.mark.parametrize("name", FILES)
def test_no_byte_may_change(name: str, folder: Path) -> None:
    """Flip one bit here and there; only the blanks in the JSON of the certificate have no meaning."""
    path = folder / name
    whole = path.read_bytes()
    images = pictures(4).float_images()
    wanted = load_bundle(folder).certify(images)
    for place in range(0, len(whole), max(len(whole) // 40, 1)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if name == "certificate.json" and whole[place : place + 1].isspace():
            continue
        refused(folder, name)
    path.write_bytes(whole)
    assert torch.equal(load_bundle(folder).certify(images).radius, wanted.radius)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_refused(name: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(folder, name)


def test_a_better_bound_written_by_hand_is_refused(folder: Path) -> None:
    edit(folder / "certificate.json", lambda document: document["lipschitz"].update(bound=0.5))
    refused(folder, "certificate.json was changed (its own sha256 differs)")


@pytest.mark.parametrize("name", ["config.json", "certificate.json"])
@pytest.mark.parametrize("version", [2, "1", None])
def test_another_format_is_refused(name: str, version: object, folder: Path) -> None:
    edit(folder / name, lambda document: document.update(format=version))
    refused(folder, f"{name} has format {version!r}, this version reads 1; upgrade lipnext or export")


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '"x"'])
@pytest.mark.parametrize("name", ["config.json", "certificate.json"])
def test_something_else_than_an_object_is_damaged(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    refused(folder, f"{name} is damaged")
    if name == "config.json":
        with pytest.raises(BundleError, match=r"config.json is damaged"):
            load_experiment(folder)


def test_missing_and_superfluous_tensors_are_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("head.bias"))
    refused(folder, "does not fit config.json: missing ['head.bias'], not known nothing")
    rewrite(folder, lambda tensors: tensors.update({"head.bias": torch.zeros(3), "x": torch.zeros(1)}))
    refused(folder, "does not fit config.json: missing nothing, not known ['x']")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision_are_refused(dtype: torch.dtype, folder: Path) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    rewrite(folder, cast)
    refused(folder, "must be float32 of shape", f"got {dtype}")


def test_a_misshapen_tensor_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"head.bias": torch.zeros(4, dtype=torch.float32)}))
    refused(folder, "head.bias must be float32 of shape (3,), got torch.float32 (4,)")


def test_swapped_head_rows_are_refused(folder: Path) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        for name in ("head.weight", "head.bias"):
            tensors[name] = tensors[name].flip(0).contiguous()

    rewrite(folder, swap)
    refused(
        folder, "does not hold the weights that were certified (model_sha256 in certificate.json differs)"
    )


def test_weights_that_are_not_finite_give_no_certificate(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["head.weight"].fill_(torch.nan))
    refused(folder, "does not hold the weights that were certified")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    reforge(folder, model_sha256=sha256_tensors(tensors))
    model = load_bundle(folder)
    with pytest.raises(UnsoundError, match=r"cannot certify: .*head.weight holds NaN or infinity"):
        model.certify(pictures(2).float_images())


def test_a_pickle_is_never_opened(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "sprung",))

    torch.save({"head.weight": Trap()}, folder / "model.safetensors")
    refused(folder, "model.safetensors is not the file that was certified")
    reforge(folder)
    refused(folder, "model.safetensors is damaged or no safetensors file", "copy the bundle again")
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda c: c["experiment"].update(system="lipnexd"),
            "unknown system 'lipnexd'; did you mean 'lipnext'",
        ),
        (lambda c: c["experiment"].update(oops=1), "oops: unknown key"),
        (lambda c: c["experiment"]["model"].update(widht=8), "model.widht: unknown key"),
        (lambda c: c.pop("experiment"), "'experiment'"),
        (lambda c: c.update(input_shape=["x"]), "config.json cannot be used"),
        (lambda c: c.update(input_shape=[1, 4]), "config.json cannot be used"),
        (lambda c: c.update(classes=7), "config.json cannot be used"),
        (lambda c: c.update(classes=["a", "a", "b"]), "different names"),
        (lambda c: c.update(classes=["a", "b"]), "head."),
    ],
)
def test_a_config_that_cannot_be_used_says_why(
    change: Callable[[dict[str, Any]], object], reason: str, folder: Path
) -> None:
    edit(folder / "config.json", change)
    reforge(folder)
    refused(folder, reason)


def test_something_else_than_a_bundle_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing", "is no folder; give a run folder with model.safetensors")
    refused(tmp_path, "has no model.safetensors: the run is not finished or no run at all")
    with pytest.raises(BundleError, match=r"has no model\.safetensors: the run is not finished"):
        load_experiment(tmp_path)


def test_a_full_disk_leaves_no_half_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TrainingError, match=r"cannot write the bundle to .*: No space left on device; free"):
        save_bundle(drifted(), experiment(), CLASSES, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []

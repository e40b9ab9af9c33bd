import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Call, Flatten
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import CLASSES, SHAPE, experiment, network, pictures
from torch import Tensor, nn
from torch.nn import functional

from lipnext import systems
from lipnext.core.classifier import Classifier
from lipnext.core.errors import ConfigError, UnsoundError
from lipnext.core.experiment import Experiment
from lipnext.core.network import LipschitzNetwork
from lipnext.core.rounding import RoundingState, mul_up
from lipnext.deployment import export as exporting
from lipnext.deployment.bundle import load_bundle, save_bundle
from lipnext.deployment.export import compare, export, plain
from lipnext.deployment.manifest import make_manifest, margin_error
from lipnext.nn.head import UnitRowHead

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"


def block(language: str) -> str:
    """The first code block of the page in a language."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found[1]


def trained() -> LipschitzNetwork:
    """Weights away from their start: positions and biases that are not zero, M R^T that is not the identity."""
    net = network(experiment()).float()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            size = (
                0.05 if name.endswith(("rotation", "mixing")) else 0.3
            )  # matrices must stay near their manifold
            parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=torch.float32), alpha=size)
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(trained(), experiment(), CLASSES, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Classifier:
    return load_bundle(folder)


@pytest.fixture(scope="module")
def graph(folder: Path, model: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as a float64 ONNX graph."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra: onnx)")
    out = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export(model, folder, "onnx", out)
    return out


@pytest.fixture(scope="module")
def program(folder: Path, model: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as a float32 torch program."""
    out = tmp_path_factory.mktemp("torch") / "model.pt2"
    report = export(model, folder, "torch", out, "float32")
    assert report["bytes"] == out.stat().st_size
    assert 0 < report["difference"] <= report["allowed"]
    return out


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures().float_images()


# ---- the plain form


def test_the_plain_form_computes_the_same(model: Classifier, images: Tensor) -> None:
    exact = copy.deepcopy(model.net).double()
    got = plain(model.net, torch.float64)(images.double())  # type: ignore[arg-type]
    # 16 products a sum and three layers of them
    torch.testing.assert_close(got, exact(images.double()), rtol=0, atol=1e-14)


# ---- the manifest


def test_the_manifest_gives_the_certificates_radii(folder: Path, model: Classifier, images: Tensor) -> None:
    """Written out one sample and rival at a time, in rationals, from logits of the network itself."""
    manifest = make_manifest(model, folder, "float64")
    with torch.no_grad():
        logits = copy.deepcopy(model.net).double()(images.double())
    for semantics in ("real", "deployed"):
        certificate = model.certify(images, semantics=semantics)  # type: ignore[arg-type]
        for row, label, radius in zip(logits.tolist(), certificate.label, certificate.radius, strict=True):
            y = int(label)
            ratios = [
                (Fraction(row[y]) - Fraction(row[j]) - Fraction(manifest["error"][semantics][y][j]))
                / Fraction(manifest["denominator"][y][j])
                for j in range(len(row))
                if j != y
            ]
            # both round each step once or twice more
            assert float(radius) == pytest.approx(max(0.0, float(min(ratios))), rel=1e-12, abs=1e-15)
            assert float(radius) <= max(Fraction(0), min(ratios)) * (1 + Fraction(1, 2**45))


def test_tables_are_rounded_up_and_float32_pays_for_its_arithmetic(folder: Path, model: Classifier) -> None:
    double, single = (make_manifest(model, folder, dtype) for dtype in ("float64", "float32"))
    stated = json.loads((folder / "certificate.json").read_text())
    assert double["denominator"] == single["denominator"]
    for i in range(3):
        for j in range(3):
            if i != j:
                d, k = stated["head_distances"][i][j], stated["lipschitz"]["bound"]
                assert double["denominator"][i][j] == mul_up(k, d) > 0
            for manifest in (double, single):
                ball = stated["ball_error"][manifest["arithmetic"]][i][j]
                own = stated["margin_error"][i][j] if manifest is double else ball
                assert manifest["error"]["real"][i][j] == own
                assert Fraction(manifest["error"]["deployed"][i][j]) >= Fraction(own) + Fraction(ball)
    assert single["certificate"] == double["certificate"] == stated
    assert single["largest_radius"] < 4.0 == 16**0.5
    for manifest in (double, single):
        for key in ("norm", "kind", "confidence", "arithmetic", "model_sha256", "classes", "input"):
            assert manifest[key], key


def test_a_network_without_the_margin_certificate_is_refused(folder: Path, tmp_path: Path) -> None:
    def foreign(net: nn.Module) -> Classifier:
        return Classifier(net, lambda *_: None, SHAPE, CLASSES, "lipnext").eval()  # type: ignore[arg-type,return-value]

    class Unknown(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    unknown = LipschitzNetwork([Unknown()], UnitRowHead(16, 3), SHAPE)  # type: ignore[list-item]
    out = tmp_path / "model.pt2"
    for net, message in (
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), "needs a LipschitzNetwork, got a Sequential"),
        (unknown, "body.0 is a Unknown, which has no proved Lipschitz bound"),
    ):
        with pytest.raises(UnsoundError, match=message):
            export(foreign(net), folder, "torch", out)
    assert list(tmp_path.iterdir()) == []


def test_a_system_certified_in_linf_is_refused(folder: Path, model: Classifier) -> None:
    linf = Classifier(model.net, model.make_certifier, SHAPE, CLASSES, "nemon").eval()
    with pytest.raises(UnsoundError, match="cannot export a network that is certified in linf"):
        make_manifest(linf, folder, "float64")


def test_a_network_without_a_float32_bound_is_refused_in_float32(folder: Path) -> None:
    class NoFloat32(Flatten):
        def rounding(self, state: RoundingState) -> RoundingState:
            if state.dtype == torch.float32:
                raise UnsoundError("activations may overflow")
            return state

    net = LipschitzNetwork([NoFloat32()], UnitRowHead(16, 3), SHAPE).float().materialise()
    model = Classifier(net, lambda *_: None, SHAPE, CLASSES, "lipnext").eval()  # type: ignore[arg-type,return-value]
    with pytest.raises(UnsoundError, match=r"cannot export in float32: no error bound .*; export in float64"):
        make_manifest(model, folder, "float32")
    assert make_manifest(model, folder, "float64")["arithmetic"] == "float64"


# ---- the check before writing


def test_another_function_is_not_written(
    folder: Path, model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias of one logit off by 1e-9: far above what float64 allows, far below what anybody would see."""

    def spoiled(program: nn.Module, manifest: str) -> tuple[bytes, nn.Module]:
        program[-1].bias[1] += 1e-9  # type: ignore[index,operator]
        return b"data", program

    monkeypatch.setattr(exporting, "_trace", lambda program, shape: program)
    monkeypatch.setattr(exporting, "_torch", spoiled)
    with pytest.raises(
        UnsoundError, match="the exported program is not the network: a margin differs by 1e-09"
    ):
        export(model, folder, "torch", tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z: z + 0 * z.sum() * float("nan"), "not finite"),
        (lambda z: z[:, :2], r"returns \(64, 2\)"),
        (lambda z: z.flip(1), "is not the network"),
        (lambda z: z.mean(0, keepdim=True).expand_as(z), "is not the network"),  # a batch that is mixed
    ],
)
def test_what_a_program_returns_is_looked_at(
    model: Classifier, folder: Path, spoil: Callable[[Tensor], Tensor], message: str
) -> None:
    exact = copy.deepcopy(model.net).double()
    bound = margin_error(make_manifest(model, folder, "float64"))
    assert compare(exact, exact, torch.float64, bound)["difference"] <= 2e-15  # type: ignore[arg-type]
    with pytest.raises(UnsoundError, match=message):
        compare(lambda x: spoil(exact(x)), exact, torch.float64, bound)  # type: ignore[arg-type]


def test_a_vacuous_float32_bound_does_not_excuse_another_function(model: Classifier) -> None:
    exact = copy.deepcopy(model.net).double()
    with pytest.raises(UnsoundError, match="is not the network"):
        compare(lambda x: 1.01 * exact(x.double()), exact, torch.float32, torch.full((3, 3), 10.0))  # type: ignore[arg-type]


# ---- what is written


def test_onnx_runs_on_any_batch_and_carries_the_manifest(
    graph: Path, model: Classifier, images: Tensor
) -> None:
    import onnx
    import onnxruntime

    manifest = json.loads(Path(f"{graph}.json").read_text())
    file = onnx.load(graph)
    assert {p.key: json.loads(p.value) for p in file.metadata_props} == {"lipnext": manifest}
    assert [len(f.functions) for f in (file,)] == [0]
    exact = copy.deepcopy(model.net).double()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for count in (1, 7, 24):
        part = images[:count].double()
        (logits,) = session.run(None, {"images": part.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), exact(part), rtol=0, atol=1e-14)


def test_a_torch_program_carries_the_manifest(program: Path) -> None:
    extra = {"lipnext": ""}
    run = torch.export.load(program, extra_files=extra).module()
    assert json.loads(extra["lipnext"]) == json.loads(Path(f"{program}.json").read_text())
    logits = run(torch.rand(5, *SHAPE, dtype=torch.float32))
    assert (logits.dtype, logits.shape) == (torch.float32, (5, 3))
    assert sorted(p.name for p in program.parent.iterdir()) == ["model.pt2", "model.pt2.json"]


def test_no_file_names_folders_of_this_machine(graph: Path, program: Path) -> None:
    here = [str(Path(module.__file__).parent).encode() for module in (torch, exporting)]  # type: ignore[arg-type]
    for file in (*graph.parent.iterdir(), *program.parent.iterdir()):
        assert not any(path in file.read_bytes() for path in here), file


def test_safetensors_keeps_the_weights_bit_for_bit(folder: Path, model: Classifier, tmp_path: Path) -> None:
    out = tmp_path / "copy.safetensors"
    export(model, folder, "safetensors", out)
    stored, written = load_file(folder / "model.safetensors"), load_file(out)
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[name], written[name]) for name in stored)
    with safe_open(out, framework="pt") as file:
        manifest = json.loads(file.metadata()["lipnext"])
    assert manifest["model_sha256"] == model.certify(torch.zeros(1, *SHAPE)).model_sha256
    assert [p.name for p in tmp_path.iterdir()] == ["copy.safetensors"]


def test_the_bundle_itself_is_not_overwritten(folder: Path, model: Classifier) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is the bundle's own file, which must stay as it is"):
        export(model, folder, "safetensors", folder / "model.safetensors")
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: functional.avg_pool2d(x, 2, ceil_mode=True).flatten(1),
            "onnxruntime cannot run this graph: .*Pool",
        ),
        (
            lambda x: torch.linalg.eigvalsh(x).flatten(1),
            "cannot be written as ONNX: .*eigh.*; export to torch instead",
        ),
    ],
)
def test_an_operation_without_a_counterpart_is_told_in_one_line(
    folder: Path, tmp_path: Path, function: Callable[[Tensor], Tensor], message: str
) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra: onnx)")

    class Odd(Flatten):
        def forward(self, images: Tensor) -> Tensor:
            return function(images)

    net = LipschitzNetwork([Odd()], UnitRowHead(4, 3), SHAPE).float().materialise()
    model = Classifier(net, lambda *_: None, SHAPE, CLASSES, "lipnext").eval()  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match=message) as refusal:
        export(model, folder, "onnx", tmp_path / "model.onnx")
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", systems.list_systems())
def test_every_system_is_exported_to_onnx_in_float64_or_refused_in_one_line(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra: onnx)")
    system = systems.get(name)
    tiny = Experiment(system=name, model=dict(system.presets["tiny"]))
    net = systems.build_network(tiny, (1, 8, 8), 10).float()
    save_bundle(net, tiny, tuple("0123456789"), tmp_path)
    model = load_bundle(tmp_path)
    votes = model.certify(torch.rand(0, 1, 8, 8)).kind != "deterministic"
    if system.norm != 2.0 or votes:
        with pytest.raises(UnsoundError, match="needs a LinearHead" if votes else "certified in linf"):
            export(model, tmp_path, "onnx", tmp_path / "model.onnx")
        return
    report = export(model, tmp_path, "onnx", tmp_path / "model.onnx")
    assert report["difference"] <= 1e-12
    images = torch.rand(20, 1, 8, 8)
    label, radius = python_certify()(str(tmp_path / "model.onnx"), images.numpy())
    certificate = model.certify(images)
    assert label.tolist() == certificate.label.tolist()
    # the system's own certificate may know more than the global one, and never less
    assert (torch.from_numpy(radius) <= certificate.radius + 1e-9).all()


# ---- the snippets of the page


def python_certify() -> Callable[..., tuple[Any, Any]]:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: onnx)")
    names: dict[str, Any] = {}
    exec(block("python"), names)
    return names["certify"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("semantics", ["real", "deployed"])
def test_the_python_snippet_gives_the_certificate(
    graph: Path, model: Classifier, images: Tensor, semantics: Any
) -> None:
    label, radius = python_certify()(str(graph), images.numpy(), semantics)
    certificate = model.certify(images, semantics=semantics)
    assert label.tolist() == certificate.label.tolist()
    assert (certificate.radius > 0).any()
    np.testing.assert_allclose(radius, certificate.radius, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="must lie in"):
        python_certify()(str(graph), 255 * images.numpy())


def in_javascript(cases: list[Any]) -> list[Any]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script = f"""{block("js")}
    const fromText = (z) => z.map((t) => (typeof t === "string" ? Number(t) : t));
    const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
    console.log(JSON.stringify(cases.map(([z, m, s]) => certify(fromText(z), m, s))));"""
    done = subprocess.run(
        [node, "-e", script], input=json.dumps(cases), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def reference(logits: list[float], manifest: dict[str, Any], semantics: str) -> tuple[int, Fraction]:
    """Label and largest radius that is true, in rationals."""
    y = max(range(len(logits)), key=lambda j: logits[j])
    ratios = [Fraction(manifest["largest_radius"])]
    for j, z in enumerate(logits):
        if j != y:
            slack = Fraction(logits[y]) - Fraction(z) - Fraction(manifest["error"][semantics][y][j])
            ratios.append(slack / Fraction(manifest["denominator"][y][j]))
    return y, max(Fraction(0), min(ratios))


def test_the_javascript_snippet_rounds_down_and_gives_up_where_it_must(
    folder: Path, model: Classifier
) -> None:
    manifest = make_manifest(model, folder, "float64")
    rng = np.random.default_rng(0)
    finite = [
        rng.normal(scale=scale, size=3).tolist() for scale in (1e-12, 1e-9, 1.0, 1e3) for _ in range(50)
    ]
    finite += [[0.5, 0.5, 0.0], [1.0, 1.0 - 1e-15, 0.0], [0.0, 0.0, 0.0]]
    cases = [[z, manifest, s] for z in finite for s in ("real", "deployed")]
    for (logits, _, semantics), got in zip(cases, in_javascript(cases), strict=True):
        label, radius = reference(logits, manifest, semantics)
        assert got["label"] == label
        assert Fraction(got["radius"]) <= radius
        assert got["radius"] >= float(radius) * (1 - 1e-14)
    hopeless = [["NaN", 0, 0], [0, "NaN", 0], ["Infinity", 0, 0], [0, 0, "-Infinity"]]
    assert [got["radius"] for got in in_javascript([[z, manifest, "real"] for z in hopeless])] == [0] * 4


SESSION = """
const ort = require("onnxruntime-web"), fs = require("fs");
const manifest = JSON.parse(fs.readFileSync("model.onnx.json"));
(async () => { for (const pixels of JSON.parse(fs.readFileSync(0, "utf8"))) {
%s
console.log(JSON.stringify([label, radius])); } process.exit(0); })();
"""


def test_the_javascript_snippet_runs_the_graph(graph: Path, model: Classifier, images: Tensor) -> None:
    node = shutil.which("node")
    if (
        node is None
        or subprocess.run([node, "-e", 'require("onnxruntime-web")'], capture_output=True).returncode
    ):
        pytest.skip("onnxruntime-web is not installed for node")
    blocks = re.findall(r"```js\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    pixels = images[:4].double().flatten(1).tolist()
    done = subprocess.run(
        [node, "-e", blocks[0] + SESSION % blocks[1]],
        input=json.dumps(pixels),
        capture_output=True,
        text=True,
        cwd=graph.parent,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    certificate = model.certify(images[:4])
    for line, label, radius in zip(
        done.stdout.splitlines(), certificate.label, certificate.radius, strict=True
    ):
        assert json.loads(line) == [int(label), pytest.approx(float(radius), abs=1e-12)]


# ---- the command line


def test_export_on_the_command_line(call: Call, folder: Path, tmp_path: Path) -> None:
    code, out, err = call("export", folder, "--to", "safetensors", "--out", tmp_path / "a.safetensors")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path}/a.safetensors: ")
    code, out, err = call(
        "export", folder, "--to", "safetensors", "--out", tmp_path / "b.safetensors", "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["bytes"] == (tmp_path / "b.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "onxx", "--out", "a.onnx"], "cannot export to 'onxx'; did you mean 'onnx'? known: onnx,"),
        (["--to", "onnx", "--out", "a.bin"], "a file for onnx must end in .onnx, got 'a.bin'"),
        (["--to", "onnx", "--out", "no/where/a.onnx"], "no/where does not exist"),
        (["--to", "onnx", "--out", "a.onnx", "--dtype", "float16"], "cannot export in 'float16'"),
        (["--to", "safetensors", "--out", "a.safetensors", "--dtype", "float64"], "leave --dtype out"),
        (["--to", "torch", "--out", "a.pt2", "--eps", "1"], "--eps and --data are for --to vnnlib"),
        (["--to", "vnnlib", "--out", "a.vnnlib", "--eps", "1"], "takes --sample and --eps"),
    ],
)
def test_what_is_mistyped_is_told_in_one_line(
    call: Call, folder: Path, words: list[str], message: str
) -> None:
    code, out, err = call("export", folder, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_missing_package_is_named(
    folder: Path, model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'export to onnx needs onnx; .* pip install "lipnext\[onnx\]"'):
        export(model, folder, "onnx", tmp_path / "a.onnx")

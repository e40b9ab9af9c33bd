"""The command line: verbs only. Each imports what it needs when it runs, so that `--help` is instant."""

import inspect
import json
import math
import os
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from lipnext._version import __version__
from lipnext.core.eps import parse_eps_list, round_down, round_up
from lipnext.core.errors import LipnextError

if TYPE_CHECKING:
    from lipnext.core.certificate import Semantics

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Image classifiers with a proof: next to every label a radius that no change of the image can beat.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
_RUN = "A run folder or any folder with a bundle, a packaged model (lipnext zoo list), or hf:owner/name"
Run = Annotated[str, typer.Argument(help=f"{_RUN}.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Folder with a data set: parquet, IDX, CIFAR binary, or one folder of pictures per class."
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lipnext {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""


@app.command()
def systems(as_json: Json = False) -> None:
    """List the systems and their experiments."""
    from lipnext import systems as registry

    records = {name: registry.get(name) for name in registry.list_systems()}
    rows = [
        {
            "system": name,
            "summary": record.summary,
            "reference": record.reference,
            "norm": "l2" if record.norm == 2 else "linf",
            "experiments": list(record.experiments),
        }
        for name, record in records.items()
    ]
    if as_json:
        _print_json(rows)
        return
    for row, (name, record) in zip(rows, records.items(), strict=True):
        print(f"{name}  ({row['norm']}, {record.reference})\n  {record.summary}")
        for title, make in record.experiments.items():
            first = (inspect.getdoc(make) or "").partition("\n")[0]
            print(f"    {name}/{title}: {first}")


@app.command()
def train(
    what: Annotated[
        str, typer.Argument(help="An experiment, such as digits or lipnext/cifar10-cpu, or a YAML file.")
    ],
    out: Annotated[
        str | None, typer.Option(help="Run folder; default runs/NAME. An interrupted run goes on.")
    ] = None,
    data: Data = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, such as train.epochs=2; repeatable.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option(help="Mirror the log for TensorBoard (extra: lipnext[log]).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train, prove the bounds, save the bundle, certify the test part once."""
    from lipnext import runs

    experiment = runs.resolve(what, data, overrides or [])
    folder = out or f"runs/{experiment.preset or experiment.system}"
    result = runs.train(experiment, folder, tensorboard=tensorboard)
    if not result:  # of several processes the first one speaks
        return
    if as_json:
        _print_json(result)
        return
    _print_summary(result, f"{folder}: test part, {result['n']} images, trained in {result['minutes']} min")


@app.command()
def certify(
    run: Annotated[str | None, typer.Argument(help=f"{_RUN}; or --model instead.")] = None,
    data: Data = None,
    model: Annotated[
        str | None, typer.Option(help="A network of your own, file.py:factory; the file is run.")
    ] = None,
    eps: Annotated[
        str | None, typer.Option(help="Radii in pixel units of images in [0, 1], such as 36/255,72/255.")
    ] = None,
    semantics: Annotated[
        str | None, typer.Option(help="real arithmetic, or the deployed program; default the experiment's.")
    ] = None,
    arithmetic: Annotated[
        str | None,
        typer.Option(help="In which a deployed program runs: float64 or float32; float16 for --model."),
    ] = None,
    records: Annotated[
        str | None, typer.Option(help="Also write one record a sample to a .jsonl or .csv file.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Also write the certified images to a .npy file, for lipnext verify.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Certify a test part: clean accuracy, certified accuracy at each eps, average certified radius."""
    import numpy as np

    from lipnext import runs
    from lipnext.core.errors import ConfigError
    from lipnext.core.experiment import CertifySpec
    from lipnext.core.files import atomic_write, check_output
    from lipnext.deployment.bundle import load_experiment

    wanted = parse_eps_list(eps) if eps is not None else None
    if (run is None) == (model is None):
        raise ConfigError("give either a run folder or --model file.py:factory")
    check_output("--records", records, ".jsonl", ".csv")
    check_output("--images", images, ".npy")
    offered = ["float64", "float32"] if model is None else ["float64", "float32", "float16"]
    meaning = _semantics(semantics, arithmetic, offered)
    if run is not None:
        folder = _locate(run)
        if wanted is None:
            wanted = parse_eps_list(load_experiment(folder).certify.eps)
        certificate, test = runs.certify_run(folder, data, semantics=meaning, arithmetic=arithmetic)
    else:
        assert model is not None
        if wanted is None:
            wanted = parse_eps_list(CertifySpec().eps)
        certificate, test = runs.certify_model(model, data, meaning, arithmetic)
    if records is not None:
        write = certificate.to_csv if records.endswith(".csv") else certificate.to_jsonl
        write(records, test.labels)
    if images is not None:
        with atomic_write(images, "wb") as file:
            np.save(file, test.float_images().numpy())
    result = certificate.summary(test.labels, wanted)
    if as_json:
        _print_json(result)
        return
    _print_summary(result, f"{run or model}: {result['n']} images")
    if result["margin"] <= result["float_error"]:
        print(
            f"the error that is proved for {certificate.arithmetic} exceeds most margins; certify with "
            "--arithmetic float64"
        )


@app.command()
def analyse(
    model: Annotated[str, typer.Argument(help="A network of your own, file.py:factory; the file is run.")],
    data: Data = None,
    eps: Annotated[
        str, typer.Option(help="linf distances in pixel units of images in [0, 1], such as 2/255,8/255.")
    ] = "8/255",
    samples: Annotated[int, typer.Option(help="Images of the test part, from its start.")] = 10,
    as_json: Json = False,
) -> None:
    """Bound the local linf Lipschitz constants of a plain ReLU, tanh or sigmoid network; certify linf radii."""
    from lipnext import runs

    result = runs.analyse(model, data, eps=eps, samples=samples)
    if as_json:
        _print_json(result)
    else:
        _print_analysis(result, model)


@app.command()
def verify(
    run: Run,
    images: Annotated[str | None, typer.Option(help=".npy file written by certify --images.")] = None,
    records: Annotated[str | None, typer.Option(help=".jsonl file written by certify --records.")] = None,
    samples: Annotated[int, typer.Option(help="Radii to re-prove.")] = 100,
    as_json: Json = False,
) -> None:
    """Check a bundle with a program that shares no code with this one; exit 0 only if everything holds."""
    from lipnext.verify import main as check

    command = [str(_locate(run)), "--samples", str(samples)]
    for option, value in (("--images", images), ("--records", records)):
        command += [option, value] if value is not None else []
    raise typer.Exit(check([*command, "--json"] if as_json else command))


@app.command()
def audit(
    run: Run,
    data: Data = None,
    samples: Annotated[int, typer.Option(help="Images drawn from the test part.")] = 100,
    attacks: Annotated[
        str | None, typer.Option(help="Names, such as minimal-norm,pgd,apgd-ce; default minimal-norm,pgd.")
    ] = None,
    eps: Annotated[
        str | None, typer.Option(help="Radii in pixel units of images in [0, 1], such as 36/255,72/255.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Also write the document to a .json file; reproducers go beside it.")
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(help="Also write a page for people to an .html file (extra: lipnext[report])."),
    ] = None,
    min_cra: Annotated[
        list[str] | None,
        typer.Option(help="EPS:SHARE, such as 36/255:0.55, that the whole test part must reach; repeatable."),
    ] = None,
    semantics: Annotated[str, typer.Option(help="real arithmetic, or the deployed program.")] = "real",
    arithmetic: Annotated[
        str | None, typer.Option(help="In which a deployed program runs: float64 or float32.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Certify a test part and try to refute it by attacks, slopes and recounts on a sample; exit 5 if refuted."""
    from lipnext import reports
    from lipnext.auditing.audit import write_reproducers
    from lipnext.core.errors import ViolationError
    from lipnext.core.files import atomic_write, check_output, write_json

    check_output("--out", out, ".json")
    check_output("--html", html, ".html")
    if html is not None:
        reports.check_installed("jinja2", "matplotlib")
    _locate(run)  # says what RUN stands for
    meaning = _semantics(semantics, arithmetic, ["float64", "float32"])
    report = reports.audit(
        run,
        data,
        samples=samples,
        attacks=attacks,
        eps=eps,
        min_cra=min_cra or [],
        semantics=meaning or "real",
        arithmetic=arithmetic,
    )
    violations = report.audit.violations
    beside = Path(run) if Path(run).is_dir() else Path.cwd()
    files = write_reproducers(violations, beside if out is None else Path(out).resolve().parent)
    document = report.document | {"reproducers": [file.name for file in files]}
    if out is not None:
        write_json(out, document)
    if html is not None:
        with atomic_write(html) as file:
            file.write(report.html())
    if as_json:
        _print_json(document)
    else:
        _print_audit(document, run)
    if violations:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise ViolationError(f"refuted: {violations[0].detail}; see {files[0]}{more}")
    report.check_gates()


@app.command()
def plot(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run folders, or .jsonl files written by certify --records."),
    ],
    out: Annotated[str, typer.Option(help="The figure, a .png or .svg file.")],
    training: Annotated[
        bool, typer.Option("--training", help="Draw the training logs instead of certified accuracy.")
    ] = False,
) -> None:
    """Draw certified accuracy against radius, or the training, of several runs (extra: lipnext[report])."""
    from lipnext import reports

    reports.plot(runs, out, training=training)
    print(out)


@app.command()
def export(
    run: Run,
    to: Annotated[str, typer.Option(help="onnx, torch (a torch.export program), safetensors or vnnlib.")],
    out: Annotated[
        str,
        typer.Option(help="The file: .onnx, .pt2, .safetensors or .vnnlib; programs get OUT.json beside."),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="In which an onnx or torch program computes: float64 (default) or float32."),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(help="For vnnlib: number of an image of the test part.")
    ] = None,
    eps: Annotated[
        str | None, typer.Option(help="For vnnlib: l2 radius of the ball, such as 36/255.")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Write the network for another runtime, with its certificate, or a query for another verifier."""
    from lipnext import runs
    from lipnext.core.errors import ConfigError

    if to == "vnnlib":
        if sample is None or eps is None or dtype is not None:
            raise ConfigError("export to vnnlib takes --sample and --eps, and no --dtype")
        report = runs.export_query(_locate(run), out, sample=sample, eps=eps, data=data)
        text = f"image {sample}, label {report['label']}, certified radius {round_down(report['radius'], 6)}"
    else:
        if sample is not None or eps is not None or data is not None:
            raise ConfigError("--sample, --eps and --data are for --to vnnlib; leave them out")
        if to == "safetensors" and dtype is not None:
            raise ConfigError("export to safetensors keeps the weights as they are stored; leave --dtype out")
        report = runs.export(_locate(run), to, out, dtype=dtype or "float64")
        text = f"{report['bytes']} bytes"
        if "checked" in report:
            text += (
                f", {report['arithmetic']}, read back and run on {report['checked']} random images: margins differ by "
                f"{report['difference']:.1e} at most, {report['allowed']:.1e} is allowed"
            )
    if as_json:
        _print_json(report)
    else:
        print(f"{out}: {text}; weights {report['model_sha256'][:12]}")


@app.command()
def push(
    run: Run,
    name: Annotated[str, typer.Argument(help="The repository on the Hugging Face hub, owner/name.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent; send nothing.")
    ] = False,
    out: Annotated[str | None, typer.Option(help="Also keep what is sent in this new folder.")] = None,
    as_json: Json = False,
) -> None:
    """Send a finished run to the Hugging Face hub, with a model card of its measured numbers."""
    from lipnext import runs

    report = runs.push(_locate(run), name, out, dry_run=dry_run)
    if as_json:
        _print_json(report)
        return
    for file, size in report["files"].items():
        print(f"{size:>9}  {file}")
    print(f"sent nothing to {name}" if report["url"] is None else report["url"])


zoo = typer.Typer(no_args_is_help=True, help="The packaged models: list them, derive their numbers again.")
app.add_typer(zoo, name="zoo")


@zoo.command("list")
def zoo_list(as_json: Json = False) -> None:
    """List the packaged models with what was measured."""
    from lipnext.zoo import entries

    rows = entries()
    if as_json:
        _print_json(rows)
        return
    table = Table("model", "clean", *(f"CRA {name}" for name in rows[0]["cra"]), "ACR")
    for row in rows:
        shares = [_share(share, row["n"]) for share in (row["clean"], *row["cra"].values())]
        table.add_row(row["name"], *(round_down(share, 4) for share in (*shares, row["acr"])))
    Console().print(table)
    for row in rows:
        print(
            f"{row['name']}: {row['system']}/{row['preset']}, {row['norm']} {row['kind']}, semantics {row['semantics']}, "
            f"weights {row['model_sha256'][:12]}"
        )


@zoo.command("verify")
def zoo_verify(
    names: Annotated[list[str] | None, typer.Argument(help="Which; default all.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Derive every published number again, as far as the data is at hand; exit 0 only if all of it holds."""
    from lipnext.core.errors import ConfigError
    from lipnext.deployment.locate import packaged
    from lipnext.zoo import check

    if data is not None and len(names or []) != 1:
        raise ConfigError(
            "--data is the data set of one model; name it, as in lipnext zoo verify fashion-mnist"
        )
    reports = []
    for name in names or packaged():
        report = check(name, data)
        reports.append(report)
        if not as_json:
            verdict = "holds" if report["holds"] else "; ".join(report["problems"])
            print(f"{name}: {verdict} (bundle verified; test part: {report['test']})", flush=True)
    if as_json:
        _print_json(reports)
    if not all(report["holds"] for report in reports):
        raise typer.Exit(1)


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(help="Run folders, and experiments to train, such as lipnext/digits cll/digits."),
    ],
    data: Data = None,
    folder: Annotated[str, typer.Option(help="Where the experiments are trained.")] = "runs/compare",
    minutes: Annotated[
        float | None,
        typer.Option(help="Training time of each experiment; its epochs are what fits, measured here."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each experiment.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each experiment: seeds 0, 1, ...")] = 1,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, for each experiment; repeatable.")
    ] = None,
    eps: Annotated[
        str, typer.Option(help="Radii in pixel units of images in [0, 1].")
    ] = "36/255,72/255,108/255,1",
    attacked: Annotated[int, typer.Option(help="Test images to attack; 0 is none.")] = 0,
    images: Annotated[
        int | None, typer.Option(help="Test images to certify, evenly spaced; all if left out.")
    ] = None,
    norm: Annotated[
        str | None,
        typer.Option(help="Convert all radii to this norm, l2 or linf, by the factor of the dimension."),
    ] = None,
    nearest_neighbour: Annotated[
        bool, typer.Option(help="The nearest-neighbour certificate of the training part as a row.")
    ] = True,
    out: Annotated[str | None, typer.Option(help="Also write the table to a .json file.")] = None,
    figure: Annotated[
        str | None, typer.Option(help="Also draw certified accuracy against radius to a .png or .svg file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train or load several runs on the same data and certify them: a table for each norm and kind, paired intervals."""
    from lipnext.comparison import compare as compare_runs
    from lipnext.comparison import curves
    from lipnext.core.errors import ConfigError, ViolationError
    from lipnext.core.files import check_output, write_json
    from lipnext.deployment import figures

    check_output("--out", out, ".json")
    check_output("--figure", figure, ".png", ".svg")
    if figure is not None:
        figures.check_installed("matplotlib")
    norms = {"l2": 2.0, "linf": math.inf}
    if norm is not None and norm not in norms:
        raise ConfigError(
            f"--norm must be l2 or linf, got '{norm}'; leave it out to keep every radius in its own"
        )
    document = compare_runs(
        what,
        data=data,
        folder=folder,
        minutes=minutes,
        epochs=epochs,
        seeds=seeds,
        overrides=overrides or [],
        eps=eps,
        attacked=attacked,
        images=images,
        norm=None if norm is None else norms[norm],
        nearest_neighbour=nearest_neighbour,
    )
    if out is not None:
        write_json(Path(out), document)
    if figure is not None:
        figures.save(figures.certified_accuracy(curves(document)), Path(figure))
    if as_json:
        _print_json(document)
    else:
        _print_comparison(document)
    rows = [row for table in document["tables"] for row in table["rows"]]
    refuted = [row["name"] for row in rows if row["attacked"] and row["attacked"]["violations"]]
    if refuted:
        raise ViolationError(f"refuted: {', '.join(refuted)}; lipnext audit the run to see how")


@app.command()
def plan(
    what: Annotated[str, typer.Argument(help="An experiment, such as imagenet-1b, or a YAML file.")],
    gpus: Annotated[int, typer.Option(help="Devices, each with one process.")] = 1,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, or cpu: this machine, measured.")] = "h100",
    data: Data = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, such as train.accumulate=2; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate memory, communication and time of a training before it is started."""
    from lipnext import planning, runs

    changes = ["train.device=cpu", *(overrides or [])]  # planned here, whatever it is to run on
    document = planning.plan(runs.resolve(what, data, changes), gpus=gpus, gpu=gpu, data=data)
    if as_json:
        _print_json(document)
    else:
        _print_plan(document)


@app.command()
def serve(
    run: Annotated[str, typer.Argument(help="A run folder, or any folder with a bundle.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine reach it only if you say so.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    abstain_below: Annotated[
        str | None, typer.Option(help="Tell no label unless its radius is above, such as 36/255.")
    ] = None,
    token_file: Annotated[
        str | None,
        typer.Option(help="File with the token that clients must send; or the variable LIPNEXT_TOKEN."),
    ] = None,
) -> None:
    """Answer requests for labels and radii over HTTP, with a page for people (extra: lipnext[serve])."""
    from lipnext.core.eps import parse_eps
    from lipnext.core.errors import ConfigError
    from lipnext.deployment.locate import locate

    least = None if abstain_below is None else parse_eps(abstain_below)
    token = os.environ.get("LIPNEXT_TOKEN")
    if token_file is not None:
        token = Path(token_file).read_text(encoding="utf-8").strip()
    folder = locate(run)
    try:
        from lipnext.serving.server import is_loopback
        from lipnext.serving.server import serve as serve_bundle
    except ImportError as error:
        raise ConfigError(f'serve needs {error.name}; pip install "lipnext[serve]"') from error
    if token is None and not is_loopback(host):
        print(
            f"lipnext: warning: everybody who reaches {host} port {port} can use this server; set LIPNEXT_TOKEN or "
            "--token-file",
            file=sys.stderr,
        )

    def ready(url: str) -> None:
        print(f"serving {run} on {url}; Ctrl-C stops", flush=True)

    serve_bundle(folder, host, port, token=token, abstain_below=least, ready=ready)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A network of your own, file.py:factory; the file is run.")
    ] = None,
    shape: Annotated[str, typer.Option(help="C,H,W of one of its images.")] = "1,8,8",
    as_json: Json = False,
) -> None:
    """Check this machine with a tiny model; or list the operations of a network with their bounds."""
    if model is not None:
        _examine_model(model, shape, as_json)
        return
    from lipnext.doctor import examine

    checks = examine()
    healthy = all(check.passed for check in checks)
    if as_json:
        _print_json({"healthy": healthy, "checks": [vars(check) for check in checks]})
    else:
        table = Table("check", "", "what was seen")
        for check in checks:
            table.add_row(check.name, "[green]ok[/]" if check.passed else "[bold red]FAILED[/]", check.detail)
        Console().print(table)
    if not healthy:
        raise typer.Exit(1)


def _locate(run: str) -> Path:
    """Find what RUN stands for; say so where it is no folder of the user's."""
    from lipnext.deployment.locate import locate

    folder = locate(run)
    if folder != Path(run):
        print(f"lipnext: {run} is {folder}", file=sys.stderr)
    return folder


def _examine_model(model: str, shape: str, as_json: bool) -> None:
    from lipnext.core.errors import ConfigError, UnsoundError
    from lipnext.doctor import examine_model

    sides = shape.split(",")
    if len(sides) != 3 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ConfigError(f"--shape must be C,H,W, such as 3,32,32, got '{shape}'")
    channels, height, width = map(int, sides)
    rows = examine_model(model, (channels, height, width))
    problems = [row for row in rows if row.problem is not None]
    if as_json:
        _print_json({"certifiable": not problems, "operations": [vars(row) for row in rows]})
    else:
        table = Table("place", "operation", "bound", "proof", "K from the image")
        for row in rows:
            known = [None if k is None else round_up(k, 6) for k in (row.bound, row.lipschitz)]
            text = row.operation if row.problem is None else f"[bold red]{escape(row.problem)}[/]"
            table.add_row(row.place, text, known[0] or "", row.proof or "", known[1] or "")
        Console().print(table)
    if problems:
        raise UnsoundError(f"cannot certify {problems[0].place}: {problems[0].problem}")


def _print_summary(result: dict[str, Any], title: str) -> None:
    table = Table(
        "clean", *(f"CRA {name}" for name in result["cra"]), "ACR", title=title, title_justify="left"
    )
    shares = [_share(share, result["n"]) for share in (result["clean"], *result["cra"].values())]
    table.add_row(*(round_down(share, 4) for share in (*shares, result["acr"])))
    console = Console()
    console.print(table)
    bound = result["lipschitz"]
    executed = f" in {result['arithmetic']}" if result["semantics"] == "deployed" else ""
    votes = ""
    if result["kind"] == "probabilistic":
        votes = f" (confidence {result['confidence']:.9g} an image, {result['abstained']} abstained)"
    console.print(
        f"{result['norm']} {result['kind']}{votes}, semantics {result['semantics']}{executed}, "
        f"median margin {result['margin']:.4f}, float error {result['float_error']:.1e}, "
        f"Lipschitz bound {round_up(bound['bound'], 9)} "
        f"(proved: {bound['proof']}), weights {result['model_sha256'][:12]}",
        highlight=False,
    )


def _print_plan(document: dict[str, Any]) -> None:
    """Sizes in GiB of one rank."""
    gib = 2**30
    sizes = "  ".join(f"{name} {size / gib:.2f}" for name, size in document["bytes"].items())
    title = f"{document['preset'] or document['system']} on {document['devices']} x {document['device']}"
    names = (
        "train.activations",
        "stored GiB",
        "in all GiB",
        "fits",
        "passes s",
        "manifold s",
        "waiting s",
        "step s",
    )
    table = Table(*names, "epoch h", "device h", title=title, title_justify="left")
    for mode, row in document["activations"].items():
        seconds = (f"{row['seconds'][key]:.3g}" for key in ("passes", "manifold", "waiting", "step"))
        table.add_row(
            mode,
            f"{row['activations'] / gib:.2f}",
            f"{row['memory'] / gib:.2f}",
            "yes" if row["fits"] else "no",
            *seconds,
            f"{row['epoch_hours']:.3g}",
            f"{row['epoch_device_hours']:.3g}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    console.print(
        f"{document['parameters']:,} parameters, {document['flops_per_image'] / 1e9:.4g} GFLOP an image, "
        f"{document['images_per_pass']} images a pass; GiB: {sizes}; sent {document['sent_per_step'] / gib:.2f} GiB a step. "
        f"Estimates: {100 * document['efficiency_assumed']:.0f} % of the published rates are assumed to be reached."
        if document["device"] != "cpu"
        else f"{document['parameters']:,} parameters, {document['flops_per_image'] / 1e9:.4g} GFLOP an image; GiB: {sizes}. "
        "Estimates from rates measured on this machine."
    )


def _print_analysis(result: dict[str, Any], model: str) -> None:
    """Constants are upper bounds and rounded up, radii down."""
    _print_summary(result, f"{model}: {result['n']} images")
    console = Console(highlight=False)
    for eps in result["cra"]:
        title = f"largest constant of a margin of the label, within linf {eps}"
        names = ("image", "label", "true", "radius", "joint", "recurjac", "interval", "up", "down")
        table = Table(*names, title=title, title_justify="left", box=box.SIMPLE)
        for row in result["images"]:
            found = row["constants"][eps]
            table.add_row(
                *(str(row[key]) for key in ("index", "label", "true")),
                round_down(row["radius"], 6),
                *(round_up(found[method], 4) for method in ("joint", "recurjac", "interval")),
                *(str(len(row[key][eps])) for key in ("growing", "falling")),
            )
        console.print(table)
    console.print("up, down: number of pixels with which the label's logit can only grow, or only fall")


def _share(share: float, n: int) -> Fraction:
    """The exact share that a float stands for: 8841 of 10,000 is printed as 0.8841, though the float lies below it."""
    return Fraction(round(share * n), n)


def _semantics(semantics: str | None, arithmetic: str | None, offered: list[str]) -> "Semantics | None":
    """The semantics as it was typed, if it is one and fits the arithmetic."""
    from lipnext.core.errors import ConfigError

    if semantics not in (None, "real", "deployed"):
        raise ConfigError(f"--semantics must be real or deployed, got '{semantics}'")
    if arithmetic is not None and semantics != "deployed":
        raise ConfigError("--arithmetic is that of a deployed program; add --semantics deployed")
    if arithmetic not in (None, *offered):
        raise ConfigError(f"--arithmetic must be {' or '.join(offered)}, got '{arithmetic}'")
    return cast("Semantics | None", semantics)


def _print_audit(document: dict[str, Any], run: str) -> None:
    """Certified accuracy is a lower bound and rounded down, attacked accuracy an upper one and rounded up."""
    n = document["n"]
    title = f"{run}: {n} images, clean {round_down(_share(document['clean'], n), 4)}"
    shares = Table("accuracy", *document["cra"], title=title, title_justify="left")
    whole = document["test_part"]
    shares.add_row(
        f"certified, all {whole['n']}",
        *(round_down(_share(share, whole["n"]), 4) for share in whole["cra"].values()),
    )
    for name, key, rounded in (
        ("certified", "cra", round_down),
        ("attacked", "attacked", round_up),
        ("gap", "gap", round_up),
    ):
        shares.add_row(name, *(rounded(_share(share, n), 4) for share in document[key].values()))
    slopes = Table("layer", "proved bound", "proof", "slope found", "")
    for layer in document["slopes"]:
        seen = "[green]ok[/]" if layer["holds"] else "[bold red]REFUTED[/]"
        slopes.add_row(
            layer["name"], round_up(layer["bound"], 9), layer["proof"], f"{layer['estimate']:.9f}", seen
        )
    checks = Table("counted again", "", "what was seen")
    for check in document["checks"]:
        seen = "[green]ok[/]" if check["holds"] else "[bold red]REFUTED[/]"
        checks.add_row(check["name"], seen, check["detail"])
    console = Console()
    for table in (shares, slopes, checks):
        console.print(table)
    inside = sum(violation["kind"] in ("attack", "rounding") for violation in document["violations"])
    closest = document["closest"]
    console.print(
        f"{inside} successes inside a radius; "
        + ("no attack succeeded" if closest is None else f"the closest attack needed {closest:.4f} radii")
        + f"; {document['norm']} {document['kind']}, semantics {document['semantics']}, "
        f"weights {document['model_sha256'][:12]}",
        highlight=False,
    )


def _print_comparison(document: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)  # a file takes the whole table
    for table in document["tables"]:
        _print_table(table, document["n"], console)
    level = 100 * document["bootstrap"]["level"]
    console.print(f"±: half the widest {level:.0f} % interval of a row", highlight=False)


def _print_table(table: dict[str, Any], n: int, console: Console) -> None:
    """Certified shares are rounded down, attacked ones and constants up."""
    rows = table["rows"]
    names = list(rows[0]["cra"])
    title = f"{n} test images, {table['norm']} {table['kind']}, semantics {table['semantics']}"
    model = partial(Column, "model", no_wrap=True)
    shares = Table(
        model(), "clean", *(f"CRA {e}" for e in names), "ACR", "±", title=title, title_justify="left"
    )
    facts = Table(
        model(), "parameters", "minutes", "trained/s", "certified/s", "K proved", "K published", "seeds"
    )
    for row in rows:
        count = n * len(row["seeds"])
        cells = [round_down(_share(share, count), 4) for share in (row["clean"], *row["cra"].values())]
        spread = max(high - low for low, high in row["interval"].values()) / 2
        shares.add_row(row["name"], *cells, round_down(row["acr"], 4), round_up(spread, 3))
        bound, published = row["lipschitz"], row.get("published")
        speeds = [row.get("training_images_per_second"), row.get("certified_images_per_second")]
        facts.add_row(
            row["name"],
            f"{row['parameters']:,}",
            "" if row.get("minutes") is None else f"{row['minutes']:.1f}",
            *("" if speed is None else f"{speed:.0f}" for speed in speeds),
            "" if bound is None else round_up(bound["bound"], 5),
            "" if published is None else f"{published['constant']:.5f}",
            str(len(row["seeds"])),
        )
    console.print(shares)
    console.print(facts)
    converted = [row["name"] for row in rows if row["converted"]]
    if converted:
        console.print(f"converted from another norm: {', '.join(converted)}", highlight=False)
    for row in rows:
        if row["attacked"]:
            left = ", ".join(f"{e} {round_up(s, 4)}" for e, s in row["attacked"]["accuracy"].items())
            console.print(
                f"{row['name']}: attacked accuracy of {row['attacked']['n']} images {left}; "
                f"{row['attacked']['violations']} refuted",
                highlight=False,
            )


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))


def main() -> None:
    """Run the command line; a `LipnextError` is one line on standard error and its exit code."""
    try:
        app(prog_name="lipnext")
    except LipnextError as error:
        print(f"lipnext: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("lipnext: interrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as stop:
        # typer turns Ctrl-C into this code without a word; a training that saved has told so itself
        if type(stop) is SystemExit and stop.code == 130:
            print("lipnext: interrupted", file=sys.stderr)
        raise
    except BrokenPipeError:  # the reader of a pipe went away, as in `lipnext systems | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        print("lipnext: out of memory; lower train.batch_size or certify.batch_size", file=sys.stderr)
        sys.exit(4)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"lipnext: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(4)

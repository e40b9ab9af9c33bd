"""The command line: verbs only. Each imports what it needs when it runs, so that `--help` is instant."""

import inspect
import json
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
    if as_json:
        _print_json(result)
        return
    _print_summary(result, f"{folder}: test part, {result['n']} images, trained in {result['minutes']} min")


@app.command()
def certify(
    run: Annotated[
        str | None, typer.Argument(help="A run folder, or any folder with a bundle; or --model instead.")
    ] = None,
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
    from lipnext.core.files import atomic_write
    from lipnext.deployment.bundle import load_experiment

    wanted = parse_eps_list(eps) if eps is not None else None
    if (run is None) == (model is None):
        raise ConfigError("give either a run folder or --model file.py:factory")
    if records is not None and not records.endswith((".jsonl", ".csv")):
        raise ConfigError(f"--records must end in .jsonl or .csv, got '{records}'")
    if images is not None and not images.endswith(".npy"):
        raise ConfigError(f"--images must end in .npy, got '{images}'")
    if semantics not in (None, "real", "deployed"):
        raise ConfigError(f"--semantics must be real or deployed, got '{semantics}'")
    if arithmetic is not None and semantics != "deployed":
        raise ConfigError("--arithmetic is that of a deployed program; add --semantics deployed")
    offered = ["float64", "float32"] if model is None else ["float64", "float32", "float16"]
    if arithmetic not in (None, *offered):
        raise ConfigError(f"--arithmetic must be {' or '.join(offered)}, got '{arithmetic}'")
    for option, path in (("--records", records), ("--images", images)):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise ConfigError(f"{option}: the folder {Path(path).resolve().parent} does not exist")
    meaning = cast("Semantics | None", semantics)
    if run is not None:
        if wanted is None:
            wanted = parse_eps_list(load_experiment(Path(run)).certify.eps)
        certificate, test = runs.certify_run(run, data, semantics=meaning, arithmetic=arithmetic)
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
def verify(
    run: Annotated[str, typer.Argument(help="A run folder, or any folder with a bundle.")],
    images: Annotated[str | None, typer.Option(help=".npy file written by certify --images.")] = None,
    records: Annotated[str | None, typer.Option(help=".jsonl file written by certify --records.")] = None,
    samples: Annotated[int, typer.Option(help="Radii to re-prove.")] = 100,
    as_json: Json = False,
) -> None:
    """Check a bundle with a program that shares no code with this one; exit 0 only if everything holds."""
    from lipnext.verify import main as check

    command = [run, "--samples", str(samples)]
    for option, value in (("--images", images), ("--records", records)):
        command += [option, value] if value is not None else []
    raise typer.Exit(check([*command, "--json"] if as_json else command))


@app.command()
def audit(
    run: Annotated[str, typer.Argument(help="A run folder, or any folder with a bundle.")],
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
    as_json: Json = False,
) -> None:
    """Try to refute a run's certificates by attacks, slopes and recounts; exit 5 if one is refuted."""
    from lipnext import runs
    from lipnext.auditing.audit import write_reproducers
    from lipnext.core.errors import ConfigError, ViolationError
    from lipnext.core.files import atomic_write

    if out is not None and not out.endswith(".json"):
        raise ConfigError(f"--out must end in .json, got '{out}'")
    if out is not None and not Path(out).resolve().parent.is_dir():
        raise ConfigError(f"--out: the folder {Path(out).resolve().parent} does not exist")
    found = runs.audit(run, data, samples=samples, attacks=attacks, eps=eps)
    files = write_reproducers(found.violations, Path(run) if out is None else Path(out).resolve().parent)
    document = found.document() | {"reproducers": [path.name for path in files]}
    if out is not None:
        with atomic_write(out) as file:
            file.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    if as_json:
        _print_json(document)
    else:
        _print_audit(document, run)
    if found.violations:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise ViolationError(f"refuted: {found.violations[0].detail}; see {files[0]}{more}")


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
    console.print(
        f"{result['norm']} {result['kind']}, semantics {result['semantics']}{executed}, "
        f"median margin {result['margin']:.4f}, float error {result['float_error']:.1e}, "
        f"Lipschitz bound {round_up(bound['bound'], 9)} "
        f"(proved: {bound['proof']}), weights {result['model_sha256'][:12]}",
        highlight=False,
    )


def _share(share: float, n: int) -> Fraction:
    """The exact share that a float stands for: 8841 of 10,000 is printed as 0.8841, though the float lies below it."""
    return Fraction(round(share * n), n)


def _print_audit(document: dict[str, Any], run: str) -> None:
    """Certified accuracy is a lower bound and rounded down, attacked accuracy an upper one and rounded up."""
    n = document["n"]
    title = f"{run}: {n} images, clean {round_down(_share(document['clean'], n), 4)}"
    shares = Table("accuracy", *document["cra"], title=title, title_justify="left")
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
    inside = sum(violation["kind"] == "attack" for violation in document["violations"])
    closest = document["closest"]
    console.print(
        f"{inside} successes inside a radius; "
        + ("no attack succeeded" if closest is None else f"the closest attack needed {closest:.4f} radii")
        + f"; {document['norm']} {document['kind']}, semantics {document['semantics']}, "
        f"weights {document['model_sha256'][:12]}",
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

"""`lipnext audit --html --min-cra` and `lipnext plot`: what they write, their exit codes, and bad input in one line."""

import json
import re
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Call
from tiny_runs import DIGITS

from lipnext import reports, runs
from lipnext.core.errors import ConfigError
from lipnext.deployment.report import FORMS, exact_share, render

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: report)")
pytest.importorskip("jinja2", reason="Jinja2 is not installed (extra: report)")

ONE = ("--samples", "1", "--attacks", "pgd")
IMAGES = 359
"""In the test part of the digits."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "a & <b>"
    runs.train("lipnext/digits", folder, overrides=DIGITS)
    return folder


@pytest.fixture(scope="module")
def report(finished: Path) -> reports.AuditReport:
    return reports.audit(finished, samples=12, attacks="minimal-norm", min_cra=["36/255:0.01", "10:0"])


@pytest.fixture(scope="module")
def html(report: reports.AuditReport) -> str:
    return report.html()


class Page(HTMLParser):
    """The numbers of a page with their places, and everything that could leave it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers: list[tuple[list[Any], Any, str]] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self._number: tuple[list[Any], Any] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [given[key] for key in ("src", "href", "xlink:href") if key in given]
        if tag == "data":
            self._number = json.loads(given["data-path"]), json.loads(given["value"])

    def handle_data(self, data: str) -> None:
        if self._number is not None:
            self.numbers.append((*self._number, data))
            self._number = None


def look_up(document: Any, path: list[Any]) -> Any:
    for key in path:
        document = document[key]
    return document


# ---- The document and the page


def test_the_document_tells_test_part_and_sample_apart(report: reports.AuditReport, finished: Path) -> None:
    document = json.loads(json.dumps(report.document, allow_nan=False))
    certificate, test = runs.certify_run(finished)
    whole = document["test_part"]
    assert (whole["n"], document["n"]) == (len(test), 12)
    assert whole["clean"] == certificate.clean_accuracy(test.labels)
    for eps, share in whole["cra"].items():
        assert share == certificate.accuracy_at(eps, test.labels)
    assert document["run"] == "a & <b>"
    assert document["data"] == {"name": "digits", "shape": [1, 8, 8], "sha256": test.sha256()}
    assert [epoch["epoch"] for epoch in document["training"]] == [1, 2]
    assert {layer["proof"] for layer in document["slopes"]} == set(document["proofs"])
    gate, reached_exactly = document["gates"]
    assert gate["holds"]
    assert reached_exactly["holds"]
    assert reached_exactly["certified"] == 0
    assert gate["cra"] == whole["cra"]["36/255"] == gate["certified"] / gate["n"]


def test_every_number_of_the_page_is_that_of_the_document_rounded_to_the_safe_side(
    report: reports.AuditReport, html: str
) -> None:
    page = Page(html)
    assert len(page.numbers) > 100
    places = [path for path, _, _ in page.numbers]
    for path in (["test_part", "clean"], ["test_part", "cra", "36/255"], ["attacked", "36/255"], ["closest"]):
        assert path in places
    for path, value, text in page.numbers:
        assert look_up(report.document, path) == value, path
        printed = Fraction(re.sub("[ %,]", "", text)) / (100 if "%" in text else 1)
        exact = exact_share(value) if "%" in text else Fraction(value)
        assert abs(printed - exact) <= max(Fraction(1, 10**4), abs(exact) / 100), path
        if {"cra", "clean", "radius", "acr", "median_radius"} & set(map(str, path)):
            assert printed <= exact, path
        if {"attacked", "gap", "distance", "bound"} & set(map(str, path)):
            assert printed >= exact, path


def test_shares_are_printed_exactly_though_floats_lie_beside_them() -> None:
    assert FORMS["share"](8841 / 10000) == "88.41 %"
    assert FORMS["share_up"](0.55 - 0.52) == "3.00 %"
    assert FORMS["share"](2 / 3) == "66.66 %"
    assert FORMS["share_up"](2 / 3) == "66.67 %"
    assert FORMS["down"](0.99999) == "0.9999"
    assert FORMS["bound"](1.0000000001) == "1.000000001"


def test_the_page_asks_for_nothing_and_lets_no_name_become_markup(html: str) -> None:
    page = Page(html)
    assert "script" not in page.tags
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.findall(r"url\((?!#)", html)
    assert "<b>" not in html
    assert "a &amp; &lt;b&gt;" in html
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert page.tags.count("table") == page.tags.count("caption") > 6
    assert page.tags.count("img") == html.count('alt="') > 6
    assert len(html.encode()) < 3_000_000
    for words in (
        "Nothing was refuted",
        "12</data>",
        "does not cover",
        "python verify.py &#39;a &amp; &lt;b&gt;&#39;",
    ):
        assert words in html


def test_a_refuted_audit_says_so_first(report: reports.AuditReport) -> None:
    document = report.document | {
        "holds": False,
        "closest": 0.5,
        "violations": [{"kind": "attack", "detail": "sample 3: <pgd> changes the label"}],
        "training": [],
    }
    pictures = [(shown.image, None) for shown in report.audit.gallery]
    text = render(document, report.certificate.radius, report.certificate.label == report.truth, pictures)
    assert "Nothing was refuted" not in text
    for words in (
        "REFUTED.",
        "sample 3: &lt;pgd&gt; changes the label",
        "a radius is refuted",
        "No attack succeeded",
    ):
        assert words in text
    assert 'id="training"' not in text


def test_many_classes_and_large_pictures_stay_a_small_page(report: reports.AuditReport) -> None:
    unknown = dict.fromkeys(report.document["cra"])
    rows = [{"name": f"class {k}", "n": 0, "clean": None, "cra": unknown, "acr": None} for k in range(30)]
    matrix = [[0] * 31 for _ in rows]
    matrix[4][7] = 12
    confusion = dict.fromkeys(report.document["cra"], matrix)
    test = report.document["test_part"] | {"classes": rows, "confusion": confusion}
    noise = torch.rand(3, 400, 300, generator=torch.Generator().manual_seed(0))
    pictures = [(noise, noise + 0.1) for _ in report.audit.gallery]
    document = report.document | {"test_part": test}
    text = render(document, report.certificate.radius, report.certificate.label == report.truth, pictures)
    assert "most frequent wrong labels" in text
    assert re.search('class 4</th><td class="text">class 7</td><td><data [^>]*>12</data>', text)
    assert len(text.encode()) < 3_000_000


def test_the_gallery_is_chosen_by_radius_and_shows_attacks_that_change_the_label(
    report: reports.AuditReport, finished: Path
) -> None:
    model, certificate = runs.load(finished), report.audit.certificate
    right = certificate.label == report.audit.truth
    entries = report.document["gallery"]
    radii = {
        group: [e["radius"] for e in entries if e["group"] == group] for group in ("least", "most", "wrong")
    }
    sure = sorted(certificate.radius[right].tolist())
    assert radii["least"] == sure[: len(radii["least"])]
    assert radii["most"] == sure[::-1][: len(radii["most"])]
    assert radii["wrong"] == sorted(certificate.radius[~right].tolist(), reverse=True)[:6]
    assert len({e["idx"] for e in entries}) == len(entries) > 4
    for shown, entry in zip(report.audit.gallery, entries, strict=True):
        assert shown.perturbed is not None
        assert entry["becomes"] != entry["pred"]
        change = shown.perturbed - shown.image
        # the point lies on the boundary; a little behind it the other label is sure
        assert int(model(shown.image[None] + 1.001 * change[None].float()).argmax()) == entry["becomes"]
        assert torch.linalg.vector_norm(change).item() == pytest.approx(entry["distance"], rel=1e-9)


# ---- The command line


def test_the_page_is_written_beside_the_document(call: Call, finished: Path, tmp_path: Path) -> None:
    page, out = tmp_path / "a.html", tmp_path / "a.json"
    code, _, err = call("audit", finished, *ONE, "--html", page, "--out", out)
    assert (code, err) == (0, "")
    assert sorted(tmp_path.iterdir()) == [page, out]
    document = json.loads(out.read_text())
    for path, value, _ in Page(page.read_text()).numbers:
        assert look_up(document, path) == value


@pytest.mark.parametrize(("least", "expected"), [("0.05", 0), ("1", 1)])
def test_a_gate_decides_on_the_whole_test_part(call: Call, finished: Path, least: str, expected: int) -> None:
    code, out, err = call("audit", finished, *ONE, "--min-cra", f"1/255:{least}", "--json")
    assert code == expected
    (gate,) = json.loads(out)["gates"]
    assert (gate["holds"], gate["n"], gate["required"]) == (code == 0, IMAGES, least)
    share = r"certified accuracy at 1/255 is 0\.\d{4} on 359 images, below the required 1"
    assert re.fullmatch(f"lipnext: {share}\n" if code else "", err)


def test_required_shares_are_read_exactly() -> None:
    required = reports.parse_min_cra(["36/255:0.55", "0.1: 1e-1"])
    assert reports.parse_min_cra(["1:0e999999999"])["1"][1] == 0  # as a Fraction it would fill the memory
    assert required == {
        "36/255": (Fraction(36, 255), Fraction(55, 100), "0.55"),
        "0.1": (Fraction(1, 10), Fraction(1, 10), "1e-1"),
    }
    with pytest.raises(ConfigError, match="eps 72/510 is given twice"):
        reports.parse_min_cra(["36/255:0.5", " 72/510 : 0.5"])


def one_line(code: int, out: str, err: str, *, words: str) -> None:
    assert (code, out) == (2, "")
    assert err.startswith("lipnext: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--min-cra", "36/255"], "--min-cra must be EPS:SHARE, such as 36/255:0.55, got '36/255'"),
        (
            ["--min-cra", "36/255:55"],
            "--min-cra: the share must be a number in [0, 1], such as 0.55, got '55'",
        ),
        (["--min-cra", "36/255:nan"], "the share must be a number in [0, 1], such as 0.55, got 'nan'"),
        (["--min-cra", "36/255:"], "the share must be a number in [0, 1], such as 0.55, got ''"),
        (["--min-cra", "36:0.5"], "36 looks like 8-bit units, write 36/255"),
        (
            ["--min-cra", "0.1:0.5", "--min-cra", "1/10:0.6"],
            "--min-cra: eps 1/10 is given twice; leave one out",
        ),
        (["--html", "a.htm"], "--html must end in .html, got 'a.htm'"),
        (["--html", "/nowhere/a.html"], "--html: the folder /nowhere does not exist"),
    ],
)
def test_bad_options_of_audit_are_one_line(
    arguments: list[str], words: str, call: Call, finished: Path
) -> None:
    one_line(*call("audit", finished, *arguments), words=words)


def test_without_the_extra_nothing_is_attacked(
    call: Call, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else name)
    monkeypatch.setattr(runs, "audit", None)
    one_line(
        *call("audit", finished, "--html", tmp_path / "a.html"),
        words='jinja2 is not installed; run: pip install "lipnext[report]"',
    )


# ---- plot


@pytest.fixture(scope="module")
def records(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    certificate, test = runs.certify_run(finished)
    path = tmp_path_factory.mktemp("records") / "radii.jsonl"
    certificate.to_jsonl(path, test.labels)
    return path


def test_a_run_and_its_records_give_the_same_curve(finished: Path, records: Path) -> None:
    ours, read = reports._curve("run", str(finished)), reports._curve("records", str(records))
    assert ours.radius.tolist() == read.radius.tolist()
    assert ours.accuracy.tolist() == read.accuracy.tolist()
    assert (read.norm, read.kind) == ("l2", "deterministic")


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_plot_writes_certified_accuracy_and_training(
    name: str, call: Call, finished: Path, records: Path, tmp_path: Path
) -> None:
    for more, words in (
        ((finished, records), "certified accuracy"),
        ((finished, "--training"), "training loss"),
    ):
        code, out, err = call("plot", *more, "--out", tmp_path / name)
        assert (code, out, err) == (0, f"{tmp_path / name}\n", "")
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert name == "a.png" or words in (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"norm": "linf"},
            "radii is l2 and changed is linf; radii of another norm cannot be compared, draw them apart",
        ),
        (
            {"kind": "probabilistic"},
            "radii is deterministic and changed is probabilistic; radii of another kind",
        ),
        ({"norm": "l1"}, "changed.jsonl: the norm must be one of l2, linf, got 'l1'"),
        (
            {"radius": -1.0},
            "line 1 is no record of lipnext certify --records FILE.jsonl; write the file again",
        ),
        ({"radius": "0.5"}, "line 1 is no record"),
        ({"correct": None}, "line 1 is no record"),
        ({"norm": ["l2"]}, "line 1 is no record"),
    ],
)
def test_records_that_do_not_fit_are_one_line(
    fields: dict[str, Any], words: str, call: Call, records: Path, tmp_path: Path
) -> None:
    path = tmp_path / "changed.jsonl"
    lines = [json.dumps(json.loads(line) | fields) for line in records.read_text().splitlines()]
    path.write_text("\n".join(lines))
    one_line(*call("plot", records, path, "--out", tmp_path / "a.png"), words=words)
    assert not (tmp_path / "a.png").exists()


def test_bad_input_of_plot_is_one_line(call: Call, finished: Path, records: Path, tmp_path: Path) -> None:
    empty, half, mixed = (tmp_path / f"{name}.jsonl" for name in ("empty", "half", "mixed"))
    empty.write_text("")
    half.write_text(records.read_text()[:-40])
    lines = records.read_text().splitlines(keepends=True)
    mixed.write_text(lines[0] + lines[1].replace('"l2"', '"linf"'))
    out = tmp_path / "a.png"
    for arguments, words in (
        ([finished, "--out", "a.pdf"], "--out must end in .png or .svg, got 'a.pdf'"),
        ([finished, "--out", "/nowhere/a.png"], "--out: the folder /nowhere does not exist"),
        ([finished, finished, "--out", out], "is given twice; leave one out"),
        (["/nowhere", "--out", out], "/nowhere is no folder"),
        (
            ["/nowhere.jsonl", "--out", out],
            "cannot read the records /nowhere.jsonl: No such file or directory",
        ),
        ([empty, "--out", out], "holds no record; one norm and one kind are needed"),
        ([half, "--out", out], "half.jsonl: line 359 is no record"),
        ([mixed, "--out", out], "mixed.jsonl holds l2 deterministic and linf deterministic"),
        ([records, "--training", "--out", out], "radii.jsonl has no log.jsonl with a finished epoch"),
        ([tmp_path, "--training", "--out", out], "has no log.jsonl with a finished epoch"),
    ):
        one_line(*call("plot", *arguments), words=words)

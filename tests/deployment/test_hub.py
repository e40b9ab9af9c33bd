"""A stand-in speaks the few endpoints that the hub's client uses; nothing leaves this machine."""

import base64
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Call
from tiny_runs import CLASSES, SHAPE, experiment, network

import lipnext
from lipnext.core.errors import BundleError, ConfigError
from lipnext.core.files import write_json
from lipnext.deployment import hub
from lipnext.deployment.bundle import load_experiment, save_bundle

hf = pytest.importorskip("huggingface_hub", reason="huggingface-hub is not installed (extra: hub)")
constants = importlib.import_module("huggingface_hub.constants")
RESULT = {
    "n": 24,
    "clean": 1.0,
    "cra": {"36/255": 0.75},
    "acr": 0.3,
    "norm": "l2",
    "kind": "deterministic",
    "semantics": "real",
}


class StandIn(BaseHTTPRequestHandler):
    """One repository, a commit a push; `repository` maps names to bytes."""

    repository: dict[str, bytes]
    requests: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append(f"POST {self.path}")
        if self.path == "/api/repos/create":
            if json.loads(body)["organization"] != "me":
                return self.answer({"error": "not yours"}, 403)
            # the client parses addresses and takes those of the hub alone; none of them is asked
            return self.answer({"url": "https://huggingface.co/me/tiny"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path == "/api/models/me/tiny/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
            )
        assert self.path == "/api/models/me/tiny/commit/main", self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repository[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(
            {"commitUrl": f"https://huggingface.co/me/tiny/commit/{self.sha}", "commitOid": self.sha}
        )

    def do_GET(self) -> None:
        self.requests.append(f"GET {self.path}")
        if not self.repository or not re.match(r"/(api/models/)?me/tiny/", self.path):
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if match := re.fullmatch(r"/api/models/me/tiny/revision/(\w+)", self.path):
            if match[1] not in ("main", "v1", self.sha):
                return self.answer({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return self.answer({"id": "me/tiny", "sha": self.sha, "siblings": []})
        if self.path.startswith(f"/api/models/me/tiny/tree/{self.sha}"):
            return self.answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.repository.items()
                ]
            )
        name = self.path.removeprefix(f"/me/tiny/resolve/{self.sha}/")
        return self.send(self.repository[name])

    do_HEAD = do_GET

    @property
    def sha(self) -> str:
        return hashlib.sha1(b"".join(self.repository.values())).hexdigest()

    def answer(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(document).encode(), status, headers)

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        usual = {"X-Repo-Commit": self.sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        for key, value in {**usual, **(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    handler = type("Handler", (StandIn,), {"repository": {}, "requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{running.server_port}"
        # The client reads HF_ENDPOINT when it is imported, which may have happened already.
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        handler.url = url  # type: ignore[attr-defined]
        yield handler
        running.shutdown()
        thread.join()
    hf.close_session()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that knows where its data lay."""
    folder = tmp_path_factory.mktemp("run")
    owned = experiment("data.name=idx", "data.path=/home/somebody/data")
    certificate = save_bundle(network(owned), owned, CLASSES, folder)
    write_json(folder / "result.json", RESULT | {"model_sha256": certificate["model_sha256"]})
    (folder / "log.jsonl").write_text("{}\n")
    (folder / "experiment.yaml").write_text("data: {path: /home/somebody/data}\n")
    (folder / "weights.pkl").write_bytes(b"never sent")
    return folder


def test_what_is_pushed_comes_back_and_certifies_the_same(
    server: type[StandIn], run: Path, call: Call
) -> None:
    code, out, err = call("push", run, "me/tiny", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["repository"] == "me/tiny"
    assert report["url"] == f"https://huggingface.co/me/tiny/commit/{server.sha.fget(server)}"  # type: ignore[attr-defined]
    assert sorted(server.repository) == sorted(hub.FILES) == sorted(report["files"])
    assert not any(b"somebody" in data for data in server.repository.values())

    server.repository["evil.pkl"] = b"never fetched"
    fetched = lipnext.load("hf:me/tiny@v1")
    images = torch.rand(5, *SHAPE)
    ours, theirs = lipnext.load(run).certify(images), fetched.certify(images)
    assert ours.model_sha256 == theirs.model_sha256
    assert torch.equal(ours.radius, theirs.radius)
    folder = hub.download("hf:me/tiny")
    assert sorted(p.name for p in folder.iterdir()) == sorted(hub.FILES)
    assert load_experiment(folder).data.path is None

    code, _, err = call("verify", "hf:me/tiny")
    assert code == 0
    assert err.endswith(f"lipnext: hf:me/tiny is {folder}\n")  # behind the client's bar


def test_the_card_states_what_was_measured_and_what_it_means(run: Path, tmp_path: Path, call: Call) -> None:
    code, out, err = call("push", run, "me/tiny", "--dry-run", "--out", tmp_path / "sent")
    assert (code, err) == (0, "")
    assert out.endswith("sent nothing to me/tiny\n")
    card = (tmp_path / "sent" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: lipnext\n")
    assert "| 1.0000 | 0.7500 | 0.2999 |" in card  # 0.3 as a float lies below 0.3
    assert "computed in real arithmetic, gives its label to every point of the closed l2 ball" in card
    assert json.loads((run / "certificate.json").read_text())["model_sha256"] in card
    code, _, err = call("push", run, "me/tiny", "--dry-run", "--out", tmp_path / "sent")
    assert (code, "exists; give a new folder" in err) == (2, True)


def test_a_changed_file_is_refused(server: type[StandIn], run: Path, call: Call) -> None:
    call("push", run, "me/tiny")
    weights = bytearray(server.repository["model.safetensors"])
    weights[-1] ^= 1
    server.repository["model.safetensors"] = bytes(weights)
    with pytest.raises(BundleError, match="is not the file that was certified"):
        lipnext.load("hf:me/tiny")


def test_what_the_hub_refuses_is_one_line(server: type[StandIn], call: Call, run: Path) -> None:
    for reference in ("hf:me/tiny", "hf:you/other"):
        with pytest.raises(
            BundleError, match=f"cannot fetch {reference}: RepositoryNotFoundError"
        ) as refusal:
            lipnext.load(reference)
        assert "\n" not in str(refusal.value)
    code, out, err = call("push", run, "you/other")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "cannot push to you/other: " in err


def test_offline_the_cache_serves(
    server: type[StandIn], run: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("push", run, "me/tiny")
    first = hub.download("hf:me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert hub.download("hf:me/tiny") == first
    with pytest.raises(BundleError, match="cannot fetch hf:me/another: "):
        hub.download("hf:me/another")
    assert server.requests == []


@pytest.mark.parametrize(
    "word", ["hf:", "hf:tiny", "hf:me/tiny/deep", "hf:me/tiny@", "hf:../x", "hf:me/..@a b"]
)
def test_a_malformed_reference_asks_nobody(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match="a model on the hub is hf:owner/name"):
        lipnext.load(word)


def test_a_push_without_a_name_a_result_or_its_own_weights_is_refused(
    run: Path, tmp_path: Path, call: Call
) -> None:
    assert "a repository is owner/name, got 'tiny'" in call("push", run, "tiny", "--dry-run")[2]
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.safetensors", "config.json", "certificate.json"):
        (bare / name).write_bytes((run / name).read_bytes())
    assert "has no result.json, so nothing was measured" in call("push", bare, "me/tiny", "--dry-run")[2]
    write_json(bare / "result.json", RESULT | {"model_sha256": "0" * 64})
    assert "speaks of other weights than the bundle" in call("push", bare, "me/tiny", "--dry-run")[2]


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "lipnext\[hub\]"'):
        lipnext.load("hf:me/tiny")


@pytest.mark.slow
def test_the_endpoint_of_the_environment_is_asked(server: type[StandIn], run: Path, tmp_path: Path) -> None:
    home = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}  # type: ignore[attr-defined]

    def lipnext_(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lipnext", *words]
        return subprocess.run(command, env=os.environ | home, capture_output=True, text=True, timeout=300)

    pushed = lipnext_("push", str(run), "me/tiny")
    assert pushed.returncode == 0, pushed.stderr
    verified = lipnext_("verify", "hf:me/tiny")
    assert verified.returncode == 0, verified.stderr
    assert str(tmp_path / "home") in verified.stderr

"""The server in a process of its own: load, hostile clients, and a stop that answers what was accepted."""

import contextlib
import http.client
import io
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from serving_process import Server, running
from tiny_runs import pictures

from lipnext import runs
from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import Dataset
from lipnext.data.dataset import load as load_data
from lipnext.deployment.locate import locate

pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: serve)")
pytestmark = pytest.mark.slow


def post(server: Server, body: bytes, kind: str = "application/json") -> tuple[int, dict[str, Any]]:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/predict", body, {"content-type": kind})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def served(run: Path, test: Dataset) -> list[tuple[int, float, float]]:
    """Label, radius and score of every image, from eight clients at once, as JSON or PNG."""
    images = test.float_images().double().tolist()
    told: list[Any] = [None] * len(test)

    def client(server: Server, start: int) -> None:
        for k in range(start, len(test), 8):
            if k % 3:
                status, answer = post(server, json.dumps({"images": [images[k]]}).encode())
            else:
                file = io.BytesIO()
                Image.fromarray(test.images[k, 0].numpy()).save(file, "PNG")
                head = b'--x\r\ncontent-disposition: form-data; name="images"; filename="a"\r\n\r\n'
                status, answer = post(
                    server, head + file.getvalue() + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"
                )
            assert status == 200
            [p] = answer["predictions"]
            told[k] = (p["label"], p["radius"], p["score"])

    with running(run) as server:
        threads = [threading.Thread(target=client, args=(server, start)) for start in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.stop() == 0
    return told


def test_the_whole_test_set_gets_the_certified_radii(tmp_path: Path) -> None:
    """Served and offline JSON are equal bit for bit, in whichever order and company the images come."""
    folder = tmp_path / "run"
    runs.train(
        "digits", folder, overrides=["model.width=32", "model.depth=2", "model.patch=2", "train.epochs=3"]
    )
    certificate, test = runs.certify_run(folder)
    offline = [(record["pred"], record["radius"], record["margin"]) for record in certificate.records()]
    assert served(folder, test) == offline


def test_the_packaged_fashion_model_serves_what_it_certifies(tmp_path: Path, fashion_mnist: Path) -> None:
    """The JSON that the server sends and the JSON that `certify --records` writes hold the same digits."""
    bundle = locate("fashion-mnist")
    test = load_data(DataSpec(name="idx", path=str(fashion_mnist))).test
    test = test.subset(torch.arange(300) * len(test) // 300)
    runs.load(bundle).certify(test.float_images()).to_jsonl(tmp_path / "radii.jsonl")
    lines = (tmp_path / "radii.jsonl").read_text(encoding="utf-8").splitlines()
    written = [json.loads(line, parse_float=str) for line in lines]
    told = served(bundle, test)
    assert [(label, repr(radius), repr(score)) for label, radius, score in told] == [
        (record["pred"], record["radius"], record["margin"]) for record in written
    ]
    assert sum(radius > 0 for _, radius, _ in told) > 290


def test_64_clients_get_their_own_answers_while_others_misbehave(bundle: Path) -> None:
    test = pictures(count=64)
    certificate = runs.load(bundle).certify(test.float_images())
    bodies = [json.dumps({"images": [image]}).encode() for image in test.float_images().double().tolist()]
    statuses: list[int] = []

    def client(server: Server, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        generator = torch.Generator().manual_seed(number)
        until = time.monotonic() + 5
        while time.monotonic() < until:
            k = int(torch.randint(64, (1,), generator=generator))
            malformed = number % 8 == 0
            connection.request(
                "POST", "/v1/predict", b"{" if malformed else bodies[k], {"content-type": "application/json"}
            )
            answer = connection.getresponse()
            content = json.loads(answer.read())
            statuses.append(answer.status)
            if malformed:
                assert answer.status == 400
            elif answer.status == 200:
                [p] = content["predictions"]
                assert (p["label"], p["radius"]) == (
                    certificate.label[k].item(),
                    certificate.radius[k].item(),
                )
        connection.close()

    failed: list[BaseException] = []

    def guarded(server: Server, number: int) -> None:
        try:
            client(server, number)
        except BaseException as error:
            failed.append(error)

    with running(bundle) as server:
        threads = [threading.Thread(target=guarded, args=(server, number)) for number in range(64)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        before = server.memory()
        for thread in threads:
            thread.join()
        assert server.memory() < before + 30
        assert server.stop() == 0
    assert failed == []
    assert set(statuses) <= {200, 400, 429}
    assert statuses.count(200) > 100
    assert not [e for e in server.events() if e["level"] == "error"]


def test_every_accepted_request_is_answered_on_sigterm(bundle: Path) -> None:
    """The signal finds requests at every stage: half sent, waiting, in the model. Each has a connection of its own."""
    body = json.dumps({"images": pictures(8).float_images().double().tolist()}).encode()
    request = (
        b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        % len(body)
    )
    outcomes: list[str] = []
    stopping = threading.Event()

    def client(server: Server) -> None:
        while not stopping.is_set():
            try:
                with server.connect() as connection:
                    connection.sendall(request + body[:100])
                    time.sleep(0.02)
                    connection.sendall(body[100:])
                    outcomes.append(connection.recv(65536)[:15].decode())
            except OSError as error:
                outcomes.append(type(error).__name__)

    with running(bundle) as server:
        threads = [threading.Thread(target=client, args=(server,)) for _ in range(16)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        stopping.set()
        assert server.stop() == 0
        for thread in threads:
            thread.join()
        with pytest.raises(ConnectionRefusedError):
            server.connect()
    assert set(outcomes) == {"HTTP/1.1 200 OK"}
    assert len(outcomes) > 50


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(30)
    content = b""
    with contextlib.suppress(ConnectionResetError):  # closed with bytes unread
        while part := connection.recv(65536):
            content += part
    return content


def test_hostile_clients_are_answered_or_cut_off(bundle: Path) -> None:
    with running(bundle) as server:
        before = server.memory()
        # 200 MB with its length stated, and without
        for head in (b"content-length: 200000000", b"transfer-encoding: chunked"):
            with server.connect() as connection:
                connection.sendall(
                    b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    + head
                    + b"\r\n\r\n"
                )
                block = b" " * 1_000_000
                chunk = b"%x\r\n%s\r\n" % (len(block), block) if b"chunked" in head else block
                try:
                    for _ in range(200):
                        connection.sendall(chunk)
                except OSError:
                    pass  # it may be cut off once it was answered
                assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
        assert server.memory() < before + 60
        for noise in (b"\0" * 100, b"GET / HTTP/x\r\n\r\n", b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
                      b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 200_000 + b"\r\n",
                      b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx",
                      b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"):  # fmt: skip
            with server.connect() as connection:
                with contextlib.suppress(OSError):  # it may be cut off once it was answered
                    connection.sendall(noise)
                assert read_all(connection)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 415", b"")
        assert post(server, b"{}")[0] == 400
        assert server.stop() == 0


def test_slow_heads_are_cut_off_and_disturb_nobody(bundle: Path) -> None:
    body = json.dumps({"images": [pictures().float_images()[0].double().tolist()]}).encode()
    with running(bundle) as server:
        slow = [server.connect() for _ in range(200)]
        begun = time.monotonic()
        for connection in slow:
            connection.sendall(b"GET / HT")
        assert post(server, body)[0] == 200
        answers = []
        for connection in slow:
            with connection:
                answers.append(read_all(connection)[:12])
        assert 8 < time.monotonic() - begun < 25
        assert set(answers) == {b"HTTP/1.1 408"}
        # one that sends a byte now and then gets no longer
        with server.connect() as connection:
            begun = time.monotonic()
            try:
                for letter in b"GET / HTTP/1.1\r\nhost: " + b"x" * 100:
                    connection.sendall(bytes([letter]))
                    time.sleep(0.5)
            except OSError:
                pass
            assert time.monotonic() - begun < 20
        assert server.stop() == 0


def test_a_token_and_structured_logs(bundle: Path) -> None:
    with running(bundle, env={"LIPNEXT_TOKEN": "s3cret-token"}) as server:
        assert post(server, b"{}")[0] == 401
        assert server.stop() == 0
    [request] = [event for event in server.events() if event["event"] == "request"]
    assert request["status"] == 401
    assert "s3cret" not in "".join(server.log)

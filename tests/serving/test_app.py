"""The routes and the gate, in this process."""

import asyncio
import gzip
import io
import json
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_runs import CLASSES, SHAPE, pictures

from lipnext import runs
from lipnext.core.certificate import Certificate
from lipnext.core.errors import UnsoundError

pytest.importorskip("fastapi", reason="fastapi is not installed (extra: serve)")
pytest.importorskip("httpx", reason="httpx is not installed (extra: dev)")

from fastapi.testclient import TestClient

from lipnext.serving import app as app_module
from lipnext.serving.answers import Attacked, Predictions
from lipnext.serving.app import create_app
from lipnext.serving.attacker import break_label
from lipnext.serving.gate import State
from lipnext.serving.limits import Limits
from lipnext.serving.service import Service, open_service

JSON = {"content-type": "application/json"}
SMALL = Limits(body_bytes=3000, json_bytes=2000, images=4, requests=2, waiting_images=8)


@contextmanager
def client(
    bundle: Path, *, token: str | None = None, state: State | None = None, **options: Any
) -> Iterator[TestClient]:
    service = open_service(bundle, **options)
    with TestClient(create_app(service, token, state)) as client:
        client.service = service  # type: ignore[attr-defined]
        yield client


@pytest.fixture(scope="module")
def web(bundle: Path) -> Iterator[TestClient]:
    with client(bundle) as web:
        yield web


def png(pixels: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[0].numpy()).save(file, "PNG")
    return file.getvalue()


def upload(*contents: bytes) -> dict[str, Any]:
    return {"files": [("images", ("name.png", content)) for content in contents]}


def image_of(web: TestClient, k: int = 0) -> list[Any]:
    return pictures().float_images()[k].double().tolist()  # type: ignore[no-any-return]


# ---- what is told


def test_json_and_pictures_get_what_certify_gives_bit_for_bit(web: TestClient, bundle: Path) -> None:
    test = pictures(count=23)
    offline = runs.load(bundle).certify(test.float_images())
    told: dict[str, list[dict[str, Any]]] = {"json": [], "pictures": []}
    start = 0
    for size in (1, 2, 7, 13):
        some = slice(start, start + size)
        start += size
        numbers = test.float_images()[some].double().tolist()
        told["json"] += web.post("/v1/predict", json={"images": numbers}).json()["predictions"]
        files = upload(*(png(pixels) for pixels in test.images[some]))
        told["pictures"] += web.post("/v1/predict", **files).json()["predictions"]
    assert offline.rival is not None
    for documents in told.values():
        assert [d["radius"] for d in documents] == offline.radius.tolist()
        assert [d["score"] for d in documents] == offline.margin.tolist()
        assert [d["label"] for d in documents] == offline.label.tolist()
        assert [d["rival"] for d in documents] == offline.rival.tolist()
        assert {d["preprocessing"] for d in documents} == {"none"}


def test_an_answer_says_what_its_radii_mean(web: TestClient, bundle: Path) -> None:
    text = web.post("/v1/predict", json={"images": [image_of(web)]}).text
    answer = Predictions.model_validate_json(text, strict=True)
    certificate = runs.load(bundle).certify(pictures().float_images()[:1])
    assert (answer.norm, answer.kind, answer.confidence) == ("l2", "deterministic", 1.0)
    assert (answer.semantics, answer.arithmetic) == ("real", "float64")
    assert answer.model_sha256 == certificate.model_sha256
    assert "l2 distance" in answer.statement
    [prediction] = answer.predictions
    assert prediction.class_name == CLASSES[certificate.label.item()]  # type: ignore[call-overload]
    assert list(prediction.certified_at) == ["36/255", "72/255", "108/255"]


def test_certified_at_is_exact_and_strict(web: TestClient) -> None:
    body = {"images": [image_of(web)]}
    radius = Fraction(web.post("/v1/predict", json=body).json()["predictions"][0]["radius"])
    below = radius - Fraction(1, 10**40)
    answer = web.post("/v1/predict", params={"eps": f"{radius},{below}"}, json=body)
    assert answer.json()["predictions"][0]["certified_at"] == {str(radius): False, str(below): True}


def test_abstaining_withholds_the_label(bundle: Path) -> None:
    test = pictures()
    radii = runs.load(bundle).certify(test.float_images()).radius
    least = radii.median().item()  # itself a radius: not above, so withheld
    with client(bundle, abstain_below=Fraction(least)) as web:
        answers = web.post("/v1/predict", json={"images": test.float_images().double().tolist()}).json()
        metrics = web.get("/metrics").text
        assert web.get("/v1/model").json()["abstain_below"] == str(Fraction(least))
    for document, radius in zip(answers["predictions"], radii.tolist(), strict=True):
        assert document["abstained"] == (radius <= least)
        assert (document["label"] is None) == (document["class_name"] is None) == document["abstained"]
        assert (document["rival"] is None) == document["abstained"]
    withheld = sum(document["abstained"] for document in answers["predictions"])
    assert 0 < withheld < len(test)
    assert f"lipnext_abstentions_total {withheld}.0" in metrics


def test_a_resized_upload_says_so(web: TestClient) -> None:
    [told] = web.post("/v1/predict", **upload(png(torch.zeros(1, 9, 8, dtype=torch.uint8)))).json()[
        "predictions"
    ]
    assert told["resized"]
    assert told["preprocessing"].endswith("the radius is in pixels of the 4 x 4 picture")


def test_facts(web: TestClient, bundle: Path) -> None:
    facts = web.get("/v1/model").json()
    assert facts["classes"] == list(CLASSES)
    assert facts["input_shape"] == list(SHAPE)
    assert facts["bit_equal"] is True
    assert facts["limits"]["images"] == 64
    assert facts["lipschitz"]["bound"] >= 1
    stated = json.loads((bundle / "certificate.json").read_text())
    assert facts["model_sha256"] == stated["model_sha256"]


# ---- the attack


def test_an_attack_shows_a_picture_that_others_can_check(web: TestClient, bundle: Path) -> None:
    response = web.post("/v1/attack", json={"images": [image_of(web)]})
    answer = Attacked.model_validate_json(response.text)
    model = runs.load(bundle)
    assert answer.distance is not None
    assert answer.changed is not None
    original, changed = torch.tensor(answer.original), torch.tensor(answer.changed)
    assert original.tolist() == image_of(web)
    assert answer.distance >= (changed - original).norm().item() >= answer.distance * (1 - 1e-9)
    label = model.certify(changed[None]).label.item()
    assert label == answer.becomes != answer.prediction.label
    assert answer.distance > answer.prediction.radius
    assert (answer.refuted, answer.finished) == (False, True)
    for budget in answer.budgets:
        assert budget.flipped == (answer.distance <= budget.eps)
    assert [budget.eps for budget in answer.budgets] == sorted(budget.eps for budget in answer.budgets)


def test_a_lying_radius_is_called_refuted(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = Service._certify

    def lying(self: Service, images: torch.Tensor, batch_size: int = 32) -> Certificate:
        certificate = honest(self, images, batch_size)
        return replace(certificate, radius=20 * certificate.radius)

    monkeypatch.setattr(Service, "_certify", lying)
    with client(bundle) as web, caplog.at_level(logging.ERROR):
        answer = web.post("/v1/attack", json={"images": [image_of(web)]}).json()
    assert answer["refuted"]
    assert [record.message for record in caplog.records] == ["refuted"]


def test_an_attack_ends_in_time(bundle: Path) -> None:
    model = runs.load(bundle)
    image = pictures().float_images()[:1].double()
    found = break_label(model.net.double(), image[0], model.certify(image), seconds=-1)
    assert not found.finished
    assert (found.distance, found.image, found.label) == (None, None, None)
    assert not any(flipped for _, flipped in found.budgets)


def test_attacks_beyond_the_queue_are_shed(bundle: Path) -> None:
    with client(bundle, limits=Limits(waiting_attacks=0)) as web:
        attacker = web.service.attacker  # type: ignore[attr-defined]
        network, going, go = attacker._network, threading.Event(), threading.Event()

        def held(images: torch.Tensor) -> torch.Tensor:
            going.set()
            assert go.wait(10)
            return network(images)  # type: ignore[no-any-return]

        attacker._network = held
        body = {"images": [image_of(web)]}
        answers = []
        thread = threading.Thread(target=lambda: answers.append(web.post("/v1/attack", json=body)))
        thread.start()
        assert going.wait(10)
        shed = web.post("/v1/attack", json=body)
        go.set()
        thread.join()
    assert (shed.status_code, shed.headers["retry-after"]) == (429, "1")
    assert answers[0].status_code == 200


def test_an_attack_takes_one_image(web: TestClient) -> None:
    answer = web.post("/v1/attack", json={"images": [image_of(web)] * 2})
    assert (answer.status_code, answer.json()) == (
        400,
        {"error": "an attack takes one image, got 2; send one"},
    )


# ---- what is refused


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"content": b"{}", "headers": JSON}, 400, "the body must be"),
        ({"content": b"{}"}, 415, "send application/json or multipart/form-data"),
        (
            {"content": gzip.compress(b"[" * 1_000_000), "headers": JSON | {"content-encoding": "gzip"}},
            400,
            "the body is no JSON",
        ),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        (
            {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=y"}},
            400,
            "cannot be read",
        ),
        ({"files": [("other", ("a", b"x"))]}, 400, "files named 'images' and nothing else"),
        ({"data": {"images": "x"}, "files": [("images", ("a", b"x"))]}, 400, "cannot be read"),
        ({"files": [("images", ("../../etc/passwd", b"x"))]}, 400, "images[0]: unreadable picture"),
        ({"files": [("images", ("a", b"x"))] * 65}, 400, "cannot be read (Too many files"),
        ({"params": {"eps": "36"}, "content": b"{}", "headers": JSON}, 400, "36 looks like 8-bit units"),
        (
            {"params": {"eps": ",".join("1" * k for k in range(1, 19))}},
            400,
            "at most 16 eps in a request, got 18",
        ),
        ({"params": {"eps": "1" * 2000}}, 400, "eps: String should have at most 1000"),
    ],
)
def test_malformed_requests_are_answered_in_one_line(
    web: TestClient, request_: dict[str, Any], status: int, words: str
) -> None:
    answer = web.post("/v1/predict", **request_)
    assert answer.status_code == status
    assert words in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "path", ["/nope", "/static/index.html", "/../pyproject.toml", "/..%2f..%2fetc%2fpasswd", "/docs"]
)
def test_there_are_no_other_pages(web: TestClient, path: str) -> None:
    answer = web.get(path)
    assert answer.status_code == 404
    assert "openapi.json" in answer.json()["error"]


def test_a_long_body_is_refused_by_its_head_and_by_its_bytes(bundle: Path) -> None:
    with client(bundle, limits=SMALL) as web:
        stated = web.post("/v1/predict", content=b" " * 3001, headers=JSON)
        streamed = web.post("/v1/predict", content=iter([b" " * 1000] * 4), headers=JSON)
        wrong = web.post("/v1/predict", content=b"{}", headers={**JSON, "content-length": "-5"})
        still_works = web.post("/v1/predict", json={"images": [image_of(web)]})
    assert [stated.status_code, streamed.status_code, wrong.status_code] == [413, 413, 413]
    assert stated.json()["error"] == "a request may have 3,000 bytes; send fewer or smaller images"
    assert still_works.status_code == 200


def test_a_full_queue_sheds(bundle: Path) -> None:
    with client(bundle, limits=replace(SMALL, waiting_images=1)) as web:
        answer = web.post("/v1/predict", json={"images": [image_of(web)] * 2})
        metrics = web.get("/metrics").text
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert 'lipnext_shed_total{reason="queue"} 1.0' in metrics


async def exchange(app: Any, messages: list[dict[str, Any] | float], path: str = "/v1/predict") -> list[Any]:
    """Play one request to the application; a number among the messages is a pause."""
    sent: list[Any] = []

    async def receive() -> Any:
        message = messages.pop(0) if messages else {"type": "http.disconnect"}
        if isinstance(message, float):
            await asyncio.sleep(message)
            return await receive()
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
             "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "root_path": ""}  # fmt: skip
    await app(scope, receive, send)
    return sent


def body_of(images: Any) -> dict[str, Any]:
    return {"type": "http.request", "body": json.dumps({"images": images}).encode(), "more_body": False}


def test_a_slow_body_and_a_slow_model_run_out_of_time(bundle: Path) -> None:
    service = open_service(bundle, limits=Limits(request_seconds=0.2))
    app = create_app(service)
    image = pictures().float_images()[0].double().tolist()
    part = {"type": "http.request", "body": b"{", "more_body": True}
    assert asyncio.run(exchange(app, [part, 5.0]))[0]["status"] == 408
    go = threading.Event()
    service.batcher._certify = lambda images: (go.wait(10), service._certify(images))[1]
    [start, content] = asyncio.run(exchange(app, [body_of([image])]))
    go.set()
    assert start["status"] == 503
    assert json.loads(content["body"]) == {"error": "the request was not evaluated within 0.2 s"}
    service.close()


def test_a_client_that_goes_away_is_no_error(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    service = open_service(bundle)
    with caplog.at_level(logging.INFO):
        sent = asyncio.run(
            exchange(create_app(service), [{"type": "http.request", "body": b"{", "more_body": True}])
        )
    service.close()
    assert sent == []
    assert [record.fields["status"] for record in caplog.records] == [499]  # type: ignore[attr-defined]


def test_requests_beyond_the_limit_are_shed(bundle: Path) -> None:
    service = open_service(bundle, limits=replace(SMALL, requests=1))
    app = create_app(service)
    image = pictures().float_images()[0].double().tolist()

    async def both() -> list[list[Any]]:
        return await asyncio.gather(
            exchange(app, [0.2, body_of([image])]), exchange(app, [0.1, body_of([image])])
        )

    first, second = asyncio.run(both())
    service.close()
    assert (first[0]["status"], second[0]["status"]) == (200, 429)


def test_an_error_of_ours_shows_nothing_outside_and_all_inside(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (RuntimeError("secret"), UnsoundError("secret")):
        with client(bundle) as web:

            def broken(images: torch.Tensor, error: Exception = error) -> Certificate:
                raise error

            web.service.batcher._certify = broken  # type: ignore[attr-defined]
            caplog.clear()
            with caplog.at_level(logging.INFO):
                answer = web.post("/v1/predict", json={"images": [image_of(web)]})
        assert answer.status_code == 500
        assert re.fullmatch(
            r"internal error, request [0-9a-f]{12}; the server's log says more", answer.json()["error"]
        )
        assert "secret" in caplog.text


# ---- token, health, headers, logs


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer ", "Basic s3cret", "s3cret", "Bearer s3cret2"]
)
def test_without_the_token_there_is_no_answer(bundle: Path, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given}
    with client(bundle, token="s3cret") as web:
        for method, path in (
            ("POST", "/v1/predict"),
            ("POST", "/v1/attack"),
            ("GET", "/v1/model"),
            ("GET", "/metrics"),
        ):
            answer = web.request(method, path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/", "/page.js", "/healthz", "/openapi.json"):
            assert web.get(path, headers=headers).status_code == 200


def test_with_the_token_there_is(bundle: Path) -> None:
    with client(bundle, token="s3cret") as web:
        web.headers["authorization"] = "bearer s3cret"
        assert web.get("/v1/model").status_code == 200
        assert web.post("/v1/predict", json={"images": [image_of(web)]}).status_code == 200


def test_a_stopping_server_sends_everybody_away_but_answers(bundle: Path) -> None:
    state = State()
    with client(bundle, state=state) as web:
        assert web.get("/healthz").json() == {"status": "ok"}
        state.stopping = True
        health, answer = web.get("/healthz"), web.post("/v1/predict", json={"images": [image_of(web)]})
    assert (health.status_code, health.json()) == (503, {"status": "stopping"})
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")


def test_every_answer_is_guarded_by_its_headers(web: TestClient) -> None:
    for answer in (web.get("/"), web.get("/nope"), web.post("/v1/predict"), web.get("/openapi.json")):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_needs_nothing_from_elsewhere_and_nothing_inline(web: TestClient) -> None:
    page = web.get("/").text
    for address in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert web.get(address).status_code == 200
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", page)
    together = page + web.get("/style.css").text + web.get("/page.js").text
    assert set(re.findall(r"https?://[^\"' ]+", together)) == {"http://www.w3.org/2000/svg"}
    for name in app_module.PAGE:
        assert web.get(name).headers["content-type"] == app_module.PAGE[name][1]


def test_metrics(bundle: Path) -> None:
    with client(bundle) as web:
        web.post("/v1/predict", json={"images": [image_of(web, k) for k in range(3)]})
        web.get("/nope")
        text = web.get("/metrics").text
    assert 'lipnext_requests_total{endpoint="/v1/predict",status="200"} 1.0' in text
    assert 'lipnext_requests_total{endpoint="other",status="404"} 1.0' in text
    assert "lipnext_radius_count 3.0" in text
    assert "lipnext_batch_images_sum 3.0" in text
    assert 'lipnext_request_seconds_count{endpoint="/v1/predict"} 1.0' in text


def test_the_log_holds_no_content(web: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        web.post(
            "/v1/predict?eps=1/8", headers={"authorization": "Bearer hidden"}, **upload(b"private pixels")
        )
    [record] = [r for r in caplog.records if r.name == "lipnext.serving"]
    fields = record.fields  # type: ignore[attr-defined]
    assert list(fields) == ["request", "method", "endpoint", "status", "seconds", "bytes", "client"]
    assert (fields["method"], fields["endpoint"], fields["status"]) == ("POST", "/v1/predict", 400)
    for secret in ("private", "hidden", "name.png", "1/8"):
        assert secret not in json.dumps(fields)


def test_openapi_describes_the_bodies(web: TestClient) -> None:
    document = web.get("/openapi.json").json()
    content = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    plane = content["application/json"]["schema"]["properties"]["images"]["items"]["anyOf"][0]
    assert (plane["minItems"], plane["maxItems"], plane["items"]["maxItems"]) == (4, 4, 4)

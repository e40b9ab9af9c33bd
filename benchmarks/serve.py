"""Load test of `lipnext serve`: many clients at once, malformed requests mixed in, every answer checked.

    python benchmarks/serve.py RUN --clients 64 --seconds 60 --malformed 1000 --out benchmarks/results/serve.json

Each client sends test images one by one, as JSON or PNG in turn, over a connection that it keeps, and compares each answer with
the certificate computed offline in this process, bit for bit. Server and clients share the machine. When the load is over the
whole test set is asked for once more, in batches: `different` counts labels and radii that are not the certificate's.
"""

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from timing import report

from lipnext import runs
from lipnext.core.certificate import Certificate

MALFORMED: list[dict[str, Any]] = [
    {"content": b"{", "headers": {"content-type": "application/json"}},
    {"content": b'{"images": [[[NaN]]]}', "headers": {"content-type": "application/json"}},
    {"content": b'{"images": "' + b"x" * 10_000 + b'"}', "headers": {"content-type": "application/json"}},
    {"content": b"[" * 50_000, "headers": {"content-type": "application/json"}},
    {"content": b"\xff\xd8\xff", "headers": {"content-type": "multipart/form-data; boundary=x"}},
    {"files": [("images", ("x.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 500))]},
    {"files": [("other", ("x.png", b"x"))]},
    {"content": b"x", "headers": {"content-type": "text/plain"}},
]


@contextlib.contextmanager
def running(run: str, *options: str) -> Iterator[str]:
    """Start a server on a free port, yield its address, stop it by SIGTERM."""
    command = [sys.executable, "-m", "lipnext", "serve", run, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        if "http" not in line:
            raise SystemExit(f"the server did not start: {line}")
        running.pid = server.pid  # type: ignore[attr-defined]
        try:
            yield line.split(" on ")[1].split(";")[0]
        finally:
            server.send_signal(signal.SIGTERM)


@dataclass
class Seen:
    """What all clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    malformed: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    dropped: int = 0


async def client(
    number: int,
    base: str,
    requests: list[dict[str, Any]],
    truth: list[tuple[int, float]],
    until: float,
    seen: Seen,
) -> None:
    """Send requests until the time is over."""
    choose = random.Random(number)
    async with httpx.AsyncClient(base_url=base, timeout=60) as http:
        while time.monotonic() < until:
            k = choose.randrange(len(truth))
            begun = time.perf_counter()
            try:
                answer = await http.post("/v1/predict", **requests[2 * k + choose.randrange(2)])
            except httpx.HTTPError:
                seen.dropped += 1
                continue
            seen.statuses[answer.status_code] += 1
            if answer.status_code == 429:
                await asyncio.sleep(float(answer.headers["retry-after"]))
                continue
            seen.seconds.append(time.perf_counter() - begun)
            if answer.status_code == 200:
                [told] = answer.json()["predictions"]
                seen.wrong += (told["label"], told["radius"]) != truth[k]


async def vandal(base: str, count: int, seconds: float, seen: Seen) -> None:
    """Send malformed requests, spread over the time."""
    async with httpx.AsyncClient(base_url=base, timeout=60) as http:
        for request in itertools.islice(itertools.cycle(MALFORMED), count):
            try:
                seen.malformed[(await http.post("/v1/predict", **request)).status_code] += 1
            except httpx.HTTPError:
                seen.dropped += 1
            await asyncio.sleep(0.8 * seconds / count)


async def watch_memory(pid: int, until: float) -> list[float]:
    """Resident MiB once a second."""
    sizes = []
    while time.monotonic() < until:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        await asyncio.sleep(1)
    return sizes


def bodies(images: Any, pixels: Any) -> list[dict[str, Any]]:
    """Each image as JSON and as PNG."""
    result: list[dict[str, Any]] = []
    for image, raw in zip(images, pixels, strict=True):
        text = json.dumps({"images": [image.double().tolist()]})
        result.append({"content": text, "headers": {"content-type": "application/json"}})
        file = io.BytesIO()
        Image.fromarray(raw.permute(1, 2, 0).squeeze(2).numpy()).save(file, "PNG")
        result.append({"files": [("images", ("image.png", file.getvalue(), "image/png"))]})
    return result


async def load(
    url: str, options: argparse.Namespace, truth: Certificate, requests: list[dict[str, Any]]
) -> dict[str, Any]:
    """Run all clients and sum up."""
    pairs = list(zip(truth.label.tolist(), truth.radius.tolist(), strict=True))
    seen = Seen()
    until = time.monotonic() + options.seconds
    memory, *_ = await asyncio.gather(
        watch_memory(running.pid, until),  # type: ignore[attr-defined]
        vandal(url, options.malformed, options.seconds, seen),
        *(client(k, url, requests, pairs, until, seen) for k in range(options.clients)),
    )
    ordered = sorted(seen.seconds)
    settled = memory[len(memory) // 4 :]
    return {
        "clients": options.clients,
        "seconds": options.seconds,
        "answers": dict(sorted(seen.statuses.items())),
        "malformed": dict(sorted(seen.malformed.items())),
        "wrong_or_swapped": seen.wrong,
        "dropped": seen.dropped,
        "images_per_second": round(seen.statuses[200] / options.seconds, 1),
        **{f"p{q}_ms": round(1e3 * ordered[int(q / 100 * (len(ordered) - 1))], 1) for q in (50, 95, 99)},
        "memory_mib": {
            "first": round(settled[0], 1),
            "last": round(settled[-1], 1),
            "largest": round(max(settled), 1),
        },
        "model_sha256": truth.model_sha256,
    }


async def whole(url: str, truth: Certificate, images: Any, batch: int = 50) -> dict[str, int]:
    """Ask for every image once, by a single client, and count the answers that differ from the certificate."""
    different = 0
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            answer = await http.post("/v1/predict", json={"images": images[part].double().tolist()})
            answer.raise_for_status()
            told = [(one["label"], one["radius"]) for one in answer.json()["predictions"]]
            known = zip(truth.label[part].tolist(), truth.radius[part].tolist(), strict=True)
            different += sum(a != b for a, b in zip(told, known, strict=True))
    return {"images": len(images), "different": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--data")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1000, help="test images that are sent")
    parser.add_argument("--out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    certificate, test = runs.certify_run(options.run, options.data)
    count = min(options.images, len(test))
    requests = bodies(test.float_images(slice(count)), test.images[:count])
    with running(options.run) as url:
        result = asyncio.run(load(url, options, certificate[:count], requests))
        everything = asyncio.run(whole(url, certificate, test.float_images()))
    report({"run": Path(options.run).name, **result, "whole_test_set": everything}, options.json, options.out)


if __name__ == "__main__":
    main()

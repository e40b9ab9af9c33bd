"""A server in a process of its own, and raw sockets that misbehave."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    log: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log]

    def memory(self) -> float:
        """Resident MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def running(run: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """`lipnext serve RUN` on a free port, ready."""
    command = [sys.executable, "-m", "lipnext", "serve", str(run), "--port", "0", *options]
    whole = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=whole
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        log: list[str] = []
        # A full pipe would stop the server.
        reader = threading.Thread(target=log.extend, args=[process.stderr])
        reader.start()
        try:
            line = process.stdout.readline()
            assert " on http" in line, "".join(log)
            yield Server(process, line.split(" on ")[1].split(";")[0], log)
        finally:
            if process.poll() is None:
                process.kill()
            reader.join()

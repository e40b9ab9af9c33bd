"""`lipnext serve` on the command line: what it refuses, warns of and says, without a socket of its own where possible."""

import socket
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from helpers import Call

pytest.importorskip("fastapi", reason="fastapi is not installed (extra: serve)")

from lipnext.serving import server
from lipnext.serving.server import is_loopback, serve


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the server would be started with; it is not."""
    seen: dict[str, Any] = {}

    def stand_in(folder: Path, host: str, port: int, **options: Any) -> None:
        options.pop("ready")(f"http://{host}:{port}")
        seen.update(folder=folder, host=host, port=port, **options)

    monkeypatch.setattr(server, "serve", stand_in)
    monkeypatch.delenv("LIPNEXT_TOKEN", raising=False)
    return seen


def test_the_defaults_are_this_machine_alone_and_no_token(
    call: Call, bundle: Path, asked: dict[str, Any]
) -> None:
    assert call("serve", bundle) == (0, f"serving {bundle} on http://127.0.0.1:8000; Ctrl-C stops\n", "")
    assert asked == {
        "folder": bundle,
        "host": "127.0.0.1",
        "port": 8000,
        "token": None,
        "abstain_below": None,
    }


def test_other_hosts_without_a_token_are_warned_of(
    call: Call, bundle: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, _, err = call("serve", bundle, "--host", "0.0.0.0", "--abstain-below", "36/255")
    assert (code, asked["abstain_below"]) == (0, Fraction(36, 255))
    assert err == (
        "lipnext: warning: everybody who reaches 0.0.0.0 port 8000 can use this server; set LIPNEXT_TOKEN or "
        "--token-file\n"
    )
    monkeypatch.setenv("LIPNEXT_TOKEN", "from-env")
    assert call("serve", bundle, "--host", "0.0.0.0")[2] == ""
    assert asked["token"] == "from-env"
    (tmp_path / "token").write_text("from-file\n")
    assert call("serve", bundle, "--token-file", tmp_path / "token")[2] == ""
    assert asked["token"] == "from-file"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--abstain-below", "36"], "36 looks like 8-bit units"),
        (["--token-file", "/nowhere"], "/nowhere: No such file"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid port 0"),
    ],
)
def test_mistakes_are_one_line(call: Call, bundle: Path, options: list[str], words: str) -> None:
    code, out, err = call("serve", bundle, "--port", "0", *options)
    assert code in (2, 4)
    assert out == ""
    lines = [line for line in err.splitlines() if "warning" not in line]
    assert len(lines) == 1
    assert words in lines[0]


def test_no_bundle_is_told_before_anything_is_listened_on(call: Call, tmp_path: Path) -> None:
    code, out, err = call("serve", tmp_path, "--port", "0")
    assert (code, out) == (2, "")
    assert "has no model.safetensors" in err


def test_a_busy_port_is_told(call: Call, bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = call("serve", bundle, "--port", port)
    assert code == 2
    assert err.startswith(
        f"lipnext: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another"
    )


@pytest.mark.parametrize("token", ["", "two words", "schlüssel", "line\nbreak"])
def test_an_unusable_token_is_refused(bundle: Path, token: str) -> None:
    with pytest.raises(server.ConfigError, match="openssl rand -hex 16"):
        serve(bundle, port=0, token=token)


def test_a_missing_extra_is_told(call: Call, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lipnext.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = call("serve", bundle)
    assert (code, err) == (2, 'lipnext: serve needs uvicorn; pip install "lipnext[serve]"\n')


def test_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.0.2.1", "no.such.host.invalid"))

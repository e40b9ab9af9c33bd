"""What a request may cost, and the refusal of one that would cost more."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that hold without any configuration; docs/serve.md lists them for users.

    Attributes:
        body_bytes: of a request, in all.
        json_bytes: of a JSON body, which takes many times its length in memory.
        images: in one request.
        picture_pixels: of an encoded picture, read from its header before anything is decoded.
        eps: perturbation sizes asked for in one request.
        header_seconds: until a connection has sent the head of a request.
        request_seconds: until a request is read, evaluated and answered.
        requests: read or evaluated at one time.
        waiting_images: accepted and not yet evaluated.
        connections: open at one time.
        attack_seconds: of one attack.
        waiting_attacks: accepted and not yet begun.
        lame_seconds: during which a stopping server still accepts, but tells everybody to go away.
        drain_seconds: for the answers that are under way when it then stops.
    """

    body_bytes: int = 16 * 2**20
    json_bytes: int = 4 * 2**20
    images: int = 64
    picture_pixels: int = 16_000_000
    eps: int = 16
    header_seconds: float = 10
    request_seconds: float = 30
    requests: int = 128
    waiting_images: int = 512
    connections: int = 512
    attack_seconds: float = 10
    waiting_attacks: int = 2
    lame_seconds: float = 1
    drain_seconds: float = 30


class Refusal(Exception):
    """A request that is answered with an error; `str(refusal)` is the one line that the client gets."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Shed(Refusal):
    """A request that would have been answered at another time: 429, try again."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(429, f"{message}; try again in a second")
        self.reason = reason

"""From what a user writes for RUN to a folder with a bundle: a folder, the name of a packaged model, or hf:owner/name."""

from pathlib import Path

from lipnext.core.errors import BundleError, nearest
from lipnext.deployment.bundle import CERTIFICATE

ZOO = Path(__file__).resolve().parent.parent / "zoo"
HUB = "hf:"


def packaged() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in ZOO.glob(f"*/{CERTIFICATE}"))


def locate(run: str | Path) -> Path:
    """Return the folder that RUN stands for; only `hf:` asks the network.

    A folder that exists comes first, so that a run of one's own is never shadowed by a packaged model.

    Raises:
        BundleError: if there is no such thing, with the packaged names; or the hub does not answer for it.
        ConfigError: for a malformed `hf:` reference, or if the extra "hub" is missing.
    """
    text = str(run)
    if text.startswith(HUB):
        from lipnext.deployment.hub import download

        return download(text)
    if Path(run).exists():
        return Path(run)
    if text in packaged():
        return ZOO / text
    if Path(text).name != text:
        raise BundleError(f"{run} is no folder; give a run folder, or the name of a packaged model")
    raise BundleError(f"{run} is no folder and no packaged model; {nearest(text, packaged())}")

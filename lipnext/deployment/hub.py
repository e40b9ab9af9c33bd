"""The Hugging Face hub: a bundle is a model repository as it stands. Weights are safetensors, nothing is ever unpickled."""

import importlib.util
import re
from pathlib import Path

from lipnext._version import __version__
from lipnext.core.errors import BundleError, ConfigError
from lipnext.deployment.bundle import CERTIFICATE, CONFIG, WEIGHTS

FILES = (WEIGHTS, CONFIG, CERTIFICATE, "result.json", "log.jsonl", "README.md")
"""All that is sent or fetched; whatever else a repository holds stays there."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REFERENCE = re.compile(rf"hf:({_NAME.pattern})(?:@([\w./-]+))?")


def download(reference: str) -> Path:
    """Fetch a bundle and return the folder in the hub's cache; where the hub is out of reach, what the cache holds.

    Args:
        reference: "hf:owner/name" or "hf:owner/name@revision", a branch, tag or commit.

    Raises:
        ConfigError: for a malformed reference, or if the extra "hub" is missing.
        BundleError: if the hub has no such bundle or does not answer.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ConfigError(f"a model on the hub is hf:owner/name or hf:owner/name@revision, got '{reference}'")
    _check_installed()
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            match[1],
            revision=match[2],
            allow_patterns=list(FILES),
            library_name="lipnext",
            library_version=__version__,
        )
    except Exception as error:  # HTTP, cache and offline errors have no common base
        raise BundleError(f"cannot fetch {reference}: {_one_line(error)}") from error
    return Path(folder)


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        ConfigError: one line.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"a repository is owner/name, got '{name}'")


def upload(folder: Path, name: str) -> str:
    """Create the repository where it is missing, send `FILES` in one commit and return its address.

    Args:
        folder: as `deployment.publish.stage` makes it.
        name: "owner/name"; the token is the one that `hf auth login` or HF_TOKEN set.

    Raises:
        ConfigError: if the extra "hub" is missing.
        BundleError: if the hub refuses.
    """
    check_repository(name)
    _check_installed()
    from huggingface_hub import HfApi

    api = HfApi(library_name="lipnext", library_version=__version__)
    try:
        api.create_repo(name, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message=f"lipnext {__version__}: a certified model",
        )
    except Exception as error:  # as in `download`
        raise BundleError(f"cannot push to {name}: {_one_line(error)}") from error
    return str(commit.commit_url)


def _check_installed() -> None:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError('the hub needs huggingface-hub; install it with: pip install "lipnext[hub]"')


def _one_line(error: Exception) -> str:
    """The kind of an error of the client and the start of what it says, which may run over many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2]) or 'no message'}"

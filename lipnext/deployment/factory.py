"""A network of one's own, from a Python file that is named on the command line."""

import importlib.util
from pathlib import Path

from torch import nn

from lipnext.core.errors import ConfigError


def load_factory(where: str) -> nn.Module:
    """Run the Python file of "file.py:factory", call the factory and return its network.

    The file is a program and runs as one: name only files that you trust.

    Args:
        where: path of the file, a colon, and the name of a function without arguments that returns a `torch.nn.Module`
            with its weights loaded; one that returns a network in train mode has it switched to evaluation.

    Raises:
        ConfigError: where the file, the function or its result is not of that form, or one of them fails.
    """
    path, colon, name = where.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"--model must be file.py:factory, got '{where}'")
    if not Path(path).is_file():
        raise ConfigError(f"--model: there is no file {path}")
    spec = importlib.util.spec_from_file_location("lipnext_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        factory = getattr(module, name, None)
        if not callable(factory):
            raise ConfigError(f"--model: {path} has no function '{name}'")
        net = factory()
    except ConfigError:
        raise
    except Exception as error:  # whatever a foreign file raises
        text = (str(error).strip() or "no message").splitlines()[0]
        raise ConfigError(f"--model: {where} failed with {type(error).__name__}: {text}") from error
    if not isinstance(net, nn.Module):
        raise ConfigError(f"--model: {name} must return a torch.nn.Module, got {type(net).__name__}")
    return net.eval()

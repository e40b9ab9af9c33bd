"""Which reader a folder needs, from what lies in it."""

from pathlib import Path

from lipnext.core.errors import DataError

FORMS = (
    "parquet files, IDX files (*-ubyte[.gz]), CIFAR binary archives (*.bin) "
    "or one folder of pictures per class"
)


def detect(path: Path, wanted: str = "parquet") -> str:
    """Return the `data.name` for a folder: "parquet", "idx", "cifar-binary", "folder", or "shards".

    Args:
        path: the folder.
        wanted: the `data.name` so far. Parquet files are read as "shards" where it is that, else as "parquet".

    Raises:
        DataError: if the folder is missing or holds nothing that a reader knows.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder with {FORMS}")
    if not path.is_dir():
        raise DataError(f"{path} is a file; give the folder that holds the data set")
    if next(path.rglob("*.parquet"), None):
        return "shards" if wanted == "shards" else "parquet"
    names = [p.name for p in path.iterdir()]
    if any(name.removesuffix(".gz").endswith("-ubyte") for name in names):
        return "idx"
    if any(name.endswith(".bin") for name in names):
        return "cifar-binary"
    if any(p.is_dir() for p in path.iterdir()):
        return "folder"
    raise DataError(f"{path} holds no data set; expected {FORMS}")

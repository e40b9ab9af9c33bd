from pathlib import Path

import pytest

from lipnext.core.errors import DataError
from lipnext.data.dataset import SOURCES
from lipnext.data.detect import detect


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["train-00000.parquet", "test-00000.parquet"], "parquet"),
        (["plain_text/train-00000.parquet", "README.md"], "parquet"),
        (["train-images-idx3-ubyte.gz"], "idx"),
        (["train-images.idx3-ubyte", "t10k-labels.idx1-ubyte"], "idx"),
        (["data_batch_1.bin", "batches.meta.txt"], "cifar-binary"),
        (["train.bin"], "cifar-binary"),
        (["cat/1.png", "dog/1.png"], "folder"),
        (["train/cat/1.png", "test/cat/1.png"], "folder"),
    ],
)
def test_the_form_of_a_data_set_is_seen_from_its_files(files: list[str], wanted: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert detect(tmp_path) == wanted
    assert wanted in SOURCES


def test_parquet_files_stay_on_the_disk_where_that_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    assert detect(tmp_path / "pictures", "shards") == "folder"
    (tmp_path / "train-00000.parquet").touch()
    assert detect(tmp_path, "shards") == "shards"
    assert detect(tmp_path, "folder") == "parquet"


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing does not exist; give a folder with parquet files, IDX"):
        detect(tmp_path / "missing")
    with pytest.raises(DataError, match=r"holds no data set; expected parquet files, IDX files"):
        detect(tmp_path)
    (tmp_path / "picture.png").touch()
    with pytest.raises(DataError, match=r"holds no data set; expected .* one folder of pictures per class"):
        detect(tmp_path)
    with pytest.raises(DataError, match=r"picture.png is a file; give the folder that holds the data set"):
        detect(tmp_path / "picture.png")

"""The input path on its own: images per second from parquet shards on the disk to float batches, without any network.

    python benchmarks/input.py --json

Writes shards of random JPEG pictures to a temporary folder, and draws one shuffled epoch of batches from them with each number
of decoding threads in turn. Pictures have the size that is asked for (decoding alone), or 1.5 times that (`resized`: decoding,
resizing and cropping). `memory`: the same pictures decoded beforehand, which is what a data set that fits into memory costs.
"""

import argparse
import io
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from timing import alternate, report

from lipnext.core.experiment import DataSpec
from lipnext.data.batches import batches
from lipnext.data.dataset import Dataset, ImageSet, load
from lipnext.data.shards import Shards, decoding_threads

ROW_GROUP = 100


def jpeg(side: int, rng: np.random.Generator) -> bytes:
    """A picture with structure at all scales: pure noise would take JPEG longer than photographs do."""
    pixels = np.zeros((side, side, 3))
    for cells in (2, 4, 8, 16, side // 2):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(coarse.resize((side, side), Image.Resampling.BILINEAR)) / 5
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(folder: Path, side: int, images: int) -> int:
    """Write a training and a test shard; return the bytes of all training pictures."""
    rng = np.random.default_rng(0)
    different = [jpeg(side, rng) for _ in range(min(images, 64))]
    pictures = [different[k % len(different)] for k in range(images)]
    for part, some in (("train", pictures), ("test", pictures[:10])):
        labels = pa.array([k % 10 for k in range(len(some))], pa.int64())
        table = pa.table({"image": pa.array(some, pa.binary()), "label": labels})
        pq.write_table(table, folder / f"{part}-0.parquet", row_group_size=ROW_GROUP, use_dictionary=False)
    return sum(map(len, pictures))


def epoch(part: ImageSet, batch: int) -> None:
    """Draw all batches of an epoch, as the training loop does."""
    for _ in batches(part, batch, seed=0, epoch=0, drop_last=False):
        pass


def measured(side: int, stored: int, args: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        encoded = write(Path(folder), stored, args.images)
        started = time.perf_counter()
        part = load(DataSpec(name="shards", path=folder, size=side, validation=0.02)).train
        opening = time.perf_counter() - started
        assert isinstance(part, Shards)
        pixels = (part.float_images() * 255).round_().to(torch.uint8)
        memory = Dataset(images=pixels, labels=part.labels, classes=part.classes)
        actions = {f"{n}": partial(epoch, replace(part, threads=n), args.batch) for n in args.threads}
        seconds = alternate(actions | {"memory": partial(epoch, memory, args.batch)}, args.repeats, warmup=1)
    return {
        "side": side,
        "stored_side": stored,
        "images": len(part),
        "bytes_per_picture": encoded // args.images,
        "seconds_to_open": round(opening, 4),
        "images_per_second": {
            name: round(len(part) / statistics.median(values)) for name, values in seconds.items()
        },
        "encoded_bytes_kept": part.groups.bytes_kept(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 224])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, decoding_threads()}))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = [
        measured(side, stored, args) | {"resized": stored != side}
        for side in args.sides
        for stored in (side, 3 * side // 2)
    ]
    what = "images per second of the input path by number of decoding threads, and from memory"
    report({"what": what, "batch": args.batch, "rows": rows}, args.json, args.out)


if __name__ == "__main__":
    main()

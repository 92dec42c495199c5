"""Cost of checksums: in a save, and as bytes per second of verification on one core.

    python -m benchmarks.checkpoint [--mebibytes 1024] [--rounds 9] [--directory DIR]

Saves with and without a checksum take turns; both flush to disk. `--directory` selects the disk.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from sightline.training import shards
from sightline.training.manifest import checksum_of, shard_file


class NoChecksum:
    def update(self, data: object) -> None: ...

    def hexdigest(self) -> str:
        return ""


def seconds_to_write(directory: Path, state: dict[str, torch.Tensor], *, checksum: bool) -> float:
    path = directory / shard_file(0)
    path.unlink(missing_ok=True)
    begin = time.perf_counter()
    if checksum:
        shards.write_shards(path, state)
    else:
        with mock.patch.object(shards.xxhash, "xxh3_128", NoChecksum):
            shards.write_shards(path, state)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = {f"weight.{index}": torch.randn(1 << 22) for index in range(options.mebibytes // 16)}  # 16 MiB each
    directory = Path(tempfile.mkdtemp(dir=options.directory))
    times: dict[bool, list[float]] = {True: [], False: []}
    try:
        for lap in range(options.rounds + 1):
            for checksum in (True, False):
                seconds = seconds_to_write(directory, state, checksum=checksum)
                if lap > 0:
                    times[checksum].append(seconds)
        ratios = [with_sum / without for with_sum, without in zip(times[True], times[False], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rate = options.mebibytes / 1024 / statistics.median(times[True])
        print(f"save of {options.mebibytes} MiB: {rate:.2f} GiB/s; with / without checksum {median:.3f}", end="")
        print(f" (quartiles {low:.3f} to {high:.3f}, {options.rounds} pairs)")
        begin = time.perf_counter()
        checksum_of(directory / shard_file(0))
        seconds = time.perf_counter() - begin
        print(f"verification from the page cache: {options.mebibytes * (1 << 20) / seconds / 1e9:.2f} GB/s on one core")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()

"""How fast are experts read from a lender in another process, beside the disk? Prints one table.

    python -m tests.bench.lend FOLDER [EXPERTS ROUNDS]

Both by turns, through the code that a worker loads with: digests and the check of values included,
packing left out, which costs the same and more than either.
"""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from cluster import rpc
from cluster.lending.borrower import BorrowedFolder, Borrower, LenderInfo
from cluster.lending.calls import LenderCalls
from model.tensor_files import digested
from model.units import Unit
from model.weights import Checkpoint


def read(checkpoint: Checkpoint, units: list[Unit]) -> tuple[float, int, list[str]]:
    """Seconds, bytes and digests of reading these experts once, each dropped at once."""
    num_bytes, digests = 0, []
    started = time.perf_counter()
    for unit in units:
        expert = f"model.layers.{unit.layer}.block_sparse_moe.experts.{unit.expert_id}"
        w1, w2, w3 = (f"{expert}.{name}.weight" for name in ("w1", "w2", "w3"))
        with digested() as digest:
            for names in ((w1, w3), (w2,)):
                num_bytes += checkpoint.load_tensor(*names).nbytes
        digests.append(digest.hexdigest())
    return time.perf_counter() - started, num_bytes, digests


def main(folder: Path, num_experts: int, num_rounds: int) -> None:
    local = Checkpoint(folder)
    weights = local.sample()
    command = [sys.executable, "-m", "tests.integration.lending", str(folder), weights]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lender = LenderInfo(process.stdout.readline().strip(), folder, weights)
        calls = LenderCalls(rpc.LOOPBACK_ONLY)
        borrower = Borrower(calls, lambda: [lender], folder, folder, weights)
        borrowed = Checkpoint(folder, files=BorrowedFolder(borrower))
        started = time.perf_counter()
        assert borrowed.sample() == weights
        print(f"sample of a borrowed checkpoint: {time.perf_counter() - started:.2f} s")
        units = local.config.expert_units[:num_experts]
        seconds: dict[str, list[float]] = {"disk": [], "lender": []}
        for _ in range(num_rounds):
            found = []
            for source, checkpoint in (("disk", local), ("lender", borrowed)):
                took_s, num_bytes, digests = read(checkpoint, units)
                seconds[source].append(took_s)
                found.append(digests)
            assert found[0] == found[1]
        calls.close()
    print(f"{len(units)} experts, {num_bytes / 1e9:.2f} GB, {num_rounds} rounds by turns")
    print("| read from | seconds, median (least to most) | GB/s |\n| --- | --- | --- |")
    for source, took in seconds.items():
        middle = median(took)
        spread = f"{min(took):.1f} to {max(took):.1f}"
        print(f"| {source} | {middle:.1f} ({spread}) | {num_bytes / middle / 1e9:.2f} |")


if __name__ == "__main__":
    experts, rounds = sys.argv[2:] or ("16", "3")
    main(Path(sys.argv[1]).expanduser(), int(experts), int(rounds))

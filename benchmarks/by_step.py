# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CPU time of matching, merging and unmerging, ours and tomesd's, one thread.

python benchmarks/by_step.py
"""

import time

import torch
from tomesd.merge import bipartite_soft_matching_random2d

from mmagic_tome.merging import bipartite_match, regular_layout

SIDE, CHANNELS, RATIO, REPEATS = 64, 320, 0.5, 15


def milliseconds(function) -> str:
    """Best and median of the CPU time of a call, after one call to warm up."""
    function()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        times.append(1000 * (time.process_time() - start))
    return f"{min(times):7.2f} (median {sorted(times)[REPEATS // 2]:.2f})"


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(2, SIDE * SIDE, CHANNELS)
    r = int(SIDE * SIDE * RATIO)
    layout = regular_layout(SIDE, SIDE).select(0)

    def theirs():
        return bipartite_soft_matching_random2d(x, SIDE, SIDE, 2, 2, r, no_rand=True)

    plan = bipartite_match(x, *layout, r)
    merge, unmerge = theirs()
    y = plan.merge(x)
    rows = {
        "matching": (lambda: bipartite_match(x, *layout, r, exact=False), theirs),
        "merge": (lambda: plan.merge(x), lambda: merge(x)),
        "unmerge": (lambda: plan.unmerge(y), lambda: unmerge(y)),
    }
    print(
        f"torch {torch.__version__}, {tuple(x.shape)} float32, ratio {RATIO}, CPU ms of one thread"
    )
    for name, (ours, tomesd) in rows.items():
        print(f"{name:9} ours {milliseconds(ours)}   tomesd {milliseconds(tomesd)}")


if __name__ == "__main__":
    main()

"""One call on some of the cores, beside torch, measured in its own process.

    python -m experiments.bench.threads "causal 2048" --cores 1

Prints one JSON line: seconds by contender. The process is pinned before JAX and torch start, which
make as many threads as it may use cores.
"""

from __future__ import annotations

import argparse
import json
import os


def main() -> None:
    parser = argparse.ArgumentParser(description="One call of attention on some of the cores.")
    parser.add_argument("shape", help="a named shape")
    parser.add_argument("--cores", type=int, required=True, help="how many cores to use")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--repeats", type=int, default=9, help="at least this many timed runs")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])

    from experiments.bench import contenders
    from experiments.bench.shapes import SHAPES

    shape = SHAPES[options.shape]
    made = {"ours": contenders.ours(shape, backward=options.backward)}
    if contenders.have_torch():
        import torch

        torch.set_num_threads(options.cores)
        made["torch sdpa"] = contenders.torch_sdpa(shape, backward=options.backward)
    print(json.dumps(contenders.in_turns(made, options.repeats)))


if __name__ == "__main__":
    main()

"""Estimates the memory, communication and time of a training step on other devices.

::

    python -m experiments plan --size 8B --length 8k --device v5e --mesh data=16,model=16 --fsdp
    python -m experiments plan --size 1.3B --mesh data=16 --fsdp --compile   # needs libtpu

Parameters and optimizer state are counted exactly, shard by shard, from the model and its sharding
rules. Activations, collectives, FLOPs and time are arithmetic, see ``estimate``: a step recomputes
each layer in the backward pass (``remat``), and time assumes peak rates and no overlap.
``--compile`` also compiles the step ahead of time for TPUs, and reports the compiler's own figures.
"""

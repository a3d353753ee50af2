"""``card``: proves, measures and tunes the GPU kernels on one NVIDIA card, within minutes.

::

    python -m experiments card --out FOLDER --minutes 6
    python -m experiments card --out FOLDER --minutes 6 --only speed,tiles
    python -m experiments card --out FOLDER --dry    # every part, tiny, on any machine

The parts run in the order of ``parts.PARTS``, each in a process of its own (``processes``), and
each work through a list of items (``worker``). A result is a line of ``FOLDER/records.jsonl``,
written as it comes: a run that is cut short keeps what it has. An item that fails leaves its
traceback and the next one runs; one that hangs or takes its process down is recorded too, and the
part resumes after it in a new process. To publish a run, copy the file to
``experiments/results/card-DATE.jsonl`` and run ``python -m experiments report``; to use the tiles
that were fastest, copy ``FOLDER/tuned.py`` to ``attention_jax/backends/pallas_gpu/tuned.py``.
"""

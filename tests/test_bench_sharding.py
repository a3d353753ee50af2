"""The tables of ``experiments/results/SHARDING.md``, with small arrays."""

import pytest

from experiments.bench import ring, sharding


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_the_table_of_a_decoder_counts_what_its_step_sends():
    *_, row = sharding.decoder_table(["data"])
    assert cells(row) == ["data", "data=8", "1 all-reduce", "1 all-reduce"]


@pytest.mark.slow
def test_the_table_of_attention_has_no_collectives_over_batch_and_heads():
    _, _, *rows = map(cells, sharding.attention_table((8, 16, 8, 8)))
    assert len(rows) == 16
    for _, name, _, batch, heads, sequence in rows:
        assert (batch, heads) == ("0", "0")
        assert "all-gather" in sequence or name == "jax.nn"


def test_an_error_is_shown_in_the_table():
    def refuse(x):
        raise ValueError("no")

    assert sharding.collectives_of(refuse, 1.0, may_raise=True) == "raises ValueError"


@pytest.mark.slow
def test_the_table_of_rings_compares_with_one_device():
    options = ring.Options(length=1024, heads=4, kv_heads=2, implementation="blockwise")
    found = ring.rows(options)
    assert [(row.kind, row.name) for row in found] == [
        (kind, name)
        for kind in ("forward", "gradient")
        for name in ("one device", "ring", "ring, zigzag")
    ]
    assert all(row.seconds > 0 for row in found)
    assert found[0].sent == {}
    assert found[1].sent == {"collective-permute": 2}
    assert found[4].sent == {"collective-permute": 6}
    _, _, _, _, one, alone, *_ = map(cells, ring.table(options, found))
    assert one[:2] == ["forward", "one device"]
    assert "(" not in one[2]
    assert alone[2].endswith(f"({found[1].seconds / found[0].seconds:.2f})")


def test_a_ring_without_repeats_is_only_compiled():
    small = ring.Options(length=128, heads=2, kv_heads=1, implementation="xla", repeats=0)
    found = ring.rows(small)
    assert {row.seconds for row in found} == {None}
    assert all(row.memory > row.temporary > 0 for row in found)


@pytest.mark.parametrize(("kind", "local"), [("forward", 4 * 2 + 8), ("gradient", 6 * 2 + 3 * 8)])
def test_buffers_are_counted_in_local_heads(kind, local):
    options = ring.Options(length=4096 * ring.DEVICES, heads=8, kv_heads=2)
    assert ring.buffers(options, kind) == local  # a head of 4096 x 64 float32 is 1 MiB

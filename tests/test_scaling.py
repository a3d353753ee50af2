"""That what is measured is measured: slopes of known growth, and a few real points."""

import json

import pytest

from experiments.bench import scaling
from experiments.bench.scaling import KINDS, Point


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_slope_is_the_power_of_the_growth(power):
    points = [Point(T, 1e-6 * T**power, 0) for T in scaling.LENGTHS]
    assert scaling.slope(points) == pytest.approx(power)
    assert scaling.slope(points[:3]) is None  # one length is no growth


def test_what_is_shorter_or_longer_does_not_count():
    lengths = {256: 9.0, 4096: 1.0, 16_384: 4.0, 262_144: 900.0}
    points = [Point(T, seconds, 0) for T, seconds in lengths.items()]
    assert scaling.slope(points) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_runs(name):
    points = scaling.grow(KINDS[name], 1, lengths=(1024,))
    assert points[0].seconds > 0


def test_it_stops_where_a_call_would_take_too_long(monkeypatch):
    monkeypatch.setattr(scaling, "LONGEST", 0.0)
    points = scaling.grow(KINDS["linear"], 1, lengths=(256, 1024))
    assert [point.length for point in points] == [256]


def test_a_line_says_whether_the_slope_is_reached():
    points = [Point(4096, 1.0, 2**20), Point(16_384, 16.0, 2**22)]
    assert "MISSED" in scaling.show("linear", KINDS["linear"], points)
    assert "slope 2.00" in scaling.show("all", KINDS["all"], points)
    assert "MISSED" not in scaling.show("all", KINDS["all"], points)
    assert "too slow to say" in scaling.show("all", KINDS["all"], points[:1])


def test_the_table_is_that_of_the_file(tmp_path):
    kinds = {"all": [(4096, 1.0), (65_536, 256.0)], "linear": [(4096, 1.0), (65_536, 16.0)]}
    kinds["retention"] = [(4096, 0.5)]
    record = {"time": "2026-11-25", "device": "a card", "jax": "0.10.2"}
    record["kinds"] = {
        name: [{"length": T, "seconds": s, "bytes": 2**20} for T, s in points]
        for name, points in kinds.items()
    }
    (tmp_path / scaling.FILE).write_text(json.dumps(record))
    rows = scaling.block(tmp_path).splitlines()
    assert rows[2:5] == [
        "| all | 2.00 | 1,000.0 | 256,000.0 | 1.0 |",
        "| linear | **1.00** | 1,000.0 | 16,000.0 | 1.0 |",
        "| retention |  | 500.0 |  |  |",
    ]

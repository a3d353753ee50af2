"""Growth with length: slopes of known growth, and a few real measurements."""

import pytest

from experiments.bench import scaling
from experiments.bench.scaling import KINDS, Point


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_slope_is_the_power_of_the_growth(power):
    points = [Point(T, 1e-6 * T**power, 0) for T in scaling.LENGTHS]
    assert scaling.slope(points) == pytest.approx(power)
    assert scaling.slope(points[:3]) is None  # a single length in range


def test_slope_ignores_shorter_and_longer_sequences():
    lengths = {256: 9.0, 4096: 1.0, 16_384: 4.0, 262_144: 900.0}
    points = [Point(T, seconds, 0) for T, seconds in lengths.items()]
    assert scaling.slope(points) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_kind_runs(name):
    points = scaling.grow(KINDS[name], 1, lengths=(1024,))
    assert points[0].seconds > 0


def test_measuring_stops_before_a_call_takes_too_long(monkeypatch):
    monkeypatch.setattr(scaling, "LONGEST", 0.0)
    points = scaling.grow(KINDS["linear"], 1, lengths=(256, 1024))
    assert [point.length for point in points] == [256]


def test_line_says_whether_the_slope_is_reached():
    points = [Point(4096, 1.0, 2**20), Point(16_384, 16.0, 2**22)]
    assert "MISSED" in scaling.line("linear", KINDS["linear"], points)
    assert "slope 2.00" in scaling.line("all", KINDS["all"], points)
    assert "MISSED" not in scaling.line("all", KINDS["all"], points)
    assert "too slow to tell" in scaling.line("all", KINDS["all"], points[:1])


def test_table_has_slopes_times_and_memory():
    kinds = {"all": [(4096, 1.0), (65_536, 256.0)], "linear": [(4096, 1.0), (65_536, 16.0)]}
    kinds["retention"] = [(4096, 0.5)]
    record = {
        name: [{"length": T, "seconds": s, "bytes": 2**20} for T, s in points]
        for name, points in kinds.items()
    }
    assert scaling.table({"kinds": record})[2:] == [
        "| all | 2.00 | 1,000.0 | 256,000.0 | 1.0 |",
        "| linear | **1.00** | 1,000.0 | 16,000.0 | 1.0 |",
        "| retention |  | 500.0 |  |  |",
    ]

"""What a line of metrics says of a run's pace, in numbers and in words."""

import pytest
import torch

from mmssl.distributed import Council
from mmssl.engine import StepResult
from mmssl.engine.loop import Meter, Pace, summary


def result(loss, norm=None, **metrics):
    metrics = {name: torch.tensor(value) for name, value in metrics.items()}
    return StepResult(torch.tensor(loss), metrics, None if norm is None else torch.tensor(norm))


def test_a_line_holds_means_and_shares_of_the_time(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("mmssl.engine.loop.time.monotonic", lambda: clock[0])
    meter = Meter(Pace(gflop=2.0, peak=400.0), since=clock[0])
    meter.add(result(1.0, 3.0, accuracy=0.2), waited=1.0, computed=2.0)
    meter.add(result(2.0, 5.0, accuracy=0.4), waited=1.0, computed=4.0)
    clock[0] += 10
    line = meter.line(Council(1), batch_size=50)
    assert line["loss"] == 1.5
    assert line["grad_norm"] == 4.0
    assert line["accuracy"] == pytest.approx(0.3)
    assert (line["samples_per_s"], line["wait"], line["compute"]) == (10, 0.2, 0.6)
    assert (line["gflop_per_s"], line["mfu"]) == (20, 0.05)
    meter.add(result(7.0), waited=0.0, computed=1.0)
    clock[0] += 1
    again = meter.line(Council(1), batch_size=50)
    assert again["loss"] == 7
    assert again["compute"] == 1


def test_where_the_peak_is_not_known_there_is_no_utilisation():
    assert Pace(3.0).reached(2.0) == {"gflop_per_s": 6.0}
    meter = Meter()
    meter.add(result(1.0), 0.0, 0.0)
    assert "gflop_per_s" not in meter.line(Council(1), 1)


LINE = {"loss": 0.5, "samples_per_s": 99.6, "wait": 0.25, "compute": 0.7, "memory_gb": 1.25}


def test_the_words_of_a_line():
    assert summary(LINE) == "loss 0.5000  100 samples/s  25 % waiting for data, 70 % computing, 5 % else  1.2 GB"
    more = {**LINE, "gflop_per_s": 12.3, "grad_norm": 0.25, "loss_scale": 65536.0}
    assert "12.3 GFLOP/s" in summary(more)
    assert "gradient 0.25  scale 6.55e+04" in summary(more)
    assert "MFU 41 %" in summary({**more, "mfu": 0.41})
    assert "GFLOP/s" not in summary({**more, "mfu": 0.41})

"""The demo runs for real; in the slow set, its heads come out in the order of EVL's Table 8 for three seeds."""

from pathlib import Path

import pytest
import torch

from vcache.pipelines.demo.run import print_demo, run_demo


def test_a_small_demo_runs_end_to_end_and_again_from_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcache.pipelines.demo.run.EVL_SETTINGS", {"epochs": 1, "batch_size": 4})
    monkeypatch.setattr("vcache.pipelines.demo.run.LINEAR_SETTINGS", {"epochs": 1, "batch_size": 4})
    result = run_demo(tmp_path, train=20, val=10, tca_gain=30.0)
    print_demo(result)
    assert [row["num_videos"] for row in result["rows"]] == [10] * 4
    assert result["chance"] == 0.1
    for name in ("videos", "store", "runs"):
        assert Path(result[name]).exists()
    out = capsys.readouterr().out
    assert "T-CA x 30 (ours, not the paper's)" in out
    assert "$ vcache extract" in out
    again = run_demo(tmp_path, train=20, val=10)
    assert [row["top1"] for row in again["rows"]] == [row["top1"] for row in result["rows"][:3]]
    assert "0 extracted now, 30 already there" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_ordering_of_table_8_holds_for_three_seeds(tmp_path: Path) -> None:
    """Measured means: linear 0.195, EVL without temporal modules 0.28, with all of them 0.75; chance 0.1, order-blind 0.5."""
    torch.set_num_threads(2)
    for seed in range(3):
        linear, without, with_all = (row["top1"] for row in run_demo(tmp_path, seed=seed)["rows"])
        assert 0.10 < linear < 0.35
        assert 0.15 < without < 0.5
        assert with_all > 0.65
        assert with_all - max(linear, without) > 0.25

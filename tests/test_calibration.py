"""`colrow calibrate`: a profile of this machine from what its ranks measured, and an honest error."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from colrow.cost_models.calibration import MatmulRow, Measurements, calibrated, fit_errors
from colrow.cost_models.communication import COLLECTIVE_KINDS
from colrow.cost_models.compute import flops_per_s
from colrow.cost_models.hardware import load_hardware
from colrow.rewrite import calibration
from colrow.rewrite.calibration import Reading, group_sizes, typical
from colrow.rewrite.calibration_command import calibrate_command
from colrow.rewrite.cli import main
from colrow.rewrite.ranks import run_ranks

LATENCY_S, S_PER_BYTE, RATE = 1e-4, 1e-9, 5e10


def measured(noise: float = 0.0) -> Measurements:
    """A machine of one alpha and beta; ``noise`` makes one row slower."""
    sizes = [256 << n for n in range(12)]
    rows = [(size, LATENCY_S + S_PER_BYTE * size) for size in sizes]
    rows[5] = (rows[5][0], rows[5][1] * (1 + noise))
    return Measurements(
        ranks=2,
        collectives={kind: {2: rows} for kind in COLLECTIVE_KINDS},
        matmuls={"float32": [MatmulRow(512, w, w, 2 * 512 * w * w / RATE) for w in (256, 512, 1024)]},
        stream_bytes_per_s=[1e10, 8e9, 9e9],
        launch_s=4e-6,
        eager_dispatch_s=None,
        units=1,
        memory_bytes=8 * 10**9,
        device="a CPU",
        implementation="gloo",
        date="2026-11-20",
    )


def test_the_profile_says_what_was_measured(tmp_path):
    text, profile = calibrated("mine", measured())
    (tmp_path / "mine.json").write_text(text)
    assert load_hardware(str(tmp_path / "mine.json")) == profile
    for size in (256, 5000, 2**19):
        expected = LATENCY_S + S_PER_BYTE * size
        assert profile.collective_s("all_reduce", size, 2) == pytest.approx(expected, rel=1e-4)
        assert profile.predicts_within("all_reduce", size, 2)
    assert not profile.predicts_within("all_reduce", 2**30, 2)
    assert flops_per_s("float32", profile) == pytest.approx(RATE)
    assert (profile.memory.bandwidth_bytes_per_s, profile.memory.efficiency) == (1e10, 0.9)
    assert (profile.memory_gb, profile.ranks_per_node, profile.basis) == (8.0, 2, "measured")


def test_the_error_is_of_sizes_left_out():
    clean, noisy = measured(), measured(noise=0.5)
    for one, profile_of in ((clean, calibrated("a", clean)[1]), (noisy, calibrated("b", noisy)[1])):
        errors = {error.what: error for error in fit_errors(one, profile_of)}
        assert set(errors) == {*COLLECTIVE_KINDS, "float32 matmul"}
        worst = errors["all_reduce"].left_out_max
        assert worst == pytest.approx(1 / 3, rel=0.01) if one is noisy else worst < 1e-3


def test_noise_steeper_than_any_link_becomes_a_straight_line():
    one = measured()
    rows = list(one.collectives["all_reduce"][2])
    rows[1] = (rows[1][0], 5e-3)  # and all later ones at least that
    rows[2:] = [(size, 5e-3 + S_PER_BYTE * size) for size, _ in rows[2:]]
    noisy = Measurements(**{**vars(one), "collectives": {**one.collectives, "all_reduce": {2: rows}}})
    profile = calibrated("noisy", noisy)[1]
    (group,) = profile.collectives.all_reduce.groups
    assert len(group.segments) == 1
    assert group.left_out_median_rel_error is None
    assert profile.collective_s("all_reduce", 2**19, 2) == pytest.approx(rows[-1][1], rel=0.1)
    assert len(profile.collectives.broadcast.groups[0].segments) > 1


def test_matmuls_are_compared_with_the_roofline():
    one = measured()
    slow = MatmulRow(1, 256, 256, 1e-3)
    assert slow.flops_per_s == pytest.approx(2 * 256 * 256 / 1e-3)
    with_slow = Measurements(**{**vars(one), "matmuls": {"float32": [*one.matmuls["float32"], slow]}})
    found = {e.what: e for e in fit_errors(with_slow, calibrated("a", with_slow)[1])}["float32 matmul"]
    assert found.rows == 4
    assert found.fit_median < 0.1
    assert found.fit_max > 0.9


@pytest.mark.parametrize(("ranks", "sizes"), [(2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (6, [2, 4, 6])])
def test_groups_are_powers_of_two_and_all_ranks(ranks, sizes):
    assert group_sizes(ranks) == sizes


# ---- what a reading counts as


def readings_on_rank():
    """Rank 0 waits for a processor in three of four readings; rank 1 is busier."""
    rank = dist.get_rank()
    mine = [Reading(10.0 - rank, 2.0 + rank, 6.0 * (1 - rank))] * 3 + [Reading(4.0 + rank, 2.0 + rank, 0.0)]
    return typical(mine, True), typical(mine, False), typical(mine[:1], True)


def test_readings_without_waiting_for_a_processor_count():
    for together, alone, only in run_ranks(readings_on_rank, 2):
        assert together == 5.0  # the slower rank's wall clock, of the reading without waiting
        assert alone == 3.0  # the busier rank's
        assert only == 10.0


# ---- the command


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(calibration, "COLLECTIVES_S", 2.0)
    monkeypatch.setattr(calibration, "MATMULS_S", 0.1)
    monkeypatch.setattr(calibration, "LARGEST_BYTES", 2**15)
    monkeypatch.setattr(calibration, "MATMUL_WIDTHS", (256,))
    monkeypatch.setattr(calibration, "STREAM_BYTES", 2**20)
    monkeypatch.setattr(calibration, "DTYPES", (torch.float32,))


def test_a_calibrated_machine_is_hardware_like_any_other(cwd, quick, capfd):
    calibrate_command(2, "mine.json", True)
    out, progress = capfd.readouterr()
    found = json.loads(out)
    assert (found["schema"], found["ranks"], found["profile"]) == ("colrow.calibrate/1", 2, "mine.json")
    assert {error["what"] for error in found["errors"]} == {*COLLECTIVE_KINDS, "float32 matmul"}
    assert all(f"{kind}, 2 ranks" in progress for kind in COLLECTIVE_KINDS)
    profile = load_hardware("mine.json")
    assert (profile.name, profile.ranks_per_node, profile.basis) == ("mine", 2, "measured")
    for kind in COLLECTIVE_KINDS:
        (rows,) = found["measured"]["collectives"][kind].values()
        assert rows[0][0] <= 512
        assert rows[-1][0] == 2**15
        assert all(seconds > 0 for _, seconds in rows)
    shown = CliRunner().invoke(main, ["hardware", "show", "mine.json"])
    assert "all_reduce on mine" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "1"], "1 is not in the range"),
        (["--ranks", "9"], "got 9, need at most 8"),
        (["--out", "no/such/x.json"], "no such folder"),
        (["--out", "mine.txt"], "got .txt, need .json"),
        (["--out", "mine"], "got no ending, need .json"),
    ],
)
def test_wrong_use_exits_2_before_anything_is_measured(cwd, monkeypatch, arguments, words):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = CliRunner().invoke(main, ["calibrate", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr


def test_torchrun_with_another_number_of_ranks_is_refused(cwd, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    result = CliRunner().invoke(main, ["calibrate", "--ranks", "2"])
    assert result.exit_code == 2
    assert "torchrun started another number of ranks; got 4, need 2" in result.stderr

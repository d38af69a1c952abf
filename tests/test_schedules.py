"""What each step does, as tables of numbers."""
import math

import pytest
import train_gpt as tg

COMMON = {"muon_momentum_warmup_start": 0.8, "muon_momentum": 0.9, "muon_momentum_warmup_steps": 200, "swa_every": 50,
          "swa_start_frac": 0.2, "late_qat_threshold": 0.25}
BY_STEPS = {**COMMON, "max_wallclock_seconds": 0.0, "iterations": 1000, "warmdown_iters": 400}
BY_CLOCK = {**COMMON, "max_wallclock_seconds": 600.0, "iterations": 20_000, "warmdown_iters": 1000}
BY_SHARE = {**BY_STEPS, "warmdown_frac": 0.4, "min_lr": 0.1}


def plan(settings, step, elapsed_s=0.0, pace_s=0.0):
    return tg.plan_step(tg.Hyperparameters(**settings), step, elapsed_s, pace_s)


@pytest.mark.parametrize("step, lr, momentum, qat, snapshot, hardness", [
    (0, 1.0, 0.8, False, False, 0.0),
    (49, 1.0, 0.8245, False, False, 0.0),
    (100, 1.0, 0.85, False, False, 0.0),
    (199, 1.0, 0.8995, False, False, 0.0),
    (200, 1.0, 0.9, False, False, 0.0),
    (600, 1.0, 0.9, False, False, 0.0),
    (601, 0.9975, 0.9, False, False, 0.0),
    (800, 0.5, 0.9, False, False, 0.0),
    (849, 0.3775, 0.9, False, False, 0.0),
    (899, 0.2525, 0.9, False, False, 0.0),
    (900, 0.25, 0.9, False, False, 0.0),
    (901, 0.2475, 0.9, True, False, 0.0025 / 0.225),
    (919, 0.2025, 0.9, True, False, 0.0475 / 0.225),
    (949, 0.1275, 0.9, True, True, 0.1225 / 0.225),
    (950, 0.125, 0.9, True, False, 0.125 / 0.225),
    (989, 0.0275, 0.9, True, False, 0.2225 / 0.225),
    (990, 0.025, 0.9, True, False, 1.0),
    (999, 0.0025, 0.9, True, True, 1.0),
])
def test_a_run_of_so_many_steps(step, lr, momentum, qat, snapshot, hardness):
    found = plan({**BY_STEPS, "min_lr": 0.1}, step)  # which is WARMDOWN_FRAC's
    assert (found.lr_scale, found.momentum) == pytest.approx((lr, momentum))
    assert (found.qat, found.snapshot, found.hardness) == (qat, snapshot, pytest.approx(hardness))


@pytest.mark.parametrize("step, elapsed, pace, lr", [
    (0, 0.0, 0.0, 1.0), (1, 5.0, 0.0, 1.0),                # the pace is not known yet
    (1000, 100.0, 0.1, 1.0), (5000, 500.0, 0.1, 1.0), (5250, 525.0, 0.1, 0.75), (5500, 550.0, 0.1, 0.5),
    (5990, 599.0, 0.1, 0.01), (6000, 600.0, 0.1, 0.0), (6010, 601.0, 0.1, 0.0),
    (2500, 500.0, 0.2, 0.5), (2999, 598.0, 0.2, 0.01),     # slower steps: the same number of them falls
    (19_500, 100.0, 0.005, 0.5), (19_999, 100.0, 0.005, 0.001),   # the steps end first
])
def test_a_run_that_the_clock_ends(step, elapsed, pace, lr):
    assert plan(BY_CLOCK, step, elapsed, pace).lr_scale == pytest.approx(lr)


@pytest.mark.parametrize("reserve, elapsed, lr", [(0.0, 538.0, 0.5), (100.0, 450.0, 0.5), (100.0, 500.0, 0.0)])
def test_calibration_takes_its_seconds_from_the_end(reserve, elapsed, lr):
    """2 % of the limit where no reserve is set, and nothing where nothing is calibrated."""
    settings = {**BY_CLOCK, "gptq_reserve_seconds": reserve}
    assert plan({**settings, "gptq_enabled": True}, 100, elapsed, 0.1).lr_scale == pytest.approx(lr)
    assert plan(settings, 100, elapsed, 0.1).lr_scale == pytest.approx(min(1.0, (600 - elapsed) / 100))


@pytest.mark.parametrize("spent, lr, hardness", [(0.0, 1.0, 0.0), (0.599, 1.0, 0.0), (0.6, 1.0, 0.0), (0.7, 0.75, 0.0),
                                                 (0.8, 0.5, 0.0), (0.89, 0.275, 0.0), (0.92, 0.2, 0.05 / 0.135),
                                                 (0.93, 0.175, 0.075 / 0.135), (0.96, 0.1, 1.0), (0.98, 0.1, 1.0),
                                                 (1.0, 0.1, 1.0)])
def test_warmdown_over_a_share_of_steps_or_time(spent, lr, hardness):
    for found in (plan(BY_SHARE, round(1000 * spent)),
                  plan({**BY_SHARE, "max_wallclock_seconds": 600.0}, 10, 600 * spent, 0.1),
                  plan({**BY_SHARE, "max_wallclock_seconds": 600.0}, round(1000 * spent), 1.0, 0.1)):
        assert found.lr_scale == pytest.approx(lr, abs=1e-9)
        assert found.hardness == pytest.approx(hardness, abs=1e-7) and found.qat == (lr < 0.25)


@pytest.mark.parametrize("spent, late, hard_late, hard_always", [
    (0.0, False, 0.0, 0.0), (0.45, False, 0.0, 0.5), (0.649, False, 0.0, 0.649 / 0.9), (0.65, True, 0.0, 0.65 / 0.9),
    (0.825, True, 0.5 / 0.9, 0.825 / 0.9), (0.965, True, 1.0, 1.0), (1.0, True, 1.0, 1.0)])
def test_rounding_after_a_share_or_always(spent, late, hard_late, hard_always):
    for settings, step, elapsed in ((BY_STEPS, round(1000 * spent), 0.0), (BY_CLOCK, 0, 600 * spent)):
        found = plan({**settings, "late_qat_frac": 0.65}, step, elapsed, 0.01)
        assert found.qat == late and found.hardness == pytest.approx(hard_late, abs=1e-7)
        found = plan({**settings, "late_qat_frac": 0.65, "qat_enabled": True}, step, elapsed, 0.01)
        assert found.qat and found.hardness == pytest.approx(hard_always, abs=1e-7)


def test_the_loop_switches_on_after_a_share_of_steps_or_time():
    for settings, before, after in ((BY_STEPS, (349, 0.0), (350, 0.0)), (BY_CLOCK, (0, 209.9), (0, 210.0))):
        looped = {**settings, "num_loops": 1}
        assert [plan(looped, *place, 0.1).looped for place in (before, after)] == [False, True]
        assert plan(settings, *before, 0.1).looped  # without a loop there is one graph
    assert plan({**BY_STEPS, "num_loops": 1, "enable_looping_at": 0.0}, 0).looped


def test_what_is_switched_off_stays_off():
    for step in (0, 500, 999):
        off = plan({**BY_STEPS, "late_qat_threshold": 0.0, "warmdown_iters": 0, "muon_momentum_warmup_steps": 0}, step)
        assert (off.lr_scale, off.momentum, off.qat, off.snapshot) == (1.0, 0.9, False, False)
    for settings in ({"iterations": 0}, {"iterations": 1, "warmdown_iters": 5}):
        assert 0.0 <= plan({**BY_STEPS, **settings}, 0).lr_scale <= 1.0


def test_snapshots_come_at_regular_steps_of_the_end():
    taken = [step + 1 for step in range(1000) if plan(BY_STEPS, step).snapshot]
    assert taken == [950, 1000]
    everywhere = [step + 1 for step in range(1000) if plan({**BY_STEPS, "swa_start_frac": 1.01}, step).snapshot]
    assert everywhere == list(range(50, 1001, 50))


@pytest.mark.parametrize("spent, lr", [(0.0, 1.0), (0.5, 0.5), (0.75, 0.5 - 0.5 * 0.5 ** 0.5), (0.99, 0.05), (1.0, 0.05)])
def test_half_a_cosine(spent, lr):
    """Over the whole run as in PR 1254; MIN_LR is the least of it, and WARMDOWN_ITERS has the same shape."""
    whole = {**BY_STEPS, "warmdown_shape": "cosine", "warmdown_frac": 1.0, "min_lr": 0.05}
    scale = plan(whole, round(1000 * spent)).lr_scale
    assert scale == pytest.approx(0.5 + 0.5 * math.cos(math.pi * spent) if lr > 0.05 else 0.05)
    assert scale == pytest.approx(lr, abs=1e-6)
    assert plan({**BY_STEPS, "warmdown_shape": "cosine"}, 800).lr_scale == pytest.approx(0.5)


def test_no_late_qat_and_none_before_its_first_step():
    for late in ({"late_qat_threshold": 0.25}, {"late_qat_frac": 0.65}):
        assert plan({**BY_STEPS, **late}, 950).qat
        assert not plan({**BY_STEPS, **late, "late_qat": False}, 950).qat
        assert not plan({**BY_STEPS, **late, "late_qat_min_step": 951}, 950).qat
        assert plan({**BY_STEPS, **late, "late_qat_min_step": 950}, 950).qat
    assert plan({**BY_STEPS, "late_qat": False, "qat_enabled": True}, 0).qat

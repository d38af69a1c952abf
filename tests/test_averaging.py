"""EMA, SWA and LAWA against plain loops over the weights of each step, also across a restart and a checkpoint."""
import io
import types

import pytest
import torch
import train_gpt as tg

SHAPES = ((3, 4), (5,))
STEPS = 60


def walk_of(seed=0):
    """The weights after each step: a list of tensors a step, of which the first are those at the start."""
    generator = torch.Generator().manual_seed(seed)
    moves = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(STEPS + 1)]
    return [[sum(part).clone() for part in zip(*moves[:t + 1])] for t in range(STEPS + 1)]


WALK = walk_of()


def averaged(cfg, snapshots=(), restart=None, checkpoint=None):
    """(average of the walk, log line). `restart`: the step before which late QAT begins; `checkpoint`: the step after
    which the run ends, and another one goes on from its state as it is read from a file."""
    params = [torch.nn.Parameter(start.clone()) for start in WALK[0]]
    averager = tg.Averager(cfg, params)
    for step in range(1, STEPS + 1):
        if step == restart:
            averager.ema = averager.copy_params()
        with torch.no_grad():
            for p, value in zip(params, WALK[step]):
                p.copy_(value)
        averager.update(step, tg.StepPlan(1.0, 0.9, False, snapshot=step in snapshots))
        if step == checkpoint:
            file = io.BytesIO()
            torch.save(averager.state(), file)
            params = [torch.nn.Parameter(torch.full_like(p, 9.0)) for p in params]
            averager = tg.Averager(cfg, params)
            averager.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    line = averager.apply()
    return [p.detach() for p in params], line


def slow_ema(decay, restart=None):
    """The memory grows from a step to 1 / (1 - decay) of them, once, from the start of training."""
    average = [w.double() for w in WALK[0]]
    for n in range(1, STEPS + 1):
        if n == restart:
            average = [w.double() for w in WALK[n - 1]]
        keep = min(decay, (1 + n) / (10 + n))
        average = [keep * a + (1 - keep) * w.double() for a, w in zip(average, WALK[n])]
    return average


def slow_mean(steps):
    return [sum(part).double() / len(steps) for part in zip(*(WALK[t] for t in steps))]


def agree(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpoint", [None, 1, 17, 40, STEPS])
@pytest.mark.parametrize("restart", [None, 1, 30, 55])
@pytest.mark.parametrize("decay", [0.5, 0.8, 0.997])
def test_ema(config, decay, restart, checkpoint):
    weights, line = averaged(config(ema_decay=decay), restart=restart, checkpoint=checkpoint)
    agree(weights, slow_ema(decay, restart))
    assert line == "ema:applying EMA weights"


@pytest.mark.parametrize("checkpoint", [None, 8, 30, 50])
@pytest.mark.parametrize("snapshots", [(60,), (9, 30, 31, 50)])
def test_swa(config, snapshots, checkpoint):
    weights, line = averaged(config(swa_enabled=True), snapshots, checkpoint=checkpoint)
    agree(weights, slow_mean(snapshots))
    assert line == f"swa:applying averaged {len(snapshots)} checkpoints"


@pytest.mark.parametrize("checkpoint", [None, 6, 21, 60])
@pytest.mark.parametrize("k, taken", [(3, (42, 49, 56)), (5, (28, 35, 42, 49, 56)),
                                      (20, (7, 14, 21, 28, 35, 42, 49, 56))])
def test_lawa(config, k, taken, checkpoint):
    """The last k of every seventh step, whatever else is averaged."""
    cfg = config(lawa_enabled=True, swa_enabled=True, lawa_k=k, lawa_freq=7)
    weights, line = averaged(cfg, (10, 20), checkpoint=checkpoint)
    agree(weights, slow_mean(taken))
    assert line == f"lawa:applying LAWA averaging k={len(taken)}"


def test_without_an_average_the_last_weights_stay(config):
    weights, line = averaged(config(ema_enabled=False), snapshots=(10, 20))
    agree(weights, [w.double() for w in WALK[-1]])
    assert line.startswith("average:none")
    agree(averaged(config(), snapshots=(10, 20))[0], slow_ema(0.997))  # snapshots that nobody asked for


def test_an_average_of_one_decay_begins_with_the_first_weights(config):
    """As published: 0.9965 from step 0 on."""
    average = [w.double() for w in WALK[0]]
    for weights in WALK[1:]:
        average = [0.9965 * a + 0.0035 * w.double() for a, w in zip(average, weights)]
    agree(averaged(config(ema_decay=0.9965, ema_ramp=False))[0], average)


@pytest.mark.parametrize("reset, step, restarts", [(True, 5, True), (True, 0, False), (False, 5, False)])
def test_late_rounding_restarts_the_average_once(config, rt, reset, step, restarts):
    cfg = config(ema_reset_at_qat=reset)
    weight = torch.nn.Parameter(torch.zeros(3))
    state = types.SimpleNamespace(qat=False, step=step, averager=tg.Averager(cfg, [weight]),
                                  model=types.SimpleNamespace(looped=True))
    for value, qat in ((1.0, False), (2.0, True), (3.0, True)):
        weight.data.fill_(value)
        tg.announce(rt, state, tg.StepPlan(0.1, 0.9, qat, False), cfg)
    assert state.averager.ema[0].tolist() == [2.0 if restarts else 0.0] * 3

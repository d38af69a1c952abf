"""What a checkpoint costs: the foreground's share, and steps of training with and without one being written beside them.

    TRAIN_BATCH_TOKENS=1024 python tools/checkpoint_cost.py [PAIRS]      # the environment's settings; data is not needed

Steps alternate, so that a machine in other use slows both alike: steps are taken while a checkpoint is written, then as many alone.
"""
from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
import train_gpt as tg  # noqa: E402


class RandomTokens:
    """In the place of TrainData: one micro-batch of random tokens."""

    micro_steps = 1

    def __init__(self, cfg: tg.Hyperparameters, rt: tg.Runtime):
        self.rt = rt
        rows = torch.randint(cfg.vocab_size, (cfg.train_batch_tokens // cfg.train_seq_len, cfg.train_seq_len + 1))
        self.inputs, self.targets = (part.contiguous().to(rt.device) for part in (rows[:, :-1], rows[:, 1:]))

    def training_batch(self, step: int, seq_len: int):
        return [(self.inputs, self.targets, {})]


def measure(cfg: tg.Hyperparameters, rt: tg.Runtime, pairs: int) -> None:
    """Print a line for each pair of steps, then the medians."""
    torch.manual_seed(0)
    model = tg.GPT(cfg, rt.attend, rt.dtype, tg.quant_specs(cfg, tg.parameter_shapes(cfg)), rt.kernels).to(rt.device)
    state, data, loss_fn = tg.TrainState.initial(model, cfg, rt), RandomTokens(cfg, rt), rt.compiled(model.loss)
    state.bigrams.weigh = lambda data, step: [None]
    plan, rows = tg.plan_step(cfg, 0, 0.0, 0.0), []

    def seconds(work) -> float:
        rt.synchronize()
        start = time.perf_counter()
        work()
        rt.synchronize()
        return time.perf_counter() - start
    step = lambda: tg.train_step(state, data, plan, loss_fn)
    step()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters. Seconds: a step beside a write, a step alone, foreground, "
          "background; number of steps")
    for _ in range(pairs):
        foreground, begun, steps = seconds(lambda: tg.save_checkpoint(cfg, rt, state)), time.perf_counter(), []
        writer = rt.threads[0]
        while writer.is_alive() or not steps:
            steps.append(seconds(step))
        beside, background = statistics.mean(steps), time.perf_counter() - begun
        alone = statistics.mean(seconds(step) for _ in steps)
        rows.append((beside, alone, foreground, background))
        print(*(f"{value:.3f}" for value in rows[-1]), len(steps), flush=True)
    beside, alone, foreground, background = map(statistics.median, zip(*rows))
    ratio = statistics.median(row[0] / row[1] for row in rows)
    print(f"{tg.checkpoint_path(rt).stat().st_size:,} bytes. Medians: {beside:.3f} s beside, {alone:.3f} s alone, their ratio "
          f"{ratio:.3f}; {foreground:.2f} s in the foreground, {background:.1f} s in the background")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        settings = dataclasses.replace(tg.Hyperparameters.from_env(tg.process_environment()), artifact_dir=folder)
        runtime = tg.Runtime.open(settings)
        measure(settings, runtime, int(sys.argv[1]) if len(sys.argv) > 1 else 8)
        runtime.close()

"""A clock for tests: it stands still but for what chosen functions are said to take."""
import time
from types import SimpleNamespace

import torch
import train_gpt as tg


class FakeTime:
    """Takes the place of time.perf_counter in train_gpt, defaults of arguments included."""

    def __init__(self, patch):
        self.now, self.patch = 0.0, patch
        patch.setattr(tg, "time", SimpleNamespace(**{**vars(time), "perf_counter": self}))
        for owner in list(vars(tg).values()):
            if getattr(owner, "__module__", None) == tg.__name__:
                for function in (owner, *(vars(owner).values() if isinstance(owner, type) else ())):
                    defaults = getattr(function, "__defaults__", None) or ()
                    if any(value is time.perf_counter for value in defaults):
                        patch.setattr(function, "__defaults__", tuple(
                            self if value is time.perf_counter else value for value in defaults))

    def __call__(self):
        return self.now

    def charge(self, owner, name, cost):
        """Each call of owner.name takes `cost` seconds, or cost(number of calls before, *its arguments)."""
        original, calls = getattr(owner, name), []

        def timed(*args, **kwargs):
            self.now += cost(len(calls), *args) if callable(cost) else cost
            calls.append(self.now)
            return original(*args, **kwargs)
        self.patch.setattr(owner, name, timed)
        return calls


class FakeDevice:
    """A CUDA device that works through its queue beside a FakeTime: each call of owner.name queues `cost` seconds of
    work, or cost(number of calls before), and takes the host none."""

    def __init__(self, clock, owner, name, cost):
        self.clock, self.ready, self.backlog, patch = clock, 0.0, [], clock.patch
        original = getattr(owner, name)

        def queued(*args, **kwargs):
            self.backlog.append(max(self.ready - clock.now, 0.0))  # seconds of work still to do
            self.ready = max(self.ready, clock.now) + (cost(len(self.backlog) - 1) if callable(cost) else cost)
            return original(*args, **kwargs)
        patch.setattr(owner, name, queued)
        patch.setattr(tg.Runtime, "on_cuda", property(lambda rt: True))
        patch.setattr(torch.cuda, "Event", lambda: FakeEvent(self))
        patch.setattr(torch.cuda, "synchronize", lambda device: self.wait(self.ready))
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        for memory in ("max_memory_allocated", "max_memory_reserved"):
            patch.setattr(torch.cuda, memory, lambda device: 0)

    def wait(self, until):
        self.clock.now = max(self.clock.now, until)


class FakeEvent:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = self.device.ready

    def synchronize(self):
        self.device.wait(self.at)

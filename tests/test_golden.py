"""A forward and a backward pass of every architecture option in a few numbers, so that drift is noticed.

What the model should compute is test_reference_model.py's to say. If the architecture is to change:

    python tests/test_golden.py        # computes the numbers anew and writes them into this file
"""
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tg
from test_reference_model import BASE, OPTIONS, rows_of

NUMBERS = ("loss", "loss under QAT", "a logit", "norm of the banks' gradient", "norm of the other gradients",
           "sum of the gradients, with weights")
GOLDEN = {
    "default": (3.655597, 3.642948, 0.1475404, 7.529662, 3.771671, 0.00891443),
    "no bigram": (4.038876, 3.972695, -1.438749, 16.22581, 7.88083, -7.979114),
    "trigram": (3.933372, 3.896599, 0.2383684, 16.52343, 6.824206, -6.851789),
    "tables of the stream's width": (4.045254, 4.048202, -0.2409353, 5.962792, 5.056434, 2.965551),
    "no value embedding": (3.661567, 3.644037, -0.07296637, 8.886678, 4.66788, -1.895041),
    "value embedding at the ends": (3.659366, 3.664483, -0.2277769, 8.980279, 4.409161, 3.285032),
    "value residual": (3.409671, 3.397701, -0.6774247, 7.936004, 3.190183, -4.742676),
    "value residual, XSA everywhere": (3.209103, 3.202709, 0.7182471, 12.02893, 5.615861, -1.797797),
    "gated attention": (4.180106, 4.190851, 1.010437, 14.17702, 5.334375, -2.736077),
    "gated blocks": (4.404355, 4.434463, 0.1288785, 13.58779, 5.399387, 4.387573),
    "no XSA": (3.977141, 3.978162, 1.161333, 6.90831, 3.363159, 0.0066939),
    "XSA once": (3.754547, 3.764565, 0.317515, 9.705866, 4.642612, 0.3077809),
    "XSA more often than layers": (4.174896, 4.166587, 0.02276643, 8.184313, 5.727579, 7.130594),
    "no LN scale": (3.51562, 3.521666, 0.5908582, 23.18647, 10.0859, 6.276953),
    "untied": (4.084185, 4.077888, 0.4976899, 10.59607, 4.902298, 0.664885),
    "low cap": (3.408125, 3.4113, 0.1472745, 5.052309, 2.782014, 0.04710633),
    "one layer": (4.597718, 4.576664, -1.708339, 6.281144, 5.005578, -5.171163),
    "five layers": (3.863854, 3.891542, -3.002848, 11.91235, 6.299224, -1.783827),
    "six layers": (3.721935, 3.745224, -0.4766678, 8.83501, 3.665171, -1.021558),
    "all dimensions rotate": (3.671991, 3.650072, 0.3066703, 8.809998, 4.005802, -1.133596),
    "two rotate": (3.613178, 3.626119, 0.4986703, 6.482318, 3.356977, -0.4978047),
    "stretched base": (3.654835, 3.64216, 0.1492761, 7.474741, 3.749241, -0.01688831),
    "small base": (3.611777, 3.599123, 0.4324226, 5.943997, 3.204037, -0.4987197),
    "plain heads": (4.106928, 4.102782, -2.578349, 6.05629, 3.338006, 3.029675),
    "one key head": (3.908386, 3.967021, -0.4216431, 7.799659, 3.207841, 1.612766),
    "ReLU": (3.755226, 3.762661, 0.297328, 5.439543, 3.08362, 3.211832),
    "slope": (3.701836, 3.711955, 0.2301101, 5.232046, 3.017393, 2.077877),
    "heads ahead": (6.263011, 6.233822, 0.1475404, 7.094509, 3.893526, -1.226556),
    "attention window": (3.908967, 3.901897, -0.6066464, 11.65872, 4.247478, -3.71665),
    "no QK norm": (3.644643, 3.64542, 0.03846331, 7.411201, 3.396848, 3.381716),
    "no cap": (3.658735, 3.645723, 0.1475422, 7.558969, 3.784092, 0.004324973),
    "no norm of the embedding": (4.065238, 4.071921, -1.638875, 27.75854, 9.313564, 2.241973),
    "smear before the norm": (3.797877, 3.755831, 0.5188745, 8.00653, 4.077899, -3.15854),
    "no smear": (4.877906, 4.858566, -1.231812, 26.98261, 13.5856, 17.42398),
    "no skips": (3.52818, 3.505222, 0.8193603, 11.88377, 5.586991, -5.702624),
    "plain residuals": (3.466814, 3.468285, -0.2020227, 3.73754, 1.786953, 0.2042627),
    "learned norms": (3.307596, 3.307066, -0.03903946, 0.4674414, 0.9269835, -0.06688307),
    "epsilon": (3.376419, 3.379132, 0.1318538, 0.9567345, 0.9560525, 1.334977),
    "value embedding in the last": (3.61067, 3.625401, 0.2699243, 15.61691, 7.162314, 0.1012084),
    "PR 1254": (3.144322, 3.126233, 0.2517307, 4.402201, 2.90657, 2.046671),
    "smear window": (4.380416, 4.361867, -0.9595637, 11.64709, 4.150794, 0.4502271),
    "skip gates": (3.929164, 4.004003, -2.144581, 31.63769, 12.41011, -10.3005),
    "sparse gate": (3.293163, 3.315543, 0.8019291, 9.528896, 5.202771, -4.559955),
    "loop": (4.339728, 4.294976, 0.06424922, 12.54162, 4.721991, 8.00482),
    "loop of all": (3.290179, 3.243618, 1.386928, 26.23155, 11.4172, -1.783623),
    "joint": (3.784931, 3.773523, 0.2787511, 8.223272, 4.152756, -1.501807),
    "lanes": (3.85983, 3.835653, -1.754254, 8.196977, 3.99707, -3.873538),
    "early lanes": (3.365637, 3.33401, 0.4866231, 5.790271, 2.657665, -2.137407),
    "lane of attention": (4.221241, 4.273665, -1.747863, 14.49503, 6.023374, 7.204248),
    "lane of MLP": (3.811974, 3.716287, -1.417809, 24.31536, 10.17554, -11.28407),
    "PR 1855": (3.861708, 3.898258, 0.564633, 11.86976, 12.17395, -4.619227),
    "everything": (4.617099, 4.623307, 0.6488327, 4.862802, 3.588154, -3.661932),
}


def wave(shape, phase):
    """Values in -1..1 that need no random numbers, which differ between versions and machines."""
    return torch.from_numpy(np.sin(1.37 * np.arange(int(np.prod(shape))) ** 1.1 + phase)).float().reshape(shape)


def numbers_of(changes):
    cfg = tg.Hyperparameters(**{**BASE, **changes})
    names = [name for name, _ in tg.GPT(cfg).named_parameters()]
    model, rows = tg.GPT(cfg, qat_specs=tg.quant_specs(cfg, names)), rows_of(cfg)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            p.copy_(0.4 * wave(p.shape, i) + ("scale" in name))
    model.refresh_scales()
    loss = model.loss(rows[:, :-1], rows[:, 1:])
    loss.backward()
    with torch.no_grad():
        rounded = model.loss(rows[:, :-1], rows[:, 1:], True)
        logit = model.logits(model.hidden(rows[:, :-1]))[1, 5, 2]
    grads = {name: p.grad for name, p in model.named_parameters() if p.numel()}
    banks = torch.stack([g.norm() for name, g in grads.items() if name.endswith("_bank")]).norm()
    others = torch.stack([g.norm() for name, g in grads.items() if not name.endswith("_bank")]).norm()
    signed = sum((g * wave(g.shape, 7 * i)).sum() for i, g in enumerate(grads.values()))
    return [x.item() for x in (loss, rounded, logit, banks, others, signed)]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_numbers_are_those_of_before(name):
    assert name in GOLDEN, f"`python {Path(__file__).name}` adds an option's numbers"
    for what, got, wanted in zip(NUMBERS, numbers_of(OPTIONS[name]), GOLDEN[name], strict=True):
        assert got == pytest.approx(wanted, rel=2e-4, abs=1e-3), what


def test_every_golden_line_is_an_option():
    assert set(GOLDEN) == set(OPTIONS)


if __name__ == "__main__":
    text = Path(__file__).read_text()
    before, _, rest = text.partition("\nGOLDEN = {\n")
    lines = [f'    "{name}": ({", ".join(f"{x:.7g}" for x in numbers_of(changes))}),'
             for name, changes in OPTIONS.items()]
    Path(__file__).write_text("\n".join([before, "GOLDEN = {", *lines, rest[rest.index("}\n"):]]))

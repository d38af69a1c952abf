"""Scores of documents that adapt by themselves, with three precisions of the head: see README.md.

    python records/ttt_head/head.py final_model.ptz [TOKENS] [TOKENS_OF_A_DOCUMENT]     # settings from the environment
"""
import dataclasses
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as tg  # noqa: E402


CAPPED, OUTPUT = tg.capped_logits, tg.GPT.output_weight


def rounded_cap(hidden, weight, softcap):
    """As published: the soft cap, too, in the activations' type."""
    return (softcap * torch.tanh(tg.project(hidden, weight) / softcap)).float()


def unrounded(hidden, weight, softcap):
    """The products of the same hidden states and weights, and what is added to them, in fp32."""
    return CAPPED(hidden.float(), weight, softcap)


def output_in_fp32(model, qat=False, hook=None):
    weight = OUTPUT(model).float()
    return weight if hook is None else hook("head", -1, weight)


HEADS = {"product in bf16, rest in fp32": (CAPPED, OUTPUT), "product and soft cap in bf16": (rounded_cap, OUTPUT),
         "all in fp32": (unrounded, output_in_fp32)}


def main(path: str, tokens: int = 12_288, most: int = 768) -> None:
    torch.set_num_threads(1)
    base = tg.settings_from({**os.environ, "EVAL_ARTIFACT": path, "EVAL_MAX_SECONDS": "0", "TTT_ENABLED": "1"})
    for dtype in ("bf16", "fp32"):
        cfg = dataclasses.replace(base, dtype=dtype)
        rt = dataclasses.replace(tg.Runtime.open(cfg), log=tg.RunLog(Path("."), "", active=False))
        val = tg.ValData.open(cfg, rt)
        starts = (val.tokens == val.bos_id).nonzero().flatten().tolist()
        parts = [torch.arange(a, a + most) for a, b in zip(starts, starts[1:]) if b - a >= most]
        text = val.take(torch.cat(parts)[:tokens + 1])
        for name, head in HEADS.items():
            (tg.capped_logits, tg.GPT.output_weight), bpb = head, []
            for epochs in (0, cfg.ttt_epochs):
                model = tg.load_model(Path(path).read_bytes(), rt, val.tokenizer_sha256)
                now = dataclasses.replace(cfg, ttt_epochs=epochs)
                plan = tg.plan_documents(text, now, rt)
                bpb.append(tg.evaluate("", model.nll, text, now, rt, plan, tg.adapter_for(model, now, rt)).bpb)
            print(f"| {dtype} | {name} | {bpb[0]:.5f} | {bpb[1]:.5f} | {bpb[0] - bpb[1]:.5f} |", flush=True)
            if dtype == "fp32":
                break


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

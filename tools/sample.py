"""Text from an artifact, token by token.

    python tools/sample.py final_model.ptz "The meaning of"
    python tools/sample.py final_model.ptz "The meaning of" --temperature 0.6 --top-k 20 --length 400 --seed 7
    python tools/sample.py final_model.ptz                                # from the start of a document

Device, tokenizer and trained length come from the settings of train_gpt.py (DEVICE, TOKENIZER_PATH, TRAIN_SEQ_LEN):
environment variables, or KEY=VALUE among the arguments. `bash run.sh sample` sets the first and the last as for a run.
"""
from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt as tg  # noqa: E402
import shell  # noqa: E402
import transforms  # noqa: E402


def open_runtime(cfg: tg.Hyperparameters) -> tg.Runtime:
    """A run's, without compilation and without a log."""
    rt = tg.Runtime.open(dataclasses.replace(cfg, compile="0"))
    return dataclasses.replace(rt, log=tg.RunLog(Path(), "sample", active=False))


def barred_ids(tokenizer) -> list[int]:
    """Ids that are never drawn: unknown and unused ones."""
    return [i for i in range(tokenizer.vocab_size()) if tokenizer.is_unknown(i) or tokenizer.is_unused(i)]


@torch.inference_mode()
def continuation(model: tg.GPT, ids: list[int], barred: list[int], window: int, temperature: float, top_k: int,
                 seed: int) -> Iterator[int]:
    """Endless ids after `ids`, each drawn from the model's prediction after the last `window`; top_k 0: from all."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    while True:
        context = torch.tensor([ids[-window:]], device=device)
        logits = model.logits(model.hidden(context, keep=1))[0, -1].double().cpu()
        logits[barred] = -math.inf
        if temperature:
            if 0 < top_k < len(logits):
                logits[logits < logits.topk(top_k).values[-1]] = -math.inf
            logits = (logits - logits.max()) / temperature
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        ids = [*ids[-window:], token]
        yield token


def pieces_of_text(tokenizer, previous: int, ids: Iterable[int]) -> Iterator[str]:
    """The text each of `ids` adds after `previous`, as soon as it is certain; together they are what decoding all at
    once adds. Pieces that are single bytes wait until they make whole characters, or can no longer make any."""
    def added(run: list[int]) -> str:
        before = tokenizer.decode([previous])
        return tokenizer.decode([previous, *run])[len(before):]

    run = []  # byte pieces that wait
    for token in ids:
        if tokenizer.is_byte(token):
            run.append(token)
            try:
                text = bytes(int(tokenizer.id_to_piece(i)[3:-1], 16) for i in run).decode()  # <0x41>
            except UnicodeDecodeError:
                continue
        else:
            text = added(run) if run else ""
            previous, run = run[-1] if run else previous, [token]
            text += added(run)
        yield text
        previous, run = token, []
    if run:
        yield added(run)


def until_end(tokenizer, tokens: Iterator[int], length: int) -> Iterator[int]:
    """At most `length` tokens; a control token, as begins the next document, ends them."""
    for _, token in zip(range(length), tokens):
        if tokenizer.is_control(token):
            return
        yield token


def write(args: argparse.Namespace) -> None:
    """Load, then write as the tokens come. Raises UserError."""
    for name, holds in (("temperature", 0 <= args.temperature < math.inf), ("top-k", args.top_k >= 0),
                        ("length", args.length >= 0), ("seed", 0 <= args.seed < 2 ** 63)):
        if not holds:
            raise tg.UserError(f"--{name} {getattr(args, name.replace('-', '_'))} is out of range: 0 or more")
    extra = {"EVAL_ARTIFACT": args.artifact} | ({"TOKENIZER_PATH": args.tokenizer} if args.tokenizer else {})
    cfg = tg.settings_from(os.environ | extra)
    tokenizer, digest = tg.open_tokenizer(cfg)
    model = tg.load_model(tg.read_file(args.artifact), open_runtime(cfg), digest)
    bos = [tokenizer.bos_id()] if tokenizer.bos_id() >= 0 else []
    cased = not any(tokenizer.is_unknown(tokenizer.piece_to_id(mark)) for mark in transforms.MARKERS)
    ids = bos + tokenizer.encode(transforms.encode_case(args.prompt) if cased else args.prompt)
    if not ids:
        raise tg.UserError("this tokenizer has no BOS to start from; give a prompt")
    tokens = continuation(model, ids, barred_ids(tokenizer), cfg.train_seq_len, args.temperature, args.top_k, args.seed)
    print(args.prompt, end="", flush=True)
    tokens = until_end(tokenizer, tokens, args.length)
    if cased:  # space and marker may be one token
        tokens = (part for token in tokens for part in transforms.split(tokenizer, np.array([token])).tolist())
    pieces = pieces_of_text(tokenizer, ids[-1], tokens)
    for text in transforms.readable(pieces) if cased else pieces:
        print(text, end="", flush=True)


@shell.one_line_errors
def main(argv: list[str]) -> int:
    parser = shell.Parser(__doc__)
    add = parser.add_argument
    add("artifact")
    add("prompt", nargs="?", default="", help="what the text begins with (default: nothing, a new document)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)")
    add("--top-k", type=int, default=50, help="only so many likeliest tokens; 0: all (default: %(default)s)")
    add("--length", type=int, default=200, help="most tokens to add (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the random draws (default: %(default)s)")
    add("--tokenizer", metavar="MODEL", help="SentencePiece model (default: TOKENIZER_PATH)")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character
    try:
        write(parser.parse(argv))
        print()
    except KeyboardInterrupt:  # the usual way to end a text that goes on
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

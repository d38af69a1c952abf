"""Where the bytes of an artifact are: by tensor and by stream.

    python tools/inspect_artifact.py final_model.ptz
    python tools/inspect_artifact.py final_model.ptz --plot bytes.png    # the same as a bar chart

A stream is packed as one; each of its tensors is given a part of its bytes in proportion to the tensor's order-0
entropy, the least that a packer without context needs for its codes. Scales of all tensors are one stream of their own.
"""
from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
import charts  # noqa: E402
import shell  # noqa: E402

LIMIT = 16_000_000  # of the competition, code included


@dataclass(frozen=True)
class Piece:
    """A tensor, or the scales of all: what it holds and what it takes."""

    name: str
    shape: tuple[int, ...]
    stream: str
    bits: int         # 0: floats
    values: int
    entropy: float    # bytes
    bytes: float      # its part of the stream


@dataclass(frozen=True)
class Stream:
    name: str
    codec: str
    values: int
    bytes: int


@dataclass(frozen=True)
class Contents:
    model: dict[str, str]
    tokenizer: str
    pieces: list[Piece]
    streams: list[Stream]
    header_bytes: int  # header, numbers and checksum: all that is no stream
    file_bytes: int


def contents(blob: bytes) -> Contents:
    """What is in an artifact. Raises UserError."""
    _, tokenizer, stored = tg.read_artifact(blob)
    header = json.loads(tg.open_container(blob)[0])
    packed = dict(zip(tg.streams_of(stored), header["streams"]))  # stream -> [codec, bytes, crc32]
    sizes = {name: size for name, (_, size, _) in packed.items()}
    rows = [(s.name, s.values.shape, s.stream, s.bits, s.values.size, tg.order0_bytes(s.values)) for s in stored]
    scales = [s.scales for s in stored if s.bits]
    if scales:
        rows.append(("(scales)", (), "scales", 0, sum(s.size for s in scales), sum(map(tg.order0_bytes, scales))))
    bound = {name: sum(row[5] for row in rows if row[2] == name) for name in sizes}
    held = {name: sum(row[4] for row in rows if row[2] == name) for name in sizes}
    pieces = [Piece(*row, sizes[row[2]] * (row[5] / bound[row[2]] if bound[row[2]] else row[4] / held[row[2]]))
              for row in rows]
    streams = [Stream(name, codec, held[name], size) for name, (codec, size, _) in packed.items()]
    return Contents(header["config"], tokenizer, pieces, streams, len(blob) - sum(sizes.values()), len(blob))


def tables(found: Contents, code_bytes: int) -> list[str]:
    """The lines to print."""
    width = max(len(p.name) for p in found.pieces)
    lines = [f"{'tensor':<{width}} {'shape':<16} {'stream':<8} bits {'values':>12} {'entropy B':>12} {'bytes':>12}"]
    for p in found.pieces:
        bits = p.bits or {"float": 32}.get(p.stream, 16)
        lines.append(f"{p.name:<{width}} {'x'.join(map(str, p.shape)):<16} {p.stream:<8} {bits:>4} {p.values:>12,} "
                     f"{math.ceil(p.entropy):>12,} {round(p.bytes):>12,}")
    lines += ["", f"{'stream':<8} {'codec':<6} {'values':>12} {'bits each':>9} {'bytes':>12} {'of file':>8}"]
    for s in found.streams:
        lines.append(f"{s.name:<8} {s.codec:<6} {s.values:>12,} {8 * s.bytes / s.values:>9.3f} {s.bytes:>12,} "
                     f"{s.bytes / found.file_bytes:>8.1%}")
    total = found.file_bytes + code_bytes
    for name, size in (("header", found.header_bytes), ("artifact", found.file_bytes), ("code", code_bytes),
                       ("total", total)):
        lines.append(f"{name:<37} {size:>12,}")
    lines.append(f"{abs(LIMIT - total):,} bytes {'under' if total <= LIMIT else 'OVER'} the limit of {LIMIT:,}")
    return lines + ["", "model      " + " ".join(f"{name}={value}" for name, value in found.model.items()),
                    f"tokenizer  sha256 {found.tokenizer}"]


def plot(found: Contents, path: Path) -> None:
    """A bar for each tensor, the largest on top. Raises UsageError."""
    parts = sorted([(p.bytes, p.name, p.stream) for p in found.pieces] + [(found.header_bytes, "(header)", "header")])
    parts = [(sum(size for size, _, _ in parts[:-24]), "(smaller ones)", "")] * (len(parts) > 24) + parts[-24:]
    streams = sorted({stream for _, _, stream in parts})
    figure = charts.picture("--plot", 9, 1 + 0.28 * len(parts))
    axes = figure.subplots()
    bars = axes.barh([name for _, name, _ in parts], [size for size, _, _ in parts],
                     color=[f"C{streams.index(stream) % 10}" for _, _, stream in parts])
    axes.bar_label(bars, [f" {size:,.0f}" for size, _, _ in parts])
    axes.set(xlabel="bytes", title=f"artifact of {found.file_bytes:,} bytes")
    axes.margins(x=0.15)
    charts.save(figure, path)


@shell.one_line_errors
def main(argv: list[str]) -> int:
    parser = shell.Parser(__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a bar chart as well")
    args = parser.parse(argv)
    found = contents(tg.read_file(args.artifact))
    print("\n".join(tables(found, os.path.getsize(tg.__file__))))
    if args.plot:
        plot(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Bring README's table of settings up to date: `python tools/readme.py`."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt

BEGIN, END = "<!-- settings -->\n", "<!-- /settings -->"


def refreshed(text: str) -> str:
    """README's text with the table of the code between the markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + train_gpt.config_table(markdown=True) + END + rest.split(END)[1]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(refreshed(readme.read_text(encoding="utf-8")), encoding="utf-8")

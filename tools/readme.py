"""Bring the generated tables of README.md and SETTINGS.md up to date: `python tools/readme.py`."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt
import estimate

SECTION = "**{0}**\n\n| variable | default | range | meaning |\n|---|---|---|---|"
SETTING = "| `{0}` | `{1}` | {2} | {3} |"
TABLES = {"settings": lambda: train_gpt.config_table(SECTION, SETTING),
          "systems": lambda: estimate.table_of_systems(markdown=True)}


def refreshed(text: str) -> str:
    """A text with the tables of the code between their markers."""
    for name, table in TABLES.items():
        before, marker, rest = text.partition(f"<!-- {name} -->\n")
        if marker:
            text = f"{before}{marker}{table()}<!-- /{name} -->{rest.split(f'<!-- /{name} -->')[1]}"
    return text


if __name__ == "__main__":
    for name in ("README.md", "SETTINGS.md"):
        path = ROOT / name
        path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")

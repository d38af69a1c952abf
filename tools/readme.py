"""Bring README's generated tables up to date: `python tools/readme.py`."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt
import estimate

TABLES = {"settings": lambda: train_gpt.config_table(markdown=True),
          "systems": lambda: estimate.table_of_systems(markdown=True)}


def refreshed(text: str) -> str:
    """README's text with the tables of the code between their markers."""
    for name, table in TABLES.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{table()}<!-- /{name} -->{rest.split(f'<!-- /{name} -->')[1]}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(refreshed(readme.read_text(encoding="utf-8")), encoding="utf-8")

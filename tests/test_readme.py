"""README tells the truth about the code."""
import re
import sys
from pathlib import Path

import train_gpt as tg

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import readme  # noqa: E402

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = (ROOT / "SETTINGS.md").read_text(encoding="utf-8")


def test_the_generated_tables_are_the_codes():
    for text in (TEXT, SETTINGS):
        assert text == readme.refreshed(text), "a table is stale: python tools/readme.py refreshes it"
    assert "<!-- systems -->" in TEXT and "<!-- settings -->" in SETTINGS


def test_every_setting_has_a_row():
    rows = set(re.findall(r"^\| `([A-Z0-9_]+)", SETTINGS, flags=re.M))
    assert rows == {name.upper() for name in tg.Hyperparameters.__dataclass_fields__}


def test_links_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in target]
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing, f"README links to {missing}"

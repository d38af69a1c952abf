"""tools/mutate.py on a repository of two files."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tools"))
import mutate  # noqa: E402

CODE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = "from calc import double\n\n\ndef test_double():\n    assert double(3) == 6\n"


@pytest.fixture
def repository(tmp_path):
    """One test for two functions; `wrong` is not to be copied."""
    root = tmp_path / "repository"
    for name, text in {"calc.py": CODE, "tests/test_calc.py": TESTS, "conftest.py": "", ".gitignore": "wrong\n",
                       "wrong/tests/test_wrong.py": "assert False\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


def outcome(repository, tmp_path, capsys, rows, *options):
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps({"mutant": [{"file": "calc.py", **row} for row in rows]}))
    code = mutate.main([str(listed), *options], repository)
    return code, *capsys.readouterr()


def test_mistakes_are_noticed_or_survive_or_do_not_apply(repository, tmp_path, capsys):
    rows = [{"name": "triple", "old": "2 * x", "new": "3 * x"}, {"name": "third", "old": "x / 2", "new": "x / 3"},
            {"name": "gone", "old": "4 * x", "new": "5 * x"}, {"name": "twice", "old": "return", "new": "yield"},
            {"name": "broken", "old": "2 * x", "new": "2 *"},
            {"name": "both", "old": "return", "new": "return 1 +", "count": 2, "tests": ["tests/test_calc.py"]}]
    code, out, _ = outcome(repository, tmp_path, capsys, rows, "--jobs", "2", "--all")
    verdicts = dict(line.split(": ", 1) for line in out.splitlines()[:-1])
    noticed = "noticed by tests/test_calc.py::test_double"
    assert code == 1 and out.splitlines()[-1] == "2 of 3 noticed, 3 do not apply"
    assert {name: verdicts[name] for name in ("triple", "third", "both")} == {
        "triple": noticed, "third": "NOT NOTICED", "both": noticed}
    assert "stands there 0 times, not 1" in verdicts["gone"] and "stands there 2 times" in verdicts["twice"]
    assert verdicts["broken"].startswith("does not apply: invalid syntax")
    assert (repository / "calc.py").read_text() == CODE


def test_only_noticed_ones_end_with_zero(repository, tmp_path, capsys):
    rows = [{"name": "slow triple", "old": "2 * x", "new": "__import__('time').sleep(60)"},
            {"name": "third", "old": "x / 2", "new": "x / 3"}]
    code, out, _ = outcome(repository, tmp_path, capsys, rows, "--only", "triple", "--limit", "2")
    assert code == 0 and "slow triple: noticed by the time limit of 2 s" in out and "1 of 1 noticed" in out


def test_users_mistakes_are_one_line(repository, tmp_path, capsys):
    for rows, said in (([{"name": "no old"}], "not a list of mistakes"),
                       ([{"name": "a", "old": "2", "new": "3", "tests": ["tests/test_none.py"]}], "pytest ended with"),
                       ([{"name": "a", "old": "2", "new": "3", "file": "none.py"}], "none.py")):
        code, _, err = outcome(repository, tmp_path, capsys, rows)
        assert code == 2 and said in err and len(err.splitlines()) == 1
    (repository / "tests" / "test_calc.py").write_text(TESTS.replace("6", "7"))
    code, _, err = outcome(repository, tmp_path, capsys, [{"name": "a", "old": "2 * x", "new": "3 * x"}])
    assert code == 2 and "test_double fails before anything is planted" in err
    assert mutate.main([str(tmp_path / "none.toml")]) == 2


def test_the_list_of_the_repository_can_be_read_and_rooms_have_tests():
    mutants = mutate.read_list(ROOT / "tests" / "mutants.toml")
    assert len(mutants) >= 30 and len({m.name for m in mutants}) == len(mutants)
    text = (ROOT / "train_gpt.py").read_text()
    rooms = mutate.re.findall(r"^# -{20,} (\w+)$", text, mutate.re.M)
    assert set(rooms) <= set(mutate.NEAREST)


@pytest.mark.parametrize("name", ["mutants", "mutants_runs", "mutants_shell"])
def test_what_is_to_be_mistaken_stands_once_in_its_file(name):
    lost = [m.name for m in mutate.read_list(ROOT / "tests" / f"{name}.toml")
            if (ROOT / m.file).read_text().count(m.old) != 1]
    assert lost == []

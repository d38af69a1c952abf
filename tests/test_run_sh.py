"""run.sh from a user's chair: a copy of the repository, with a `python3` that notes what it is asked for and installs
nothing. `.ci/run` and the profiles are held to their promises too."""
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_gpt as tg

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import profiles  # noqa: E402

PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.env"))
KNOWN = {name for f in dataclasses.fields(tg.Hyperparameters) for name in tg.env_names(f)}
NAMES = "\n".join([*(" ".join(tg.env_names(f)) for f in dataclasses.fields(tg.Hyperparameters)), *tg.WITHOUT_EFFECT])
EMBEDDED = "./data/datasets/embedded_sp1024"

STUB = r"""#!/usr/bin/env bash
line=${*//$'\n'/ }
echo "$line" >>"$CALLS"
case $line in
  "train_gpt.py --names") [ -z "$NAMES" ] || echo "$NAMES" ;;
  tools/check_settings.py* | tools/scale.py*) exec "$SHELL_PYTHON" "$@" ;;
  tools/*.py* | data/prepare.py*) env ;;&
  *device_count*) echo "${GPUS:-0}" ;;
  "-c import optuna" | "-c import plotly" | "-c import tensorboard") exit "${LACKS_TOOLS:-0}" ;;
  "-c import pyarrow") exit "${LACKS_PYARROW:-0}" ;;
  "-c import xdist") exit "${LACKS_XDIST:-0}" ;;
  "tools/record.py build") [ -z "${BUILT:-}" ] || { mkdir -p build && printf '%s' "$BUILT" >build/train_gpt.py; } ;;
  *find_spec*) [ -z "${REAL_PYTHON:-}" ] || exec "$REAL_PYTHON" "$@"; exit "${LACKS_PACKAGES:-0}" ;;
  *version_info*) exit "${TOO_OLD:-0}" ;;
  *ensurepip*) exit "${LACKS_VENV:-0}" ;;
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install"*) exit "${PIP_STATUS:-0}" ;;
  --version) echo "Python ${STUB_VERSION:-3.11.7}" ;;
  *prepare.py*embedded*8192) ;;
  *prepare.py*embedded) mkdir -p data/datasets/embedded_sp1024 data/tokenizers
    touch data/datasets/embedded_sp1024/fineweb_val_000000.bin data/tokenizers/embedded_1024_bpe.model ;;
  *train_gpt.py) [[ $line == tools/* ]] || env; read -rt "${TRAIN_SECONDS:-0}" <> <(:); exit "${TRAIN_STATUS:-0}" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the repository; `project(arguments, **environment)` runs run.sh there."""
    repo, bin_folder, calls = tmp_path / "repo", tmp_path / "bin", tmp_path / "calls"
    for name in ("run.sh", "train_gpt.py", "requirements.txt", "tests/requirements.txt", "tools/requirements.txt",
                 ".ci/run", "data/prepare.py",
                 *(path.relative_to(ROOT) for path in (ROOT / "tools").glob("*.py")),
                 *(f"profiles/{profile}.env" for profile in PROFILES)):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repo / name)
    bin_folder.mkdir()
    calls.touch()
    for tool in ("bash", "env", "dirname", "basename", "cat", "cp", "date", "grep", "mkdir", "sed", "touch", "wc"):
        (bin_folder / tool).symlink_to(shutil.which(tool))
    for name in ("python3", "nvidia-smi"):
        (bin_folder / name).write_text(STUB)
        (bin_folder / name).chmod(0o755)

    def run(*arguments, script="run.sh", **environment):
        before = len(calls.read_text().splitlines())
        done = subprocess.run([str(bin_folder / "bash"), str(repo / script), *arguments], cwd=tmp_path,
                              text=True, capture_output=True,
                              env={"PATH": str(bin_folder), "CALLS": str(calls), "NAMES": NAMES,
                                   "SHELL_PYTHON": sys.executable, **environment})
        env = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, env=env,
                               calls=calls.read_text().splitlines()[before:])

    run.repo, run.bin = repo, bin_folder
    return run


def installs(result) -> int:
    return sum(call.startswith("-m pip install") for call in result.calls)


def test_help_lists_commands_and_profiles(project):
    result = project("help")
    assert result.code == 0 and not result.calls
    for word in ("test", "data", "bench", "parity", "plan", "systems", "settings", "KEY=VALUE", "SCALE=tiny",
                 *PROFILES):
        assert word in result.out
    for name in ("sweep", "report", "record", "plan"):  # as the tool's own --help begins
        first = (ROOT / f"tools/{name}.py").read_text(encoding="utf-8").splitlines()[0].strip('"')
        assert f"bash run.sh {name:<8} {first}\n" in result.out


@pytest.mark.parametrize("word, meant", [
    ("nosuch", ""), ("smoek", "smoke"), ("pr109", "pr1092"), ("pr1216_int4", "pr1216_int4_ve"), ("tset", "test"),
    ("pr1254", "pr1254_eval_hash or pr1254_lora_qkvo_last4 or pr1254_sp8192_lora"), ("auditt", "audit")])
def test_unknown_word_is_one_line_with_what_may_be_meant(project, word, meant):
    """Nothing is installed for it: any python3 may say what is near, and without one all profiles are still listed."""
    for _ in range(2):
        result = project(word, "SEED=1", LACKS_PACKAGES="1")
        assert result.code == 2 and not any("check_settings" not in call for call in result.calls)
        said = f"error: unknown command or profile '{word}'" + (f"; did you mean {meant}?" if meant else "")
        assert result.err == f"{said} (profiles: {' '.join(PROFILES)})\n"
        (project.bin / "python3").unlink(missing_ok=True)
        meant = ""


@pytest.mark.parametrize("arguments", [("smoke", "seed=1"), ("smoke", "ITERATIONS"), ("=5",), ("smoke", "TTT-LR=1")])
def test_malformed_argument(project, arguments):
    result = project(*arguments)
    assert result.code == 2 and not result.calls
    assert result.err.count("\n") == 1 and f"'{arguments[-1]}' is not KEY=VALUE" in result.err


def test_arguments_override_environment_overrides_profile(project):
    assert project("smoke").env["ITERATIONS"] == "300"
    assert project("smoke", ITERATIONS="5").env["ITERATIONS"] == "5"
    assert project("smoke", "ITERATIONS=7", ITERATIONS="5").env["ITERATIONS"] == "7"
    assert project("ITERATIONS=7").env["NUM_LAYERS"] == "4"
    assert project("smoke", "RUN_ID=a b=c").env["RUN_ID"] == "a b=c"
    assert project("smoke", VE_LAYERS="").env["VE_LAYERS"] == ""  # set to nothing is set


def test_profile_lines(project):
    (project.repo / "profiles" / "mine.env").write_text("# mine\n\nSEED=3   # three\r\nRUN_ID=last_line")
    env = project("mine").env
    assert (env["SEED"], env["RUN_ID"]) == ("3", "last_line")
    (project.repo / "profiles" / "mine.env").write_text(f"DATA_PATH={EMBEDDED}  # its text is built\n")
    mine = project("mine")
    assert mine.env["DATA_PATH"] == EMBEDDED and "data/prepare.py embedded" in mine.calls
    (project.repo / "profiles" / "mine.env").write_text("SEED=$(touch oops)\n")
    result = project("mine")
    assert result.code == 2 and "profiles/mine.env: 'SEED=$(touch oops)' is not KEY=VALUE" in result.err
    assert not (project.repo / "oops").exists()


@pytest.mark.parametrize("lines, said", [
    ("NUM_LAYER=3", "NUM_LAYER is not a setting; did you mean NUM_LAYERS?"),
    ("SEED=1\nWARMDRON_ITERS = 3500", "WARMDRON_ITERS is not a setting; did you mean WARMDOWN_ITERS?"),
    ("SEED=1\nITERATIONS=2\nSEED=1  # again", "SEED is given twice"),
    ("VE_DIM=16\nVALUE_EMBED_DIM=16", "VE_DIM and VALUE_EMBED_DIM are one setting, given twice"),
    ("VERY_OWN_NAME=1", "VERY_OWN_NAME is not a setting")])
def test_a_mistake_in_a_profile_is_one_line(project, lines, said):
    (project.repo / "profiles" / "mine.env").write_text(f"# mine\n{lines}\n")
    for arguments in (("mine",), ("mine", "SEED=1"), ("eval", "a.ptz", "mine")):
        result = project(*arguments)
        assert result.code == 2 and "train_gpt.py" not in result.calls
        assert result.err.startswith(f"error: profiles/mine.env: {said}") and result.err.count("\n") == 1


def test_a_profile_may_set_other_programs_variables_and_a_group(project):
    (project.repo / "profiles" / "mine.env").write_text(
        "OMP_NUM_THREADS=3\nAUDIT=0\nMATRIX_BITS=5\nMLP_QUANT_BITS=4\nNGRAM_CACHE=1\n")
    env = project("mine").env
    assert [env[key] for key in ("OMP_NUM_THREADS", "MATRIX_BITS", "MLP_QUANT_BITS", "NGRAM_CACHE")] == list("3541")


@pytest.mark.parametrize("given, of_profile, left_out", [
    ("VALUE_EMBED_DIM=64", "VE_DIM=128", True), ("MATRIX_BITS=5", "MLP_QUANT_BITS=4", True),
    ("MATRIX_BITS=5", "EMBED_BITS=4", False), ("ATTN_QAT_BITS=5", "MATRIX_BITS=4", False),
    ("VE_LAST_N=1", "VALUE_EMBED_LAYERS=2", True)])
def test_a_setting_by_another_name_overrides_the_profile_too(project, given, of_profile, left_out):
    """Published commands use other names than profiles do; two values for one setting would be a contradiction."""
    (project.repo / "profiles" / "mine.env").write_text(f"SEED=3\n{of_profile}\n")
    key, value = given.split("=")
    for result in (project("mine", given), project("mine", **{key: value})):
        assert result.code == 0 and result.env[key] == value and result.env["SEED"] == "3"
        assert (of_profile.partition("=")[0] not in result.env) == left_out


@pytest.mark.parametrize("argument, meant", [
    ("LEARNING_RATE=3", "_LR"), ("ITERATION=5", "ITERATIONS"), ("WARMUP=0", "WARMUP_STEPS"), ("A=1", None),
    ("SEQ_LEN=3", "TRAIN_SEQ_LEN"), ("VERY_OWN_NAME=a b", None), ("N_LAYER=", "NUM_LAYERS")])
def test_an_argument_that_is_no_setting_stops_in_one_line(project, argument, meant):
    key = argument.partition("=")[0]
    for command in (("smoke",), (), ("eval", "a.ptz")):
        result = project(*command, argument, "SEED=1")
        assert result.code == 2 and not any(call.endswith("train_gpt.py") for call in result.calls)
        assert result.err.startswith(f"error: {key} is not a setting") and result.err.count("\n") == 1
        assert f"{meant}" in result.err if meant else "did you mean" not in result.err


@pytest.mark.parametrize("argument", [
    "WARMUP_STEPS=0", "VALUE_EMBED_DIM=64", "CUDA_VISIBLE_DEVICES=0,1", "OMP_NUM_THREADS=3", "NCCL_DEBUG=INFO",
    "PYTORCH_ALLOC_CONF=a:b", "TORCH_LOGS=+x y", "TRITON_INTERPRET=1", "PYTHONHASHSEED=0", "HF_HOME=/x",
    "MKL_CBWR=AVX2", "GLOO_SOCKET_IFNAME=lo", "KMP_BLOCKTIME=0", "CUBLAS_WORKSPACE_CONFIG=:4096:8",
    "MASTER_ADDR=localhost"])
def test_settings_and_other_programs_variables_are_passed_on(project, argument):
    result = project("smoke", argument)
    key, _, value = argument.partition("=")
    assert result.code == 0 and result.env[key] == value and "is not a setting" not in result.err


def test_names_that_cannot_be_had_end_it(project):
    result = project("smoke", "SEED=1", NAMES="")
    assert result.code == 2 and "train_gpt.py" not in result.calls and not result.err


@pytest.mark.parametrize("profile", PROFILES)
def test_profile_is_accepted(project, profile):
    """Every key is a setting, and the whole is a configuration."""
    plain = project("settings").env.keys() | project("smoke").env.keys() - KNOWN
    loaded = {key: value for key, value in project(profile).env.items() if key not in plain}
    assert loaded and set(loaded) <= KNOWN
    tg.Hyperparameters.from_env(loaded)


# ---- SCALE

def test_tiny_stands_between_profile_and_the_users_own(project):
    result = project("pr1092", "SCALE=tiny", "NUM_LAYERS=6", ITERATIONS="9")
    assert result.code == 0
    assert [result.env[key] for key in ("NUM_LAYERS", "ITERATIONS", "MODEL_DIM", "MUON_WD")] == ["6", "9", "32", "0.04"]
    assert result.env["VE_LAYERS"] == "4,5"  # of the user's six layers
    assert result.env["DATA_PATH"] == EMBEDDED and "TOKENIZER_PATH" not in result.env and "VOCAB_SIZE" not in result.env
    assert "data/prepare.py embedded" in result.calls
    assert "MODEL_DIM=32" in result.err and "# was 512" in result.err
    assert project("pr1092", "SCALE=tiny", "DATA_PATH=./own").env["DATA_PATH"] == "./own"
    assert project(SCALE="tiny").env["MODEL_DIM"] == "32"


def test_tiny_has_the_profiles_vocabulary(project):
    (project.repo / "profiles/big.env").write_text("# big\nVOCAB_SIZE=8192\nDATA_PATH=./data/datasets/x_sp8192\n")
    result = project("big", "SCALE=tiny")
    assert result.env["DATA_PATH"] == "./data/datasets/embedded_sp8192"
    assert "data/prepare.py embedded --vocab-size 8192" in result.calls
    assert "data/prepare.py embedded --vocab-size 8192" in project("DATA_PATH=./data/datasets/embedded_sp8192").calls


@pytest.mark.parametrize("audit, code", [("0", 0), ("0", 7), ("1", 0), ("1", 1)])
def test_what_was_shrunk_ends_the_log(project, tmp_path, audit, code):
    """Also of a run that fails, whose exit code stays."""
    log = tmp_path / "logs/mine.txt"
    log.parent.mkdir()
    log.write_text("as it was\n")
    result = project("pr1092", "SCALE=tiny", "RUN_ID=mine", f"ARTIFACT_DIR={tmp_path}", AUDIT=audit,
                     TRAIN_STATUS=str(code))
    assert result.code == code
    assert any(call.startswith("tools/audit.py") for call in result.calls) == (audit == "1" and code == 0)
    lines = log.read_text().splitlines()
    assert lines[:2] == ["as it was", "# SCALE=tiny: what is smaller than in pr1092; every feature stays on"]
    assert lines[2].startswith("DATA_PATH=") and len(lines) > 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_a_run_that_is_a_child(project, tmp_path, number):
    """Not only one that has taken the place of run.sh: it may save a checkpoint. What was shrunk still ends the log."""
    log = tmp_path / "logs/mine.txt"
    log.parent.mkdir()
    log.touch()
    environment = {"PATH": str(project.bin), "CALLS": str(tmp_path / "calls"), "NAMES": NAMES, "TRAIN_SECONDS": "60",
                   "SHELL_PYTHON": sys.executable, "ARTIFACT_DIR": str(tmp_path), "RUN_ID": "mine", "SCALE": "tiny"}
    command = [str(project.bin / "bash"), str(project.repo / "run.sh"), "smoke"]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # this one may ignore it
    until = time.monotonic() + 60
    while "train_gpt.py" not in (tmp_path / "calls").read_text().splitlines():
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.1)
    child.send_signal(number)
    assert child.wait(30) == 128 + number and log.read_text().startswith("# SCALE=tiny")


@pytest.mark.parametrize("arguments, words", [
    (("pr1092", "SCALE=huge"), "SCALE=huge is not one of: tiny"), (("smoke", "SCALE="), "SCALE= is not one of: tiny"),
    (("eval", "a.ptz", "SCALE=tiny"), "SCALE shrinks a model before training"),
    (("pr1092", "SCALES=tiny"), "SCALES is not a setting; did you mean SCALE?")])
def test_scale_of_another_word_is_one_line(project, arguments, words):
    result = project(*arguments)
    assert result.code == 2 and result.err.count("\n") == 1 and words in result.err
    assert not any(call.endswith("train_gpt.py") for call in result.calls)


@pytest.mark.parametrize("profile", PROFILES)
def test_tools_read_a_profile_as_run_sh_does(project, profile):
    (project.repo / "data/datasets/fineweb10B_sp1024").mkdir(parents=True)
    (project.repo / "data/datasets/fineweb10B_sp1024/fineweb_val_000000.bin").touch()
    assert profiles.load(profile).values.items() <= project(profile).env.items()
    assert profiles.load(profile).summary in project("help").out


# ---- interpreter

def test_python3_with_the_packages_is_used_as_it_is(project):
    result = project("smoke", REAL_PYTHON=sys.executable)
    assert result.code == 0 and not installs(result) and not (project.repo / ".venv").exists()


def test_a_torch_that_is_too_old_is_not(project, tmp_path):
    (tmp_path / "torch-2.8.1.dist-info").mkdir()
    (tmp_path / "torch-2.8.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.8.1\n")
    result = project("smoke", REAL_PYTHON=sys.executable, PYTHONPATH=str(tmp_path))
    assert result.code == 0 and installs(result) == 1 and (project.repo / ".venv").exists()


def test_the_second_run_installs_nothing(project):
    first = project("smoke", LACKS_PACKAGES="1")
    assert first.code == 0 and installs(first) == 1 and "-m venv --clear .venv" in first.calls
    assert ".venv/bin/python" in first.err
    second = project("smoke", LACKS_PACKAGES="1")
    assert second.code == 0 and [call for call in second.calls if "settings" not in call] == [
        "--version", "train_gpt.py --names", "tools/record.py build", "train_gpt.py"]
    assert installs(project("test", LACKS_PACKAGES="1")) == 0


def test_new_pins_or_another_python_install_again(project):
    project("smoke", LACKS_PACKAGES="1")
    with open(project.repo / "requirements.txt", "a") as file:
        file.write("# more\n")
    assert installs(project("smoke", LACKS_PACKAGES="1")) == 1
    assert installs(project("smoke", LACKS_PACKAGES="1")) == 0
    assert installs(project("smoke", LACKS_PACKAGES="1", STUB_VERSION="3.12.0")) == 1


def test_a_failed_install_is_one_line_and_is_done_again(project):
    failed = project("smoke", LACKS_PACKAGES="1", PIP_STATUS="1")
    assert failed.code == 2 and failed.err.splitlines()[-1].startswith("error: pip failed")
    assert "train_gpt.py" not in failed.calls
    again = project("smoke", LACKS_PACKAGES="1")
    assert again.code == 0 and installs(again) == 1


def test_no_python(project):
    (project.bin / "python3").unlink()
    result = project()
    assert result.code == 2 and result.err.startswith("error: there is no python3 of version 3.11")
    assert result.err.count("\n") == 1


def test_python_too_old(project):
    result = project(LACKS_PACKAGES="1", TOO_OLD="1")
    assert result.code == 2 and "error: there is no python3 of version 3.11" in result.err


def test_no_venv_module(project):
    result = project(LACKS_PACKAGES="1", LACKS_VENV="1")
    assert result.code == 2 and result.err.startswith("error: python3 lacks its venv module")


# ---- data and processes

def test_embedded_text_is_built_once(project):
    build = "data/prepare.py embedded"
    assert build in project("smoke").calls
    assert build not in project("smoke").calls
    assert build not in project("smoke", DATA_PATH="./elsewhere").calls


def test_data_tokenizer_and_vocabulary_come_from_one_place(project):
    """Who names a data folder gets the tokenizer it was made with, which train_gpt.py finds, not the profile's."""
    three = ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE")
    found = lambda result: [result.env.get(key) for key in three]
    fineweb = ["./data/datasets/fineweb10B_sp1024", "./data/tokenizers/fineweb_1024_bpe.model", "1024"]
    assert found(project("pr1092")) == fineweb
    assert found(project("smoke")) == [EMBEDDED, "./data/tokenizers/embedded_1024_bpe.model", None]
    for profile in PROFILES:
        assert found(project(profile, "DATA_PATH=./o[w]n")) == ["./o[w]n", None, None]
        assert found(project(profile, DATA_PATH="./own")) == ["./own", None, None]
        assert found(project(profile, "DATA_PATH=./own", "VOCAB_SIZE=9", TOKENIZER_PATH="t")) == ["./own", "t", "9"]
    assert found(project("pr1092", TOKENIZER_PATH="t")) == [fineweb[0], "t", "1024"]
    assert found(project(GPUS="1")) == [EMBEDDED, None, None]  # no FineWeb here
    assert found(project(GPUS="1", TOKENIZER_PATH="t")) == [EMBEDDED, "t", None]


def test_another_vocabulary_has_other_data(project):
    """VOCAB_SIZE alone: train_gpt.py finds its data, whatever the profile names."""
    three = ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE")
    for profile in PROFILES:
        result = project(profile, "VOCAB_SIZE=8192", GPUS="1")
        own = "_sp8192\n" in (ROOT / "profiles" / f"{profile}.env").read_text(encoding="utf-8")
        found = [result.env.get(key) for key in three]
        assert (found[:2] == [None, None]) != own and found[2] == "8192" and "FineWeb" not in result.err
    same = project("smoke", VOCAB_SIZE="1024")
    assert same.env["DATA_PATH"] == EMBEDDED and same.env["TOKENIZER_PATH"]


def test_parquet_files_bring_their_package(project):
    """Into .venv only, and when one is named."""
    new = {"LACKS_PACKAGES": "1", "LACKS_PYARROW": "1"}
    assert installs(project("data", "text", "a.jsonl", **new)) == 1  # .venv itself
    named = project("data", "text", "a b.parquet", **new)
    assert installs(named) == 1 and "data/requirements.txt" in named.err
    assert any("data/requirements.txt" in call for call in named.calls) and "text a b.parquet" in named.calls[-1]
    assert installs(project("data", "text", "a.parquet", **{**new, "LACKS_PYARROW": "0"})) == 0
    failed = project("data", "text", "a.parquet", **new, PIP_STATUS="1")
    assert failed.code == 2 and "error: pip failed" in failed.err


def test_the_users_python_is_given_no_package(project):
    assert installs(project("data", "text", "a.parquet", LACKS_PYARROW="1")) == 0


def test_brackets_in_a_path_are_letters(project):
    profile = project.repo / "profiles/default.env"
    profile.write_text("DATA_PATH=./data/[run1]*\n")
    assert project(GPUS="1").env["DATA_PATH"] == EMBEDDED
    (project.repo / "data/[run1]*").mkdir(parents=True)
    (project.repo / "data/[run1]*/fineweb_val_000000.bin").touch()
    assert project(GPUS="1").env["DATA_PATH"] == "./data/[run1]*"


def test_default_without_fineweb_says_so_and_runs(project):
    result = project(GPUS="1")
    assert result.env["DATA_PATH"] == EMBEDDED
    assert "bash run.sh data fineweb --variant sp1024 --train-shards 80" in result.err
    # asked for: train_gpt.py says what is wrong
    assert project(GPUS="1", DATA_PATH="./mine").env["DATA_PATH"] == "./mine"
    fineweb = project.repo / "data/datasets/fineweb10B_sp1024"
    fineweb.mkdir(parents=True)
    (fineweb / "fineweb_val_000000.bin").touch()
    assert project(GPUS="1").env["DATA_PATH"] == "./data/datasets/fineweb10B_sp1024"


def test_the_machine_chooses_profile_and_processes(project):
    cpu = project()
    assert "profile smoke, CPU" in cpu.err and cpu.env["OMP_WAIT_POLICY"] == "PASSIVE"
    one, eight = project(GPUS="1"), project(GPUS="8")
    assert "profile default, 1 GPU" in one.err and one.calls[-1] == "train_gpt.py"
    assert "profile default, 8 GPU" in eight.err
    assert eight.calls[-1] == "tools/launch.py --standalone --nproc_per_node=8 train_gpt.py"
    assert int(eight.env["OMP_NUM_THREADS"]) > 1
    assert "profile smoke, CPU" in project("smoke", GPUS="8").err
    assert "profile smoke, CPU" in project("DEVICE=cpu", GPUS="8").err


def test_several_machines_meet_at_an_endpoint(project):
    two = ("NNODES=2", "NODE_RANK=1", "RDZV_ENDPOINT=head:29500")
    start = "tools/launch.py --nnodes=2 --node_rank=1 --rdzv_backend=c10d --rdzv_endpoint=head:29500"
    many = project("default", *two, GPUS="8")
    assert many.calls[-1] == f"{start} --nproc_per_node=8 train_gpt.py"
    assert "machine 1 of 0 to 1 meets the others at head:29500" in many.err
    for arguments, environment in ((two, {"NPROC_PER_NODE": "3"}), (("NPROC_PER_NODE=3",),
                                                                    dict(pair.split("=") for pair in two))):
        again = project("smoke", *arguments, "MAX_RESTARTS=2", **environment)
        assert again.calls[-1] == f"{start} --max_restarts=2 --nproc_per_node=3 train_gpt.py"
    assert project("smoke", *two).calls[-1] == f"{start} --nproc_per_node=1 train_gpt.py"


def test_ranks_of_one_machine(project):
    start = "tools/launch.py --standalone"
    assert project("smoke", "NPROC_PER_NODE=2").calls[-1] == f"{start} --nproc_per_node=2 train_gpt.py"
    restarts = project("smoke", "MAX_RESTARTS=1")
    assert restarts.calls[-1] == f"{start} --max_restarts=1 --nproc_per_node=1 train_gpt.py"
    assert restarts.env["RUN_ID"] and project("smoke", "MAX_RESTARTS=1", "RUN_ID=mine").env["RUN_ID"] == "mine"
    assert project("default", "NPROC_PER_NODE=1", GPUS="8").calls[-1] == "train_gpt.py"
    assert project("smoke", "NNODES=1", "NODE_RANK=0", "RDZV_ENDPOINT=head:29500").calls[-1] == "train_gpt.py"


@pytest.mark.parametrize("arguments, said", [
    (("NNODES=two",), "NNODES=two is not a whole number"),
    (("NNODES=2", "RDZV_ENDPOINT=head:29500"), "NODE_RANK= is not a whole number"),
    (("NNODES=2", "NODE_RANK=-1"), "NODE_RANK=-1 is not a whole number"),
    (("NNODES=2", "NODE_RANK=2"), "NODE_RANK=2 does not exist in NNODES=2"),
    (("NODE_RANK=1",), "NODE_RANK=1 does not exist in NNODES=1"),
    (("NNODES=2", "NODE_RANK=1"), "RDZV_ENDPOINT= is not HOST:PORT"),
    (("NNODES=2", "NODE_RANK=1", "RDZV_ENDPOINT=head"), "RDZV_ENDPOINT=head is not HOST:PORT"),
    (("NPROC_PER_NODE=all",), "NPROC_PER_NODE=all is not a whole number"),
    (("DEVICE=auto", "NPROC_PER_NODE=3"), "NPROC_PER_NODE=3, but this machine has 2 GPU"),
    (("MAX_RESTARTS=1e9",), "MAX_RESTARTS=1e9 is not a whole number")])
def test_ranks_that_cannot_be_are_one_line(project, arguments, said):
    result = project("default", *arguments, GPUS="2")
    assert result.code == 2 and result.err.splitlines()[-1].startswith(f"error: {said}"), result.err
    assert not any("train_gpt.py" in call.split() and "--names" not in call for call in result.calls)


def test_the_size_of_the_built_script_counts(project):
    assert project("smoke").env["CODE_BYTES"] == "0"  # it could not be built
    assert project("smoke", BUILT="12345").env["CODE_BYTES"] == "5"
    assert project("smoke", "CODE_BYTES=7", BUILT="12345").env["CODE_BYTES"] == "7"


def test_exit_code_passes_through(project):
    assert project("smoke", TRAIN_STATUS="7").code == 7


def test_test_command(project):
    (project.repo / "tests" / "test_one.py").touch()
    assert project("test", "-x", "-k", "one").calls[-1] == "-m pytest tests -n 2 -x -k one"
    assert project("test", LACKS_XDIST="1").calls[-1] == "-m pytest tests"
    assert project("test", "tests/test_one.py::test_it").calls[-1] == "-m pytest tests/test_one.py::test_it"


def test_commands_pass_their_arguments_on(project):
    """And tell each tool what it was called; what the tools make of it is tested in test_using.py."""
    assert project("settings").calls[-1] == "train_gpt.py --help"
    for arguments, call in ((("data", "text", "a b.txt"), "data/prepare.py text a b.txt"),
                            (("bench", "--peer", "x.py"), "tools/bench.py --peer x.py"),
                            (("parity", "folder"), "tools/parity.py folder"),
                            (("plan", "pr1092", "SEED=1"), "tools/plan.py pr1092 SEED=1"),
                            (("systems",), "tools/systems.py"),
                            (("survive", "--kills", "1"), "tools/survive.py --kills 1"),
                            (("record", "build"), "tools/record.py build"),
                            (("report", "x.eval.json"), "tools/report.py x.eval.json"),
                            (("inspect", "x.ptz", "--plot", "x.png"), "tools/inspect_artifact.py x.ptz --plot x.png"),
                            (("sample", "x.ptz", "two words"), "tools/sample.py x.ptz two words"),
                            (("sweep", "x.ptz", "TTT_LR=0.1,0.2"), "tools/sweep.py x.ptz TTT_LR=0.1,0.2"),
                            (("sweep", "--help"), "tools/sweep.py --help"),
                            (("sweep", "smoke", "SEED=1,2"), "tools/sweep.py smoke SEED=1,2"),
                            (("runs", "--last", "3"), "tools/runs.py --last 3"),
                            (("audit", "x.ptz"), "tools/audit.py x.ptz"),
                            (("audit", "--help"), "tools/audit.py --help")):
        result = project(*arguments)
        assert result.calls[-1] == call and result.env["RUN_SH_COMMAND"] == f"bash run.sh {arguments[0]}"


def test_ci_calls_the_test_command_of_the_readme(project):
    assert "\nbash run.sh test " in (ROOT / "README.md").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert project(script=".ci/run").calls[-1] == "-m pytest tests -n 2"


def test_what_only_a_tool_needs_is_installed_when_it_is_called(project):
    """Into .venv alone; a python3 of the user's stays as it is, and the tool says what it lacks."""
    assert installs(project("sweep", "smoke", "SEED=1,2", LACKS_TOOLS="1")) == 0
    assert installs(project("smoke", LACKS_PACKAGES="1")) == 1  # makes .venv
    for command, package in (("sweep", "optuna"), ("report", "plotly")):
        result = project(command, "smoke", LACKS_TOOLS="1")
        assert installs(result) == 1 and f"-c import {package}" in result.calls
        assert installs(project(command, "smoke")) == 0
    assert "error: pip failed" in project("report", LACKS_TOOLS="1", PIP_STATUS="1").err


def test_tracking_begins_before_the_run_and_ends_after_it(project):
    result = project("smoke", "TENSORBOARD=1", "RUN_ID=mine", TRAIN_STATUS="3", TRAIN_SECONDS="2")
    assert result.code == 3 and {"train_gpt.py", "tools/track.py"} <= set(result.calls)
    assert "WANDB_ENABLED=0" in result.out.splitlines()
    assert project("smoke", "TENSORBOARD=0", "WANDB_ENABLED=0").calls[-1] == "train_gpt.py"
    assert "tools/track.py" in project("smoke", "WANDB_ENABLED=1", "WANDB_MODE=offline", TRAIN_SECONDS="2").calls

import dataclasses
import os
import subprocess
import sys
import textwrap

import pytest
import train_gpt as tg
from conftest import ROOT
from hypothesis import given, strategies as st

FIELDS = dataclasses.fields(tg.Hyperparameters)
PR_1092 = """
DATA_PATH TOKENIZER_PATH RUN_ID SEED VAL_BATCH_SIZE VAL_LOSS_EVERY TRAIN_LOG_EVERY ITERATIONS WARMDOWN_ITERS
WARMUP_STEPS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN EVAL_SEQ_LEN MAX_WALLCLOCK_SECONDS QK_GAIN_INIT VOCAB_SIZE NUM_LAYERS
NUM_KV_HEADS MODEL_DIM NUM_HEADS MLP_MULT TIE_EMBEDDINGS ROPE_BASE LOGIT_SOFTCAP EMBED_LR HEAD_LR TIED_EMBED_LR
TIED_EMBED_INIT_STD MATRIX_LR SCALAR_LR MUON_MOMENTUM MUON_BACKEND_STEPS MUON_MOMENTUM_WARMUP_START
MUON_MOMENTUM_WARMUP_STEPS BETA1 BETA2 ADAM_EPS GRAD_CLIP_NORM EVAL_STRIDE MTP_NUM_HEADS MTP_LOSS_WEIGHT MUON_BETA2
SWA_ENABLED SWA_EVERY LAWA_ENABLED LAWA_K LAWA_FREQ MUON_WD ADAM_WD QAT_ENABLED BIGRAM_VOCAB_SIZE BIGRAM_DIM XSA_LAST_N
ROPE_DIMS LN_SCALE DTG_ENABLED LATE_QAT_THRESHOLD VE_ENABLED VE_DIM VE_LAYERS GATED_ATTENTION VALUE_RESIDUAL TTT_ENABLED
TTT_LR TTT_EPOCHS TTT_CHUNK_TOKENS TTT_FREEZE_BLOCKS TTT_MOMENTUM TTT_BATCH_SEQS TTT_GRAD_CLIP TTT_OPTIMIZER TTT_TEMP
TRIGRAM_VOCAB_SIZE TRIGRAM_DIM GRAD_QUANT CONTROL_TENSOR_NAME_PATTERNS INT8_KEEP_FLOAT_FP32_NAME_PATTERNS""".split()


def refusal(**variables):
    with pytest.raises(tg.UserError) as caught:
        tg.Hyperparameters.from_env({k: str(v) for k, v in variables.items()})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_published_variable_is_known_and_explained():
    known = {name: f for f in FIELDS for name in tg.env_names(f)}
    assert not set(PR_1092) - set(known)
    assert all(f.metadata["help"] for f in FIELDS)


def test_every_setting_is_read_somewhere_else():
    source = (ROOT / "train_gpt.py").read_text()
    body = source[source.index("def settings_by_section"):]
    indirect = {value for family in tg.FAMILIES for value in dataclasses.astuple(family)}  # rows name their settings
    indirect |= {f"{family.clip}_clip_sigmas" for family in tg.FAMILIES if family.clip}
    config_room = source[source.index("def train_files"):source.index("def settings_by_section")]
    for f in FIELDS:
        assert f"cfg.{f.name}" in body or f.name in indirect or f"self.{f.name}" in config_room, f.name


def test_defaults_are_class_attributes_as_reviewers_read_them():
    assert (tg.Hyperparameters.model_dim, tg.Hyperparameters.num_layers) == (512, 11)
    assert tg.Hyperparameters.vocab_size == 1024


def test_defaults_lie_in_their_own_ranges():
    for f in FIELDS:
        text = str(int(f.default) if f.type == "bool" else f.default)
        assert tg.parse_value(f.name.upper(), f, text) == f.default


def test_values_and_aliases_arrive():
    cfg = tg.Hyperparameters.from_env({"NUM_LAYERS": "12", "VALUE_EMBED_DIM": "64", "LN_SCALE": "0",
                                       "MATRIX_LR": "1e-2", "TRAIN_BATCH_TOKENS": "65_536"})
    assert (cfg.num_layers, cfg.ve_dim, cfg.ln_scale) == (12, 64, False)
    assert (cfg.matrix_lr, cfg.train_batch_tokens) == (0.01, 65536)
    assert set(cfg.non_defaults()) == {"num_layers", "ve_dim", "ln_scale", "matrix_lr", "train_batch_tokens"}


@pytest.mark.parametrize("typo, meant", [("WARMDRON_ITERS", "WARMDOWN_ITERS"), ("NUM_LAYER", "NUM_LAYERS"),
                                         ("TTT_ENABELD", "TTT_ENABLED"), ("SEEDS", "SEED"),
                                         ("MATRIX_LRS", "MATRIX_LR")])
def test_a_near_miss_is_an_error_that_names_the_setting(typo, meant):
    message = refusal(**{typo: 1})
    assert typo in message and meant in message


def test_other_programs_variables_are_left_alone():
    foreign = {"PATH": "/bin", "HOME": "/", "LANG": "C", "SHELL": "sh", "TERM": "x", "PWD": "/", "USER": "me",
               "EDITOR": "vi", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "2", "MASTER_PORT": "1", "SHLVL": "1",
               "LS_COLORS": ""}
    assert tg.Hyperparameters.from_env(foreign) == tg.Hyperparameters()


@given(st.sampled_from(FIELDS), st.text(max_size=8))
def test_no_text_makes_anything_but_a_value_or_one_line(f, text):
    try:
        tg.parse_value(f.name.upper(), f, text)
    except tg.UserError as error:
        assert f.name.upper() in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("variables, said", [
    ({"MUON_MOMENTUM_WARMUP_START": "092"}, "MUON_MOMENTUM_WARMUP_START=092 is out of range"),
    ({"NUM_LAYERS": "eleven"}, "not a whole number"),
    ({"NUM_LAYERS": "0"}, "out of range"),
    ({"MATRIX_LR": "nan"}, "out of range"),
    ({"LN_SCALE": "yes"}, "not 0 or 1"),
    ({"ATTENTION": "fast"}, "not one of"),
    ({"MODEL_DIM": "500"}, "not divisible by NUM_HEADS"),
    ({"NUM_KV_HEADS": "3"}, "not divisible by NUM_KV_HEADS"),
    ({"ROPE_DIMS": "15"}, "odd"),
    ({"MLP_MULT": "0.01", "MODEL_DIM": "64"}, "MLP of no width"),
    ({"ROPE_DIMS": "128"}, "more than a head"),
    ({"VE_LAYERS": "9,11"}, "VE_LAYERS"),
    ({"VE_LAYERS": "9;10"}, "VE_LAYERS"),
    ({"TRAIN_BATCH_TOKENS": "5000"}, "not divisible by TRAIN_SEQ_LEN"),
    ({"EVAL_STRIDE": "4096"}, "EVAL_STRIDE"),
    ({"TTT_CHUNK_TOKENS": "64"}, "TTT_CHUNK_TOKENS"),
    ({"BIGRAM_VOCAB_SIZE": "1"}, "BIGRAM_VOCAB_SIZE"),
    ({"RESUME": "1"}, "RUN_ID"),
    ({"RUN_ID": "../x"}, "RUN_ID"),
    ({"VE_DIM": "64", "VALUE_EMBED_DIM": "32"}, "different values"),
])
def test_bad_values_and_contradictions(variables, said):
    assert said in refusal(**variables)



def test_a_near_miss_with_a_value_of_another_kind_belongs_to_another_program():
    assert tg.Hyperparameters.from_env({"MODEL_DIR": "/models", "NUM_THREADS": "4"}) == tg.Hyperparameters()
    assert "MODEL_DIM" in refusal(MODEL_DIR="512")


def test_every_number_has_an_upper_bound():
    for f in FIELDS:
        if f.type in ("int", "float"):
            assert f.metadata["lo"] is not None and (f.metadata["hi"] is not None or f.type == "int"), f.name
            assert "out of range" in refusal(**{f.name.upper(): "1e308" if f.type == "float" else 10 ** 12})


def test_names_are_listed_for_run_sh(capsys):
    assert tg.main(["--names"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"NUM_LAYERS", "VE_DIM VALUE_EMBED_DIM", "ATTN_QAT_BITS ATTN_QUANT_BITS MATRIX_BITS"} <= set(lines)
    assert len(lines) == len(set(lines)) == len(FIELDS) + len(tg.WITHOUT_EFFECT)


def test_help_lists_every_setting_and_arguments_are_refused(capsys):
    assert tg.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f.name.upper() in shown for f in FIELDS)
    assert tg.main(["--epochs=3"]) == 2
    assert "--epochs=3" in capsys.readouterr().err


def test_import_does_nothing_and_needs_no_optional_package(tmp_path):
    """As a reviewer does it: import on a CPU, read the class, build the default model, run it once."""
    script = textwrap.dedent("""
        import os, sys, torch
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("flash_attn_interface", "zstandard", "sentencepiece", "tqdm",
                                          "huggingface_hub"):
                    raise ImportError(name)
        sys.meta_path.insert(0, Blocked())
        sys.argv = ["smoke"]
        before = dict(os.environ), torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()
        import train_gpt
        assert before == (dict(os.environ), torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())
        assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
        assert os.listdir(".") == []
        assert train_gpt.Hyperparameters.model_dim == 512
        model = train_gpt.GPT(train_gpt.Hyperparameters())
        assert sum(p.numel() for p in model.parameters()) == 26_993_756
        logits = model.logits(model.hidden(torch.randint(1024, (1, 64))))
        assert logits.shape == (1, 64, 1024) and torch.isfinite(logits).all()
        print("SMOKE_TEST_PASS")
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})
    assert "SMOKE_TEST_PASS" in done.stdout, done.stderr

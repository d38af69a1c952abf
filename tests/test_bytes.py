"""Counted bytes against SentencePiece's own decoder, over kinds of tokenizers and texts of all sorts."""
import functools
import io
import random

import numpy as np
import pytest
import sentencepiece
import train_gpt as tg
from hypothesis import given, settings, strategies as st

SPACE = "\u2581"  # SentencePiece's sign for a space
WORDS = ("the of and to in a is that for it as was with be by on not he his but at are this have from or had an they "
         "which one you were all her she there would their we him been has when who will no more if out so up said "
         "hello héllo naïve straße ﬁne Ⅳ ½ 中文 语言 模型 学习 今天 天气 日本語 テスト 한국어 🙂 🙃🚀 👩‍👩‍👧 x= (y) --- ... 3.14 "
         "100% a_b").split()
PHRASES = ["of the", "in the", "New York", "    return x", "   ", "x == y", "\ue001new", "a -> b"]
SYMBOLS = ["New York", " -> ", "== ", "\ue001"]  # each becomes a piece of its own, spaces included
PUBLISHED = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc",
             "add_dummy_prefix": False, "split_digits": True}
KINDS = {  # what differs from SentencePiece's own defaults: unigram, dummy prefix, no bytes, extra spaces removed
    "as published": PUBLISHED,
    "bpe, dummy prefix, bytes": {"model_type": "bpe", "byte_fallback": True},
    "bpe, no bytes": {"model_type": "bpe"},
    "unigram": {},
    "unigram, bytes, no dummy prefix": {"byte_fallback": True, "add_dummy_prefix": False},
    "characters": {"model_type": "char"},
    "spaces kept": {**PUBLISHED, "remove_extra_whitespaces": False},
    "spaces kept, dummy prefix": {**PUBLISHED, "remove_extra_whitespaces": False, "add_dummy_prefix": True},
    "spaces kept, no normalisation": {**PUBLISHED, "remove_extra_whitespaces": False,
                                      "normalization_rule_name": "identity"},
    "nfkc": {"byte_fallback": True, "normalization_rule_name": "nfkc", "remove_extra_whitespaces": False},
    "symbols of one's own": {**PUBLISHED, "user_defined_symbols": [s.replace(" ", SPACE) for s in SYMBOLS]},
    "symbols of one's own, spaces kept": {**PUBLISHED, "user_defined_symbols": [s.replace(" ", SPACE) for s in SYMBOLS],
                                          "remove_extra_whitespaces": False, "add_dummy_prefix": True},
    "space as suffix": {**PUBLISHED, "treat_whitespace_as_suffix": True},
    "space as suffix, dummy": {"byte_fallback": True, "treat_whitespace_as_suffix": True},
    "space as suffix, spaces kept": {**PUBLISHED, "treat_whitespace_as_suffix": True,
                                     "remove_extra_whitespaces": False},
    "pieces cross words": {**PUBLISHED, "split_by_whitespace": False},
    "pieces cross words, spaces kept, dummy": {"byte_fallback": True, "split_by_whitespace": False,
                                               "remove_extra_whitespaces": False},
    "whitespace-only pieces": {**PUBLISHED, "allow_whitespace_only_pieces": True, "remove_extra_whitespaces": False},
}


def corpus():
    draw = random.Random(0)
    return [" ".join(draw.choice((WORDS, PHRASES)[i % 2]) for i in range(12)) for _ in range(300)]


def train(changes):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        character_coverage=1.0, num_threads=1, minloglevel=3, required_chars=SPACE, hard_vocab_limit=False,
        **{"model_type": "unigram", "vocab_size": 480, **changes})
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@functools.cache
def tokenizer_of(kind):
    return train(KINDS[kind])


glue = st.sampled_from([" ", "", "  ", "   ", "\n", "\t", "\u3000", SPACE, ". "])
sorts = st.one_of(st.sampled_from(WORDS), st.sampled_from(PHRASES), st.text(max_size=4))
texts = st.lists(st.tuples(glue, sorts, glue), max_size=8).map(lambda parts: "".join(map("".join, parts)))


@pytest.mark.parametrize("kind", KINDS)
@given(documents=st.lists(texts, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_counted_bytes_are_those_of_the_decoded_text(kind, documents):
    """Documents after one another, each behind a BOS, which is a target too and weighs nothing. Each token adds what
    the decoded text grows by, so far as that can be seen: a character in single bytes is no text until its last one."""
    tokenizer = tokenizer_of(kind)
    ids = [[tokenizer.bos_id(), *tokenizer.encode(document)] for document in documents]
    sizes = iter(tg.token_bytes(tokenizer, np.array(sum(ids, []))))
    for document in ids:
        counted = 0
        for end in range(1, len(document) + 1):
            counted += next(sizes)
            decoded = tokenizer.decode(document[:end])
            if "\ufffd" not in decoded or end == len(document):
                assert counted == len(decoded.encode()), (document[:end], decoded)


def test_the_kinds_differ_in_what_they_are_there_for():
    """Spaces inside and at the end of pieces, pieces of spaces alone, and documents whose first space is text."""
    pieces = {kind: [tokenizer_of(kind).id_to_piece(i) for i in range(tokenizer_of(kind).vocab_size())]
              for kind in KINDS}
    inside = {kind for kind in KINDS if any(SPACE in p.strip(SPACE) for p in pieces[kind])}
    behind = {kind for kind in KINDS if any(p.endswith(SPACE) and p.strip(SPACE) for p in pieces[kind])}
    alone = {kind for kind in KINDS if any(len(p) > 1 and not p.strip(SPACE) for p in pieces[kind])}
    kept = {kind for kind in KINDS if tokenizer_of(kind).decode([tokenizer_of(kind).piece_to_id(SPACE)]) == " "}
    assert {"pieces cross words", "symbols of one's own"} <= inside and "as published" not in inside
    assert {"space as suffix", "space as suffix, dummy"} <= behind and "whitespace-only pieces" in alone
    assert "spaces kept" in kept and not {"spaces kept, dummy prefix", "as published", "unigram"} & kept


def test_control_tokens_and_unused_ones_weigh_nothing_wherever_they_stand():
    tokenizer = tokenizer_of("as published")
    the, bos, eos, pad = (tokenizer.piece_to_id(p) for p in (SPACE + "the", "<s>", "</s>", "<pad>"))
    sizes = tg.token_bytes(tokenizer, np.array([the, the, bos, the, the, eos, pad, the, bos, bos]))
    assert sizes.tolist() == [3, 4, 0, 3, 4, 0, 0, 3, 0, 0]

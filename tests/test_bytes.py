"""Counted bytes against SentencePiece's own decoder, over kinds of tokenizers and texts of all sorts."""
import io
import random

import pytest
import sentencepiece
import torch
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


@pytest.fixture(scope="module")
def tokenizers():
    """Kind -> (tokenizer, its table), made when first asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            tokenizer = train(KINDS[kind])
            made[kind] = tokenizer, tg.ByteTable.of(tokenizer, tokenizer.vocab_size(), "cpu")
        return made[kind]
    return of


glue = st.sampled_from([" ", "", "  ", "   ", "\n", "\t", "\u3000", SPACE, ". "])
sorts = st.one_of(st.sampled_from(WORDS), st.sampled_from(PHRASES), st.text(max_size=4))
texts = st.lists(st.tuples(glue, sorts, glue), max_size=8).map(lambda parts: "".join(map("".join, parts)))


@pytest.mark.parametrize("kind", KINDS)
@given(documents=st.lists(texts, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_counted_bytes_are_those_of_the_decoded_text(tokenizers, kind, documents):
    """Documents after one another, each behind a BOS, which is a target too and weighs nothing. What a tokenizer has
    no piece for decodes to a sign that the text never held: such texts are left out."""
    tokenizer, table = tokenizers(kind)
    stream, wanted = [tokenizer.bos_id()], 0
    for document in documents:
        ids = tokenizer.encode(document)
        if tokenizer.unk_id() not in ids:
            stream += [*ids, tokenizer.bos_id()]
            wanted += len(tokenizer.decode(ids).encode())
    ids = torch.tensor(stream)
    assert table.count(ids[:-1], ids[1:]).sum().item() == wanted

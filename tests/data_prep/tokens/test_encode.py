"""The fast encoder's ids are those of `tokenizers`, and a part stops at other ids."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made_texts import made_texts
from tokenizers import AddedToken, Tokenizer

from data_prep.tokens import encode, tokenizer
from sharebert_common.errors import BadInput

TRAINING = made_texts(300, seed=5)


def trained(**config: object) -> str:
    return tokenizer.train(
        lambda: TRAINING, tokenizer.TokenizerRecipe(train=tokenizer.TrainTokenizerRecipe(vocab_size=700), **config)
    )


def with_added_tokens(text: str) -> str:
    words = Tokenizer.from_str(text)
    words.add_tokens(
        [AddedToken("<ent>", lstrip=True), AddedToken("ba na", single_word=True), AddedToken("ﬁx", normalized=True)]
    )
    return str(words.to_str())


UNCASED, CASED = trained(), trained(lowercase=False)
BPE = tokenizer.train(
    lambda: TRAINING, tokenizer.TokenizerRecipe(train=tokenizer.TrainTokenizerRecipe(type="bpe", vocab_size=600))
)
FILES = {"uncased": UNCASED, "cased": CASED, "added tokens": with_added_tokens(UNCASED)}
ENCODERS = {name: (encode.fast_encoder(text), encode.reference_encoder(text)) for name, text in FILES.items()}

PIECES = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=st.characters(min_codepoint=0, max_codepoint=0x2FF), max_size=40),
    st.text(alphabet=st.characters(categories=["Cc", "Cf", "Zs", "Mn", "Co", "Cn"]), max_size=12),
    st.text(alphabet="\u4e00\u9fa5\u3042\u30a2\uac00\U00020000aé", max_size=20),
    st.text(alphabet="😀👩\u200d\ufe0f🏽🇪🇺", max_size=12),
    st.sampled_from(
        ["[MASK]", "[CLS] ", " [SEP]", "[mask]", "<ent>", " <ent> ", "ba na", "ﬁx", "[UNK", "\x00", "\ufffd"]
    ),
    st.integers(90, 210).map(lambda n: "ab" * n),
    st.sampled_from(TRAINING).map(lambda text: text[:80]),
)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(st.lists(PIECES, max_size=5).map("".join), max_size=4))
@example(texts=["", " ", "\r\n\t", "x" * 101, "İ", "ΑΣ ΣΑΣ", "e\u0301\u0323", "\u1e9b\u0323", "a\x0bb\x0cc"])
def test_fast_ids_are_the_reference_ids(name: str, texts: list[str]) -> None:
    fast, reference = ENCODERS[name]
    assert fast is not None
    texts = [text.encode(errors="replace").decode() for text in texts]  # documents hold no lone surrogates
    (ids, offsets), (expected_ids, expected_offsets) = fast(texts), reference(texts)
    np.testing.assert_array_equal(offsets, expected_offsets)
    np.testing.assert_array_equal(ids, expected_ids)


@pytest.mark.parametrize("name", FILES)
def test_every_code_point_alone_and_within_a_word(name: str) -> None:
    fast, reference = ENCODERS[name]
    assert fast is not None
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and (c < 0x3400 or c % 17 == 0)]
    texts = [" ".join(f"{chr(c)} ba{chr(c)}na" for c in points[i : i + 64]) for i in range(0, len(points), 64)]
    np.testing.assert_array_equal(fast(texts)[0], reference(texts)[0])


def test_forked_and_repeated_use_gives_the_same_ids() -> None:
    fast, reference = ENCODERS["uncased"]
    assert fast is not None
    texts = made_texts(200, seed=9)
    expected = reference(texts)[0]
    for _ in range(3):  # caches fill and are hit
        np.testing.assert_array_equal(fast(texts)[0], expected)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(fast(texts)[0], expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_wrong_encoder_stops_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = ENCODERS["uncased"]
    assert fast is not None

    def wrong(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = fast(texts)
        ids[::50] += 1
        return ids, offsets

    monkeypatch.setattr(encode, "fast_encoder", lambda _: wrong)
    with pytest.raises(BadInput, match=r"nanotoken and tokenizers differ on this text: .*encoder: tokenizers"):
        encode.CheckedEncoder(UNCASED, "auto")(made_texts(50, seed=1))
    ids, _ = encode.CheckedEncoder(UNCASED, "tokenizers")(["ba na"])
    assert len(ids) > 0


def test_a_tokenizer_that_the_fast_library_does_not_know_goes_to_the_reference() -> None:
    assert encode.fast_encoder(BPE) is None
    text = random.Random(0).choice(TRAINING)
    ids, offsets = encode.CheckedEncoder(BPE, "auto")([text, text])
    assert Tokenizer.from_str(BPE).decode(ids[: offsets[1]].tolist()) == text


@pytest.mark.parametrize("kind", ["uncased", "cased", "added tokens", "bpe"])
@settings(max_examples=100, deadline=None)
@given(text=st.lists(PIECES, max_size=12).map(" ".join), data=st.data())
def test_the_reference_gives_the_same_ids_piece_by_piece(kind: str, text: str, data: st.DataObject) -> None:
    file = BPE if kind == "bpe" else FILES[kind]
    text = text.encode(errors="replace").decode()
    whole = Tokenizer.from_str(file).encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_PIECE_CHARS", data.draw(st.integers(4, 40)))
        ids, offsets = encode.reference_encoder(file)([text, "", text])
    assert ids.tolist() == whole * 2
    assert offsets.tolist() == [0, len(whole), len(whole), 2 * len(whole)]

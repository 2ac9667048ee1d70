"""The same text in other typography gives the same words, and so the same n-grams."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_texts import made_texts, recipe, write_jsonl

from data_prep.filter import words as words_module
from data_prep.filter.decontaminate import DecontaminateRecipe, evaluation_ngrams, overlaps
from data_prep.filter.ngrams import ngram_hashes
from data_prep.filter.words import words
from data_prep.pipeline import prepare
from sharebert_common.errors import BadInput

PLAIN = "\"It's a pity,\" she said - \"that you don't know what he's done (with it), for I'd say: it isn't often; no!\""


def split(text: str) -> list[str]:
    return words(text).decode().split()


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.replace("'", "’").replace(' "', " “").replace('"', "”"),
        PLAIN.replace("'", "\u02bc").replace('"', "„"),
        PLAIN.replace("'", "ʹ").replace('"', "«"),
        PLAIN.replace("'", "＇").replace('"', "＂").replace(",", "，").replace("(", "（").replace("!", "！"),
        PLAIN.replace("'", "´").replace('"', "「").replace(":", "："),
        *(PLAIN.replace(" - ", dash) for dash in ("—", " – ", "―", "−", "‐", " ⸺ ", "－", "﹘")),
        *(PLAIN.replace(" ", space) for space in ("\u00a0", "\u202f", "\u2009", "\u3000", "\u200b", "\u2028", "\x85")),
        PLAIN.replace("pity", "pi\u00ad\r\n  ty"),
        PLAIN.replace("pity", "pi\u00ad\u2028ty"),
        PLAIN.replace("pity", "pi\u00adty").replace("know", "\ufeffkn\u200dow\u2060"),
        PLAIN.replace("said", "ｓａｉｄ").replace("IT", "ＩＴ"),
        PLAIN.replace(" she", " 🙂👍🏽 she").replace("often", "often\ufe0f…"),
        PLAIN + "\u2029•※→",
    ],
)
def test_typography_does_not_change_words(text: str) -> None:
    assert text != PLAIN
    assert split(text) == split(PLAIN)
    assert np.array_equal(ngram_hashes([text], 5)[0], ngram_hashes([PLAIN], 5)[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("well-known well–known don't don’t", "well known well known don t don t"),
        ("naïve nai\u0308ve NAÏVE", "naïve naïve naïve"),
        ("ﬁne ①② ㎏ x² Ⅻ", "fine 12 kg x2 xii"),
        ("STRASSE straße STRAẞE Straﬀe", "strasse strasse strasse straffe"),
        ("ΟΔΟΣ οδος ΟΔΟΣ.", "οδοσ οδοσ οδοσ"),
        ("ΐ Ϊ́ \u0399\u0308\u0301 ǰ J̌", "ΐ ΐ ΐ ǰ ǰ"),
        ("ᾳ ΑΙ αι ᾼ", "αι αι αι αι"),
        ("K Å ſet", "k å set"),
        ("北京大学abc東京１２", "北 京 大 学 abc 東 京 12"),
        ("ﾃﾞｰﾀ データ", "デ ー タ デ ー タ"),
        ("ภาษาไทย", " ".join("ภาษาไทย")),
        ("ꦲꦏ꧀ꦱꦫꦗꦮ", " ".join("ꦲꦏ꧀ꦱꦫꦗꦮ")),
        ("ꆈꌠꉙ", " ".join("ꆈꌠꉙ")),
        ("ㄅㄆㄇ", " ".join("ㄅㄆㄇ")),
        ("한국어 문장", "한국어 문장"),
        ("हिन्दी में", "हिन्दी में"),
        ("العـــربية العربية", "العربية العربية"),
        ("سلام\u200cعلیکم", "سلامعلیکم"),
        ("tab\tand\x1cunit €5 a_b", "tab and unit 5 a b"),
        ("。、！？ “” — 🙂", ""),
    ],
)
def test_words_of_many_scripts(text: str, expected: str) -> None:
    assert split(text) == expected.split()


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="ascii"), max_size=80))
def test_ascii_text_is_read_in_one_way_alone_and_beside_other_text(text: str) -> None:
    assert split(text + " é") == [*split(text), "é"]


def test_long_texts_are_cut_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(made_texts(30, seed=5)) + " é"
    whole = split(text)
    monkeypatch.setattr(words_module, "_PIECE_CHARS", 50)
    assert split(text) == whole


def test_a_lone_surrogate_is_no_error() -> None:
    assert len(split("a \ud800 b".encode("utf-8", "replace").decode())) == 2


def typeset(text: str) -> str:
    """The text as a typesetter would write it."""
    return text.replace("'", "’").replace(' "', " “").replace('"', "”").replace(" - ", "—").replace(",", "，")


@pytest.mark.parametrize("other", ["corpus", "evaluation"])
def test_contamination_is_found_in_other_typography(tmp_path: Path, other: str) -> None:
    texts = made_texts(20, seed=7)
    changed = typeset(PLAIN)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": PLAIN if other == "corpus" else changed}), "utf-8")
    grams = evaluation_ngrams(DecontaminateRecipe(paths=[str(tmp_path / "eval.jsonl")]))
    documents = [*texts, f"{texts[0]} {changed if other == 'corpus' else PLAIN} {texts[1]}"]
    assert overlaps(documents, grams, 13).tolist() == [False] * len(texts) + [True]


def report(folder: Path) -> str:
    return (folder / "report.md").read_text("utf-8")


def test_dashes_and_quotes_hide_no_contamination_from_prep(tmp_path: Path) -> None:
    """Twenty sentences with quotes and hyphens, which the corpus has with em dashes and curly quotes."""
    sentences = [
        " - ".join(f'"{w}"' for w in text.split()[:16]) for text in made_texts(60, seed=8) if len(text.split()) > 15
    ]
    sentences = sentences[:20]
    others = made_texts(20, seed=9)
    corpus = write_jsonl(
        tmp_path / "c.jsonl", [*others, *(f"{o} {typeset(s)}" for o, s in zip(others, sentences, strict=True))]
    )
    write_jsonl(tmp_path / "eval.jsonl", sentences)
    made = prepare(recipe(tmp_path / "d", corpus, clean__evaluation__paths=[str(tmp_path / "eval.jsonl")]))
    assert "| documents that overlap with evaluation sets | 20 |" in report(made)


def test_a_copy_in_other_typography_is_a_near_duplicate(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [*made_texts(50, seed=3), PLAIN, typeset(PLAIN)])
    made = prepare(recipe(tmp_path / "d", corpus, clean__near_duplicates=0.9))
    assert "| nearly the same text as an earlier document | 1 (" in report(made)


def test_near_duplicates_without_spaces_between_words(tmp_path: Path) -> None:
    """Chinese, where one character in thirty of the copy is another one: 5 in 6 of the 5-grams stay."""
    rng = np.random.default_rng(0)
    alphabet = np.array(
        list(
            "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长"
        )
    )
    texts = ["".join(row) for row in rng.choice(alphabet, (30, 300))]
    copies = ["".join(c if i % 60 else "某" for i, c in enumerate(text)) for text in texts]
    corpus = write_jsonl(tmp_path / "c.jsonl", [*texts, *copies])
    made = prepare(recipe(tmp_path / "d", corpus, clean__near_duplicates=0.7, tokenizer__train__vocab_size=2000))
    found = [line for line in report(made).splitlines() if "nearly the same" in line]
    assert found
    assert found[0].split("|")[2].strip().startswith("30 (")


def test_an_evaluation_file_in_another_encoding_is_refused_by_its_own_key(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.txt"
    file.write_text("one line of text\n" * 50, encoding="utf-16")
    with pytest.raises(BadInput) as refused:
        evaluation_ngrams(DecontaminateRecipe(paths=[str(file)]))
    assert str(refused.value).startswith("clean.evaluation.paths: ")
    assert "source.encoding" not in str(refused.value)

"""Pieces of text add up to the text of the whole, whatever bytes the tokens are made of."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.bytes_tokenizer import byte_tokenizer
from ropool.engine.detokenizer import Detokenizer

TOKENIZER = byte_tokenizer()


def pieces(tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_pieces_of_any_tokens_add_up(tokens: list[int]) -> None:
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces(tokens)) == whole


@given(st.text(max_size=20))
def test_pieces_of_any_text_add_up(text: str) -> None:
    assert "".join(pieces(TOKENIZER(text)["input_ids"])) == text


def test_a_character_comes_whole() -> None:
    tokens = TOKENIZER("aé€🙂")["input_ids"]
    assert [piece for piece in pieces(tokens) if piece] == ["a", "é", "€", "🙂"]


def test_an_answer_that_ends_within_a_character() -> None:
    tokens = TOKENIZER("a€")["input_ids"][:-1]
    assert pieces(tokens) == ["a", "", "", "\ufffd"]

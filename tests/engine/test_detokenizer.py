"""Pieces of text add up to the text of the whole, whatever bytes the tokens are made of."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from engine.bytes_tokenizer import byte_tokenizer
from ropool.engine.detokenizer import Detokenizer

TOKENIZER = byte_tokenizer()


def spaced(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """A tokenizer whose words bring the space before them, but the first of a text."""
    words = ["\u2581hello", "\u2581world", "s", "\u2581", *(f"<0x{n:02X}>" for n in range(256))]
    model = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges=[]))
    model.decoder = decoder
    model.add_special_tokens(["<|x|>"])
    return PreTrainedTokenizerFast(tokenizer_object=model)


SPACED = {
    "strip": spaced(
        decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    ),
    "metaspace": spaced(decoders.Metaspace()),
}
SPECIAL = 260


def pieces(tokens: list[int], tokenizer: Any = TOKENIZER) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
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


@pytest.mark.parametrize("name", SPACED)
@given(st.lists(st.sampled_from([0, 1, 2, 3, SPECIAL, 4 + 0xE2, 4 + 0x82, 4 + 0xAC]), max_size=8))
def test_spaces_before_words_stay(name: str, tokens: list[int]) -> None:
    whole = SPACED[name].decode(tokens, skip_special_tokens=True)
    assert "".join(pieces(tokens, SPACED[name])) == whole


@pytest.mark.parametrize("name", SPACED)
def test_a_space_after_a_special_token_stays(name: str) -> None:
    assert pieces([0, SPECIAL, SPECIAL, 1], SPACED[name]) == ["hello", "", "", " world", ""]

"""Text comes out of a stream of ids whole: no half characters, nothing lost, spaces in their places."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxlora.data.chat import load_tokenizer
from jaxlora.data.detokenizer import Detokenizer

TEXT = "Hello  wörld 👩‍👩‍👧 日本語 𝒳 – naïve\n\n\tx = '�'; 🇩🇪 end 你好"


@pytest.fixture(scope="module")
def byte_level():
    """Every id is one byte, so each character beyond ASCII is spread over several ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def test_characters_come_out_whole(byte_level):
    ids = byte_level.encode(TEXT)
    detokenizer = Detokenizer(byte_level)
    pieces = [detokenizer.push(i) for i in ids]
    # a replacement character that is really there is held back until what follows shows that it is one
    assert "".join(pieces) == TEXT
    assert sum(len(piece) for piece in pieces if piece) == len(TEXT)
    assert all(len(piece) <= 1 or "�" in piece for piece in pieces)
    assert detokenizer.end() == ""


def test_an_unfinished_character_comes_at_the_end(byte_level):
    detokenizer = Detokenizer(byte_level)
    pieces = [detokenizer.push(i) for i in byte_level.encode("aé")[:-1]]
    assert pieces == ["a", ""]
    assert detokenizer.end() == "�"


def test_special_tokens_have_no_text_and_change_none(byte_level):
    end = byte_level.convert_tokens_to_ids("<|end|>")
    detokenizer = Detokenizer(byte_level)
    ids = [end, *byte_level.encode("a b"), end, end, *byte_level.encode(" c")]
    assert "".join(detokenizer.push(i) for i in ids) + detokenizer.end() == "a b c"


@pytest.mark.parametrize("name", ["qwen2.5", "mistral-v0.1", "mistral-v0.3"])
def test_real_tokenizers(real, name):
    tokenizer = load_tokenizer(str(real / "tokenizers" / name))
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(i) for i in ids] + [detokenizer.end()]
    assert "".join(pieces) == TEXT
    assert sum(map(bool, pieces)) > 20

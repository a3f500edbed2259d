import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmsleep.text.tokenizers import Bytes, Words, load_tokenizer


@given(st.text())
def test_bytes_are_lossless(text):
    tokens = load_tokenizer("bytes").encode(text)
    assert Bytes().decode(tokens) == text and all(0 <= t < Bytes.vocab_size for t in tokens)


def test_bytes_that_are_no_text_are_shown_as_escapes():
    assert Bytes().decode([97, 0xC3]) == "a\\xc3"


def test_words_are_tokens_and_digits_stand_alone():
    words = Words(["the", "pond", "has", "1", "2", ".", "?"])
    tokens = words.encode("the pond has 12.")
    assert tokens == [0, 1, 2, 3, 4, 5]
    assert words.decode(tokens) == "the pond has 12." and words.vocab_size == 7


def test_a_word_outside_the_list_is_named():
    with pytest.raises(ValueError, match=r"'lake' is not among the 2 words"):
        Words(["the", "pond"]).encode("the lake")
    with pytest.raises(ValueError, match="twice"):
        Words(["a", "a"])


def test_a_folder_of_a_hugging_face_tokenizer(tmp_path):
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of", "layer_types": ["new"]}')
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.vocab_size == 3 and loaded.encode("a b a") == [0, 1, 0]
    assert loaded.decode([0, 1]) == "a b"


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="neither 'bytes' nor a folder"):
        load_tokenizer(str(tmp_path / "missing"))

import base64
import importlib.util
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmsleep.text.tokenizers import Bytes, HuggingFace, Words, begun, check_tokens, load_tokenizer


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


# As the families split digits and words, which the class that their tokenizer_config.json names does not.
END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGITS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + END
MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + END
TEXTS = ("In 2023 there were 650841823 of them.", "हिन्दी में लिखा हुआ पाठ, हिन्दी में", "a\n\n b\t1.50 ")


@pytest.mark.parametrize(
    ("config", "declared", "split"),
    [
        ({"model_type": "granitemoehybrid"}, "GPT2Tokenizer", DIGITS),
        ({"model_type": "olmo_hybrid"}, "GPT2Tokenizer", DIGITS),
        ({"model_type": "qwen3_5"}, "Qwen2Tokenizer", MARKS),
        ({"model_type": "llama"}, "LlamaTokenizer", DIGITS),
        ({"model_type": "falcon_h1"}, "PreTrainedTokenizerFast", MARKS),
        ({"model_type": "unheard-of", "layer_types": ["new"]}, "GPT2TokenizerFast", DIGITS),
        ({"model_type": "ouro"}, None, DIGITS),
        (None, "GPT2Tokenizer", MARKS),
    ],
)
def test_tokens_are_those_of_transformers(config, declared, split, tmp_path):
    made, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": 400, "show_progress": False, "initial_alphabet": letters, "special_tokens": ["<e>"]}
    made.train_from_iterator([*TEXTS * 3, "2023 650 841 823 1 12 123 1234 " * 3], trainers.BpeTrainer(**how))
    made.save(str(tmp_path / "tokenizer.json"))
    told = {"eos_token": "<e>"} | ({} if declared is None else {"tokenizer_class": declared})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    wanted, found = AutoTokenizer.from_pretrained(tmp_path), HuggingFace(tmp_path)
    for text in TEXTS:
        assert found.encode(text) == wanted.encode(text, add_special_tokens=False)
        assert begun(found, text) == wanted(text)["input_ids"]


@pytest.fixture
def kimi(tmp_path):
    # As it is published: ranks of tiktoken, and a class of its own, which transformers reads without it.
    ranks = [*(bytes([i]) for i in range(256)), b"he", b"ll", b" w"]
    lines = [f"{base64.b64encode(piece).decode()} {i}" for i, piece in enumerate(ranks)]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines))
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    added = {str(259 + i): {"content": c, "special": True, **flags} for i, c in enumerate(("[BOS]", "[EOS]"))}
    told = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    own = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**told, "auto_map": own, "added_tokens_decoder": added})
    )
    (tmp_path / "tokenization_kimi.py").write_text("raise SystemExit('was run')")
    (tmp_path / "config.json").write_text('{"model_type": "kimi_linear"}')
    return tmp_path


def test_the_tokenizer_of_kimi_linear_is_read_without_its_code(kimi, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    if importlib.util.find_spec("tiktoken") is None:
        with pytest.raises(ValueError, match="tiktoken"):
            HuggingFace(kimi)
        return
    found = HuggingFace(kimi)
    assert found.encode("hello w") == [256, 257, 111, 258] and found.end == 260 and found.vocab_size == 261


def words(folder, template=None, **special):
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(9)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        names = [word for word in template.split() if word != "$A"]
        made.post_processor = processors.TemplateProcessing(
            template, None, [(w, int(w[1:])) for w in set(names)]
        )
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("template", "begin"),
    [(None, []), ("w1 $A", [1]), ("w1 w2 $A", [1, 2]), ("w1 $A w3", [1]), ("$A w3", [])],
)
def test_a_stream_begins_as_the_tokenizer_begins_a_text(template, begin, tmp_path):
    # A bos_token that the tokenizer does not put there itself begins nothing.
    found = HuggingFace(words(tmp_path, template, bos_token="w1"))
    assert found.begin == begin
    assert begun(found, "w7 w8") == [*begin, 7, 8] and found.encode("w7 w8") == [7, 8]
    assert begun(found, "w1 w2 w8") == [*([] if begin in ([1], [1, 2]) else begin), 1, 2, 8]
    assert begun(found, "") == []


def test_the_beginning_is_found_where_few_words_are_known(tmp_path):
    made = Tokenizer(models.WordLevel({"<s>": 0, "left": 1}))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("<s> $A <s>", None, [("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    assert HuggingFace(tmp_path).begin == [0]


@pytest.mark.parametrize(
    ("files", "ends", "end"),
    [
        ({}, {8}, 8),
        ({"generation_config.json": {"eos_token_id": [7, 5]}}, {8, 7, 5}, 8),
        ({"generation_config.json": {"eos_token_id": 5}, "config.json": {"eos_token_id": 6}}, {8, 5}, 8),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 6}}, {8}, 8),
        ({"config.json": {"eos_token_id": [6, 99]}}, {8, 6, 99}, 8),
        ({"config.json": {"text_config": {"eos_token_id": 6}}}, {8, 6}, 8),
        ({"config.json": {"eos_token_id": -1}}, {8}, 8),
    ],
)
def test_a_text_ends_where_generate_ends_it(files, ends, end, tmp_path):
    words(tmp_path / "words", eos_token="w8")
    words(tmp_path / "endless")
    (tmp_path / "model").mkdir()
    for name, fields in files.items():
        for folder in ("words", "model"):
            (tmp_path / folder / name).write_text(json.dumps(fields))
    found = load_tokenizer(str(tmp_path / "words"))
    assert found.ends == ends and found.end == end
    # Of a model whose tokenizer stands elsewhere, too; and one without an eos_token takes what it knows.
    other = load_tokenizer(str(tmp_path / "endless"), tmp_path / "model")
    assert other.ends == ends - {8} and other.end in ({*ends} - {8, 99} or {None})


@pytest.mark.parametrize("given", ["x", [1, None], 1.5, True, {}])
def test_ends_that_are_none_are_named(given, tmp_path):
    words(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be"):
        HuggingFace(tmp_path)


def test_numbers_of_tokens_may_have_gaps(tmp_path):
    made = Tokenizer(models.WordLevel({"a": 0, "b": 70}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    found = HuggingFace(tmp_path)
    assert found.vocab_size == 71
    check_tokens(torch.tensor([0]), 64, found)
    with pytest.raises(ValueError, match=r"0 \.\.\. 63, got 70: 'b', which this model does not know"):
        check_tokens(torch.tensor([0, 70]), 64, found)


def test_half_of_a_character_is_no_text(tmp_path):
    with pytest.raises(ValueError):
        HuggingFace(words(tmp_path)).encode("\ud83d")

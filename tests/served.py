"""A tiny model that chats, and the real server of it in a process of its own."""

import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import torch
from conftest import lively, tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('the system speaks first') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END = 1.8
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def write_tokenizer(folder):
    # All bytes, a token each, and the marks of a chat.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*SPECIAL, *letters])}
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=SPECIAL[0], chat_template=TEMPLATE
    ).save_pretrained(folder)
    return len(words)


def write_model(folder):
    # Random, but for a direction that all tokens share, and some go by: answers are short if they are drawn,
    # the likeliest tokens go on for long, and both are ASCII, so that their text is the same tokens again.
    size = write_tokenizer(folder)
    model = lively(tiny(vocab_size=size), dtype=torch.float32)
    letters = PreTrainedTokenizerFast.from_pretrained(folder).convert_ids_to_tokens(range(size))
    with torch.no_grad():
        model.embedding.weight[:, 0] = 6.0
        head = model.lm_head.weight
        head *= 2.5
        head[:, 0] = 0.0
        for i, letter in enumerate(letters):
            if not (len(letter) == 1 and "!" <= letter <= "~"):
                head[i] = 0.0
                head[i, 0] = END if i == 0 else -9.0
    model.save_pretrained(folder)


@contextmanager
def serving(model, store, *options):
    # Yields the address of a server, which is ended in the end as an operator would.
    command = [sys.executable, "-m", "lmsleep", "serve", model, "--port", 0, "--store", store, *options]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        try:
            told = re.search(r"at (http://\S+)", process.stdout.readline())
            assert told, "the server told no address"
            yield told[1]
        finally:
            process.terminate()
            assert process.wait(60) in (0, -signal.SIGTERM)

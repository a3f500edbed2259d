import copy
import io
import json
import math
import pickle
import types
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import close, random_tokens
from hf_models import VOCAB, family, held
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lmsleep import Session, SleepConfig, adapt, sleep_forward
from lmsleep.hf import SleepCache, from_pretrained, load_pretrained, sleepify
from lmsleep.hf.cache_name import named
from lmsleep.hf.card import card

L = 5
SLEEP = SleepConfig(window=L, passes=3)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def text(*shape, seed=0):
    return 1 + random_tokens(*shape, seed=seed, vocab=VOCAB - 1)


def sleeping(name="qwen3_5", sleep=SLEEP):
    return sleepify(family(name), sleep)


def padded(x, lengths, side):
    rows, mask = torch.zeros_like(x), torch.zeros_like(x)
    for i, n in enumerate(lengths):
        place = slice(x.shape[1] - n, None) if side == "left" else slice(0, n)
        rows[i, place], mask[i, place] = x[i, :n], 1
    return {"input_ids": rows, "attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "eviction"),
    [("qwen3_5", "hard"), ("kimi_linear", "sliding"), ("bamba", "hard"), ("jet_nemotron", "hard")],
)
def test_greedy_generation_is_that_of_a_session(name, eviction):
    sleep, x = SleepConfig(window=L, passes=3, eviction=eviction), text(1, 2 * L + 3)
    model = sleeping(name, sleep)
    session = Session(adapt(family(name)), sleep)
    wanted = session.generate(x[0], 2 * L)
    options = {"max_new_tokens": 2 * L, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    found = model.generate(x, **options)
    assert found.sequences[0, x.shape[1] :].tolist() == wanted
    assert held(found).sessions[0].stats.sleeps == session.stats.sleeps == 4
    awake = sleeping(name, SleepConfig(window=L, eviction=eviction)).generate(x, **options)
    assert not close(awake.logits[-1], found.logits[-1], 1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_read_as_its_rows_alone(side):
    model, x, lengths = sleeping(), text(3, 13), [13, 6, 4]
    with torch.no_grad():
        both = padded(x, lengths, side)
        labels = both["input_ids"].where(both["attention_mask"].bool(), torch.tensor(-100))
        out = model(**both, labels=labels)
        total = 0.0
        for i, n in enumerate(lengths):
            alone = sleep_forward(model.backbone, x[[i], :n], torch.ones(1, n), SLEEP)
            total += float(alone.loss) * (n - 1)
            assert close(out.logits[[i]][both["attention_mask"][[i]].bool()], alone.logits[0], 1e-5)
        assert math.isclose(float(out.loss), total / (sum(lengths) - 3), rel_tol=1e-5)
        items = model(**both, labels=labels, num_items_in_batch=torch.tensor(40)).loss
        assert math.isclose(float(items), total / 40, rel_tol=1e-5)
        assert float(model(**both, labels=torch.full_like(labels, -100)).loss) == 0


def test_a_text_without_cache_is_that_of_sleep_forward_with_gradients():
    model, x = sleeping().train(), text(2, 3 * L)
    wanted = sleep_forward(model.backbone, x, torch.ones_like(x), SLEEP)
    wanted.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    out = model(x, labels=x)
    out.loss.backward()
    assert torch.equal(out.logits, wanted.logits) and torch.equal(out.loss, wanted.loss)
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters())
    assert held(out) is None
    loss, logits = model(x, labels=x, return_dict=False, logits_to_keep=2)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits[:, -2:])
    model.gradient_checkpointing_enable()
    frugal = model(x, labels=x)
    assert frugal.logits is None and close(frugal.loss, out.loss, 1e-6)
    model.gradient_checkpointing_disable()
    assert model(x, labels=x).logits is not None


def test_prompts_padded_on_the_left_are_answered_as_if_alone():
    model, x, lengths = sleeping(), text(3, 13), [13, 6, 4]
    found = model.generate(**padded(x, lengths, "left"), max_new_tokens=8, **GREEDY)
    for i, n in enumerate(lengths):
        alone = model.generate(x[[i], :n], max_new_tokens=8, **GREEDY)
        assert found[i, 13:].tolist() == alone[0, n:].tolist()
    with pytest.raises(ValueError, match=r"padded on the left \(tokenizer\.padding_side"):
        model.generate(**padded(x, lengths, "right"), max_new_tokens=8, **GREEDY)


def test_a_cache_is_read_on():
    model, x = sleeping(), text(1, 17)
    with torch.no_grad():
        whole = model(x).logits
        first = model(x[:, :6], use_cache=True)
        cache = held(first)
        second = model(x[:, 6:], **named(cache), attention_mask=torch.ones(1, 17))
    assert close(torch.cat([first.logits, second.logits], dim=1), whole, 1e-5)
    assert cache.get_seq_length() == 17 and cache.batch_size == 1
    # What a session has read comes before the prompt.
    session = Session(model.backbone, SLEEP)
    session.read(x[0])
    wanted = session.fork().generate([3, 4], 6)
    found = model.generate(
        torch.tensor([[3, 4]]), **named(model.new_cache([session.fork()])), max_new_tokens=6, **GREEDY
    )
    assert found[0, 2:].tolist() == wanted
    # A conversation: all of it is given, and what the cache has read is not read twice.
    chat = model.generate(x, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    more = torch.cat([chat.sequences, text(1, 3, seed=2)], dim=1)
    went_on = model.generate(more, **named(held(chat)), max_new_tokens=4, **GREEDY)
    assert torch.equal(went_on, model.generate(more, max_new_tokens=4, **GREEDY))


def test_beams_share_no_memory():
    model, x = sleeping(), text(2, 7)
    found = model.generate(
        x, num_beams=3, num_return_sequences=2, max_new_tokens=8, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True, **GREEDY,
    )  # fmt: skip
    for row, score in zip(found.sequences, found.sequences_scores, strict=True):
        session = Session(model.backbone, SLEEP)
        session.read(row[:7])
        assert math.isclose(session.score(row[7:]), float(score), rel_tol=1e-4)
    plain = family("qwen3_5").generate(x, num_beams=3, max_new_tokens=8, **GREEDY)
    awake = sleeping(sleep=SleepConfig()).generate(x, num_beams=3, max_new_tokens=8, **GREEDY)
    assert torch.equal(plain, awake)


def test_drawn_answers_follow_the_seed():
    model, x = sleeping(), text(1, 7)

    def drawn(model, seed):
        transformers.set_seed(seed)
        options = {**GREEDY, "do_sample": True, "num_return_sequences": 3}
        return model.generate(x, max_new_tokens=8, temperature=0.7, top_k=20, **options)

    assert torch.equal(drawn(model, 0), drawn(model, 0)) and not torch.equal(drawn(model, 0), drawn(model, 1))
    awake = sleeping(sleep=SleepConfig())
    assert torch.equal(drawn(awake, 0), drawn(family("qwen3_5"), 0))


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(VOCAB - 3)} | {"<user>": 61, "<model>": 62, "<end>": 63}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <end> ' }}{% endfor %}<model> "
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=template, pad_token="w0", padding_side="left"
    )


def test_chat_templates_and_streamers(tokenizer, capsys):
    model = sleeping()
    chat = [{"role": "user", "content": "w3 w4 w5 w6 w7"}]
    prompt = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == [61, 3, 4, 5, 6, 7, 63, 62]
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    out = model.generate(**prompt, max_new_tokens=7, streamer=streamer, **GREEDY)
    wanted = Session(model.backbone, SLEEP).generate(prompt["input_ids"][0], 7)
    assert out[0, 8:].tolist() == wanted
    assert capsys.readouterr().out.split() == tokenizer.decode(wanted).split()


def test_what_would_go_wrong_is_refused():
    model, x = sleeping(), text(1, 8)
    for message, given in {
        "packed texts would share a memory": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])},
        "labels must be those of input_ids": {"labels": x.flip(1)},
        "labels need a whole text": {"labels": x, "use_cache": True},
        "attention_mask has padding among": {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])},
        r"attention_mask must be \[B, T\]": {"attention_mask": torch.ones(1, 1, 8, 8)},
        "output_hidden_states: a model that sleeps": {"output_hidden_states": True},
        "past_key_values=DynamicCache cannot sleep": named(transformers.DynamicCache()),
        "memory of another model": named(sleeping().new_cache()),
        "input_ids must hold new tokens": {"input_ids": x[:, :0]},
        "attention_mask hides every token": {"attention_mask": torch.zeros(1, 8), "use_cache": True},
        "past_key_values holds 1 rows, input_ids has 2": {
            "input_ids": x.view(2, 4), **named(held(model(x, use_cache=True))),
        },
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": x, **given})
    with pytest.raises(ValueError, match="sessions were read by another model"):
        model.new_cache([Session(adapt(family("qwen3_5")), SLEEP)])
    for speculation in ({"assistant_model": family("qwen3_5")}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(x, max_new_tokens=2, **speculation, **GREEDY)
    cache = held(model(x, use_cache=True))
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="sleepify first"):
        family("qwen3_5")(x, **named(cache))
    with pytest.raises(ValueError, match="wake_passes=2"):
        sleeping(sleep=SleepConfig(window=L, wake_passes=2))
    with pytest.raises(ValueError, match=r"loop=\(0, 9\) reaches outside"):
        sleeping(sleep=SleepConfig(window=L, loop=(0, 9)))


def test_a_saved_model_sleeps_again(tmp_path):
    sleep = SleepConfig(window=L, passes=3, loop=(1, 4), eviction="sliding")
    model, x = sleeping(sleep=sleep), text(1, 9)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["sleep"]["consolidator"]["loop"] == [1, 4] and stored["architectures"] == [
        "Qwen3_5ForCausalLM"
    ]
    again = from_pretrained(tmp_path)
    assert again.sleep == sleep
    assert torch.equal(
        again.generate(x, max_new_tokens=8, **GREEDY), model.generate(x, max_new_tokens=8, **GREEDY)
    )
    assert from_pretrained(tmp_path, SLEEP).sleep == SLEEP
    awake = load_pretrained(tmp_path)  # others see the model that it was
    assert torch.equal(awake(x).logits, family("qwen3_5")(x).logits)
    awake.config.sleep = None
    awake.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no field sleep; pass sleep="):
        from_pretrained(tmp_path)
    awake.config.sleep = {"window": "5"}
    awake.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"field sleep of config\.json is damaged: window must be int \| None, got '5'"
    ):
        from_pretrained(tmp_path)


def test_copies_sleep_too():
    model, x = sleeping(), text(1, 9)
    other = copy.deepcopy(model)
    assert other.backbone.model is other and torch.equal(other(x).logits, model(x).logits)
    assert isinstance(other.new_cache(), SleepCache)


def test_memories_of_a_saved_model_are_those_of_the_model(tmp_path):
    model = adapt(family("olmo_hybrid"))
    session = Session(model, SLEEP)
    session.read(text(12))
    session.save(tmp_path / "a.mem")
    saved = sleeping("olmo_hybrid")
    saved.config.use_cache = False  # as Trainer leaves it
    saved.save_pretrained(tmp_path / "model")
    again = Session.load(tmp_path / "a.mem", from_pretrained(tmp_path / "model").backbone)
    assert torch.equal(again.logits([3, 4]), session.logits([3, 4]))


def test_a_model_card_is_written_beside_the_model(tmp_path):
    source = tmp_path / "models--Org--Tiny-1B" / "snapshots" / "0"
    family("qwen3_5").save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Tiny\n")
    model = sleepify(load_pretrained(source), SleepConfig(window=L, passes=3, loop="middle"))
    out = tmp_path / "out"
    model.save_pretrained(out)
    found = ModelCard.load(out / "README.md", ignore_metadata_errors=False)
    assert found.data.license == "mit" and found.data.base_model == "Org/Tiny-1B"
    assert found.data.pipeline_tag == "text-generation" and "lmsleep" in found.data.tags
    assert all(x in found.text for x in ("windows of 5 tokens", "the middle half", "| `passes` | `3` |"))
    sleepify(model, SLEEP).save_pretrained(out)  # its own card is renewed
    assert "all blocks" in (out / "README.md").read_text()
    assert "clears its key-value cache" in (out / "README.md").read_text()
    sleepify(model, replace(SLEEP, eviction="sliding")).save_pretrained(out)
    assert f"keeps keys and values of {L - 1} tokens" in (out / "README.md").read_text()
    (out / "README.md").write_text("mine")
    model.save_pretrained(out)
    assert (out / "README.md").read_text() == "mine"


def test_the_card_of_jet_nemotron_says_that_its_weights_are_not_for_commerce():
    config = transformers.PretrainedConfig()
    config.model_type = "jet_nemotron"
    text = card(config, SLEEP)
    assert ModelCard(text).data.license == "other" and "research and evaluation only" in text


def head_over_the_decoder(self, input_ids, labels=None, use_cache=None, **kwargs):
    # As trl's trainers and Liger do it, past the forward of the model.
    hidden = self.base_model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
    logits = self.get_output_embeddings()(hidden)
    loss = None
    if labels is not None:
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize("name", ["qwen3_5", "olmo_hybrid", "jet_nemotron", "llama_with_jet"])
def test_a_forward_put_over_the_models_trains_a_model_that_sleeps(name):
    model, x = sleeping(name), text(2, 2 * L + 3)
    wanted = model(x, labels=x)
    wanted.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.forward = types.MethodType(head_over_the_decoder, model)
    for frugal in (False, True):
        if frugal:
            model.train().gradient_checkpointing_enable()
        out = model(x, labels=x)
        out.loss.backward()
        assert close(out.logits, wanted.logits, 1e-6) and close(out.loss, wanted.loss, 1e-6)
        assert all(close(p.grad, gradients[n], 1e-4) for n, p in model.named_parameters() if n in gradients)
        model.zero_grad()
    sleepify(model, SleepConfig())  # with another sleep, and the forward still over it
    assert not close(model(x, labels=x).logits, wanted.logits, 1e-3)


def test_what_is_called_past_the_model_sleeps_or_is_refused():
    model, x = sleeping(), padded(text(3, 13), [13, 6, 4], "left")
    wanted, rows = model(**x).logits, x["attention_mask"].bool()
    for decoder in (model.model, model.base_model, model.get_decoder()):
        for found in (decoder(**x).last_hidden_state, decoder.forward(**x, return_dict=False)[0]):
            assert close(model.lm_head(found)[rows], wanted[rows], 1e-6)
    own = type(family("qwen3_5")).forward  # of the class, as some put it back
    assert close(own(model, **x, use_cache=False).logits[rows], wanted[rows], 1e-6)
    for given in ({"use_cache": True}, {"inputs_embeds": x}, {"output_hidden_states": True}):
        with pytest.raises(ValueError, match="reads input_ids alone"):
            model.model(**x, **given)
    ids = x["input_ids"]
    with pytest.raises(ValueError, match="packed texts"):
        model.model(ids, position_ids=torch.arange(13) % 7)
    # Who brings a decoder of his own runs its blocks, which would be awake.
    plain = type(family("qwen3_5").model).forward
    model.model.forward = types.MethodType(plain, model.model)
    model.forward = types.MethodType(own, model)
    with pytest.raises(ValueError, match="calls the blocks of a model that sleeps past its forward"):
        model(ids)
    for patched in ("forward", "model.forward"):
        other = family("qwen3_5")
        place = other.model if "." in patched else other
        place.forward = types.MethodType(type(place).forward, place)
        with pytest.raises(ValueError, match=r"has put a forward over that of Qwen3_5.*; sleepify the model"):
            sleepify(other, SLEEP)
    with pytest.raises(ValueError, match="sleep_on_loss=False"):
        sleeping(sleep=replace(SLEEP, sleep_on_loss=False)).model(ids)


def test_a_class_that_is_patched_still_sleeps(monkeypatch):
    before, x = sleeping(), text(1, 13)
    wanted = before(x).logits
    monkeypatch.setattr(transformers.Qwen3_5ForCausalLM, "forward", head_over_the_decoder)
    assert torch.equal(before(x).logits, wanted) and torch.equal(sleeping()(x).logits, wanted)


def test_a_model_that_sleeps_is_adapted_already():
    model = sleeping()
    assert adapt(model) is model.backbone


def replicas(module):
    # What `nn.DataParallel` makes on another device: copies of the modules, with weights of their own.
    made = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for m, replica in made.items():
        for name, child in m._modules.items():
            replica._modules[name] = None if child is None else made[child]
        for name, p in m._parameters.items():
            setattr(replica, name, None if p is None else p.detach() * 0.5)
    return made[module]


def test_a_replica_reads_with_its_own_weights():
    model, x = sleeping(), text(1, 13)
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for p in {id(p): p for p in halved.parameters()}.values():
            p.mul_(0.5)
    replica, wanted = replicas(model), halved(x).logits
    assert torch.equal(replica(x).logits, wanted) and not torch.equal(model(x).logits, wanted)
    assert torch.equal(replica.model(x).last_hidden_state, halved.model(x).last_hidden_state)


@pytest.mark.parametrize("name", ["qwen3_5", "llama_with_jet"])
def test_a_pickled_model_sleeps_again(name):
    model, x = sleeping(name), text(1, 13)
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(held, weights_only=False)):
        assert type(other) is type(model) and other.backbone.model is other
        assert torch.equal(other(x).logits, model(x).logits)
        assert torch.equal(other.model(x).last_hidden_state, model.model(x).last_hidden_state)


def test_inputs_of_other_shapes_are_named():
    model, x = sleeping(), text(2, 8)
    logits = model(x).logits
    for places in (torch.tensor([0, 5]), torch.tensor([-1])):
        assert torch.equal(model(x, logits_to_keep=places).logits, logits[:, places])
        assert close(model(x, logits_to_keep=places, use_cache=True).logits, logits[:, places], 1e-5)
    assert model(x, logits_to_keep=99, use_cache=True).logits.shape == logits.shape
    for message, given in {
        "logits_to_keep=-2 must be": {"logits_to_keep": -2},
        r"labels must be \[2, 8\].*got \[2, 4\]": {"labels": x[:, :4]},
        r"position_ids must be .*got \[1, 4\]": {"position_ids": torch.arange(4)[None]},
        r"attention_mask must be .*got dict": {"attention_mask": {}},
        r"attention_mask must be .*got \[2, 12\]": {"attention_mask": torch.ones(2, 12)},
        "input_ids must hold new tokens": {"input_ids": x[:0]},
        "inputs_embeds: a model": {"inputs_embeds": torch.ones(2, 8, 32)},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": x, **given})


def test_options_of_generate_work_or_are_named():
    model, x = sleeping(), text(1, 8)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = {"tokenizer": transformers.PreTrainedTokenizerFast(tokenizer_object=made)}
    plain = model.generate(x, max_new_tokens=4, **GREEDY)
    stop = letters[int(plain[0, 9])]
    stopped = model.generate(x, max_new_tokens=4, stop_strings=[stop], **words, **GREEDY)
    assert torch.equal(stopped, plain[:, :10])
    for same in (
        {"max_time": 60.0}, {"prefill_chunk_size": 3}, {"logits_to_keep": 1}, words, {"use_cache": False},
        {"synced_gpus": False}, {"renormalize_logits": True}, {"min_new_tokens": 2}, {"logits_processor": []},
        {"position_ids": torch.arange(8)[None]},
    ):  # fmt: skip
        found = model.generate(x, max_new_tokens=4, **same, **GREEDY)
        assert torch.equal(found, plain) or same == {"use_cache": False}
    model.generation_config.cache_implementation = "static"  # what a folder says of a plain cache
    assert torch.equal(sleepify(model, SLEEP).generate(x, max_new_tokens=4, **GREEDY), plain)
    for message, given in {
        "cache_implementation='static': a model that sleeps": {"cache_implementation": "static"},
        "output_hidden_states: a model that": {"output_hidden_states": True},
        "inputs_embeds": {"inputs_embeds": torch.ones(1, 8, 32)},
        "not used by the model": {"typo": 1},
    }.items():
        with pytest.raises(ValueError, match=message):
            model.generate(**{"inputs": x, **given}, max_new_tokens=2, **GREEDY)


@pytest.mark.parametrize("way", [{}, {"use_cache": False}, {"do_sample": True}, {"num_beams": 2}])
def test_nothing_is_written_from_no_prompt_or_from_nan(way):
    model, x = sleeping(), text(2, 8)
    options = {"max_new_tokens": 2, **GREEDY, **way}
    mask = torch.ones_like(x)
    mask[1] = 0
    with pytest.raises(ValueError, match=r"attention_mask (hides the whole|ends with padding)"):
        model.generate(x, attention_mask=mask, **options)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"logits of row 0, 1.* are NaN, so no token can be drawn"):
        model.generate(x, **options)
    assert model.generate(x, remove_invalid_values=True, **options).shape == (2, 10)  # as was asked for

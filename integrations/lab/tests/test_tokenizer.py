import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tokenweights_lab.policy import load_tokenizer
from tokenweights_lab.task import corpus_line
from tokenweights_lab.tokenizer import ALPHABET, VOCABULARY, character_tokenizer

TOKENIZER = character_tokenizer()


@given(st.text(ALPHABET, max_size=60))
def test_text_survives_a_round_trip(text):
    ids = TOKENIZER(text).input_ids
    assert len(ids) == len(text)
    assert [VOCABULARY[i] for i in ids] == list(text)
    assert TOKENIZER.decode(ids) == text


@given(st.integers(0, 10**6))
def test_the_alphabet_covers_the_corpus(index):
    line = corpus_line(0, index, terms=(3, 14), style="mixed")
    assert set(line.prompt + line.completion) <= set(ALPHABET)


def test_special_tokens():
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (0, 1)
    assert TOKENIZER.bos_token_id is None
    ids = [0, 0, *TOKENIZER("a-0").input_ids, 1]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "a-0"


def test_padding_is_on_the_left():
    batch = TOKENIZER(["a", "abc"], padding=True)
    assert batch["input_ids"][0][:2] == [0, 0]
    assert batch["attention_mask"][0] == [0, 0, 1]


@pytest.mark.parametrize("text", ["A", "a b", "a\nb", "é", "<"])
def test_other_characters_are_refused(text):
    with pytest.raises(Exception, match="UNK"):
        TOKENIZER(text)


def test_saved_and_loaded_tokenizers_agree(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    text = "".join(ALPHABET)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer()):
        assert loaded(text).input_ids == TOKENIZER(text).input_ids
        assert loaded.decode(loaded(text).input_ids) == text
        assert loaded.padding_side == "left"
        assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
        assert len(loaded) == len(VOCABULARY)


def test_chat_template_is_the_plain_text():
    messages = [{"role": "user", "content": "a-0?1>"}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "a-0?1>"

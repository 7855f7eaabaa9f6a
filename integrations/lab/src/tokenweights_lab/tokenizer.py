r"""A tokenizer of one token per character, built in code.

Its alphabet is the task's: lower-case letters, digits and `+-?>=\{}`. Any other character is an
error, so no text is changed on the way in.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789+-?>=\\{}"
PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
VOCABULARY = (PAD_TOKEN, EOS_TOKEN, *ALPHABET)

# Trainers that insist on chat messages see the plain contents, one after another.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the lab: one token per character, left-padded, with `<pad>` and `<eos>`.

    Returns:
        A fast tokenizer of 46 tokens. It adds no special tokens by itself.

    Example:
        >>> tokenizer = character_tokenizer()
        >>> tokenizer("a-0?6>").input_ids
        [2, 39, 28, 40, 34, 41]
        >>> tokenizer.decode(tokenizer("a-0?6>").input_ids)
        'a-0?6>'
    """
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )

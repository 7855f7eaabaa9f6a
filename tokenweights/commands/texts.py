"""Prompt and response of a command: from files, under a chat template, or by the model itself."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from tokenweights._errors import invalid
from tokenweights._hints import shown

LONGEST = 512  # tokens that a model generates unless told otherwise
TEMPERATURES = (1e-6, 1e6)  # logits that are divided by one of these stay finite in float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds where prompt and response come from."""
    response = parser.add_mutually_exclusive_group(required=True)
    response.add_argument(
        "--text",
        metavar="FILE",
        help="the response, as UTF-8 text; - for stdin. The newline that ends a file is no part",
    )
    response.add_argument(
        "--generate",
        metavar="TOKENS",
        type=int,
        nargs="?",
        const=LONGEST,
        help=f"the model answers the prompt itself, with so many tokens at most ({LONGEST})",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="FILE", help="the prompt, as UTF-8 text")
    prompt.add_argument(
        "--split",
        metavar="MARK",
        help="FILE holds prompt and response; the prompt ends with the first MARK",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is what a user says, under the tokenizer's chat template",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="of --generate; 0, the default, takes the likeliest token each time",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of --generate (default: 0)")


def given_texts(options: argparse.Namespace) -> tuple[str, str | None]:
    """Prompt and response as they were given, without any model; None is to be generated.

    Raises:
        TokenWeightsError: If a text is missing or cannot be read, or an option of `--generate` is
            out of range.
    """
    _require_sampling(options)
    if options.text is None:
        if options.prompt is None:
            hint = "Pass `--prompt FILE`."
            raise invalid("inspect", "--generate", "with a prompt to answer", "none", hint)
        return _read("--prompt", options.prompt), None
    text = _read("--text", options.text)
    if options.split is None:
        if options.chat and options.prompt is None:
            hint = "Pass `--prompt FILE`, or `--split MARK`."
            raise invalid("inspect", "--chat", "with a prompt", "none", hint)
        return ("" if options.prompt is None else _read("--prompt", options.prompt)), text
    # An empty mark splits nothing, and Python refuses to try.
    before, mark, response = text.partition(options.split) if options.split else (text, "", "")
    if not mark:
        hint = "Pass a MARK that the text contains."
        raise invalid("inspect", "--split", "that occurs in the text", shown(options.split), hint)
    return before + mark, response


def token_ids(
    options: argparse.Namespace,
    prompt: str,
    response: str | None,
    *,
    model: Any,
    tokenizer: Any,
) -> tuple[list[int], Any]:
    """Prompt and response apart, as in training, so that no token lies across the border.

    Without a prompt the first token stands in for one: something has to decide the second.
    """
    if options.chat:
        prompt = _chat(tokenizer, prompt)
    if response is None:
        first = _ids(tokenizer, prompt, starts=True)
        rest = _generated(options, model, tokenizer, first) if first else []
    elif prompt:
        first = _ids(tokenizer, prompt, starts=True)
        rest = _ids(tokenizer, response, starts=False)
    else:
        ids = _ids(tokenizer, response, starts=True)
        first, rest = ids[:1], ids[1:]
    if not first or not rest:
        got = f"{len(first)} prompt and {len(rest)} response tokens"
        hint = "Pass a longer text."
        raise invalid("inspect", "text", "with a token to decide and one before it", got, hint)
    return first, rest


def _require_sampling(options: argparse.Namespace) -> None:
    if options.generate is not None and options.generate < 1:
        hint = f"Leave the number out for {LONGEST} tokens."
        raise invalid("inspect", "--generate", ">= 1", options.generate, hint)
    least, most = TEMPERATURES
    if options.temperature != 0 and not least <= options.temperature <= most:  # NaN included
        condition = f"0 or in [{least:g}, {most:g}]"
        hint = "0 takes the likeliest token each time."
        raise invalid("inspect", "--temperature", condition, options.temperature, hint)
    if not -(2**63) <= options.seed < 2**64:
        hint = "Pass a smaller number."
        condition = "in [-2**63, 2**64 - 1]"
        raise invalid("inspect", "--seed", condition, shown(options.seed), hint)


def _read(option: str, path: str) -> str:
    stdin = option == "--text" and path == "-"
    try:
        # By number: Python's own stream of it has an encoding of its own, or is missing.
        with open(0 if stdin else path, encoding="utf-8", closefd=not stdin) as file:
            return _without_last_newline(file.read())
    except UnicodeDecodeError as error:
        hint = "Convert the file to UTF-8."
        raise invalid("inspect", option, "to be UTF-8", f"{path}: {error}", hint) from error
    except OSError as error:
        hint = "Pass the path of a file in UTF-8."
        got = f"{path}: {error.strerror or error}"
        raise invalid("inspect", option, "a text file", got, hint) from error


def _without_last_newline(text: str) -> str:
    """Editors end a file with a newline that nobody meant to be scored."""
    return text.removesuffix("\n").removesuffix("\r")


def _chat(tokenizer: Any, prompt: str) -> str:
    if tokenizer.chat_template is None:
        hint = "Leave `--chat` out: this model is no chat model."
        raise invalid("inspect", "--chat", "with a chat template", "none", hint)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _ids(tokenizer: Any, text: str, *, starts: bool) -> list[int]:
    """Tokens of a text; where it starts a sequence, with what the tokenizer puts there, once."""
    try:
        ids = tokenizer(text, add_special_tokens=starts)["input_ids"]
    except Exception as error:  # of the tokenizer's own kind, for a character it does not have
        unknown = sorted({character for character in text if not _known(tokenizer, character)})
        got = f"{', '.join(map(repr, unknown))} ({error})" if unknown else str(error)
        hint = "This tokenizer has no token for it."
        raise invalid("inspect", "text", "of the tokenizer's characters", got, hint) from error
    first = tokenizer.bos_token_id
    if starts and first is not None and ids[:2] == [first, first]:
        ids = ids[1:]  # a template, or a pasted one, has brought its own
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        print(f"note   {ids.count(unknown)} unknown tokens", file=sys.stderr)
    return ids


def _known(tokenizer: Any, character: str) -> bool:
    try:
        tokenizer(character)
    except Exception:
        return False
    return True


def _generated(
    options: argparse.Namespace, model: Any, tokenizer: Any, first: Sequence[int]
) -> list[int]:
    drawn = options.temperature > 0
    sampling = {"temperature": options.temperature, "top_k": 0, "top_p": 1.0} if drawn else {}
    ids = torch.tensor([[*first]], device=model.device)
    torch.manual_seed(options.seed)
    padding = tokenizer.pad_token_id
    with torch.no_grad():
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.generate,
            do_sample=drawn,
            pad_token_id=tokenizer.eos_token_id if padding is None else padding,
            **sampling,
        )
    return whole[0, len(first) :].tolist()

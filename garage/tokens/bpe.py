"""Train a byte-level BPE tokenizer and write it as a Hub directory that transformers loads and encodes with identically.

What: words, runs of punctuation and white space are split as GPT-2 does; digits one by one, so that arithmetic sees places; any byte can be
encoded. Special tokens come first, so their ids do not depend on the text.
Why so: the `tokenizers` trainer is exact and fast; the same texts in the same order always give the same file.
Limits: fewer merges than asked for when the texts are too small. Source: Sennrich et al. 2016; byte alphabet of GPT-2.
"""

import json
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from garage.core.errors import UserError
from garage.tokens.chat import template_of
from garage.tokens.tokenizer import Tokenizer

SPECIALS = {"chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            "gemma3": ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")}
_ROLES = {"chatml": ("", "<|im_end|>", "<|endoftext|>"), "qwen3": ("", "<|im_end|>", "<|endoftext|>"), "gemma3": ("<bos>", "<eos>", "<pad>")}


def train_bpe(texts: Iterable[str], *, vocab_size: int, specials: Sequence[str] = (), tags: Sequence[str] = (), family: str = "chatml",
              context: int = 2048) -> Tokenizer:
    """A tokenizer with at most `vocab_size` tokens for the chat template of `family`.

    `specials` are further control tokens: never read from a message, not shown when decoding. `tags` (<think>, </think>) are single tokens
    too, but ordinary text: read from messages and shown.

    Raises:
        UserError: `vocab_size` has no room for the 256 bytes and the special tokens, or the family is unknown.
    """
    if family not in SPECIALS:
        raise UserError(f"there is no chat template {family!r}", remedy=f"choose one of {', '.join(SPECIALS)}")
    all_specials = list(dict.fromkeys([*SPECIALS[family], *specials]))
    least = 256 + len(all_specials) + len(tags)
    if vocab_size < least:
        raise UserError(f"a vocabulary of {vocab_size} cannot hold 256 bytes and {least - 256} special tokens", remedy=f"set vocab_size to {least} or more")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(tags), special_tokens=all_specials, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return Tokenizer(new_tokenizer_files(backend.to_str(), family, context), where="the trained tokenizer")


def new_tokenizer_files(tokenizer_json: str, family: str, context: int) -> dict[str, bytes]:
    """The files of a Hub tokenizer directory, by name. BOS is written by the template, never by the tokenizer."""
    bos, eos, pad = _ROLES[family]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos or None, "eos_token": eos, "pad_token": pad, "unk_token": None,
              "add_bos_token": False, "clean_up_tokenization_spaces": False, "model_max_length": context}
    return {"tokenizer.json": tokenizer_json.encode(), "tokenizer_config.json": json.dumps(config, indent=1).encode(),
            "chat_template.jinja": template_of(family).encode()}

"""Train a byte-level BPE tokenizer as a Hub directory that transformers loads and encodes with identically.

What: text is split by Qwen 2's pattern, which GGUF readers know by the name in `PRE`; digits stand one by one, so that arithmetic sees
places; any byte can be encoded. Special tokens come first, so their ids do not depend on the text. The same texts give the same file.
Why so: this pattern keeps line breaks together whatever follows; GPT-2's does not, and then a prompt is no prefix of prompt and answer.
Limits: fewer merges than asked for when the texts are too small. Source: Sennrich et al. 2016; byte alphabet of GPT-2.
"""

import json
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from garage.core.errors import UserError
from garage.tokens.chat import template_of
from garage.tokens.tokenizer import Tokenizer

PRE = "qwen2"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# special tokens per family, by id: for ChatML pad, start, eos; for Gemma pad, eos, bos, start, end
SPECIALS = {"chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            "gemma3": ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")}


def train_bpe(texts: Iterable[str], *, vocab_size: int, specials: Sequence[str] = (), tags: Sequence[str] = (), family: str = "chatml",
              context: int = 2048) -> Tokenizer:
    """A tokenizer with at most `vocab_size` tokens and the chat template of `family`.

    `specials` are further control tokens: never read from a message, not shown when decoding. `tags` (<think>, </think>) are single
    tokens too, but ordinary text. Raises UserError for an unknown family and a `vocab_size` too small for bytes and special tokens.
    """
    if family not in SPECIALS:
        raise UserError(f"there is no chat template {family!r}", remedy=f"choose one of {', '.join(SPECIALS)}")
    controls = list(dict.fromkeys([*SPECIALS[family], *specials]))
    if vocab_size < (least := 256 + len(controls) + len(tags)):
        raise UserError(f"a vocabulary of {vocab_size} cannot hold 256 bytes and {least - 256} special tokens",
                        remedy=f"set vocab_size to {least} or more")
    backend = Backend(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_WORDS), "isolated"), bytes_only])
    backend.decoder, backend.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(tags), special_tokens=controls,
                                  initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return Tokenizer(new_tokenizer_files(backend.to_str(), family, context), where="the trained tokenizer")


def new_tokenizer_files(tokenizer_json: str, family: str, context: int) -> dict[str, bytes]:
    """The files of a Hub tokenizer directory, by name. BOS is written by the template, never by the tokenizer."""
    pad, eos, bos = ("<pad>", "<eos>", "<bos>") if family == "gemma3" else ("<|endoftext|>", "<|im_end|>", None)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": None,
              "add_bos_token": False, "clean_up_tokenization_spaces": False, "model_max_length": context}
    return {"tokenizer.json": tokenizer_json.encode(), "tokenizer_config.json": json.dumps(config, indent=1).encode(),
            "chat_template.jinja": template_of(family).encode()}

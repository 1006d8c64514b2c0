"""Bytes as tokens: a tokenizer that needs no training and loses nothing."""

from __future__ import annotations

END_OF_TEXT = 256
PAD = 257
VOCAB_SIZE = 258


def _printable_bytes() -> list[str]:
    """The 256 stand-in characters of byte-level BPE, in the order of the bytes they stand for."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in kept}
    others = (byte for byte in range(256) if byte not in names)
    names.update({byte: chr(256 + rank) for rank, byte in enumerate(others)})
    return [names[byte] for byte in range(256)]


def byte_tokenizer():
    """Make a fast tokenizer in which token number = byte value.

    Returns a `transformers.PreTrainedTokenizerFast` with 258 tokens: 0..255 the bytes of UTF-8,
    256 `<|endoftext|>`, 257 `<|pad|>`. It saves and loads like any other and pads on the left,
    as generation needs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {name: byte for byte, name in enumerate(_printable_bytes())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    assert fast.eos_token_id == END_OF_TEXT and fast.pad_token_id == PAD
    return fast

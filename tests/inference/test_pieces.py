"""Pieces of text: whatever the tokenizer, they join to the text, and a long answer costs what its tokens cost."""

import random

import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from renyi.inference.pieces import Pieces
from renyi.zoo import load_base

TEXTS = [
    "Hello, world! it 's  a 'test' .",
    "naïve café – 你好世界 👩‍👩‍👧 ok\n\n  indented\ttab",
    " a ' b n't ?! . ,",
    "مرحبا по-русски नमस्ते",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen: a token may be a part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL.values()], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL, clean_up_tokenization_spaces=True)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma: a text's first space is dropped, and what is no word is bytes."""
    words = ["▁", "▁Hello", "▁wor", "ld", "▁a", "▁b", "▁café", *"abcdefghijklmnopqrstuvwxyz.,!"]
    tokens = ["<unk>", *SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **SPECIAL)


def spelled(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """A text of a sentencepiece tokenizer, letter by letter, and byte by byte where it has no such letter."""
    vocabulary = tokenizer.get_vocab()
    tokens = [[c] if c in vocabulary else [f"<0x{b:02X}>" for b in c.encode()] for c in text.replace(" ", "▁")]
    return [vocabulary[token] for of_character in tokens for token in of_character]


def joined(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    pieces = Pieces(tokenizer)
    text = "".join([*map(pieces.add, ids), pieces.finish()])
    assert text == pieces.text
    return text


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_text_join_to_it(text: str) -> None:
    byte_level_ids = byte_level()(f"<s>{text}</s>")["input_ids"]
    assert joined(byte_level(), byte_level_ids) == text
    tokenizer = sentencepiece()
    ids = [tokenizer.bos_token_id, *spelled(tokenizer, text), tokenizer.eos_token_id]
    assert joined(tokenizer, ids) == text.removeprefix(" ") == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_pieces_of_any_tokens_join_to_their_text() -> None:
    """Also of tokens that no text has: lone parts of characters, and special tokens anywhere."""
    draw = random.Random(0)
    words = range(3 + 256, len(sentencepiece()))  # a decoder that falls back to bytes rewrites bytes that are no text
    drawn_from = [(byte_level(), range(400)), (tiny_tokenizer(), range(64)), (load_base()[1], range(200))]
    for tokenizer, ids in [*drawn_from, (sentencepiece(), [0, 1, 2, *words])]:
        for _ in range(300):
            tokens = [draw.choice(ids) for _ in range(draw.randrange(1, 50))]
            whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert joined(tokenizer, tokens) == whole


def test_no_piece_is_half_a_character() -> None:
    tokenizer = sentencepiece()
    pieces = Pieces(tokenizer)
    ids = spelled(tokenizer, "a好!")
    assert [pieces.add(token) for token in ids] == ["a", "", "", "好", "!"]
    assert [pieces.add(token) for token in ids[1:3]] == ["", ""]
    assert pieces.finish() == "\N{REPLACEMENT CHARACTER}" * 2  # a character that was never completed


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_work_grows_with_the_tokens_and_not_with_their_square(make) -> None:
    """Counted in decoded tokens, which no busy machine changes; special tokens and broken bytes are no exception."""
    tokenizer = make()
    byte = tokenizer.get_vocab().get("<0x80>", tokenizer.get_vocab().get("Ģ"))
    draw = random.Random(1)
    for ids in ([draw.randrange(len(tokenizer)) for _ in range(2000)], [byte] * 2000, [tokenizer.eos_token_id] * 2000):
        work = 0

        class Counted:
            all_special_ids = tokenizer.all_special_ids
            added_tokens_decoder = tokenizer.added_tokens_decoder

            def decode(self, ids, **settings):
                nonlocal work
                work += len(ids)
                return tokenizer.decode(ids, **settings)

        pieces = Pieces(Counted())  # type: ignore[arg-type]
        for token in ids:
            pieces.add(token)
        assert work <= 70 * len(ids)

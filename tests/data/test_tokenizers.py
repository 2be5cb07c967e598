"""Padding, beginnings and ends of text: chosen without harm to any text, and one of each."""

from pathlib import Path

import pytest
from bytewise import TEMPLATE, byte_tokenizer
from datasets import Dataset
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from renyi import data
from renyi.errors import DataError, TokenizerError

STORIES = Path(__file__).parents[3] / "shared" / "models" / "tinystories-656k"
TEXTS = ["Pad the <pad> wound, padded.", "A <|im_end|> within.", "unk <unk> [PAD] <|endoftext|>", "  two\n\nlines "]


@pytest.mark.parametrize(
    ("special", "own", "chosen"),
    [
        (["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"], None, "<|finetune_right_pad_id|>"),
        (["<|x|>", "<|reserved_special_token_0|>"], None, "<|reserved_special_token_0|>"),
        (["<|x|>", "<unused1>"], "<eos>", "<unused1>"),
        (["<unk>", "[PAD]"], None, "[PAD]"),
        (["<unk>"], "<eos>", "<unk>"),
        (["<|im_start|>", "<|launchpad_x|>"], None, "<eos>"),  # nothing to spare: pad is a word of its own
        (["<|x|>"], "<|x|>", "<|x|>"),  # its own is kept
    ],
)
def test_a_special_token_pads_and_no_text_changes(
    special: list[str], own: str | None, chosen: str, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(["<eos>", *special], pad_token=own)
    before, size = {text: tokenizer(text)["input_ids"] for text in TEXTS}, len(tokenizer)
    data.settle_padding(tokenizer)
    assert tokenizer.pad_token == chosen
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.pad_token, len(again)) == (chosen, size)
    assert {text: again(text)["input_ids"] for text in TEXTS} == before
    told = data.told_tokenizer(tokenizer).get("padding", "")
    assert (chosen in told) == (own != chosen)


def test_an_ordinary_word_is_no_padding() -> None:
    """Made special, it would be cut out of every text that holds it."""
    tokenizer = byte_tokenizer(["<eos>", "<unk>"], pad_token=None)
    with pytest.raises(TokenizerError, match="'P' is a word like any other"):
        data.settle_padding(tokenizer, "P")
    with pytest.raises(TokenizerError, match="'<hole>' is not in the vocabulary"):
        data.settle_padding(tokenizer, "<hole>")
    data.settle_padding(tokenizer, "<eos>")  # on purpose
    assert tokenizer.pad_token == "<eos>"


def test_padding_by_the_end_of_text_is_masked_by_length() -> None:
    """The end of text is trained and seen though it pads, too."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = byte_tokenizer(["<eos>"], pad_token=None)
    data.settle_padding(tokenizer)
    rows = data.prepare(Dataset.from_dict({"text": ["a", "abc"]}), tokenizer, data.Preparation())
    batch = DataCollatorForLanguageModeling(tokenizer.pad_token_id)(list(rows))
    end = tokenizer.eos_token_id
    assert batch["labels"][0].tolist() == [*rows[0]["input_ids"], -100, -100]
    assert batch["labels"][0, 1] == end
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


# Beginnings and ends


def with_added(begin: bool, end: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that adds the beginning or the end of text by itself, as Gemma's and Llama's do."""
    tokenizer = byte_tokenizer(bos_token="<bos>")
    single = f"{'<bos> ' * begin}$A{' <eos>' * end}"
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("written", ["abc", "<bos>abc", "abc<eos>", "<bos>abc<eos>", "<bos>"])
def test_a_text_begins_and_ends_once(begin: bool, end: bool, written: str) -> None:
    tokenizer = with_added(begin, end)
    [row] = data.prepare(Dataset.from_dict({"text": [written + "x"]}), tokenizer, data.Preparation())
    whole = tokenizer.decode(row["input_ids"])
    begins = begin or written.startswith("<bos>")
    assert whole == f"{'<bos>' * begins}{written.removeprefix('<bos>')}x<eos>"
    alone = tokenizer.decode(data.prompt_tokens(written, tokenizer, "prompt"))
    assert alone.count("<bos>") == begins
    assert alone.count("<eos>") == (end or written.endswith("<eos>"))
    pair = {"prompt": written, "completion": "x"}
    [row] = data.prepare(Dataset.from_list([pair]), tokenizer, data.Preparation())
    assert tokenizer.decode(row["input_ids"]).count("<bos>") == begins
    pair = {"prompt": written, "chosen": "x", "rejected": "y"}
    [row] = data.prepare_pairs(Dataset.from_list([pair]), tokenizer, data.PairPreparation())
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]).count("<bos>") == begins


def test_a_template_writes_the_beginning_of_text_itself() -> None:
    tokenizer = with_added(True, False)
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    [row] = data.prepare(Dataset.from_list([{"messages": messages}]), tokenizer, data.Preparation())
    assert tokenizer.decode(row["input_ids"]) == "<bos>[user]a<end>[assistant]b<end>"
    # The same, rendered already, as a row of text and as a prompt.
    text = "<bos>[user]a<end>[assistant]"
    assert data.text_tokens(tokenizer, text) == data.prompt_tokens(messages[:1], tokenizer, "prompt")


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TEMPLATE, ["<eos>", "<end>"]),
        (TEMPLATE.replace("<end>", "<eos>"), ["<eos>"]),
        (TEMPLATE.replace("<end>", "\n"), ["<eos>"]),
        (TEMPLATE.replace("<end>", " <end>\n<eos>"), ["<eos>", "<end>"]),
        (TEMPLATE.replace("<end>", "<|unheard_of|>"), ["<eos>"]),
        ("{{ raise_exception('no') }}", ["<eos>"]),
        (None, ["<eos>"]),
    ],
)
def test_generation_stops_at_the_end_of_a_turn(template: str | None, ends: list[str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert tokenizer.convert_ids_to_tokens(data.end_tokens(tokenizer)) == ends
    told = data.told_tokenizer(tokenizer).get("end of turn", "")
    assert ("a turn ends with <end>, a text with <eos>" in told) == (len(ends) > 1)
    assert ("may not learn to stop" in told) == (template is not None and ("\n{%" in template or "unheard" in template))


@pytest.mark.parametrize("marks_end", [True, False])
def test_the_end_of_a_turn_is_trained(marks_end: bool) -> None:
    """Though some templates mark only the words before it as the assistant's."""
    tokenizer = byte_tokenizer()
    if not marks_end:
        tokenizer.chat_template = TEMPLATE.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    settings = data.Preparation(assistant_only_loss=True)
    [row] = data.prepare(Dataset.from_list([{"messages": messages}]), tokenizer, settings)
    assert tokenizer.decode([label for label in row["labels"] if label != data.IGNORED]) == "b<end>b<end>"


# What the base can read


def test_a_row_is_cut_at_the_positions_of_the_base() -> None:
    tokenizer, rows = byte_tokenizer(), Dataset.from_dict({"text": ["abc", "abcdefgh", "abcdefg"]})
    made = data.prepare(rows, tokenizer, data.Preparation(), limits=data.Limits(positions=8))
    assert [len(ids) for ids in made["input_ids"]] == [4, 8, 8]
    assert data.count_cut(made) == 1
    assert data.told_cut(1, 1024, data.Limits(8)) == "1 row cut at the 8 positions of the base"
    assert data.told_cut(2, 4, data.Limits(8)) == "2 rows cut at max_length 4"
    short = data.prepare(rows, tokenizer, data.Preparation(max_length=4), limits=data.Limits(positions=8))
    assert data.count_cut(short) == 2
    streamed = data.prepare(rows.to_iterable_dataset(), tokenizer, data.Preparation(), limits=data.Limits(positions=8))
    assert [row["input_ids"] for row in streamed] == list(made["input_ids"])
    pairs = Dataset.from_list([{"prompt": "abc", "chosen": "d", "rejected": "efghi"}])
    settings = data.PairPreparation().within(data.Limits(positions=8))
    assert data.count_cut_pairs(data.prepare_pairs(pairs, tokenizer, settings), settings) == 1


def test_an_id_without_embedding_is_named() -> None:
    tokenizer = byte_tokenizer()
    limits = data.Limits(vocabulary=tokenizer.convert_tokens_to_ids("z"))  # the ids go by the alphabet
    rows = Dataset.from_dict({"text": ["a", "az"]})
    assert len(data.prepare(rows.select([0]), tokenizer, data.Preparation(), limits=limits)) == 1
    with pytest.raises(DataError, match=rf"row 2: has the token {limits.vocabulary} 'z' at place 2"):
        data.prepare(rows, tokenizer, data.Preparation(), limits=limits)

"""Documents from every kind of source, and sequences that depend on their number alone."""

import json

import pytest
import torch

from openmsa.training.byte_tokenizer import byte_tokenizer
from openmsa.training.data import DataConfig, Mixture, read_documents, standard_library_text

LINES = [f"line {i}: " + "words and words " * 5 for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_byte_tokens_are_bytes_and_survive_saving(tokenizer, tmp_path):
    text = "naïve ☃\n\t x\x00y  z"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == list(text.encode())
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(text) == ids and again.decode(ids) == text
    assert again.padding_side == "left"


def write_source(kind, folder):
    if kind == "text":
        path = folder / "one.txt"
        path.write_text("\n".join(LINES))
        return path
    if kind == "folder":
        (folder / "code" / "deep").mkdir(parents=True)
        for number, line in enumerate(LINES):
            (folder / "code" / "deep" / f"{number}.py").write_text(line)
        (folder / "code" / "picture.png").write_bytes(b"\x89PNG")
        return folder / "code"
    if kind == "jsonl":
        path = folder / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"text": line, "n": 1}) for line in LINES))
        return path
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": LINES}), folder / "rows.parquet")
        return folder / "rows.parquet"
    from datasets import Dataset

    Dataset.from_dict({"text": LINES}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("kind", ["text", "folder", "jsonl", "parquet", "dataset"])
def test_every_source_gives_all_its_text_once(kind, tmp_path):
    path = str(write_source(kind, tmp_path))
    train, heldout = (read_documents(path, split=split) for split in ("train", "heldout"))
    assert train and heldout
    found = "\n".join(train + heldout)
    for number, line in enumerate(LINES[:-5]):
        assert found.count(line) == 1 or kind == "text", number
    assert sum(map(len, train)) > 4 * sum(map(len, heldout))
    assert "PNG" not in found


def test_the_split_of_a_folder_does_not_depend_on_where_it_lies(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = (write_source("folder", tmp_path / name) for name in ("a", "b"))
    assert read_documents(str(one), split="heldout") == read_documents(str(two), split="heldout")


def test_the_standard_library_keeps_its_heldout_files_apart():
    train, heldout = standard_library_text("train"), standard_library_text("heldout")
    assert len(train) > 10 * len(heldout) > 0
    assert not set(train) & set(heldout) - {text for text in heldout if len(text) < 200}


def test_items_depend_on_seed_and_number_alone(tokenizer):
    config = DataConfig(retrieval_share=0.5)
    one = Mixture(config, tokenizer, seq_len=200, size=20, seed=1)
    two = Mixture(config, tokenizer, seq_len=200, size=50, seed=1)
    other = Mixture(config, tokenizer, seq_len=200, size=20, seed=2)
    for number in (19, 3, 7):
        a, b, c = one[number], two[number], other[number]
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])
        assert not torch.equal(a["input_ids"], c["input_ids"])
        assert a["input_ids"].shape == a["labels"].shape == (200,)
        learned = a["labels"] != -100
        assert torch.equal(a["labels"][learned], a["input_ids"][learned])


def test_the_retrieval_share_is_kept(tokenizer):
    def share(wanted):
        config = DataConfig(retrieval_share=wanted)
        mixture = Mixture(config, tokenizer, seq_len=300, size=60, seed=5)
        return sum(bool((mixture[n]["labels"] == -100).any()) for n in range(60)) / 60

    assert share(0.0) == 0 and share(1.0) == 1 and 0.2 < share(0.5) < 0.8


def test_bad_sources_are_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="source='/nowhere' does not exist"):
        read_documents("/nowhere")
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(str(tmp_path / "empty.txt"))
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"text_column='text' is missing in .*line 1"):
        read_documents(str(tmp_path / "rows.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_documents(str(tmp_path / "broken.jsonl"))
    (tmp_path / "short.txt").write_text("a few words")
    config = DataConfig(source=str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match="seq_len=500"):
        Mixture(config, tokenizer, seq_len=500, size=1, seed=0)
    with pytest.raises(ValueError, match="retrieval_share=2"):
        DataConfig(retrieval_share=2)
    with pytest.raises(ValueError, match="tasks="):
        DataConfig(tasks=("needle",))

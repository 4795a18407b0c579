import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from datasets import Dataset, Features, Image, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerFast

from data.augmentations import build_views
from data.collators import MaskingCollator
from data.images import ImageDataset
from data.text_batches import IGNORED, MixedCollator, MixedDataset, PairDataset, TextDataset
from data.text_tokens import TextTokens, train_text_tokenizer
from data.texts import open_pairs, open_texts, too_long
from modeling.views import View

PHOTOGRAPHS = sorted((ROOT / "data/samples/photographs/train").glob("*.jpg"))[:6]
CAPTIONS = ["a red house", "two dogs on grass", "the sea", "a street at night", "flowers", "a cat"]


def pair_folder(folder: Path, captions=CAPTIONS, name="captions.jsonl") -> Path:
    folder.mkdir()
    for photograph in PHOTOGRAPHS:
        (folder / photograph.name).symlink_to(photograph)
    rows = [(photograph.name, caption) for photograph, caption in zip(PHOTOGRAPHS, captions, strict=True)]
    lines = [json.dumps({"file_name": file, "text": caption}) for file, caption in rows]
    if name.endswith("csv"):
        lines = ["file_name,caption", *(f'{file},"{caption}"' for file, caption in rows)]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_pairs__of_a_folder_have_the_caption_of_each_image(tmp_path, name):
    pairs, bad = open_pairs([str(pair_folder(tmp_path / "pairs", name=name))], 0.0)
    assert not bad
    assert list(pairs.captions) == CAPTIONS
    assert [Path(pairs.images.name(index)).name for index in range(6)] == [file.name for file in PHOTOGRAPHS]


def test_pairs__of_one_image_are_all_for_training_or_all_for_validation(tmp_path):
    folder = pair_folder(tmp_path / "pairs")
    with (folder / "captions.jsonl").open("a") as file:
        for number in range(4):
            rows = [{"file_name": file.name, "text": f"text {number}"} for file in PHOTOGRAPHS]
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    pairs, _ = open_pairs([str(folder)], 0.0)
    parts = [pairs.select(positions) for positions in pairs.captions.split(0.34, seed=0)]
    assert [len(part) for part in parts] == [20, 10]
    names = [{part.images.name(index) for index in range(len(part))} for part in parts]
    assert [len(each) for each in names] == [4, 2]
    assert not names[0] & names[1]


def test_pairs__of_a_table_have_the_caption_of_each_image(tmp_path):
    rows = {"image": [str(file) for file in PHOTOGRAPHS], "caption": CAPTIONS}
    table = Dataset.from_dict(rows, features=Features({"image": Image(), "caption": Value("string")}))
    table.to_parquet(tmp_path / "train.parquet")
    pairs, _ = open_pairs([str(tmp_path / "train.parquet")], 0.0)
    assert list(pairs.captions) == CAPTIONS
    assert pairs.images.sample(2)["image"] == PHOTOGRAPHS[2].read_bytes()


def test_pairs__that_cannot_be_used_are_named_and_counted(tmp_path):
    folder = pair_folder(tmp_path / "pairs", captions=["", "a dog", "the sea", "a street", "flowers", "a cat"])
    (folder / PHOTOGRAPHS[1].name).unlink()
    with (folder / "captions.jsonl").open("ab") as file:
        file.write(b'{"file_name": "%s", "text": "\xe9t\xe9"}\n' % PHOTOGRAPHS[0].name.encode())
    pairs, bad = open_pairs([str(folder)], 0.5)
    assert list(pairs.captions) == ["the sea", "a street", "flowers", "a cat"]
    reasons = {Path(name).name: reason for name, reason in bad.items()}
    assert "no such file" in reasons[PHOTOGRAPHS[1].name]
    assert reasons[PHOTOGRAPHS[0].name] in ("its text is empty", "its text is not UTF-8")
    with pytest.raises(ValueError, match=r"2 of 6 texts .* cannot be used .*its text is empty"):
        open_pairs([str(folder)], 0.2)


def test_pairs__without_captions_say_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"no captions in .*; expected one of captions.jsonl"):
        open_pairs([str(tmp_path)], 0.0)


def test_texts__are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\nbad \xff\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": null}\n')
    Dataset.from_dict({"text": ["four"]}).to_parquet(tmp_path / "c.parquet")
    texts, bad = open_texts([str(tmp_path)], 0.5)
    assert list(texts) == ["one", "two", "three", "four"]
    assert {Path(name).name: reason for name, reason in bad.items()} == {
        "a.txt:4": "its text is not UTF-8",
        "b.jsonl:2": "its text is empty",
    }
    assert texts.name(1) == str(tmp_path / "a.txt:3")


def test_texts__of_a_table_are_read_without_its_images(tmp_path):
    rows = {"image": 2 * [{"bytes": b"no image", "path": None}], "caption": ["one", "two"]}
    table = Dataset.from_dict(rows, features=Features({"image": Image(), "caption": Value("string")}))
    table.to_parquet(tmp_path / "train.parquet")
    texts, _ = open_texts([str(tmp_path / "train.parquet")], 0.0)
    assert list(texts) == ["one", "two"]


def test_texts__in_a_folder_with_the_name_of_a_table_are_read_once(tmp_path):
    (tmp_path / "all.parquet").mkdir()  # as Spark writes it
    Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "all.parquet" / "part-0.parquet")
    assert list(open_texts([str(tmp_path)], 0.0)[0]) == ["one", "two"]


def test_texts__of_another_kind_of_file_are_refused(tmp_path):
    (tmp_path / "texts.json").write_text("{}")
    with pytest.raises(ValueError, match=r"texts.json holds no texts .* ends in \.txt, \.jsonl, \.csv, \.arrow"):
        open_texts([str(tmp_path / "texts.json")], 0.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.jpg,a dog, running", "a.csv:2 has more values than the 2 columns of the first line: put texts"),
        (f'a.jpg,"{"word " * 30_000}"', "a.csv:2 is not a row of a csv file .field larger than field limit"),
    ],
)
def test_texts__of_a_csv_file_are_never_cut_at_a_comma(tmp_path, row, message):
    (tmp_path / "a.csv").write_text(f"file_name,text\n{row}\n")
    with pytest.raises(ValueError, match=message):
        open_texts([str(tmp_path / "a.csv")], 1.0)
    (tmp_path / "a.csv").write_text('file_name,text\na.jpg,"a dog, running",,\n')  # as spreadsheets write it
    assert list(open_texts([str(tmp_path / "a.csv")], 0.0)[0]) == ["a dog, running"]


def test_pairs__with_several_captions_in_a_record_have_the_first_as_in_tables(tmp_path):
    folder = pair_folder(tmp_path / "pairs", captions=[[caption, "another"] for caption in CAPTIONS])
    assert list(open_pairs([str(folder)], 0.0)[0].captions) == CAPTIONS


def test_texts__that_are_no_strings_or_hold_zeros_are_not_called_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 5}\n{"text": "one"}\n')
    (tmp_path / "b.txt").write_bytes("two\nthree\n".encode("utf-16"))
    (tmp_path / "c.txt").write_text("four\u2028four\x0cfour\r\nfive\n", encoding="utf-8", newline="")
    texts, bad = open_texts([str(tmp_path)], 0.9)
    assert list(texts) == ["one", "four\u2028four\x0cfour", "five"]
    assert {Path(name).name: reason for name, reason in bad.items()} == {
        "a.jsonl:1": "its text is 5, expected a string",
        **{f"b.txt:{number}": "its text is not UTF-8" for number in (1, 2, 3)},
    }
    assert texts.name(2) == str(tmp_path / "c.txt:2")


def test_too_long__names_the_first_and_counts(tmp_path):
    (tmp_path / "a.txt").write_text(f"short\n{'word ' * 10_000}\n")
    texts, _ = open_texts([str(tmp_path / "a.txt")], 0.0)
    assert too_long(texts, 64).endswith("a.txt:2 with 10,000 words")
    assert "1 text is cut to max_text_length 64" in too_long(texts, 64)
    assert too_long(texts, 10_000) is None


@pytest.fixture(scope="module")
def tokens() -> TextTokens:
    return TextTokens(train_text_tokenizer(CAPTIONS, 300), 8)


def test_trained_tokenizer__is_always_the_same_and_knows_its_words(tokens):
    again = train_text_tokenizer(CAPTIONS, 300)
    assert again.get_vocab() == tokens.tokenizer.get_vocab()
    ids = tokens("Two DOGS on grass")
    assert tokens.tokenizer.decode(ids, skip_special_tokens=True).strip() == "two dogs on grass"
    assert len(tokens("dogs " * 10_000)) == 8
    assert tokens.config["vocab_size"] == len(tokens.tokenizer)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pad_token": "p", "cls_token": "c"}, "has no mask token"),
        ({"mask_token": "m"}, "has no pad token"),
        ({"mask_token": "m", "pad_token": "p"}, "puts no class token in front"),
    ],
)
def test_tokenizer__that_cannot_mask_is_refused(given, message):
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate("umpcas")}, unk_token="u"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=message):
        TextTokens(PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="u", **given), 8)


def test_tokenizer__of_a_folder_that_holds_a_config_only_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has no words: are its files missing"):
        TextTokens(AutoTokenizer.from_pretrained(tmp_path), 8, "the tokenizer")


@pytest.fixture
def mixed(tmp_path, tokens):
    """A training set of six images with four texts and six pairs, and its collator."""
    pairs, _ = open_pairs([str(pair_folder(tmp_path / "pairs"))], 0.0)
    (tmp_path / "a.txt").write_text("the sea\na red cat\ndogs at night\ngrass and flowers\n")
    texts, _ = open_texts([str(tmp_path / "a.txt")], 0.0)
    transform = build_views((View(),), image_size=(32, 32), crop_scale=(0.5, 1.0), num_channels=3, train=True)
    images, of_pairs = (ImageDataset(pairs.images, transform, seed=seed, train=True) for seed in (0, 1))
    dataset = MixedDataset(images, TextDataset(texts, 2, train=True), PairDataset(of_pairs, pairs.captions))
    masks = MaskingCollator((4, 4), 0.4, strategy="block", equal_num_masked=False, with_image_index=True)
    return dataset, MixedCollator(masks, tokens, 0.15, 0.5)


def test_mixed__every_text_and_pair_comes_once_per_epoch_of_its_own(mixed):
    dataset, _ = mixed
    items = dataset.__getitems__(list(range(12)))
    assert sorted(item["text"]["text_index"] for item in items[:4]) == [0, 1, 2, 3]
    assert [item["text"]["epoch"] for item in items] == 4 * [0] + 4 * [1] + 4 * [2]
    assert sorted(item["pair"]["text"] for item in items[:6]) == sorted(CAPTIONS)
    for item in items:
        assert item["pair"]["text"] == CAPTIONS[item["pair"]["image_index"]]
    assert [item["text"] for item in dataset.__getitems__([9])] == [items[9]["text"]]


def test_mixed__words_are_masked_by_seed_epoch_and_number(mixed, tokens):
    dataset, collator = mixed
    items = dataset.__getitems__(list(range(6)))
    batch, again = collator(items), collator(items[::-1])
    for prefix, ratio in (("", 0.15), ("pair_", 0.5)):
        labels, ids, attended = (batch[prefix + n] for n in ("masked_words", "input_ids", "attention_mask"))
        masked = labels != IGNORED
        assert batch[prefix + "num_masked_words"] == masked.sum()
        texts = [item["pair" if prefix else "text"]["text"] for item in items]
        num_words = [len(tokens(text)) - 2 for text in texts]
        assert masked.sum(1).tolist() == [max(1, round(ratio * number)) for number in num_words]
        assert (ids[masked] == tokens.mask_id).all()
        whole = torch.where(masked, labels, ids)
        assert [row[: n + 2].tolist() for row, n in zip(whole, num_words, strict=True)] == [tokens(t) for t in texts]
        assert attended.sum(1).tolist() == [number + 2 for number in num_words]
        assert torch.equal(again[prefix + "masked_words"], labels.flip(0))
    assert not torch.equal(batch["pair_bool_masked_pos"], batch["bool_masked_pos"])


def test_mixed__items_of_images_alone_make_a_batch_of_images(mixed):
    dataset, collator = mixed
    batch = collator([dataset.item(0, epoch=0), dataset.item(1, epoch=0)])
    assert not [name for name in batch if "word" in name or name.startswith("pair_")]

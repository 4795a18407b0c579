"""BEiT-3 by the commands, from images, texts and pairs to retrieval; and what retrieval computes."""

import json
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
from pretraining_command import pretrain
from test_run_beit import save_tokenizer
from test_run_finetune import finetune
from test_texts import CAPTIONS, pair_folder
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoTokenizer,
    BeitConfig,
    BeitModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    EfficientNetConfig,
    EfficientNetModel,
    RobertaConfig,
    RobertaModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from data.text_tokens import train_text_tokenizer
from evaluation.retrieval import retrieval_metrics
from modeling.dual_encoder import contrastive_loss
from modeling.multiway import POOLER_SCALE
from training.layer_decay import layer_ids

SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Pairs, an image tokenizer, and a BEiT-3 that was trained on them for two steps."""
    folder = tmp_path_factory.mktemp("beit3")
    pairs = str(pair_folder(folder / "pairs"))
    flags = ["--method", "beit3", "--model", "vit-nano", "--tokenizer", save_tokenizer(folder / "tokenizer", 64)]
    texts = ["--pair_dataset", pairs, "--text_tokenizer", "trained", "--max_text_length", "16"]
    assert pretrain([*flags, *texts, *SMALL, "--dataset", pairs, "--output_dir", str(folder / "out")]) == 0
    return folder


def test_pretraining__writes_a_vision_and_a_text_encoder_with_its_tokenizer(workspace):
    out = workspace / "out"
    vision, text = AutoModel.from_pretrained(out), AutoModel.from_pretrained(out / "text")
    assert [type(model).__name__ for model in (vision, text)] == ["BeitModel", "RobertaPreLayerNormModel"]
    batch = AutoTokenizer.from_pretrained(out / "text")(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    features = text(batch["input_ids"], batch["attention_mask"])
    assert_close(features.pooler_output / POOLER_SCALE, features.last_hidden_state[:, 0], atol=1e-5, rtol=0)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("pair_text_accuracy" in entry for entry in history)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "beit3", "--pair_dataset", "PAIRS"], "--text_tokenizer is missing"),
        (
            ["--method", "beit3", "--text_tokenizer", "trained"],
            "--text_tokenizer has no effect without --text_dataset",
        ),
        (
            ["--method", "beit3", "--text_dataset", "PAIRS", "--num_fusion_layers", "1"],
            "--num_fusion_layers has no effect without --pair_dataset",
        ),
        (["--method", "beit", "--pair_dataset", "PAIRS"], "--method beit learns from images only; use beit3"),
    ],
)
def test_pretraining__refuses_texts_that_cannot_be_used(workspace, tmp_path, capsys, flags, message):
    flags = [str(workspace / "pairs") if flag == "PAIRS" else flag for flag in flags]
    more = ["--model", "vit-nano", "--tokenizer", str(workspace / "tokenizer"), "--output_dir", str(tmp_path / "out")]
    assert pretrain([*flags, *more, *SMALL]) == 2
    assert message in capsys.readouterr().err


def test_retrieval__opens_as_a_dual_encoder_with_metrics_and_a_figure(workspace, tmp_path):
    out = tmp_path / "out"
    flags = [
        "--task",
        "retrieval",
        "--max_text_length",
        "16",
        "--projection_size",
        "32",
        "--validation_fraction",
        "0.5",
    ]
    finetune(workspace / "out", workspace / "pairs", out, *flags, *SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == "VisionTextDualEncoderModel"
    assert not any(info.values())
    metrics = {entry["metric"]: entry["value"] for entry in json.loads((out / "metrics.json").read_text())["results"]}
    assert metrics["text_recall_at_5"] == metrics["image_recall_at_5"] == 1  # of three
    assert (out / "retrieved.png").stat().st_size > 1000
    tokenizer = AutoTokenizer.from_pretrained(out)
    kwargs = {"padding": True, "truncation": True, "return_token_type_ids": False}
    texts = tokenizer(CAPTIONS, return_tensors="pt", **kwargs)
    assert model(**texts, pixel_values=torch.zeros(2, 3, 64, 64)).logits_per_image.shape == (2, len(CAPTIONS))


@pytest.fixture(scope="module")
def native_encoders(tmp_path_factory):
    """A ViT and text encoders by name, with 32 positions and as masked-image and masked-word models are stored."""
    folder, tokenizer = tmp_path_factory.mktemp("native"), train_text_tokenizer(CAPTIONS, 300)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    words = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 32}
    distil = {"dim": 32, "n_heads": 2, "n_layers": 1, "hidden_dim": 32}
    models = {
        "vit": ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes), add_pooling_layer=False),
        "bert": BertModel(BertConfig(**sizes, **words)),
        "roberta": RobertaModel(RobertaConfig(**sizes, **words), add_pooling_layer=False),
        "distilbert": DistilBertModel(DistilBertConfig(**distil, **words)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_retrieval__of_encoders_without_pooler_compares_their_class_tokens(workspace, native_encoders, tmp_path):
    flags = ["--task", "retrieval", "--text_model", str(native_encoders / "roberta"), "--projection_size", "16"]
    out = finetune(
        native_encoders / "vit", workspace / "pairs", tmp_path / "out", *flags, *SMALL, "--max_text_length", "16"
    )
    model = AutoModel.from_pretrained(out)
    for encoder in (model.vision_model, model.text_model):
        assert torch.equal(encoder.pooler.dense.weight, POOLER_SCALE * torch.eye(32))
    outputs = model(input_ids=torch.tensor([[1, 5, 2]]), pixel_values=torch.randn(1, 3, 32, 32))
    tokens = outputs.vision_model_output.last_hidden_state[:, 0]
    assert_close(outputs.image_embeds, torch.nn.functional.normalize(model.visual_projection(tokens)))


def test_retrieval__refuses_an_encoder_without_an_output_of_the_whole_text(
    workspace, native_encoders, tmp_path, capsys
):
    flags = ["--task", "retrieval", "--text_model", str(native_encoders / "distilbert"), "--max_text_length", "16"]
    finetune(native_encoders / "vit", workspace / "pairs", tmp_path / "out", *flags, *SMALL, code=2)
    assert "is a DistilBertModel, which gives no output of the class token" in capsys.readouterr().err


def test_retrieval__refuses_a_convolutional_network(workspace, native_encoders, tmp_path, capsys):
    sizes = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128, "image_size": 32}
    network = EfficientNetModel(EfficientNetConfig(**sizes))
    network.save_pretrained(tmp_path / "network")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "network")
    flags = ["--task", "retrieval", "--text_model", str(native_encoders / "bert"), "--max_text_length", "16"]
    finetune(tmp_path / "network", workspace / "pairs", tmp_path / "out", *flags, *SMALL, code=2)
    error = capsys.readouterr().err
    assert "is a EfficientNetModel, whose config has no hidden_size; expected an encoder such as a ViT" in error


def test_retrieval__refuses_the_tokenizer_of_another_text_encoder(workspace, native_encoders, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(native_encoders / "bert", other)
    train_text_tokenizer(
        [*CAPTIONS, "other words of another tokenizer, of which there are more"], 400
    ).save_pretrained(other)
    flags = ["--task", "retrieval", "--text_model", str(other), "--max_text_length", "16"]
    finetune(native_encoders / "vit", workspace / "pairs", tmp_path / "out", *flags, *SMALL, code=2)
    assert "they do not belong together" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "most"), [("bert", 32), ("roberta", 31)])
def test_retrieval__refuses_more_words_than_the_text_encoder_has_positions_for(
    workspace, native_encoders, tmp_path, capsys, name, most
):
    flags = ["--task", "retrieval", "--text_model", str(native_encoders / name), "--max_text_length", "33"]
    finetune(native_encoders / "vit", workspace / "pairs", tmp_path / "out", *flags, *SMALL, code=2)
    assert f"max_text_length is 33, but {native_encoders / name} has positions for {most}" in capsys.readouterr().err


def test_metrics__equal_a_search_by_hand():
    images = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.9, 0.1]])
    texts = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    found = retrieval_metrics(images, texts, np.array([7, 3, 3, 3]))
    assert found["text_recall_at_1"] == 3 / 4  # the last image is closer to the text of the first
    assert found["image_recall_at_1"] == 1
    assert found["text_recall_at_5"] == 1


def test_metrics__of_images_with_several_texts_count_each_of_them_as_right():
    """As in COCO: five captions of each image; the others of the same image are no wrong answers."""
    own = np.eye(4)[np.repeat(np.arange(4), 5)]
    found = retrieval_metrics(own, own, np.arange(20), np.repeat([7, 3, 5, 4], 5))
    assert set(found.values()) == {1.0}
    texts = own.copy()
    texts[:4] = np.eye(4)[1]  # four of the first image's, which still has one that finds it
    found = retrieval_metrics(own, texts, np.arange(20), np.repeat([7, 3, 5, 4], 5))
    assert found["text_recall_at_1"] == 3 / 4  # four wrong texts are as near to the second image as its own
    assert found["image_recall_at_1"] == 16 / 20


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_metrics__of_equal_embeddings_are_those_of_a_search_that_finds_nothing(value):
    same = np.full((20, 4), value)
    assert set(retrieval_metrics(same, same, np.arange(20)).values()) == {0.0}
    apart = np.eye(3)[[0, 0, 1]]  # two equal images with the same text do not compete
    assert set(retrieval_metrics(apart, apart, np.array([0, 0, 1])).values()) == {1.0}


def test_loss__does_not_count_another_pair_of_the_same_text_as_wrong():
    similarities = torch.tensor([[3.0, 1.0, 9.0], [0.0, 2.0, 0.0], [9.0, 1.0, 3.0]])
    cross_entropy = torch.nn.functional.cross_entropy
    without = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    expected = [cross_entropy(rows[:1], torch.tensor([0])) for rows in (without, without.T)]
    loss = contrastive_loss(similarities, torch.tensor([5, 6, 5]))
    middle = [cross_entropy(rows[1:2], torch.tensor([1])) for rows in (similarities, similarities.T)]
    assert_close(loss, (sum(2 * each for each in expected) + sum(middle)) / 6)


def test_loss__does_not_count_another_text_of_the_same_image_as_wrong():
    similarities, numbers = torch.randn(3, 3), torch.arange(3)
    assert_close(
        contrastive_loss(similarities, numbers, torch.tensor([5, 6, 5])),
        contrastive_loss(similarities, torch.tensor([5, 6, 5])),
    )


def test_layer_ids__of_a_dual_encoder_count_from_the_head():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    vision = BeitModel(BeitConfig(num_hidden_layers=3, use_mean_pooling=False, **sizes))
    text = BertModel(BertConfig(num_hidden_layers=2, vocab_size=20, **sizes))
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, text.config)
    ids = layer_ids(VisionTextDualEncoderModel(config=config, vision_model=vision, text_model=text))
    assert ids["vision_model.embeddings.cls_token"] == 0
    assert ids["text_model.embeddings.word_embeddings.weight"] == 1
    assert ids["vision_model.layers.2.layernorm_before.weight"] == 3
    assert ids["text_model.encoder.layer.1.output.dense.weight"] == 3
    assert ids["text_projection.weight"] == ids["logit_scale"] == ids["vision_model.layernorm.weight"] == 4

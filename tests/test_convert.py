"""The authors' files of every form, under every prefix, become models that compute what the files' weights say."""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageClassification

from hub.convert import __main__ as convert
from hub.convert.weight_file import open_weights

GOLDEN = Path(__file__).parent / "golden"
MODELS = ["--num_attention_heads", "2"]
FULL = [*MODELS, "--decoder_num_attention_heads", "4", "--norm_pix_loss", "true"]


def weights_of(name, key="model"):
    return dict(torch.load(GOLDEN / f"{name}.pth", weights_only=True)[key])


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def mae_encoder():
    """As in `mae_pretrain_vit_base.pth`."""
    return {k: t for k, t in weights_of("mae_small_normpix").items() if not k.startswith(("decoder_", "mask_token"))}


def classifier(state, norm):
    """Fine-tuned: with a norm behind the mean of the patches in place of the final one, and 5 classes."""
    width = len(state["norm.weight"])
    if norm == "fc_norm":
        state = {key: tensor for key, tensor in state.items() if not key.startswith("norm.")}
        state |= {"fc_norm.weight": 1 + drawn(width) / 10, "fc_norm.bias": drawn(width) / 10}
    return state | {"head.weight": drawn(5, width), "head.bias": drawn(5)}


def beit_finetuned():
    """As in `beit_base_patch16_224_pt22k_ft22k.pth`: a table in each block, no mask token."""
    state = {k: t for k, t in weights_of("beit").items() if not k.startswith(("lm_head.", "mask_token"))}
    shared = {
        key.removeprefix("rel_pos_bias."): state.pop(key) for key in list(state) if key.startswith("rel_pos_bias")
    }
    state |= {f"blocks.{b}.attn.{key}": tensor.clone() for b in range(2) for key, tensor in shared.items()}
    return classifier(state, "fc_norm")


def swin_encoder():
    state = {k.removeprefix("encoder."): t for k, t in weights_of("simmim_swin").items() if k.startswith("encoder.")}
    del state["mask_token"]
    return state


def ibot_checkpoint():
    """As `checkpoint.pth`: both networks with their projection heads."""
    student = {f"module.backbone.{key}": tensor for key, tensor in mae_encoder().items()}
    student |= {"module.backbone.masked_embed": drawn(1, 64), "module.head.mlp.0.weight": drawn(8, 64)}
    teacher = {f"backbone.{key}": tensor * 0.9 for key, tensor in mae_encoder().items()}
    teacher |= {"head.mlp.0.weight": drawn(8, 64), "head.last_layer.weight_g": drawn(8, 1)}
    return {"student": student, "teacher": teacher, "epoch": 3, "ibot_loss": {"center": drawn(1, 8)}}


def run(arguments):
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        convert.main([str(argument) for argument in arguments])
    return printed.getvalue()


def converted(content, method, tmp_path, *flags, name="file.pth"):
    """(what was written, what was printed)."""
    torch.save(content, tmp_path / name)
    printed = run(["--from", method, tmp_path / name, "--to", tmp_path / "out", *flags])
    return tmp_path / "out", printed


def refusal(content, method, tmp_path, *flags):
    with pytest.raises(SystemExit) as caught:
        converted(content, method, tmp_path, *flags)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def patches_before_norm(encoder, pixel_values):
    return encoder(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]


def test_every_form__is_checked_against_the_weights_by_the_command_itself(tmp_path):
    _, printed = converted({"model": mae_encoder()}, "mae", tmp_path, *MODELS)
    assert re.search(r"verified against the file's weights: relative error \de-0[678]", printed)


@torch.no_grad()
def test_check__finds_a_weight_in_the_wrong_place(tmp_path, monkeypatch):
    build = convert.mae.convert

    def swapped(state, options):
        result = build(state, options)
        mlp = result.model.layers[0].mlp
        mlp.fc1.bias += 1.0
        return result

    monkeypatch.setattr(convert.mae, "convert", swapped)
    assert "outputs have a relative error" in refusal(mae_encoder(), "mae", tmp_path, *MODELS)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "backbone.", "module.backbone.", "encoder.", "model."]
)
@pytest.mark.parametrize("key", [None, "model", "state_dict", "module"])
def test_prefixes__and_containers_make_no_difference(prefix, key, tmp_path):
    state = mae_encoder()
    content = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({key: content, "epoch": 1, "optimizer": {"state": {}}} if key else content, tmp_path / "file.pth")
    _, read = open_weights(tmp_path / "file.pth").state()
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


@torch.no_grad()
def test_mae__encoder_alone_has_the_features_of_the_whole_file(tmp_path):
    pixels = load_file(GOLDEN / "mae_small_normpix.safetensors")["pixel_values"]
    whole, _ = converted({"model": weights_of("mae_small_normpix")}, "mae", tmp_path, *FULL)
    expected = AutoModel.from_pretrained(whole).eval()(pixels).last_hidden_state
    save_file(mae_encoder(), tmp_path / "model.safetensors")
    run(["--from", "mae", tmp_path / "model.safetensors", "--to", tmp_path / "alone", *MODELS])
    output = AutoModel.from_pretrained(tmp_path / "alone").eval()(pixels)
    assert torch.equal(output.last_hidden_state, expected)
    assert torch.equal(output.pooler_output, expected[:, 0])
    assert not (tmp_path / "alone" / "pretraining").exists()


@pytest.mark.parametrize(("norm", "opens_as"), [("fc_norm", "beit"), ("norm", "vit")])
@torch.no_grad()
def test_mae__fine_tuned_is_a_classifier_with_the_logits_of_the_encoder_and_its_head(norm, opens_as, tmp_path):
    pixels = load_file(GOLDEN / "mae_small_normpix.safetensors")["pixel_values"]
    whole, _ = converted({"model": weights_of("mae_small_normpix")}, "mae", tmp_path, *FULL)
    encoder = AutoModel.from_pretrained(whole).eval()
    state = classifier(mae_encoder(), norm)
    torch.save({"model": state}, tmp_path / "tuned.pth")
    printed = run(["--from", "mae", tmp_path / "tuned.pth", "--to", tmp_path / "cls", *MODELS])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "cls").eval()
    if norm == "fc_norm":
        mean = patches_before_norm(encoder, pixels).mean(1)
        pooled = F.layer_norm(mean, (64,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
        assert "which cancels in the softmax" in printed
    else:
        pooled = encoder(pixels).last_hidden_state[:, 0]
    expected = F.linear(pooled, state["head.weight"], state["head.bias"])
    assert model.config.model_type == opens_as
    assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-5)


def test_mae__linear_probe_and_rest_of_a_decoder_are_dropped_with_the_reason(tmp_path):
    state = mae_encoder() | {
        "head.0.running_mean": drawn(64),
        "head.1.weight": drawn(5, 64),
        "mask_token": drawn(1, 1, 48),
    }
    _, printed = converted({"model": state}, "mae", tmp_path, *MODELS)
    assert "dropped head.0.running_mean, head.1.weight: a linear probe" in printed
    assert "dropped mask_token: part of the decoder" in printed


@torch.no_grad()
def test_beit__fine_tuned_is_a_classifier_with_the_logits_of_the_encoder_and_its_head(tmp_path):
    pixels = load_file(GOLDEN / "beit.safetensors")["pixel_values"]
    whole, _ = converted({"model": weights_of("beit")}, "beit", tmp_path)
    mean = patches_before_norm(AutoModel.from_pretrained(whole).eval(), pixels).mean(1)
    state = beit_finetuned()
    pooled = F.layer_norm(mean, (64,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
    expected = F.linear(pooled, state["head.weight"], state["head.bias"])
    for method in ("beit", "simmim"):  # SimMIM's ViT is fine-tuned with the same code
        torch.save({"module": state}, tmp_path / "tuned.pth")  # DeepSpeed's name for it
        printed = run(["--from", method, tmp_path / "tuned.pth", "--to", tmp_path / method])
        model = AutoModelForImageClassification.from_pretrained(tmp_path / method).eval()
        assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-5)
        assert "dropped blocks.*.attn.relative_position_index: computed from the sizes" in printed


def test_beit__images_are_standardized_as_in_the_authors_runs_unless_said_otherwise(tmp_path):
    out, printed = converted({"model": weights_of("beit")}, "beit", tmp_path)
    assert "--image_stats half, the default for such files" in printed
    assert '"image_mean": [\n    0.5' in (out / "preprocessor_config.json").read_text()
    run(["--from", "beit", tmp_path / "file.pth", "--to", tmp_path / "other", "--image_stats", "imagenet"])
    assert (
        '"image_mean": [\n    0.485' in (tmp_path / "other" / "pretraining" / "preprocessor_config.json").read_text()
    )


def test_beit_v2__gives_its_encoder(tmp_path):
    state = weights_of("beit") | {"cls_pt_layers.0.norm1.weight": drawn(64)}
    out, printed = converted({"model": state}, "beit", tmp_path)
    assert not (out / "pretraining").exists()
    assert (
        "dropped lm_head.weight, lm_head.bias, cls_pt_layers.0.norm1.weight: the second branch of BEiT v2" in printed
    )


@torch.no_grad()
def test_data2vec__student_and_teacher_give_the_authors_prediction_and_target(tmp_path):
    expected = load_file(GOLDEN / "data2vec.safetensors")
    mask = expected["bool_masked_pos"].bool()
    for weights in ("student", "teacher"):
        arguments = ["--from", "data2vec", GOLDEN / "data2vec.pth", "--to", tmp_path / weights, "--weights", weights]
        other = {"student": "'model' and 'model_ema'", "teacher": "'model_ema' and 'model'"}[weights]
        assert f"reading the weights under {other}\ndropped" in run(arguments)
    student, teacher = (AutoModel.from_pretrained(tmp_path / name).eval() for name in ("student", "teacher"))
    state = weights_of("data2vec")
    features = student(expected["pixel_values"], bool_masked_pos=mask).last_hidden_state[:, 1:][mask]
    prediction = F.linear(features, state["lm_head.weight"], state["lm_head.bias"])
    assert_close(prediction, expected["prediction_masked"], rtol=1e-4, atol=1e-5)
    blocks = teacher(expected["pixel_values"], output_hidden_states=True).hidden_states[1:]
    chosen = [F.layer_norm(blocks[int(i)][:, 1:], (64,)) for i in expected["layer_ids"].flatten()]
    target = torch.stack(chosen).mean(0)[mask]
    assert_close(target, expected["target_masked"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_ibot__teacher_student_and_backbone(tmp_path):
    pixels = load_file(GOLDEN / "mae_small_normpix.safetensors")["pixel_values"]
    checkpoint = ibot_checkpoint()
    _, printed = converted(checkpoint, "ibot", tmp_path, *MODELS)
    assert "reading the weights under 'teacher'; ignored: student, epoch, ibot_loss" in printed
    assert "dropped head.mlp.0.weight, head.last_layer.weight_g: the projection head" in printed
    printed = run(
        ["--from", "ibot", tmp_path / "file.pth", "--to", tmp_path / "student", "--weights", "student", *MODELS]
    )
    assert "dropped masked_embed: AutoModel builds" in printed
    backbone = {key.removeprefix("backbone."): t for key, t in checkpoint["teacher"].items() if "head" not in key}
    torch.save({"state_dict": backbone}, tmp_path / "teacher.pth")  # as checkpoint_teacher.pth
    run(["--from", "ibot", tmp_path / "teacher.pth", "--to", tmp_path / "backbone", *MODELS])
    teacher, student, backbone = (
        AutoModel.from_pretrained(tmp_path / name).eval()(pixels).last_hidden_state
        for name in ("out", "student", "backbone")
    )
    assert torch.equal(teacher, backbone)
    assert not torch.allclose(teacher, student, atol=1e-2)


@torch.no_grad()
def test_ibot__swin_is_asked_for_its_size_and_said_to_be_near(tmp_path):
    pixels = load_file(GOLDEN / "simmim_swin.safetensors")["pixel_values"]
    whole, _ = converted({"model": swin_encoder()}, "simmim", tmp_path)
    state = {key: tensor for key, tensor in swin_encoder().items() if not key.endswith("attn_mask")}
    torch.save({"state_dict": {**state, "masked_embed": drawn(1, 16)}}, tmp_path / "ibot.pth")
    arguments = ["--from", "ibot", tmp_path / "ibot.pth", "--to", tmp_path / "ibot"]
    with pytest.raises(SystemExit, match="--image_size 224"):
        run(arguments)
    printed = run([*arguments, "--image_size", "128"])
    assert "close to iBOT's, not equal" in printed
    assert "dropped masked_embed" in printed
    one, two = (AutoModel.from_pretrained(folder).eval()(pixels)[0] for folder in (whole, tmp_path / "ibot"))
    assert torch.equal(one, two)


@torch.no_grad()
def test_ibot__fine_tuned_with_beits_code_is_a_classifier(tmp_path):
    """Absolute positions, no bias of the keys, the class token's norm and head; `ibot` and `beit` read it alike."""
    tuned = classifier(mae_encoder(), "norm")
    for block in range(2):
        q_bias, _, v_bias = tuned.pop(f"blocks.{block}.attn.qkv.bias").chunk(3)
        tuned |= {f"blocks.{block}.attn.q_bias": q_bias, f"blocks.{block}.attn.v_bias": v_bias}
    torch.save({"model": tuned}, tmp_path / "tuned.pth")
    assert "BEiT with absolute positions, fine-tuned classifier (--from beit" in run(
        ["--inspect", tmp_path / "tuned.pth"]
    )
    whole, _ = converted({"model": classifier(mae_encoder(), "norm")}, "mae", tmp_path, *MODELS)
    pixels = load_file(GOLDEN / "mae_small_normpix.safetensors")["pixel_values"]
    expected = AutoModelForImageClassification.from_pretrained(whole).eval()(pixels).logits
    for method in ("ibot", "beit"):
        printed = run(["--from", method, tmp_path / "tuned.pth", "--to", tmp_path / method, *MODELS])
        assert "dropped" not in printed
        model = AutoModelForImageClassification.from_pretrained(tmp_path / method).eval()
        assert model.config.model_type == "beit"
        assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_simmim__encoders_alone_and_a_fine_tuned_swin(tmp_path):
    expected = load_file(GOLDEN / "simmim_swin.safetensors")
    pixels = expected["pixel_values"]
    whole, _ = converted(torch.load(GOLDEN / "simmim_vit.pth", weights_only=True), "simmim", tmp_path)
    vit = {key: tensor for key, tensor in weights_of("simmim_vit").items() if key.startswith("encoder.")}
    torch.save({"model": vit}, tmp_path / "vit.pth")
    run(["--from", "simmim", tmp_path / "vit.pth", "--to", tmp_path / "vit"])
    image = load_file(GOLDEN / "simmim_vit.safetensors")["pixel_values"]
    one, two = (
        AutoModel.from_pretrained(folder).eval()(image).last_hidden_state for folder in (whole, tmp_path / "vit")
    )
    assert torch.equal(one, two)

    swin = swin_encoder()
    width = len(swin["norm.weight"])
    head = {"head.weight": drawn(5, width), "head.bias": drawn(5)}
    for name, state in {"swin": swin, "tuned": swin | head}.items():
        torch.save({"model": state}, tmp_path / f"{name}.pth")
        run(["--from", "simmim", tmp_path / f"{name}.pth", "--to", tmp_path / name])
    features = AutoModel.from_pretrained(tmp_path / "swin").eval()(pixels).last_hidden_state
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").eval()
    assert_close(model(pixels).logits, F.linear(features.mean(1), *head.values()), rtol=1e-4, atol=1e-5)


def test_swin__windows_larger_than_the_map_have_no_native_class(tmp_path):
    state = {key: tensor for key, tensor in swin_encoder().items() if not key.endswith("attn_mask")}
    assert "larger than the map" in refusal({"model": state}, "simmim", tmp_path, "--image_size", "64")


def test_half_precision__is_read(tmp_path):
    half = {key: tensor.half() for key, tensor in mae_encoder().items()}
    out, _ = converted({"model": half}, "mae", tmp_path, *MODELS)
    assert AutoModel.from_pretrained(out).layernorm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("mae_small_normpix", "beit", r"not a checkpoint of beit but of MAE.*decoder_embed\.weight.*use --from mae"),
        ("beit", "mae", r"not a checkpoint of mae but of data2vec.*lm_head\.weight"),
        ("simmim_vit", "beit", r"not a checkpoint of beit but of SimMIM.*decoder\.0\.weight.*use --from simmim"),
        ("simmim_swin", "ibot", r"not a checkpoint of ibot but of SimMIM"),
        ("data2vec", "beit", r"not a checkpoint of beit but of data2vec.*model_ema.*use --from data2vec"),
        ("mae_small_normpix", "timm", r"not a checkpoint of timm but of MAE"),
    ],
)
def test_wrong_kind__is_named_with_the_keys_that_tell(name, method, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(["--from", method, GOLDEN / f"{name}.pth", "--to", tmp_path / "out"])


def test_wrong_kind__a_beit_is_no_data2vec(tmp_path):
    state = weights_of("beit") | {"lm_head.weight": drawn(32, 64), "lm_head.bias": drawn(32)}
    assert "use --from beit" in refusal({"model": state}, "data2vec", tmp_path)


@pytest.mark.parametrize("method", ["mae", "simmim", "beit", "data2vec", "ibot", "dino", "dinov2", "timm"])
def test_wrong_kind__something_else_altogether(method, tmp_path):
    message = refusal({"model": {"fc.weight": drawn(2, 2)}}, method, tmp_path)
    assert f"is not a checkpoint of {method}" in message
    assert "fc.weight" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.mlp.fc2.bias": None}, "missing blocks.1.mlp.fc2.bias"),
        ({"blocks.1.attn.qkv.weight": None}, "missing blocks.1.attn.qkv.weight"),
        ({"patch_embed.proj.bias": None, "norm.bias": None}, "missing norm.bias, patch_embed.proj.bias"),
        ({"surprise": drawn(1), "blocks.0.surprise": drawn(1)}, "unexpected surprise, blocks.0.surprise"),
        ({"blocks.0.mlp.fc2.bias": drawn(63)}, r"mismatched shape blocks.0.mlp.fc2.bias \(63,\), expected \(64,\)"),
        ({"blocks.0.mlp.fc1.weight": None}, "blocks.0.mlp.fc1.weight, which determines sizes, is missing"),
        ({"pos_embed": drawn(1, 20, 64)}, "are not a square grid"),
    ],
)
@pytest.mark.parametrize("form", ["whole", "encoder"])
def test_keys__too_few_too_many_or_misshapen_are_named_as_the_file_names_them(change, message, form, tmp_path):
    state = weights_of("mae_small_normpix") if form == "whole" else mae_encoder()
    state = {key: tensor for key, tensor in {**state, **change}.items() if tensor is not None}
    assert re.search(message, refusal({"model": state}, "mae", tmp_path, *(FULL if form == "whole" else MODELS)))


class Malicious:
    """A pickle that runs a command when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.trace))}",)


@pytest.mark.parametrize("arguments", [["--from", "mae", "FILE", "--to", "OUT"], ["--inspect", "FILE"]])
@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_that_runs_code__is_refused_and_does_not_run(arguments, new_format, tmp_path):
    content = {"model": mae_encoder(), "args": Malicious(tmp_path / "trace")}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=new_format)
    names = {"FILE": tmp_path / "evil.pth", "OUT": tmp_path / "out"}
    with pytest.raises(SystemExit, match=rf"is refused: besides tensors it contains `{os.name}\.system`"):
        run([names.get(word, word) for word in arguments])
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # it does run when read carelessly
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_file__is_reported_as_such(suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    if suffix == ".pth":
        torch.save({"model": mae_encoder()}, path)
    else:
        save_file(mae_encoder(), path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(SystemExit, match="truncated"):
        run(["--from", "mae", path, "--to", tmp_path / "out", *MODELS])
    path.write_text("no weights at all")
    with pytest.raises(SystemExit, match="truncated"):
        run(["--inspect", path])
    with pytest.raises(SystemExit, match="no file"):
        run(["--inspect", tmp_path / "none.pth"])


def test_folder__that_holds_something_is_left_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    torch.save({"model": mae_encoder()}, tmp_path / "file.pth")
    with pytest.raises(SystemExit, match="is not an empty folder"):
        run(["--from", "mae", tmp_path / "file.pth", "--to", tmp_path / "out", *MODELS])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_flags__that_the_file_does_not_answer_are_asked_for_by_name(tmp_path):
    message = refusal({"model": weights_of("mae_small_normpix")}, "mae", tmp_path)
    assert "--num_attention_heads NUMBER, --norm_pix_loss true|false" in message
    assert "--num_attention_heads" in refusal({"state_dict": mae_encoder()}, "ibot", tmp_path)
    message = refusal({"model": mae_encoder()}, "timm", tmp_path)
    assert "--image_stats imagenet|half, --num_attention_heads" in message
    assert "does not divide" in refusal({"model": mae_encoder()}, "mae", tmp_path, "--num_attention_heads", "7")


FILES = {
    "mae whole": ({"model": weights_of("mae_small_normpix")}, "mae", "MaeForPreTraining"),
    "mae encoder": ({"model": mae_encoder()}, "mae", "ViTModel"),
    "mae fine-tuned": ({"model": classifier(mae_encoder(), "fc_norm")}, "mae", "BeitForImageClassification"),
    "simmim": (torch.load(GOLDEN / "simmim_vit.pth", weights_only=True), "simmim", "SimMimForPreTraining"),
    "simmim swin": (torch.load(GOLDEN / "simmim_swin.pth", weights_only=True), "simmim", "SimMimForPreTraining"),
    "beit fine-tuned": ({"module": beit_finetuned()}, "beit", "BeitForImageClassification"),
    "data2vec": (torch.load(GOLDEN / "data2vec.pth", weights_only=True), "data2vec", "Data2VecForPreTraining"),
    "ibot": (ibot_checkpoint(), "ibot", "ViTModel"),
}


@pytest.mark.parametrize("name", FILES)
def test_inspect__says_what_a_file_is_and_its_command_works(name, tmp_path):
    content, method, opens_as = FILES[name]
    torch.save(content, tmp_path / "file.pth")
    printed = run(["--inspect", tmp_path / "file.pth"])
    assert f"(--from {method}" in printed
    assert f"opens as {opens_as}: " in printed
    assert "patch_size" in printed
    assert not list(tmp_path.glob("DIR"))
    command = re.search(r"convert it: python -m hub\.convert (.*)", printed)[1]
    command = command.replace("DIR", str(tmp_path / "out")).replace("NUMBER", "2").replace("true|false", "true")
    run(shlex.split(command))
    assert (tmp_path / "out" / "config.json").exists()


def test_inspect__tells_a_beit_by_its_vocabulary(tmp_path):
    state = weights_of("beit") | {"lm_head.weight": drawn(32, 64), "lm_head.bias": drawn(32)}
    torch.save({"model": state}, tmp_path / "file.pth")
    printed = run(["--inspect", tmp_path / "file.pth"])
    assert "BEiT in pre-training (--from beit)" in printed
    assert "vocab_size 32" in printed

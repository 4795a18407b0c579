"""Write the README.md of an exported encoder: how to load it, how it was made, what is known about it and what not."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData


class _Paper(NamedTuple):
    title: str
    authors: str
    year: int
    arxiv: str

    def bibtex(self, key: str) -> str:
        return (
            f"@article{{{key}{self.year},\n  title   = {{{{{self.title}}}}},\n  author  = {{{self.authors}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}},\n  year    = {{{self.year}}}\n}}"
        )


_PAPERS = {
    "mae": _Paper(
        "Masked Autoencoders Are Scalable Vision Learners",
        "Kaiming He and Xinlei Chen and Saining Xie and Yanghao Li and Piotr Doll{\\'a}r and Ross Girshick",
        2021,
        "2111.06377",
    ),
    "simmim": _Paper(
        "SimMIM: A Simple Framework for Masked Image Modeling",
        "Zhenda Xie and Zheng Zhang and Yue Cao and Yutong Lin and Jianmin Bao and Zhuliang Yao and Qi Dai and Han Hu",
        2021,
        "2111.09886",
    ),
    "beit": _Paper(
        "BEiT: BERT Pre-Training of Image Transformers",
        "Hangbo Bao and Li Dong and Songhao Piao and Furu Wei",
        2021,
        "2106.08254",
    ),
}

_TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

An image encoder pre-trained {% if base_model %}from `{{ base_model }}` {% endif %}without labels by masked
image modeling ({{ method }}{% if paper %}, [{{ paper.title }}](https://arxiv.org/abs/{{ paper.arxiv }}){% endif %}): \
part of each image is hidden, and the model learns to predict it from the rest.
It gives features; it has no classifier.

## Use it
{% if native_root_problem %}
The encoder alone cannot be opened as a plain transformers model: {{ native_root_problem }}. \
It is the `encoder` of the whole model.
{% else %}
The encoder is a plain transformers model and needs no other code:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

checkpoint = "{{ checkpoint }}"
processor = AutoImageProcessor.from_pretrained(checkpoint)
encoder = AutoModel.from_pretrained(checkpoint).eval()

inputs = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    outputs = encoder(**inputs)
features = outputs.last_hidden_state{{ patches }}.mean(1)  # mean of the patches
```
{% if patches %}
`pooler_output` is the class token (identity pooler); use `last_hidden_state{{ patches }}.mean(1)` for the mean of \
patches.
{% else %}
`pooler_output` is the same mean; there is no class token.
{% endif %}{% endif %}
The whole pre-training model, with what is dropped after pre-training, lies in `pretraining/`, to continue from or to \
draw reconstructions with. Loading it runs the Python files of this repository; read them first:

```python
from transformers import AutoModelForPreTraining

model = AutoModelForPreTraining.from_pretrained(checkpoint, subfolder="pretraining", trust_remote_code=True)
```
{% if metrics %}
## Results

| measure | value |
|---|---|
{% for name, value in metrics %}| {{ name }} | {{ value }} |
{% endfor %}{% endif %}{% if panel %}
![Reconstructions of images: input, masked, predicted]({{ panel }})
{% endif %}{% if curve %}
![Training and held-out loss over steps]({{ curve }})
{% endif %}
## Intended use and limits

Intended as a starting point for fine-tuning, or for frozen features, on images like those it was trained on.
{% if not quality_is_measured %}
**The quality of the features has not been measured.** A pre-training loss tells that training went on, not how good \
the features are, and losses of different methods, mask ratios or targets cannot be compared. Fine-tune or probe the \
encoder on your own task before relying on it.
{% endif %}
It carries the biases of its training images, and no check for bias, safety or memorised images was made.
Features of masked image modeling usually need fine-tuning; frozen, they tend to trail those of \
contrastive or supervised models.

## How it was trained

```bash
{{ command }}
```
{% if data_summary %}
| training images | |
|---|---|
{% for name, value in data_summary %}| {{ name }} | {{ value }} |
{% endfor %}{% endif %}{% if versions %}
| software and hardware | |
|---|---|
{% for name, value in versions %}| {{ name }} | {{ value }} |
{% endfor %}{% endif %}{% if recipe %}
<details>
<summary>All settings ({{ recipe | length }})</summary>

| setting | value |
|---|---|
{% for name, value in recipe %}| `{{ name }}` | {{ value }} |
{% endfor %}
</details>
{% endif %}{% if paper %}
## Citation

```bibtex
{{ paper.bibtex(method) }}
```
{% endif %}"""

_METRIC_NAMES = {"train_loss": "training loss", "eval_loss": "held-out loss"}
_QUALITY_WORDS = ("accuracy", "knn", "probe", "top1", "top5", "iou")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
# The folders of an absolute path: its root (/, ~/, C:\, file:///), then every component that another one follows.
# The slashes of a URL do not match: they follow a colon, a slash or a word. Nor does a slash between spaces.
_FOLDERS = re.compile(
    r"""(?<![\w/.~\\-])(?:file://)?(?:~[\w.-]*/+|(?<!:)/+|/(?!/)|[A-Za-z]:[\\/]+|\\\\)(?=\S)
        (?:[^/\\,;:=\n]*[^\s/\\,;:=][/\\]+(?=[^\s/\\,;:="'`\[\](){}<>]))*""",
    re.VERBOSE,
)


def write_model_card(
    folder: Path,
    *,
    command: str,
    method: str,
    model_name: str,
    recipe: Mapping[str, Any],
    data_summary: Mapping[str, Any],
    metrics: Mapping[str, Any],
    versions: Mapping[str, Any],
    panel: str | None,
    curve: str | None,
    base_model: str | None = None,
    license: str | None = None,
    has_class_token: bool = True,
    native_root_problem: str | None = None,
) -> None:
    """Write `folder/README.md`. Absolute paths keep their last component only, and Hub tokens are blotted out.

    Args:
        command: the command line as typed, quoted for a shell.
        metrics: `train_loss`, `eval_loss` and whatever else was measured; the card says that quality was not
            measured unless a name speaks of an accuracy, a kNN or a probe.
        native_root_problem: why the folder holds no native encoder, if it does not (`hub.export`).
        panel, curve: pictures in `folder`, relative to it.

    Raises:
        ValueError: a picture is not in `folder`.
    """
    on_hub = base_model is not None and _HUB_ID.fullmatch(base_model) is not None and not Path(base_model).exists()
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["masked-image-modeling", "self-supervised-learning", method],
        license=license,
        base_model=base_model if on_hub else None,
    )
    card = ModelCard.from_template(
        card_data,
        template_str=_TEMPLATE,
        model_name=shorten_paths(model_name),
        checkpoint=model_name if _HUB_ID.fullmatch(model_name) else "path/to/this/folder",
        base_model=base_model and shorten_paths(base_model),
        method=method,
        paper=_PAPERS.get(method),
        native_root_problem=native_root_problem,
        patches="[:, 1:]" if has_class_token else "",
        command=shorten_command(command),
        metrics=_rows({_METRIC_NAMES.get(name, name): value for name, value in metrics.items()}),
        quality_is_measured=any(word in name.lower() for name in metrics for word in _QUALITY_WORDS),
        data_summary=_rows(data_summary),
        versions=_rows(versions),
        recipe=[(name, _cell(value)) for name, value in _flatten(recipe)],
        panel=_picture(folder, panel),
        curve=_picture(folder, curve),
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def shorten_command(command: str) -> str:
    """`shorten_paths` of each word of a shell command, so that a path may contain spaces."""
    try:
        words = shlex.split(command)
    except ValueError:  # an unpaired quote: not a command that a shell would run, but still to be shown
        words = command.split()
    return shlex.join(shorten_paths(word) for word in words)


def shorten_paths(text: str) -> str:
    """Keep the last component of each absolute path in a text (others name the user and the machine), and no token."""
    return _TOKEN.sub("hf_...", _FOLDERS.sub("", text))


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(_cell(name), _cell(value)) for name, value in _flatten(facts)]


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _cell(value: Any) -> str:
    """A value as it would stand in a recipe, made safe for a Markdown table."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value) or "none"
    text = shorten_paths(str(value))
    return " ".join(re.sub(r"([\\|<>*_`\[\]])", r"\\\1", text).split())


def _picture(folder: Path, picture: str | None) -> str | None:
    if picture is None:
        return None
    if Path(picture).is_absolute() or not (folder / picture).is_file():
        raise ValueError(f"There is no picture {picture!r} in {folder}; give its path relative to the card's folder.")
    return quote(Path(picture).as_posix())

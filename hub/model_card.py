"""Write the README.md of an exported model: how to load it, how it was made, what is known about it and what not."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from hub.card_results import as_results, eval_results, read_results, results_section, with_results
from hub.card_rules import HUB_ID, check_card
from hub.citations import PAPERS
from hub.redaction import shorten_command, shorten_paths

__all__ = ["card_for", "shorten_command", "shorten_paths", "write_model_card"]

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_ELSEWHERE = "path/to/this/folder"
_CHECKPOINT_LINE = re.compile(r'^checkpoint = ".*"$', re.MULTILINE)
_METRIC_NAMES = {"train_loss": "training loss", "eval_loss": "held-out loss"}


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
    datasets: Sequence[str] = (),
    num_extra_tokens: int = 1,
    pools_mean: bool = False,
    native_root_problem: str | None = None,
    classes: Sequence[str] = (),
    from_scratch: bool = False,
    unfinished: str | None = None,
    seen_in_training: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write `folder/README.md`. Absolute paths keep their last component only, and Hub tokens are blotted out.

    What `folder/metrics.json` holds goes into a table and into the metadata, else what was seen in training; without
    both the card says that the quality of the features was not measured.

    Args:
        command: the command line as typed, quoted for a shell.
        model_name: an id of the Hub (then the examples load from there) or any other name.
        metrics: `train_loss`, `eval_loss` and what else was seen in training.
        datasets: what it was trained on; ids of the Hub are linked.
        num_extra_tokens: those before the patches: a class token, or none.
        pools_mean: the encoder's pooler normalizes the mean of the patches, instead of taking the class token.
        native_root_problem: why the folder holds no native encoder, if it does not (`hub.export`).
        classes: names of the classes, for a classifier.
        from_scratch: a classifier's weights were random before its training.
        unfinished: a sentence in front of all others, while training goes on.
        seen_in_training: entries as `metrics.json` has them.
        panel, curve: pictures in `folder`, relative to it.

    Raises:
        ValueError: a picture is not in `folder`, or the Hub would refuse the card (`hub.card_rules`).
    """
    results = read_results(folder) or as_results(seen_in_training)
    on_hub = model_name if HUB_ID.fullmatch(model_name) else None
    title = shorten_paths(model_name).split("/")[-1]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if classes else "image-feature-extraction",
        tags=None if from_scratch else ["masked-image-modeling", "self-supervised-learning", method],
        license=license,
        base_model=base_model if base_model and _is_on_hub(base_model) else None,
        datasets=[name for name in datasets if _is_on_hub(name)] or None,
        model_name=title if results else None,  # of `model-index`
        eval_results=eval_results(results) or None,
    )
    paper = PAPERS.get(method)
    linked = f", [{paper.title}](https://arxiv.org/abs/{paper.arxiv})" if paper else ""
    card = ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        title=title,
        checkpoint=on_hub or _ELSEWHERE,
        base_model=base_model and shorten_paths(base_model),
        method=method,
        method_in_words=f" ({method}{linked})",
        paper=paper,
        classes=[_cell(name) for name in classes],
        from_scratch=from_scratch,
        unfinished=unfinished,
        native_root_problem=native_root_problem,
        patches=f"[:, {num_extra_tokens}:]" if num_extra_tokens else "",
        pools_mean=pools_mean,
        command=shorten_command(command),
        metrics=_rows({_METRIC_NAMES.get(name, name): value for name, value in metrics.items()}),
        measured=results_section(results),
        data_summary=_rows(data_summary),
        versions=_rows(versions),
        recipe=[(name, _cell(value)) for name, value in _flatten(recipe)],
        panel=_picture(folder, panel),
        curve=_picture(folder, curve),
    )
    text = str(card)
    check_card(text)
    (folder / "README.md").write_text(text, encoding="utf-8")


def card_for(folder: Path, repo_id: str) -> str:
    """The card in `folder` as it goes to `repo_id`: loading from there, with the results measured since.

    Raises:
        ValueError: there is no card, or the Hub would refuse it.
    """
    file = folder / "README.md"
    if not file.is_file():
        raise ValueError(
            f"{folder} has no README.md, which every model needs: run_pretraining.py writes one; beside converted "
            "weights write one yourself, with whose they are and their license"
        )
    text = file.read_text(encoding="utf-8")
    check_card(text)
    text = _CHECKPOINT_LINE.sub(lambda _: f"checkpoint = {json.dumps(repo_id)}", text)
    if results := read_results(folder):
        card = ModelCard(with_results(text, results))
        card.data["model_name"] = card.data.get("model_name", repo_id.split("/")[-1])
        card.data["eval_results"] = eval_results(results) or None
        text = str(card)
        check_card(text)
    return text


def _is_on_hub(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


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

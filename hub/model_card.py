"""Write the model card (README.md) of an exported model."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from hub.card_results import as_results, eval_results, read_results, results_section, with_results
from hub.card_rules import HUB_ID, check_card
from hub.markdown import code, escape
from hub.redaction import shorten_command, shorten_paths

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_ELSEWHERE = "path/to/this/folder"
_CHECKPOINT_LINE = re.compile(r'^checkpoint = ".*"$', re.MULTILINE)
_METRIC_NAMES = {"train_loss": "training loss", "eval_loss": "validation loss"}


class TaskCard(NamedTuple):
    """The parts of a fine-tuned model's card that depend on its task.

    Args:
        kind: What the model is, as the start of a sentence.
        usage: Markdown with examples, in which a line `checkpoint = ""` is filled in.
        limitations: A sentence about what the model is for.
    """

    pipeline_tag: str
    kind: str
    usage: str
    limitations: str
    caption: str
    classes: Sequence[str] = ()


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
    has_pooler: bool = True,
    has_classifier: bool = True,
    exported: str = "encoder",
    panel_caption: str = "Predictions of the model",
    native_root_problem: str | None = None,
    task: TaskCard | None = None,
    from_scratch: bool = False,
    unfinished: str | None = None,
    warning: str | None = None,
    online_results: Sequence[Mapping[str, Any]] = (),
    usage: str = "",
) -> None:
    """Write `folder/README.md`, with absolute paths shortened and Hub tokens removed.

    The table of results and the metadata come from `folder/metrics.json`, or else from `online_results`; without
    both, the card states that the quality of the features was not measured.

    Args:
        command: The command line as typed, quoted for a shell.
        model_name: A Hub id, from which the examples then load, or any other name.
        metrics: `train_loss`, `eval_loss` and other metrics of the training.
        panel: A figure in `folder`, relative to it; so is `curve`.
        panel_caption: What it shows, if there is no `task` that says it.
        datasets: The training data; Hub ids are linked.
        num_extra_tokens: Number of tokens before the patches: 1 for a class token, else 0.
        pools_mean: Whether the encoder's pooler normalizes the mean of the patches rather than the class token.
        has_pooler: Whether the encoder has a `pooler_output` at all.
        has_classifier: Whether transformers has an image classifier with this encoder.
        exported: Name of the encoder in the pre-training model, such as "teacher".
        native_root_problem: Why there is no native encoder in the folder, if so (`hub.export`).
        task: The task of a fine-tuned model; None for an encoder.
        from_scratch: Whether a fine-tuned model was trained from random weights.
        unfinished: A sentence at the top of the card while training continues.
        warning: What is wrong with the measurements, if anything.
        online_results: Results of the online evaluation, as entries of `metrics.json`.
        usage: Markdown in place of the example of an encoder of photographs, as in `TaskCard`.

    Raises:
        ValueError: If a figure is not in `folder`, or the Hub would refuse the card (`hub.card_rules`).
    """
    results = read_results(folder) or as_results(online_results)
    title = shorten_paths(model_name).split("/")[-1]
    checkpoint = model_name if HUB_ID.fullmatch(model_name) else _ELSEWHERE
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task.pipeline_tag if task else "image-feature-extraction",
        tags=None if from_scratch else ["masked-image-modeling", "self-supervised-learning", method],
        license=license,
        base_model=base_model if base_model and _is_on_hub(base_model) else None,
        datasets=[name for name in datasets if _is_on_hub(name)] or None,
        model_name=title if results else None,  # of `model-index`
        eval_results=eval_results(results, task.pipeline_tag if task else None) or None,
    )
    from modeling import CONFIGS  # brings torch, which hub.push does without

    paper = CONFIGS[method].paper if method in CONFIGS else None
    linked = f", [{paper.title}](https://arxiv.org/abs/{paper.arxiv})" if paper else ""
    card = ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        title=escape(title),
        checkpoint=checkpoint,
        base_model=base_model and code(base_model),
        method=method,
        method_in_words=f" ({method}{linked})",
        paper=paper,
        task=task,
        usage=_with_checkpoint((task.usage if task else usage).strip(), checkpoint),
        classes=[_cell(name) for name in task.classes] if task else [],
        from_scratch=from_scratch,
        unfinished=unfinished,
        warning=warning,
        native_root_problem=native_root_problem,
        patches=f"[:, {num_extra_tokens}:]" if num_extra_tokens else "",
        pools_mean=pools_mean,
        has_pooler=has_pooler,
        has_classifier=has_classifier,
        exported=exported,
        command=shorten_command(command),
        metrics=_rows({_METRIC_NAMES.get(name, name): value for name, value in metrics.items()}),
        measured=results_section(results),
        data_summary=_rows(data_summary),
        versions=_rows(versions),
        recipe=[(name, _cell(value)) for name, value in _flatten(recipe)],
        panel=_figure(folder, panel),
        panel_caption=task.caption if task else panel_caption,
        curve=_figure(folder, curve),
    )
    text = str(card)
    check_card(text)
    (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def card_for(folder: Path, repo_id: str) -> str:
    """Return the card in `folder` for `repo_id`: the examples load from there, and the results are up to date.

    Raises ValueError if there is no card, or the Hub would refuse it.
    """
    file = folder / "README.md"
    if not file.is_file():
        raise ValueError(
            f"{folder} has no README.md, which every model needs: run_pretraining.py writes one; for converted "
            "weights write one that names their authors and license"
        )
    text = file.read_text(encoding="utf-8")
    check_card(text)
    text = _with_checkpoint(text, repo_id)
    if results := read_results(folder):
        card = ModelCard(with_results(text, results))
        card.data["model_name"] = card.data.get("model_name", repo_id.split("/")[-1])
        card.data["eval_results"] = eval_results(results, card.data.get("pipeline_tag")) or None
        text = str(card)
        check_card(text)
    return text


def _with_checkpoint(text: str, checkpoint: str) -> str:
    return _CHECKPOINT_LINE.sub(lambda _: f"checkpoint = {json.dumps(checkpoint)}", text)


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
    """Format a value as in a recipe, escaped for a Markdown table."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value) or "none"
    return escape(str(value))


def _figure(folder: Path, figure: str | None) -> str | None:
    if figure is None:
        return None
    if Path(figure).is_absolute() or not (folder / figure).is_file():
        raise ValueError(f"{folder} has no figure {figure!r}; its path must be relative to the card's folder")
    return quote(Path(figure).as_posix())

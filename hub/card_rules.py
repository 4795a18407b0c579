"""Check the YAML block of a model card against the Hub's rules before anything is uploaded.

Rules: https://github.com/huggingface/hub-docs/blob/main/modelcard.md and docs/hub/repositories-licenses.md there.
"""

import difflib
import re
from typing import Any

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

# docs/hub/repositories-licenses.md of 2026-08-22.
_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_BLOCK = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\s*?(\r?\n|\Z)", re.DOTALL)
_STRINGS = ("library_name", "pipeline_tag", "license", "license_name", "license_link")
_LISTS_OF_STRINGS = ("tags", "datasets", "base_model", "metrics")


def license_problem(name: str) -> str | None:
    """Return why the Hub would refuse this license, or None."""
    if name in LICENSES:
        return None
    close = difflib.get_close_matches(name.lower(), LICENSES, n=1)
    hint = f"did you mean {close[0]}?" if close else "use other for a license that is not in the Hub's list"
    return f"license is {name!r}, which the Hub does not know; {hint}"


def check_card(text: str) -> None:
    """Check the text of a card. Raises ValueError with every reason for which the Hub would refuse it."""
    block = _BLOCK.match(text)
    if block is None:
        raise ValueError(
            "the card has no metadata: README.md must start with a block of YAML between two lines of ---"
        )
    try:
        data = yaml.load(block[1], _UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"the card's metadata cannot be read as YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"the card's metadata is {type(data).__name__}, expected a mapping")
    if problems := [*_wrong_types(data), *_wrong_license(data), *_wrong_ids(data), *_wrong_model_index(data)]:
        raise ValueError(f"the Hub would refuse the card: {'; '.join(problems)}")


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, as the Hub does; by default the last one wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"duplicate key {twice[0]}", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _wrong_types(data: dict[str, Any]) -> list[str]:
    problems = [f"{key} is {data[key]!r}, expected a string" for key in _STRINGS if not _is_string(data.get(key, "x"))]
    for name in _LISTS_OF_STRINGS:
        value = data.get(name, [])
        if not _is_string(value) and not (isinstance(value, list) and all(map(_is_string, value))):
            problems.append(f"{name} is {value!r}, expected a list of strings")
    return problems


def _wrong_license(data: dict[str, Any]) -> list[str]:
    name = data.get("license")
    if not isinstance(name, str):
        return []
    if name == "other" and not _is_string(data.get("license_name")):
        return ["license is other, which requires license_name"]
    problem = license_problem(name)
    return [problem] if problem else []


def _wrong_ids(data: dict[str, Any]) -> list[str]:
    problems = []
    for name, pattern in (("base_model", HUB_ID), ("datasets", re.compile(r"\w[\w.-]*(/\w[\w.-]*)?"))):
        values = data.get(name, [])
        for value in [values] if isinstance(values, str) else values if isinstance(values, list) else []:
            if isinstance(value, str) and not pattern.fullmatch(value):
                problems.append(f"{name} is {value!r}, expected a Hub id")
    return problems


def _wrong_model_index(data: dict[str, Any]) -> list[str]:
    index = data.get("model-index")
    if index is None:
        return []
    try:
        _, results = model_index_to_eval_results(index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"model-index has a missing or misplaced {error}"]
    problems = []
    for result in results:
        named = (result.task_type, result.dataset_type, result.dataset_name, result.metric_type)
        if not all(map(_is_string, named)):
            problems.append(f"model-index has {named!r} where task, data set and metric must be strings")
        value = result.metric_value
        if isinstance(value, bool) or not isinstance(value, int | float | str) or value != value:
            problems.append(f"model-index has {result.metric_type} {value!r}, expected a number")
    return problems


def _is_string(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())

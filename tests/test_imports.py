"""Who may import whom: each folder has one reason to change, and a file for the Hub stands on its siblings only."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"modeling", "data", "training", "evaluation", "hub", "commands", "tasks"}
ALLOWED = {
    "modeling": set(),
    "data": set(),
    "training": {"data"},  # the counters that make a run resumable are the data's
    "evaluation": {"data"},
    "hub": {"modeling"},
    "commands": {"data", "training", "evaluation", "hub", "modeling"},
    "tasks": {"commands", "data", "training", "evaluation", "hub", "modeling"},
}
# Leaf mathematics and plain data: every folder may import them.
LEAVES = {f"modeling.{name}" for name in ("patches", "ema", "schedules", "processes", "feature_panel")}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc"}
LIBRARY_NAMES = {"datasets", "tokenizers", "accelerate", "evaluate", "transformers"}

FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> set[tuple[int, str]]:
    """(level, module) of each import statement; level counts the leading dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.level, node.module or ""))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_folders__import_only_what_their_row_allows(path):
    folder = path.relative_to(ROOT).parts[0]
    modules = {module for level, module in imports_of(path) if level == 0} - LEAVES
    ours = {module.split(".")[0] for module in modules} & (FOLDERS | {"run_pretraining"})
    assert ours <= ALLOWED[folder] | ({folder} if folder != "modeling" else set())


@pytest.mark.parametrize("path", sorted((ROOT / "modeling").glob("*.py")), ids=lambda path: path.name)
def test_modeling__is_flat_and_names_its_siblings_so_that_the_hub_copies_them(path):
    assert not [child for child in (ROOT / "modeling").iterdir() if child.is_dir() and child.name != "__pycache__"]
    for level, module in imports_of(path):
        assert level == 0 or (level == 1 and module and "." not in module), f"{path.name}: from {'.' * level}{module}"
    docstrings = re.findall(r'"""(.*?)"""', path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not any(re.search(r"^\s*from\s+\.", text, flags=re.MULTILINE) for text in docstrings)


def test_names__nothing_is_called_utils_or_like_a_library():
    names = {path.stem for path in FILES} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not names & FORBIDDEN_NAMES
    assert not {path.name for path in ROOT.iterdir() if path.is_dir()} & LIBRARY_NAMES

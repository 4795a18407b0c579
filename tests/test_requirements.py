"""The ranges of requirements.txt, the two constraints files and the pre-commit hooks agree."""

import re

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

LIBRARIES = "requirements.txt"


def requirements(file: str) -> dict[str, Requirement]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {requirement.name: requirement for requirement in parsed}


def pins(file: str) -> dict[str, str]:
    found = {}
    for name, requirement in requirements(file).items():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        found[name] = specifier.version
    return found


def test_constraints__pin_every_requirement_and_nothing_else():
    assert set(pins("constraints.txt")) == set(requirements(LIBRARIES)) | set(requirements("requirements-dev.txt"))
    assert set(requirements(LIBRARIES)) < set(pins("constraints-oldest.txt"))
    assert pins("constraints.txt")["torch"] == "2.13.0"


@pytest.mark.parametrize("name", requirements(LIBRARIES))
def test_range__begins_at_the_oldest_pin_and_contains_the_newest(name):
    specifiers = requirements(LIBRARIES)[name].specifier
    oldest, newest = pins("constraints-oldest.txt")[name], pins("constraints.txt")[name]
    assert {specifier.operator for specifier in specifiers} == {">=", "<"}
    (lower,) = (specifier for specifier in specifiers if specifier.operator == ">=")
    assert oldest in specifiers
    assert newest in specifiers
    assert Version(lower.version) == Version(oldest)


def test_hooks__have_the_versions_of_the_constraints():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    revisions = {re.sub(r"-pre-commit$", "", repo["repo"].rsplit("/", 1)[1]): repo["rev"] for repo in hooks}
    for tool in ("ruff", "codespell"):
        assert revisions[tool] == f"v{pins('constraints.txt')[tool]}"

"""Upload an output folder to the Hub: `python -m hub.push DIR --to org/name [--private]`.

The encoder at the root, `pretraining/` with its code files, the processor, the card and its figures are uploaded in
one commit, so that an interrupted push leaves the repository unchanged. Checkpoints, logs, settings and
TrainingArguments are not uploaded, and absolute paths in JSON files lose their folders.
"""

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from hub.card_rules import HUB_ID
from hub.model_card import card_for
from hub.redaction import shorten_values

PRETRAINING = "pretraining"  # as in `hub.export.native`, whose import would load torch
_ROOT_FILES = ("config.json", "preprocessor_config.json", "metrics.json", "LICENSE*", "*.png", "*.onnx")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_TEXT_FILES = (".json", ".md", ".py", ".yaml", ".txt")
# Seconds before each further attempt. In every attempt, the Hub's client itself tries a request up to five times.
WAITS = (5.0, 30.0)
# Seconds without an answer; the Hub's client would wait forever.
_TIMEOUT = 60.0
_TEMPORARY = (408, 409, 412, 429)  # HTTP statuses below 500 that are worth another attempt
_HELP_BY_STATUS = {
    401: "no valid Hub token: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token has no write permission for this repository or organization",
    404: "the repository does not exist, or the token has no access to it",
}


class HubError(RuntimeError):
    """The Hub could not be reached or refused a request; `is_temporary` if another attempt may succeed."""

    def __init__(self, message: str, is_temporary: bool) -> None:
        super().__init__(message)
        self.is_temporary = is_temporary


class Repository:
    """A model repository to write to.

    Args:
        private: Whether to create it as private; if True, a public repository is refused.
        token: None for HF_TOKEN or the stored login.
        revision: An existing branch; None for the main branch.
    """

    def __init__(
        self, repo_id: str, private: bool | None = None, token: str | None = None, revision: str | None = None
    ) -> None:
        check_repo_id(repo_id)
        self.repo_id, self.private, self.revision = repo_id, private, revision
        self.api, self.waits = HfApi(token=token), WAITS

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo_id}"

    def create(self) -> None:
        """Create the repository unless it exists; raises HubError if it is public although `private` is set."""
        self._with_retries(self._create)

    def _create(self) -> list[str]:
        """Create the repository unless it exists, and return the names of its files."""
        with explained(self.repo_id):
            self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            info = self.api.model_info(self.repo_id, revision=self.revision, timeout=_TIMEOUT)
        if self.private and not info.private:
            raise HubError(
                f"{self.repo_id} is public, but a private repository was requested: make it private in its settings "
                "on the Hub, or do not request that",
                is_temporary=False,
            )
        return [file.rfilename for file in info.siblings or []]

    def push(self, folder: Path, message: str, checkpoint: str | None = None) -> str:
        """Upload the public files of `folder`, and its subfolder `checkpoint` if given; return the repository's URL.

        Raises:
            ValueError: If the folder has no model, the Hub would refuse its card, or a file contains the token.
            HubError: If the upload fails; the repository is unchanged.
        """
        files = self._contents(folder, checkpoint)
        self._with_retries(lambda: self._commit(files, (PRETRAINING, checkpoint), message))
        return self.url

    def _commit(self, files: dict[str, bytes | str], whole_folders: tuple[str | None, ...], message: str) -> None:
        """Add or replace `files`, and delete everything else in `whole_folders`."""
        stale = [name for name in self._create() if name.partition("/")[0] in whole_folders and name not in files]
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        deletions = [CommitOperationDelete(path_in_repo=name) for name in stale]
        with explained(self.repo_id):
            self.api.create_commit(
                self.repo_id, [*deletions, *additions], commit_message=message, revision=self.revision
            )

    def finishing_command(self, folder: Path) -> str:
        """Return the command that uploads `folder` later."""
        words = ["python", "-m", "hub.push", str(folder), "--to", self.repo_id]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision else []
        return shlex.join(words)

    def _with_retries(self, attempt: Callable[[], object]) -> None:
        for wait in self.waits:
            try:
                attempt()
            except HubError as error:
                if not error.is_temporary:
                    raise
                time.sleep(wait)
            else:
                return
        attempt()

    def _contents(self, folder: Path, checkpoint: str | None) -> dict[str, bytes | str]:
        """Return content, or the file on disk if it is uploaded unchanged, by path in the repository."""
        paths = public_files(folder)
        if checkpoint is not None:
            paths += sorted(path for path in (folder / checkpoint).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): _redacted(path) for path in paths}
        files["README.md"] = card_for(folder, self.repo_id).encode()
        token = self.api.token or get_token()
        for name, content in files.items():
            if token and name.endswith(_TEXT_FILES):
                text = content if isinstance(content, bytes) else Path(content).read_bytes()
                if str(token).encode() in text:
                    raise ValueError(f"{name} contains your Hub token, so nothing was pushed: remove it there")
        return files


def check_repo_id(repo_id: str) -> None:
    """Check that `repo_id` is a valid Hub repository id.

    Raises:
        ValueError: If it is not.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a valid Hub repository id: {error}") from None
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is not a valid Hub repository id; expected organization/name or user/name")


def public_files(folder: Path) -> list[Path]:
    """Return the files of an output folder that are uploaded, except README.md; raises ValueError without a model."""
    whole = [path for path in sorted((folder / PRETRAINING).rglob("*")) if path.is_file()]
    root = [path for pattern in (*_ROOT_FILES, *_WEIGHTS) for path in sorted(folder.glob(pattern))]
    code = _code_files(folder, whole)
    if not any(path.name == "config.json" for path in [*root, *whole]):
        unfinished = " (its training is not finished)" if any(folder.glob("checkpoint-*")) else ""
        raise ValueError(f"{folder} has no finished model{unfinished}: config.json is missing")
    return [*root, *code, *whole]


def _code_files(folder: Path, whole: Sequence[Path]) -> list[Path]:
    """Return the code files at the root: those of the whole model, those of the root's config, and their imports."""
    config = folder / "config.json"
    auto_map = json.loads(config.read_text(encoding="utf-8")).get("auto_map", {}) if config.is_file() else {}
    waiting = [path.name for path in whole if path.suffix == ".py"]
    waiting += [f"{reference.partition('.')[0]}.py" for reference in auto_map.values() if isinstance(reference, str)]
    found: set[Path] = set()
    while waiting:
        path = folder / waiting.pop()
        if path.is_file() and path not in found:
            found.add(path)
            waiting += [f"{name}.py" for name in re.findall(r"^from \.(\w+) import", path.read_text(), re.MULTILINE)]
    return sorted(found)


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Limit the waiting time of requests and turn every error into a HubError with the reason and the fix."""
    get_session().timeout = _TIMEOUT
    try:
        yield
    # The client raises errors of four libraries, and ValueError or KeyError for a truncated answer.
    except Exception as error:
        raise _as_hub_error(error, repo_id) from error


def _redacted(path: Path) -> bytes | str:
    """Return JSON without the folders of absolute paths, and the path of any other file."""
    if path.suffix != ".json":
        return str(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    shortened = shorten_values(content)
    return str(path) if shortened == content else (json.dumps(shortened, indent=2) + "\n").encode()


def _as_hub_error(error: Exception, repo_id: str) -> HubError:
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set: unset it to use the Hub", is_temporary=False)
    if not isinstance(error, HfHubHTTPError):  # no connection, too slow, or a truncated answer
        return HubError(f"{repo_id}: {_first_line(error)}", is_temporary=True)
    status = error.response.status_code
    reason = _HELP_BY_STATUS.get(status, _first_line(error))
    is_temporary = status >= 500 or status in _TEMPORARY
    return HubError(f"{repo_id}: {reason} (HTTP status {status})", is_temporary)


def _first_line(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m hub.push", description="Upload an output folder to the Hub.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of a finished run")
    parser.add_argument("--to", required=True, metavar="org/name", help="repository; created if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="create a private repository")
    parser.add_argument("--revision", help="existing branch to push to (default: main)")
    options = parser.parse_args(argv)
    try:
        repository = Repository(options.to, options.private, revision=options.revision)
        print(repository.push(options.folder, f"Upload {options.folder.resolve().name}"))
    except (ValueError, HubError) as error:
        print(f"hub.push: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

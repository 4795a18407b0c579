"""Put an output folder on the Hub: `python -m hub.push DIR --to org/name [--private]`.

What goes up is the encoder at the root, `pretraining/`, the code files that loading it needs, the processor, the card
and its pictures, in one commit: a push that is cut leaves the repository as it was. What stays are checkpoints, logs,
settings, TrainingArguments, and folders of this machine in the files that do go.
"""

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from hub.card_rules import HUB_ID
from hub.model_card import card_for
from hub.redaction import shorten_values

_T = TypeVar("_T")
PRETRAINING = "pretraining"  # of `hub.export`, which would bring torch with it
_ROOT_FILES = ("config.json", "preprocessor_config.json", "metrics.json", "LICENSE*", "*.png", "*.onnx")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_TEXT_FILES = (".json", ".md", ".py", ".yaml", ".txt")
# Seconds before a further attempt. Within each, the Hub's client itself repeats a request up to five times.
WAITS = (5.0, 30.0)
# Seconds without an answer; the Hub's client would wait for ever.
_TIMEOUT = 60.0
_PASSING = (408, 409, 412, 429)  # HTTP statuses below 500 that another attempt may not meet
_HELP_BY_STATUS = {
    401: "there is no token that the Hub knows: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: it needs the right to write, in this organization",
    404: "there is no such repository, or the token may not see it",
}


class HubError(RuntimeError):
    """The Hub could not be reached or said no, in words; `may_pass`: another attempt has a chance."""

    def __init__(self, message: str, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class Repository:
    """A model repository and how to write to it.

    Args:
        private: for a repository that does not exist yet; one that is public is never written to if True.
        token: None for HF_TOKEN or the stored login.
        revision: an existing branch; None for the main one.

    Raises:
        ValueError: `repo_id` cannot be the id of a repository.
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
        """Make sure that it is there and as private as asked for.

        Raises:
            HubError: it is not there and cannot be made, or is public.
        """
        self._with_retries(self._create)

    def _create(self) -> list[str]:
        """Returns the names of the files in it."""
        with explained(self.repo_id):
            self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            info = self.api.model_info(self.repo_id, revision=self.revision, timeout=_TIMEOUT)
        if self.private and not info.private:
            raise HubError(
                f"{self.repo_id} is public, and a private one was asked for: make it private in its settings on the "
                "Hub, or leave that out",
                may_pass=False,
            )
        return [file.rfilename for file in info.siblings or []]

    def push(self, folder: Path, message: str, checkpoint: str | None = None) -> str:
        """Upload the public part of `folder`, and its subfolder `checkpoint` if given; returns the address.

        Raises:
            ValueError: the folder holds no model, the Hub would refuse its card, or a file holds the token.
            HubError: the upload did not succeed; the repository is as it was.
        """
        files = self._contents(folder, checkpoint)
        self._with_retries(lambda: self._commit(files, [PRETRAINING, checkpoint or PRETRAINING], message))
        return self.url

    def _commit(self, files: Mapping[str, bytes | str], whole_folders: Sequence[str], message: str) -> None:
        """Add or replace `files`; of `whole_folders` nothing else stays."""
        there = self._create()
        gone = [name for name in there if name.partition("/")[0] in whole_folders and name not in files]
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        deletions = [CommitOperationDelete(path_in_repo=name) for name in gone]
        with explained(self.repo_id):
            self.api.create_commit(
                self.repo_id, [*deletions, *additions], commit_message=message, revision=self.revision
            )

    def finishing_command(self, folder: Path) -> str:
        """What a person types to do later what did not work now."""
        words = ["python", "-m", "hub.push", str(folder), "--to", self.repo_id]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision else []
        return shlex.join(words)

    def _with_retries(self, attempt: Callable[[], _T]) -> _T:
        for wait in self.waits:
            try:
                return attempt()
            except HubError as error:
                if not error.may_pass:
                    raise
                time.sleep(wait)
        return attempt()

    def _contents(self, folder: Path, checkpoint: str | None) -> dict[str, bytes | str]:
        """Path in the repository -> content, or the file on disk where it goes up as it is."""
        paths = public_files(folder)
        if checkpoint is not None:
            paths += sorted(path for path in (folder / checkpoint).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): _redacted(path) for path in paths}
        files["README.md"] = card_for(folder, self.repo_id).encode()
        self._refuse_token(files)
        return files

    def _refuse_token(self, files: dict[str, bytes | str]) -> None:
        token = self.api.token or get_token()
        for name, content in files.items():
            if token and name.endswith(_TEXT_FILES):
                text = content if isinstance(content, bytes) else Path(content).read_bytes()
                if str(token).encode() in text:
                    raise ValueError(f"{name} holds your Hub token, so nothing was pushed: remove it there")


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError if this cannot be the id of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be a repository of the Hub: {error}") from None
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} cannot be a repository of the Hub; expected organization/name or user/name")


def public_files(folder: Path) -> list[Path]:
    """The files of an output folder that others need, README.md aside.

    Raises:
        ValueError: there is no finished model in it.
    """
    whole = [path for path in sorted((folder / PRETRAINING).rglob("*")) if path.is_file()]
    root = [path for pattern in (*_ROOT_FILES, *_WEIGHTS) for path in sorted(folder.glob(pattern))]
    code = [folder / path.name for path in whole if path.suffix == ".py" and (folder / path.name).is_file()]
    if not any(path.name == "config.json" for path in [*root, *whole]):
        unfinished = " (its training has not ended)" if any(folder.glob("checkpoint-*")) else ""
        raise ValueError(f"{folder} holds no finished model{unfinished}: there is no config.json in it")
    return [*root, *code, *whole]


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Inside, no request waits for ever, and what goes wrong becomes a HubError with the reason and the way on."""
    get_session().timeout = _TIMEOUT
    try:
        yield
    # The client raises errors of four libraries, and ValueError or KeyError for an answer that was cut.
    except Exception as error:
        raise _as_hub_error(error, repo_id) from error


def _redacted(path: Path) -> bytes | str:
    """JSON without folders of this machine; every other file as it is."""
    if path.suffix != ".json":
        return str(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    shortened = shorten_values(content)
    return str(path) if shortened == content else (json.dumps(shortened, indent=2) + "\n").encode()


def _as_hub_error(error: Exception, repo_id: str) -> HubError:
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set, so the Hub is not asked: unset it", may_pass=False)
    if not isinstance(error, HfHubHTTPError):  # no connection, too slow, or an answer that was cut
        return HubError(f"{repo_id}: {_first_line(error)}", may_pass=True)
    status = error.response.status_code
    reason = _HELP_BY_STATUS.get(status, _first_line(error))
    return HubError(f"{repo_id}: {reason} (HTTP status {status})", may_pass=status >= 500 or status in _PASSING)


def _first_line(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m hub.push", description="Put an output folder on the Hub.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of a finished run")
    parser.add_argument("--to", required=True, metavar="org/name", help="repository; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make it private (default: as the Hub's)")
    parser.add_argument("--revision", help="existing branch to push to (default: the main one)")
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

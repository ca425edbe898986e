"""The run's repository on the Hub: made before anything loads, so that a wrong token ends a run at its start, and
filled beside the run while that goes on.

What is uploaded is output_dir: the last model saved, tokenizer, model card, metrics and curves. Checkpoints go where
`hub_strategy` has them, and samples of generations stay here, as they quote evaluation rows. An upload that fails in
the middle of a run is reported and changes nothing; the last one raises, by when the model is on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import TrainerState
from transformers.trainer_utils import HubStrategy

from fastdpo.config import DPOConfig

logger = logging.getLogger(__name__)

NEVER_UPLOADED = ["_*", "checkpoint-*", ".checkpoint-*", "samples.md", "report.html", ".report.*"]


class Repository:
    """A model repository; one process of a run has to do with it."""

    def __init__(self, config: DPOConfig) -> None:
        self.config = config
        self.repo_id: str | None = None
        self.under_way: list[Future] = []

    def open(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes it, or finds it. Raises ValueError for a name or a token that the Hub does not take."""
        config: Any = self.config
        token, private = token or config.hub_token, config.hub_private_repo if private is None else private
        name = repository_name(config)
        try:
            self.repo_id = huggingface_hub.create_repo(name, token=token, private=private, exist_ok=True).repo_id
            if config.hub_revision and not config.hub_revision.startswith("refs/"):
                huggingface_hub.create_branch(self.repo_id, branch=config.hub_revision, token=token, exist_ok=True)
        except Exception as error:  # of the network, of the Hub, of a missing login: each library has its own
            raise ValueError(
                f"push_to_hub: the Hub does not give the repository {name!r} ({error}): check hub_model_id and "
                "hub_token, or log in with `hf auth login`"
            ) from error
        logger.info("hub: pushes to %s, %s", self.repo_id, config.hub_revision or "main")

    def before_checkpoint(self) -> None:
        """Waits for uploads of checkpoints that the next one may push out of `save_total_limit`."""
        if self.config.save_total_limit and self.config.hub_strategy in _WITH_CHECKPOINTS:
            self.finish()

    def push_checkpoint(self, directory: Path, state: TrainerState, write_model: Callable[[], None]) -> bool:
        """Starts the upload of what was just saved, as `hub_strategy` has it; `write_model` puts it into output_dir.
        -> whether there was anything to start.
        """
        config = self.config
        if not config.push_to_hub or config.hub_strategy == HubStrategy.END:
            return False
        if not config.hub_always_push and not all(job.done() for job in self.under_way):
            logger.info("hub: step %d is not pushed, the last push goes on (see hub_always_push)", state.global_step)
            return False
        write_model()
        message = f"Training in progress, step {state.global_step}"
        self._upload(message, Path(str(config.output_dir)), None, ignore_patterns=NEVER_UPLOADED)
        if config.hub_strategy in _WITH_CHECKPOINTS:
            last = config.hub_strategy == HubStrategy.CHECKPOINT
            self._upload(f"{message}, checkpoint", directory, "last-checkpoint" if last else directory.name)
        return True

    def push(
        self, message: str | None, blocking: bool = True, token: str | None = None, revision: str | None = None
    ) -> Any:
        """Uploads output_dir, after all that is under way; -> the commit, or its Future."""
        self.finish()
        directory = Path(str(self.config.output_dir))
        more = {"token": token or self.config.hub_token, "revision": revision or self.config.hub_revision}
        job = self._upload(message, directory, None, ignore_patterns=NEVER_UPLOADED, **more)
        if not blocking:
            return job
        self.under_way.remove(job)
        try:
            return job.result()
        except Exception as error:
            error.add_note(f"fastdpo: the model is saved in {directory}; trainer.push_to_hub() pushes it again")
            raise

    def finish(self) -> None:
        """Waits for all uploads; those that failed are reported."""
        for job in self.under_way:
            if error := job.exception():
                logger.warning("hub: a push failed (%s: %s); the run is not touched by it", type(error).__name__, error)
        self.under_way = []

    def _upload(self, message: str | None, folder: Path, path_in_repo: str | None, **more: Any) -> Future:
        options = {"token": self.config.hub_token, "revision": self.config.hub_revision, **more}
        job = huggingface_hub.upload_folder(
            repo_id=str(self.repo_id),
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=message,
            run_as_future=True,
            **options,
        )
        self.under_way.append(job)
        return job


_WITH_CHECKPOINTS = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


def repository_name(config: DPOConfig) -> str:
    """`hub_model_id`, else the name of output_dir. Raises ValueError where that is no name of a repository."""
    name = config.hub_model_id or Path(str(config.output_dir)).absolute().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        source = "hub_model_id" if config.hub_model_id else "the name of output_dir, which names the repository,"
        raise ValueError(f"{source} is {name!r}: {error} Set hub_model_id, such as 'me/model'.") from error
    return name

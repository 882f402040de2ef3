"""Keeps tokens and local paths out of the files that a trainer writes and uploads."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers import trainer as upstream
from transformers.trainer import TRAINING_ARGS_NAME


def public(arguments: TrainingArguments) -> TrainingArguments:
    """A copy of the arguments without tokens. Absolute paths are cut to their last part."""
    twin = copy.copy(arguments)
    for name, value in vars(arguments).items():
        setattr(twin, name, None if name.endswith("token") else _without_paths(value))
    return twin


def _without_paths(value: Any) -> Any:
    if isinstance(value, str | Path):
        return Path(value).name if os.path.isabs(value) else value
    if type(value) is dict:
        return {key: _without_paths(item) for key, item in value.items()}
    return [_without_paths(item) for item in value] if type(value) is list else value


class PublicUploads(Trainer):
    """A Trainer that saves training_args.bin without tokens and absolute paths, and does not upload it with the model.

    An uploaded checkpoint-N (hub_strategy="checkpoint") includes the file, because its manifest lists it.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        arguments, self.args = self.args, public(self.args)
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = arguments

    def save_state(self) -> None:
        best, run = self.state.best_model_checkpoint, Path(self.args.output_dir).absolute()
        if best is not None and Path(best).is_relative_to(run):
            self.state.best_model_checkpoint = str(Path(best).relative_to(run))
        try:
            super().save_state()
        finally:
            self.state.best_model_checkpoint = best

    def push_to_hub(self, *args: Any, **kwargs: Any):
        with self.arguments_kept_back():
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        arguments = self.args
        self.args = copy.copy(arguments)
        self.args.hub_token = None  # training_args.bin is pickled before the upload
        try:
            with self.arguments_kept_back(arguments.hub_token):
                super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self.args = arguments
        path = Path(arguments.output_dir) / TRAINING_ARGS_NAME
        if path.is_file():
            torch.save(public(arguments), path)

    @contextlib.contextmanager
    def arguments_kept_back(self, token: str | None = None) -> Iterator[None]:
        """Within this context, uploads of the output folder skip training_args.bin. `token`: for uploads without one.

        transformers hard-codes the patterns of skipped files in its methods, so its API is wrapped instead.
        """
        run, api = Path(self.args.output_dir).absolute(), upstream.hf_api

        def upload(*args: Any, folder_path: str, **kwargs: Any):
            if Path(folder_path).absolute() == run:
                kwargs["ignore_patterns"] = [*(kwargs.get("ignore_patterns") or ()), TRAINING_ARGS_NAME]
            kwargs["token"] = kwargs.get("token") or token
            return api().upload_folder(*args, folder_path=folder_path, **kwargs)

        upstream.hf_api = lambda: _Uploader(api(), upload)
        try:
            yield
        finally:
            upstream.hf_api = api


class _Uploader:
    """An HfApi whose `upload_folder` is replaced."""

    def __init__(self, api: Any, upload_folder: Any):
        self.api, self.upload_folder = api, upload_folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.api, name)

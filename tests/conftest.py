"""Settings of every test: no network, quiet transformers, the same seed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Read when transformers and tokenizers are imported: before anything else imports them.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread would only wait, busily
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch
from transformers.utils import logging

from hf_bnn import kernels
from hf_bnn.kernels import library

if kernels.available() == ("torch",):  # no C compiler was there: packed layers would warn, and warnings are errors
    os.environ.setdefault("HF_BNN_KERNEL", "torch")

logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """The backend that the test's parameter names."""
    with kernels.using(request.param):
        yield request.param


@pytest.fixture
def wants_threads(monkeypatch: pytest.MonkeyPatch):
    """Every product is worth threads, and torch's number of them is restored."""
    monkeypatch.setattr(library, "WORTH_THREADS", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def script_logging() -> Iterator[None]:
    """A run script sets the verbosity of datasets and transformers: it is undone after the module's tests."""
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging as transformers_logging

    before = datasets_logging.get_verbosity(), transformers_logging.get_verbosity()
    yield
    datasets_logging.set_verbosity(before[0])
    transformers_logging.set_verbosity(before[1])
    transformers_logging.reset_format()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder in which two processes of the worker have left their reports, and the reports."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).parent / "trainer_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", str(worker), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]

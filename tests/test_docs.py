"""The documentation builds without a warning, and shows the docstrings of every public name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_bnn

ROOT = Path(__file__).parents[1]
NOT_SHOWN = {"METHODS": "the table of methods, a dict"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "docs" / "mkdocs.yml", "-d", folder]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_documentation_builds_and_has_a_page_for_each_source(site: Path):
    pages = {path.stem for path in (ROOT / "docs" / "pages").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_api_page_describes_every_public_name(site: Path):
    text = (site / "api.html").read_text(encoding="utf-8")
    missing = [name for name in hf_bnn.__all__ if f'.{name}"' not in text]
    assert set(missing) == set(NOT_SHOWN)
    assert "&gt;&gt;&gt;" in text or 'class="gp"' in text


def test_doctests_become_blocks_and_text_stays(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(ROOT / "docs")
    from doctest_blocks import fenced

    assert fenced("Text.\n\n    >>> [1]\n    [1]\n\n    More.") == "Text.\n\n```pycon\n>>> [1]\n[1]\n```\n\nMore."
    assert fenced("Text: a >>> b.") == "Text: a >>> b."

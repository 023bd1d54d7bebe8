"""The stories of the cluster: `*.txt` beside this file, in the words of `story.Story`."""

import pathlib

import pytest

from tests import transcript
from tests.simulator.story import Story

STORIES = sorted(pathlib.Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path, request):
    rewrite = request.config.getoption("--rewrite", default=False)
    transcript.check(path, Story().run, rewrite)


def test_a_story_that_differs_fails_and_can_be_rewritten(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("# Why.\nstart 2 experts=2 slots=1\n----\nepoch=7 0:active\n")
    with pytest.raises(AssertionError, match="--rewrite"):
        transcript.check(path, Story().run, rewrite=False)
    transcript.check(path, Story().run, rewrite=True)
    transcript.check(path, Story().run, rewrite=False)
    assert path.read_text().endswith("epoch=1 0:active 1:active\n")
    assert path.read_text().startswith("# Why.\nstart 2 experts=2 slots=1\n----\n")


def test_a_block_without_an_expectation_is_refused():
    with pytest.raises(ValueError, match="lack a line"):
        transcript.parse("kill 2\n\nkill 3\n----\n")

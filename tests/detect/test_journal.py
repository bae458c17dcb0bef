from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from ddetr_cli.classes import ClassTable
from ddetr_cli.detect.archives import Member
from ddetr_cli.detect.journal import Finished, Journal, RunHeader, result_from, result_line
from ddetr_cli.detect.remote import Remote
from ddetr_cli.detect.results import ImageResult
from ddetr_cli.detect.sources import Input
from ddetr_cli.detect.video import Frame, Video
from ddetr_cli.errors import OutputError, UsageError

INPUTS = [Input(Path(f"in/{name}"), name) for name in ("a.jpg", "b.jpg", "bad\udcff\n.jpg")]
CLASSES = ClassTable((1, 7), ("cat", None))
HEADER = RunHeader.of(
    INPUTS, CLASSES, info={"model": "m"}, options={"threshold": 0.5, "precision": "fp32"}, formats=["coco"]
)


def result(number: int, failure: str | None = None) -> ImageResult:
    if failure:
        return ImageResult(INPUTS[number], number + 1, failure=failure)
    box = (0.1 + number, -1e-7, math.pi, 1e22 / 3)
    return ImageResult(INPUTS[number], number + 1, (640, 480), [box], [1 / 3], [1], dropped=2)


def test_a_result_comes_back_from_its_line_to_the_last_bit_but_for_its_time() -> None:
    for number in range(3):
        whole = replace(result(number), seconds=1.5)
        assert result_from(json.loads(result_line(number, whole))) == result(number)
    failed = result(0, "no such file. Check the path.")
    assert result_from(json.loads(result_line(0, failed))) == failed


@pytest.mark.parametrize(
    "origin", [Member(Path("in/x\udcff.tar"), 512, 3000), Remote("https://example.org/a.jpg?b=1")]
)
def test_an_input_within_an_archive_or_behind_a_url_comes_back_whole(origin: Member | Remote) -> None:
    there = ImageResult(Input(Path("in/x.tar/a.jpg"), "x.tar/a.jpg", origin=origin), 1, (4, 3))
    assert result_from(json.loads(result_line(0, there))) == there


def test_the_frames_of_one_video_come_back_sharing_it(tmp_path: Path) -> None:
    video = Video(Path("clip.mp4"))
    journal = Journal.begin(tmp_path / "j", HEADER)
    for number in range(2):
        item = Input(Path(f"clip.mp4/{number}"), f"clip.mp4/{number}", origin=Frame(video, 5 * number))
        journal.add(number, ImageResult(item, number, (4, 3)))
    journal.close()
    finished = Finished([tmp_path / "j"])
    first, second = (finished.read(number).input.origin for number in range(2))
    assert isinstance(first, Frame)
    assert isinstance(second, Frame)
    assert (first.video.path, first.number, second.number) == (video.path, 0, 5)
    assert first.video is second.video


def test_what_was_added_is_finished_when_the_run_goes_on(tmp_path: Path) -> None:
    journal = Journal.begin(tmp_path / "j", HEADER)
    for number in (0, 1, 2):
        journal.add(number, result(number))
    journal.close()
    again = Journal.go_on([tmp_path / "j"], HEADER)
    assert [number in again.finished for number in range(4)] == [True, True, True, False]
    assert [again.finished.read(number) for number in range(3)] == [result(number) for number in range(3)]


def test_a_line_that_a_kill_cut_short_is_cut_off_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal.begin(path, HEADER)
    journal.add(0, result(0))
    kept = path.stat().st_size
    journal.add(1, result(1))
    journal.close()
    whole = path.read_bytes()
    for length in range(kept, len(whole)):
        path.write_bytes(whole[:length])
        again = Journal.go_on([path], HEADER)
        assert len(again.finished) == 1
        again.add(1, result(1))
        again.close()
        assert path.read_bytes() == whole


def test_failures_are_tried_again_unless_they_are_to_be_skipped_and_the_last_word_counts(tmp_path: Path) -> None:
    journal = Journal.begin(tmp_path / "j", HEADER)
    journal.add(0, result(0, "gone"))
    journal.add(1, result(1, "gone"))
    journal.add(1, result(1))
    journal.close()
    assert [n in Journal.go_on([tmp_path / "j"], HEADER).finished for n in (0, 1)] == [False, True]
    assert [n in Journal.go_on([tmp_path / "j"], HEADER, skip_failed=True).finished for n in (0, 1)] == [True, True]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"options": {"threshold": 0.3, "precision": "fp32"}}, r"threshold 0\.5, not 0\.3"),
        ({"options": {"threshold": 0.5, "precision": "fp32", "tiles": 512}}, "tiles none, not 512"),
        ({"formats": ["coco", "images"]}, "format coco, not coco,images"),
        ({"shard": (1, 2)}, "shard 1/1, not 1/2"),
        ({"images": 4}, "3 inputs, not 4"),
        ({"names_sha256": "0"}, "inputs of other names, or in another order"),
        ({"classes": [[1, "cat"]]}, "other classes"),
    ],
)
def test_a_run_that_differs_is_refused_and_the_difference_named(
    tmp_path: Path, now: dict[str, object], said: str
) -> None:
    Journal.begin(tmp_path / "j", HEADER).close()
    with pytest.raises(UsageError, match=f"was started with {said}"):
        Journal.go_on([tmp_path / "j"], replace(HEADER, **now))  # type: ignore[arg-type]


def test_what_only_tells_of_the_run_may_differ(tmp_path: Path) -> None:
    Journal.begin(tmp_path / "j", HEADER).close()
    moved = replace(HEADER, info={"model": "elsewhere"})
    assert Journal.go_on([tmp_path / "j"], moved).finished.headers[0].info == {"model": "m"}


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    for text in ("", "{}\n", '{"journal": 99}\n', "[1]\n", "no json\n", '{"journal": 1}\n'):
        (tmp_path / "j").write_text(text)
        with pytest.raises(OutputError, match="not a journal of ours"):
            Finished([tmp_path / "j"])


def test_shards_are_stretches_that_cover_every_input_once() -> None:
    for images in (0, 1, 6, 7, 200):
        for parts in (1, 2, 7):
            shards = [replace(HEADER, images=images, shard=(n, parts)).positions for n in range(1, parts + 1)]
            assert [position for shard in shards for position in shard] == list(range(images))
            assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_an_image_at_which_the_process_died_alone_twice_is_the_culprit(tmp_path: Path) -> None:
    journal = Journal.begin(tmp_path / "j", HEADER)
    journal.note_trying(0)
    journal.add(0, result(0))
    found = []
    for _ in range(2):
        journal.note_trying(1)
        found.append(Finished([tmp_path / "j"]).culprits)
    journal.add(1, result(1, "the program died at this picture"))
    assert [*found, Finished([tmp_path / "j"]).culprits] == [set(), {1}, set()]


def test_several_journals_are_one_runs_and_the_last_is_written_on(tmp_path: Path) -> None:
    for number in (0, 2):
        journal = Journal.begin(tmp_path / f"j{number}", HEADER)
        journal.add(number, result(number))
        journal.close()
    together = Journal.go_on([tmp_path / "j0", tmp_path / "j2", tmp_path / "j1"], HEADER)
    together.add(1, result(1))
    together.close()
    finished = Finished([tmp_path / f"j{number}" for number in range(3)])
    assert [finished.read(number) for number in range(3)] == [result(number) for number in range(3)]

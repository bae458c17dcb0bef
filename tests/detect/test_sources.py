from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddetr_cli.detect.sources import Input, check_names_are_distinct, find_inputs
from ddetr_cli.errors import NothingUsableError, UsageError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def names_of(folder: Path) -> list[str]:
    return [image.name for image in find_inputs([str(folder)]).images]


def test_a_folder_is_searched_to_the_bottom_in_an_order_that_does_not_depend_on_the_disk(tmp_path: Path) -> None:
    make(tmp_path, "b.jpg", "a/z.png", "a/b/c.tif", "B.JPG", "a.jpg", "a-b.jpg")
    assert names_of(tmp_path) == ["B.JPG", "a/b/c.tif", "a/z.png", "a-b.jpg", "a.jpg", "b.jpg"]


def test_the_order_of_the_sources_does_not_matter(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "b/2.jpg")
    one = find_inputs([str(tmp_path / "a"), str(tmp_path / "b")])
    other = find_inputs([str(tmp_path / "b"), str(tmp_path / "a")])
    assert one.images == other.images


def test_what_is_no_picture_by_its_name_is_skipped_and_counted_unless_named(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "notes.txt", "data.json", "noending", "._a.jpg")
    found = find_inputs([str(tmp_path)])
    assert [image.name for image in found.images] == ["a.jpg"]
    assert sorted(path.name for path, _ in found.skipped) == ["._a.jpg", "data.json", "noending", "notes.txt"]
    named = find_inputs([str(tmp_path / "noending"), str(tmp_path / "notes.txt")])
    assert [image.name for image in named.images] == ["noending", "notes.txt"]


def test_a_picture_in_a_format_that_is_not_read_is_an_input_that_fails_by_name(tmp_path: Path) -> None:
    make(tmp_path, "a.svg", "b.EPS", "c.sgi")
    for image in find_inputs([str(tmp_path)]).images:
        assert image.failure is not None
        assert image.failure.startswith("format not accepted (")


def test_a_folder_named_like_a_picture_is_searched(tmp_path: Path) -> None:
    make(tmp_path, "x.jpg/y.jpg")
    assert names_of(tmp_path) == ["x.jpg/y.jpg"]


def test_a_missing_source_is_a_usage_error(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    with pytest.raises(UsageError, match=r"nothere\.jpg: no such file or folder"):
        find_inputs([str(tmp_path / "a.jpg"), str(tmp_path / "nothere.jpg")])


def test_a_folder_without_pictures_names_the_accepted_types(tmp_path: Path) -> None:
    make(tmp_path, "notes.txt")
    with pytest.raises(NothingUsableError, match=r"no image found\. Accepted types: JPEG"):
        find_inputs([str(tmp_path)])


@pytest.mark.parametrize("source", ["", "-"])
def test_empty_text_and_a_dash_are_refused(source: str) -> None:
    with pytest.raises(UsageError):
        find_inputs([source])


def test_a_file_that_is_called_dash_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "-")
    monkeypatch.chdir(tmp_path)
    assert [image.name for image in find_inputs(["./-"]).images] == ["-"]


def test_each_real_file_is_taken_once_and_the_file_itself_wins_over_a_link(tmp_path: Path) -> None:
    make(tmp_path, "z.jpg", "sub/y.jpg")
    (tmp_path / "a.jpg").symlink_to(tmp_path / "z.jpg")
    (tmp_path / "b.jpg").symlink_to("z.jpg")
    found = find_inputs([str(tmp_path), str(tmp_path / "z.jpg"), str(tmp_path / "sub")])
    assert [image.name for image in found.images] == ["sub/y.jpg", "z.jpg"]
    reasons = {path.name: reason for path, reason in found.skipped if path.name in ("a.jpg", "b.jpg")}
    assert all(reason == f"the same file as {tmp_path / 'z.jpg'}" for reason in reasons.values())
    assert len(reasons) == 2


def test_hard_links_are_files_of_their_own(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert names_of(tmp_path) == ["a.jpg", "b.jpg"]


def test_links_to_folders_are_not_followed_so_loops_end(tmp_path: Path) -> None:
    make(tmp_path, "in/a.jpg", "out/b.jpg")
    (tmp_path / "in/self").symlink_to(".")
    (tmp_path / "in/up").symlink_to("..")
    (tmp_path / "in/aside.jpg").symlink_to("../out/b.jpg")
    found = find_inputs([str(tmp_path / "in")])
    assert [image.name for image in found.images] == ["a.jpg", "aside.jpg"]
    assert [(path.name, reason) for path, reason in found.skipped] == [
        ("self", "link to a folder, not followed"),
        ("up", "link to a folder, not followed"),
    ]


def test_a_link_to_a_folder_that_is_named_is_searched(tmp_path: Path) -> None:
    make(tmp_path, "real/a.jpg")
    (tmp_path / "link").symlink_to("real")
    assert names_of(tmp_path / "link") == ["a.jpg"]


def test_a_dangling_link_and_a_link_to_itself_are_listed_as_failed(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    found = find_inputs([str(tmp_path)])
    assert [image.name for image in found.images] == ["gone.jpg", "loop.jpg"]
    assert all(
        image.failure == "link to a missing file. Restore the file or remove the link." for image in found.images
    )
    assert find_inputs([str(tmp_path / "gone.jpg")]).images[0].failure is not None


def test_a_folder_that_may_not_be_read_is_listed_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.jpg", "closed/b.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:  # permissions mean nothing to root
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    images = find_inputs([str(tmp_path)]).images
    assert [image.name for image in images] == ["a.jpg", "closed"]
    assert images[1].failure == "folder cannot be read (Permission denied). Check its permissions."


@pytest.mark.parametrize(
    "name", [b"bad\xff.jpg", b"new\nline.jpg", b"-dash.jpg", b"'quo\"te.jpg", "😀.jpg".encode(), b"a" * 251 + b".jpg"]
)
def test_any_file_name_is_found_and_can_be_turned_back_into_its_bytes(tmp_path: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
    assert [os.fsencode(found) for found in names_of(tmp_path)] == [name]


def test_pictures_of_this_output_and_of_an_earlier_one_are_not_inputs(tmp_path: Path) -> None:
    make(
        tmp_path,
        "a.jpg",
        "now/annotated/a.jpg",
        "before/annotated/a.jpg",
        "before/images.json",
        "before/detections.json",
    )
    make(tmp_path, "mine/annotated/b.jpg")  # a folder of the user's own that happens to have the name
    found = find_inputs([str(tmp_path)], output=tmp_path / "now")
    assert [image.name for image in found.images] == ["a.jpg", "mine/annotated/b.jpg"]
    assert sorted(
        str(path.relative_to(tmp_path)) for path, reason in found.skipped if reason == "output of ddetr"
    ) == [
        "before/annotated",
        "now/annotated",
    ]


def test_two_inputs_that_would_meet_in_one_output_are_refused_with_both_names(tmp_path: Path) -> None:
    make(tmp_path, "a/x.jpg", "b/x.jpg")
    images = find_inputs([str(tmp_path / "a/x.jpg"), str(tmp_path / "b/x.jpg")]).images
    with pytest.raises(UsageError, match=r"b/x\.jpg: its output x\.jpg is also that of .*a/x\.jpg"):
        check_names_are_distinct(images, output_name=str, ignore_case=False)


def test_names_that_differ_in_case_meet_only_where_the_disk_ignores_case() -> None:
    images = [Input(Path("X.jpg"), "X.jpg"), Input(Path("x.jpg"), "x.jpg")]
    check_names_are_distinct(images, output_name=str, ignore_case=False)
    with pytest.raises(UsageError, match="also that of"):
        check_names_are_distinct(images, output_name=str, ignore_case=True)


def test_an_output_that_needs_a_folder_where_another_is_a_file_is_refused() -> None:
    images = [Input(Path("1/x.jpg"), "x.jpg"), Input(Path("2/x.jpg/y.jpg"), "x.jpg/y.jpg")]
    with pytest.raises(UsageError, match="needs a folder where the output of"):
        check_names_are_distinct(images, output_name=str, ignore_case=False)

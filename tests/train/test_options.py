from __future__ import annotations

from pathlib import Path

import pytest

from ddetr_cli.atomic import write_json
from ddetr_cli.errors import CheckpointError, UsageError
from ddetr_cli.presets import PRESETS
from ddetr_cli.train.options import TRAINABLE, TrainOptions, check_trainable, resumed_options


def test_options_come_back_from_the_configuration_of_a_run(tmp_path: Path) -> None:
    options = TrainOptions(tmp_path, data=Path("cells"), init="demo", epochs=9, learning_rate=1e-3, overwrite=True)
    write_json(tmp_path / "config.json", {"options": options.to_json()})
    found = resumed_options(tmp_path, {"device": "cpu", "workers": 2})
    assert found == TrainOptions(
        tmp_path, data=Path("cells").resolve(), init="demo", epochs=9, learning_rate=1e-3, device="cpu", workers=2,
        resume=True,
    )  # fmt: skip


def test_every_preset_but_torchvisions_can_be_trained() -> None:
    assert set(PRESETS) - set(TRAINABLE) == {"fasterrcnn-r50-fpn"}
    for name in TRAINABLE:
        check_trainable(PRESETS[name])
    with pytest.raises(UsageError, match=r"fasterrcnn-r50-fpn: cannot be trained here .* Choose another --preset"):
        check_trainable(PRESETS["fasterrcnn-r50-fpn"])


@pytest.mark.parametrize("content", [None, "not json", "[]", "{}", '{"options": {"speed": 3}}'])
def test_resuming_what_is_not_a_run_says_so(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a run to resume"):
        resumed_options(tmp_path)

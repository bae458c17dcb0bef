from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ddetr_cli.classes import COCO_TABLE, ClassTable
from ddetr_cli.errors import CheckpointError, UsageError
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import PRESETS, ModelConfig
from ddetr_cli.weights import LoadedModel, load_model, save_checkpoint
from ddetr_cli.weights.checkpoint import FORMAT, METADATA_KEY, digest
from ddetr_cli.weights.layouts import to_authors

TINY = ModelConfig(
    "small", backbone="resnet-tiny", hidden_dim=32, encoder_layers=1, decoder_layers=2, ffn_dim=32, queries=5,
    classes=3, image_size=128,
)  # fmt: skip
NEVER_TOLD_APART = "nothing in or beside the file says whether the last stage is dilated"


def _tiny_file(path: Path, **changes: object) -> Path:
    config = replace(TINY, **changes)
    torch.manual_seed(1)
    save_checkpoint(path, build_detector(config), ClassTable.from_categories(
        [{"id": i + 1, "name": f"c{i}"} for i in range(config.classes)]))  # fmt: skip
    return path


def test_the_authors_file_comes_back_bit_for_bit(states, write):
    for changes in ({}, {"refine_boxes": True}, {"refine_boxes": True, "two_stage": True}, {"levels": 1}):
        state = {name: tensor.float() for name, tensor in states(**changes).items()}
        extra = {"num_queries": 7} if changes.get("two_stage") else {}
        loaded = load_model(str(write(state, dilation=False, **extra)))
        again = to_authors(loaded.model.state_dict(), loaded.config)
        assert again.keys() == state.keys()
        assert [name for name in state if not torch.equal(state[name], again[name])] == []
        assert loaded.config == replace(loaded.config, queries=7, classes=5, **changes)


def test_numbers_stored_as_float16_are_loaded_as_float32(states, write):
    loaded = load_model(str(write(states())))
    for name, tensor in loaded.model.state_dict().items():
        assert tensor.dtype == torch.float32, name
    assert torch.equal(loaded.model.query_embed.weight, states()["query_embed.weight"].float())


def test_a_refining_model_with_equal_heads_is_recognised_by_the_stored_arguments(states, write):
    shared = states()
    assert not load_model(str(write(shared))).config.refine_boxes
    assert load_model(str(write(shared, with_box_refine=True))).config.refine_boxes


class TestDilation:
    def test_the_authors_arguments_tell(self, states, write):
        state = states(levels=1)
        for dilation in (True, False):
            loaded = load_model(str(write(state, dilation=dilation)))
            assert loaded.config.dilation is dilation
            assert not any(NEVER_TOLD_APART in note for note in loaded.report.notes)

    def test_a_config_beside_a_hugging_face_file_tells(self, states, tmp_path: Path):
        path = _as_hugging_face(states(levels=1), tmp_path)
        for dilation in (True, False):
            (tmp_path / "config.json").write_text(
                json.dumps({"model_type": "deformable_detr", "dilation": dilation, "encoder_attention_heads": 8})
            )
            loaded = load_model(str(path))
            assert loaded.config.dilation is dilation
            assert loaded.report.layout == "Hugging Face"

    @pytest.mark.parametrize("key", ["backbone_config", "backbone_kwargs"])
    def test_a_stride_of_16_in_the_configuration_of_the_trunk_tells(self, states, tmp_path: Path, key: str):
        path = _as_hugging_face(states(levels=1), tmp_path)
        config = {"model_type": "deformable_detr", "dilation": False, key: {"output_stride": 16}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_model(str(path)).config.dilation

    def test_without_either_none_is_assumed_and_said(self, states, write, tmp_path: Path):
        for path in (write(states(levels=1)), _as_hugging_face(states(levels=1), tmp_path)):
            loaded = load_model(str(path))
            assert not loaded.config.dilation
            assert any(NEVER_TOLD_APART in note and str(path) in note for note in loaded.report.notes)

    def test_multi_scale_models_are_not_asked(self, states, write):
        assert not any(NEVER_TOLD_APART in note for note in load_model(str(write(states()))).report.notes)

    def test_a_preset_overrides(self, tmp_path: Path, monkeypatch):
        path, undilated = _full_size_single_scale(tmp_path)
        loaded = load_model(str(path), preset="r50-single-scale-dc5")
        assert loaded.config == PRESETS["r50-single-scale-dc5"]
        assert loaded.model.backbone.get_submodule("layer4.0.conv2").stride == (1, 1)
        assert undilated.model.backbone.get_submodule("layer4.0.conv2").stride == (2, 2)

        # The same file, found under the name of a preset or of its hub id, is that preset.
        for name, spec in (
            ("r50-single-scale-dc5.safetensors", "r50-single-scale-dc5"),
            ("SenseTime--deformable-detr-single-scale-dc5.safetensors", "SenseTime/deformable-detr-single-scale-dc5"),
        ):
            folder = tmp_path / spec.replace("/", "-")
            folder.mkdir()
            (folder / name).hardlink_to(path)
            monkeypatch.setenv("DDETR_WEIGHTS", str(folder))
            assert load_model(spec).config.dilation


class TestSize:
    def _loaded(self, states, folder: Path, size: object) -> LoadedModel:
        path = _as_hugging_face(states(), folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "deformable_detr"}))
        (folder / "preprocessor_config.json").write_text(json.dumps({"size": size}))
        return load_model(str(path))

    @pytest.mark.parametrize("size", [{"shortest_edge": 480, "longest_edge": 800}, 480])
    def test_that_of_transformers_processor_is_the_models(self, states, tmp_path: Path, size: object):
        loaded = self._loaded(states, tmp_path, size)
        assert loaded.config.image_size == 480
        assert len(loaded.report.notes) == 1  # the one about checksums

    @pytest.mark.parametrize(
        ("size", "short", "said"),
        [
            ({"max_height": 480, "max_width": 640}, 800, "max_height 480, max_width 640"),
            ({"shortest_edge": 480, "longest_edge": 640}, 480, "shortest_edge 480, longest_edge 640"),
        ],
    )
    def test_a_rule_not_followed_here_is_said(self, states, tmp_path: Path, size: object, short: int, said: str):
        loaded = self._loaded(states, tmp_path, size)
        assert loaded.config.image_size == short
        rule = f"pictures of {said} (preprocessor_config.json), a rule not followed here"
        assert any(rule in note for note in loaded.report.notes)

    def test_that_none_is_known_is_said(self, states, tmp_path: Path):
        notes = load_model(str(_as_hugging_face(states(), tmp_path))).report.notes
        assert any("nothing beside the file says what size its pictures had" in note for note in notes)


class TestClasses:
    def test_91_logits_are_cocos(self, states, write):
        assert load_model(str(write(states(classes=91)))).classes == COCO_TABLE

    @pytest.mark.parametrize(("form", "is_coco"), [("LABEL_{}", True), ("plankton {}", False)])
    def test_91_classes_of_somebody_elses_are_told_by_their_names(self, states, tmp_path: Path, form, is_coco):
        path = _as_hugging_face(states(classes=91), tmp_path)
        names = {str(i): form.format(i) for i in range(91)}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "deformable_detr", "id2label": names}))
        assert (load_model(str(path)).classes == COCO_TABLE) == is_coco

    def test_another_count_without_names_is_numbered(self, states, write):
        loaded = load_model(str(write(states())))
        assert loaded.classes == ClassTable((0, 1, 2, 3, 4), (None,) * 5)
        assert loaded.classes.name(3) == "class 3"

    def test_hugging_faces_names_are_taken(self, states, tmp_path: Path):
        path = _as_hugging_face(states(), tmp_path)
        names = {str(i): f"thing {i}" for i in range(5)}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "deformable_detr", "id2label": names}))
        assert load_model(str(path)).classes.names == tuple(names.values())

    @pytest.mark.parametrize("config", ["nonsense", "[]", '{"model_type": "detr", "id2label": {"0": "x"}}',
                                        '{"model_type": "deformable_detr", "id2label": [1]}'])  # fmt: skip
    def test_a_config_that_makes_no_sense_is_as_good_as_none(self, states, tmp_path: Path, config: str):
        path = _as_hugging_face(states(), tmp_path)
        (tmp_path / "config.json").write_text(config)
        assert load_model(str(path)).classes.names == (None,) * 5


class TestWrongWeights:
    def test_missing_left_over_and_wrong_shaped_tensors_are_listed_five_of_each(self, states, write):
        state = states()
        for name in [n for n in state if "encoder.layers.0.norm" in n or "layers.1.cross_attn" in n]:
            del state[name]
        state |= {f"strange.{i}": torch.zeros(1) for i in range(7)}
        state["transformer.reference_points.weight"] = torch.zeros(4, 32)
        with pytest.raises(CheckpointError) as caught:
            load_model(str(write(state)))
        message = str(caught.value)
        assert "12 missing (transformer.encoder.layers.0.norm1.weight, " in message
        assert "7 left over (strange.0, strange.1, strange.2, strange.3, strange.4 ...)" in message
        assert "transformer.reference_points.weight: (4, 32) in the file, (2, 32) in the model" in message
        assert "this is a 4-level, 7-query, 5-class model" in message
        assert caught.value.exit_code == 5

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (
                {"transformer.encoder.layers.0.norm2.bias": None},
                "1 missing (transformer.encoder.layers.0.norm2.bias).",
            ),
            ({"strange": torch.zeros(1)}, "1 left over (strange)."),
            ({"query_embed.weight": torch.zeros(7, 32)}, "(query_embed.weight: (7, 32) in the file, (7, 64) in the"),
        ],
        ids=["missing", "left over", "of another shape"],
    )
    def test_one_tensor_that_does_not_fit_is_enough(self, states, write, change, told: str):
        state = {name: tensor for name, tensor in (states() | change).items() if tensor is not None}
        with pytest.raises(CheckpointError, match=re.escape(told)):
            load_model(str(write(state)))

    @pytest.mark.parametrize(
        ("changes", "preset", "guess"),
        [
            ({"levels": 1}, "r50", "this is a single-scale, 7-query, 5-class model"),
            ({"refine_boxes": True, "two_stage": True}, "r50-refine", "this is a 4-level, two-stage, 5-class model"),
            ({"refine_boxes": True}, "r50", "this is a 4-level, box-refining, 7-query, 5-class model"),
        ],
    )
    def test_a_file_of_another_variant_than_named_is_refused_with_a_guess(
        self, states, write, changes, preset, guess
    ):
        with pytest.raises(CheckpointError) as caught:
            load_model(str(write(states(**changes))), preset=preset)
        assert f"does not fit {preset} ({guess})" in str(caught.value)

    def test_a_trunk_of_more_layers_is_named(self, states, write):
        more = {name.replace("layer3.5", "layer3.6"): t for name, t in states().items() if ".layer3.5." in name}
        with pytest.raises(CheckpointError, match="7-query, 5-class model, on a ResNet of more than 50 layers"):
            load_model(str(write(states() | more)))

    @pytest.mark.parametrize(
        ("names", "guess"),
        [
            (["conv1.weight", "layer4.2.bn3.bias", "fc.weight"], "an image classifier"),
            (["neck.convs.0.conv.weight", "backbone.stem.conv1.weight"], "another model of detrex or mmdetection"),
            (["bbox_head.transformer.level_embeds", "bbox_head.cls_branches.0.bias"], "a model of mmdetection 2"),
            (["a", "b", "c", "d"], "its tensors are 'a', 'b', 'c'"),
            ([], "it holds no tensors"),
        ],
    )
    def test_other_models_are_named(self, write, names: list[str], guess: str):
        with pytest.raises(CheckpointError, match="not a model read here") as caught:
            load_model(str(write({name: torch.zeros(1) for name in names})))
        assert guess in str(caught.value)

    @pytest.mark.parametrize("is_alike", [True, False])
    def test_a_relative_of_transformers_is_called_what_its_config_calls_it(self, states, tmp_path: Path, is_alike):
        path = _as_hugging_face(states() if is_alike else {"transformer.a": torch.zeros(1)}, tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "rt_detr"}))
        with pytest.raises(CheckpointError, match=r"not a model read here \(.*config\.json calls it 'rt_detr'\)"):
            load_model(str(path))

    @pytest.mark.parametrize("name", ["mine.safetensors", "model.safetensors"])
    def test_a_configuration_of_another_model_in_the_same_folder_does_not_cost_a_model(
        self, states, tmp_path: Path, name: str
    ):
        path = _as_hugging_face(states(), tmp_path).rename(tmp_path / name)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "" if name.startswith("model") else "bert"}))
        assert load_model(str(path)).report.fits

    def test_half_a_model_is_refused(self, states, write):
        state = {name: t for name, t in states().items() if "input_proj" not in name}
        with pytest.raises(CheckpointError, match="parts of the model are missing"):
            load_model(str(write(state)))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_numbers_that_are_not_finite_are_refused_by_the_tensors_name(self, states, write, value: float):
        state = states()
        state["input_proj.2.0.weight"] = state["input_proj.2.0.weight"].clone()
        state["input_proj.2.0.weight"][3, 2] = value
        with pytest.raises(CheckpointError, match=r"input_proj\.2\.0\.weight holds NaN or infinity"):
            load_model(str(write(state)))

    def test_integers_where_numbers_belong_are_refused(self, states, write):
        state = states()
        state["query_embed.weight"] = state["query_embed.weight"].to(torch.int8)
        with pytest.raises(CheckpointError, match="of integers in the file"):
            load_model(str(write(state)))

    def test_a_header_that_describes_far_more_than_the_file_holds_is_refused_before_room_is_made(
        self, tmp_path: Path
    ):
        config = replace(
            PRESETS["r50-two-stage"], preset="custom", hidden_dim=4096, ffn_dim=65536, heads=64, points=64,
            encoder_layers=64, decoder_layers=64, levels=8,
        )  # fmt: skip
        tensors = {"input_proj.0.0.weight": torch.zeros(1)}
        header = {
            "format": FORMAT, "ddetr_version": "1", "config": config.to_dict(), "classes": COCO_TABLE.to_json(),
            "sha256": digest(tensors),
        }  # fmt: skip
        safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {METADATA_KEY: json.dumps(header)})
        with pytest.raises(CheckpointError, match="describes a model many times larger than the 1 numbers it holds"):
            load_model(str(tmp_path / "x.safetensors"))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_stored_arguments_that_are_no_numbers_are_as_if_not_there(self, states, write, value: float):
        assert load_model(str(write(states(), enc_n_points=value))).config.points == 4

    @pytest.mark.parametrize("arguments", [{"nheads": 0}, {"nheads": 7}, {"dropout": 3.0}, {"enc_n_points": 10**9}])
    def test_stored_arguments_that_cannot_be_are_refused(self, states, write, arguments):
        with pytest.raises(CheckpointError, match="model configuration"):
            load_model(str(write(states(), **arguments)))

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"position_embedding": "learned"}, "position_embedding: is 'learned'"),
            ({"enc_n_points": 4, "dec_n_points": 8}, "enc_n_points and dec_n_points: differ"),
        ],
    )
    def test_models_that_compute_otherwise_are_refused_though_their_tensors_fit(
        self, states, write, arguments, named
    ):
        with pytest.raises(CheckpointError, match=named):
            load_model(str(write(states(), **arguments)))

    @pytest.mark.parametrize(
        ("key", "value", "computed"),
        [
            ("downsample_in_bottleneck", True, False),
            ("downsample_in_first_stage", True, False),
            ("output_stride", 8, 32),
        ],
    )
    def test_a_trunk_that_computes_otherwise_is_refused_though_its_tensors_fit(
        self, states, tmp_path: Path, key: str, value: object, computed: object
    ):
        path = _as_hugging_face(states(), tmp_path)
        config = {"model_type": "deformable_detr", "backbone_config": {key: value}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"{key}: is '{value}', and only {computed} is computed"):
            load_model(str(path))

    def test_an_unknown_preset_is_a_usage_error(self, tmp_path: Path):
        with pytest.raises(UsageError, match="Choose one of"):
            load_model(str(_tiny_file(tmp_path / "x.safetensors")), preset="r51")


@pytest.mark.parametrize("preset", ["tiny", "detr-r50", "fasterrcnn-r50-fpn"])
def test_loading_draws_no_random_numbers(tmp_path: Path, preset: str):
    save_checkpoint(tmp_path / "x.safetensors", build_detector(PRESETS[preset]), COCO_TABLE)
    before = torch.get_rng_state()
    load_model(str(tmp_path / "x.safetensors"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_foreign_file_is_said_to_carry_no_checksum(states, write):
    path = write(states())
    assert any(f"{path}: carries no checksum" in note for note in load_model(str(path)).report.notes)


def test_the_report_is_a_table_of_lines(tmp_path: Path):
    path = _tiny_file(tmp_path / "best.safetensors")
    report = load_model(str(tmp_path)).report
    lines = report.table()
    assert lines[0].split() == ["file", str(path)]
    assert [line[:12].rstrip() for line in lines] == [
        "file", "layout", "variant", "loaded", "missing", "left over", "wrong shape", "ignored",
    ]  # fmt: skip
    assert lines[3].split() == ["loaded", str(report.loaded), "tensors"]
    longer = replace(report, missing=tuple(f"m{i}" for i in range(8))).table()
    assert "  missing: m4" in longer and "  missing: m5" not in longer and "  missing: and 3 more" in longer


def test_the_packaged_demo_loads():
    demo = Path(load_model.__code__.co_filename).with_name("demo.safetensors")
    if not demo.is_file():
        pytest.skip("the demo checkpoint is not packaged yet")
    loaded = load_model("demo")
    assert loaded.source == demo
    assert len(loaded.classes) == loaded.config.classes
    assert demo.stat().st_size < 15_000_000


def _as_hugging_face(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """The state under Hugging Face's v4 names, as a safetensors file."""
    renames: list[tuple[str, str]] = [
        ("backbone.0.body.", "model.backbone.conv_encoder.model."), ("input_proj.", "model.input_proj."),
        ("query_embed.", "model.query_position_embeddings."), ("transformer.", "model."),
        (".linear1.", ".fc1."), (".linear2.", ".fc2."), (".cross_attn.", ".encoder_attn."),
    ]  # fmt: skip
    norms = {
        "encoder": {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
        "decoder": {"norm1": "encoder_attn_layer_norm", "norm2": "self_attn_layer_norm", "norm3": "final_layer_norm"},
    }
    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        for old, new in renames:
            name = (
                new + name.removeprefix(old)
                if name.startswith(old)
                else name.replace(old, new)
                if old[0] == "."
                else name
            )
        for part, table in norms.items():
            for old, new in table.items():
                name = name.replace(f".{old}.", f".{new}.") if f"{part}.layers" in name else name
        if ".self_attn.in_proj_" in name:
            head, _, kind = name.rpartition(".in_proj_")
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{head}.{letter}_proj.{kind}"] = third.contiguous()
        else:
            out[name] = tensor.clone()
    safetensors.torch.save_file(out, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def _full_size_single_scale(folder: Path) -> tuple[Path, object]:
    torch.manual_seed(0)
    model = build_detector(PRESETS["r50-single-scale"])
    state = to_authors({name: t.half() for name, t in model.state_dict().items()}, PRESETS["r50-single-scale"])
    path = folder / "single.safetensors"
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    return path, load_model(str(path))

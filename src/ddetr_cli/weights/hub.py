"""Finding the file behind a ``--model`` value: a path, ``demo``, a preset, or a Hugging Face hub id.

Names are looked for in ``$DDETR_WEIGHTS``, then in the Hugging Face cache, and only then downloaded. What comes out
is a path; whether it holds a model is for ``reader`` to find out. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ddetr_cli.errors import CheckpointError, UsageError
from ddetr_cli.presets import HUB_IDS, PRESETS

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# What is asked for before them: both say how to use the weights, and neither need be there.
_BESIDE = ("config.json", "preprocessor_config.json")
# Files of torchvision and of DETR's authors: the digits at the end of a name begin the sha256 of what it holds.
BACKBONE_NAME = "resnet50-0676ba61"  # torchvision's IMAGENET1K_V1
FASTER_RCNN_NAME = "fasterrcnn_resnet50_fpn_coco-258fb6c6"  # torchvision's COCO_V1
PUBLISHED = {
    FASTER_RCNN_NAME: "fasterrcnn-r50-fpn",
    "detr-r50-e632da11": "detr-r50",
    "detr-r50-dc5-f0fb7ef5": "detr-r50-dc5",
}
TORCHVISION_URL = "https://download.pytorch.org/models"
TIMEOUT_S = 5.0

Announce = Callable[[str], None]

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")


@dataclass(frozen=True)
class Found:
    """The file of a model and, where its name says so, the preset it must be."""

    path: Path
    preset: str | None = None


def weights_folder() -> Path:
    """``$DDETR_WEIGHTS``, by default ``~/.cache/ddetr/weights``."""
    given = os.environ.get("DDETR_WEIGHTS")
    return Path(given).expanduser() if given else Path("~/.cache/ddetr/weights").expanduser()


def find_model(spec: str, announce: Announce | None = None) -> Found:
    """The file of ``spec``; ``announce`` is told before a download starts.

    Raises UsageError for a URL or nothing at all, CheckpointError where there is no such model.
    """
    if not spec.strip():
        raise UsageError("model: empty. Give a file, a run folder, a preset or a hub id.")
    if _URL.match(spec):
        raise UsageError(f"{spec}: a URL (models are not fetched from addresses). Give a file or a hub id.")
    path = Path(spec).expanduser()
    if os.path.exists(path):  # unlike Path.exists, False for names no file system can hold
        return Found(_file_in(path) if path.is_dir() else path)
    if spec == "demo":
        return Found(_packaged_demo())
    if spec in PRESETS:
        return _named_model(spec, HUB_IDS.get(spec), announce)
    if _HUB_ID.match(spec) and not spec.lower().endswith(_FILE_SUFFIXES):
        return _named_model(spec, spec, announce)
    raise CheckpointError(
        f"{spec}: no such model (neither a file nor one of demo, {', '.join(PRESETS)} nor a hub id owner/name). "
        "Check the path, or try --model demo."
    )


def find_backbone(spec: str | None, announce: Announce | None = None) -> Path:
    """torchvision's ImageNet ResNet-50: the file ``spec``, or where it is None the first one found or downloaded."""
    if spec is not None:
        if _URL.match(spec):
            raise UsageError(f"{spec}: a URL (weights are not fetched from addresses). Give a file, or none.")
        return Path(spec).expanduser()
    return _torchvision_file(
        BACKBONE_NAME, "backbone weights", "start from random weights with --backbone-weights none", announce
    )


def _torchvision_file(name: str, thing: str, instead: str, announce: Announce | None) -> Path:
    """torchvision's file ``name``: in our folder or torchvision's, else downloaded into ours."""
    folders = (weights_folder(), _torch_cache())
    for folder in folders:
        for suffix in (".safetensors", ".pth"):
            if (file := folder / f"{name}{suffix}").is_file():
                return file
    from huggingface_hub import constants

    url, target = f"{TORCHVISION_URL}/{name}.pth", folders[0] / f"{name}.pth"
    try:
        if constants.HF_HUB_OFFLINE:  # another server, but the same wish
            raise OSError("HF_HUB_OFFLINE is set")
        if announce is not None:
            announce(f"downloading {url}")
        _fetch(url, target)
    except (OSError, urllib.error.URLError) as error:
        raise CheckpointError(
            f"{thing}: not found and not downloaded ({_reason(error)}). Put {url} at {target}, or {instead}."
        ) from error
    return target


def _torch_cache() -> Path:
    """Where torchvision and torch.hub keep what they download."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def _file_in(folder: Path) -> Path:
    """The model in a run's folder, in one that ``save_pretrained`` wrote, or in one of the authors' runs."""
    names = ("best.safetensors", "last.safetensors", *HUB_FILES, "checkpoint.pth")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    for name in HUB_FILES:
        if (folder / f"{name}.index.json").is_file():
            raise CheckpointError(
                f"{folder}: holds a model in several pieces ({name}.index.json), and only one whole file is read. "
                "Save it again with save_pretrained(FOLDER, max_shard_size='10GB')."
            )
    raise CheckpointError(f"{folder}: holds no model (looked for {', '.join(names)}). Give a run's folder or a file.")


def _packaged_demo() -> Path:
    demo = Path(str(resources.files("ddetr_cli.weights") / "demo.safetensors"))
    if not demo.is_file():
        raise CheckpointError(f"demo: missing from the installation (no {demo}). Install ddetr-cli again.")
    return demo


def _named_model(name: str, hub_id: str | None, announce: Announce | None) -> Found:
    preset = name if name in PRESETS else next((p for p, known in HUB_IDS.items() if known == name), None)
    folder = weights_folder()
    published = [stem for stem, known in PUBLISHED.items() if known == preset]
    wanted = [stem.replace("/", "--") for stem in dict.fromkeys((name, hub_id, *published)) if stem]
    places = [*(folder / stem for stem in wanted), *(_torch_cache() / stem for stem in published)]
    for place in places:
        for suffix in (".safetensors", ".pth"):
            if (file := place.with_name(place.name + suffix)).is_file():
                return Found(file, preset)
    if preset == PUBLISHED[FASTER_RCNN_NAME]:
        file = _torchvision_file(FASTER_RCNN_NAME, name, "try --model demo, which needs no download", announce)
        return Found(file, preset)
    target = folder / f"{wanted[0]}.safetensors"
    if hub_id is None:
        raise CheckpointError(
            f"{name}: has no published weights, and there are none at {target}. "
            "Train some (ddetr train --preset), or use --model demo."
        )
    with _quiet_hub():
        cached = _cached(hub_id)
        if cached is not None:
            return Found(cached, preset)
        reason = _unreachable()
        if reason is None:
            if announce is not None:
                announce(f"downloading {hub_id} from the Hugging Face hub")
            try:
                return Found(_download(hub_id), preset)
            except Exception as error:  # httpx, requests, OSError: whatever the client of the day raises
                reason = _reason(error)
    url = f"{_endpoint()}/{hub_id}/resolve/main/{HUB_FILES[0]}"
    raise CheckpointError(
        f"{name}: weights not found and not downloaded ({reason}). Put {url} at {target} (or a .pth beside it), "
        "or try --model demo, which needs no download."
    )


def _cached(hub_id: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in HUB_FILES:
        found = try_to_load_from_cache(hub_id, name)
        if isinstance(found, str):
            return Path(found)
    return None


def _download(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in (*_BESIDE, *HUB_FILES):
        try:
            path = Path(hf_hub_download(hub_id, name, etag_timeout=TIMEOUT_S))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
        if name in HUB_FILES:
            return path
    for name in HUB_FILES:
        try:
            hf_hub_download(hub_id, f"{name}.index.json", etag_timeout=TIMEOUT_S)
        except EntryNotFoundError:
            continue
        raise FileNotFoundError(f"{hub_id} is in several pieces, and only one whole file is read")
    raise FileNotFoundError(f"{hub_id} has neither {' nor '.join(HUB_FILES)}")


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _unreachable() -> str | None:
    """Why the hub cannot be asked, or None. The hub's own client would retry for half a minute before saying so."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return _no_connection(_endpoint())


def _no_connection(url: str) -> str | None:
    """Why no connection to the server of ``url``, or to the proxy before it, can be opened; None where one can."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
    if proxy:
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        with socket.create_connection(address, timeout=TIMEOUT_S):
            return None
    except (OSError, ValueError):
        return f"no connection to {host}"


def _fetch(url: str, target: Path) -> None:
    """Download ``url`` to ``target``, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if (reason := _no_connection(url)) is not None:
        raise OSError(reason)
    with (
        urllib.request.urlopen(url, timeout=TIMEOUT_S) as response,
        tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file,
    ):
        try:
            while block := response.read(1 << 20):
                file.write(block)
            length = response.headers.get("Content-Length")
            if length is not None and file.tell() != int(length):
                raise OSError("the connection ended early")
            file.close()
            Path(file.name).chmod(0o644)
            Path(file.name).replace(target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _reason(error: BaseException) -> str:
    """The first line of an error's own words, short and without our full stop."""
    text = str(getattr(error, "strerror", None) or getattr(error, "reason", None) or error).strip()
    return (text.splitlines() or [type(error).__name__])[0][:160].rstrip(".")


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub's client without its progress bars, warnings and retries' log lines: talking is the caller's."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity, bars_were_on = hub_logging.get_verbosity(), not are_progress_bars_disabled()
    hub_logging.set_verbosity(logging.CRITICAL)
    if bars_were_on:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if bars_were_on:
            enable_progress_bars()

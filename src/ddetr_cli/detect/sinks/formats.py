"""The formats of results by name. Light: the command line reads it before Pillow and torch are imported."""

from __future__ import annotations

from ddetr_cli.detect.sources import CROPS_FOLDER, PICTURES_FOLDER, RESULT_FILES, SHEET_FILE

DETECTIONS_FILE, IMAGES_FILE = RESULT_FILES
LINES_FILE = "detections.jsonl"
TABLE_FILE, FAILURES_FILE = "detections.csv", "failures.csv"
LABELS_FOLDER, CLASSES_FILE = "labels", "classes.txt"

# In the order in which their files become final.
FORMATS: dict[str, tuple[str, ...]] = {
    "coco": (DETECTIONS_FILE, IMAGES_FILE),
    "jsonl": (LINES_FILE,),
    "csv": (TABLE_FILE, FAILURES_FILE),
    "yolo": (f"{LABELS_FOLDER}/", CLASSES_FILE),
    "images": (f"{PICTURES_FOLDER}/",),
    "crops": (f"{CROPS_FOLDER}/",),
    "sheet": (SHEET_FILE,),
}
STREAMED = ("coco", "jsonl", "csv")  # those that can go to stdout
DRAWN = ("images", "crops")  # those that need every pixel of every picture

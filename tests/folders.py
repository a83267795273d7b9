"""Small datasets in every folder layout that is read; tests/annotated.py makes those of labelling programs."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from drawn import COLOURS, square, write_image, write_mask, write_values
from PIL import Image
from pycocotools import mask as coco_mask

from defectfill_dataset.readers.discovery import OLD_NAMES


def write_object(
    folders: dict[str, Path], defects: dict[str, int] | None = None, good: int = 3, size: int = 48
) -> None:
    """Images, masks and good images, in the folders of these names; defects in folders named by their types."""
    for defect, number in (defects or {"hole": 4}).items():
        for i in range(number):
            mask = write_mask(folders["masks"] / defect / f"{i:03d}_mask.png", size)
            write_image(folders["images"] / defect / f"{i:03d}.png", size, COLOURS[defect], mask)
    for i in range(good):
        write_image(folders["good"] / f"{i:03d}.png", size)


def make_mvtec(root: Path, defects: dict[str, int] | None = None, good: int = 3, size: int = 48) -> Path:
    """An object in MVTec AD's layout; returns its folder."""
    folders = {"images": root / "test", "masks": root / "ground_truth", "good": root / "train/good"}
    write_object(folders, defects, good, size)
    return root


def make_seed_layout(root: Path, defects: dict[str, int] | None = None, good: int = 3, size: int = 48) -> Path:
    """An object in the tutorial's layout; returns its folder."""
    train = root / "train"
    folders = {"images": train / "defective", "masks": train / "defective_masks", "good": root / "test/good"}
    write_object(folders, defects, good, size)
    return root


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def folder_at(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def make_mvtec_ad2(root: Path, masks: str = "test_public/ground_truth/bad") -> Path:
    for name in ("000_regular", "001_overexposed"):
        write_image(root / f"test_public/bad/{name}.png", mask=write_mask(root / masks / f"{name}_mask.png"))
    for place in ("train/good", "validation/good", "test_public/good", "test_private"):
        write_image(root / place / "000_regular.png")
    return root


def make_loco(root: Path) -> Path:
    for defect in ("logical_anomalies", "structural_anomalies"):
        for i in range(2):
            write_values(root / f"ground_truth/{defect}/{i:03d}/000.png", (255 - i, 2, 2, 5, 5))
            write_image(root / f"test/{defect}/{i:03d}.png")
    for place in ("train/good", "validation/good", "test/good"):
        write_image(root / place / "000.png")
    return root


def make_visa(root: Path) -> Path:
    for i in range(2):
        write_values(root / f"Data/Masks/Anomaly/{i:03d}.png", (1 + i, 2, 2, 5, 5), (4, 9, 9, 12, 20))
        write_image(root / f"Data/Images/Anomaly/{i:03d}.JPG")
    write_image(root / "Data/Images/Normal/0000.JPG")
    return root


def make_ksdd2(root: Path) -> Path:
    for split, first in (("train", 10000), ("test", 20000)):
        for i in range(first, first + 3):
            write_image(root / split / f"{i}.png")
            write_values(root / split / f"{i}_GT.png", *([(255, 3, 3, 9, 9)] if i % 2 else []))
    return root


def make_btad(root: Path) -> Path:
    for name, extension in (("0000", "bmp"), ("0001", "png"), ("0002", "BMP")):
        write_image(root / f"test/ko/{name}.{extension}", mask=write_mask(root / f"ground_truth/ko/{name}.png"))
    write_image(root / "train/ok/0000.bmp"), write_image(root / "test/ok/0009.bmp")
    write_values(root / "ground_truth/ok/0009.png")
    return root


def make_magnetic_tile(root: Path) -> Path:
    for folder in ("MT_Blowhole", "MT_Crack"):
        for i in range(2):
            write_image(root / folder / f"Imgs/exp{i}.jpg", mask=write_mask(root / folder / f"Imgs/exp{i}.png"))
    write_image(root / "MT_Free/Imgs/exp5.jpg")
    write_values(root / "MT_Free/Imgs/exp5.png")
    return root


def make_free_folder(root: Path) -> Path:
    for name, mask in (("a.JPG", "a.png"), ("b.tif", "b_Mask.PNG"), ("c 1.bmp", "c 1-gt.bmp"), ("d.png", "d.seg.png")):
        write_image(root / "images" / name, mask=write_mask(root / "masks" / mask))
    write_image(root / "good/x.png")
    return root


def make_metadata(root: Path, name: str = "metadata.csv", objects: bool = False) -> Path:
    for i in range(2):
        write_image(root / f"pictures/{i}.png", mask=write_mask(root / f"marks/{i}.png"))
    write_image(root / "pictures/good.png")
    lines = [
        {"file_name": "pictures/0.png", "mask_file_name": "marks/0.png", "defect": "hole", "object": "nut"},
        {"file_name": "pictures/1.png", "mask_file_name": "marks/1.png", "defect": "", "object": "bolt"},
        {"file_name": "pictures/good.png", "mask_file_name": None, "defect": "", "object": "nut"},
    ]
    write_lines(root / name, [line if objects else {k: v for k, v in line.items() if k != "object"} for line in lines])
    return root


def write_lines(file: Path, lines: list[dict]) -> None:
    if file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
        return
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0].keys())
        writer.writeheader(), writer.writerows(lines)


POLYGON = [10, 12, 20, 12, 20, 30, 10, 30]
BOXED = square(12, 10, 30, 20)


def make_coco(root: Path, file: str = "annotations/instances.json", images: str = "images", **changes) -> Path:
    marked = square(3, 5, 9, 40)
    rle = coco_mask.encode(np.asfortranarray(marked.astype(np.uint8)))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked.T.ravel(), [False]]))).tolist()
    runs = np.diff([0, *edges, marked.size]).tolist()
    segmentations = [
        (0, 1, [POLYGON]),
        (1, 2, {"size": [48, 48], "counts": rle["counts"].decode()}),
        (2, 2, {"size": [48, 48], "counts": runs}),
        (3, 1, []),
        (4, 1, [POLYGON, [30, 30, 40, 30, 40, 40]]),
        (4, 2, [[1, 1, 4, 1, 4, 4, 1, 4]]),
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 48, "height": 48} for i in range(6)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "segmentation": s, "bbox": [10, 12, 10, 18]}
            for n, (i, c, s) in enumerate(segmentations)
        ],
        "categories": [{"id": 1, "name": "hole"}, {"id": 2, "name": "crack"}],
    }
    for i in range(6):
        write_image(root / images / f"{i}.png")
    write_json(root / file, content | changes)
    return root


def make_yolo(root: Path, labels: str = "labels", images: str = "images") -> Path:
    texts = {
        "box": "0 0.5 0.25 0.25 0.25\n",
        "outline": "1 0.25 0.25 0.5 0.25 0.5 0.75\n\n",
        "both": "0 0.5 0.25 0.25 0.25\n1 0.25 0.5 0.5 0.5 0.5 0.75 0.25 0.75\n",
        "empty": "",
    }
    (root / labels).mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (root / labels / f"{name}.txt").write_text(text)
        write_image(root / images / f"{name}.JPG")
    write_image(root / images / "none.png")
    (root / "data.yaml").write_text("names:\n  0: hole\n  1: crack\n")
    return root


def make_labelme(root: Path) -> Path:
    shapes = {
        "polygon": [("hole", "polygon", [[10, 12], [20, 12], [20, 30], [10, 30]])],
        "rectangle": [("hole", "rectangle", [[20, 30], [10, 12]])],
        "circle": [("pit", "circle", [[24, 24], [24, 34]])],
        "two": [("hole", None, [[10, 12], [20, 12], [20, 30], [10, 30]]), ("pit", "circle", [[40, 40], [43, 40]])],
        "clean": [],
    }
    for name, of_image in shapes.items():
        write_image(root / f"{name}.jpg")
        entries = [{"label": label, "shape_type": kind, "points": points} for label, kind, points in of_image]
        content = {"shapes": entries, "imagePath": f"{name}.jpg", "imageHeight": 48, "imageWidth": 48}
        write_json(root / f"{name}.json", content)
    write_image(root / "unmarked.png")
    return root


EXAMPLES = {
    "defectfill": make_seed_layout,
    "mvtec_ad2": make_mvtec_ad2,
    "btad": make_btad,
    "mvtec_loco": make_loco,
    "mvtec": make_mvtec,
    "visa": make_visa,
    "ksdd2": make_ksdd2,
    "magnetic_tile": make_magnetic_tile,
    "folder": make_free_folder,
    "metadata": make_metadata,
    "coco": make_coco,
    "yolo": make_yolo,
    "labelme": make_labelme,
}


def make_anomalib(root: Path, masks: str = "mask") -> Path:
    for defect in ("colour", "crack"):
        for i in range(2):
            write_image(root / f"{defect}/{i:02d}.jpg", mask=write_mask(root / f"{masks}/{defect}/{i:02d}.jpg"))
    write_image(root / "good/00.jpg")
    return root


def make_ksdd(root: Path) -> Path:
    for kos in ("kos01", "kos02"):
        for i in range(3):
            write_image(root / kos / f"Part{i}.jpg")
            write_values(
                root / kos / f"Part{i}_label.bmp", *([(1, 3, 3, 9, 9), (2, 20, 20, 25, 25)] if i == 1 else [])
            )
    return root


def make_3d(root: Path) -> Path:
    for defect, values in (("crack", (254,)), ("hole", (253,)), ("combined", (254, 253))):
        boxes = [(value, 4 + 10 * i, 4, 9 + 10 * i, 12) for i, value in enumerate(values)]
        write_values(root / f"test/{defect}/gt/000.png", *boxes)
        write_image(root / f"test/{defect}/rgb/000.png")
        Image.fromarray(np.zeros((48, 48), dtype=np.float32)).save(folder_at(root / f"test/{defect}/xyz") / "000.tiff")
    for place in ("train/good", "validation/good", "test/good"):
        write_image(root / f"{place}/rgb/000.png")
        Image.fromarray(np.zeros((48, 48), dtype=np.float32)).save(folder_at(root / f"{place}/xyz") / "000.tiff")
    write_values(root / "test/good/gt/000.png")
    return root


def make_dagm(root: Path) -> Path:
    for split, first in (("Train", 575), ("Test", 1)):
        lines = ["1"]
        for number in range(first, first + 3):
            write_image(root / f"{split}/{number:04d}.PNG")
            marked = number % 2 == 0
            if marked:
                write_mask(root / f"{split}/Label/{number:04d}_label.PNG")
            mask = f"{number:04d}_label.PNG" if marked else "0"
            lines.append(f"{number}\t{int(marked)}\t{number:04d}.PNG\t0\t{mask}")
        (root / f"{split}/Label/Labels.txt").write_text("\r\n".join(lines) + "\r\n")
    return root


def make_real_iad(root: Path, table: str = "../realiad_jsons/{}.json") -> Path:
    """With and without a double underscore, as in the published files; C2 does not show the defect."""
    entries = [("OK/S0001/part_0001_OK_C1_2023.jpg", None, "OK")]
    for code in ("AK", "BX"):
        stem = f"NG/{code}/S0001/part__0001_NG_{code}_C1_2023"
        entries.append((f"{stem}.jpg", f"{stem}.png", code))
        write_image(root / f"{stem}.jpg", mask=write_mask(root / f"{stem}.png"))
    entries.append(("NG/BX/S0001/part__0001_NG_BX_C2_2023.jpg", None, "OK"))
    write_image(root / entries[0][0]), write_image(root / entries[-1][0])
    if table:
        keys = ("image_path", "mask_path", "anomaly_class")
        listed = [{"category": root.name, **dict(zip(keys, entry))} for entry in entries]
        meta = {"prefix": f"{root.name}/", "normal_class": "OK"}
        write_json(root / table.format(root.name), {"meta": meta, "train": listed[:1], "test": listed[1:]})
    return root


def make_anomalydiffusion(root: Path) -> Path:
    for defect in ("crack", "hole"):
        for i in range(2):
            write_image(root / f"{defect}/image/{i}.jpg", mask=write_mask(root / f"{defect}/mask/{i}.jpg"))
            for step in ("image-mask", "ori", "recon"):
                write_image(root / f"{defect}/{step}/{i}.jpg")
    write_image(root / "good/0.jpg")
    return root


EXAMPLES_FOLDERS: dict[str, Callable[[Path], Path]] = {
    "mvtec_3d": make_3d,
    "anomalib": make_anomalib,
    "ksdd": make_ksdd,
    "dagm": make_dagm,
    "real_iad": make_real_iad,
    "anomalydiffusion": make_anomalydiffusion,
}
MAKERS = {OLD_NAMES.get(name, name): make for name, make in (EXAMPLES | EXAMPLES_FOLDERS).items()}

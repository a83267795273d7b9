"""Small folders with annotation files, as labelling programs export them."""

import json
import math
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from drawn import write_image
from PIL import Image
from pycocotools import mask as coco_mask

from defectfill_dataset.readers import read_object


SIZE = 48
TURNED = 12, 18, 24, 8  # left, top, width, height of the box that the tests turn
BAR = np.zeros((SIZE, SIZE), dtype=bool)
BAR[3:9, 5:40] = True


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def turned_box(degrees: float, about: str = "middle") -> np.ndarray:
    """The pixels whose centres are in `TURNED`, turned clockwise, by turning each of them back."""
    left, top, width, height = TURNED
    cx, cy = (left, top) if about == "corner" else (left + width / 2, top + height / 2)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    across, down = (x - cx) * cosine + (y - cy) * sine + cx, -(x - cx) * sine + (y - cy) * cosine + cy
    return (across > left) & (across < left + width) & (down > top) & (down < top + height)


def oval(cx: float, cy: float, rx: float, ry: float, degrees: float = 0, rim: float = 0) -> np.ndarray:
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    across, down = (x - cx) * cosine + (y - cy) * sine, -(x - cx) * sine + (y - cy) * cosine
    return (across / (rx + rim)) ** 2 + (down / (ry + rim)) ** 2 < 1


def is_oval(mask: np.ndarray, *shape: float) -> bool:
    """Whether a mask is the ellipse but for pixels within a quarter of one from its rim."""
    return bool((oval(*shape, rim=-0.25) <= mask).all() and (mask <= oval(*shape, rim=0.25)).all())


def marks(root: Path, image: str) -> dict[str, np.ndarray]:
    """Defect type -> mask of one image, as the layout's reader says."""
    return {row.defect: row.mask.render() for row in read_object(root, root.name).rows if row.image == root / image}


# Pascal VOC


def bndbox(name: str, left: float, top: float, right: float, bottom: float, more: str = "") -> str:
    edges = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
    return f"<object><name>{escape(name)}</name><bndbox>{edges}</bndbox>{more}</object>"


def write_voc(file: Path, *objects: str, name: str | None = None, size: int = SIZE) -> None:
    write_text(
        file,
        f"<annotation verified='yes'><folder>JPEGImages</folder><filename>{name or file.stem + '.jpg'}</filename>"
        f"<path>C:\\data\\{file.stem}.jpg</path><size><width>{size}</width><height>{size}</height><depth>3</depth></size>"
        f"{''.join(objects)}</annotation>",
    )


def robndbox(cx: float, cy: float, width: float, height: float, angle: float, name: str = "scratch") -> str:
    numbers = f"<cx>{cx}</cx><cy>{cy}</cy><w>{width}</w><h>{height}</h><angle>{angle}</angle>"
    return f"<object><type>robndbox</type><name>{name}</name><robndbox>{numbers}</robndbox></object>"


CVAT_TURN = "<attributes><attribute><name>rotation</name><value>30.0</value></attribute></attributes>"
OUTLINE = "<polygon><x1>10</x1><y1>12</y1><x2>20</x2><y2>12</y2><x3>20</x3><y3>30</y3><x4>10</x4><y4>30</y4></polygon>"
LEFT, TOP, WIDTH, HEIGHT = TURNED
RIGHT, BOTTOM = LEFT + WIDTH, TOP + HEIGHT


def make_voc(root: Path, annotations: str = "Annotations", images: str = "JPEGImages") -> Path:
    objects = {
        "box": [bndbox("hole", 10, 12, 20, 30)],
        "two": [bndbox("hole", 10, 12, 20, 30), bndbox("crack", 1, 1, 4, 9, "<difficult>1</difficult>")],
        "turned": [robndbox(LEFT + WIDTH / 2, TOP + HEIGHT / 2, WIDTH, HEIGHT, math.radians(30))],
        "cvat": [bndbox("scratch", LEFT, TOP, RIGHT, BOTTOM, CVAT_TURN)],
        "outline": [bndbox("hole", 0, 0, 48, 48, OUTLINE)],
        "clean": [],
    }
    for name, found in objects.items():
        write_image(root / images / f"{name}.jpg")
        write_voc(root / annotations / f"{name}.xml", *found)
    write_image(root / images / "unmarked.jpg")
    return root


PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, *[9] * 753, 224, 224, 192]  # of 0, 1, 2, 3 ... 255


def write_class_mask(path: Path, *boxes: tuple[int, int, int, int, int], palette: bool = True) -> None:
    """A mask with (value, top, left, bottom, right) boxes, in VOC's palette or as colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    for value, top, left, bottom, right in boxes:
        pixels[top:bottom, left:right] = value
    picture = Image.fromarray(pixels)
    picture.putpalette(PALETTE)
    (picture if palette else picture.convert("RGB")).save(path)


def make_voc_masks(root: Path, palette: bool = True, label_map: bool = True) -> Path:
    """As CVAT's "Segmentation mask 1.1"."""
    boxes = {
        "hole": [(1, 12, 10, 30, 20)],
        "both": [(1, 12, 10, 30, 20), (2, 1, 1, 9, 4), (255, 40, 40, 42, 48)],
        "crack": [(2, 5, 5, 9, 30)],
        "clean": [],
    }
    for name, found in boxes.items():
        write_image(root / f"JPEGImages/{name}.png")
        write_class_mask(root / f"SegmentationClass/{name}.png", *found, palette=palette)
        write_class_mask(root / f"SegmentationObject/{name}.png", *found, palette=palette)
    write_text(root / "ImageSets/Segmentation/default.txt", "hole\nboth\ncrack\nclean\n")
    if label_map:
        write_text(root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\nhole:128,0,0::\n"
                   "crack: big:0,128,0::\n")  # fmt: skip
    return root


def make_labelme_3(root: Path) -> Path:
    """As CVAT's "LabelMe 3.0"."""

    def points(*corners: tuple[float, float]) -> str:
        return "<polygon>" + "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in corners) + "<username/></polygon>"

    def entry(shape: str, kind: str = "", deleted: int = 0, attributes: str = "") -> str:
        return (f"<object><name>hole</name><deleted>{deleted}</deleted><occluded>no</occluded>{kind}{shape}"
                f"<attributes>{attributes}</attributes></object>")  # fmt: skip

    outline = points((10, 12), (20, 12), (20, 30), (10, 30))
    corners = points((LEFT, TOP), (RIGHT, TOP), (RIGHT, BOTTOM), (LEFT, BOTTOM))
    objects = {
        "outline": entry(outline),
        "gone": entry(outline, deleted=1),
        "turned": entry(corners, "<type>bounding_box</type>", attributes="rotation=30.0, track=1"),
        "mask": entry("<segm><mask>mask_mask_0.png</mask><box><xmin>3</xmin></box></segm>"),
    }
    for name, found in objects.items():
        write_image(root / f"Images/default/{name}.jpg")
        size = f"<imagesize><nrows>{SIZE}</nrows><ncols>{SIZE}</ncols></imagesize>"
        head = f"<annotation><filename>{name}.jpg</filename><folder>default</folder>{size}"
        write_text(root / f"Annotations/default/{name}.xml", f"{head}{found}</annotation>")
    pixels = np.zeros((SIZE, SIZE, 4), dtype=np.uint8)
    pixels[3:9, 5:40] = 255, 203, 0, 153
    (root / "Masks/default").mkdir(parents=True)
    Image.fromarray(pixels).save(root / "Masks/default/mask_mask_0.png")
    return root


# CVAT


def write_cvat(root: Path, shapes: dict[str, str], subset: str = "") -> Path:
    entries = [
        f'<image id="{n}" name="{name}" subset="{subset}" width="48" height="48">{shape}</image>'
        for n, (name, shape) in enumerate(shapes.items())
    ]
    head = "<?xml version='1.0' encoding='utf-8'?>\n<annotations><version>1.1</version><meta><task/></meta>"
    write_text(root / "annotations.xml", f"{head}{''.join(entries)}</annotations>")
    return root


BOX = f'<box label="scratch" xtl="{LEFT}" ytl="{TOP}" xbr="{RIGHT}" ybr="{BOTTOM}"'
CVAT = {
    "outline.png": '<polygon label="hole" points="10.00,12.00;20.00,12.00;20.00,30.00;10.00,30.00" z_order="0"/>'
    '<tag label="seen"/>',
    "box.png": BOX + "/>",
    "turned.png": BOX + ' rotation="30.00"><attribute name="depth">3</attribute></box>',
    "over.png": BOX + ' rotation="330"/>',
    "oval.png": '<ellipse label="pit" cx="24" cy="20" rx="16" ry="6" rotation="30.00"/>',
    "mask.png": '<mask label="hole" rle="1, 2, 2, 1" left="3" top="40" width="3" height="2"/>',
    "two.png": BOX + '/><polygon label="hole" points="1,1;4,1;4,9;1,9"/>',
    "clean.png": "",
    "fine.png": '<tag label="good"/>',
}


def make_cvat(root: Path, images: str = "images") -> Path:
    for name in CVAT:
        write_image(root / images / name)
    return write_cvat(root, CVAT)


# Datumaro


def datum(kind: str, **more) -> dict:
    return {"id": 7, "type": kind, "attributes": {}, "group": 0, "label_id": 0, "z_order": 0} | more


def make_datumaro(root: Path, images: str = "images/default") -> Path:
    marked = np.asfortranarray(BAR.astype(np.uint8))
    annotations = {
        "outline": [datum("polygon", points=[10, 12, 20, 12, 20, 30, 10, 30]), datum("caption", caption="x")],
        "box": [datum("bbox", bbox=[LEFT, TOP, WIDTH, HEIGHT])],
        "turned": [datum("bbox", bbox=[LEFT, TOP, WIDTH, HEIGHT], attributes={"occluded": False, "rotation": 30.0})],
        "obb": [datum("rotated_bbox", points=[LEFT + WIDTH / 2, TOP + HEIGHT / 2, WIDTH, HEIGHT, 30.0])],
        "oval": [datum("ellipse", points=[8, 14, 40, 26], attributes={"rotation": 30})],
        "mask": [datum("mask", rle={"counts": coco_mask.encode(marked)["counts"].decode(), "size": [SIZE, SIZE]})],
        "two": [datum("bbox", bbox=[1, 1, 3, 8], label_id=1), datum("bbox", bbox=[9, 9, 3, 8])],
        "clean": [],
    }
    items = []
    for name, found in annotations.items():
        write_image(root / images / f"{name}.png")
        image = {"path": "" if name == "box" else f"{name}.png", "size": [SIZE, SIZE]}
        items.append({"id": name, "annotations": found, "attr": {"frame": 0}, "image": image})
    categories = {"label": {"labels": [{"name": "hole", "parent": ""}, {"name": "crack", "parent": ""}]}, "points": {}}
    content = {"info": {}, "categories": categories, "items": items}
    write_text(root / "annotations/default.json", json.dumps(content))
    return root


# Label Studio


def packed(values: list[int] | np.ndarray, size: int = 8, sizes: tuple[int, ...] = (3, 4, 8, 16)) -> list[int]:
    """Label Studio's run lengths of these values: long runs as such, others as they are."""
    values = [int(value) for value in values]
    bits = f"{len(values):032b}{size - 1:05b}" + "".join(f"{s - 1:04b}" for s in sizes)
    place = 0
    while place < len(values):
        end = place
        while end < len(values) and values[end] == values[place] and end - place < 2 ** sizes[3]:
            end += 1
        same = end - place > 1
        end = end if same else min(place + 3, len(values))
        which = next(i for i, s in enumerate(sizes) if end - place - 1 < 2**s)
        bits += f"{same:b}{which:02b}{end - place - 1:0{sizes[which]}b}"
        bits += "".join(f"{value:0{size}b}" for value in ([values[place]] if same else values[place:end]))
        place = end
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def rgba(mask: np.ndarray, colour: tuple[int, ...] = (250, 50, 83, 128)) -> np.ndarray:
    return (mask[..., None] * np.array(colour)).astype(np.uint8).ravel()


def result(kind: str, labels: list[str] | None = None, **value) -> dict:
    return {"id": "r1", "type": kind, "from_name": "label", "to_name": "image", "image_rotation": 0,
            "original_width": SIZE, "original_height": SIZE,
            "value": value | ({kind: labels or ["hole"]} if kind.endswith("labels") else {})}  # fmt: skip


def per_cent(*values: float) -> list[float]:
    return [value / SIZE * 100 for value in values]


def rectangle(degrees: float = 0) -> dict:
    x, y, width, height = per_cent(*TURNED)
    return result("rectanglelabels", x=x, y=y, width=width, height=height, rotation=degrees)


def brush(mask: np.ndarray) -> dict:
    return result("brushlabels", format="rle", rle=packed(rgba(mask)))


def annotated(*results: dict, **more) -> dict:
    return {"id": 11, "was_cancelled": False, "result": list(results)} | more


def task(name: str, *annotations: dict, **more) -> dict:
    return {"id": 3, "data": {"image": name}, "annotations": list(annotations), "predictions": []} | more


SPECKS = BAR & ((np.mgrid[:SIZE, :SIZE][0] + np.mgrid[:SIZE, :SIZE][1]) % 3 > 0)


def make_label_studio(root: Path) -> Path:
    x, y = per_cent(10, 20), per_cent(12, 30)
    corners = [[x[0], y[0]], [x[1], y[0]], [x[1], y[1]], [x[0], y[1]]]
    (cx, cy, rx, ry) = per_cent(24, 20, 16, 6)
    oval_ = result("ellipselabels", x=cx, y=cy, radiusX=rx, radiusY=ry, rotation=30)
    tasks = {
        "outline": [result("polygonlabels", points=corners, closed=True)],
        "box": [rectangle()],
        "turned": [rectangle(30)],
        "oval": [oval_],
        "brush": [brush(SPECKS)],
        "two": [result("polygonlabels", ["hole", "crack"], points=corners), {"type": "relation", "from_id": "r1"}],
        "apart": [rectangle() | {"type": "rectangle"}, rectangle() | {"type": "labels", "value": {"labels": ["pit"]}}],
        "clean": [],
        "fine": [result("choices", choices=["ok"])],
    }
    names = {"outline": "/data/upload/1/0a1b2c3d-outline.png", "box": "/data/local-files/?d=data/images/bo%78.png",
             "turned": "s3://bucket/a/turned.png", "oval": "https://x.org/oval.png?sig=a%2Fb",
             "two": "C:\\d\\two.png"}  # fmt: skip
    for name in tasks:
        write_image(root / f"images/{name}.png")
    content = [task(names.get(name, f"{name}.png"), annotated(*found)) for name, found in tasks.items()]
    write_text(root / "project-1-at-2026.json", json.dumps(content))
    return root


# None of them


EXAMPLES_ANNOTATIONS = {
    "voc": make_voc,
    "cvat": make_cvat,
    "datumaro": make_datumaro,
    "label_studio": make_label_studio,
}

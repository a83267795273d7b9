"""What scripts/export_generated.py writes, read by the programs it is meant for; tests/consumers/run.sh runs it."""

import json
import logging
import os
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from generated_folder import export, marks, read_back
from PIL import Image
from torch.nn import functional


os.environ |= {"YOLO_CONFIG_DIR": tempfile.mkdtemp(prefix="defectfill-tests-"), "YOLO_AUTOINSTALL": "false"}

from anomalib.data import Folder, MVTecAD, Tabular  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402
from ultralytics.data.dataset import YOLODataset  # noqa: E402
from ultralytics.data.utils import check_det_dataset  # noqa: E402
from ultralytics.utils import LOGGER  # noqa: E402


OBJECT = {"dtype": {"mask_path": object}}  # anomalib 2.7 puts Paths in a column of strings, which pandas 3 refuses
HERE = {"num_workers": 0, "train_batch_size": 4, "eval_batch_size": 4, "val_split_mode": "same_as_test"}


def check_anomalib(module, generated: Path, train: int, test_good: int) -> None:  # noqa: F811
    """Every image of every batch has its label and its mask."""
    module.setup()
    batches = list(module.train_dataloader())
    assert sum(len(batch.image) for batch in batches) == train and not any(batch.gt_label.any() for batch in batches)
    seen, good = {}, 0
    for batch in module.test_dataloader():
        for path, label, mask in zip(batch.image_path, batch.gt_label, batch.gt_mask):
            if label:
                seen[Path(path).stem] = mask.numpy().astype(bool).squeeze()
            else:
                good += 1
                assert not mask.any()
    expected = {name: mask for name, (_, mask) in marks(generated).items()}
    assert good == test_good and seen.keys() == expected.keys()
    assert all(np.array_equal(seen[name], expected[name]) for name in seen)


def same_size(photos: Path) -> None:  # noqa: F811
    """Gives the photographs the size of the generated images: a batch is stacked."""
    for file in photos.iterdir():
        Image.open(file).resize((64, 48)).save(file)


def test_anomalib_folder_and_tabular(tmp_path, generated, photos):  # noqa: F811
    same_size(photos)
    out = export(tmp_path / "out", "anomalib", generated, "--good", photos)
    counts = {place: len(list((out / place).iterdir())) for place in ("normal", "normal_test")}
    folder = Folder(
        name="nut", root=out, normal_dir="normal", abnormal_dir="abnormal", normal_test_dir="normal_test",
        mask_dir="masks", **HERE,
    )  # fmt: skip
    tabular = Tabular.from_file(name="nut", file_path=out / "samples.csv", root=out, pd_kwargs=OBJECT, **HERE)
    for module in (folder, tabular):
        check_anomalib(module, generated, counts["normal"], counts["normal_test"])


def test_anomalib_mvtec(tmp_path, generated, photos):  # noqa: F811
    same_size(photos)
    out = export(tmp_path / "out", "mvtec", generated, "--good", photos)
    counts = [len(list((out / "metal nut" / split / "good").iterdir())) for split in ("train", "test")]
    check_anomalib(MVTecAD(root=out, category="metal nut", **HERE), generated, *counts)


def test_anomalib_trains_on_it(tmp_path, generated, photos):  # noqa: F811
    """A short fit of a PatchCore whose backbone has random weights: pretrained ones would be downloaded."""
    from anomalib.engine import Engine
    from anomalib.models import Patchcore

    out = export(tmp_path / "out", "anomalib", generated, "--good", photos)
    module = Tabular.from_file(name="nut", file_path=out / "samples.csv", root=out, pd_kwargs=OBJECT, **HERE)
    model = Patchcore(backbone="resnet18", pre_trained=False, coreset_sampling_ratio=0.05)
    engine = Engine(default_root_dir=tmp_path / "results", accelerator="cpu", logger=False)
    engine.fit(model=model, datamodule=module)
    (results,) = engine.test(model=model, datamodule=module)
    assert {"image_AUROC", "pixel_AUROC"} <= results.keys()


def test_pycocotools_finds_the_annotations_perfect(tmp_path, generated, photos):  # noqa: F811
    out = export(tmp_path / "out", "coco", generated, "--good", photos, "--test_share", 0)
    coco = COCO(out / "annotations.json")
    for image in coco.loadImgs(coco.getImgIds()):
        found = coco.loadAnns(coco.getAnnIds(image["id"]))
        if found:
            mask = marks(generated)[Path(image["file_name"]).stem][1]
            assert np.array_equal(np.any([coco.annToMask(a) for a in found], axis=0), mask)
    results = [{**annotation, "score": 1.0} for annotation in coco.dataset["annotations"]]
    (tmp_path / "results.json").write_text(json.dumps(results))
    for kind in ("segm", "bbox"):
        judge = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), kind)
        judge.evaluate(), judge.accumulate(), judge.summarize()
        assert judge.stats[0] == pytest.approx(1)


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_ultralytics_reads_the_labels_without_a_word(tmp_path, generated, photos, task, caplog):  # noqa: F811
    out = export(tmp_path / "out", {"segment": "yolo", "detect": "yolo-detect"}[task], generated, "--good", photos)
    data = check_det_dataset(out / "data.yaml")
    assert data["names"] == {0: "defect", 1: "hole"}
    LOGGER.propagate = True
    found = read_back(out)[0]
    names = set()
    for side in ("train", "val"):
        with caplog.at_level(logging.WARNING):
            dataset = YOLODataset(img_path=data[side], data=data, task=task, augment=False, imgsz=64, rect=False)
        for label in dataset.labels:
            file = Path(label["im_file"])
            lines = (out / "labels" / side / f"{file.stem}.txt").read_text().splitlines() if file.stem in found else []
            assert len(label["cls"]) == len(lines) == len(label["segments"] if task == "segment" else lines)
            assert [int(c) for c in label["cls"].ravel()] == [int(line.split()[0]) for line in lines]
            names.add(file.stem)
            if lines and task == "segment":
                area = sum(polygon_area(segment * (64, 48)) for segment in label["segments"])
                assert area == pytest.approx(marks(generated)[file.stem][1].sum(), abs=0.01)
        assert len(dataset.labels) == len(list((out / "images" / side).iterdir()))
        sample = dataset[next(i for i, label in enumerate(dataset.labels) if len(label["cls"]))]
        assert sample["img"].shape == (3, 64, 64) and len(sample["cls"]) == len(sample["bboxes"])
        assert task == "detect" or sample["masks"].any()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(names) == 24


def polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2


def test_a_torch_dataset_of_an_imagefolder(tmp_path, generated):  # noqa: F811
    """`datasets` as a segmenter would use it; tests/test_exports.py compares every pixel."""
    for file_format in ("imagefolder", "parquet"):
        out = export(tmp_path / file_format, file_format, generated)
        data = datasets.load_dataset(str(out), split="train").with_format("torch")
        batch = next(iter(torch.utils.data.DataLoader(data.select_columns(["image", "mask"]), batch_size=4)))
        image, mask = batch["image"].float() / 255, (batch["mask"] > 127).float().squeeze()
        assert image.shape == (4, 3, 48, 64) and mask.shape == (4, 48, 64)
        assert functional.binary_cross_entropy(mask, mask) == 0 and 0 < mask.mean() < 0.5

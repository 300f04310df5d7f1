"""Unpack and verify CIFAR-10 as JPEG files, from an archive (make data)."""

import argparse
from pathlib import Path

from rst.data.cifar10_jpeg import unpack, verify
from rst.experiments.command_line import launch

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE, FOLDER = ROOT.parent / "shared" / "data" / "cifar10-jpeg.tar.gz", ROOT / "data" / "cifar10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="tar file of train/ and test/")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to; verified if it exists")
    arguments = parser.parse_args()
    folder = arguments.folder
    data = verify(folder) if folder.is_dir() else unpack(arguments.archive, folder)
    means = ", ".join(f"{mean:.4f}" for mean in data.mean)
    n_train, n_test = len(data.train_labels), len(data.test_labels)
    print(f"{folder}: {n_train} + {n_test} images, channel means {means}")


if __name__ == "__main__":
    launch(main)

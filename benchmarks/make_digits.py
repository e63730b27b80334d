"""Write the embedded digits data set, timm_selfdistill/digits/*.parquet, from scikit-learn's copy.

Run from the repository root, with scikit-learn installed: python benchmarks/make_digits.py
"""

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import fromarray
from sklearn.datasets import load_digits

FOLDER = Path(__file__).parent.parent / "timm_selfdistill" / "digits"
TEST_SIZE = 360
SEED = 0


def main() -> None:
    """Write a train and a test split with the class shares of the whole."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    rows = {"image": [fromarray(image) for image in pixels], "label": digits.target.tolist()}
    splits = Dataset.from_dict(rows, features=features).train_test_split(
        test_size=TEST_SIZE, stratify_by_column="label", seed=SEED
    )
    FOLDER.mkdir(exist_ok=True)
    for name, split in splits.items():
        split.to_parquet(FOLDER / f"{name}.parquet")
        print(name, len(split), np.bincount(split["label"]).tolist())


if __name__ == "__main__":
    main()

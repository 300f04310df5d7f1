"""What makes a run the run that it is: a hash of the settings that determine its result."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

# Settings that cannot change a result; of a group, all that it holds. `dataset.root` is where the data lie,
# not what they are, which image_folder's `name` says.
NOT_IDENTITY = (
    "checkpoint",
    "device",
    "outputs",
    "tracker",
    "dataset.root",
    "dataset.download",
    "dataset.in_memory",
    "dataset.workers",
)
# Options that came after the first recorded runs, each with the value that leaves a run as it was without the
# option. At that value an option is no part of the identity, so that recorded runs keep theirs.
NEUTRAL: dict[str, Any] = {
    "augment.policies": "torchvision",
    "augment.mixup_first": False,
    "dataset.fold": None,
    "dataset.folds": None,
    "dataset.interpolation": "bilinear",
    "method.sampling": "independent",
    "dataset.label_noise": None,  # digits had it before, at 0.0 where there is none
}


def identity(config: Mapping[str, Any]) -> str:
    """`r` and eight hex digits of the SHA-256 of the settings that determine the result. Without the letter,
    a reader of tables would take 1e234567 for a number.

    It survives refactoring: this package's classes and functions count by their name, not by the module they
    are in. A setting that is renamed, or an option whose default changes results, makes another run.
    """
    kept = {path: value for path, value in _flat(config) if not _is_left_out(path, value)}
    data = config.get("dataset", {})
    is_fixed = "name" not in data and data.get("_target_", "").startswith("rst.")  # as CIFAR is
    if "root" in data and data.get("name") is None and not is_fixed:
        kept["dataset.root"] = data["root"]  # nothing else tells somebody's own data apart
    return "r" + hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of each setting."""
    for key, value in node.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}.")
        elif key == "_target_":
            yield path, _without_module(value)
        elif key not in ("_partial_", "_convert_", "_recursive_"):  # how Hydra calls the target
            yield path, _canonical(value)


def can_change_results(path: str) -> bool:
    """Whether the setting at a dotted path, such as "dataset.root", can change a result."""
    return not any(f"{path}.".startswith(f"{name}.") for name in NOT_IDENTITY)


def _is_left_out(path: str, value: Any) -> bool:
    # `rho` is where `method.rho` takes its value from.
    return path == "rho" or not can_change_results(path) or (path in NEUTRAL and value == NEUTRAL[path])


def _without_module(target: str) -> str:
    """`rst.schedule.Linear.with_mean` → `Linear.with_mean`. Other packages' targets stay as they are."""
    return re.sub(r"^rst\.([a-z_]\w*\.)*", "", target)


def _canonical(value: Any) -> Any:
    """`p=1` and `p=1.0` are one setting."""
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value

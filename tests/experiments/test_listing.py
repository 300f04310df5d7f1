"""What `python train.py --list` prints."""

import pytest
from conftest import ROOT

import rst.experiments.choices  # noqa: F401  registers the resolver that conf/train.yaml uses
from rst.experiments.listing import GROUPS, listing, options


@pytest.mark.slow
def test_every_option_has_a_line_with_its_comment_and_models_have_their_size():
    lines = {" ".join(line.split()) for line in listing(ROOT / "conf").splitlines()}
    for group in GROUPS:
        for name, comment in options(ROOT / "conf", group).items():
            assert comment, f"conf/{group}/{name}.yaml begins with no comment"
            assert f"{name} {comment}" in lines
    (size,) = {line.split(" WRN-28-10 ")[0] for line in lines if line.startswith("wrn28_10 ")}
    assert size == "wrn28_10 36 220 634"

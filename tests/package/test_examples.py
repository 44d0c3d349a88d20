"""Every Python block of the README and of the documentation runs, and does what the text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """Run the blocks of a page one after the other, as its reader would, and return their names."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)
    return names


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name
)
def test_examples_run(page: Path) -> None:
    run(page)


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_first_example_does_what_it_says(name: str) -> None:
    torch.manual_seed(0)
    names = run(ROOT / name)
    k_pool, v_pool, q, v = (names[key] for key in ("k_pool", "v_pool", "q", "v"))
    written = {7, 8, 9, 400}
    for pool in (k_pool, v_pool):
        assert set(pool.abs().sum(dim=(1, 2)).nonzero().flatten().tolist()) == written
    assert torch.equal(v_pool[[7, 8, 9, 400]], v[:4])
    torch.manual_seed(0)
    before = torch.randn(5, 15, 64, dtype=torch.bfloat16)[:, :9]
    assert torch.equal(q[0], before[0])  # position 0 rotates by nothing
    assert not torch.equal(q[4], before[4])  # a padding token's query is rotated


def test_the_readme_example_has_ten_lines() -> None:
    [block] = blocks(ROOT / "README.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10

"""What the documentation names exists: files, links between pages, and tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "tests/README.md", "slurm/README.md", "ds_configs/*.md",
                    "kernels/**/*.md")
    for path in ROOT.glob(pattern)
    if "results" not in path.parts and path.name != "CHANGELOG.md"
)  # fmt: skip
PLACES = (ROOT, ROOT / "dalr_scale", ROOT / "kernels", ROOT / "kernels" / "dalr_kernels")
FILE = re.compile(r"`((?:[\w.{}*,-]+/)+[\w.{}*,-]*|[\w-]+\.(?:py|sh|md|toml))`")
# Files that a reader makes, and one of another project.
ELSEWHERE = {
    "dalr_scale/objective/uniformity.py",
    "tests/unit/objective/test_uniformity.py",
    "shards/quickstart/scenes.png",
    "deepspeed/runtime/engine.py",
}
ENDINGS = ("py", "sh", "md", "toml", "yml", "yaml", "png")


def named_files(text: str) -> set[str]:
    """Paths of this repository in backticks; those of users' data have other endings or none."""
    found = set()
    for name in FILE.findall(text):
        first, last = name.split("/")[0], name.rstrip("/").split("/")[-1]
        known = any((place / first).exists() for place in PLACES)
        if "NAME" in name or name in ELSEWHERE:
            continue
        if known or ("/" in name and last.rpartition(".")[2] in ENDINGS):
            found.add(name)
    return found


def missing_files(page: Path, text: str) -> list[str]:
    directories = (*PLACES, page.parent)
    return [
        name
        for name in sorted(named_files(text))
        if not any(list(place.glob(part)) for place in directories for part in alternatives(name))
    ]


def alternatives(name: str) -> list[str]:
    """``a/{b,c}.py`` as two patterns."""
    found = re.search(r"\{([^}]*)\}", name)
    if not found:
        return [name.rstrip("/")]
    return [name.replace(found[0], choice).rstrip("/") for choice in found[1].split(",")]


def missing_links(page: Path, text: str) -> list[str]:
    links = re.findall(r"\]\(([^)#\s]+)", text)
    local = [link for link in links if "://" not in link]
    return [link for link in local if not (page.parent / link).exists()]


def missing_tests(text: str) -> set[str]:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    return {
        name
        for name in re.findall(r"`(test_\w+)`", text)
        if f"def {name}(" not in sources and not list((ROOT / "tests").rglob(f"{name}.py"))
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not missing_files(page, text)
    assert not missing_links(page, text)
    assert not missing_tests(text)


def test_control_wrong_names_are_found() -> None:
    text = "`dalr_scale/no_such.py` and `training/trainer.py`, [a](docs/none.md), `test_of_nothing`"
    assert missing_files(ROOT / "README.md", text) == ["dalr_scale/no_such.py"]
    assert missing_links(ROOT / "README.md", text) == ["docs/none.md"]
    assert missing_tests(text) == {"test_of_nothing"}

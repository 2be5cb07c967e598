"""Whether the wheel and the sdist in a folder hold what they should: `python tests/check_dist.py dist`.

`make dist` runs it. It is no pytest file, because it needs the built files.
"""

import sys
import tarfile
import zipfile
from pathlib import Path

NEEDED = (
    "renyi/py.typed",
    "renyi/zoo/weights/model.safetensors",
    "renyi/zoo/weights/tokenizer.json",
    "renyi/audit/report.html",
)
REFUSED = ("tests/", ".github/", "runs/", ".venv/", "benchmarks/")


def main(folder: str) -> None:
    (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    for name in NEEDED:
        assert name in inside, f"{wheel.name} lacks {name}"
    strangers = [n for n in inside if not n.startswith("renyi")]
    assert not strangers, f"{wheel.name} holds {strangers[:5]}"
    assert any(n.endswith("licenses/LICENSE") for n in inside), f"{wheel.name} has no licence"
    with tarfile.open(sdist) as packed:
        source = [n.partition("/")[2] for n in packed.getnames()]
    for name in ("pyproject.toml", "README.md", "LICENSE", *(f"src/{n}" for n in NEEDED)):
        assert name in source, f"{sdist.name} lacks {name}"
    assert not [n for n in source if n.startswith(REFUSED)], f"{sdist.name} holds tests or runs"
    size = wheel.stat().st_size / 1e6
    print(f"{wheel.name}: {len(inside)} files, {size:.1f} MB; {sdist.name}: {len(source)} files")


if __name__ == "__main__":
    main(*sys.argv[1:])

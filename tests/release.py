"""``make release``: wheel and sdist into dist/, and the wheel tried in empty environments, away from the checkout.

client    encodes and inspects with an export, without torchtitan
train     trains and exports a shipped config, with the configs and the demo's trunk out of the wheel

Nothing of the checkout is on the path: each environment is new and works in an empty folder. Versions are those of
constraints.txt. With --dirty, files that are not committed may go into what is built.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
STEPS = ["--training.steps", "2", "--metrics.probe_every", "0"]
USES = """
import sgt_titan.client, sys
assert not {name for name in sys.modules if name.startswith(("torchtitan", "datasets"))}
from sgt_titan.client import StainedGlassTransform
sgt = StainedGlassTransform.from_pretrained(sys.argv[1], hold_noise=False)
print(tuple(sgt.encode([{"role": "user", "content": "hello there"}]).shape))
"""


def run(*words: str | Path, cwd: Path, fails: bool = False) -> str:
    """What it printed; ends with an error unless it succeeds, or with ``fails`` unless it does not."""
    print("$", *words, flush=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SGT_TITAN_ASSETS")}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, text=True, capture_output=True, check=False)
    if (done.returncode != 0) != fails:
        sys.exit(f"{done.stdout}{done.stderr}\nexit code {done.returncode}")
    return done.stdout + done.stderr


def build(dirty: bool) -> Path:
    """The wheel, built from the sdist as an index would."""
    if not dirty and run("git", "status", "--porcelain", cwd=REPO).strip():
        sys.exit("the working tree has changes that are not committed; a release has none (--dirty to try one)")
    dist = REPO / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", dist, REPO, cwd=REPO)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    wanted = {f"train_configs/{file.relative_to(REPO / 'train_configs')}" for file in configs()}
    with zipfile.ZipFile(wheel) as archive:
        missing = wanted - {name.removeprefix("sgt_titan/") for name in archive.namelist()}
    assert not missing, f"{wheel.name} lacks {sorted(missing)}"
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym()], f"{sdist.name} holds links"
    return wheel


def configs() -> list[Path]:
    return [path for path in (REPO / "train_configs").rglob("*") if path.is_file()]


def environment(folder: Path, wheel: Path, extra: str, torch_index: str) -> Path:
    """The folder of programs of a new environment with the wheel and one extra."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "-c", REPO / "constraints.txt"]
    index = ["--extra-index-url", torch_index] if torch_index else []
    run(*pip, "--no-deps", *index, "torch", cwd=folder.parent)
    run(*pip, f"{wheel}[{extra}]", cwd=folder.parent)
    return folder / "bin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-index", default="", help="where the CPU build of torch comes from")
    parser.add_argument("--dirty", action="store_true", help="whatever git says of the working tree")
    options = parser.parse_args()
    wheel = build(options.dirty)
    with tempfile.TemporaryDirectory() as name:
        away = Path(name)
        train = environment(away / "train", wheel, "train", options.torch_index)
        work = away / "work"
        work.mkdir()
        shown = run(train / "sgt-titan", "configs", cwd=work)
        assert all(path.stem in shown for path in (REPO / "train_configs").glob("*.yaml")), shown
        run(train / "sgt-titan", "train", "llama3_70b_64x8", "--dry-run", cwd=work)  # its architecture is in the wheel
        run(train / "sgt-titan", "train", "demo", *STEPS, cwd=work)
        export = work / "outputs" / "demo" / "export"
        assert (export / "config.json").is_file()
        client = environment(away / "client", wheel, "client", options.torch_index)
        assert "No module named 'torchtitan'" in run(client / "python", "-c", "import torchtitan", cwd=work, fails=True)
        print(run(client / "python", "-W", "error::ImportWarning", "-c", USES, export, cwd=work))
        (work / "letter.txt").write_text("Dear Ella, thank you for the coat.")
        run(client / "sgt-titan", "inspect", export, "letter.txt", cwd=work)
        refused = run(client / "sgt-titan", "train", "demo", cwd=work, fails=True)
        assert "pip install 'sgt-titan[train]'" in refused, refused
    print(f"\nbuilt and tried: {', '.join(sorted(path.name for path in (REPO / 'dist').iterdir()))}")


if __name__ == "__main__":
    main()

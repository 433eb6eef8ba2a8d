"""Every command of the README and the manual runs as it is written.

They are typed in a folder that has what the documents name: `data/coco` (drawn scenes), the default
base in the hub's cache and the others under `weights` (tiny, random), pictures to fill. Only values
are replaced, by SUBSTITUTIONS; no flag is dropped. The Chinese manual holds the same commands
(tests/unit/test_docs.py).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from demo.random_base import write_random_base
from demo.scenes import write_scenes
from model import build_controlnet, load_base
from tests import original_file
from tests.commands import PRELOADED

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "LIGHTNING_GUIDE.md"
LIMIT_S = 300
HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# The run that the documents name. It is what the manual's first training command leaves.
RUN = "controlnet_inpainting_lightning_20260101_120000"

# What stands in the documents -> what the test types: sizes and counts for a CPU, nothing else.
SUBSTITUTIONS = {
    "--num_epochs 100": "--num_epochs 1",
    "--max_steps 100": "--max_steps 4",
    "--log_every_n_steps 10": "--log_every_n_steps 2",
    "--image_size 512": "--image_size 64",
    "--num_inference_steps 50": "--num_inference_steps 4",
    "--num_inference_steps 20": "--num_inference_steps 4",
    "--devices 4": "--devices 2",
    "--num_pictures 64": "--num_pictures 1",
}
NODE_SUBSTITUTIONS = {
    "--nproc_per_node 4": "--nproc_per_node 1",
    "--devices 4": "--devices 1",
    "--master_addr 10.0.0.1": "--master_addr 127.0.0.1",
}
# Runs only where there is such a device: here it must be refused, in one line.
REFUSED = {
    "--strategy deepspeed": "needs CUDA, got a machine or a torch without. Use --strategy ddp.",
    "--accelerator tpu": "--accelerator tpu needs",
    "--devices 0,2": "--devices must be a number of processes on CPU",
}
if find_spec("bitsandbytes") is None:
    REFUSED["--use_8bit_adam"] = "--use_8bit_adam needs bitsandbytes, got an installation without"
# Not started here: these make the environment that the tests are running in.
INSTALLS = (
    "python -m venv .venv", "source .venv/bin/activate", "pip install -r requirements.txt",
)  # fmt: skip
MAKES = {"make demo": "-m demo", "make test": "-m pytest -n 2 --dist loadfile"}
RESULTS = {"--dry_run": None, "--check": None, "--find_lr": "find_lr.png"}


def documented_commands() -> list[str]:
    """Return the commands of the manual, then those that only the README has, each once."""
    commands: dict[str, None] = {}
    for path in (GUIDE, ROOT / "README.md"):
        for block in re.findall(r"```bash\n(.*?)```", path.read_text("utf-8"), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            commands |= {line: None for line in lines if line and not line.startswith("#")}
    return list(commands)


COMMANDS = documented_commands()
TRAINING = [command for command in COMMANDS if command.startswith("python train_lightning.py")]
FILLING = [command for command in COMMANDS if command.startswith("python infer.py")]
EXPORTING = [command for command in COMMANDS if command.startswith("python -m tools.export")]
EVALUATING = [command for command in COMMANDS if command.startswith("python -m tools.evaluate")]
CACHING = [command for command in COMMANDS if command.startswith("python -m tools.cache_latents")]
MULTI_NODE = [command for command in COMMANDS if command.startswith("torchrun")]
WATCHING = [command for command in COMMANDS if command.startswith("tensorboard")]


@dataclass
class Place:
    """Where the commands are typed.

    Attributes:
        folder: the working folder.
        hub_cache: a hub cache that has the default base.
        run_dir: the run that the documents call RUN, once it is there.
    """

    folder: Path
    hub_cache: Path
    run_dir: Path | None = None

    def runs(self) -> set[Path]:
        """Return all run folders."""
        return set((self.folder / "outputs").glob("controlnet_inpainting_lightning_*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Lay out what the documents name."""
    folder = tmp_path_factory.mktemp("user")
    scenes = write_scenes(folder / "scenes", num_scenes=40, size=72, seed=3)
    coco = folder / "data" / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        shutil.copytree(scenes / "images", coco / split)
        for kind in ("instances", "captions"):
            source = scenes / "annotations" / f"{kind}.json"
            shutil.copy(source, coco / "annotations" / f"{kind}_{split}.json")
    weights = folder / "weights"
    base = write_random_base(weights / "stable-diffusion-v1-5")
    sd2 = write_random_base(weights / "stable-diffusion-2-1", prediction_type="v_prediction")
    tensors = original_file.tensors(load_base(str(sd2)), is_open_clip=True)
    save_file(tensors, weights / "v2-1_768-ema-pruned.safetensors")
    write_old_weights(folder / "outputs" / "old" / "checkpoint-1000" / "controlnet.pth", base=base)
    write_pictures(folder, source=coco / "train2017")
    (folder / "coco.args").write_text(substitute(argument_file()))
    return Place(folder, write_hub_cache(folder / "hub", base=base))


def argument_file() -> str:
    """Return the manual's coco.args."""
    match = re.search(r"```text\n(# coco\.args\n.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    assert match
    return match[1]


def write_hub_cache(folder: Path, *, base: Path) -> Path:
    """Put a base into a hub cache under the default base's id."""
    repository = folder / f"models--{HUB_ID.replace('/', '--')}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(base, repository / "snapshots" / commit)
    return folder


def write_old_weights(path: Path, *, base: Path) -> None:
    """Write what the plain-loop trainer left: a dict of tensors with diffusers' names."""
    loaded = load_base(str(base))
    path.parent.mkdir(parents=True)
    torch.save(build_controlnet(loaded.unet, stride=loaded.stride).state_dict(), path)


def write_pictures(folder: Path, *, source: Path) -> None:
    """Write pictures and masks for infer.py: test.jpg, mask.png, photos/ and masks/."""
    mask = np.zeros((72, 72), np.uint8)
    mask[20:50, 15:45] = 255
    for name in ("photos", "masks"):
        (folder / name).mkdir()
    for number, path in enumerate(sorted(source.iterdir())[:2]):
        Image.open(path).save(folder / "photos" / f"cat{number}.jpg")
        Image.fromarray(mask).save(folder / "masks" / f"cat{number}.png")
    shutil.copy(folder / "photos" / "cat0.jpg", folder / "test.jpg")
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(255 - mask).save(folder / "mask_black.png")


def substitute(command: str, substitutions: dict[str, str] = SUBSTITUTIONS) -> str:
    """Replace whole values."""
    for written, typed in substitutions.items():
        command = re.sub(rf"{re.escape(written)}(?!\S)", typed, command)
    return command


def run(command: str, place: Place) -> tuple[int, str]:
    """Run a `python ...` command in the user's folder; returns exit code and output.

    Forked from a process that has imported torch and its friends: what runs is the same script.
    """
    typed = substitute(command).replace(RUN, place.run_dir.name if place.run_dir else RUN)
    argv = shlex.split(typed)[1:]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    log_path = place.folder / "log.txt"
    log_path.unlink(missing_ok=True)
    process = context.Process(target=be_python, args=(argv, place, log_path))
    process.start()
    process.join(LIMIT_S)
    is_hanging = process.is_alive()
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join(10)
    lines = log_path.read_text(errors="replace").splitlines()
    output = "\n".join(line for line in lines if line.strip() and "it/s" not in line)
    assert not is_hanging, f"$ {typed}\nhangs after {LIMIT_S} s:\n{output}"
    assert process.exitcode is not None
    return process.exitcode, f"$ {typed}\n{output}"


def be_python(argv: list[str], place: Place, log_path: Path) -> None:
    """Be `python SCRIPT ...` or `python -m MODULE ...`, typed in the user's folder."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # loader workers start as everywhere
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(place.folder)
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ |= environment(place)
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = str(place.hub_cache)  # it was read when the module was imported
    sys.path.insert(0, str(ROOT))
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(ROOT / argv[0]), *argv[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")


def environment(place: Place) -> dict[str, str]:
    """Return what is set for every command: no GPU, no network, the prepared hub cache."""
    return {
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "HF_HUB_CACHE": str(place.hub_cache), "XDG_CACHE_HOME": str(place.folder / "cache"),
    }  # fmt: skip


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    tested = {
        *TRAINING,
        *FILLING,
        *EXPORTING,
        *EVALUATING,
        *CACHING,
        *MULTI_NODE,
        *WATCHING,
        *INSTALLS,
        *MAKES,
    }
    assert set(COMMANDS) == tested, f"untested: {set(COMMANDS) ^ tested}"


def test_substitutions_replace_values_only() -> None:
    documented = "\n".join([*COMMANDS, argument_file()])
    for written, typed in [*SUBSTITUTIONS.items(), *NODE_SUBSTITUTIONS.items()]:
        assert written.split()[0] == typed.split()[0], f"{written} -> {typed} drops a flag"
        assert len(written.split()) == len(typed.split())
        assert written in documented, f"{written} stands in no document"


@pytest.mark.parametrize("command", TRAINING)
def test_training_command(command: str, place: Place) -> None:
    before = {path: newest_file(path) for path in place.runs()}
    code, output = run(command, place)
    refusal = next((line for part, line in REFUSED.items() if part in command), None)
    if refusal:
        assert code == 2, output
        assert refusal in output
        return
    assert code == 0, output
    changed = {path for path in place.runs() if before.get(path) != newest_file(path)}
    kinds = [result for part, result in RESULTS.items() if part in command]
    result = kinds[0] if kinds else "final_model/controlnet.pth"
    if result is None:
        assert not changed, "neither a dry run nor a check has a run folder"
        return
    assert len(changed) == 1, output
    run_dir = changed.pop()
    assert (run_dir / result).is_file(), output
    if "--resume_from_checkpoint" in command:
        assert run_dir in before, "a resumed run goes on in its own folder"
    if place.run_dir is None and "--image_dir" in command:
        place.run_dir = run_dir


def newest_file(folder: Path) -> int:
    """Return when something in a folder last changed, ns."""
    return max(path.stat().st_mtime_ns for path in folder.rglob("*"))


@pytest.mark.parametrize("command", FILLING)
def test_filling_command(command: str, place: Place) -> None:
    folder = place.folder / "outputs" / "inference"
    shutil.rmtree(folder, ignore_errors=True)
    code, output = run(command, place)
    assert code == 0, output
    names = {path.name for path in folder.iterdir()}
    if "--input_image photos" in command:
        expected = {f"cat{i}_{kind}.png" for i in range(2) for kind in ("inpainted", "comparison")}
    else:
        more = {f"inpainted_{i}.png" for i in range(1, 4)} if "--num_images 4" in command else set()
        expected = {"inpainted.png", "comparison.png"} | more
    assert names == expected, output


@pytest.mark.parametrize("command", EXPORTING)
def test_exporting_command(command: str, place: Place) -> None:
    code, output = run(command, place)
    assert code == 0, output
    written = place.folder / output.splitlines()[-1].removeprefix("wrote ")
    assert written.exists(), output


@pytest.mark.parametrize("command", EVALUATING)
def test_evaluating_command(command: str, place: Place) -> None:
    code, output = run(command, place)
    assert code == 0, output
    table = (place.folder / "outputs" / "evaluation" / "results.md").read_text("utf-8")
    assert "base alone" in table
    assert table.split("\n\n")[1] in output


@pytest.mark.parametrize("command", CACHING)
def test_caching_command(command: str, place: Place) -> None:
    code, output = run(command, place)
    assert code == 0, output
    assert any((place.folder / "cache" / "controlnet-inpainting" / "latents").rglob("*.moments"))


@pytest.mark.parametrize("command", MULTI_NODE)
def test_multi_node_command(command: str, place: Place) -> None:
    """Two nodes are two processes here, on the loopback interface."""
    before = place.runs()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    free_port = {"--master_port 29500": f"--master_port {port}"}
    typed = substitute(command, NODE_SUBSTITUTIONS | free_port)
    typed = typed.replace("train_lightning.py", str(ROOT / "train_lightning.py"))
    nodes = [
        start(["-m", "torch.distributed.run", *shlex.split(node)[1:]], place)
        for node in (typed, substitute(typed, {"--node_rank 0": "--node_rank 1"}))
    ]
    try:
        outputs = [node.communicate(timeout=LIMIT_S)[0] for node in nodes]
    finally:
        for node in nodes:
            kill(node)
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    (run_dir,) = place.runs() - before
    assert (run_dir / "final_model" / "controlnet.pth").is_file()


def start(argv: list[str], place: Place) -> subprocess.Popen[str]:
    """Start `python ARGV` in the user's folder, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *argv], cwd=place.folder, env=os.environ | environment(place), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module", params=WATCHING)
def tensorboard(request: pytest.FixtureRequest, place: Place) -> Iterator[str]:
    """Start TensorBoard as documented, and yield its address."""
    assert place.run_dir, "needs the runs of the training commands"
    process = start(["-m", "tensorboard.main", *shlex.split(request.param)[1:]], place)
    assert process.stdout
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if match := re.search(r"http://[^/\s]+/", line):
                yield match[0]
                return
        pytest.fail("TensorBoard ended: " + "".join(lines))
    finally:
        kill(process)


def test_tensorboard_shows_exactly_the_documented_metrics(tensorboard: str) -> None:
    rows = re.findall(r"^\| (`(?:train|val)/.*?) \|", GUIDE.read_text("utf-8"), flags=re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    deadline, shown = time.monotonic() + 30, set()
    while shown != documented and time.monotonic() < deadline:
        shown = set()
        for plugin in ("scalars", "images", "text"):
            with urlopen(f"{tensorboard}data/plugin/{plugin}/tags") as answer:
                tags = json.load(answer)
            names = [tag for tags_of_run in tags.values() for tag in tags_of_run]
            shown |= {name.removesuffix("/text_summary") for name in names}
        time.sleep(0.5)
    assert shown == documented, f"differ: {shown ^ documented}"


@pytest.mark.parametrize("command", MAKES)
def test_make_runs_what_it_says(command: str) -> None:
    # A make of its own: under `make test` it would take over that one's flags and level.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(
        ["make", "--dry-run", *command.split()[1:]],
        cwd=ROOT, env=outside, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith(MAKES[command])


def test_the_demo_ends_with_a_table_and_a_picture(place: Place) -> None:
    code, output = run("python -m demo --max_steps 2 --num_pictures 2", place)
    assert code == 0, output
    for candidate in ("ControlNet", "base alone", "Telea", "Navier-Stokes", "mean colour"):
        assert output.count(f"| {candidate} ") == 2, candidate  # medium and thick holes
    (path,) = re.findall(r"Look at (\S+/sheet\.png)", output)
    sheet = Image.open(place.folder / path)
    assert sheet.width > 5 * 128

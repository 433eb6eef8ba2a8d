"""Fill the holes of pictures: ControlNet weights + picture + mask + prompt -> picture.

A single pair leaves inpainted.png (inpainted_1.png, inpainted_2.png ... with --num_images) and
comparison.png in --output_dir. Two folders are paired by file name, cat.jpg with cat.png or
cat_mask.png, and leave cat_inpainted.png, cat_inpainted_1.png ... and cat_comparison.png.
Result i is drawn from seed + i, whatever --num_images is.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the imports of torch and diffusers take seconds: --help must not
    import numpy as np
    import torch

    from inpainting.checkpoints import InpaintingRecord
    from inpainting.sampling import InpaintPipeline
    from model import Base

SCHEDULERS = ("ddpm", "ddim", "unipc", "dpmsolver++", "euler_a")
PRECISIONS = ("auto", "16-mixed", "bf16-mixed", "32")
PREDICTION_TYPES = ("auto", "epsilon", "v_prediction")
PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MASK_ENDING = "_mask"
MAX_SEED = 2**62
MAX_STEPS = 1000  # the training schedule has no more
MAX_SCALE = 100
MAX_PX = 16384
MAX_IMAGES = 10000
PANEL_PX = 1024  # longest side of a picture in comparison.png
GAP_PX = 8


@dataclass(frozen=True)
class Job:
    """One picture with its mask; `prefix` starts the names of what is written."""

    image_path: Path
    mask_path: Path
    prefix: str


@dataclass(frozen=True)
class Picture:
    """One picture as it is read.

    Attributes:
        image: (H, W, 3) uint8 RGB, upright, transparent parts over white: what the networks see.
        transparent: (H, W, 4) uint8, the file's own RGBA; None for an opaque kind of file.
        mask: (H, W) uint8, 1 = hole, as it will be used.
        icc_profile: how the file's RGB values are meant, if it says so.
    """

    image: np.ndarray
    transparent: np.ndarray | None
    mask: np.ndarray
    icc_profile: bytes | None


def build_parser() -> argparse.ArgumentParser:
    """Return the command's flags, in the groups of the manual."""
    parser = argparse.ArgumentParser(
        description="Fill the holes of pictures with a trained ControlNet.", allow_abbrev=False
    )
    data = parser.add_argument_group("data")
    data.add_argument("--input_image", required=True, help="picture, or a folder of pictures")
    data.add_argument(
        "--input_mask", required=True, help="mask, white = fill, or a folder of masks"
    )
    data.add_argument("--invert_mask", action="store_true", help="black = fill")
    data.add_argument("--mask_grow", type=int, default=0, help="grow the hole by so many pixels")
    data.add_argument(
        "--mask_blur", type=int, default=0, help="pixels outside the hole over which the fill fades"
    )
    data.add_argument(
        "--crop_to_mask", action="store_true", help="work on the hole's surroundings: more detail"
    )
    data.add_argument("--output_dir", default="./outputs/inference", help="where results go")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint_path", required=True,
        help="controlnet.pth, final_model folder, Lightning .ckpt or single file",
    )  # fmt: skip
    model.add_argument(
        "--pretrained_model_name_or_path",
        help="the base: hub id, folder or file (default: what the weights record)",
    )
    model.add_argument("--base_config", help="folder or hub id of a single file's configurations")
    model.add_argument("--prediction_type", choices=PREDICTION_TYPES, default="auto")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--prompt", default="", help="what to fill the hole with")
    sampling.add_argument("--negative_prompt", default="", help="what not to fill it with")
    sampling.add_argument("--scheduler", choices=SCHEDULERS, default="ddim")
    sampling.add_argument("--num_inference_steps", type=int, default=50)
    sampling.add_argument("--guidance_scale", type=float, default=7.5, help="1 = no guidance")
    sampling.add_argument(
        "--conditioning_scale", type=float, default=1.0, help="weight of the ControlNet"
    )
    sampling.add_argument(
        "--strength", type=float, default=1.0, help="below 1 starts from what is under the hole"
    )
    sampling.add_argument("--num_images", type=int, default=1, help="results per picture")
    sampling.add_argument("--seed", type=int, default=42, help="result i has seed + i")
    sampling.add_argument(
        "--image_size", type=int, help="short side worked at, pixels (default: what was trained)"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    run.add_argument("--precision", choices=PRECISIONS, default="auto")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1, 2, 130 or 143."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(args)
    except KeyboardInterrupt:
        return fail("interrupted.", code=130)


def fail(error: object, *, code: int) -> int:
    """Print one line and hand the exit code on."""
    print(f"infer.py: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def run(args: argparse.Namespace) -> int:
    """Check, load, fill and write; what the user can correct is told in one line."""
    try:
        check_arguments(args)
        jobs = find_jobs(Path(args.input_image), Path(args.input_mask))
        quiet_libraries()
        from inpainting.sampling import check_steps

        check_steps(num_inference_steps=args.num_inference_steps, strength=args.strength)
        if len(jobs) == 1:
            read_picture(jobs[0], args=args)  # tell of a bad mask before loading for minutes
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        pipeline, image_size = load(args)
    except (ValueError, OSError) as error:
        return fail(error, code=2)
    import torch

    num_failed = 0
    for job in jobs:
        try:
            picture = read_picture(job, args=args)
        except (ValueError, OSError) as error:
            num_failed += bool(fail(error, code=2))
            continue
        try:
            results = fill(picture, pipeline=pipeline, image_size=image_size, args=args)
            write(
                results, picture=picture, output_dir=Path(args.output_dir), prefix=job.prefix,
                mask_blur=args.mask_blur,
            )  # fmt: skip
        except (FloatingPointError, OSError) as error:
            return fail(f"{job.image_path}: {error}", code=1)
        except torch.OutOfMemoryError:
            return fail(
                f"{job.image_path} must fit into the device's memory, got out of memory. Lower "
                "--image_size, or use --crop_to_mask.", code=1,
            )  # fmt: skip
    if num_failed:
        return fail(f"{num_failed} of {len(jobs)} pairs failed, see above.", code=2)
    return 0


def quiet_libraries() -> None:
    """Keep remarks on casts and absent optional packages from burying our own lines."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can't work, before anything is loaded; warn about what has no effect.

    Raises:
        ValueError: one line that names the flag.
    """
    bounds = {
        "mask_grow": (0, MAX_PX), "mask_blur": (0, MAX_PX), "image_size": (8, MAX_PX),
        "num_images": (1, MAX_IMAGES), "num_inference_steps": (1, MAX_STEPS),
        "guidance_scale": (0, MAX_SCALE), "conditioning_scale": (0, MAX_SCALE),
        "seed": (0, MAX_SEED),
    }  # fmt: skip
    for name, (lowest, highest) in bounds.items():
        value = getattr(args, name)
        if value is not None and not lowest <= value <= highest:
            raise ValueError(f"--{name} must be in [{lowest}, {highest}], got {value}.")
    if args.negative_prompt and args.guidance_scale <= 1:
        fail("--negative_prompt has no effect without guidance (--guidance_scale > 1).", code=0)


def find_jobs(image_path: Path, mask_path: Path) -> list[Job]:
    """Pair pictures with masks; in folders, say by name what has no partner.

    Raises:
        FileNotFoundError: something named doesn't exist, or no pair was found.
        ValueError: a file and a folder, or two pictures of one name.
    """
    for flag, path in (("--input_image", image_path), ("--input_mask", mask_path)):
        if not path.exists():
            raise FileNotFoundError(f"{flag} must exist, got {path}. Check the path.")
    if image_path.is_dir() != mask_path.is_dir():
        raise ValueError(
            "--input_image and --input_mask must be two files or two folders, got "
            f"{image_path} and {mask_path}."
        )
    if image_path.is_file():
        return [Job(image_path, mask_path, prefix="")]
    images, masks = by_stem(image_path), by_stem(mask_path)
    if image_path.resolve() == mask_path.resolve():
        masks = {stem: path for stem, path in masks.items() if stem.endswith(MASK_ENDING)}
        images = {stem: path for stem, path in images.items() if stem not in masks}
    partners = {stem: masks.get(stem) or masks.get(stem + MASK_ENDING) for stem in images}
    jobs = [
        Job(images[stem], mask, prefix=f"{stem}_") for stem, mask in partners.items() if mask
    ]  # fmt: skip
    without_mask = [images[stem] for stem, mask in partners.items() if not mask]
    without_image = set(masks.values()) - {job.mask_path for job in jobs}
    for what, paths in (("mask", without_mask), ("picture", without_image)):
        if paths:
            fail(f"left out, no {what} for: {', '.join(sorted(p.name for p in paths))}.", code=0)
    if not jobs:
        raise FileNotFoundError(
            f"pictures and masks must share names (cat.jpg with cat.png or cat_mask.png), got no "
            f"pair in {image_path} and {mask_path}. Rename them, or name one file each."
        )
    return jobs


def by_stem(folder: Path) -> dict[str, Path]:
    """Return a folder's pictures by their names without suffix, sorted.

    Raises:
        ValueError: two files share a name: their results would overwrite each other.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in PICTURE_SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise ValueError(
                f"files in a folder must differ in more than the suffix, got {found[path.stem]} "
                f"and {path.name}. Rename one."
            )
        found[path.stem] = path
    return found


def read_picture(job: Job, *, args: argparse.Namespace) -> Picture:
    """Read a picture and its mask, and bring the mask to its final form.

    Raises:
        FileNotFoundError, ValueError: names the file and what is wrong with it.
    """
    import numpy as np
    from PIL import Image, ImageOps

    from inpainting.images import read_image, read_mask
    from inpainting.sampling import fit_mask, grow_mask

    image, transparent = read_image(job.image_path), None
    with Image.open(job.image_path) as file:
        # A CMYK or grey file's profile doesn't describe the RGB values that are written.
        icc_profile = file.info.get("icc_profile") if file.mode in ("RGB", "RGBA") else None
        if file.has_transparency_data:
            transparent = np.asarray(ImageOps.exif_transpose(file).convert("RGBA"))
    mask = read_mask(job.mask_path)
    if args.invert_mask:
        mask = 1 - mask
    try:
        mask = fit_mask(mask, height=image.shape[0], width=image.shape[1])
    except ValueError as error:
        raise ValueError(f"{job.mask_path}: {error}") from error
    if args.mask_grow:
        mask = grow_mask(mask, radius_px=args.mask_grow)
    return Picture(image=image, transparent=transparent, mask=mask, icc_profile=icc_profile)


def load(args: argparse.Namespace) -> tuple[InpaintPipeline, int]:
    """Load base and ControlNet into a pipeline on the device; return it with the working size.

    Raises:
        FileNotFoundError, ValueError: names the flag or file to correct.
    """
    from inpainting.checkpoints import base_hash, find_record
    from inpainting.interop import read_controlnet_weights
    from inpainting.sampling import make_pipeline, make_scheduler
    from model import build_controlnet, load_base, load_controlnet_weights

    device, dtype = choose_device(args.device, precision=args.precision)
    weights = read_controlnet_weights(args.checkpoint_path)
    record = find_record(args.checkpoint_path)
    name, base_config = choose_base(args, record=record)
    prediction_type = args.prediction_type
    if prediction_type == "auto" and record is not None:
        prediction_type = record.prediction_type
    base = load_base(name, base_config=base_config, prediction_type=prediction_type)
    check_record(record, base=base)
    recorded_hash = record.base_unet_sha256 if record else None
    if recorded_hash is not None and recorded_hash != base_hash(base.unet):
        fail(f"{name} is not the base that the weights were trained with.", code=0)
    controlnet = build_controlnet(base.unet, stride=base.stride).requires_grad_(False).eval()
    load_controlnet_weights(controlnet, weights, source=args.checkpoint_path)
    # VAE and text encoder stay in float32: fp16 overflows in the first, and the second's dtype is
    # that of the latents between the steps.
    base.vae.to(device=device)  # type: ignore[call-arg]
    base.text_encoder.to(device=device)  # type: ignore[arg-type]
    base.unet.to(device=device, dtype=dtype)  # type: ignore[call-arg]
    controlnet.to(device=device, dtype=dtype)  # type: ignore[call-arg]
    pipeline = make_pipeline(
        vae=base.vae, unet=base.unet, text_encoder=base.text_encoder, tokenizer=base.tokenizer,
        controlnet=controlnet, scheduler=make_scheduler(args.scheduler, base.noise_scheduler),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipeline, args.image_size or (record or base).image_size


def choose_device(name: str, *, precision: str) -> tuple[torch.device, torch.dtype]:
    """Resolve --device and --precision; the dtype is that of UNet and ControlNet.

    Raises:
        ValueError: no such device, or a precision that it hasn't got.
    """
    import torch

    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device must be a device of this machine, got {name} ({reason}). Try auto or cpu."
        ) from error
    if precision == "auto":
        if device.type != "cuda":
            precision = "32"
        else:
            major, _ = torch.cuda.get_device_capability(device)
            precision = "bf16-mixed" if major >= 8 else "16-mixed"
    if precision == "16-mixed" and device.type == "cpu":
        raise ValueError(
            "--precision 16-mixed must run on a GPU, got the CPU. Use 32 or bf16-mixed."
        )
    dtypes = {"32": torch.float32, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
    return device, dtypes[precision]


def choose_base(
    args: argparse.Namespace, *, record: InpaintingRecord | None
) -> tuple[str, str | None]:
    """Return the base to load and its configurations' place: the flags, or what was recorded.

    Raises:
        ValueError: nothing says which base the weights belong to, or where it is.
    """
    if args.pretrained_model_name_or_path:
        return args.pretrained_model_name_or_path, args.base_config
    if record is None:
        raise ValueError(
            f"{args.checkpoint_path} must come with a record of its base, got none beside it. "
            "Name the base that it was trained with: --pretrained_model_name_or_path."
        )
    if "/" in record.base:  # a hub id: names of folders and files have no slash
        return record.base, args.base_config
    # The record travels with the weights and holds no local paths: run.json stays and does.
    trained_on = read_run_arguments(Path(args.checkpoint_path))
    name = trained_on.get("pretrained_model_name_or_path")
    if name and Path(name).exists():
        return name, args.base_config or trained_on.get("base_config")
    raise ValueError(
        f"the base '{record.base}', which the weights were trained with, must be found, got no "
        "such folder in run.json. Name it with --pretrained_model_name_or_path."
    )


def read_run_arguments(checkpoint_path: Path) -> dict[str, str]:
    """Return the flags in run.json of the run that the weights lie in, {} outside a run."""
    folder = checkpoint_path.resolve()
    for candidate in (folder, *folder.parents[:2]):
        path = candidate / "run.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8")).get("flags", {})
    return {}


def check_record(record: InpaintingRecord | None, *, base: Base) -> None:
    """Refuse weights that were trained for another geometry or another mark of the hole.

    Raises:
        ValueError: says what differs.
    """
    from inpainting.diffusion import HOLE_VALUE

    if record is None:
        return
    if record.vae_stride != base.stride:
        raise ValueError(
            f"the base's VAE must have the stride {record.vae_stride} of the weights' own base "
            f"({record.base}), got {base.stride}. Name that one: --pretrained_model_name_or_path."
        )
    if record.hole_value != HOLE_VALUE or record.image_range != (0.0, 1.0):
        raise ValueError(
            f"the weights must have learnt holes as {HOLE_VALUE:g} beside pixels in [0, 1], got "
            f"{record.hole_value:g} beside {list(record.image_range)}. Use a ControlNet of this "
            "trainer."
        )


def fill(
    picture: Picture, *, pipeline: InpaintPipeline, image_size: int, args: argparse.Namespace
) -> list[np.ndarray]:
    """Return the results, (H, W, 3) uint8 each; result i is a function of seed + i."""
    from inpainting.sampling import inpaint

    return [
        inpaint(
            pipeline,
            image=picture.image,
            mask=picture.mask,
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            seed=args.seed + i,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            conditioning_scale=args.conditioning_scale,
            strength=args.strength,
            image_size=image_size,
            crop_to_mask=args.crop_to_mask,
            mask_blur=args.mask_blur,
        )
        for i in range(args.num_images)
    ]


def write(
    results: list[np.ndarray], *, picture: Picture, output_dir: Path, prefix: str, mask_blur: int
) -> None:
    """Write the results and their comparison, each file whole or not at all."""
    import numpy as np
    from PIL import Image

    from inpainting.atomic import replace_atomically

    outputs = {f"inpainted_{i}.png" if i else "inpainted.png": r for i, r in enumerate(results)}
    if picture.transparent is not None:
        outputs = {
            name: restore_alpha(result, picture=picture, mask_blur=mask_blur)
            for name, result in outputs.items()
        }
    mask = np.repeat(picture.mask[..., None] * np.uint8(255), 3, axis=2)
    outputs["comparison.png"] = compare([picture.image, mask, *results])
    for name, pixels in outputs.items():
        path = output_dir / (prefix + name)
        with replace_atomically(path) as temporary:
            Image.fromarray(pixels).save(temporary, "PNG", icc_profile=picture.icc_profile)
        print(path)


def restore_alpha(result: np.ndarray, *, picture: Picture, mask_blur: int) -> np.ndarray:
    """Give a result its file's alpha back, and the known pixels their colours under it.

    A hole that was cut out to nothing becomes opaque: else nobody would see what fills it.

    Returns:
        (H, W, 4) uint8.
    """
    import numpy as np

    from inpainting.sampling import fade_mask

    assert picture.transparent is not None
    restored = picture.transparent.copy()
    is_new = fade_mask(picture.mask, width_px=mask_blur) > 0
    restored[is_new, :3] = result[is_new]
    hole = picture.mask == 1
    if not restored[hole, 3].any():
        restored[hole, 3] = np.uint8(255)
    return restored


def compare(panels: list[np.ndarray]) -> np.ndarray:
    """Put (H, W, 3) uint8 pictures of one size side by side, none longer than PANEL_PX."""
    import numpy as np
    from PIL import Image

    small = []
    for panel in panels:
        image = Image.fromarray(panel)
        image.thumbnail((PANEL_PX, PANEL_PX))
        small.append(np.asarray(image))
    gap = np.full((small[0].shape[0], GAP_PX, 3), 255, dtype=np.uint8)
    parts = [part for panel in small for part in (gap, panel)]
    return np.concatenate(parts[1:], axis=1)


if __name__ == "__main__":
    sys.exit(main())

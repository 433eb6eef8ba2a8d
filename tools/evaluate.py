"""How good is a ControlNet? Fill the same holes with it and with others, and measure.

    python -m tools.evaluate --checkpoint_path outputs/.../final_model/controlnet.pth

Every candidate is given the picture with grey in its hole: no pixel of the truth reaches it. Holes
and pictures are the same for everyone; the numbers are the same again on the same machine (a
picture's samples are always one batch, so there is no batch size that could change them).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from inpainting.arguments import answer, module_parser
from inpainting.benchmark_holes import HOLE_KINDS
from inpainting.infer_flags import PRECISIONS, PREDICTION_TYPES, SCHEDULERS
from inpainting.quiet import quiet_libraries
from inpainting.runs import cache_dir

if TYPE_CHECKING:  # the imports of torch and diffusers take seconds: --help must not
    import numpy as np

    from inpainting.coco import CocoIndex
    from pipeline import LoadedPipeline
    from tools.evaluation_files import Case

logger = logging.getLogger("evaluate")

Candidate = Callable[["Case"], "dict[str, list[np.ndarray]]"]

GREY = 127  # what stands in the hole of a picture that is given away
NUM_SHEET_ROWS = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    return answer(lambda: evaluate(args))


def build_parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    parser = module_parser("tools.evaluate", manual=__doc__)
    add = parser.add_argument_group("weights").add_argument
    add("--checkpoint_path", required=True,
        help="controlnet.pth, final_model folder, Lightning .ckpt or single file")  # fmt: skip
    add("--compare_with", help="a second ControlNet for the same base")
    add("--pretrained_model_name_or_path", help="the base (default: what the weights record)")
    add("--base_config", help="folder or hub id of a single file's configurations")
    add("--prediction_type", choices=PREDICTION_TYPES, default="auto")
    add = parser.add_argument_group("data").add_argument
    add("--image_dir", help="pictures (default: drawn scenes that no demo training sees)")
    add("--ann_file", help="COCO instances json; without it there are no object holes")
    add("--caption_file", help="COCO captions json, for the prompts")
    add("--num_pictures", type=int, default=64, help="the first so many by id")
    add("--hole_kinds", nargs="+", choices=HOLE_KINDS, default=list(HOLE_KINDS))
    add("--image_size", type=int, help="pixels (default: what was trained)")
    add = parser.add_argument_group("sampling").add_argument
    add("--num_samples", type=int, default=8, help="per picture, as one batch")
    add("--scheduler", choices=SCHEDULERS, default="ddim")
    add("--num_inference_steps", type=int, default=20)
    add("--guidance_scale", type=float, default=3.0, help="1 = no guidance")
    add("--empty_prompt", action="store_true", help="tell nobody what the picture shows")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=PRECISIONS, default="auto")
    add("--perceptual", action="store_true",
        help="LPIPS and FID too: needs requirements-metrics.txt")  # fmt: skip
    add("--output_dir", type=Path, default=Path("outputs/evaluation"))
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what can't work, before anything is loaded.

    Raises:
        ValueError: one line that names the flag.
    """
    for name, lowest in (("num_pictures", 1), ("num_samples", 1), ("num_inference_steps", 1),
                         ("guidance_scale", 0), ("seed", 0), ("image_size", 8)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise ValueError(f"--{name} must be at least {lowest}, got {value}.")
    if args.image_dir is None and (args.ann_file or args.caption_file):
        raise ValueError("--ann_file and --caption_file need --image_dir, got none. Name it.")
    if args.image_dir and not args.ann_file and "object" in args.hole_kinds:
        args.hole_kinds.remove("object")
        if not args.hole_kinds:
            raise ValueError("object holes need --ann_file, got none. Name it.")
        logger.warning("no --ann_file: no object holes")
    if args.perceptual:
        from tools.perceptual import check_packages

        check_packages()


def evaluate(args: argparse.Namespace) -> None:
    """Fill, score, and write the table, results.json, results.md and the sheets."""
    check_flags(args)
    quiet_libraries()
    from tqdm import tqdm

    from inpainting.scoreboard import format_table, score_samples, summarize
    from pipeline import with_controlnet
    from tools.evaluation_files import Evaluation, write_sheets

    index = read_index(args)
    loaded = load(args)
    second = with_controlnet(loaded, args.compare_with) if args.compare_with else None
    image_size = args.image_size or loaded.image_size
    check_size(image_size, loaded=loaded)
    candidates = make_candidates(args, loaded=loaded, second=second, image_size=image_size)
    settings = describe_settings(args, image_size=image_size, loaded=loaded, second=second)
    evaluation = Evaluation(args.output_dir, settings=settings)
    done = {(score.kind, score.image_id) for score in evaluation.scores}
    cases = list_cases(index, args=args)
    for kind, row in tqdm(cases, desc="pictures x holes"):
        if (kind, int(index.image_ids[row])) in done:
            continue
        try:
            case = build_case(index, row=row, kind=kind, image_size=image_size, args=args)
        except ValueError as error:  # one bad picture must not end an hour's work
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        if case is None:
            continue
        results = {name: fills for fill in candidates for name, fills in fill(case).items()}
        scores = {
            name: score_samples(samples, truth=case.truth, given=case.given, mask=case.mask)
            for name, samples in results.items()
        }
        pictures = {name: samples[0] for name, samples in results.items()}
        evaluation.add(case, scores=scores, pictures=pictures)
    if not evaluation.scores:
        raise ValueError(
            "--image_dir must hold a readable picture that takes a hole, got none. See the lines "
            "above, or choose other --hole_kinds."
        )
    summaries = summarize(evaluation.scores)
    table = format_table(summaries)
    evaluation.write_results(summaries, table=table)
    write_sheets(evaluation, num_rows=NUM_SHEET_ROWS)
    if args.perceptual:
        from tools.perceptual import measure

        perceptual = measure(evaluation, device=loaded.base.unet.device)
        evaluation.write_results(summaries, table=table, perceptual=perceptual)
    print(f"\n{table}\n\nresults: {args.output_dir}")


def read_index(args: argparse.Namespace) -> CocoIndex:
    """Read the pictures' records: the user's, or the scenes that nobody trains on."""
    from inpainting.coco import CocoIndex

    cache = cache_dir() / "index"
    image_dir, ann_file, caption_file = (
        Path(value) if value else None
        for value in (args.image_dir, args.ann_file, args.caption_file)
    )
    if image_dir is None:
        from demo.defaults import prepare_unseen_scenes

        scenes = prepare_unseen_scenes(cache_dir() / "demo", num_scenes=args.num_pictures)
        image_dir, ann_file = scenes.image_dir, scenes.ann_file
        caption_file = scenes.caption_file
    if ann_file is None:
        return CocoIndex.from_folder(image_dir, caption_file=caption_file, cache_dir=cache)
    return CocoIndex.from_annotations(
        image_dir, ann_file=ann_file, caption_file=caption_file, cache_dir=cache
    )


def load(args: argparse.Namespace) -> LoadedPipeline:
    """Load the ControlNet with its base."""
    from demo.defaults import BASE_DIR
    from pipeline import load_from_flags

    return load_from_flags(args, demo_base=BASE_DIR)


def check_size(image_size: int, *, loaded: LoadedPipeline) -> None:
    """Refuse a size that the networks can't work at.

    Raises:
        ValueError: no multiple of the deepest cell.
    """
    from inpainting.sampling import unet_stride

    multiple = loaded.base.stride * unet_stride(loaded.base.unet)
    if image_size % multiple:
        raise ValueError(
            f"--image_size must be a multiple of {multiple} (the UNet's deepest cell), "
            f"got {image_size}."
        )


def describe_settings(
    args: argparse.Namespace,
    *,
    image_size: int,
    loaded: LoadedPipeline,
    second: LoadedPipeline | None,
) -> dict[str, object]:
    """Return all that the numbers depend on; another evaluation can't go on in its folder."""
    from inpainting.checkpoints import base_hash
    from inpainting.devices import DTYPES
    from inpainting.sampling import FILL_VERSION

    names = ("image_dir", "ann_file", "caption_file", "num_pictures", "hole_kinds", "num_samples",
             "scheduler", "num_inference_steps", "guidance_scale", "empty_prompt", "seed",
             "prediction_type")  # fmt: skip
    unet = loaded.base.unet
    return {
        **{name: getattr(args, name) for name in names},
        "precision": next(name for name, dtype in DTYPES.items() if dtype == unet.dtype),
        "device": unet.device.type,
        "image_size": image_size,
        "fill_version": FILL_VERSION,
        "base": loaded.base.name,
        "base_sha256": base_hash(loaded.base.unet),
        "controlnet_sha256": base_hash(loaded.pipeline.controlnet),  # type: ignore[arg-type]
        "second_sha256": base_hash(second.pipeline.controlnet) if second else None,  # type: ignore[arg-type]
    }


def make_candidates(
    args: argparse.Namespace,
    *,
    loaded: LoadedPipeline,
    second: LoadedPipeline | None,
    image_size: int,
) -> list[Candidate]:
    """Return who fills the holes."""
    from inpainting.classic_fills import fill_mean_color, fill_navier_stokes, fill_telea

    steer = partial(sample, args=args, image_size=image_size)
    candidates: list[Candidate] = [partial(steer, loaded=loaded, names=("ControlNet", None))]
    if second is not None:
        candidates.append(partial(steer, loaded=second, names=("second ControlNet", None)))
    # With its residuals at zero the ControlNet is not there: same pipeline, steps and seeds.
    candidates.append(
        partial(
            steer, loaded=loaded, conditioning_scale=0.0, names=("base, edge met", "base alone")
        )
    )
    for name, fill in (("Telea", fill_telea), ("Navier-Stokes", fill_navier_stokes),
                       ("mean colour", fill_mean_color)):  # fmt: skip
        candidates.append(
            lambda case, name=name, fill=fill: {name: [fill(case.given, mask=case.mask)]}
        )
    return candidates


def sample(
    case: Case,
    *,
    loaded: LoadedPipeline,
    args: argparse.Namespace,
    image_size: int,
    names: tuple[str, str | None],
    conditioning_scale: float = 1.0,
) -> dict[str, list[np.ndarray]]:
    """Draw a case's samples from the networks, (H, W, 3) uint8 each.

    Args:
        case: the hole to fill.
        loaded: the networks.
        args: the command's.
        image_size: the case's, in pixels.
        names: what the samples are called, and what they are called as diffusers' pipeline leaves
            them, with their seams; None: they aren't wanted.
        conditioning_scale: weight of the ControlNet's residuals.

    Raises:
        ValueError: so many samples don't fit into the device's memory.
    """
    import torch

    from inpainting.randomness import generator
    from inpainting.sampling import draw_fills, make_working, paste

    rng = generator(args.seed, f"evaluation-{case.kind}", case.image_id)
    working = make_working(loaded.pipeline, image=case.given, mask=case.mask, image_size=image_size)
    try:
        fills = draw_fills(
            loaded.pipeline,
            working,
            prompt=case.prompt,
            negative_prompt="",
            seeds=rng.integers(2**31, size=args.num_samples).tolist(),
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            conditioning_scale=conditioning_scale,
            strength=1.0,
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"--num_samples must fit into the device's memory, got {args.num_samples} at "
            f"{image_size} px: out of memory. Lower it, with another --output_dir."
        ) from error
    return {
        name: [paste(fill, image=case.given, mask=case.mask, working=working, meets_edge=meets)
               for fill in fills]
        for name, meets in zip(names, (True, False), strict=True) if name is not None
    }  # fmt: skip


def list_cases(index: CocoIndex, *, args: argparse.Namespace) -> list[tuple[str, int]]:
    """Return (kind, row) of every case, all kinds of a picture together."""
    rows = range(min(args.num_pictures, len(index)))
    return [(kind, row) for row in rows for kind in args.hole_kinds]


def build_case(
    index: CocoIndex, *, row: int, kind: str, image_size: int, args: argparse.Namespace
) -> Case | None:
    """Cut a picture's middle square and draw its hole; None where no object gives one."""
    import numpy as np

    from inpainting.benchmark_holes import BENCHMARK_SEED, draw_benchmark_hole
    from inpainting.captions import choose_prompt
    from inpainting.images import crop_box, open_image, resize_image, resize_mask
    from inpainting.randomness import generator
    from tools.evaluation_files import Case

    image_id = int(index.image_ids[row])
    picture = open_image(index.image_path(row))
    cut = {"box": crop_box(*picture.size, rng=None), "size": image_size, "flip": False}
    truth = resize_image(picture, **cut)
    mask = draw_benchmark_hole(
        kind,
        size=image_size,
        image_id=image_id,
        object_masks=[
            partial(lambda rle: resize_mask(index.decode(rle), **cut), rle)
            for rle in index.object_masks(row)
        ],
    )
    if mask is None:
        return None
    prompt = choose_prompt(
        generator(BENCHMARK_SEED, "prompt", image_id),
        captions=index.captions(row),
        category_names=index.category_names(row),
        empty_prompt_prob=float(args.empty_prompt),
    )
    given = np.where(mask[..., None] == 1, np.uint8(GREY), truth)
    return Case(kind, image_id, truth, given, mask, prompt)


if __name__ == "__main__":
    sys.exit(main())

"""The model card: what was trained, on what, and a diffusers program that runs as it stands.

The program builds the control image as a tensor, which is what people get wrong: an 8-bit picture
cannot hold the -1 that marks a hole.
"""

from __future__ import annotations

from collections.abc import Mapping

from inpainting.base import SINGLE_FILE_SUFFIXES
from inpainting.record import InpaintingRecord

MODEL_CARD = """\
---
library_name: diffusers
{front_matter}tags:
- controlnet
- inpainting
- stable-diffusion
---

# ControlNet for inpainting, trained on {base}

A ControlNet with {num_parameters:,} parameters that steers a frozen {base} to fill holes in
photographs. It sees the picture with its holes marked:
{conditioning}.

| fact | value |
|---|---|
{facts}

Weights: `diffusion_pytorch_model.safetensors` for diffusers; `controlnet.pth` holds the same
tensors. How the control image is built stands in `inpainting.json` too.

## Use

Run this in the folder that holds `final_model`, with a square `image.png` and its `mask.png`
(white = fill):

```python
{snippet}```

An 8-bit picture can't hold -1, so the control image has to be a tensor: given a picture, diffusers
would show the ControlNet a black area instead of a hole.

## Licence

The weights were made from {base} and work only together with it: the licence of that model
applies to them, its rules of use included.
"""

SNIPPET = """\
import numpy as np
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetInpaintPipeline
from PIL import Image

controlnet = ControlNetModel.from_pretrained("{folder}")
pipe = StableDiffusionControlNetInpaintPipeline.{loader}(
    "{base}",{comment}
    controlnet=controlnet,
    safety_checker=None,
)
pipe.scheduler = DDIMScheduler.from_config(
    pipe.scheduler.config, prediction_type="{prediction_type}", timestep_spacing="trailing"
)

size = ({image_size}, {image_size})  # (width, height)
image = Image.open("image.png").convert("RGB").resize(size)
mask = Image.open("mask.png").convert("L").resize(size).point(lambda value: 255 * (value > 127))

pixels = np.array(image)  # (H, W, 3) uint8
hole = np.array(mask) > 127  # (H, W), True = fill
control_image = pixels.astype(np.float32) / 255.0
control_image[hole] = {hole_value}
control_image = torch.from_numpy(control_image).permute(2, 0, 1)[None]  # (1, 3, H, W)
pixels[hole] = 127  # the pipeline encodes the whole picture: what is hidden must not leak

# The pipeline fills whole latent cells, of {stride} x {stride} pixels: all that the hole touches.
cells = hole.reshape({num_cells}, {stride}, {num_cells}, {stride}).any(axis=(1, 3))
cells = cells.repeat({stride}, axis=0).repeat({stride}, axis=1)

result = pipe(
    prompt="",
    image=Image.fromarray(pixels),
    mask_image=Image.fromarray(cells),
    control_image=control_image,
    controlnet_conditioning_scale=1.0,  # this pipeline's default is 0.5
    width={image_size},
    height={image_size},
    strength=1.0,
    num_inference_steps=30,
    generator=torch.Generator().manual_seed(42),
).images[0]
Image.composite(result, image, mask).save("inpainted.png")  # known pixels as they were
"""


def format_model_card(
    record: InpaintingRecord, *, num_parameters: int, training: Mapping[str, object]
) -> str:
    """Return the model card: what was trained, on what, and a diffusers program that runs.

    Args:
        record: says how the weights are used.
        num_parameters: of the ControlNet.
        training: further facts for the table, by their names there.
    """
    is_hub_id = "/" in record.base  # names of folders and files have no slash
    is_single_file = record.base.endswith(SINGLE_FILE_SUFFIXES)
    what = "file" if is_single_file else "folder"
    snippet = SNIPPET.format(
        folder="final_model",
        base=record.base,
        loader="from_single_file" if is_single_file else "from_pretrained",
        comment="" if is_hub_id else f"  # the {what} of the base that it was trained on",
        prediction_type=record.prediction_type,
        image_size=record.image_size,
        num_cells=record.image_size // record.vae_stride,
        stride=record.vae_stride,
        hole_value=record.hole_value,
    )
    facts = {
        "base": record.base,
        "base's UNet (hash)": record.base_unet_sha256 or "as on the hub",
        "picture size": f"{record.image_size} px",
        "prediction type": record.prediction_type,
        "optimizer steps": f"{record.global_step:,}",
        "weights": "moving average" if record.is_average else "as trained",
    } | dict(training)
    return MODEL_CARD.format(
        front_matter=f"base_model: {record.base}\n" if is_hub_id else "",
        base=record.base,
        num_parameters=num_parameters,
        conditioning=record.conditioning,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        snippet=snippet,
    )

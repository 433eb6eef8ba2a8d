"""Writes a base as one file with the names that Stable Diffusion's authors gave its tensors.

Written from the original code (ldm's openaimodel.py and autoencoder.py, OpenCLIP's model.py),
independent of what the project reads such files with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from model import Base

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def tensors(base: Base, *, is_open_clip: bool = False) -> dict[str, Tensor]:
    """Return the whole base as such a file holds it, with the extras that real files have."""
    state = {
        "model_ema.decay": torch.tensor(0.9999),
        "betas": torch.zeros(1000),
    }
    for name, tensor in base.unet.state_dict().items():
        state["model.diffusion_model." + _unet_name(name, base)] = tensor
    for name, tensor in base.vae.state_dict().items():
        ldm = _vae_name(name, num_blocks=len(base.vae.config["block_out_channels"]))
        is_conv = "mid.attn_1" in ldm and ldm.endswith("weight") and "norm" not in ldm
        state["first_stage_model." + ldm] = tensor[..., None, None] if is_conv else tensor
    text = {n.removeprefix("text_model."): t for n, t in base.text_encoder.state_dict().items()}
    if is_open_clip:
        text = {"cond_stage_model.model." + n: t for n, t in _open_clip(text).items()}
    else:
        text = {"cond_stage_model.transformer.text_model." + n: t for n, t in text.items()}
        ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        text[ids] = torch.arange(77)[None]
    return {name: tensor.contiguous().clone() for name, tensor in (state | text).items()}


def _unet_name(name: str, base: Base) -> str:
    stage = base.unet.config["layers_per_block"] + 1
    if match := re.fullmatch(r"down_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        i, kind, j, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "downsamplers":
            return f"input_blocks.{stage * (i + 1)}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{stage * i + j + 1}.{_inner(kind, rest)}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        i, kind, j, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "upsamplers":
            has_attention = "CrossAttn" in base.unet.config["up_block_types"][i]
            return f"output_blocks.{stage * (i + 1) - 1}.{2 if has_attention else 1}.{rest}"
        return f"output_blocks.{stage * i + j}.{_inner(kind, rest)}"
    if match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", name):
        return f"middle_block.{2 * int(match[1])}.{_inner('resnets', match[2])[2:]}"
    if name.startswith("mid_block.attentions.0."):
        return name.replace("mid_block.attentions.0.", "middle_block.1.")
    module, _, leaf = name.rpartition(".")
    return f"{UNET_ENDS[module]}.{leaf}"


def _inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return f"1.{rest}"
    module, _, leaf = rest.rpartition(".")
    return f"0.{RESNET[module]}.{leaf}"


def _vae_name(name: str, *, num_blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.resnets\.(.+)", name):
        return f"encoder.down.{match[1]}.block.{match[2]}"
    if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.+)", name):
        return f"encoder.down.{match[1]}.downsample.{match[2]}"
    if match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.resnets\.(.+)", name):
        return f"decoder.up.{num_blocks - 1 - int(match[1])}.block.{match[2]}"
    if match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.+)", name):
        return f"decoder.up.{num_blocks - 1 - int(match[1])}.upsample.{match[2]}"
    if match := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)", name):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        return f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    return name


def _open_clip(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    width = text["final_layer_norm.weight"].shape[0]
    state = {
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
        "text_projection": torch.eye(width),
        "logit_scale": torch.tensor(4.6),
    }
    num_layers = 1 + max(int(n.split(".")[2]) for n in text if n.startswith("encoder.layers."))
    for i in range(num_layers):
        old, new = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for leaf in ("weight", "bias"):
            state[f"{new}attn.in_proj_{leaf}"] = torch.cat(
                [text[f"{old}self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            )
            for theirs, name in OPEN_CLIP.items():
                state[f"{new}{name}.{leaf}"] = text[f"{old}{theirs}.{leaf}"]
    return state

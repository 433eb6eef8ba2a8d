"""What a resumed run does with everything that isn't as it was: its flags, its data, its machine.

Three things can happen. A change *takes effect*: it does what it says from here on. It *changes the
bits*: the run goes on with the very next sample, but isn't, bit for bit, the one that would have
been. Or it is *refused*: the weights or the optimizer's state would be of no use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TAKES_EFFECT = "takes effect"
CHANGES_BITS = "changes the bits"

# Every flag, by what a change of it does; the rest is about one start alone, or is refused below.
FLAG_EFFECTS = dict.fromkeys(
    ("num_epochs", "max_steps", "learning_rate", "adam_weight_decay", "lr_scheduler",
     "lr_warmup_steps", "early_stopping_patience", "num_workers", "gradient_checkpointing",
     "devices", "num_nodes", "save_every_n_epochs", "save_every_n_steps", "save_top_k", "monitor",
     "log_every_n_steps", "log_images_every_n_steps", "profiler", "strict_data",
     "max_bad_fraction", "base_config",
     "pretrained_model_name_or_path", "image_dir", "ann_file", "caption_file", "cache_latents"),
    TAKES_EFFECT,
) | dict.fromkeys(
    ("batch_size", "image_size", "val_split", "mask_types", "mask_area_range", "snr_gamma",
     "empty_prompt_prob", "gradient_clip_val", "accumulate_grad_batches", "ema_decay", "precision",
     "accelerator", "strategy", "seed", "deterministic", "overfit_batches", "limit_train_batches",
     "num_crops", "compile"),
    CHANGES_BITS,
)  # fmt: skip
# Another value of these is refused.
FIXED_FLAGS = ("prediction_type", "use_8bit_adam")
FLAGS_OF_ONE_START = (
    "controlnet_weights", "output_dir", "resume_from_checkpoint", "find_lr", "dry_run",
    "check",
)  # fmt: skip
# Local paths: they stand in run.json alone. What they lead to is among the facts.
PATH_FLAGS = (
    "image_dir", "ann_file", "caption_file", "pretrained_model_name_or_path", "base_config",
    "cache_latents",
)  # fmt: skip
# What else decides the bits, by its name on screen.
FACT_NAMES = {
    "data": "the data (its records, by their hash)",
    "latents": "the latents (--cache_latents)",
    "processes": "the number of processes",
    "device": "the device",
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "numpy": "numpy",
    "decoder": "the image decoder",
}


@dataclass(frozen=True)
class Change:
    """One thing that isn't as it was."""

    name: str
    before: object
    now: object
    effect: str

    def __str__(self) -> str:
        return f"{self.name} {self.before} -> {self.now}: {self.effect}"


def run_state(flags: Mapping[str, Any], *, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint keeps of a run, as plain JSON types without local paths.

    Args:
        flags: the resolved flags.
        facts: the keys of FACT_NAMES, and base and base_unet_sha256.
    """
    kept = {name: flags[name] for name in (*FLAG_EFFECTS, *FIXED_FLAGS)}
    for name in PATH_FLAGS:
        del kept[name]
    return json.loads(json.dumps({"flags": kept, "facts": dict(facts)}))


def check_can_go_on(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse another base, and what the optimizer's state doesn't fit.

    Args:
        before: the checkpoint's `run_state`; an older one's may be empty.
        now: this run's.

    Raises:
        ValueError: names both.
    """
    facts, facts_now = before.get("facts", {}), now["facts"]
    if (
        facts.get("base_unet_sha256", facts_now["base_unet_sha256"])
        != facts_now["base_unet_sha256"]
    ):
        raise ValueError(
            f"--pretrained_model_name_or_path must be the base that the checkpoint was trained "
            f"with, {facts['base']}, got another UNet: {facts_now['base']}. Name that base, or "
            "start a new run from the weights with --controlnet_weights."
        )
    kind, kind_now = (state.get("flags", {}).get("prediction_type") for state in (before, now))
    if kind not in (None, kind_now):
        raise ValueError(
            f"--prediction_type must stay what the checkpoint was trained for, {kind}, got "
            f"{kind_now}. Resume with --prediction_type {kind}."
        )
    # Whatever doesn't say it is older than the switch.
    was_8bit, is_8bit = (
        state.get("flags", {}).get("use_8bit_adam", False) for state in (before, now)
    )
    if was_8bit != is_8bit:
        bits, advice = (8, "with") if was_8bit else (32, "without")
        raise ValueError(
            f"--use_8bit_adam must stay as it was: Adam's state in the checkpoint has {bits} bits, "
            f"got {32 if was_8bit else 8}. Resume {advice} --use_8bit_adam, or start a new run "
            "from its weights with --controlnet_weights."
        )


def list_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return every flag and fact that isn't as it was.

    Args:
        before: the checkpoint's `run_state`. What it lacks isn't compared.
        now: this run's. The flags of both may hold local paths.
    """
    changes = []
    for name, effect in FLAG_EFFECTS.items():
        if name in before.get("flags", {}):
            # JSON knows no tuples.
            was, is_now = (json.loads(json.dumps(state["flags"][name])) for state in (before, now))
            if was != is_now:
                changes.append(Change(f"--{name}", was, is_now, effect))
    for fact, name in FACT_NAMES.items():
        was, is_now = before.get("facts", {}).get(fact), now["facts"][fact]
        if was not in (None, is_now):
            changes.append(Change(name, was, is_now, CHANGES_BITS))
    return changes

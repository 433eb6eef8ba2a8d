"""Whatever isn't as it was when a run resumes has its effect said, and none is forgotten."""

from __future__ import annotations

import pytest

from inpainting.changes import (
    CHANGES_BITS,
    FACT_NAMES,
    FIXED_FLAGS,
    FLAG_EFFECTS,
    FLAGS_OF_ONE_START,
    PATH_FLAGS,
    TAKES_EFFECT,
    check_can_go_on,
    list_changes,
    run_state,
)
from inpainting.flags import build_parser

# Written down once more, so that one that gets lost in the source is missed.
FACTS_OF_A_RUN = (
    "data", "latents", "processes", "device", "torch", "diffusers", "transformers", "numpy",
    "decoder",
)  # fmt: skip
FACTS = {**dict.fromkeys(FACT_NAMES, "as before"), "base": "sd15", "base_unet_sha256": "abc"}


def state(*arguments: str, **facts: object) -> dict:
    flags = vars(build_parser().parse_args(arguments))
    return run_state(flags, facts={**FACTS, **facts})


def test_every_flag_has_an_effect() -> None:
    flags = {action.dest for action in build_parser()._actions} - {"help"}
    known = {*FLAG_EFFECTS, *FLAGS_OF_ONE_START, *FIXED_FLAGS}
    assert flags == known, f"without one: {flags - known}; gone: {known - flags}"
    assert not set(FLAG_EFFECTS) & set(FLAGS_OF_ONE_START)


def test_nothing_changed_says_nothing() -> None:
    assert list_changes(state(), state()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--num_epochs", "7"], f"--num_epochs 100 -> 7: {TAKES_EFFECT}"),
        (["--learning_rate", "2e-5"], f"--learning_rate 1e-05 -> 2e-05: {TAKES_EFFECT}"),
        (["--num_workers", "0"], f"--num_workers 4 -> 0: {TAKES_EFFECT}"),
        (["--devices", "2"], f"--devices -1 -> 2: {TAKES_EFFECT}"),
        (["--save_top_k", "1"], f"--save_top_k 3 -> 1: {TAKES_EFFECT}"),
        (["--batch_size", "8"], f"--batch_size 4 -> 8: {CHANGES_BITS}"),
        (["--ema_decay", "0.9"], f"--ema_decay None -> 0.9: {CHANGES_BITS}"),
        (["--mask_area_range", "0.1", "0.2"],
         f"--mask_area_range [0.1, 0.3] -> [0.1, 0.2]: {CHANGES_BITS}"),
    ],
)  # fmt: skip
def test_a_changed_flag_is_listed_with_what_it_does(arguments, line) -> None:
    assert [str(change) for change in list_changes(state(), state(*arguments))] == [line]


@pytest.mark.parametrize("fact", sorted({*FACTS_OF_A_RUN, *FACT_NAMES}))
def test_a_changed_fact_changes_the_bits(fact) -> None:
    [change] = list_changes(state(), state(**{fact: "another"}))
    assert (change.before, change.now, change.effect) == ("as before", "another", CHANGES_BITS)
    assert change.name == FACT_NAMES[fact]


def test_a_default_that_is_typed_is_no_change() -> None:
    typed = state("--mask_area_range", "0.1", "0.3", "--mask_types", "object=0.3,irregular=0.5,"
                  "rectangle=0.2")  # fmt: skip
    assert list_changes(state(), typed) == []


def test_no_local_path_gets_into_a_checkpoint() -> None:
    kept = state("--image_dir", "/home/somebody/pictures", "--base_config", "/home/somebody/base")
    assert "somebody" not in repr(kept)
    assert not set(kept["flags"]) & {*PATH_FLAGS, "output_dir", "controlnet_weights"}


def test_an_older_checkpoint_says_nothing_and_is_taken() -> None:
    assert list_changes({}, state()) == []
    check_can_go_on({}, state())


def test_another_base_is_refused_and_a_moved_one_isnt() -> None:
    check_can_go_on(state(), state(base="moved"))
    with pytest.raises(ValueError, match=r"trained with, sd15, got another UNet: other\."):
        check_can_go_on(state(), state(base="other", base_unet_sha256="def"))


def test_another_prediction_type_is_refused() -> None:
    epsilon, velocity = (state("--prediction_type", t) for t in ("epsilon", "v_prediction"))
    with pytest.raises(ValueError, match=r"trained for, epsilon, got v_prediction\."):
        check_can_go_on(epsilon, velocity)


@pytest.mark.parametrize("before", [state(), {}], ids=["in 32 bits", "older than the switch"])
def test_adams_state_in_another_number_of_bits_is_refused(before) -> None:
    in_8_bits = state("--use_8bit_adam")
    with pytest.raises(ValueError, match=r"has 32 bits, got 8\. Resume without --use_8bit_adam,"):
        check_can_go_on(before, in_8_bits)
    with pytest.raises(ValueError, match=r"has 8 bits, got 32\. Resume with --use_8bit_adam,"):
        check_can_go_on(in_8_bits, state())
    check_can_go_on(in_8_bits, in_8_bits)

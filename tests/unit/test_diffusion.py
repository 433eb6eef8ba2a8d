"""The mathematics of the objective, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from inpainting.diffusion import (
    make_conditioning,
    min_snr_weights,
    normalize_image,
    prediction_target,
)


def scheduler(prediction_type: str, *alphas_cumprod: float) -> DDPMScheduler:
    """Return a schedule whose alphas_cumprod are given numbers."""
    schedule = DDPMScheduler(num_train_timesteps=1000, prediction_type=prediction_type)  # type: ignore[arg-type]
    schedule.alphas_cumprod = torch.tensor(alphas_cumprod)
    return schedule


def test_the_vae_reads_0_as_minus_1_and_255_as_1() -> None:
    image = torch.tensor([0, 51, 204, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    got = normalize_image(image)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.flatten(), torch.tensor([-1.0, -0.6, 0.6, 1.0]))
    assert got.min() == -1
    assert got.max() == 1


def test_conditioning_is_rgb_from_0_to_1_and_minus_1_in_the_hole() -> None:
    image = torch.tensor([[0, 51], [102, 255]], dtype=torch.uint8).expand(1, 3, 2, 2).clone()
    image[:, 1] = 255 - image[:, 1]
    mask = torch.tensor([[0, 1], [0, 0]], dtype=torch.uint8)[None, None]
    got = make_conditioning(image, mask)
    assert got.dtype == torch.float32
    expected = torch.tensor(
        [[[0.0, -1.0], [0.4, 1.0]], [[1.0, -1.0], [0.6, 0.0]], [[0.0, -1.0], [0.4, 1.0]]]
    )
    torch.testing.assert_close(got, expected[None])


def test_conditioning_tells_each_pictures_own_hole() -> None:
    image = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    mask[0, 0, 1, 2] = mask[1, 0, 3, 0] = 1
    got = make_conditioning(image, mask)
    holes = [(n, y, x) for n, _, y, x in (got == -1).nonzero().tolist()]
    assert holes == [(0, 1, 2)] * 3 + [(1, 3, 0)] * 3
    assert got[mask.expand(-1, 3, -1, -1) == 0].eq(1).all()


def test_what_lies_in_the_hole_doesnt_reach_the_conditioning() -> None:
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    mask[..., 2:5, 3:6] = 1
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    other = torch.where(mask.bool(), 255 - image, image)
    assert torch.equal(make_conditioning(image, mask), make_conditioning(other, mask))


def test_epsilon_asks_for_the_noise_itself() -> None:
    noise, latents = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    timesteps = torch.tensor([0, 1])
    target = prediction_target(
        scheduler("epsilon", 0.9, 0.1), latents=latents, noise=noise, timesteps=timesteps
    )
    assert torch.equal(target, noise)


def test_v_asks_for_alpha_noise_minus_sigma_latents() -> None:
    noise, latents = torch.full((2, 1, 1, 1), 10.0), torch.full((2, 1, 1, 1), 5.0)
    target = prediction_target(
        scheduler("v_prediction", 0.64, 0.36),
        latents=latents,
        noise=noise,
        timesteps=torch.tensor([0, 1]),
    )
    # alpha = 0.8, sigma = 0.6: 8 - 3; alpha = 0.6, sigma = 0.8: 6 - 4
    torch.testing.assert_close(target.flatten(), torch.tensor([5.0, 2.0]))


# snr = alphas_cumprod / (1 - alphas_cumprod): 9, 5, 1, 0.25
SNR_ALPHAS = (0.9, 5 / 6, 0.5, 0.2)


@pytest.mark.parametrize(
    ("prediction_type", "gamma", "expected"),
    [
        ("epsilon", 5.0, [5 / 9, 1.0, 1.0, 1.0]),
        ("epsilon", 1.0, [1 / 9, 1 / 5, 1.0, 1.0]),
        ("v_prediction", 5.0, [5 / 10, 5 / 6, 1 / 2, 0.25 / 1.25]),
        ("v_prediction", 1.0, [1 / 10, 1 / 6, 1 / 2, 0.25 / 1.25]),
    ],
)
def test_min_snr_weights_are_the_papers(prediction_type, gamma, expected) -> None:
    weights = min_snr_weights(
        scheduler(prediction_type, *SNR_ALPHAS), torch.arange(4), snr_gamma=gamma
    )
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected))
    back = min_snr_weights(
        scheduler(prediction_type, *SNR_ALPHAS), torch.tensor([3, 0]), snr_gamma=gamma
    )
    torch.testing.assert_close(back, torch.tensor([expected[3], expected[0]]))

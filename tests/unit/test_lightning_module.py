"""The LightningModule: what it registers, its loss, its average and its validation."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from inpainting.latents import MomentsCache, Slot
from model import Base
from tests import stand_in_adam, tiny


def trainer(folder: Path, *, max_steps: int = 1, max_epochs: int | None = None) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def loader(batches: list) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(batches, batch_size=None)


# ---- what is registered


def test_nothing_but_the_controlnet_is_registered(base) -> None:
    module = tiny.module(base, tiny.controlnet(base), ema_decay=0.9)
    names = {name for name, _ in module.controlnet.named_parameters()}
    assert {n for n, _ in module.named_parameters()} == {f"controlnet.{n}" for n in names}
    assert {n.split(".")[0] for n in module.state_dict()} == {"controlnet"}
    assert [name for name, _ in module.named_children()] == ["controlnet"]


def test_a_checkpoint_holds_the_controlnet_and_its_average_alone(base, tmp_path) -> None:
    module = tiny.module(base, tiny.controlnet(base), ema_decay=0.9)
    fit = trainer(tmp_path)
    fit.fit(module, loader([tiny.batch(base)]))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    num = len(tiny.controlnet(base).state_dict())
    assert len(checkpoint["state_dict"]) == len(checkpoint["average"]) == num
    size = (tmp_path / "a.ckpt").stat().st_size
    weights = sum(t.numel() * 4 for t in checkpoint["average"].values())
    assert size < 4.2 * weights + 200_000, "more than weights, average and Adam's two moments"


def test_a_step_moves_the_controlnet_and_nothing_of_the_base(base, tmp_path) -> None:
    parts = (base.vae, base.unet, base.text_encoder)
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    module = tiny.module(base, tiny.controlnet(base))
    start = copy.deepcopy(module.controlnet.state_dict())
    trainer(tmp_path).fit(module, loader([tiny.batch(base)]))
    moved = [n for n, t in module.controlnet.state_dict().items() if not torch.equal(t, start[n])]
    assert "controlnet_mid_block.weight" in moved
    for part, state in zip(parts, before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in part.state_dict().items())


# ---- the loss


def picture_losses(module, batch, network) -> torch.Tensor:
    return module.loss(batch, network).mean(dim=(1, 2))


def test_min_snr_scales_each_samples_own_loss(base) -> None:
    batch = tiny.batch(base, batch_size=4)
    batch["timestep"] = torch.tensor([0, 100, 500, 999])
    network = tiny.controlnet(base)
    with torch.no_grad():
        plain = picture_losses(tiny.module(base, network), batch, network)
        weighted = picture_losses(tiny.module(base, network, snr_gamma=5.0), batch, network)
    alpha = base.noise_scheduler.alphas_cumprod[batch["timestep"]]
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(weighted, plain * torch.clamp(5 / snr, max=1))
    assert plain.shape == (4,)
    assert weighted[0] < plain[0] / 100  # a nearly noiseless timestep: snr 1176
    assert weighted[3] == plain[3]


def test_the_loss_of_a_sample_is_its_own_whatever_stands_beside_it(base) -> None:
    batch = tiny.batch(base, batch_size=3)
    network = tiny.controlnet(base, zero_convolutions_at=0.1)
    module = tiny.module(base, network)
    with torch.no_grad():
        together = picture_losses(module, batch, network)
        alone = picture_losses(module, {n: v[2:] for n, v in batch.items()}, network)
    torch.testing.assert_close(together[2:], alone, rtol=1e-5, atol=0)


def test_the_mean_loss_is_over_all_steps_since_the_last_point(base) -> None:
    module = tiny.module(base, tiny.controlnet(base))
    module.gather = lambda tensor: tensor  # type: ignore[method-assign]

    def step(seed: int) -> float:
        return module.training_step(tiny.batch(base, seed=seed), 0).item()

    losses = [step(seed) for seed in range(3)]
    assert float(module.mean_loss(epoch=False)) == pytest.approx(sum(losses) / 3)
    losses.append(step(3))
    assert float(module.mean_loss(epoch=False)) == pytest.approx(losses[3])
    assert float(module.mean_loss(epoch=True)) == pytest.approx(sum(losses) / 4)
    module.on_train_epoch_start()
    losses.append(step(4))
    assert float(module.mean_loss(epoch=True)) == pytest.approx(losses[4])


def test_the_mean_loss_weighs_the_ranks_by_their_steps(base) -> None:
    module = tiny.module(base, tiny.controlnet(base))
    module.loss_sums = torch.tensor([3.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    other = torch.tensor([9.0, 1.0], dtype=torch.float64)
    module.gather = lambda tensor: torch.stack([tensor, other])  # type: ignore[method-assign]
    assert float(module.mean_loss(epoch=True)) == 3.0


# ---- the average


def test_the_average_follows_its_formula(base) -> None:
    module = tiny.module(base, tiny.controlnet(base), ema_decay=0.5)
    expected = [p.detach().clone() for p in module.average.parameters()]
    for step in range(1, 12):
        with torch.no_grad():
            for parameter in module.controlnet.parameters():
                parameter.add_(0.1 * step)
        module.update_average(num_steps=step)
        decay = min(0.5, (1 + step) / (10 + step))
        for average, parameter in zip(expected, module.controlnet.parameters(), strict=True):
            average.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
        for got, average in zip(module.average.parameters(), expected, strict=True):
            torch.testing.assert_close(got, average, rtol=1e-5, atol=1e-6)


def test_the_average_starts_as_a_frozen_copy(base) -> None:
    module = tiny.module(base, tiny.controlnet(base), ema_decay=0.9)
    assert module.average is module.best_controlnet is not module.controlnet
    for got, parameter in zip(
        module.average.parameters(), module.controlnet.parameters(), strict=True
    ):
        assert torch.equal(got, parameter)
        assert got.data_ptr() != parameter.data_ptr()
        assert not got.requires_grad
    assert not module.average.training


def test_without_ema_decay_the_controlnet_itself_is_the_best(base) -> None:
    module = tiny.module(base, tiny.controlnet(base))
    assert module.average is None
    assert module.best_controlnet is module.controlnet


def test_an_average_that_the_checkpoint_lacks_is_refused(base, tmp_path) -> None:
    plain = tiny.module(base, tiny.controlnet(base))
    fit = trainer(tmp_path)
    fit.fit(plain, loader([tiny.batch(base)]))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    averaged = tiny.module(base, tiny.controlnet(base), ema_decay=0.9)
    with pytest.raises(ValueError, match="--ema_decay needs a checkpoint with an average, got one"):
        trainer(tmp_path, max_steps=2).fit(
            averaged, loader([tiny.batch(base)] * 2), ckpt_path=tmp_path / "a.ckpt"
        )


def test_the_average_comes_back_from_a_checkpoint(base, tmp_path) -> None:
    module = tiny.module(base, tiny.controlnet(base), ema_decay=0.9)
    fit = trainer(tmp_path)
    fit.fit(module, loader([tiny.batch(base)]))
    module.update_average(num_steps=1)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    other = tiny.module(base, tiny.controlnet(base), ema_decay=0.9)
    again = trainer(tmp_path, max_steps=1)
    again.fit(other, loader([tiny.batch(base)]), ckpt_path=tmp_path / "a.ckpt")
    expected = module.average.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in other.average.state_dict().items())
    assert any(
        not torch.equal(t, expected[n]) for n, t in module.controlnet.state_dict().items()
    ), "the average never moved away: the test would prove nothing"


# ---- validation


def validate(module, batches: list, folder: Path) -> dict[str, float]:
    fit = trainer(folder)
    fit.validate(module, loader(batches), verbose=False)
    return {name: float(value) for name, value in fit.callback_metrics.items()}


def two_batches(base: Base) -> list:
    """Four pictures, one in each quarter of the schedule."""
    batches = [tiny.batch(base, seed=seed) for seed in range(2)]
    batches[1]["image_id"] = torch.tensor([2, 3])
    batches[0]["timestep"], batches[1]["timestep"] = torch.tensor([[100, 300], [600, 900]])
    return batches


def test_val_loss_counts_each_picture_once(base, tmp_path) -> None:
    module = tiny.module(base, tiny.controlnet(base))
    batches = two_batches(base)
    with torch.no_grad():
        losses = torch.cat([picture_losses(module, b, module.controlnet) for b in batches])
    repeated = [*batches, batches[0], batches[0]]  # as the last rounds wrap around
    got = validate(module, repeated, tmp_path)["val/loss"]
    assert got == pytest.approx(float(losses.mean()), rel=1e-6)
    assert got != pytest.approx(float(torch.cat([losses, losses[:2], losses[:2]]).mean()), rel=1e-4)


def test_val_loss_is_split_by_timestep_and_by_place(base, tmp_path) -> None:
    module = tiny.module(base, tiny.controlnet(base, zero_convolutions_at=0.1))
    batches = two_batches(base)
    got = validate(module, batches, tmp_path)
    with torch.no_grad():
        losses = torch.cat([module.loss(batch, module.controlnet) for batch in batches])
    bands = [got[f"val/loss_t{band}"] for band in ("000_250", "250_500", "500_750", "750_1000")]
    assert bands == pytest.approx(losses.mean(dim=(1, 2)).tolist(), rel=1e-5)
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[2:5, 1:6] = True  # tiny.batch's hole in latent cells
    assert got["val/loss_hole"] == pytest.approx(float(losses[:, hole].mean()), rel=1e-5)
    assert got["val/loss_known"] == pytest.approx(float(losses[:, ~hole].mean()), rel=1e-5)


def test_val_metrics_are_those_of_all_ranks_pictures(base, monkeypatch) -> None:
    module = tiny.module(base, tiny.controlnet(base))
    logged: dict[str, float] = {}
    own = {"image_id": [0, 2], "loss": [2.0, 8.0], "loss_base": [4.0, 8.0]}
    other = {"image_id": [1, 0], "loss": [5.0, 99.0], "loss_base": [8.0, 99.0]}
    same = {"timestep": [0, 0], "loss_hole": [1.0, 1.0], "loss_known": [1.0, 1.0],
            "num_hole_cells": [2.0, 2.0], "num_known_cells": [2.0, 2.0]}  # fmt: skip
    names = iter([*own, *same])
    monkeypatch.setattr(
        module, "gather", lambda t: torch.stack([t, torch.tensor((other | same)[next(names)])])
    )
    monkeypatch.setattr(module, "log_dict", lambda metrics, **_: logged.update(metrics))
    module._validation_losses = [{n: torch.tensor(v) for n, v in (own | same).items()}]
    module.on_validation_epoch_end()
    assert logged["val/loss"] == 5.0  # pictures 0, 1, 2: 2, 5, 8
    assert logged["val/control_gain"] == 0.25
    assert module._validation_losses == []


def test_validation_looks_at_the_average(base) -> None:
    network = tiny.controlnet(base, zero_convolutions_at=0.1)
    module = tiny.module(base, network, ema_decay=0.9)
    with torch.no_grad():
        for parameter in module.controlnet.parameters():
            parameter.add_(1)
        module.validation_step(tiny.batch(base), 0)
        expected = picture_losses(module, tiny.batch(base), network)
    assert torch.equal(module._validation_losses[0]["loss"], expected)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize(
    ("prediction_type", "snr_gamma"), [("epsilon", None), ("v_prediction", 5.0)]
)
def test_a_controlnet_that_starts_at_zero_gains_exactly_nothing(
    prediction_type, snr_gamma, precision, tmp_path
) -> None:
    base = tiny.base(prediction_type=prediction_type)
    module = tiny.module(base, tiny.controlnet(base), snr_gamma=snr_gamma)
    module.precision = precision
    dtype = torch.float32 if precision == "32" else torch.bfloat16
    base.to(torch.device("cpu"), dtype=dtype, vae_dtype=dtype)
    got = validate(module, two_batches(base), tmp_path)
    assert got["val/control_gain"] == 0.0
    assert got["val/loss"] == got["val/loss_base"] > 0


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_base_loss_is_that_of_the_unet_alone_with_the_same_weights(
    base, snr_gamma, tmp_path
) -> None:
    network = tiny.controlnet(base, zero_convolutions_at=0.1)
    module = tiny.module(base, network, snr_gamma=snr_gamma)
    batch = two_batches(base)[0]
    got = validate(module, [batch], tmp_path)
    with torch.no_grad():
        image = batch["image"].float() / 127.5 - 1
        noise = batch["posterior_noise"]
        latents = base.sample_latents(base.encode_image(image), posterior_noise=noise)
        noisy = base.noise_scheduler.add_noise(latents, batch["noise"], batch["timestep"])
        hidden = base.encode_prompt(batch["input_ids"])
        error = base.unet(noisy, batch["timestep"], hidden).sample - batch["noise"]
        losses = error.square().mean(dim=(1, 2, 3))
    if snr_gamma:
        alpha = base.noise_scheduler.alphas_cumprod[batch["timestep"]]
        losses = losses * torch.clamp(snr_gamma * (1 - alpha) / alpha, max=1)
    assert got["val/loss_base"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert got["val/loss"] != pytest.approx(got["val/loss_base"], rel=1e-3), (
        "it would prove nothing"
    )
    assert got["val/control_gain"] == pytest.approx(
        1 - got["val/loss"] / got["val/loss_base"], abs=1e-6
    )


def test_the_controlnet_alone_is_under_autocast() -> None:
    """A GPU's autocast would bring each norm of the frozen networks to fp32 and back."""
    base = tiny.base()
    base.to(torch.device("cpu"), dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
    module = tiny.module(base, tiny.controlnet(base), precision="bf16-mixed")
    parts: dict[str, torch.nn.Module] = {
        "unet": base.unet, "text": base.text_encoder, "vae": base.vae.encoder,
        "controlnet": module.controlnet,
    }  # fmt: skip
    seen: dict[str, bool] = {}
    for name, part in parts.items():
        part.register_forward_pre_hook(
            lambda *_, name=name: seen.update({name: torch.is_autocast_enabled("cpu")})
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):  # Lightning's own
        module.loss(tiny.batch(base), module.controlnet).mean().backward()
    assert seen == {"unet": False, "text": False, "vae": False, "controlnet": True}


def test_a_batch_without_words_is_encoded_once_in_a_run() -> None:
    base = tiny.base()
    module = tiny.module(base, tiny.controlnet(base))
    texts: list[int] = []
    base.text_encoder.register_forward_hook(lambda *_: texts.append(1))
    batch: Any = {**tiny.batch(base), "prompt": ["", ""]}
    with torch.inference_mode():  # as validation does: what it keeps must be fit for training
        module.loss(batch, module.controlnet)
    for prompts, num_texts in ((["", ""], 1), (["", "a dog"], 2), (["", ""], 2)):
        batch["prompt"] = prompts
        module.loss(batch, module.controlnet).mean().backward()
        assert len(texts) == num_texts, prompts


def test_the_base_is_asked_once_per_picture_in_a_run(base, tmp_path, monkeypatch) -> None:
    module = tiny.module(base, tiny.controlnet(base))
    asked: list[bool] = []
    loss = module.loss
    monkeypatch.setattr(
        module, "loss", lambda batch, net: (asked.append(net is None), loss(batch, net))[1]
    )
    batches = two_batches(base)
    first = validate(module, [batches[0]], tmp_path)
    assert asked == [False, True]
    validate(module, [*batches, batches[0]], tmp_path)
    assert asked[2:] == [False, False, True, False]
    again = validate(module, [batches[0]], tmp_path)
    assert asked[6:] == [False]
    assert again == first


def test_a_pictures_base_loss_stays_what_it_was_at_first(base, monkeypatch) -> None:
    """Beside another picture, in a padded batch, the last bits may be others."""
    module = tiny.module(base, tiny.controlnet(base))
    values = iter([1.0, 2.0])
    monkeypatch.setattr(module, "loss", lambda *_: torch.full((2, 8, 8), next(values)))
    batch = tiny.batch(base)
    found = []
    for ids in ([0, 1], [3, 0], [1, 3]):
        batch["image_id"] = torch.tensor(ids)
        found.append(module._base_loss(batch).tolist())
    assert found == [[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]]


# ---- the optimizer


def test_the_optimizer_is_adamw_over_the_controlnet_alone(base, tmp_path) -> None:
    module = tiny.module(base, tiny.controlnet(base), learning_rate=3e-4)
    fit = trainer(tmp_path)
    fit.fit(module, loader([tiny.batch(base)]))
    (optimizer,) = fit.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in module.controlnet.parameters()}
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (
        3e-4, (0.9, 0.999), 1e-2, 1e-8,
    )  # fmt: skip


def test_the_learning_rate_warms_up_in_optimizer_steps(base, tmp_path) -> None:
    module = tiny.module(base, tiny.controlnet(base), learning_rate=1e-3)
    module.lr_scheduler, module.lr_warmup_steps = "constant_with_warmup", 4
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    pl.Trainer(
        accelerator="cpu", max_steps=6, accumulate_grad_batches=2, callbacks=[Rates()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(module, loader([tiny.batch(base)] * 12))  # fmt: skip
    assert rates == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


@pytest.mark.parametrize("limit", [0.05, None])
def test_gradients_are_clipped_by_their_global_norm_which_is_kept(base, tmp_path, limit) -> None:
    module = tiny.module(base, tiny.controlnet(base, zero_convolutions_at=0.1))
    norms: list[float] = []

    class Norms(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            self.on_train_end(trainer, pl_module)

        def on_train_end(self, trainer, pl_module) -> None:
            gradients = [p.grad for p in pl_module.controlnet.parameters() if p.grad is not None]
            if gradients:
                norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    fit = pl.Trainer(
        accelerator="cpu", max_steps=1, gradient_clip_val=limit, callbacks=[Norms()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    fit.fit(module, loader([tiny.batch(base)]))
    kept = float(module.grad_norm)
    assert kept > 0.05, "nothing to clip: the test would prove nothing"
    assert norms[-1] == pytest.approx(limit if limit else kept, rel=1e-3)


def test_gradient_checkpointing_reaches_the_frozen_decoder_and_changes_no_gradient(base) -> None:
    network = tiny.controlnet(base, zero_convolutions_at=0.1)
    gradients, num_runs = [], []
    for is_checkpointing in (False, True):
        own_base = tiny.base()
        module = tiny.module(own_base, network, gradient_checkpointing=is_checkpointing)
        runs: list[str] = []
        for part in (own_base.unet.up_blocks[0], module.controlnet.down_blocks[0]):
            part.resnets[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append("ran"))
        module.loss(tiny.batch(own_base), module.controlnet).mean().backward()
        num_runs.append(len(runs))
        gradients.append({n: p.grad for n, p in module.controlnet.named_parameters()})
    assert num_runs == [2, 4], "each block must be run again in backward"
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)


# ---- torch.compile


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["regional", "full"])
def test_compiled_networks_train_alike(base, mode, gradient_checkpointing, monkeypatch) -> None:
    # The graphs are torch.compile's own; writing C++ for them takes a minute, and a soak test.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    network = tiny.controlnet(base, zero_convolutions_at=0.1)
    plain = tiny.module(base, network)
    compiled = tiny.module(
        tiny.base(), network, compile_mode=mode, gradient_checkpointing=gradient_checkpointing
    )
    for module in (plain, compiled):
        counters.clear()
        module.loss(tiny.batch(base), module.controlnet).mean().backward()
        assert (counters["stats"]["unique_graphs"] > 0) == (module is compiled)
    assert not counters["graph_break"], "a break costs what compiling gains"
    expected = dict(plain.controlnet.named_parameters())
    for name, parameter in compiled.controlnet.named_parameters():
        gradient = expected.pop(name).grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    assert not expected, "the weights keep their names"


# ---- the optimizer in 8 bits


def test_adam_in_8_bits_keeps_its_moments_in_8_bits(base, tmp_path, monkeypatch) -> None:
    stand_in_adam.install(monkeypatch)
    network = tiny.controlnet(base, zero_convolutions_at=0.1)
    sizes = []
    for use_8bit_adam in (False, True):
        fit = trainer(tmp_path)
        module = tiny.module(base, network, use_8bit_adam=use_8bit_adam)
        fit.fit(module, loader([tiny.batch(base)]))
        [group] = fit.optimizers[0].param_groups
        assert (group["lr"], group["weight_decay"], group["eps"]) == (1e-3, 1e-2, 1e-8)
        weight = module.controlnet.mid_block.resnets[0].conv1.weight  # large enough for 8 bits
        state = fit.optimizers[0].state[weight].values()
        moments = [t for t in state if isinstance(t, torch.Tensor) and t.shape == weight.shape]
        sizes.append([moment.element_size() for moment in moments])
    assert sizes == [[4, 4], [1, 1]]


def test_adam_in_8_bits_resumes_to_the_same_bits(base, tmp_path, monkeypatch) -> None:
    stand_in_adam.install(monkeypatch)
    network = tiny.controlnet(base, zero_convolutions_at=0.1)
    batches = loader([tiny.batch(base, seed=seed) for seed in range(2)])

    def train(num_epochs: int, checkpoint: Path | None = None) -> tuple[dict, pl.Trainer]:
        module = tiny.module(base, network, use_8bit_adam=True)
        fit = trainer(tmp_path, max_steps=-1, max_epochs=num_epochs)
        fit.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
        return module.controlnet.state_dict(), fit

    straight, _ = train(2)
    half, fit = train(1)
    fit.save_checkpoint(tmp_path / "half.ckpt")
    resumed, fit = train(2, tmp_path / "half.ckpt")
    assert fit.global_step == 4
    assert any(not torch.equal(half[name], straight[name]) for name in straight)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


# ---- with a cache of the VAE's moments


def open_cache(folder: Path) -> MomentsCache:
    return MomentsCache(
        folder, image_ids=tiny.coco_index().image_ids, moments_shape=(8, 8, 8)
    )  # fmt: skip


def cached_batches(cache: MomentsCache, *, batch_size: int = 2) -> torch.utils.data.DataLoader:
    """Load one epoch of training batches that look their moments up."""
    dataset = tiny.dataset(tiny.coco_index(), tiny.rule(), is_training=True, moments_cache=cache)
    addresses = [(0, position) for position in range(8)]
    batches = [addresses[i : i + batch_size] for i in range(0, 8, batch_size)]
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches)


def train_cached(base: Base, folder: Path, cache: MomentsCache, *, num_epochs: int = 1):
    """Train; returns the ControlNet's weights."""
    network = tiny.controlnet(base, zero_convolutions_at=0.1)
    module = tiny.module(base, network, moments_cache=cache)
    fit = trainer(folder, max_steps=4 * num_epochs)
    fit.fit(module, cached_batches(cache))
    return module.controlnet.state_dict()


@pytest.fixture
def vae_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the pictures of each call of the VAE's encoder."""
    calls: list[int] = []
    encode_image = Base.encode_image

    def count(self: Base, image: torch.Tensor) -> torch.Tensor:
        calls.append(len(image))
        return encode_image(self, image)

    monkeypatch.setattr(Base, "encode_image", count)
    return calls


def test_hits_and_misses_train_to_the_same_bits(base, tmp_path, vae_calls) -> None:
    filled, part = open_cache(tmp_path / "filled"), open_cache(tmp_path / "part")
    missed = train_cached(base, tmp_path, filled)
    assert vae_calls == [1] * 8, "each picture alone"
    vae_calls.clear()
    hit = train_cached(base, tmp_path, filled)
    assert not vae_calls, "everything is cached"
    batch, slots = next(iter(cached_batches(filled))), next(iter(cached_batches(part)))["slot"]
    part.write(Slot(*slots[0].tolist()), batch["moments"][0].numpy())  # beside it a miss
    mixed = train_cached(base, tmp_path, part)
    assert vae_calls == [1] * 7
    assert all(torch.equal(missed[n], hit[n]) for n in missed)
    assert all(torch.equal(missed[n], mixed[n]) for n in missed)


def test_a_cache_that_keeps_nothing_changes_no_bit(base, tmp_path, vae_calls) -> None:
    """As on a full disk, beside which a run must be able to resume."""
    (tmp_path / "file").write_text("")
    nothing = train_cached(base, tmp_path, open_cache(tmp_path / "file" / "cache"), num_epochs=2)
    assert len(vae_calls) == 16
    kept = train_cached(base, tmp_path, open_cache(tmp_path / "cache"), num_epochs=2)
    assert len(vae_calls) == 16 + 8
    assert all(torch.equal(nothing[n], kept[n]) for n in kept)


def test_what_rounding_the_moments_costs_is_small(base, tmp_path) -> None:
    """Means and log-variances in float16: up to 2**-11 of each. Measured: 5e-7 of the loss."""
    module = tiny.module(base, tiny.controlnet(base, zero_convolutions_at=0.1))
    module.moments_cache = open_cache(tmp_path)
    (batch,) = cached_batches(module.moments_cache, batch_size=8)
    with torch.no_grad():
        exact = module.loss(
            {n: v for n, v in batch.items() if n != "moments"}, module.controlnet
        ).mean()  # fmt: skip
        rounded = module.loss(
            module.on_before_batch_transfer(batch, 0), module.controlnet
        ).mean()  # fmt: skip
    difference = abs(rounded - exact) / exact
    assert 0 < difference < 1e-5, f"{difference:.1e}"


def test_the_vae_leaves_the_device_until_a_picture_is_missing(base, tmp_path, monkeypatch) -> None:
    moved, elsewhere = tiny.base(), torch.device("meta")  # a device that every machine has
    moved.move_vae(elsewhere)
    assert {parameter.device for parameter in moved.vae.parameters()} == {elsewhere}
    moves: list[str] = []
    monkeypatch.setattr(Base, "move_vae", lambda self, device: moves.append(device.type))
    cache = open_cache(tmp_path)
    train_cached(base, tmp_path, cache)
    assert moves == ["cpu", "cpu"] + ["cpu"] * 8, "put away twice, fetched for each miss"
    moves.clear()
    train_cached(base, tmp_path, cache)
    assert moves == ["cpu", "cpu"], "nothing is missing"


def test_without_a_cache_the_vae_stays(base, tmp_path, monkeypatch) -> None:
    moves: list[str] = []
    monkeypatch.setattr(Base, "move_vae", lambda self, device: moves.append(device.type))
    trainer(tmp_path).fit(tiny.module(base, tiny.controlnet(base)), loader([tiny.batch(base)]))
    assert not moves

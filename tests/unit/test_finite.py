"""A step with NaN or infinity in it leaves everything as it was; a few in a row end the run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision

from inpainting.finite import NUM_IN_A_ROW, NUM_NAMED, FiniteSteps, NotFiniteError
from lightning_callbacks import AverageWeights
from lightning_module import InpaintingControlNet
from model import Base
from tests import stand_in_adam, tiny

NUM_STEPS = 5
BAD_STEP = 2


def train(
    base: Base,
    batches: list,
    folder: Path,
    *,
    accumulate: int = 1,
    clip: float | None = 1.0,
    fused: bool = True,
    has_loss_scaler: bool = False,
    use_8bit_adam: bool = False,
    bad_gradient_at: int | None = None,
) -> tuple[InpaintingControlNet, list[dict]]:
    """Train; returns the module and what it held after each micro-batch."""
    module = tiny.module(
        base, tiny.controlnet(base, zero_convolutions_at=0.05), ema_decay=0.5,
        use_8bit_adam=use_8bit_adam,
    )  # fmt: skip
    module.finite_steps = FiniteSteps(has_loss_scaler=has_loss_scaler)
    if not fused:
        module.configure_optimizers = lambda: torch.optim.AdamW(  # type: ignore[method-assign]
            module.controlnet.parameters(), lr=1e-3, fused=False
        )
    held: list[dict] = []

    class Recorder(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss) -> None:
            if trainer.fit_loop.total_batch_idx == bad_gradient_at:
                loss.register_hook(lambda gradient: gradient * torch.inf)

        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            optimizer = trainer.optimizers[0]
            state = {
                "parameters": pl_module.controlnet.state_dict(),
                "adam": optimizer.state_dict()["state"],
            }
            held.append(copy.deepcopy({**state, "average": pl_module.average.state_dict()}))

    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[AverageWeights(), Recorder()],
        plugins=plugins if has_loss_scaler else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return module, held


def batches_of(base: Base, *, bad: int | None = None, value: float = float("nan")) -> list:
    batches = [tiny.batch(base, seed=seed) for seed in range(NUM_STEPS)]
    for number, batch in enumerate(batches):
        batch["image_id"] = torch.tensor([10 * number, 10 * number + 1])
    if bad is not None:
        batches[bad]["noise"][1, 0, 0, 0] = value  # of the second picture
    return batches


def flatten(state: dict) -> dict[str, torch.Tensor]:
    """Return every tensor of the nested state by its address."""
    flat = {}
    for key, value in state.items():
        nested = flatten(value) if isinstance(value, dict) else {"": torch.as_tensor(value)}
        flat |= {f"{key}/{name}": tensor for name, tensor in nested.items()}
    return flat


def assert_equal(expected: dict, got: dict) -> None:
    flat, flat_got = flatten(expected), flatten(got)
    assert flat.keys() == flat_got.keys()
    different = [name for name in flat if not torch.equal(flat[name], flat_got[name])]
    assert not different, different


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"clip": None},
        {"fused": False},
        {"has_loss_scaler": True},
        {"use_8bit_adam": True},
    ],
    ids=["clipped", "not clipped", "without a fused AdamW", "with a loss scaler", "in 8 bits"],
)
@pytest.mark.parametrize("what", ["NaN in the loss", "inf in the loss", "inf in the gradient"])
def test_a_bad_step_leaves_parameters_average_and_adam_as_they_were(
    base, tmp_path, monkeypatch, what, how
) -> None:
    stand_in_adam.install(monkeypatch)
    value = {"NaN in the loss": float("nan"), "inf in the loss": float("inf")}.get(what)
    batches = batches_of(base, bad=BAD_STEP if value else None, value=value or 0.0)
    gradient = {} if value else {"bad_gradient_at": BAD_STEP}
    _, held = train(base, batches, tmp_path, **how, **gradient)
    assert_equal(held[BAD_STEP - 1], held[BAD_STEP])
    for part in ("parameters", "average"):  # and the run goes on
        before, after = (held[step][part] for step in (BAD_STEP, BAD_STEP + 1))
        name = "controlnet_mid_block.weight"
        assert not torch.equal(before[name], after[name]), part
    assert all(tensor.isfinite().all() for tensor in flatten(held[-1]).values())


def test_one_bad_micro_batch_spoils_its_whole_step_and_no_other(base, tmp_path) -> None:
    batches = batches_of(base, bad=2)[:4]
    _, held = train(base, batches, tmp_path, accumulate=2)
    assert_equal(held[1], held[3])


def test_the_mean_loss_leaves_out_what_is_not_finite(base, tmp_path) -> None:
    module, _ = train(base, batches_of(base, bad=BAD_STEP), tmp_path / "bad")
    assert module.mean_loss(epoch=False).isfinite()
    assert module.loss_sums[3] == NUM_STEPS - 1


def test_a_healthy_step_has_the_same_bits_as_without_the_watch(base) -> None:
    losses = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    gradients = []
    for watch in (None, FiniteSteps(has_loss_scaler=False)):
        parameter = torch.nn.Parameter(losses.clone())
        loss = parameter.pow(3)
        mean = loss.mean() if watch is None else watch.watch(loss, image_ids=torch.arange(3))
        mean.backward()
        gradients.append((mean.detach(), parameter.grad))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def step(steps: FiniteSteps, *ids: int, bad: tuple[int, ...] = (), norm: float = 1.0) -> None:
    losses = torch.tensor([float("inf") if i in bad else 1.0 for i in ids])[:, None]
    steps.watch(losses, image_ids=torch.tensor(ids))
    steps.judge(torch.tensor(float("nan") if bad else norm))


def test_a_few_in_a_row_end_the_run_and_name_their_pictures() -> None:
    steps = FiniteSteps(has_loss_scaler=False)
    for number in range(NUM_IN_A_ROW - 1):
        step(steps, number, 100 + number, bad=(100 + number,))
    assert steps.check() == NUM_IN_A_ROW - 1
    assert steps.check() == 0, "each is told of once"
    step(steps, 7, 8, bad=(8,))
    with pytest.raises(NotFiniteError, match=r"last 5 steps.*such a loss: 100, 101, 102, 103, 8$"):
        steps.check()


def test_a_good_step_in_between_lets_the_run_go_on() -> None:
    steps = FiniteSteps(has_loss_scaler=False)
    for _ in range(3):
        for _ in range(NUM_IN_A_ROW - 1):
            step(steps, 1, bad=(1,))
        step(steps, 1)
    assert steps.check() == 3 * (NUM_IN_A_ROW - 1)


def test_bad_gradients_alone_name_all_pictures_of_the_last_steps() -> None:
    steps = FiniteSteps(has_loss_scaler=False)
    for number in range(NUM_IN_A_ROW):
        step(steps, 2 * number, 2 * number + 1, norm=float("inf"))
    rest = 2 * NUM_IN_A_ROW - NUM_NAMED
    with pytest.raises(NotFiniteError, match=rf"every loss was finite.*: 0, 1, .*and {rest} more"):
        steps.check()


def test_a_loss_scaler_may_halve_its_scale_first() -> None:
    steps = FiniteSteps(has_loss_scaler=True)
    for _ in range(NUM_IN_A_ROW + 23):
        step(steps, 1, norm=float("inf"))
    assert steps.check() == NUM_IN_A_ROW + 23
    step(steps, 1, norm=float("inf"))
    with pytest.raises(NotFiniteError, match="last 29 steps"):
        steps.check()

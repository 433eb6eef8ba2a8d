from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from demo import scene_pool
from demo.captions import write_captions
from demo.scene_pool import ScenePool
from demo.scenes import draw_scene


def test_a_pool_holds_the_series_and_draws_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = ScenePool(tmp_path, num_scenes=3, size=32, seed=5)
    monkeypatch.delattr(scene_pool, "draw_scene")
    found = ScenePool(tmp_path, num_scenes=3, size=32, seed=5)
    assert len(drawn) == len(found) == 3
    for index in range(3):
        image, _, plan = draw_scene(index, size=32, seed=5)
        assert np.array_equal(found.images[index], image)
        assert np.array_equal(drawn.images[index], image)
        assert tuple(found.captions[index]) == write_captions(plan)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy", ".json"}


def test_a_pool_that_was_stopped_while_drawing_is_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(index: int, **options: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scene_pool, "draw_scene", stop)
        with pytest.raises(KeyboardInterrupt):
            ScenePool(tmp_path, num_scenes=2, size=32, seed=5)
    assert list(tmp_path.iterdir()) == []
    assert len(ScenePool(tmp_path, num_scenes=2, size=32, seed=5)) == 2

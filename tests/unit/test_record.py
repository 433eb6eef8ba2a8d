"""The record: strict, and the same after a round trip."""

from __future__ import annotations

import json

import pytest

from inpainting.record import InpaintingRecord
from tests.final_model import make_record


def test_record_survives_json() -> None:
    record = make_record(base_unet_sha256=None, is_average=True)
    assert InpaintingRecord.from_json(record.to_json()) == record
    assert json.loads(record.to_json())["hole_value"] == -1.0
    assert json.loads(record.to_json())["image_range"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"image_size": "512"}, "image_size in inpainting.json must be a whole number > 0"),
        ({"image_size": True}, "got True"),
        ({"prediction_type": "x"}, "must be epsilon or v_prediction, got 'x'"),
        ({"image_range": [0]}, "image_range .* two numbers"),
        ({"base": ""}, "base .* must be a name"),
        ({"version": 2}, "version 1 or older, got 2. Update"),
        ({"mask_value": 0}, "got a difference in mask_value"),
    ],
)
def test_wrong_records_are_refused(changes: dict, match: str) -> None:
    fields = json.loads(make_record().to_json()) | changes
    with pytest.raises(ValueError, match=match):
        InpaintingRecord.from_json(json.dumps(fields))


def test_damaged_records_are_refused() -> None:
    with pytest.raises(ValueError, match="must be JSON"):
        InpaintingRecord.from_json('{"image_size": 5')
    with pytest.raises(ValueError, match="must hold an object, got list"):
        InpaintingRecord.from_json("[]")
    fields = json.loads(make_record().to_json())
    del fields["base"]
    with pytest.raises(ValueError, match="difference in base"):
        InpaintingRecord.from_json(json.dumps(fields))

"""What the documents say and what the commands know is the same."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

import infer
from inpainting import flags
from tools import evaluate, export

ROOT = Path(__file__).parents[2]
GUIDES = (ROOT / "LIGHTNING_GUIDE.md", ROOT / "docs" / "LIGHTNING_GUIDE.zh-CN.md")
DOCUMENTS = (
    ROOT / "README.md", ROOT / "CHANGELOG.md", *GUIDES,
    *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "decisions").glob("*.md")),
)  # fmt: skip

# The numbers of the guides' sections that hold a command's flags.
PARSERS = {
    "13": flags.build_parser(),
    "14": infer.build_parser(),
    "15": export.build_parser(),
    "16": evaluate.build_parser(),
}
# Users keep these in scripts and argument files: renaming or dropping one is a decision.
FROZEN_FLAGS = {
    "13": """
        --image_dir --ann_file --caption_file --batch_size --num_workers --image_size --val_split
        --num_crops --cache_latents --mask_types --mask_area_range --max_bad_fraction
        --strict_data --check
        --pretrained_model_name_or_path --base_config --prediction_type --controlnet_weights
        --num_epochs --max_steps --learning_rate --adam_weight_decay --lr_scheduler
        --lr_warmup_steps --gradient_clip_val --accumulate_grad_batches --gradient_checkpointing
        --use_8bit_adam --compile --ema_decay --snr_gamma --empty_prompt_prob --precision --find_lr
        --early_stopping_patience
        --output_dir --accelerator --devices --num_nodes --strategy --seed --deterministic
        --save_every_n_epochs --save_every_n_steps --save_top_k --monitor --log_every_n_steps
        --log_images_every_n_steps --resume_from_checkpoint --overfit_batches
        --limit_train_batches --profiler --dry_run
    """,
    "14": """
        --checkpoint_path --input_image --input_mask --invert_mask --mask_grow --mask_blur
        --crop_to_mask --output_dir --pretrained_model_name_or_path --base_config
        --prediction_type --prompt --negative_prompt --scheduler --num_inference_steps
        --guidance_scale --conditioning_scale --strength --num_images --seed --image_size --device
        --precision
    """,
    "15": "--format --dtype --output_dir",
    "16": """
        --checkpoint_path --compare_with --pretrained_model_name_or_path --base_config
        --prediction_type --image_dir --ann_file --caption_file --num_pictures --hole_kinds
        --image_size --num_samples --scheduler --num_inference_steps --guidance_scale
        --empty_prompt --seed --device --precision --perceptual --output_dir
    """,
}
# Flags of other programs that the guides type: tensorboard, torchrun and sbatch.
FOREIGN_FLAGS = {
    "--logdir", "--nnodes", "--nproc_per_node", "--node_rank", "--master_addr", "--master_port",
    "--signal", "--signals_to_handle",
}  # fmt: skip


def code_blocks(text: str) -> list[str]:
    """Return the fenced blocks of shell commands, as they stand."""
    return re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)


def headings(text: str) -> list[tuple[int, str]]:
    """Return the level and the number ("4.1", "" without one) of each heading outside fences."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = re.findall(r"^(#+) (?:([\d.]*\d)\.? )?", prose, flags=re.MULTILINE)
    return [(len(marks), number) for marks, number in found]


def section(text: str, number: str) -> str:
    """Return a chapter of a guide with its sub-chapters."""
    match = re.search(rf"^## {number}\. .*?(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    assert match, f"no chapter {number}"
    return match[0]


def flag_rows(text: str, number: str) -> dict[str, list[str]]:
    """Return the cells [unit, default, effect] of each flag in a chapter's tables."""
    rows = re.findall(r"^\| `(--\w+)` \|(.*)\|$", section(text, number), flags=re.MULTILINE)
    names = [name for name, _ in rows]
    assert len(names) == len(set(names)), f"a flag stands twice in chapter {number}"
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in rows}


def actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return a parser's flags by name, without --help."""
    found = [action for action in parser._actions if action.option_strings]
    return {a.option_strings[0]: a for a in found if a.dest != "help"}


def shown_default(action: argparse.Action) -> str:
    """Return a default as the guides' tables write it."""
    if action.required:
        return "required"
    if action.const is True:
        return "off"
    if action.default is None:
        return "none"
    if action.default == "":
        return '""'
    if isinstance(action.default, tuple | list):
        return " ".join(str(value) for value in action.default)
    return str(action.default)


def test_both_guides_have_the_same_headings() -> None:
    english, chinese = (headings(path.read_text(encoding="utf-8")) for path in GUIDES)
    assert len(english) > 20
    assert english == chinese


def test_headings_are_numbered_in_order() -> None:
    numbers = [n for level, n in headings(GUIDES[0].read_text(encoding="utf-8")) if level == 2]
    assert numbers == [str(i) for i in range(1, len(numbers) + 1)]


def test_both_guides_hold_the_same_commands() -> None:
    english, chinese = (code_blocks(path.read_text(encoding="utf-8")) for path in GUIDES)
    assert english == chinese


def test_both_guides_speak_of_the_same_names() -> None:
    """Files, metrics and flags in running text are the same ones, chapter by chapter."""
    english, chinese = (path.read_text(encoding="utf-8") for path in GUIDES)
    for level, number in headings(english):
        if level == 2:
            names = [
                set(re.findall(r"`([\w./-]+)`", section(text, number)))
                for text in (english, chinese)
            ]
            assert names[0] == names[1], f"chapter {number}: {names[0] ^ names[1]}"


@pytest.mark.parametrize("number", PARSERS)
@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_a_guide_lists_exactly_the_flags_of_a_command(path: Path, number: str) -> None:
    listed = flag_rows(path.read_text(encoding="utf-8"), number).keys()
    known = actions(PARSERS[number]).keys()
    assert listed == known, f"missing: {known - listed}; unknown: {listed - known}"


@pytest.mark.parametrize("number", PARSERS)
@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_a_guide_gives_the_defaults_and_choices_of_a_command(path: Path, number: str) -> None:
    rows = flag_rows(path.read_text(encoding="utf-8"), number)
    for name, action in actions(PARSERS[number]).items():
        unit, default, effect = rows[name]
        assert default == shown_default(action), name
        for choice in action.choices or ():
            assert f"`{choice}`" in unit + effect, f"{name}: {choice} is missing"


@pytest.mark.parametrize("number", PARSERS)
def test_no_flag_was_renamed(number: str) -> None:
    frozen, known = set(FROZEN_FLAGS[number].split()), actions(PARSERS[number]).keys()
    assert known == frozen, f"gone: {frozen - known}; new: {known - frozen}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_in_a_document_exists(path: Path) -> None:
    known = {"--help"}.union(FOREIGN_FLAGS, *(actions(parser) for parser in PARSERS.values()))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z]\w*", path.read_text(encoding="utf-8")))
    assert mentioned <= known, f"unknown: {mentioned - known}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert not missing, f"{path.name} links to {missing}"


def tree_entries() -> list[str]:
    """Return the paths that the README's tree names."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## The tree\n+```text\n(.*?)```", readme, flags=re.DOTALL)
    assert tree
    entries, folder = [], ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        entries.append(folder + name if line.startswith(" ") else name)
    return entries


def test_what_the_readme_names_exists() -> None:
    missing = [entry for entry in tree_entries() if not (ROOT / entry).exists()]
    assert not missing


def test_the_readme_names_every_file_at_the_top_and_every_part() -> None:
    ignored = {line.strip("/ ") for line in (ROOT / ".gitignore").read_text().splitlines()}
    top = {
        path.name + "/" * path.is_dir()
        for path in ROOT.iterdir()
        if not path.name.startswith(".") and path.name not in ignored and any_file(path)
    }
    parts = {f"inpainting/{p.name}" for p in (ROOT / "inpainting").glob("[!_]*.py")}
    named = set(tree_entries())
    assert top | parts <= named, f"not in the README's tree: {sorted((top | parts) - named)}"


def any_file(path: Path) -> bool:
    """Whether this is a file or a folder with one: git knows no empty folders."""
    return path.is_file() or any(p.is_file() for p in path.rglob("*") if p.suffix != ".pyc")


def test_the_install_commands_name_what_is_there() -> None:
    text = "\n".join(code_blocks(GUIDES[0].read_text(encoding="utf-8")))
    assert re.findall(r"pip install -r (\S+)", text) == ["requirements.txt"]
    development = (ROOT / "requirements-dev.txt").read_text()
    assert development.startswith("-r requirements.txt\n")


def test_the_readmes_table_holds_what_the_command_printed() -> None:
    printed = table_of(ROOT / "docs" / "demo_results.md")
    psnr = {(row["hole"], row["filled by"]): row["PSNR"] for row in printed}
    shown = table_of(ROOT / "README.md")
    assert {row["hole"] for row in shown} == {row["hole"] for row in printed}
    for row in shown:
        hole = row.pop("hole")
        assert "ControlNet" in row
        assert row == {name: psnr[hole, name] for name in row}


def table_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a page's table that begins with the column "hole", by column."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| hole "))
    stop = lines.index("", start)
    heading, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:stop]
    )
    return [dict(zip(heading, row, strict=True)) for row in rows]

"""Five captions of a scene: what is there, in which colour, where, on what ground, at what hour."""

from __future__ import annotations

from collections.abc import Sequence

from demo.backdrops import SETTINGS, SKIES
from demo.composition import Plan, Thing, depth_of
from demo.kinds import KINDS

NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLURALS = {"person": "people", "sheep": "sheep", "bus": "buses"}
MAX_OTHERS = 3  # things named besides the main one: more don't fit in 77 tokens


def write_captions(plan: Plan) -> tuple[str, str, str, str, str]:
    """Word one scene in five ways; the main thing, its colour and its place are in each."""
    main, others = _group(plan)
    what, where = _name(main), _place(main, plan=plan)
    rest = [f"{_name(group)} {_place(group, plan=plan)}" for group in others]
    setting, sky = SETTINGS[plan.setting].phrase, SKIES[plan.sky].phrase
    if KINDS[main[0].name].zone == "sky":
        setting = f"above {setting.split(' ', 1)[1]}"
    verb = "are" if len(main) > 1 and not main[0].is_crowd else "is"
    company = f" with {_join(rest)}" if rest else ""
    names = _join([f"{what} {where}", *(_name(group) for group in others)])
    return (
        f"{_capital(what)} {where} {setting} {sky}{company}.",
        f"There {verb} {_join([f'{what} {where}', *rest])}, {sky}.",
        f"{_capital(setting)} {sky}: {_join([f'{what} {where}', *rest])}.",
        f"A picture of {names}, {setting}.",
        f"{_capital(sky)}, {what} can be seen {where}{company}.",
    )


def _group(plan: Plan) -> tuple[list[Thing], list[list[Thing]]]:
    """Put equal things together, the largest groups first; the main thing's group is apart."""
    groups: dict[tuple[str, str | None, bool], list[Thing]] = {}
    for thing in plan.things:
        groups.setdefault((thing.name, thing.color_name, thing.is_crowd), []).append(thing)
    main, *others = groups.values()
    others.sort(key=lambda group: -sum(_visible_area(thing) for thing in group))
    return main, others[:MAX_OTHERS]


def _visible_area(thing: Thing) -> float:
    left, top, right, bottom = thing.box
    return (min(right, 1.0) - max(left, 0.0)) * (min(bottom, 1.0) - max(top, 0.0))


def _name(group: Sequence[Thing]) -> str:
    """Name equal things: "a red house", "two brown cows", "a flock of white sheep"."""
    thing = group[0]
    color = thing.color_name
    plural = PLURALS.get(thing.name, f"{thing.name}s")
    if thing.is_crowd:
        many = f"{color} {plural}" if color else plural
        return _count(f"{KINDS[thing.name].crowd} of {many}", number=len(group))
    noun = thing.name if len(group) == 1 else plural
    if thing.name == "person":
        return _count(f"{noun} in {color}", number=len(group))
    if thing.name == "snowman":
        return _count(f"{noun} with a {color} scarf", number=len(group))
    if thing.name == "lighthouse":
        return _count(f"{color} and white {noun}", number=len(group))
    return _count(f"{color} {noun}", number=len(group))


def _count(noun: str, *, number: int) -> str:
    if number == 1:
        return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
    if noun.startswith(("crowd ", "flock ", "bed ")):
        noun = noun.replace(" of ", "s of ", 1)
    return f"{NUMBERS[number] if number < len(NUMBERS) else 'many'} {noun}"


def _place(group: Sequence[Thing], *, plan: Plan) -> str:
    """Say where: left, middle or right, in the sky, in the distance."""
    middles = [(thing.box[0] + thing.box[2]) / 2 for thing in group]
    x = sum(middles) / len(middles)
    side = "on the left" if x < 0.38 else "on the right" if x > 0.62 else "in the middle"
    if max(middles) - min(middles) > 0.4:
        side = "side by side"
    if KINDS[group[0].name].zone == "sky":
        return "in the middle of the sky" if side == "in the middle" else f"in the sky {side}"
    foot = sum(thing.foot for thing in group) / len(group)
    height = max(member.height for thing in group for member in thing.members)
    is_far = depth_of(foot, horizon=plan.horizon) < 0.3 and height < 0.35
    return f"{side} in the distance" if is_far else side


def _join(phrases: Sequence[str]) -> str:
    """List: "a", "a and b", "a, b and c"."""
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]

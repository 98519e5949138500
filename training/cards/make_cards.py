"""Write `src/hasten/models/<name>/README.md` for every bundled model: run `python -m cards.make_cards` in `training/`.

Numbers come from `score/results.json`, `logs/*.csv` and the model folders; sentences about what can be seen in the
samples from `cards/notes/<name>.md`, which hold no numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cards.facts import MODELS, TRAINING, megabytes, parameters, read_json, results, runs

NOTES = TRAINING / "cards" / "notes"
SEEN_AIM, HELD_OUT_AIM, STYLE_AIM = 0.5, 0.25, 0.8
INTRO = {
    "emoji-flux": "A `FluxPipeline` that draws emoji from captions such as *pizza, fluent style*. Flow matching,"
    " guidance distilled into the network: one call a step.",
    "emoji-sd": "A `StableDiffusionPipeline` that draws emoji from captions such as *pizza, fluent style*."
    " A U-Net with cross-attention, v-prediction, classifier-free guidance: two calls a step.",
    "emoji-dit": "A `DiTPipeline` that draws emoji of a class such as *pizza*. Class-conditional transformer,"
    " v-prediction, classifier-free guidance: two calls a step.",
}
MACHINES = {"emoji-sd": "one H200 and (the last 6) one H100"}
ALIGNMENT = "right name first, of all {names}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def percent(value: float) -> str:
    """A share as a percentage; small ones keep a digit more."""
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"


def verdict(value: float, aim: float) -> str:
    """An aim and whether it was reached."""
    return f"at least {percent(aim)}: {'reached' if value >= aim else 'not reached'}"


def kid_row(label: str, split: dict[str, Any]) -> list[str]:
    """Distance of the samples, and of the real images among themselves."""
    drawn, floor = split["kid"]["samples"], split["kid"]["floor"]
    cells = [f"{round(one['mean'])} ± {round(one['spread'])}" for one in (drawn, floor)]
    return [f"KID, {label} (lower is better)", *cells, f"groups of {drawn['subset']}"]


def alignment_rows(label: str, split: dict[str, Any], aim: float, names: int) -> list[list[str]]:
    """Retrieval of the right name, samples beside real images."""
    found = split["alignment"]
    drawn, real, share = found["samples"], found["real"], found["share_of_real"]
    first = [f"{percent(one['top1'])} ± {100 * one['top1_error']:.0f}" for one in (drawn, real)]
    remark = f"{percent(share)} of the real images' score; {verdict(share, aim)}"
    return [
        [f"{ALIGNMENT.format(names=names)}, {label}", *first, remark],
        [f"right name among the first five, {label}", percent(drawn["top5"]), percent(real["top5"]), ""],
    ]


def style_rows(label: str, split: dict[str, Any]) -> list[list[str]]:
    """The style classifier and the nearest drawing, where a style can be asked for."""
    if "style" not in split:
        return []
    style = split["style"]
    chance = f"chance {percent(style['nearest_drawing_chance'])}"
    return [
        [
            f"right style (classifier), {label}",
            percent(style["samples"]),
            percent(style["real"]),
            verdict(style["samples"], STYLE_AIM),
        ],
        [f"nearest drawing has the right style, {label}", percent(style["nearest_drawing"]), "-", chance],
    ]


def score_table(scores: dict[str, Any], names: int) -> str:
    """All scores of one model."""
    splits = [("seen", "seen", SEEN_AIM), ("held_out", "held out", HELD_OUT_AIM)]
    splits = [one for one in splits if one[0] in scores]
    rows: list[list[str]] = []
    for key, label, aim in splits:
        rows += alignment_rows(label, scores[key], aim, names)
    for key, label, _ in splits:
        rows += style_rows(label, scores[key])
    rows += [kid_row(label, scores[key]) for key, label, _ in splits]
    return table(["", "samples", "real images", ""], rows)


def style_sentence(scores: dict[str, Any]) -> str:
    """The classifier's verdict for each style."""
    overall = scores.get("all", scores["seen"])
    if "style" not in overall:
        return "A style cannot be asked for: the seed decides which of the trained styles is drawn.\n"
    shares = ", ".join(f"{style} {percent(share)}" for style, share in overall["style"]["by_style"].items())
    return f"By style, the classifier finds right: {shares}.\n"


def failures(scores: dict[str, Any]) -> str:
    """Captions whose samples the alignment score puts farthest away, as measured."""
    split = scores.get("held_out", scores["seen"])
    worst = [
        f"*{one['name']}{', ' + one['style'] + ' style' if one['style'] else ''}* (taken for {one['taken_for']})"
        for one in split["alignment"]["worst"][:6]
    ]
    groups = list(scores["seen"]["alignment"]["by_group"].items())
    (best, best_share), (last, last_share) = groups[0], groups[-1]
    return (
        f"By the alignment score {best} come out best (right name first in {percent(best_share)} of the samples) and"
        f" {last} worst ({percent(last_share)}). Farthest off"
        f"{' of the held-out pairs' if 'held_out' in scores else ''}: {', '.join(worst)}."
    )


def copies(scores: dict[str, Any]) -> str:
    """How close samples are to training images."""
    seen = scores["seen"]["nearest"]
    text = (
        f"{percent(seen['copies'])} of the samples of seen captions are near copies of a training image (LPIPS under"
        f" 0.1); the median distance is {seen['lpips_median']:.2f}."
    )
    if "held_out" in scores:
        median = scores["held_out"]["nearest"]["lpips_median"]
        text += f" For held-out pairs, whose picture the model never saw, it is {median:.2f}."
    return text


def size_section(name: str, folder: Path) -> str:
    """Components, parameters, bytes."""
    counts = parameters(folder)
    rows = [[component, f"{count / 1e6:.2f} M"] for component, count in counts.items()]
    rows.append(["together", f"{sum(counts.values()) / 1e6:.2f} M, {megabytes(folder):.2f} MB in float16"])
    return table(["component", "parameters"], rows)


def usage(name: str, folder: Path) -> str:
    """A snippet with the default workload."""
    work = read_json(folder / "workload.json")
    options = f"num_inference_steps={work['steps']}, guidance_scale={work['guidance']}"
    if work["max_sequence_length"]:
        options += f", max_sequence_length={work['max_sequence_length']}"
    size = f"width={work['width']}, height={work['height']}"
    call = f'pipe(\n    "{work["prompts"][0]}", {size}, {options}\n)'
    if name == "emoji-dit":
        call = f'pipe(pipe.get_label_ids(["{work["prompts"][0]}"]), {options})'
    load = f'pipe = hasten.load("{name}").pipeline'
    return f"```python\nimport hasten\n\n{load}\nimage = {call}.images[0]\n```"


def trained_on(name: str, folder: Path, found: dict[str, Any]) -> str:
    """Which part of the data trained this model."""
    if name != "emoji-dit":
        return "all of them trained this model"
    classes = len(read_json(folder / "model_index.json")["id2label"])
    styles = ", ".join(found["models"][name]["styles"])
    return f"those of {classes} concepts in three styles mixed ({styles}) trained this model"


def training_section(name: str) -> str:
    """Time, steps and loss from the logs."""
    rows = [[run.name, f"{run.steps:,}", f"{run.minutes:.1f}", f"{run.loss:.3f}"] for run in runs(name)]
    total, machine = sum(run.minutes for run in runs(name)), MACHINES.get(name, "one H200")
    return (
        table(["run", "logged steps", "minutes", "last loss"], rows)
        + f"\n\nTogether {total:.0f} minutes of {machine}, part of them shared with the other models' runs; the"
        " autoencoder is the same for all three. Scripts, logs and how to repeat it: `training/README.md`."
    )


def scale(validation: dict[str, Any]) -> str:
    """What the scores give for real images with known damage: a ruler for the table."""
    rows = [
        [kind, f"{one['kid']:.0f}", percent(one["top1"]), percent(one["style"])]
        for kind, one in validation["damaged"].items()
    ]
    wrong = validation["wrong_captions"]
    rows.append(["untouched, under other images' captions", "-", percent(wrong["top1"]), percent(wrong["style"])])
    return table(["real images, damaged", "KID", "right name first", "right style"], rows)


def card(name: str, found: dict[str, Any]) -> str:
    """The whole card."""
    folder, scores, data = MODELS / name, found["models"][name], found["data"]
    template = (TRAINING / "cards" / "card.md").read_text()
    return template.format(
        name=name,
        intro=INTRO[name],
        usage=usage(name, folder),
        size=size_section(name, folder),
        training=training_section(name),
        data=data,
        count=scores["count"],
        trained=data["images"] - data["held_out"],
        trained_on=trained_on(name, folder, found),
        drawn_names=scores["names"],
        scores=score_table(scores, data["names"]),
        style_sentence=style_sentence(scores),
        explained=(TRAINING / "cards" / "with_styles.md").read_text() if "held_out" in scores else "",
        scale=scale(found["validation"]),
        failures=failures(scores),
        notes=(NOTES / f"{name}.md").read_text().strip(),
        copies=copies(scores),
    )


def main() -> None:
    """Write all cards."""
    found = results()
    for name in found["models"]:
        path = MODELS / name / "README.md"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(card(name, found))
        temporary.replace(path)
        print(path.relative_to(TRAINING.parent), path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from hasten.measure.comparison import Comparison, FidelityRecord, Row, Timing, WorkloadRecord
from hasten.measure.report import formatting as fmt
from hasten.measure.report import heat, render_html, summary
from hasten.measure.report.images import build_gallery
from hasten.measure.report.names import labels, readable
from hasten.measure.report.scatter import Chart, lay_out, text_width, ticks
from hasten.measure.report.verdict import beaten_by, choices, closeness, measured, pick
from tests.measure.example import CASES, PROMPTS, Case, make_example_comparison

HOSTILE = (
    '</script><script>alert(1)</script><img src=x onerror=alert(2)> "q" {{ 7*7 }} & <!-- \u2028 \N{SLICE OF PIZZA}'
)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return make_example_comparison(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="module")
def page(example: Comparison) -> str:
    return render_html(example, example.folder)


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of the elements in `keep`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def printed(comparison: Comparison, width: int) -> str:
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(comparison.table())
    return capture.get()


# The terminal table


@pytest.mark.parametrize("width", [80, 100, 140])
def test_table_fits_and_shows_every_figure(example: Comparison, width: int) -> None:
    text = printed(example, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    words = text.split()
    for cell in ("4.21", "4.15-4.34", "1.94x", "41.5", "412", "MiB", "12/16", "identical", "33.5", "slight", "yes"):
        assert cell in words, cell
    assert "after 42" in text
    flowing = " ".join(words)
    assert "refused DeepCache: DeepCache needs a U-Net with skip connections" in flowing
    assert "growth of the process's resident memory" in flowing
    assert "noise floor: 51.3 dB" in flowing
    assert "Incomplete" in flowing


def test_table_survives_names_with_markup_and_control_characters(example: Comparison) -> None:
    rows = (example.rows[0].model_copy(update={"name": "[red]x[/red] \x1b[31m\r\n" + "y" * 90}),)
    text = printed(example.model_copy(update={"rows": rows}), 100)
    assert "[red]x" in text
    assert "\x1b" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0001, "<0.001"), (0.1834, "0.183"), (2.289, "2.29"), (24.11, "24.1"), (132.4, "132")],
)
def test_seconds(value: float | None, text: str) -> None:
    assert fmt.seconds(value) == text


def test_a_model_in_a_folder_is_named_by_the_folder() -> None:
    names = {"/home/me/flux": "flux", "./flux": "flux", "C:\\x\\flux": "flux", "org/flux": "org/flux", "emoji": "emoji"}
    assert {model: fmt.model_name(model) for model in names} == names


def test_ratios_never_round_to_perfection() -> None:
    assert (fmt.ratio(0.99996), fmt.ratio(1.0), fmt.ratio(0.0001), fmt.ratio(0.0)) == (
        ">.999",
        "1.000",
        "<.001",
        "0.000",
    )
    assert (fmt.memory(0), fmt.memory(5 * 2**19), fmt.memory(412 * 2**20), fmt.memory(115 * 2**30)) == (
        "0 MiB", "2.5 MiB", "412 MiB", "115 GiB")  # fmt: skip


def test_names_are_shortened_without_losing_their_difference(example: Comparison) -> None:
    assert readable("ChannelsLast() | FirstBlockCache(threshold=0.08)") == "ChannelsLast + FirstBlockCache 0.08"
    assert readable("AttentionBackend(name='math')") == "AttentionBackend math"
    assert readable("X(a=1, b='c')") == "X a 1, b c"
    assert readable("SVDQuant(activations=4)") == "SVDQuant activations 4"
    assert readable("SVDQuant(bits=4)") == "SVDQuant 4"
    assert readable("my own (best) name") == "my own (best) name"
    short = labels(example.rows)
    assert short[2:5] == ["+ FirstBlockCache 0.06", "+ FirstBlockCache 0.12", "+ FirstBlockCache 0.4"]
    assert len(set(short)) == len(short)


# What the numbers mean


def row(name: str, seconds: float, psnr: float, kind: str = "recipe", lpips: float = 0.0) -> Row:
    return Row.model_validate(
        {"name": name, "recipe": name, "kind": kind, "status": "ok", "speedup": 4 / seconds,
         "seconds_per_image": Timing.of([seconds, seconds * 1.02]),
         "fidelity": FidelityRecord(psnr=psnr, ssim=0.9, lpips=lpips) if kind != "baseline" else None,
         "noise_floor": FidelityRecord(psnr=50.0, lpips=0.001)}
    )  # fmt: skip


def comparing(*rows: Row) -> Comparison:
    work = WorkloadRecord(model="m", denoiser="D", dtype="float32", device="cpu", width=8, height=8, steps=4,
                          prompts=("p",), seeds=(0,), runs=2)  # fmt: skip
    return Comparison(environment={}, workload=work, rows=(row("plain", 4, math.inf, "baseline"), *rows))


def words_of(comparison: Comparison) -> str:
    found = [*summary.sentences(comparison), *summary.cautions(comparison)]
    return " ".join(summary.plain_text(sentence) for sentence in found)


def test_closeness_follows_the_record_then_the_scale() -> None:
    assert closeness(row("a", 2, math.inf)) == "identical"
    assert closeness(row("a", 2, 51.0)) == "none"
    assert closeness(row("a", 2, 51.0, lpips=0.002)) == "invisible"
    assert closeness(row("a", 2, 33.0)) == "slight"
    assert closeness(row("a", 2, 33.0, lpips=0.1)) == "visible"
    assert closeness(row("a", 2, 12.0)) == "strong"
    assert closeness(row("a", 2, 12.0).model_copy(update={"difference": "slight"})) == "slight"


def test_the_fastest_row_within_each_limit_is_chosen() -> None:
    found = comparing(row("same", 3.5, math.inf), row("near", 3, 45), row("slow", 3.2, 44), row("far", 1, 15))
    assert [(choice.limit, choice.row.name) for choice in choices(found)] == [
        ("identical", "same"), ("invisible", "near"), ("strong", "far")]  # fmt: skip
    chosen = pick(found)
    assert chosen is not None
    assert chosen.row.name == "near"
    assert summary.headline(found) == "1.33\N{MULTIPLICATION SIGN} as fast, and the images look the same"
    assert "Fastest row that still looks the same: near at 1.33" in words_of(found)
    assert "its images plainly differ (PSNR 15.0 dB)" in words_of(found)


def test_a_gain_within_the_spread_of_the_timings_is_no_gain() -> None:
    found = comparing(row("hardly", 3.95, math.inf))
    assert pick(found) is None
    assert summary.headline(found) == "No recipe was faster"
    assert "hardly lies within the spread of the timings" in words_of(found)


def test_a_recipe_that_fewer_steps_beat_is_said_to_be_not_worth_having() -> None:
    control = row("plain, 2 steps", 2, 35, "fewer_steps")
    worse, better = row("worse", 2.5, 31), row("better", 1.9, 36)
    beaten = comparing(worse, control)
    assert beaten_by(worse, beaten) == control
    assert "worse is not worth having here" in words_of(beaten)
    assert summary.headline(beaten).endswith("with slight differences; fewer steps would do")
    won = comparing(better, control)
    assert beaten_by(better, won) is None
    assert "better is both faster and closer" in words_of(won)
    assert summary.headline(won).endswith("with slight differences")


def test_a_row_that_is_worth_having_is_pointed_at_before_a_faster_one_that_is_not() -> None:
    control = row("plain, 2 steps", 2, 35, "fewer_steps")
    chosen = pick(comparing(row("worth", 3, 45), row("beaten", 2.5, 31), control))
    assert chosen is not None
    assert chosen.row.name == "worth"


def test_failed_rows_do_not_count_even_with_figures() -> None:
    failed = row("broken", 1, 45).model_copy(update={"status": "failed", "reason": "did not engage"})
    found = comparing(failed)
    assert measured(found) == []
    assert lay_out(found) is None
    assert "broken was failed" not in words_of(found)
    assert "broken failed" in words_of(found)


# The chart


def all_boxes(chart: Chart) -> list[tuple[float, float, float, float]]:
    return [(p.label.box.x, p.label.box.y, p.label.box.width, p.label.box.height) for p in chart.points if p.label]


def crowded(count: int) -> Comparison:
    random = np.random.default_rng(0)
    return comparing(
        *(
            row(f"recipe number {index}", float(random.uniform(1, 4)), float(random.choice([18, 25, 33, 45, math.inf])))
            for index in range(count)
        )
    )


@pytest.mark.parametrize("size", [(680.0, 630.0), (360.0, 400.0)])
@pytest.mark.parametrize("count", [2, 8, 20])
def test_labels_overlap_neither_each_other_nor_points(size: tuple[float, float], count: int) -> None:
    chart = lay_out(crowded(count), *size)
    assert chart is not None
    boxes = all_boxes(chart)
    assert len(boxes) >= min(count, 8)
    for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(boxes, 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
    for (x, y, w, h), point in itertools.product(boxes, chart.points):
        assert not (x <= point.x <= x + w and y <= point.y <= y + h)
    assert all(chart.plot.x <= x and x + w <= chart.plot.x + chart.plot.width for x, _, w, _ in boxes)


def test_chart_places_speed_to_the_right_fidelity_upwards_and_identical_on_top() -> None:
    chart = lay_out(comparing(row("same", 3, math.inf), row("near", 2, 40), row("far", 1, 20)))
    assert chart is not None
    plain, same, near, far = chart.points
    assert plain.x < same.x < near.x < far.x
    assert plain.y == same.y < chart.band < near.y < far.y
    assert chart.floor is not None
    assert chart.band < chart.floor.at < near.y
    assert [point[0] for point in chart.frontier] == [same.x, near.x, far.x]


def test_a_floor_far_above_leaves_the_rows_their_room() -> None:
    near = comparing(row("near", 2, 40), row("far", 1, 20))
    high = FidelityRecord(psnr=95.0, lpips=0.0)
    beyond = near.model_copy(update={"rows": [one.model_copy(update={"noise_floor": high}) for one in near.rows]})
    charts = [chart for chart in map(lay_out, (near, beyond)) if chart]
    spreads = [chart.points[-1].y - chart.points[-2].y for chart in charts]
    assert spreads[1] > 0.7 * spreads[0]
    floor = charts[1].floor
    assert floor is not None
    assert "95.0 dB (off the scale)" in floor.text
    assert charts[1].band <= floor.at < charts[1].points[-2].y


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.83, 3.9, 6) == [1.0, 2.0, 3.0]
    assert ticks(15, 55, 6) == [20.0, 30.0, 40.0, 50.0]
    assert text_width("iii") < text_width("mmm")


# Heat maps and images


def test_heat_map_shows_the_amplified_difference() -> None:
    black = Image.new("RGB", (4, 1))
    other = Image.fromarray(np.array([[[0, 0, 0], [3, 3, 3], [16, 16, 16], [64, 64, 64]]], dtype=np.uint8))
    assert np.asarray(heat.heat_map(other, black)).tolist() == [[0, 12, 64, 255]]


def test_palette_gets_steadily_lighter() -> None:
    luma = heat.palette().astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luma) > -0.6).all()
    assert luma[0] < 12
    assert luma[-1] > 220


def test_images_are_embedded_as_they_are_when_they_fit(example: Comparison) -> None:
    gallery = build_gallery(example, example.folder)
    file = (example.folder / example.rows[2].images[1]).read_bytes()
    assert gallery.pictures[2, 1].uri == "data:image/png;base64," + base64.b64encode(file).decode()
    assert gallery.note == ""
    assert gallery.pictures[1, 0].identical
    assert gallery.pictures[1, 0].heat is None
    mean = np.mean([gallery.pictures[2, image].psnr or 0 for image in range(4)])
    assert example.rows[2].fidelity is not None
    assert mean == pytest.approx(example.rows[2].fidelity.psnr, abs=0.01)


@pytest.mark.parametrize("budget", [400_000, 120_000, 40_000])
def test_images_are_compressed_to_fit_the_budget(example: Comparison, budget: int) -> None:
    gallery = build_gallery(example, example.folder, budget)
    assert 0 < gallery.size <= budget
    assert "WebP" in gallery.note
    assert len(gallery.pictures) == sum(len(r.images) for r in example.rows)


def test_missing_and_damaged_images_leave_a_word(tmp_path: Path) -> None:
    found = make_example_comparison(tmp_path, prompts=PROMPTS[:2], cases=CASES[:3])
    (tmp_path / found.rows[1].images[0]).unlink()
    (tmp_path / found.rows[2].images[1]).write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    gallery = build_gallery(found, tmp_path)
    assert gallery.pictures[1, 0].problem
    assert gallery.pictures[2, 1].problem
    assert render_html(found, tmp_path).count("file missing or damaged") == 2


# The page


def test_page_needs_nothing_from_elsewhere(page: str) -> None:
    assert not re.search(r"https?:|url\(|@import|src=[\"']?(http|//)", page)
    for tag, attributes in Elements(page).tags:
        for name in ("src", "href", "action", "poster", "data"):
            value = attributes.get(name, "#")
            assert value.startswith(("data:", "#")), (tag, name, value[:60])
        assert not any(name.startswith("on") for name in attributes), tag


def test_page_embeds_every_image_once_with_a_text(example: Comparison, page: str) -> None:
    images = [image for image in Elements(page).named("img") if image.get("src")]
    photos = sum(len(r.images) for r in example.rows)
    identical, plain = 4, 4
    assert len(images) == photos + (photos - identical - plain)
    assert all(image["alt"] for image in images)
    assert len({image["src"] for image in images if image.get("class") == "photo"}) == photos - identical


def test_page_holds_the_exact_json(example: Comparison, page: str) -> None:
    link = next(a for a in Elements(page).named("a") if a.get("download") == "comparison.json")
    assert base64.b64decode(link["href"].partition(",")[2]).decode() == example.to_json()


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    cases = (CASES[0], replace(CASES[2], name=f"<b>{HOSTILE}", recipe=HOSTILE, changes=(HOSTILE,)),
             Case(f"r {HOSTILE}", "", status="refused", reason=HOSTILE))  # fmt: skip
    found = make_example_comparison(tmp_path, prompts=(HOSTILE,), cases=cases)
    elements = Elements(render_html(found, tmp_path))
    assert len(elements.named("script")) == 1
    assert not [image for image in elements.named("img") if image.get("src") == "x"]
    assert any("{{ 7*7 }}" in text for text in elements.texts)
    assert any(HOSTILE in text for text in elements.texts)
    shown = json.loads(next(text for text in elements.texts if text.startswith('{\n  "schema": 1')))
    assert shown["workload"]["prompts"] == [HOSTILE]


def test_page_is_deterministic(example: Comparison, page: str) -> None:
    again = Comparison.model_validate_json(example.to_json())
    assert render_html(again, example.folder) == page


def test_page_ids_are_unique_and_links_lead_somewhere(page: str) -> None:
    elements = Elements(page)
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in elements.named("a") if a["href"].startswith("#")}
    assert targets <= set(ids)


def test_page_says_what_matters(example: Comparison, page: str) -> None:
    text = " ".join(" ".join(Elements(page).texts).split())
    for piece in (
        "1.94\N{MULTIPLICATION SIGN} as fast, with slight differences",
        "DeepCache needs a U-Net with skip connections",
        "Stopped by the user after 2 of 4 images.",
        "Incomplete",
        "amplified 4 times",
        "after 42 images",
        "12 of 28 steps computed in full: 1, 3, 6, 8, 11, 13, 16, 18, 21, 23, 26, 28",
        "transformer: attention back-end 'native' (9 modules)",
        "growth of the process's resident memory",
        "noise floor 51.3 dB",
    ):
        assert piece in text, piece


def test_reports_without_pictures_or_recipes_still_render(tmp_path: Path) -> None:
    alone = make_example_comparison(tmp_path, prompts=PROMPTS[:1], cases=CASES[:1])
    html = render_html(alone, tmp_path)
    assert "Only the plain pipeline was run" in html
    assert 'id="compare"' not in html
    empty = comparing().model_copy(update={"rows": ()})
    assert "was not measured" in render_html(empty, tmp_path)
    refused = comparing(Row(name="r", recipe="R()", status="refused", reason="No such layer."))
    assert "No recipe could be compared" in render_html(refused, tmp_path)


def test_to_html_writes_the_page_beside_the_images(example: Comparison, page: str, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "report.html"
    assert example.to_html(path) == page
    assert path.read_text("utf-8") == page


def test_script_shows_the_comparison_in_a_browser(example: Comparison, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium")
    path = tmp_path / "report.html"
    example.to_html(path)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    elements = Elements(dom)
    card = next(section for section in elements.named("section") if section.get("id") == "compare")
    assert "hidden" not in card
    over = next(image for image in elements.named("img") if image.get("id") == "over")
    assert over["src"].startswith("data:image/png")
    assert "50%" in over["style"]

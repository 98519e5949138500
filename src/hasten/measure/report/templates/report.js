"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const card = byId("compare");

  // Details are opened for printing and closed again afterwards.
  const closed = () => [...document.querySelectorAll("details:not(.raw):not([open])")];
  let opened = [];
  addEventListener("beforeprint", () => { opened = closed(); opened.forEach((one) => { one.open = true; }); });
  addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));
  const openTarget = () => {
    const target = location.hash.length > 1 && byId(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", openTarget);
  openTarget();
  if (!card) return;

  const left = byId("left"), right = byId("right"), which = byId("which");
  const under = byId("under"), over = byId("over"), divider = byId("divider");
  const split = byId("split"), flipper = byId("flipper"), stage = byId("stage");
  const missing = byId("missing"), told = byId("told");
  const names = { left: byId("name-left"), right: byId("name-right") };
  let flipped = false;

  const shot = (row) => document.querySelector(`.shot[data-row="${row}"][data-image="${which.value}"]`);
  const nameOf = (select) => select.selectedOptions[0].dataset.label;
  const mode = () => document.querySelector('input[name="mode"]:checked').value;
  const heatOf = (button) => button && button.parentElement.querySelector(".heat img");

  function setImage(img, source) {
    img.hidden = !source;
    if (source) { img.src = source.src; img.alt = source.alt; } else { img.removeAttribute("src"); img.alt = ""; }
  }

  function setSplit(percent) {
    split.value = String(percent);
    moveSplit();
  }

  function moveSplit() {
    const percent = Number(split.value);
    under.style.clipPath = `inset(0 ${100 - percent}% 0 0)`;
    over.style.clipPath = `inset(0 0 0 ${percent}%)`;
    divider.style.left = `${percent}%`;
  }

  function describe(select) {
    const button = shot(select.value);
    if (!button) return `${nameOf(select)}: no image`;
    return select.selectedOptions[0].textContent + (button.dataset.note ? ` (${button.dataset.note})` : "");
  }

  function showSlide(a, b) {
    setImage(under, a);
    setImage(over, b);
    names.left.textContent = nameOf(left);
    names.right.textContent = nameOf(right);
    moveSplit();
    return `${describe(left)} against ${describe(right)}. Drag the line or use the arrow keys.`;
  }

  function showFlip(a, b) {
    const chosen = flipped ? right : left;
    setImage(under, flipped ? b : a);
    setImage(over, null);
    names.left.textContent = nameOf(chosen);
    flipper.setAttribute("aria-label", `Showing ${nameOf(chosen)}. Flip to the other image`);
    return `${describe(chosen)}. Click the image, or press Enter or Space, to flip.`;
  }

  function showHeat() {
    const map = heatOf(shot(right.value)) || heatOf(shot(left.value));
    const plain = document.querySelector(".kind-baseline .shot");
    const base = plain && plain.dataset.row;
    const one = left.value === base ? right : right.value === base ? left : null;
    const found = one && heatOf(shot(one.value));
    setImage(under, found);
    setImage(over, null);
    names.left.textContent = found ? nameOf(one) : "";
    if (found) return `Difference of ${describe(one)} from the plain image.`;
    if (left.value === right.value) return "Both sides show the same row.";
    if (one && shot(one.value)) return `${describe(one)}: no difference from the plain image.`;
    return map ? "Choose the plain pipeline on one side to see a difference map." : "There is no difference map.";
  }

  function show() {
    const kind = mode(), a = shot(left.value), b = shot(right.value);
    const photo = (button) => button && button.querySelector("img");
    stage.dataset.mode = kind;
    flipper.hidden = kind !== "flip";
    split.hidden = divider.hidden = names.right.hidden = kind !== "slide";
    under.style.clipPath = over.style.clipPath = "";
    if (kind === "slide") told.textContent = showSlide(photo(a), photo(b));
    else if (kind === "flip") told.textContent = showFlip(photo(a), photo(b));
    else told.textContent = showHeat();
    missing.hidden = !under.hidden || (kind === "slide" && !over.hidden);
    missing.textContent = kind === "heat" ? told.textContent : "No image";
  }

  function drag(event) {
    if (mode() !== "slide" || !(event.buttons & 1)) return;
    const box = stage.getBoundingClientRect();
    setSplit(Math.min(100, Math.max(0, 100 * (event.clientX - box.left) / box.width)));
  }

  stage.addEventListener("pointerdown", (event) => {
    if (mode() !== "slide") return;
    stage.setPointerCapture(event.pointerId);
    drag(event);
  });
  stage.addEventListener("pointermove", drag);
  split.addEventListener("input", moveSplit);
  flipper.addEventListener("click", () => { flipped = !flipped; show(); });
  [left, right, which].forEach((select) => select.addEventListener("change", () => { flipped = false; show(); }));
  document.querySelectorAll('input[name="mode"]').forEach((input) => input.addEventListener("change", show));

  document.querySelectorAll(".shot").forEach((button) => button.addEventListener("click", () => {
    which.value = button.dataset.image;
    if (button.closest(".kind-baseline")) left.value = button.dataset.row;
    else right.value = button.dataset.row;
    flipped = false;
    show();
    card.scrollIntoView({ block: "nearest" });
    (mode() === "flip" ? flipper : split).focus({ preventScroll: true });
  }));

  card.hidden = false;
  const others = [...right.options].map((option) => option.value);
  right.value = others.includes(card.dataset.pick) ? card.dataset.pick : others[1];
  show();
})();

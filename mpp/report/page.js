"use strict";
const all = (query, within = document) => [...within.querySelectorAll(query)];

// The colours: as the system has them, or as the reader chooses.
const scheme = document.getElementById("page_scheme"), dark = document.getElementById("page_dark");
const schemes = [["system", dark.media], ["light", "not all"], ["dark", "screen"]];
function showScheme(at) {
  scheme.textContent = "Colours: " + schemes[at][0];
  dark.media = schemes[at][1];
  scheme.onclick = () => showScheme((at + 1) % schemes.length);
}
scheme.hidden = false;
showScheme(0);

// A slider shows one stop of every cell of its sheet.
for (const slider of all(".slider")) {
  const sheet = slider.closest(".sheet"), input = slider.querySelector("input");
  const stops = JSON.parse(input.dataset.stops);
  const show = () => {
    for (const tile of all(".stop", sheet)) tile.hidden = tile.dataset.stop !== input.value;
    slider.querySelector("b").textContent = stops[input.value];
    input.setAttribute("aria-valuetext", stops[input.value]);
  };
  input.addEventListener("input", show);
  slider.hidden = false;
  sheet.querySelector(".last").hidden = true;
  show();
}

// Paper has what is folded, too.
addEventListener("beforeprint", () => all("details:not([open])").forEach((folded) => (folded.dataset.closed = folded.open = true)));
addEventListener("afterprint", () => all("details[data-closed]").forEach((folded) => { folded.open = false; delete folded.dataset.closed; }));

// A picture opens enlarged.
const dialog = document.getElementById("page_enlarged");
function enlarge(picture) {
  const shown = picture.querySelector("img, svg").cloneNode(true);
  const frame = dialog.querySelector("div");
  frame.replaceChildren(shown);
  frame.classList.toggle("pixelated", picture.classList.contains("pixelated"));
  dialog.querySelector("p").textContent = shown.alt ?? shown.getAttribute("aria-label");
  dialog.showModal();
}
dialog.addEventListener("click", (event) => { if (!event.target.closest("p")) dialog.close(); });
dialog.addEventListener("close", () => dialog.querySelector("div").replaceChildren());
for (const picture of all(".picture")) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = "Enlarge";
  button.append(...picture.childNodes);
  button.addEventListener("click", () => enlarge(picture));
  picture.append(button);
}

// One stop of the tab key for a whole sheet; the arrows go from cell to cell.
const towards = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const visible = (cell) => cell && all("button", cell).find((button) => button.offsetParent);
for (const table of all(".sheet table")) {
  const first = table.querySelector(".picture").closest("td");
  for (const button of all("button", table)) button.tabIndex = first.contains(button) ? 0 : -1;
  table.addEventListener("keydown", (event) => {
    const cell = event.target.closest("td"), step = towards[event.key];
    const next = cell && step && table.rows[cell.parentElement.rowIndex + step[0]]?.cells[cell.cellIndex + step[1]];
    if (!visible(next)) return;
    event.preventDefault();
    visible(next).focus();
  });
}

// The contents show where the reader is.
const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
const watch = new IntersectionObserver((entries) => {
  const entry = entries.findLast((entry) => entry.isIntersecting);
  if (!entry) return;
  for (const link of links.values()) link.removeAttribute("aria-current");
  links.get(entry.target.id)?.setAttribute("aria-current", "true");
}, { rootMargin: "-20% 0px -70%" });
for (const section of all("main > section")) watch.observe(section);
